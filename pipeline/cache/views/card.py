"""Write a cache's dataset card, README.md, so that `datasets.load_dataset` reads the directory.

The card depends only on the manifest and the reports: equal inputs give equal bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import yaml

from pipeline.cache.format.schema import IMAGE
from pipeline.cache.storage.urls import is_url
from pipeline.cache.views.contents import contents_lines
from pipeline.cache.views.mass import KeptMasses
from pipeline.cache.views.provenance import judge_text, origin, rows_text, tokenizer_name
from pipeline.cache.views.recipes import IMAGE_COLUMN, kept_mass_sql, on_request, recipe, rows_and_positions
from pipeline.records import Contract, Fidelity, Manifest, Score, SourceContents
from pipeline.sources import is_of_files
from pipeline.sources.files.loading import redact
from pipeline.tasks import get_task

_BODY = """
# Soft labels of {teacher}

What the teacher `{teacher}` predicts on `{source}`, made by soft-label-pipeline: a cache to train students from, without the teacher.

| | |
|---|---|
| task | {task} |
| encoding | {encoding} |
| classes | {num_classes:,} |
| splits | {splits} |
| rows | {rows:,} |
| supervised positions | {positions:,} |
{tokens}| bytes a position (all columns) | {per_position:.1f} |
| cache_id | `{cache_id}` |

## What it was made from

| | |
|---|---|
{made_from}
## Rows and positions

One row is one example; list columns hold its supervised positions one after another. {alignment}

{columns}

{fidelity}{mass}## Training from it

    softlabel train-student --cache {location} --student STUDENT --output OUT

A cache behind a URL is read as it is needed; nothing has to be downloaded first.

## Reading it

With `datasets`:

```python
from datasets import load_dataset
rows = load_dataset("{dataset}", split="{first_split}")
```

{duckdb}{kept} of a row, with NumPy alone:

```python
{code}```

## Verifying it

    softlabel verify --cache DIR

{pull}`manifest.json` holds the contract (teacher, {maker}, source, encoding) and the SHA-256 of every shard. `datasets` does not verify page checksums; `softlabel` always
does, and so does `pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)`.

## Licence

{licence}

## Known gaps

{gaps}

## How it was made

