"""Begin and finish a cache: the plan first, the manifest last, each created so that of two writers one wins."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.cache.card import make_card
from pipeline.cache.commit import create_exclusively, sweep, write_text
from pipeline.cache.manifest import (
    Layout,
    Plan,
    check_same_contract,
    dump,
    load_manifest,
    load_receipt,
    make_manifest,
    parse,
)
from pipeline.cache.probe import probe_alignment
from pipeline.cache.reader import Cache
from pipeline.cache.writer import file_sha256
from pipeline.errors import CacheError, ContractError
from pipeline.records import Manifest, Receipt, ShardPlan

logger = logging.getLogger(__name__)


def begin(root: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase, *, overwrite: bool = False) -> Layout:
    """Make the directory of a cache, or join a capture of the same plan that is there.

    Raises:
        ContractError: the directory holds another capture.
        CacheError: it holds something else, or cannot be written.
    """
    layout = Layout(root)
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root}: expected a directory, found a file")
    if overwrite:
        _clear(layout)
    if not layout.plan.exists() and _holds_files(root):
        raise CacheError(f"{root}: holds files that are no cache; use an empty or a new directory")
    if not create_exclusively(layout.plan, dump(plan)):
        check_same_contract(plan, parse(Plan, layout.plan), root)
    for directory in (layout.data, layout.plan.parent, root):
        directory.mkdir(exist_ok=True)
        sweep(directory)
    if not layout.tokenizer.exists():
        draft = root / f".tmp-{os.getpid()}-tokenizer"
        tokenizer.save_pretrained(str(draft))
        os.replace(draft, layout.tokenizer)
    return layout


def finished(layout: Layout, plan: ShardPlan) -> Receipt | None:
    """The receipt of a shard that is whole on disk; None where it is still to be made."""
    receipt = load_receipt(layout, plan.name)
    path = layout.shard(plan.name)
    if receipt is None or receipt.plan != plan:
        return None
    if receipt.shard.rows == 0:
        return receipt
    return receipt if path.is_file() and file_sha256(path) == receipt.shard.sha256 else None


def is_finished(layout: Layout, plan: Plan) -> bool:
    """Whether the manifest is there and lists what the receipts say."""
    if not layout.manifest.is_file():
        return False
    receipts = [load_receipt(layout, shard.name) for shard in plan.shards]
    made = tuple(receipt.shard for receipt in receipts if receipt is not None and receipt.shard.rows)
    return None not in receipts and load_manifest(layout.root).shards == made


def record(layout: Layout, receipt: Receipt) -> None:
    """Say that a shard is done: it counts from here on."""
    write_text(layout.receipt(receipt.plan.name), dump(receipt))


def finish(layout: Layout, plan: Plan) -> Cache:
    """Commit: probe the alignment, write the card, and last the manifest.

    Raises:
        CacheError: no row was cached, or a shard is missing.
        ContractError: the soft labels are out of step with their tokens.
    """
    receipts = []
    for shard in plan.shards:
        receipt = load_receipt(layout, shard.name)
        if receipt is None:
            raise CacheError(f"{layout.root}: shard {shard.name} is missing; run the same command again")
        receipts.append(receipt)
    shards = tuple(receipt.shard for receipt in receipts if receipt.shard.rows)
    if not shards:
        raise CacheError(f"{layout.root}: no row could be cached; every one of them was set aside")
    bad_rows = tuple(bad for receipt in receipts for bad in receipt.bad_rows)
    draft = Cache(layout.root, make_manifest(plan.contract, shards, bad_rows=len(bad_rows), probe=None))
    probe = probe_alignment(row for split in draft.splits for row in draft.dataset(split))
    if probe is not None and probe.verdict == "inconclusive":
        logger.warning(
            "%s: whether the soft labels are in step with their tokens cannot be told from %d positions",
            layout.root,
            probe.positions,
        )
    if probe is not None and probe.verdict == "misaligned":
        raise ContractError(
            f"{layout.root}: the soft labels are out of step with their tokens: mean weight of the hard label at shift -1, 0, +1 is {probe.previous:.4f}, "
            f"{probe.aligned:.4f}, {probe.following:.4f}, expected the middle one to be largest; shift the logits by one"
        )
    if bad_rows:
        lines = "".join(f"{bad.split}\t{bad.source_row}\t{bad.reason}\n" for bad in bad_rows)
        write_text(layout.root / "reports" / "bad-rows.tsv", lines)
    manifest = make_manifest(plan.contract, shards, bad_rows=len(bad_rows), probe=probe, ancestry=plan.ancestry)
    fidelity = next((receipt.fidelity for receipt in receipts if receipt.fidelity is not None), None)
    if fidelity is not None:
        write_text(layout.root / "reports" / "fidelity.json", dump(fidelity))
    write_text(layout.root / "README.md", make_card(manifest, fidelity))
    _commit(layout, manifest)
    return Cache.open(layout.root)


def _commit(layout: Layout, manifest: Manifest) -> None:
    if not create_exclusively(layout.manifest, dump(manifest)):
        other = parse(Manifest, layout.manifest)
        if other.cache_id != manifest.cache_id:
            raise ContractError(
                f"{layout.root}: another writer has finished a cache here (cache_id {other.cache_id[:12]}...); use another --output"
            )


def _holds_files(root: Path) -> bool:
    """Whether a directory holds anything but hidden files: our own temporary ones, and the mark that `softlabel run` leaves."""
    return root.exists() and any(p.is_file() and not p.name.startswith(".") for p in root.rglob("*"))


def _clear(layout: Layout) -> None:
    """Delete a cache, the manifest first, so that what is half-deleted is no cache. Never anything else."""
    if not _holds_files(layout.root):
        return
    if not layout.plan.exists() and not layout.manifest.exists():
        raise CacheError(
            f"{layout.root}: --overwrite deletes caches only, and this directory holds other files; remove it by hand"
        )
    layout.manifest.unlink(missing_ok=True)
    for part in (layout.data, layout.tokenizer, layout.root / "reports", layout.plan.parent):
        shutil.rmtree(part, ignore_errors=True)
    (layout.root / "README.md").unlink(missing_ok=True)
