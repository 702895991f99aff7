"""Begin and finish a cache: the plan first, the manifest last, each created so that of two writers one wins."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.cache.alignment import check_alignment
from pipeline.cache.card import make_card
from pipeline.cache.claims import finished, is_claimed, sweep_claims
from pipeline.cache.commit import create_exclusively, full_disk, sweep, temporary_path, write_directory, write_text
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
from pipeline.cache.reader import Cache
from pipeline.cache.sanity import contract_problem
from pipeline.cache.tokenizer_files import without_code
from pipeline.errors import CacheError, ContractError
from pipeline.records import Manifest, Receipt, ShardPlan

logger = logging.getLogger(__name__)


def begin(root: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase, *, overwrite: bool = False) -> Layout:
    """Make the directory of a cache, or join a capture of the same plan that is there.

    Raises:
        ContractError: the directory holds another capture, or the contract is one that no reader would take.
        CacheError: it holds something else, or cannot be written.
    """
    layout = Layout(root)
    problem = contract_problem(plan.contract)
    if problem is not None:
        raise ContractError(f"{root}: no cache of these settings could be read: {problem}")
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root}: expected a directory, found a file")
    if overwrite:
        _clear(layout)
    # In this order: a racing capture's first file is its plan.
    if _holds_files(root) and not layout.plan.exists():
        raise CacheError(f"{root}: holds files that are no cache; use an empty or a new directory")
    if not create_exclusively(layout.plan, dump(plan)):
        check_same_contract(plan, parse(Plan, layout.plan), root)
    try:
        for directory in (layout.data, layout.plan.parent, root):
            directory.mkdir(exist_ok=True)
            sweep(directory)
        sweep(layout.root / "reports")
    except OSError as error:
        raise full_disk(root, error) from error
    if not layout.tokenizer.exists():
        write_directory(layout.tokenizer, lambda draft: _save(tokenizer, draft, layout.tokenizer))
    return layout


def is_finished(layout: Layout, plan: Plan) -> bool:
    """Whether the manifest is there and lists what the receipts say."""
    if not layout.manifest.is_file():
        return False
    receipts = [load_receipt(layout, shard.name) for shard in plan.shards]
    made = tuple(receipt.shard for receipt in receipts if receipt is not None and receipt.shard.rows)
    return None not in receipts and load_manifest(layout.root).shards == made


def withdraw(layout: Layout, waiting: Sequence[ShardPlan]) -> None:
    """Take back the manifest of a cache with damaged shards, which are to be made anew.

    A manifest is written when every shard is whole: one that is not, while there is a manifest, was damaged since. (A shard of `waiting` may be whole by now,
    made by a capture beside this one that has finished the cache.)
    """
    if not layout.manifest.is_file():
        return
    damaged = [shard for shard in waiting if finished(layout, shard) is None]
    if damaged:  # on another device a shard made anew is as valid, with other bytes: then it is another cache
        logger.warning("%s: %d damaged shards are made anew; the cache_id may change", layout.root, len(damaged))
        layout.manifest.unlink(missing_ok=True)


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
    draft.check_files()
    probe = check_alignment(draft)
    if bad_rows:
        lines = "".join(f"{bad.split}\t{bad.source_row}\t{bad.reason}\n" for bad in bad_rows)
        write_text(layout.root / "reports" / "bad-rows.tsv", lines)
    manifest = make_manifest(plan.contract, shards, bad_rows=len(bad_rows), probe=probe)
    fidelity = next((receipt.fidelity for receipt in receipts if receipt.fidelity is not None), None)
    if fidelity is not None:
        write_text(layout.root / "reports" / "fidelity.json", dump(fidelity))
    write_text(layout.root / "README.md", make_card(manifest, fidelity))
    sweep_claims(layout)
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
    return any(
        path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        for path in root.rglob("*")
    )


def _clear(layout: Layout) -> None:
    """Delete a cache, the manifest first, so that what is half-deleted is no cache. Never anything else."""
    if not _holds_files(layout.root):
        return
    half_cleared = any(layout.root.glob(".tmp-*-receipts/plan.json"))  # by a killed command
    if not layout.plan.exists() and not layout.manifest.exists() and not half_cleared:
        raise CacheError(
            f"{layout.root}: --overwrite deletes caches only, and this directory holds other files; remove it by hand"
        )
    away = temporary_path(layout.plan.parent)
    if layout.plan.parent.is_dir():
        # Out of the way first: a capture that goes on here finds no place for its next claim, and one that holds a claim holds it under the new name too.
        os.replace(layout.plan.parent, away)
        if is_claimed(away):
            os.replace(away, layout.plan.parent)
            raise CacheError(
                f"{layout.root}: --overwrite: another process is writing this cache; end it first, or use another --output"
            )
    layout.manifest.unlink(missing_ok=True)
    for part in (layout.data, layout.tokenizer, layout.root / "reports", away):
        shutil.rmtree(part, ignore_errors=True)
    (layout.root / "README.md").unlink(missing_ok=True)


def _save(tokenizer: PreTrainedTokenizerBase, draft: Path, path: Path) -> None:
    try:
        tokenizer.save_pretrained(str(draft))
        without_code(draft)
    except OSError:
        raise
    except Exception as error:  # the Rust half of a tokenizer has no class of errors of its own
        raise full_disk(path, error) from error
