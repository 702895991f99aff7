"""Begin and finish a cache: the plan is written first and the manifest last.

Both are created exclusively, so that of two racing writers one wins.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipeline.cache.format.manifest import (
    AnyPlan,
    Layout,
    Plan,
    check_same_contract,
    dump,
    load_manifest,
    load_receipt,
    make_manifest,
    parse,
)
from pipeline.cache.format.tokenizer_files import without_code
from pipeline.cache.reading.alignment import check_alignment
from pipeline.cache.reading.probe import first_shards
from pipeline.cache.reading.reader import Cache
from pipeline.cache.storage.commit import (
    create_exclusively,
    full_disk,
    sweep,
    write_directory,
    write_text,
)
from pipeline.cache.views.card import license_beside, make_card
from pipeline.cache.views.contents import contents_lines
from pipeline.cache.writing.claims import finished, sweep_claims
from pipeline.cache.writing.place import check_place, clear, current_plan, open_layout
from pipeline.errors import CacheError, ContractError
from pipeline.records import (
    AlignmentProbe,
    Contract,
    FirstAnswer,
    Manifest,
    Receipt,
    Shard,
    ShardPlan,
    SourceContents,
    SplitContents,
)

logger = logging.getLogger(__name__)

#: Fields of receipts whose sums are stored in `SourceContents`.
_SUMS = ("cut_rows", "cut_tokens", "cut_supervised_rows", "split_chats", "split_chat_rows")


def begin(
    output: str | Path | Layout, plan: Plan, tokenizer: PreTrainedTokenizerBase, *, overwrite: bool = False
) -> Layout:
    """Create the directory of a cache, or join a capture of the same plan that is there.

    Raises:
        ContractError: the directory holds another capture, or the contract is not valid for any
            cache.
        CacheError: the directory holds other files, or cannot be written.
    """
    layout = output if isinstance(output, Layout) else open_layout(output)
    root = layout.root
    found = check_place(layout, plan, overwrite=overwrite)
    if overwrite:
        clear(layout)
        found = check_place(layout, plan)
    if plan.parent is not None and found != plan:
        _replace_plan(layout, found, plan)
    elif not _create(layout, layout.plan, dump(plan)):
        check_same_contract(plan, current_plan(layout) or plan, layout)
    try:
        for directory in (layout.data, layout.plan.parent, root):
            directory.mkdir(exist_ok=True)
            sweep(directory)
        sweep(layout.root / "reports")
    except OSError as error:
        raise full_disk(root, error) from error
    refresh(layout)
    keep_tokenizer(layout, tokenizer)
    return layout


def keep_tokenizer(layout: Layout, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's files, if they do not exist.

    Raises:
        CacheError: the disk is full, or the directory cannot be written.
    """
    if not layout.tokenizer.exists():
        write_directory(layout.tokenizer, lambda draft: _save(tokenizer, draft, layout.tokenizer))
        _send(layout, sorted(layout.tokenizer.iterdir()))


def refresh(layout: Layout) -> None:
    """For a cache behind a URL, fetch receipts and manifest that others have written since."""
    if layout.outbox is not None:
        layout.outbox.fetch_receipts()
        layout.outbox.fetch("manifest.json")


def _send(layout: Layout, paths: Iterable[Path]) -> None:
    if layout.outbox is not None:
        for path in paths:
            layout.outbox.send(path.relative_to(layout.root).as_posix())


def note_contents(layout: Layout, plan: Plan, contents: SourceContents) -> None:
    """Store the counts over the source rows for the end of the capture, unless it is finished.

    Another process may finish the capture, so the counts are kept in a file.
    """
    if not is_finished(layout, plan):
        write_text(_contents_path(layout), dump(contents))
        _send(layout, [_contents_path(layout)])


def note_answer(layout: Layout, answer: FirstAnswer) -> FirstAnswer:
    """Store the first answer of a capture, unless there is one; return the one that is stored."""
    path = _answer_path(layout)
    found = noted_answer(layout)
    if found is None:
        path.parent.mkdir(exist_ok=True)
        found = answer if _create(layout, path, dump(answer)) else noted_answer(layout)
    return found or answer


def noted_answer(layout: Layout) -> FirstAnswer | None:
    """Return the stored first answer of a capture, or None."""
    path = _answer_path(layout)
    if layout.outbox is not None and not path.is_file():
        layout.outbox.fetch("reports/first-answer.json")
    return parse(FirstAnswer, path) if path.is_file() else None


def _answer_path(layout: Layout) -> Path:
    return layout.root / "reports" / "first-answer.json"


def _contents_path(layout: Layout) -> Path:
    return layout.root / "reports" / "contents.json"


