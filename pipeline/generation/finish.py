"""The end of a run: drop completions, then write the data set, its card and `generation.json`.

Duplicates depend on all shards, so they are known only here. The rule does not depend on which
worker made a shard when: shards are read in the order of the plan, and of equal completions the
first one stays that is not dropped for another fault. After an interruption, the same command
repeats this pass from the shards with all completions, which are deleted when the data set is
committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.format.hashes import file_sha256
from pipeline.cache.format.manifest import Layout, dump, load_receipt, parse
from pipeline.cache.storage.commit import full_disk, sweep, write_atomically, write_text
from pipeline.cache.writing.build import missing
from pipeline.cache.writing.claims import sweep_claims
from pipeline.cache.writing.writer import regroup, write_row_groups
from pipeline.config.generation import FAULTS, Fault
from pipeline.errors import CacheError, IntegrityError
from pipeline.generation.card import counts_line, make_card
from pipeline.generation.faults import content_key, is_repeated
from pipeline.generation.prompts import TOO_SHORT
from pipeline.generation.records import NAMES, Counts, Generation, GenerationEnd, GenerationPlan
from pipeline.records import NO_LABEL, Receipt, Shard

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_COLUMNS = ("completion", "input_ids", "labels", "finish_reason")


def open_generation(root: str | Path) -> Generation:
    """Open a finished generated data set.

    Raises:
        CacheError: there is no finished data set.
        IntegrityError: a shard differs from `generation.json`.
    """
    layout = Layout(Path(root), names=NAMES)
    if not layout.manifest.is_file():
        raise CacheError(f"{root}: no finished generated data set here (generation.json is missing)")
    end = parse(GenerationEnd, layout.manifest)
    for shard in end.shards:
        path = result_path(layout, shard.name)
        if not path.is_file() or file_sha256(path) != shard.sha256:
            raise IntegrityError(
                f"{path}: {'differs from generation.json' if path.is_file() else 'is missing'}; write the data set again with "
                "the same command and --overwrite"
            )
    return Generation(layout.root, end)


def result_path(layout: Layout, name: str) -> Path:
    """Return the path of a shard of the data set."""
    return layout.root / "data" / f"{name}.parquet"


def clear_result(layout: Layout) -> None:
    """Delete the results of the end of a run, `generation.json` first."""
    layout.manifest.unlink(missing_ok=True)
    shutil.rmtree(layout.root / "data", ignore_errors=True)


def is_committed(layout: Layout, plan: GenerationPlan) -> bool:
    """Return whether there is a `generation.json` with the contract of this plan."""
    return layout.manifest.is_file() and parse(GenerationEnd, layout.manifest).contract == plan.contract


def finish(layout: Layout, plan: GenerationPlan) -> Generation:
    """Commit the data set, unless another process has done so.

    Raises:
        CacheError: a shard is missing, no completion is left, or the disk is full.
    """
    if is_committed(layout, plan):
        return open_generation(layout.root)
    try:
        return _finish(layout, plan)
    except OSError as error:
        if is_committed(layout, plan):  # committed by another part
            return open_generation(layout.root)
        raise full_disk(layout.root, error) from error


def _finish(layout: Layout, plan: GenerationPlan) -> Generation:
    absent = missing(layout, plan)
    if absent:
        raise CacheError(f"{layout.name}: shard {absent[0]} is missing; run the same command again")
    receipts = [receipt for shard in plan.shards if (receipt := load_receipt(layout, shard.name)) is not None]
    tally = _Tally(labelled="label" in plan.contract.columns)
    (layout.root / "data").mkdir(exist_ok=True)
    sweep(layout.root / "data")
    shards = [_kept_shard(layout, plan, receipt, tally) for receipt in receipts]
    counts = tally.counts(receipts)
    if not counts.kept:
        raise CacheError(
            f"{layout.name}: no completion is left: {counts_line(counts, plan.contract.dropped)}; keep more with another "
            "--drop and --overwrite"
        )
    _write_report(layout, "dropped.tsv", ("\t".join(map(str, row)) for row in tally.dropped))
    _write_report(
        layout,
        "bad-rows.tsv",
        (f"{bad.split}\t{bad.source_row}\t{bad.reason}" for receipt in receipts for bad in receipt.bad_rows),
    )
    kept = tuple(shard for shard in shards if shard.rows)
    end = GenerationEnd(FORMAT_VERSION, _id(plan, kept), plan.contract, kept, counts)
    write_text(layout.root / "README.md", make_card(end))
    sweep_claims(layout, plan)
    write_text(layout.manifest, dump(end))
    shutil.rmtree(layout.data, ignore_errors=True)
    logger.info("%s: %s", layout.name, counts_line(counts, plan.contract.dropped))
    return Generation(layout.root, end)


@dataclass(slots=True)
class _Tally:
    """Counts over the completions of all shards, in the order of the plan."""

    labelled: bool
    """Whether duplicates are found by the example's text; else by its tokens, prompt and
    completion."""
    counted: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[str, int, int, str]] = field(default_factory=list)
    """Split, source row, sample and faults of each dropped completion."""
    stays: dict[int, bool] = field(default_factory=dict)
    """Content key of each completion so far -> whether a completion with this content is kept."""

    def drops(self, row: dict[str, object], droppable: Sequence[Fault]) -> list[Fault]:
        """Count the faults of one completion.

        Returns:
            The faults for which it is dropped. A completion is not a duplicate of one that is
                dropped itself.
        """
        text, ids = str(row["completion"]), np.asarray(row["input_ids"], dtype=np.int32)
        written = ids[np.asarray(row["labels"]) != NO_LABEL]
        content = " ".join(text.split()).encode() if self.labelled else ids.tobytes()
        key = content_key(content)
        flags = {
            "empty": not text.strip(),
            "cut": row["finish_reason"] == "length",
            "repeated": is_repeated(written),
            "duplicate": key in self.stays,
        }
        found = [fault for fault in FAULTS if flags[fault]]
        self.counted.update([*found, str(row["finish_reason"]), "completions"])
        self.counted["tokens"] += len(written)
        stays = self.stays.get(key, False)
        dropped = [fault for fault in found if fault in droppable and (fault != "duplicate" or stays)]
        self.stays[key] = stays or not dropped
        return dropped

    def counts(self, receipts: Sequence[Receipt]) -> Counts:
        """Return the totals."""
        bad = [row.reason.startswith(TOO_SHORT) for receipt in receipts for row in receipt.bad_rows]
        named = {name: self.counted[name] for name in ("completions", "tokens", *FAULTS)}
        return Counts(
            **named,
            ended=self.counted["eos"],
            stopped=self.counted["stop"],
            kept=self.counted["completions"] - len(self.dropped),
            rows_set_aside=len(bad) - sum(bad),
            short_rows=sum(bad),
        )


def _kept_shard(layout: Layout, plan: GenerationPlan, receipt: Receipt, tally: _Tally) -> Shard:
    """Write the kept completions of one shard; if all are kept, link its file."""
    if not receipt.shard.rows:
        return receipt.shard
    source, target = layout.shard(receipt.shard.name), result_path(layout, receipt.shard.name)
    stays = [_stays(row, receipt, plan, tally) for row in _rows(source)]
    if all(stays):
        write_atomically(target, lambda temporary: _link(source, temporary))
        return receipt.shard
    target.unlink(missing_ok=True)
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        tables = _chosen(file, np.asarray(stays))
        return write_row_groups(target, receipt.plan, regroup(tables), file.schema_arrow)


def _stays(row: dict[str, object], receipt: Receipt, plan: GenerationPlan, tally: _Tally) -> bool:
    dropped = tally.drops(row, plan.contract.dropped)
    if dropped:
        place = (receipt.plan.split, cast(int, row["source_row"]), cast(int, row["sample"]))
        tally.dropped.append((*place, ",".join(dropped)))
    return not dropped


def _rows(path: Path) -> Iterator[dict[str, object]]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(256, columns=["source_row", "sample", *_COLUMNS]):
            yield from batch.to_pylist()


def _chosen(file: pq.ParquetFile, stays: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for number in range(file.num_row_groups):
        table = file.read_row_group(number)
        yield table.filter(pa.array(stays[start : start + table.num_rows]))
        start += table.num_rows


def _link(source: Path, temporary: Path) -> None:
    """Create a hard link, or a copy if the file system has no links."""
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)


def _write_report(layout: Layout, name: str, lines: Iterator[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    path = layout.root / "reports" / name
    if text:
        write_text(path, text)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _id(plan: GenerationPlan, shards: Sequence[Shard]) -> str:
    content = [json.loads(dump(plan.contract)), [dataclasses.asdict(shard) for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