{origin}
"""


def make_card(
    manifest: Manifest,
    fidelity: Fidelity | None = None,
    *,
    license: str | None = None,
    location: str = "DIR",
    masses: KeptMasses | None = None,
    picture: bool = False,
    contents: SourceContents | None = None,
) -> str:
    """Return the text of the card.

    Args:
        license: the licence, by its name on the hub.
        location: where readers find the cache: the value for `--cache`.
        masses: the kept mass of each split.
        picture: whether there is a `reports/kept-mass.png`.
        contents: counts over the source rows, which are listed among the known gaps.
    """
    contract = manifest.contract
    found = recipe(contract)
    totals = {
        key: sum(getattr(shard, key) for shard in manifest.shards) for key in ("rows", "positions", "tokens", "bytes")
    }
    sql = kept_mass_sql(manifest)
    of_images = get_task(contract.task).reads == "images"
    body = _BODY.format(
        teacher=_plain(contract.teacher.name),
        source=_plain(contract.source.name),
        task=contract.task,
        encoding=found.name,
        num_classes=contract.num_classes,
        splits=", ".join(manifest.splits),
        first_split=manifest.splits[0],
        per_position=totals["bytes"] / max(totals["positions"], 1),
        cache_id=manifest.cache_id,
        made_from=_made_from(contract),
        alignment=rows_and_positions(manifest),
        columns="\n\n".join([found.columns, *on_request(contract)]),
        fidelity="" if fidelity is None else _fidelity(fidelity),
        mass="" if masses is None else _masses(masses, picture),
        location=location,
        dataset=location.removeprefix("hf://datasets/") if location.startswith("hf://") else "DIR",
        pull=f"`softlabel pull --from {location} --output DIR` fetches a copy, and verifies it. "
        if is_url(location)
        else "",
        duckdb="" if sql is None else _DUCKDB.format(sql=sql),
        code=found.numpy,
        kept="The scores"
        if isinstance(contract.encoding, Score)
        else "The kept classes and their weights at each position",
        licence=_licence(license),
        gaps=_gaps(manifest, contents),
        origin=origin(manifest),
        rows=totals["rows"],
        positions=totals["positions"],
        tokens="" if of_images else f"| tokens | {totals['tokens']:,} |\n",
        maker=tokenizer_name(contract),
    )
    return _with_front_matter(manifest, license, body)


def license_beside(card: Path) -> str | None:
    """Return the licence in a cache's card, or None if there is no card or no licence in it."""
    try:
        return card_license(card.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that this project did not write
        return None


def card_license(text: str) -> str | None:
    """Return the licence in the text of a card."""
    from huggingface_hub import DatasetCard

    found: object = DatasetCard(text, ignore_metadata_errors=True).data.get("license")
    return found if isinstance(found, str) else None


_DUCKDB = """With DuckDB, the mean mass that is kept for certain, by split (in the cache's directory):

```sql
{sql}```

"""


def _with_front_matter(manifest: Manifest, license: str | None, body: str) -> str:
    """Add front matter to the card, with the hub's own classes, which validate and order it."""
    import datasets
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict
    from huggingface_hub import DatasetCard, DatasetCardData

    contract = manifest.contract
    teacher, source = contract.teacher, contract.source
    shards = {split: manifest.split_shards(split) for split in manifest.splits}
    files = [
        {"split": split, "path": [f"data/{shard.name}.parquet" for shard in part]} for split, part in shards.items()
    ]
    data = DatasetCardData(
        pretty_name=f"Soft labels of {_plain(teacher.name)}",
        license=license,
        task_categories=[get_task(contract.task).hub_category],
        size_categories=[_size(sum(shard.rows for shard in manifest.shards))],
        source_datasets=None if source.revision is None else [source.name],
        base_model=None if teacher.revision is None else teacher.name,  # not on the hub
        tags=["soft-labels", "knowledge-distillation", contract.task],
        # The description puts the cache_id into the key under which `datasets` stores a directory
        # that it has read: the directory's last name, and a hash of this configuration.
        configs=[{"config_name": "default", "description": f"cache_id {manifest.cache_id}", "data_files": files}],
    )
    schema = _schema(contract)
    if schema is not None:
        splits = SplitDict(
            {
                split: datasets.SplitInfo(
                    split,
                    num_bytes=sum(shard.bytes for shard in part),  # in Parquet, not in Arrow
                    num_examples=sum(shard.rows for shard in part),
                )
                for split, part in shards.items()
            }
        )
        size = sum(shard.bytes for shard in manifest.shards)
        features = datasets.Features.from_arrow_schema(schema)
        if IMAGE_COLUMN in schema.names:
            features[IMAGE_COLUMN] = datasets.Image()
        info = datasets.DatasetInfo(features=features, splits=splits, download_size=size, dataset_size=size)
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _schema(contract: Contract) -> pa.Schema | None:
    """Return the schema for the contract's type names; None if a type has no plain name."""
    try:
        return pa.schema([(name, _type(kind)) for name, kind in contract.columns.items()])
    except ValueError:
        return None


def _type(name: str) -> pa.DataType:
    if name == str(IMAGE):
        return IMAGE
    inner = re.fullmatch(r"list<(.*)>", name)
    return pa.type_for_alias(name) if inner is None else pa.list_(_type(inner[1]))


def _size(rows: int) -> str:
    """Return the hub's size category for a number of rows."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    if rows < 1000:
        return "n<1K"
    power = len(str(rows)) - 4
    return f"{names[power]}<n<{names[power + 1]}" if power < len(names) - 1 else "n>1T"


def _made_from(contract: Contract) -> str:
    teacher, tokenizer, source = contract.teacher, contract.tokenizer, contract.source
    settings = [teacher.architecture, f"{teacher.num_parameters:,} parameters", teacher.dtype]
    settings += [f"{teacher.attn_implementation} attention"] * (teacher.attn_implementation is not None)
    settings += [str(teacher.quantization)] * (teacher.quantization is not None)
    if (server := teacher.server) is not None:
        settings = [
            f"behind {server.api} {server.version}",
            f"the top {server.top_logprobs} log-probabilities of each position",
        ]
        settings += [f"{name} {value}" for name, value in server.settings.items()]
    template = tokenizer.chat_template_sha256
    of_images = get_task(contract.task).reads == "images"
    vocabulary = "" if of_images else f"{tokenizer.vocabulary_size:,} tokens, "
    lines = {
        "teacher": f"`{_plain(teacher.name)}`, revision {_revision(teacher.revision)}: {_plain(', '.join(settings))}",
        "weights, SHA-256": f"`{teacher.weights_sha256}`",
        **(
            {}
            if (judged := judge_text(contract)) is None
            else {"labels": f"{_plain(judged)}; the template is `teacher.judge.template` of `manifest.json`"}
        ),
        **({} if teacher.adapter_sha256 is None else {"adapter, SHA-256": f"`{teacher.adapter_sha256}`"}),
        tokenizer_name(contract): f"`tokenizer/`, {vocabulary}SHA-256 `{tokenizer.sha256}`"
        + ("" if template is None else f", chat template `{template}`"),
        "source": f"`{_plain(source.name)}`"
        + ("" if source.config is None else f", configuration {_plain(source.config)}")
        + f", revision {_revision(source.revision)}",
        **{
            f"{each.rows:,} rows of train, the last ones, without labels": f"`{_plain(each.name)}`, revision {_revision(each.revision)}"
            for each in source.unlabelled_sources
        },
        **({"rows": _plain(rows_text(contract))} if contract.tokenization.assistant_turns or of_images else {}),
        **{
            f"{split}, SHA-256 of its {'list of files' if is_of_files(value) else 'columns'}": f"`{value}`"
            for split, value in source.fingerprints.items()
        },
    }
    return "".join(f"| {name} | {value} |\n" for name, value in lines.items())


def _revision(revision: str | None) -> str:
    return "unknown (not from the hub)" if revision is None else f"`{revision}`"


def _masses(masses: KeptMasses, picture: bool) -> str:
    rows = "".join(f"| {split} | {mass.positions:,} | {mass.mean:.4f} |\n" for split, mass in masses.splits.items())
    plot = "![kept mass](reports/kept-mass.png)\n\n" if picture else ""
    return (
        "The teacher's mass on the classes that are kept for certain:\n\n"
        f"| split | positions | mean |\n|---|---|---|\n{rows}\n{plot}"
    )


def _licence(license: str | None) -> str:
    if license is None:
        return "None is stated. The terms of the teacher and of the source apply."
    return f"{license}, as stated by the publisher. The terms of the teacher and of the source apply as well."


def _gaps(manifest: Manifest, contents: SourceContents | None) -> str:
    lines = contents_lines(contents) if contents is not None else []
    return "\n\n".join([_rows_left_out(manifest), *(f"{line[0].upper()}{line[1:]}." for line in lines)])


def _rows_left_out(manifest: Manifest) -> str:
    parts = [each for each in manifest.ancestry if each.operation.split()[:1] in (["pull"], ["filter"])]
    if parts:
        return "The cache has only some rows of the source: see how it was made."
    if not manifest.bad_rows:
        return "None: every row of the source that was read is here."
    return f"{manifest.bad_rows:,} rows were set aside: `reports/bad-rows.tsv` has split, row and reason of each."


def _plain(text: str) -> str:
    """Return a name for a line of Markdown, without credentials."""
    return re.sub(r"[`|\s]+", " ", redact(text))


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
    return f"## Fidelity\n\nMeasured at capture on {found.positions} positions (`reports/fidelity.json`):\n\n| | |\n|---|---|\n{rows}\n"
