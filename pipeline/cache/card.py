"""README.md of a cache: a dataset card whose front matter lets `datasets.load_dataset` read the directory as it is."""

from __future__ import annotations

import yaml

from pipeline.records import Fidelity, Full, Manifest, Sampled

_BODY = """
# Soft labels of {teacher}

What the teacher `{teacher}` ({architecture}, {parameters:,} parameters, {dtype}) predicts on `{source}`, made by
soft-label-pipeline: a cache to train students from, without the teacher.

| | |
|---|---|
| task | {task} |
| encoding | {encoding} |
| classes | {num_classes:,} |
| splits | {splits} |
| rows | {rows:,} |
| supervised positions | {positions:,} |
| tokens | {tokens:,} |
| bytes a position (all columns) | {per_position:.1f} |
| rows set aside | {bad_rows} |
| cache_id | `{cache_id}` |

## Reading it

```python
from datasets import load_dataset
rows = load_dataset("path/of/this/directory", split="{first_split}")
```

One row is one example; list columns hold its supervised positions one after another.
{columns}

The kept classes and their weights at each position of a row, with NumPy alone:

```python
{code}```

{fidelity}`manifest.json` holds the contract (teacher, tokenizer, source, encoding) and the SHA-256 of every shard. `datasets` does not verify page checksums;
`softlabel verify --cache DIR` does, and so does `pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)`.

## Training from it

    softlabel train-student --cache DIR --student STUDENT --output OUT
"""

_ENCODING = {
    "full": (
        "`logits`: V values a position, nats, the largest is 0. softmax(logits / T) is the teacher at temperature T.",
        """import numpy as np

logits = np.asarray(row["logits"], dtype=np.float64).reshape(-1, {num_classes})
q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
positions = [(range({num_classes}), weights) for weights in q]
""",
    ),
    "top": (
        "`top_count[n]` classes are kept at position n; `top_ids` and `top_logprobs` (nats, of softmax(z)) hold them one position after another, by falling\n"
        "probability. `log_residuals` holds, for each position, the log of the mass outside them at temperature(s) {grid}. At such a T the exact distribution is\n"
        "q_T(i) = (1 - exp(log_residual_T)) * softmax over the kept classes of (top_logprobs / T).",
        """import numpy as np

cuts = np.cumsum(row["top_count"])[:-1]
kept = zip(np.split(row["top_ids"], cuts), np.split(row["top_logprobs"], cuts))
positions = [(ids, np.exp(np.float64(logprobs))) for ids, logprobs in kept]  # at T = 1
""",
    ),
    "sampled": (
        "`top_count[n]` classes are kept for certain at position n: `top_ids`, by falling probability, and their weights `top_weights`, whole numbers of 1/{steps}. `tail_count[n]`\n"
        "more are an unbiased sample of the rest, each of weight 1/{size:g}: `tail_gaps` holds the first of a position, then the distance from each to the next. The expectation\n"
        "of these weights is the teacher's distribution softmax(z / {temperature:g}); they sum to 1 +- 1/{size:g} + 1/{steps}.",
        """import numpy as np

top, tail = np.cumsum(row["top_count"])[:-1], np.cumsum(row["tail_count"])[:-1]
ids, weights = np.split(row["top_ids"], top), np.split(np.asarray(row["top_weights"]) / {steps}, top)
sample = [np.cumsum(gaps) for gaps in np.split(np.asarray(row["tail_gaps"], dtype=np.int64), tail)]
positions = [
    (np.concatenate([i, s]).astype(np.int64), np.concatenate([w, np.full(len(s), 1 / {size:g})]))
    for i, w, s in zip(ids, weights, sample)
]
""",
    ),
}


def make_card(manifest: Manifest, fidelity: Fidelity | None = None) -> str:
    """The card's text."""
    contract = manifest.contract
    encoding = contract.encoding
    if isinstance(encoding, Full):
        name, (columns, code) = "full", _ENCODING["full"]
    elif isinstance(encoding, Sampled):
        name = f"sampled, sample size {encoding.sample_size:g}, temperature {encoding.temperature:g}"
        columns, code = (
            part.format(temperature=encoding.temperature, size=encoding.sample_size, steps=encoding.steps)
            for part in _ENCODING["sampled"]
        )
    else:
        grid = ", ".join(f"{t:g}" for t in encoding.temperatures)
        knob = getattr(encoding, "k", None) or getattr(encoding, "p", None)
        name, columns = f"{encoding.kind} {knob}, temperatures {grid}", _ENCODING["top"][0].format(grid=grid)
        code = _ENCODING["top"][1]
    totals = {
        key: sum(getattr(shard, key) for shard in manifest.shards) for key in ("rows", "positions", "tokens", "bytes")
    }
    front = {
        "pretty_name": f"Soft labels of {contract.teacher.name}",
        "tags": ["soft-labels", "knowledge-distillation", contract.task],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": [f"data/{s.name}.parquet" for s in manifest.split_shards(split)]}
                    for split in manifest.splits
                ],
            }
        ],
    }
    body = _BODY.format(
        teacher=contract.teacher.name,
        architecture=contract.teacher.architecture,
        parameters=contract.teacher.num_parameters,
        dtype=contract.teacher.dtype,
        source=contract.source.name,
        task=contract.task,
        encoding=name,
        num_classes=contract.num_classes,
        splits=", ".join(manifest.splits),
        first_split=manifest.splits[0],
        per_position=totals["bytes"] / max(totals["positions"], 1),
        bad_rows=manifest.bad_rows,
        cache_id=manifest.cache_id,
        columns=columns,
        fidelity="" if fidelity is None else _fidelity(fidelity),
        code=code.format(num_classes=contract.num_classes) if isinstance(encoding, Full) else code,
        rows=totals["rows"],
        positions=totals["positions"],
        tokens=totals["tokens"],
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}"


def _fidelity(found: Fidelity) -> str:
    masses = ", ".join(f"{mass:.1%} at T = {t}" for t, mass in found.kept_mass.items())
    lines = {
        "classes kept a position": f"{found.kept:.1f}",
        "teacher's mass on those kept for certain": masses,
        "noise of the target, as a share of that of one label drawn from the teacher": f"{found.noise_share:.2%}",
        "bias (squared, in the unit of the noise) over noise": f"{found.bias / found.noise:.1%}"
        if found.noise and found.bias is not None
        else "-",
        "angle between the gradients with this target and with all classes": f"{found.angle:.1f} degrees",
        "KL(teacher, target), the rest spread evenly": "-" if found.kl is None else f"{found.kl:.4f} nats",
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in lines.items())
    return f"Fidelity, measured at capture on {found.positions} positions (`reports/fidelity.json`):\n\n| | |\n|---|---|\n{rows}\n"
