"""Check the output directory or URL of a new cache, and delete an old cache there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeVar

from pipeline.cache.format.manifest import AnyPlan, Layout, Plan, parse
from pipeline.cache.format.sanity import contract_problem
from pipeline.cache.storage.commit import temporary_path
from pipeline.cache.storage.outbox import Outbox
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.claims import is_claimed
from pipeline.errors import CacheError, ContractError

PlanType = TypeVar("PlanType", bound=AnyPlan)


def open_layout(output: str | Path) -> Layout:
    """Return the layout of a cache's output: a directory, or a URL that fsspec opens.

    Raises:
        CacheError: there is no file system for the URL.
    """
    if not is_url(str(output)):
        return Layout(Path(output))
    outbox = Outbox(str(output))
    return Layout(outbox.staging, outbox)


def current_plan(layout: Layout) -> Plan | None:
    """Return the plan of the capture at this location, finished or not, or None."""
    return plan_there(layout, Plan)


def plan_there(layout: Layout, kind: type[PlanType]) -> PlanType | None:
    """Like `current_plan`, for jobs with their own type of plan."""
    if layout.outbox is not None:
        layout.outbox.fetch("receipts/plan.json")
    return parse(kind, layout.plan) if layout.plan.is_file() else None


def check_place(layout: Layout, plan: Plan, *, overwrite: bool = False) -> Plan | None:
    """Check that a capture may write here; return the plan of the capture that is there already.

    Changes nothing.

    Args:
        overwrite: an existing cache will be deleted; returns None.

    Raises:
        ContractError: the contract is not valid for any cache.
        CacheError: something other than a cache is there, or another process is writing to the
            cache that would be deleted.
    """
    problem = contract_problem(plan.contract)
    if problem is not None:
        raise ContractError(f"{layout.name}: these settings are not valid for a cache: {problem}")
    return check_files(layout, Plan, overwrite=overwrite)


def check_files(layout: Layout, kind: type[PlanType], *, overwrite: bool = False) -> PlanType | None:
    """Like `check_place`, but before the plan is known.

    Args:
        kind: the type of the job's plans.
    """
    if layout.root.exists() and not layout.root.is_dir():
        raise CacheError(f"{layout.root}: expected a directory, found a file")
    if overwrite:
        if _holds_files(layout):
            _check_is_ours(layout)
            if layout.plan.parent.is_dir() and is_claimed(layout.plan.parent):
                raise _written_by_another(layout)
        return None
    # In this order: a racing capture writes its plan first, so its files are never seen without a
    # plan.
    holds_files = _holds_files(layout)
    found = plan_there(layout, kind)
    if holds_files and found is None:
        raise CacheError(
            f"{layout.name}: holds files that are no {layout.names.result}; use an empty or a new directory"
        )
    return found


def _holds_files(layout: Layout) -> bool:
    """Whether a location holds any file that is not hidden.

    Hidden files are temporary files, and the marker of `softlabel run`.
    """
    if layout.outbox is not None:
        return not layout.outbox.is_empty()
    return any(
        path.is_file() and not any(part.startswith(".") for part in path.relative_to(layout.root).parts)
        for path in layout.root.rglob("*")
    )


def clear(layout: Layout) -> None:
    """Delete a cache, and nothing else.

    The manifest is deleted first, so that a half-deleted cache does not count as one.

    Raises:
        CacheError: the location holds files that are not a cache, or another process is writing to
            it.
    """
    if not _holds_files(layout):
        return
    _check_is_ours(layout)
    outbox = layout.outbox
    if outbox is not None:
        # the plan last: without it, the rest does not count as a cache that may be deleted
        names = [f"receipts/{name}" for name in outbox.names("receipts") if name != "plan.json"]
        outbox.clear(("manifest.json", "README.md", "data", "tokenizer", "reports", *names, "receipts"))
    away = temporary_path(layout.plan.parent)
    if layout.plan.parent.is_dir():
        # Rename the receipts first: another capture of this cache cannot take its next claim, and a
        # claim that it holds is still held under the new name.
        os.replace(layout.plan.parent, away)
        if is_claimed(away):
            os.replace(away, layout.plan.parent)
            raise _written_by_another(layout)
    layout.manifest.unlink(missing_ok=True)
    for part in (layout.data, layout.tokenizer, layout.root / "reports", away):
        shutil.rmtree(part, ignore_errors=True)
    (layout.root / "README.md").unlink(missing_ok=True)


def _check_is_ours(layout: Layout) -> None:
    if layout.outbox is not None:
        layout.outbox.fetch("manifest.json")
        layout.outbox.fetch("receipts/plan.json")
    # the plan of a cache whose deletion was interrupted
    half_cleared = any(layout.root.glob(f".tmp-*-receipts/{layout.names.plan}"))
    if not layout.plan.exists() and not layout.manifest.exists() and not half_cleared:
        raise CacheError(
            f"{layout.name}: --overwrite deletes {layout.names.result}s only, and this directory holds other files; remove it by hand"
        )


def _written_by_another(layout: Layout) -> CacheError:
    return CacheError(
        f"{layout.name}: --overwrite: another process is writing this {layout.names.result}; end it first, or use another --output"
    )
