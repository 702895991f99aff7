"""Publish to the Hugging Face hub: upload shards one by one, then make a single commit."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache.storage.transfer import patiently
from pipeline.errors import CacheError, ContractError, MisuseError
from pipeline.progress import Progress
from pipeline.sharing.contents import Contents
from pipeline.sources.files.loading import reason

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

#: Time-out of the upload of one shard; the hub's library has its own time-outs for the single
#: requests.
_UPLOAD_SECONDS = 3600.0


def repository(url: str) -> str:
    """The repository ORG/NAME of a hub URL.

    Raises:
        MisuseError: the URL does not name a data set repository.
    """
    found = re.fullmatch(r"hf://datasets/([\w.\-]+/[\w.\-]+)/?", url)
    if found is None:
        raise MisuseError(f"--to: expected hf://datasets/ORG/NAME (a branch goes into --revision), found {url!r}")
    return found[1]


def push_to_hub(
    contents: Contents, repo_id: str, *, public: bool, revision: str | None, message: str
) -> tuple[str, int]:
    """Upload missing shards, then commit all files at once.

    The parent of the commit is the head of the branch when the push began.

    Args:
        public: whether everyone can read a new repository, or only its owners.
        revision: a branch, created if it does not exist. None: main.

    Returns:
        The commit, and the number of bytes of the shards that were sent.

    Raises:
        ContractError: another commit was made meanwhile.
        CacheError: the hub rejects a request or cannot be reached, or the repository is public
            and `public` is not set.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    where = f"hf://datasets/{repo_id}"
    branch = revision or "main"
    parent, there = _begin(api, where, repo_id, public=public, branch=branch)
    manifest = {"manifest.json": contents.manifest}
    additions: list[CommitOperationAdd] = []
    sent = 0
    total = sum(path.stat().st_size for path in contents.shards.values())
    with Progress("push", total, unit="B") as progress:
        for name, path in {**contents.shards, **contents.others, **manifest}.items():
            if there.get(name) not in _hashes(contents, name, path):
                addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                if name in contents.shards:
                    _upload(api, f"{where}/{name}", repo_id, addition, branch)
                    sent += path.stat().st_size
                additions.append(addition)
            progress.update(path.stat().st_size if name in contents.shards else 0)
    names = {*contents.shards, *contents.others, *manifest}
    stale = [name for name in there if name not in names and not name.startswith(".")]
    deletions = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *deletions]
    if not operations:
        return parent, 0
    try:
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type="dataset",
            revision=branch,
            parent_commit=parent,
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (409, 412):
            raise ContractError(
                f"{where}: somebody else has committed to {branch} since {parent[:12]}; what was uploaded is kept: look at it, then run the same command again"
            ) from None
        raise CacheError(f"{where}: {reason(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise CacheError(f"{where}: {reason(error)}; run the same command again") from None
    return str(commit.oid), sent


def missing_on_hub(contents: Contents, repo_id: str, *, public: bool, revision: str | None) -> dict[str, Path] | None:
    """The shards that a push would send; None if the repository or branch does not exist.

    Writes nothing.

    Raises:
        CacheError: the hub rejects a request or cannot be reached, or the repository is public
            and `public` is not set.
    """
    from huggingface_hub import HfApi

    api, where, branch = HfApi(), f"hf://datasets/{repo_id}", revision or "main"
    if not patiently(where, lambda: api.revision_exists(repo_id, branch, repo_type="dataset")):
        return None
    _, there = _look(api, where, repo_id, public=public, branch=branch)
    return {name: path for name, path in contents.shards.items() if there.get(name) != contents.sha256[name]}


def _begin(api: HfApi, where: str, repo_id: str, *, public: bool, branch: str) -> tuple[str, dict[str, str]]:
    """The commit to build on, and the SHA-256 (large files) or Git hash of each file in it.

    Creates the repository if it does not exist.
    """
    settings: dict[str, Any] = {"repo_type": "dataset", "exist_ok": True}
    patiently(where, lambda: api.create_repo(repo_id, private=not public, **settings))
    if branch != "main":
        patiently(where, lambda: api.create_branch(repo_id, branch=branch, **settings))
    return _look(api, where, repo_id, public=public, branch=branch)


def _look(api: HfApi, where: str, repo_id: str, *, public: bool, branch: str) -> tuple[str, dict[str, str]]:
    """The commit of a branch, and the SHA-256 (large files) or Git hash of each file in it."""
    from huggingface_hub.hf_api import RepoFile

    info = patiently(where, lambda: api.repo_info(repo_id, repo_type="dataset", revision=branch))
    if not info.private and not public:
        raise CacheError(f"{where}: is public: everyone could read this cache; say --public, or use another repository")
    if info.private and public:
        logger.warning("%s: is private, and stays so: its owner changes that on the hub", where)
    tree = patiently(
        where, lambda: list(api.list_repo_tree(repo_id, recursive=True, repo_type="dataset", revision=info.sha))
    )
    files = [item for item in tree if isinstance(item, RepoFile)]
    return str(info.sha), {item.path: item.lfs.sha256 if item.lfs else item.blob_id for item in files}


def _upload(api: HfApi, where: str, repo_id: str, addition: Any, branch: str) -> None:
    """Upload one shard to the hub's storage before the commit; a resumed push skips it."""
    patiently(
        where,
        lambda: api.preupload_lfs_files(repo_id, [addition], repo_type="dataset", revision=branch),
        timeout=_UPLOAD_SECONDS,
    )


def _hashes(contents: Contents, name: str, path: Path) -> set[str]:
    """The hashes that the hub may list for a file: SHA-256, or the Git hash of a small file."""
    if name in contents.sha256:
        return {contents.sha256[name]}
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return {blob.hexdigest(), hashlib.sha256(data).hexdigest()}