def _counted(layout: Layout, contract: Contract, receipts: Sequence[Receipt]) -> SourceContents | None:
    """Complete the counts over the source rows from the receipts, and store them.

    None: the cache was not made from a data set.
    """
    path = _contents_path(layout)
    if layout.outbox is not None:
        layout.outbox.fetch("reports/contents.json")
    if not path.is_file():
        return None
    noted = parse(SourceContents, path)
    found = dataclasses.replace(
        noted,
        splits={name: _counted_by_shards(contract, name, split, receipts) for name, split in noted.splits.items()},
        shared=_shared(layout, contract, receipts) if noted.shared is None else noted.shared,
        **{name: sum(getattr(receipt, name) for receipt in receipts) for name in _SUMS},
    )
    write_text(path, dump(found))
    for line in contents_lines(found):
        logger.warning("%s: %s", layout.name, line)
    return found


def _counted_by_shards(
    contract: Contract, name: str, split: SplitContents, receipts: Sequence[Receipt]
) -> SplitContents:
    """Return the counts of a split, from its receipts if the rows were not counted before."""
    if split.blank is not None:
        return split
    made = [receipt for receipt in receipts if receipt.plan.split == name]
    unlabelled = None if contract.source.columns.label is None else sum(receipt.unlabelled_rows for receipt in made)
    return SplitContents(split.rows, unlabelled, sum(receipt.blank_rows for receipt in made))


def _shared(layout: Layout, contract: Contract, receipts: Sequence[Receipt]) -> dict[str, int] | None:
    """Count the content hashes that two splits share.

    None: not counted, since rows are packed or the shards are behind a URL.
    """
    if layout.outbox is not None or contract.tokenization.packing:
        return None
    shards = [receipt.shard for receipt in receipts if receipt.shard.rows]
    if len({shard.split for shard in shards}) < 2:
        return {}
    parts: dict[str, list[np.ndarray]] = {}
    for shard in shards:
        column = pq.read_table(layout.shard(shard.name), columns=["content_hash"])["content_hash"]
        parts.setdefault(shard.split, []).append(column.to_numpy())
    hashes = {split: np.unique(np.concatenate(found)) for split, found in parts.items()}
    pairs = itertools.combinations(hashes, 2)
    shared = {f"{a}, {b}": len(np.intersect1d(hashes[a], hashes[b], assume_unique=True)) for a, b in pairs}
    return {pair: count for pair, count in shared.items() if count}


def is_finished(layout: Layout, plan: Plan) -> bool:
    """Whether there is a manifest and it lists the shards of the receipts."""
    if not layout.manifest.is_file():
        return False
    receipts = [load_receipt(layout, shard.name) for shard in plan.shards]
    made = tuple(receipt.shard for receipt in receipts if receipt is not None and receipt.shard.rows)
    return None not in receipts and load_manifest(layout.root).shards == made


def withdraw(layout: Layout, waiting: Sequence[ShardPlan]) -> None:
    """Delete the manifest of a cache with damaged shards, so that they can be made again.

    A manifest is written when all shards are complete, so a shard that is incomplete now was
    damaged since. A shard of `waiting` may also be complete by now, because another capture has
    finished the cache in the meantime.
    """
    if not layout.manifest.is_file():
        return
    damaged = [shard for shard in waiting if finished(layout, shard) is None]
    if damaged:  # on another device the bytes of a shard may differ, which changes the cache_id
        logger.warning("%s: %d damaged shards are made again; the cache_id may change", layout.name, len(damaged))
        withdraw_manifest(layout)


def withdraw_manifest(layout: Layout) -> None:
    """Delete the manifest of a cache, and the marks of appends, so that both can be made again."""
    if layout.outbox is not None:
        layout.outbox.clear(("manifest.json",))
    layout.manifest.unlink(missing_ok=True)
    for claim in layout.plan.parent.glob("append-*.txt"):
        claim.unlink()


def record(layout: Layout, receipt: Receipt) -> None:
    """Write the receipt of a finished shard; behind a URL, upload both and delete the local shard.

    Raises:
        ContractError: another capture has replaced the plan at the URL.
    """
    name = receipt.plan.name
    if layout.outbox is not None and not layout.outbox.is_same("receipts/plan.json"):
        raise ContractError(
            f"{layout.name}: another capture has begun here (--overwrite), and its plan has replaced this one's; use another --output"
        )
    write_text(layout.receipt(name), dump(receipt))
    made = receipt.shard
    logger.debug(
        "%s: %d rows, %d bytes, %.1f s, the teacher %.1f s of it",
        name,
        made.rows,
        made.bytes,
        receipt.seconds,
        receipt.forward_seconds,
    )
    if receipt.shard.rows:
        _send(layout, [layout.shard(name)])
    _send(layout, [layout.receipt(name)])
    if layout.outbox is not None:
        layout.shard(name).unlink(missing_ok=True)


def missing(layout: Layout, plan: AnyPlan) -> list[str]:
    """Return the names of the shards without a receipt, or with a receipt of other rows."""
    refresh(layout)
    receipts = ((shard, load_receipt(layout, shard.name)) for shard in plan.shards)
    return [shard.name for shard, receipt in receipts if receipt is None or receipt.plan != shard]


