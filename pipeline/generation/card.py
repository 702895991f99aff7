"""The dataset card (README.md) of a generated data set.

Its front matter lets `datasets.load_dataset` read the directory.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from pipeline.config.generation import FAULTS, Fault
from pipeline.generation.records import Counts, GenerationContract, GenerationEnd
from pipeline.records import ModelInfo

_BODY = """
# Written by {model}

{what}, written by `{model}`, made by soft-label-pipeline.

| | |
|---|---|
| splits | {splits} |
| rows | {rows:,} |
| tokens of completions, before any was dropped | {tokens:,} |
| generation_id | `{generation_id}` |

## Columns

| column | |
|---|---|
{columns}
## Counts

| | completions |
|---|---|
{counts}
A completion with several faults counts in each. {dropped}

## How it was made

| | |
|---|---|
{settings}
The random draws of a completion are a hash of (seed, split, source row, sample, step, token): they depend on no batch, worker or
order. The logits do depend on the batch, in their last digits; equal settings, versions and devices give equal bytes.

## Using it

As a data set:

```python
from datasets import load_dataset
rows = load_dataset("DIR", split="{first_split}")
```

{use}
"""

_LM_USE = """As the rows that a teacher labels, by token ids, so that nothing is tokenised twice (the tokenizer must be that of `tokenizer/`):

    softlabel cache-logits --task causal-lm --teacher TEACHER --dataset DIR --input-ids-column input_ids --labels-column labels --output CACHE
"""
_LABELLED_USE = """As labelled rows, for a teacher or for its soft labels:

    softlabel train-teacher --task sequence-classification --model MODEL --dataset DIR --output TEACHER
    softlabel cache-logits --task sequence-classification --teacher TEACHER --dataset DIR --output CACHE

