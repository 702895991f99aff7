"""Caches on S3 and at other URLs: push, pull, training, failures, and protection of secrets."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import s3fs
from click.testing import CliRunner
from datasets import load_dataset

from pipeline.cache import Cache, Layout, verify
from pipeline.cli import main
from pipeline.config import TrainStudentConfig
from pipeline.errors import CacheError, ContractError, IntegrityError, MisuseError
from pipeline.records import Ancestor
from pipeline.sharing import pull as pulling
from pipeline.sharing.contents import check_shareable
from pipeline.sharing.pull import pull
from pipeline.sharing.push import push
from pipeline.training.run import run
from tests.conftest import tiny_model
from tests.support.flaky import flaky
from tests.support.rows import build_cache
from tests.support.s3 import bucket, s3_server

__all__ = ["bucket", "flaky", "s3_server"]


@pytest.fixture
def cache(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "cache", lm_tokenizer, per_shard=10, shards=4, splits=("train", "test"))


@pytest.fixture
def url(tmp_path, flaky):
    return f"flaky://{tmp_path}/shared"


def names(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------- S3


def losses(cache, student, output, fetched):
    run(
        TrainStudentConfig(
            cache=str(cache),
            student=str(student),
            output=str(output),
            cache_dir=str(fetched),
            max_steps=10,
            batch_size=3,
            learning_rate=1e-3,
            training={"logging_steps": 1, "save_steps": 10, "save_strategy": "steps", "report_to": "none"},
        )
    )
    state = json.loads((output / "checkpoint-10" / "trainer_state.json").read_text())
    return [(entry["hard_loss"], entry["soft_loss"]) for entry in state["log_history"] if "loss" in entry]


@pytest.mark.full
def test_there_and_back_and_straight_from_there_the_losses_are_the_same(
    tmp_path, lm_tokenizer, save_teacher, bucket, monkeypatch
):
    """Losses over a tenth of an epoch agree for the original cache, a pulled copy and the URL."""
    fetched = []
    plain = s3fs.S3FileSystem._cat_file

    async def count(self, path, *args, **kwargs):
        data = await plain(self, path, *args, **kwargs)
        fetched.append((path, len(data)))
        return data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", count)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, classes=len(lm_tokenizer), per_shard=3, shards=100)
    student = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "init")
    pushed = push(cache, f"{bucket}/made/cache", license="apache-2.0")
    size = sum(shard.bytes for shard in cache.manifest.shards)
    assert pushed.sent_bytes == size
    copy = pull(f"{bucket}/made/cache", tmp_path / "copy")
    assert copy.manifest == cache.manifest
    assert verify(copy.root).problems == ()
    fetched.clear()
    local = losses(cache.root, student, tmp_path / "a", tmp_path / "fetched")
    assert len(local) == 10
    assert losses(copy.root, student, tmp_path / "b", tmp_path / "fetched") == local
    assert not fetched
    assert losses(f"{bucket}/made/cache", student, tmp_path / "c", tmp_path / "fetched") == local
    assert 0 < sum(length for path, length in fetched if path.endswith(".parquet")) < size


def test_of_two_pushes_to_one_place_one_is_told(tmp_path, lm_tokenizer, cache, bucket):
    other = build_cache(tmp_path / "other", lm_tokenizer, per_shard=7, shards=1)
    where = f"{bucket}/cache"
    push(cache, where, license="mit")
    with pytest.raises(ContractError, match="holds another cache"):
        push(other, where, license="mit")
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    filesystem.pipe_file(f"{bucket}/busy/.push.json", json.dumps({"cache_id": "f" * 64}).encode())
    with pytest.raises(ContractError, match=r"another cache is being pushed there \(cache_id ffff"):
        push(cache, f"{bucket}/busy", license="mit")
    assert filesystem.find(f"{bucket}/busy") == [f"{bucket.removeprefix('s3://')}/busy/.push.json"]


def test_a_writer_that_finishes_first_wins(tmp_path, cache, bucket, monkeypatch):
    """Another manifest appears between the check and the conditional put."""
    from pipeline.sharing.stores import _Store

    plain = _Store.put_all
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)

    def race(self, files, what=None):
        plain(self, files, what)
        filesystem.pipe_file(f"{bucket}/cache/manifest.json", json.dumps({"cache_id": "e" * 64}).encode())

    monkeypatch.setattr(_Store, "put_all", race)
    with pytest.raises(ContractError, match=r"another writer has finished a cache there \(cache_id eeee"):
        push(cache, f"{bucket}/cache", license="mit")


def test_a_store_that_is_not_there(tmp_path, cache, bucket):
    with pytest.raises(CacheError, match="s3://no-such-bucket"):
        push(cache, "s3://no-such-bucket/cache", license="mit")
    with pytest.raises(CacheError, match="no cache here"):
        pull(f"{bucket}/nothing", tmp_path / "copy")


# --------------------------------------------------------------------------------------------- push


def test_everything_of_a_cache_and_nothing_else(tmp_path, cache, url):
    (cache.root / ".stage-cache-logits.json").write_text("{}")
    (cache.root / "receipts" / ".tmp-1-train-00000.json").write_text("half")
    (cache.root / "notes.txt").write_text("mine")
    before = {name: (cache.root / name).read_bytes() for name in names(cache.root)}
    push(cache, url, license="cc-by-4.0")
    assert {name: (cache.root / name).read_bytes() for name in names(cache.root)} == before
    kept = set(before) - {".stage-cache-logits.json", "receipts/.tmp-1-train-00000.json", "notes.txt"}
    assert names(tmp_path / "shared") == kept | {"reports/kept-mass.json", "reports/kept-mass.png"}
    assert "license: cc-by-4.0" in (tmp_path / "shared" / "README.md").read_text()
    assert verify(tmp_path / "shared").problems == ()
    loaded = load_dataset(str(tmp_path / "shared"), cache_dir=str(tmp_path / "hf"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 40, "test": 40}


def test_a_push_that_was_cut_short_goes_on(tmp_path, cache, url, flaky, monkeypatch):
    monkeypatch.setattr("pipeline.sharing.stores._PARALLEL", 1)
    flaky.die_after = 7
    with pytest.raises(CacheError, match=r"the network failed 4 times .*the cable is cut"):
        push(cache, url, license="mit")
    sent = [name for name in flaky.written if name.endswith(".parquet.part")]
    assert 0 < len(sent) < 8
    assert not (tmp_path / "shared" / "manifest.json").exists()
    flaky.die_after = None
    with pytest.raises(CacheError, match="no cache here"):
        Cache.open(url, cache_dir=tmp_path / "fetched")
    pushed = push(cache, url, license="mit")
    sizes = {f"{shard.name}.parquet.part": shard.bytes for shard in cache.manifest.shards}
    assert sorted(name for name in flaky.written if name.endswith(".parquet.part")) == sorted(sizes)
    assert pushed.sent_bytes == sum(sizes.values()) - sum(sizes[name] for name in sent)
    assert not (tmp_path / "shared" / ".push.json").exists()
    assert verify(tmp_path / "shared").problems == ()
    assert push(cache, url, license="other").sent_bytes == 0
    assert "license: other" in (tmp_path / "shared" / "README.md").read_text()


def test_a_damaged_cache_is_not_published(tmp_path, cache, url):
    path = Layout(cache.root).shard("train-00001")
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"train-00001\.parquet: sha256 differs"):
        push(cache, url, license="mit")
    assert not (tmp_path / "shared").exists()


def test_a_place_that_holds_other_data(tmp_path, cache, url):
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "other.parquet").write_text("not ours")
    with pytest.raises(CacheError, match=r"data/other\.parquet: is no part of this cache"):
        push(cache, url, license="mit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "s3://bucket/cache"], "--license: expected the licence"),
        (["--to", "s3://bucket/cache", "--license", "My Own!"], "found 'My Own!'"),
        (["--to", "some/where", "--license", "mit"], "--to: expected a URL"),
        (["--to", "s3://bucket/cache", "--license", "mit", "--public"], "--public and --revision go with"),
        (["--to", "hf://org/name", "--license", "mit"], "expected hf://datasets/ORG/NAME"),
    ],
)
def test_what_push_refuses(cache, words, message):
    done = CliRunner().invoke(main, ["push", "--cache", str(cache.root), *words])
    assert done.exit_code == 2
    assert message in done.output


# --------------------------------------------------------------------------------------------- pull


def test_a_pull_that_was_cut_short_goes_on(tmp_path, cache, url, flaky, monkeypatch):
    monkeypatch.setattr(pulling, "_PARALLEL", 1)
    monkeypatch.setattr(pulling, "_PART", 300)
    push(cache, url, license="mit")
    flaky.log.clear()
    flaky.die_after = 12
    with pytest.raises(CacheError, match=r"the network failed 4 times .*the cable is cut") as caught:
        pull(url, tmp_path / "copy")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert [path.stat().st_size for path in (tmp_path / "copy").rglob("*.part")] > [0]
    flaky.die_after = None
    copy = pull(url, tmp_path / "copy")
    assert copy.manifest == cache.manifest
    assert verify(copy.root).problems == ()
    assert flaky.fetched() == sum(shard.bytes for shard in cache.manifest.shards), "no byte twice"
    assert names(copy.root) == names(tmp_path / "shared")
    flaky.log.clear()
    assert pull(url, tmp_path / "copy").manifest == cache.manifest
    assert flaky.fetched() == 0


def test_what_came_damaged_never_gets_its_name(tmp_path, cache, url, flaky):
    push(cache, url, license="mit")
    flaky.damaged = 1
    with pytest.raises(IntegrityError, match=r"sha256 differs from manifest\.json"):
        pull(url, tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()
    for path in (tmp_path / "copy" / "data").glob("*.parquet"):
        assert path.read_bytes() == (cache.root / "data" / path.name).read_bytes()
    assert verify(pull(url, tmp_path / "copy").root).problems == ()


def test_a_manifest_cannot_point_elsewhere(tmp_path, cache, url):
    push(cache, url, license="mit")
    path = tmp_path / "shared" / "manifest.json"
    path.write_text(path.read_text().replace('"train-00000"', '"../../evil"'))
    with pytest.raises(IntegrityError, match=r"^flaky://.*plain file name"):
        pull(url, tmp_path / "copy")


@pytest.mark.parametrize(
    ("splits", "shards", "expected"),
    [
        (("test",), (), ["test-00000", "test-00001", "test-00002", "test-00003"]),
        ((), ("1",), ["train-00000", "test-00000"]),
        (("train",), ("2",), ["train-00000", "train-00001"]),
        ((), ("test-00003", "train-00002"), ["train-00002", "test-00003"]),
    ],
)
def test_a_part_is_a_cache_of_its_own(tmp_path, cache, url, flaky, splits, shards, expected):
    push(cache, url, license="cc-by-4.0")
    flaky.log.clear()
    part = pull(url, tmp_path / "part", splits=splits, shards=shards)
    assert [shard.name for shard in part.manifest.shards] == expected
    assert part.manifest.cache_id != cache.manifest.cache_id
    words = [w for flag, values in (("--split", splits), ("--shards", shards)) for v in values for w in (flag, v)]
    assert part.manifest.ancestry == (Ancestor(cache.manifest.cache_id, " ".join(["pull", *words])),)
    assert verify(part.root).problems == ()
    assert flaky.fetched() == sum(shard.bytes for shard in part.manifest.shards)
    card = (part.root / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert cache.manifest.cache_id in card
    loaded = load_dataset(str(part.root), cache_dir=str(tmp_path / "hf"))
    assert sum(len(rows) for rows in loaded.values()) == 10 * len(expected)
    assert pull(url, tmp_path / "part", splits=splits, shards=shards).manifest == part.manifest
    with pytest.raises(ContractError, match="holds another cache"):
        pull(url, tmp_path / "part")


def test_what_pull_refuses(tmp_path, cache, url):
    push(cache, url, license="mit")
    with pytest.raises(MisuseError, match="--split dev: the cache has train, test"):
        pull(url, tmp_path / "a", splits=("dev",))
    with pytest.raises(MisuseError, match="--shards train-00009: the cache has train-00000"):
        pull(url, tmp_path / "b", shards=("train-00009",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match="holds files that are no cache"):
        pull(url, tmp_path / "full")
    done = CliRunner().invoke(
        main, ["pull", "--from", url, "--output", str(tmp_path / "c"), "--shards", "2", "--shards", "x"]
    )
    assert done.exit_code == 2
    assert "--shards: expected one number" in done.output


def test_a_directory_is_copied_too_and_the_yaml_key_is_the_flag(tmp_path, cache):
    (tmp_path / "pull.yaml").write_text(f"pull: {{from: {cache.root}, output: {tmp_path}/copy, split: test}}\n")
    done = CliRunner().invoke(main, ["pull", "--config", str(tmp_path / "pull.yaml")])
    assert done.exit_code == 0, done.output
    assert Cache.open(tmp_path / "copy").splits == ("test",)


# ------------------------------------------------------------------------------------------ secrets

SECRETS = {
    "HF_TOKEN": "hf_plantedTokenOfTheTests",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/of/the/tests",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "MY_API_KEY": "planted-api-key",
}


def test_nothing_secret_gets_out(tmp_path, lm_tokenizer, save_teacher, flaky, monkeypatch, caplog):
    """Secrets in the environment and the URL appear in no file, log line or output."""
    caplog.set_level("DEBUG", "pipeline")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        type(flaky()),
        "_strip_protocol",
        classmethod(lambda cls, path: str(path).partition("@host")[2].partition("?")[0] or str(path)),
    )
    url = f"flaky://planted-user:planted-password@host{tmp_path}/shared?X-Amz-Signature=planted-signature"
    cache = build_cache(tmp_path / "cache", lm_tokenizer, classes=len(lm_tokenizer), per_shard=5)
    student = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "init")
    outputs = []

    def call(*words):
        done = CliRunner().invoke(main, list(words))
        outputs.append(done.output + repr(done.exception or ""))
        return done

    assert call("push", "--cache", str(cache.root), "--to", url, "--license", "mit").exit_code == 0, outputs
    settings = ("--cache-dir", str(tmp_path / "fetched"))
    assert call("inspect", "--cache", url, *settings).exit_code == 0, outputs
    assert call("pull", "--from", url, "--output", str(tmp_path / "copy")).exit_code == 0, outputs
    config = f"train-student: {{cache: '{url}', student: {student}, output: {tmp_path}/student, max-steps: 1}}"
    (tmp_path / "run.yaml").write_text(config)
    assert call("train-student", "--config", str(tmp_path / "run.yaml"), *settings).exit_code == 0, outputs
    flaky.failures = -1
    for words in (["inspect", *settings, "--cache"], ["pull", "--output", str(tmp_path / "x"), "--from"]):
        failed = call(*words, url)
        assert failed.exit_code == 1
        assert "flaky://***@host" in failed.output
    written = [
        path.read_bytes()
        for root in ("shared", "copy", "cache", "fetched", "student")
        for path in (tmp_path / root).rglob("*")
        if path.is_file()
    ]
    everything = b"\n".join([*written, caplog.text.encode(), "\n".join(outputs).encode()])
    assert b"cache_id" in everything
    for secret in (*SECRETS.values(), "planted-user", "planted-password", "planted-signature"):
        assert secret.encode() not in everything, secret


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("receipts/a.json", '{"device": "/home/somebody/x"}', r"a path of this machine \(/home/somebody/x\)"),
        ("manifest.json", '{"a": [{"b": "C:\\\\teachers\\\\one"}]}', "a path of this machine"),
        ("reports/bad-rows.tsv", "train\t1\tin HOME/data", "a path of this machine"),
        ("manifest.json", '{"name": "https://me:password@host/x"}', "a token, a password or a signed URL"),
        ("README.md", "see https://host/x?X-Amz-Signature=abc", "a token, a password or a signed URL"),
        ("tokenizer/tokenizer_config.json", '{"t": "hf_abcdefghijkl"}', "a token, a password or a signed URL"),
        ("reports/notes.json", '{"a": "xx planted-api-key"}', "the value of MY_API_KEY"),
    ],
)
def test_a_file_that_says_too_much_is_not_published(tmp_path, monkeypatch, name, text, message):
    monkeypatch.setenv("MY_API_KEY", SECRETS["MY_API_KEY"])
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / name.rpartition("/")[2]
    path.write_text(text.replace("HOME", os.environ["HOME"]))
    with pytest.raises(CacheError, match=message) as caught:
        check_shareable(name, path)
    assert SECRETS["MY_API_KEY"] not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"name": "runs/teacher", "labels": ["/b", "a / b"], "type": "application/json"}'),
        ("tokenizer/tokenizer.json", '{"vocab": {"/home/somebody/": 1, "://a:b@c": 2}}'),
        ("tokenizer/chat_template.jinja", "see https://host/x?y=1"),
        ("README.md", "see https://host/x and hf://datasets/org/name"),
    ],
)
def test_what_is_harmless_is(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / name.rpartition("/")[2]
    path.write_text(text)
    check_shareable(name, path)


def test_a_cache_that_names_a_local_path_is_refused(tmp_path, cache, url):
    receipt = next((cache.root / "receipts").glob("train-*.json"))
    receipt.write_text(receipt.read_text().replace('"cpu"', '"/mnt/disk/teachers"'))
    with pytest.raises(CacheError, match=r"/mnt/disk/teachers"):
        push(cache, url, license="mit")
    assert not (tmp_path / "shared").exists()
    shutil.rmtree(cache.root / "receipts")
    push(Cache.open(cache.root), url, license="mit")
