"""Push to and pull from the hub with the real huggingface_hub client and a stand-in server."""

from __future__ import annotations

import json
import logging

import pytest
from click.testing import CliRunner
from huggingface_hub import DatasetCard

from pipeline.cache import Cache, verify
from pipeline.cli import main
from pipeline.errors import CacheError, ContractError, MisuseError
from pipeline.sharing.pull import pull
from pipeline.sharing.push import push
from tests.support.hub import TOKEN, hub
from tests.support.rows import build_cache

__all__ = ["hub"]

URL, REPO = "hf://datasets/org/name", "org/name"


@pytest.fixture
def cache(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "cache", lm_tokenizer, per_shard=10, shards=4, splits=("train", "test"))


def test_one_private_commit_that_can_be_pulled(tmp_path, cache, hub):
    pushed = push(cache, URL, license="apache-2.0")
    assert hub.private == {REPO: True}
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert pushed.commit == hub.branches[REPO, "main"]
    assert pushed.url == f"{URL}@{pushed.commit}"
    assert pushed.sent_bytes == sum(shard.bytes for shard in cache.manifest.shards)
    files = hub.files(REPO)
    assert {name for name in files if name.startswith("data/")} == {
        f"data/{shard.name}.parquet" for shard in cache.manifest.shards
    }
    assert files["manifest.json"] == (cache.root / "manifest.json").read_bytes()
    assert DatasetCard(files["README.md"].decode()).data.license == "apache-2.0"
    copy = pull(pushed.url, tmp_path / "copy")
    assert copy.manifest == cache.manifest
    assert verify(copy.root).problems == ()
    assert {str(path.relative_to(copy.root)) for path in copy.root.rglob("*") if path.is_file()} == set(files) - {
        ".gitattributes"
    }


def test_the_cache_is_read_from_the_hub_as_it_is_needed(tmp_path, cache, hub):
    push(cache, URL, license="mit")
    there = Cache.open(URL, cache_dir=tmp_path / "fetched")
    assert there.where == f"{URL}@{hub.branches[REPO, 'main']}"
    hub.fetched = 0
    assert [row.example.source_row for row in there.dataset("test")] == list(range(40))
    assert hub.fetched == sum(shard.bytes for shard in cache.manifest.split_shards("test"))


def test_what_is_there_is_not_sent_again(cache, hub):
    first = push(cache, URL, license="mit")
    sent = len(hub.uploads)
    again = push(cache, URL, license="mit")
    assert (again.commit, again.sent_bytes) == (first.commit, 0)
    other = push(cache, URL, license="cc-by-4.0")  # only the card changes
    assert other.commit != first.commit
    assert other.sent_bytes == 0
    assert len(hub.uploads) == sent


def test_a_push_that_was_cut_short_goes_on(cache, hub):
    hub.fail_uploads_after = 3
    with pytest.raises(CacheError, match=r"hf://datasets/org/name.*(403|Forbidden|quota)"):
        push(cache, URL, license="mit")
    assert len(hub.uploads) == 3
    assert list(hub.files(REPO)) == [".gitattributes"]
    hub.fail_uploads_after = None
    push(cache, URL, license="mit")
    shards = {shard.sha256 for shard in cache.manifest.shards}
    assert sorted(oid for oid in hub.uploads if oid in shards) == sorted(shards)


def test_of_two_pushes_at_once_one_is_told(cache, hub):
    hub.race = True
    with pytest.raises(ContractError, match="somebody else has committed to main since"):
        push(cache, URL, license="mit")
    assert "manifest.json" not in hub.files(REPO)
    push(cache, URL, license="mit")
    assert "manifest.json" in hub.files(REPO)
    assert "somebody.txt" not in hub.files(REPO)


def test_another_cache_takes_the_place_of_the_first_in_one_commit(tmp_path, lm_tokenizer, cache, hub):
    first = push(cache, URL, license="mit")
    smaller = build_cache(tmp_path / "other", lm_tokenizer, per_shard=12, shards=2)
    second = push(smaller, URL, license="mit")
    assert {name for name in hub.files(REPO) if name.startswith("data/")} == {
        "data/train-00000.parquet",
        "data/train-00001.parquet",
    }
    assert pull(URL, tmp_path / "new").manifest == smaller.manifest
    assert pull(first.url, tmp_path / "old").manifest == cache.manifest
    assert second.commit != first.commit


def test_a_public_repository_takes_a_word(cache, hub, caplog):
    push(cache, URL, license="mit", public=True)
    assert hub.private == {REPO: False}
    with pytest.raises(CacheError, match="is public: everyone could read this cache; say --public"):
        push(cache, URL, license="mit")
    caplog.set_level(logging.WARNING, "pipeline")
    hub.private[REPO] = True
    push(cache, URL, license="mit", public=True)
    assert "is private, and stays so" in caplog.text


def test_a_branch(tmp_path, cache, hub):
    pushed = push(cache, URL, license="mit", revision="v2")
    assert "manifest.json" not in hub.files(REPO)
    assert hub.branches[REPO, "v2"] == pushed.commit
    assert pull(f"{URL}@v2", tmp_path / "copy").manifest == cache.manifest


def test_what_is_not_there(tmp_path, hub):
    with pytest.raises(CacheError, match=r"hf://datasets/org/nothing"):
        pull("hf://datasets/org/nothing", tmp_path / "copy")
    with pytest.raises(MisuseError, match=r"expected hf://datasets/ORG/NAME"):
        push(Cache(tmp_path, None), "hf://org/name", license="mit")


def test_the_commands_print_what_others_pin(tmp_path, cache, hub):
    words = ["push", "--cache", str(cache.root), "--to", URL]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "--license" in refused.output
    done = CliRunner().invoke(main, [*words, "--license", "apache-2.0"])
    assert done.exit_code == 0, done.output
    assert f"commit: {hub.branches[REPO, 'main']}" in done.output
    done = CliRunner().invoke(main, ["pull", "--from", URL, "--output", str(tmp_path / "copy"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cache_id"] == cache.manifest.cache_id
    assert TOKEN not in done.output
    assert not any(TOKEN.encode() in content for content in hub.files(REPO).values())


def test_a_dry_run_looks_and_leaves_the_hub_as_it_is(cache, hub):
    def planned() -> str:
        result = CliRunner().invoke(
            main, ["push", "--cache", str(cache.root), "--to", URL, "--license", "mit", "--dry-run"]
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    assert f"{URL}; a private repository, or a branch, is made" in planned()
    assert hub.private == {}
    push(cache, URL, license="mit")
    commits, uploads = len(hub.commits), len(hub.uploads)
    assert "sends    0 B of shards" in planned()
    assert (len(hub.commits), len(hub.uploads)) == (commits, uploads)