The label is the one that the prompt asked for; the model may have missed it: check some rows.
"""

_COLUMN_TEXTS = {
    "source_row": "row of the prompt in its split (with a template: number of the prompt)",
    "sample": "number of the completion among those of one prompt, from 0",
    "text": "the example: the completion without white space around it",
    "label": "the label that it was asked for",
    "prompt": "as the model has read it; chats are rendered",
    "completion": "what the model has written, without special tokens; it ends before a stop text",
    "input_ids": "token ids of prompt and completion; an end-of-sequence token ends it where the model has written one",
    "labels": "the training targets: `input_ids`, with -100 on the prompt",
    "prompt_tokens": "tokens of the prompt",
    "completion_tokens": "tokens of the completion; with a stop text those up to its end",
    "finish_reason": "`eos`: an end-of-sequence token, which is a training target; `stop`: a stop text; `length`: cut, with no end to train on",
    "logprob": "log-probability of the completion, nats: the sum over its tokens under the model at temperature 1, without filters; null where a server does not say",
    "ids_from": "who made the completion's token ids: `model`, `server` (its response), or `tokenizer` (of the text, which may differ from what was drawn)",
}
_FAULT_TEXTS: dict[Fault, str] = {
    "empty": "empty: no text, or white space alone",
    "cut": "cut at the longest length",
    "repeated": "repeated: an n-gram of up to 64 tokens at least 4 times in a row, over at least 20 tokens",
    "duplicate": "duplicate: the same as one before",
}


def make_card(end: GenerationEnd) -> str:
    """Return the text of the card; equal records give equal text."""
    contract, counts = end.contract, end.counts
    labelled = "label" in contract.columns
    splits = tuple(dict.fromkeys(shard.split for shard in end.shards))
    dropped = ", ".join(contract.dropped)
    rows = [("completions", counts.completions), ("ended", counts.ended), ("stopped by a text", counts.stopped)]
    rows += [(_FAULT_TEXTS[fault], getattr(counts, fault)) for fault in FAULTS]
    rows += [("kept", counts.kept)]
    set_aside = [("source rows set aside (`reports/bad-rows.tsv`)", counts.rows_set_aside)] * bool(
        counts.rows_set_aside
    )
    short = [("texts shorter than a prompt", counts.short_rows)] * bool(counts.short_rows)
    body = _BODY.format(
        model=_plain(contract.model.name),
        what="Labelled examples" if labelled else f"Completions of prompts from `{_source_name(contract)}`",
        splits=", ".join(splits),
        first_split=splits[0],
        rows=counts.kept,
        tokens=counts.tokens,
        generation_id=end.generation_id,
        columns=_table((f"`{name}`", _COLUMN_TEXTS.get(name, "copied from the prompts")) for name in contract.columns),
        counts=_table((name, f"{count:,}") for name, count in [*rows, *set_aside, *short]),
        dropped=f"Dropped: {dropped}; which they were stands in `reports/dropped.tsv`."
        if dropped
        else "None was dropped.",
        settings=_table(_settings(contract)),
        use=_LABELLED_USE if labelled else _LM_USE,
    )
    return _with_front_matter(end, splits, body)


def counts_line(counts: Counts, dropped: Sequence[Fault]) -> str:
    """Return the summary of a run as one line."""
    parts = [f"{getattr(counts, fault):,} {fault}" for fault in FAULTS]
    left_out = counts.completions - counts.kept
    said = f"{left_out:,} dropped (--drop {' --drop '.join(dropped)})" if dropped else "none dropped (see --drop)"
    aside = f"; {counts.rows_set_aside:,} rows set aside" if counts.rows_set_aside else ""
    short = f"; {counts.short_rows:,} texts shorter than a prompt" if counts.short_rows else ""
    return f"{counts.kept:,} of {counts.completions:,} completions kept: {', '.join(parts)}; {said}{aside}{short}"


def _settings(contract: GenerationContract) -> list[tuple[str, str]]:
    """Return every setting that affects the completions, as rows of a table."""
    model, sampling, prompts = contract.model, contract.sampling, contract.prompts
    found: list[tuple[str, object]] = [("model", model.name)]
    if isinstance(model, ModelInfo):
        found += [
            ("revision", model.revision),
            ("weights (SHA-256)", model.weights_sha256),
            ("dtype, attention", f"{model.dtype}, {model.attn_implementation}"),
            ("quantization", model.quantization),
        ]
    else:
        found += [
            ("server", f"{model.api} {model.version or ''}".strip()),
            ("settings that are the server's own, unknown", ", ".join(model.own_settings) or None),
        ]
    if contract.source is not None:
        found += [
            ("data set", contract.source.name),
            ("data set revision", contract.source.revision),
            (
                "rows",
                None if contract.source.rows is None else f"{contract.source.rows[0]}:{contract.source.rows[1] or ''}",
            ),
        ]
    found += [
        ("prompts", prompts.kind),
        ("--as-chat", "yes" if prompts.as_chat else None),
        ("--chat-template-kwargs", ", ".join(prompts.chat_template_kwargs) or None),
        ("--prefix-tokens", prompts.prefix_tokens),
        ("labels", ", ".join(prompts.labels) or None),
        ("--num-examples", prompts.num_examples),
        ("--shots", prompts.shots or None),
        ("--num-samples", sampling.num_samples),
        ("--max-new-tokens", sampling.max_new_tokens),
        ("--temperature", sampling.temperature),
        ("--top-p", sampling.top_p),
        ("--top-k", sampling.top_k),
        ("--min-p", sampling.min_p),
        ("--stop", ", ".join(map(repr, sampling.stop)) or None),
        ("--seed", sampling.seed),
        ("end-of-sequence ids", ", ".join(map(str, contract.end_ids)) or "none"),
        ("--batch-tokens", contract.batch_tokens),
        ("versions", ", ".join(f"{name} {version}" for name, version in contract.versions.items())),
    ]
    rows = [(name, f"`{_plain(str(value))}`") for name, value in found if value is not None]
    return [*rows, *([("template", f"`{_plain(shlex.quote(prompts.template))}`")] if prompts.template else [])]


def _source_name(contract: GenerationContract) -> str:
    return _plain("" if contract.source is None else contract.source.name)


def _table(rows: object) -> str:
    return "".join(f"| {name} | {text} |\n" for name, text in rows)  # type: ignore[attr-defined]


def _plain(text: str) -> str:
    """Escape text for a table cell in backticks."""
    return re.sub(r"\s+", " ", text).replace("`", "'").replace("|", "\\|")


def _with_front_matter(end: GenerationEnd, splits: Sequence[str], body: str) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [
        {"split": split, "path": [f"data/{shard.name}.parquet" for shard in end.shards if shard.split == split]}
        for split in splits
    ]
    labelled = "label" in end.contract.columns
    model = end.contract.model
    data = DatasetCardData(
        pretty_name=f"Written by {_plain(model.name)}",
        task_categories=["text-classification" if labelled else "text-generation"],
        base_model=model.name if isinstance(model, ModelInfo) and model.revision is not None else None,
        tags=["synthetic", "soft-label-pipeline"],
        # `datasets` caches by the last name of a directory and a hash of these configs. The id
        # distinguishes two data sets with one name, and a data set that was written again.
        configs=[{"config_name": "default", "description": f"generation_id {end.generation_id}", "data_files": files}],
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}")) + "\n"