def finish(layout: Layout, plan: Plan, *, license: str | None = None) -> Cache:
    """Commit a cache: probe the alignment, write the card, and write the manifest last.

    Args:
        license: the licence of the caches that it is made from. Default: the one in the existing
            card.

    Raises:
        CacheError: no row was cached, or a shard is missing.
        ContractError: the soft labels are not aligned with their tokens.
    """
    absent = missing(layout, plan)
    if absent:
        raise CacheError(f"{layout.name}: shard {absent[0]} is missing; run the same command again")
    receipts = [receipt for shard in plan.shards if (receipt := load_receipt(layout, shard.name)) is not None]
    shards = tuple(receipt.shard for receipt in receipts if receipt.shard.rows)
    if not shards:
        raise CacheError(f"{layout.name}: no row could be cached: all of them were set aside")
    bad_rows = tuple(bad for receipt in receipts for bad in receipt.bad_rows)
    probe = _probe(layout, plan.contract, shards)
    if bad_rows:
        lines = "".join(f"{bad.split}\t{bad.source_row}\t{bad.reason}\n" for bad in bad_rows)
        write_text(layout.root / "reports" / "bad-rows.tsv", lines)
    manifest = make_manifest(plan.contract, shards, bad_rows=len(bad_rows), probe=probe, ancestry=plan.ancestry)
    fidelity = next((receipt.fidelity for receipt in receipts if receipt.fidelity is not None), None)
    if fidelity is not None:
        write_text(layout.root / "reports" / "fidelity.json", dump(fidelity))
    contents = _counted(layout, plan.contract, receipts)
    card = layout.root / "README.md"
    license = license or license_beside(card)
    write_text(card, make_card(manifest, fidelity, license=license, contents=contents))
    reports = layout.root / "reports"
    _send(layout, [*sorted(reports.iterdir() if reports.is_dir() else ()), layout.root / "README.md"])
    sweep_claims(layout, plan)
    _commit(layout, plan, manifest)
    return opened(layout)


def opened(layout: Layout) -> Cache:
    """Open the finished cache of a layout."""
    return Cache.open(layout.root if layout.outbox is None else layout.outbox.location)


def _probe(layout: Layout, contract: Contract, shards: tuple[Shard, ...]) -> AlignmentProbe | None:
    """Run the alignment probe over rows spread over the cache.

    For a cache behind a URL it runs over the first shards, which are fetched for it.
    """
    if layout.outbox is None:
        draft = Cache(layout.root, make_manifest(contract, shards, bad_rows=0, probe=None))
        draft.check_files()
        return check_alignment(draft, name=layout.name)
    sizes = layout.outbox.sizes("data")
    for shard in shards:
        if sizes.get(f"{shard.name}.parquet") != shard.bytes:
            raise CacheError(
                f"{layout.name}: data/{shard.name}.parquet: expected {shard.bytes:,} bytes, found {sizes.get(f'{shard.name}.parquet')}; run the same command again"
            )
    first = first_shards(shards)
    for shard in first:
        layout.outbox.fetch(f"data/{shard.name}.parquet")
    found = check_alignment(
        Cache(layout.root, make_manifest(contract, first, bad_rows=0, probe=None)), name=layout.name
    )
    for shard in first:
        layout.shard(shard.name).unlink()
    return found


def _commit(layout: Layout, plan: Plan, manifest: Manifest) -> None:
    if plan.parent is not None:
        # Of two appends to one cache, the first to create this file wins. The parent's manifest
        # stays valid until it is replaced.
        claim = layout.plan.parent / f"append-{plan.parent.cache_id[:16]}.txt"
        create_exclusively(claim, manifest.cache_id)
        if claim.read_text(encoding="utf-8") == manifest.cache_id:
            write_text(layout.manifest, dump(manifest))
            return
    elif _create(layout, layout.manifest, dump(manifest)):
        return
    if layout.outbox is not None:
        layout.outbox.fetch("manifest.json")
    other = parse(Manifest, layout.manifest)
    if other.cache_id != manifest.cache_id:
        raise ContractError(
            f"{layout.name}: another writer has finished a cache here (cache_id {other.cache_id[:12]}...); use another --output"
        )


def _create(layout: Layout, path: Path, text: str) -> bool:
    if layout.outbox is None:
        return create_exclusively(path, text)
    created = layout.outbox.create(path.relative_to(layout.root).as_posix(), text)
    if created:
        write_text(path, text)
    return created


def _replace_plan(layout: Layout, found: Plan | None, plan: Plan) -> None:
    """Replace the plan when an append begins or is resumed with other shards.

    Shards and receipts of the old plan that the new one does not list are deleted.
    """
    write_text(layout.plan, dump(plan))
    for name in {shard.name for shard in found.shards} - {shard.name for shard in plan.shards} if found else ():
        layout.receipt(name).unlink(missing_ok=True)
        layout.shard(name).unlink(missing_ok=True)


def _save(tokenizer: PreTrainedTokenizerBase, draft: Path, path: Path) -> None:
    try:
        tokenizer.save_pretrained(str(draft))
        without_code(draft)
    except OSError:
        raise
    except Exception as error:  # tokenizers' Rust code raises bare Exception
        raise full_disk(path, error) from error
