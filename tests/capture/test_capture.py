"""Capture: the cache equals the model's outputs, also after kills, bad rows and retries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.format.manifest import Layout
from pipeline.capture.plan import plan_batches
from pipeline.errors import BadRowError, CacheError, ContractError, MisuseError, ModelError
from pipeline.records import Columns, Full, Sampled, TopK
from pipeline.softlabels import teacher_scores
from tests.conftest import tiny_model
from tests.support.processes import python
from tests.support.profile import in_full

CLASSIFIERS = ["bert", "roberta", "distilbert", "modernbert", "deberta-v2"]
LANGUAGE_MODELS = ["gpt2", "llama", "qwen3", "gemma2", "cohere", "opt", "gpt_neox", "mixtral"]


def own_logits(model, tokenizer, row) -> torch.Tensor:
    """(N, V) logits of the supervised positions, from a plain forward pass over one row."""
    inputs = {"input_ids": torch.from_numpy(row.example.input_ids.astype(np.int64))[None]}
    if row.example.token_type_ids is not None:
        inputs["token_type_ids"] = torch.from_numpy(row.example.token_type_ids.astype(np.int64))[None]
    with torch.inference_mode():
        logits = model(**inputs).logits
    if row.example.supervised is None:
        return logits
    return logits[0][torch.from_numpy(np.asarray(row.example.supervised))]


def check_top_k(found, logits: torch.Tensor, k: int) -> None:
    """Check the top classes to float16 rounding and the stored residual mass to 2e-4."""
    logprobs = torch.log_softmax(logits.double(), -1)
    ids = found.top_ids.reshape(-1, k)
    kept = found.top_logprobs.reshape(-1, k)
    expected = logprobs.gather(1, ids)
    assert ((kept - expected).abs() <= 2.0**-11 * expected.abs() + 1e-4).all()
    best = logprobs.topk(k).values
    assert (expected - best).abs().max() < 1e-4  # the k largest, up to ties
    for i, t in enumerate((1.0, 2.0, 4.0)):
        q = torch.softmax(logits.double() / t, -1)
        outside = q.scatter(1, ids, 0.0).sum(-1)
        assert (found.log_residuals[:, i].double().exp() - outside).abs().max() <= 2e-4


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_cached_logits_of_classifiers_are_the_models(tmp_path, bert_tokenizer, topics, kind):
    model = tiny_model(kind, len(bert_tokenizer), num_labels=3, spread=4.0)
    settings = {
        "task": "sequence-classification",
        "tokenizer": bert_tokenizer,
        "rows_per_shard": 40,
        "batch_tokens": 100,
    }
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    cache = softlabel.cache_logits(model, topics, tmp_path / "full", **settings)
    top = softlabel.cache_logits(model, topics, tmp_path / "top", encoding=TopK(2), **settings)
    assert cache.splits == ("train", "test")
    for row, narrow in zip(cache.dataset("train"), top.dataset("train"), strict=True):
        logits = own_logits(model, bert_tokenizer, row)
        centred = logits - logits.max()
        found = row.soft.top_logprobs - row.soft.top_logprobs.max()
        torch.testing.assert_close(found[None], centred, atol=1e-5, rtol=0)
        check_top_k(narrow.soft, logits, 2)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_cached_logits_of_language_models_are_the_models(tmp_path, lm_tokenizer, documents, kind):
    model = tiny_model(kind, len(lm_tokenizer), spread=3.0)
    settings = {
        "task": "causal-lm",
        "tokenizer": lm_tokenizer,
        "rows_per_shard": 15,
        "batch_tokens": 200,
        "max_length": 48,
    }
    cache = softlabel.cache_logits(model, documents["train"], tmp_path / "full", encoding=Full(), **settings)
    top = softlabel.cache_logits(model, documents["train"], tmp_path / "top", encoding=TopK(7), **settings)
    nll = entropy = 0.0
    for row, narrow in zip(cache.dataset("train"), top.dataset("train"), strict=True):
        logits = own_logits(model, lm_tokenizer, row)
        found = row.soft.top_logprobs.reshape(logits.shape)
        torch.testing.assert_close(found, torch.log_softmax(logits, -1), atol=2e-5, rtol=0)
        check_top_k(narrow.soft, logits, 7)
        labels = torch.from_numpy(row.example.input_ids[np.flatnonzero(row.example.supervised) + 1].astype(np.int64))
        scores = teacher_scores(logits.double(), labels)
        nll += abs(row.teacher_nll_sum - float(scores.nll.sum()))
        entropy += abs(row.teacher_entropy_sum - float(scores.entropy.sum()))
    assert nll < 0.02
    assert entropy < 0.02


def test_isolated_documents_are_compared_with_the_models_own_path(tmp_path, lm_tokenizer):
    """The check before the first shard also accepts short rows that hold several documents."""
    texts = Dataset.from_dict({"text": ["the cat", "a dog sat", "the old tree", "a bird"] * 5})
    cache = softlabel.cache_logits(
        tiny_model("llama", len(lm_tokenizer), spread=3.0),
        texts,
        tmp_path / "c",
        task="causal-lm",
        tokenizer=lm_tokenizer,
        max_length=24,
        packing=True,
        isolate_documents=True,
    )
    assert all(len(row.example.document_lengths) > 1 for row in cache.dataset("train"))


def test_isolated_documents_have_the_logits_that_they_have_alone(tmp_path, lm_tokenizer, documents):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    cache = softlabel.cache_logits(
        model,
        documents["train"],
        tmp_path / "c",
        task="causal-lm",
        tokenizer=lm_tokenizer,
        encoding=Full(),
        max_length=64,
        packing=True,
        isolate_documents=True,
    )
    row = next(row for row in cache.dataset("train") if len(row.example.document_lengths) > 2)
    start = int(row.example.document_lengths[0])
    stop = start + int(row.example.document_lengths[1])
    with torch.inference_mode():
        alone = model(input_ids=torch.from_numpy(row.example.input_ids[start:stop].astype(np.int64))[None]).logits[0]
    before = int(row.example.supervised[:start].sum())
    inside = row.example.supervised[start:stop]
    found = row.soft.top_logprobs.reshape(len(row.soft), -1)[before : before + int(inside.sum())]
    torch.testing.assert_close(found, torch.log_softmax(alone[torch.from_numpy(inside)], -1), atol=2e-5, rtol=0)


def test_sampled_is_the_default_for_language_models_and_the_same_however_batches_fall(
    tmp_path, lm_tokenizer, documents
):
    """More than 90% of rows keep the same sampled classes when batches change.

    In float32, another batch shape may change the last bits of a probability.
    """
    model = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    settings = {"task": "causal-lm", "tokenizer": lm_tokenizer, "max_length": 48}
    one = softlabel.cache_logits(
        model, documents["train"], tmp_path / "one", batch_tokens=64, rows_per_shard=7, **settings
    )
    other = softlabel.cache_logits(model, documents["train"], tmp_path / "other", batch_tokens=4096, **settings)
    assert one.manifest.contract.encoding == Sampled()
    same = [
        torch.equal(a.soft.tail_ids, b.soft.tail_ids)
        for a, b in zip(one.dataset("train"), other.dataset("train"), strict=True)
    ]
    assert np.mean(same) > 0.9


def test_padded_vocabularies_are_cut_to_the_tokenizers(tmp_path, lm_tokenizer, documents):
    model = tiny_model("llama", len(lm_tokenizer) + 24, spread=3.0)
    cache = softlabel.cache_logits(
        model,
        documents["train"],
        tmp_path / "c",
        task="causal-lm",
        tokenizer=lm_tokenizer,
        encoding=Full(),
        max_length=48,
    )
    assert cache.manifest.contract.num_classes == len(lm_tokenizer)
    row = cache.dataset("train")[0]
    logits = own_logits(model, lm_tokenizer, row)[:, : len(lm_tokenizer)]
    torch.testing.assert_close(
        row.soft.top_logprobs.reshape(logits.shape), torch.log_softmax(logits, -1), atol=2e-5, rtol=0
    )


def test_every_row_once_and_labels_and_kept_columns_stay(tmp_path, bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    cache = softlabel.cache_logits(
        model,
        topics,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        columns=Columns(keep=("id",)),
        rows_per_shard=17,
    )
    rows = list(cache.dataset("train"))
    assert [row.example.source_row for row in rows] == list(range(90))
    assert [row.example.kept["id"] for row in rows] == topics["train"]["id"]
    names = {0: "business", 1: "sport", 2: "film", None: None}
    assert [names[row.example.label] for row in rows] == topics["train"]["label"]
    assert [row.example.text for row in rows] == topics["train"]["text"]
    assert verify(cache.root).problems == ()


def test_a_finished_cache_is_not_made_again_and_another_contract_is_refused(tmp_path, bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    settings = {"task": "sequence-classification", "tokenizer": bert_tokenizer}
    first = softlabel.cache_logits(model, topics, tmp_path / "c", **settings)
    stamp = Layout(first.root).manifest.stat().st_mtime_ns
    assert softlabel.cache_logits(model, topics, tmp_path / "c", **settings).manifest == first.manifest
    assert Layout(first.root).manifest.stat().st_mtime_ns == stamp
    for change, named in [
        ({"encoding": TopK(2)}, "encoding"),
        ({"max_length": 20}, "max_length"),
        ({"seed": 1}, "seed"),
        ({"columns": Columns(keep=("id",))}, "source.columns.keep"),
    ]:
        with pytest.raises(ContractError, match=f"holds another capture: contract.*{named}"):
            softlabel.cache_logits(model, topics, tmp_path / "c", **{**settings, **change})
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-3
    with pytest.raises(ContractError, match=r"teacher\.weights_sha256"):
        softlabel.cache_logits(model, topics, tmp_path / "c", **settings)
    assert verify(first.root).problems == ()


KILLED = """
import sys, os, signal, time
import pipeline.capture.shard as module, pyarrow.parquet as pq
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process whose parent ignores it would too
whole = module.write_shard
done = []
def write_shard(*args):
    if len(done) == 1:
        # in the middle of the second shard's write
        def die(self, table, **kwargs):
            os.kill(os.getpid(), signal.SIGNAL)
            time.sleep(3)
            raise OSError("stopped")
        pq.ParquetWriter.write_table = die
    done.append(args)
    return whole(*args)
module.write_shard = write_shard
from pipeline.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["SIGKILL", *in_full("SIGINT", "SIGTERM")])
def test_a_killed_capture_goes_on_and_ends_with_the_same_bytes(tmp_path, bert_tokenizer, topics, save_teacher, name):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    model.config.label2id = {"business": 0, "sport": 1, "film": 2}
    teacher = save_teacher(model, bert_tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in topics.items():
        rows.to_json(data / f"{split}.jsonl")

    def command(output: str) -> list[str]:
        return (
            f"cache-logits --task sequence-classification --teacher {teacher} --dataset {data} --rows-per-shard 40 --output {tmp_path / output}"
        ).split()

    killed = python("-c", KILLED.replace("SIGNAL", name), *command("killed"))
    assert killed.returncode == {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[name], killed.stderr
    if name != "SIGKILL":
        assert killed.stderr.splitlines()[-1].startswith("Error: interrupted; what was finished is kept")
        assert "Traceback" not in killed.stderr
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert len(list((tmp_path / "killed" / "data").glob("[a-z]*.parquet"))) == 1
    assert len(list((tmp_path / "killed" / "data").glob(".tmp-*"))) == (name == "SIGKILL")
    with pytest.raises(CacheError, match="was not finished"):
        Cache.open(tmp_path / "killed")
    receipt = tmp_path / "killed" / "receipts" / "train-00000.json"
    stamp = receipt.stat().st_mtime_ns
    for output in ("killed", "whole"):
        done = python("-m", "pipeline", *command(output))
        assert done.returncode == 0, done.stderr
        assert ("cache-logits: 1 of 4 shards are finished already" in done.stderr) == (output == "killed")
    assert receipt.stat().st_mtime_ns == stamp  # the finished shard was not recomputed
    assert sorted(p.name for p in (tmp_path / "killed" / "data").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole" / "data").iterdir()
    )
    for path in sorted((tmp_path / "whole" / "data").iterdir()):
        assert path.read_bytes() == (tmp_path / "killed" / "data" / path.name).read_bytes(), path.name
    assert (tmp_path / "whole" / "manifest.json").read_bytes() == (tmp_path / "killed" / "manifest.json").read_bytes()
    rows = [row.example.source_row for row in Cache.open(tmp_path / "killed").dataset("train")]
    assert rows == list(range(90))


class _BrokenTeacher(torch.nn.Module):
    """A model that returns NaN for rows that contain a given token."""

    def __init__(self, model, token: int) -> None:
        super().__init__()
        self.inner, self.token = model, token
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, **kwargs):
        out = self.inner(input_ids=input_ids, **kwargs)
        out.logits[(input_ids == self.token).any(-1)] = torch.nan
        return out


def test_a_row_with_nan_stops_the_run_or_is_set_aside(tmp_path, bert_tokenizer):
    words = ["the cat sat", "the dog ran", "the minister sat", "a bird flew", "minister"]
    data = Dataset.from_dict({"text": words})
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    broken = _BrokenTeacher(model, bert_tokenizer.convert_tokens_to_ids("minister"))
    settings = {"task": "sequence-classification", "tokenizer": bert_tokenizer}
    with pytest.raises(BadRowError, match=r"split train, row [24]: expected finite logits, found nan"):
        softlabel.cache_logits(broken, data, tmp_path / "c", **settings)
    assert not Layout(tmp_path / "c").manifest.exists()
    cache = softlabel.cache_logits(broken, data, tmp_path / "d", on_bad_row="skip", **settings)
    assert [row.example.source_row for row in cache.dataset("train")] == [0, 1, 3]
    assert cache.manifest.bad_rows == 2
    listed = (cache.root / "reports" / "bad-rows.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in listed] == [["train", "2"], ["train", "4"]]


def test_an_empty_text_names_its_row(tmp_path, bert_tokenizer):
    data = Dataset.from_dict({"text": ["the cat", "", "the dog"]})
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    with pytest.raises(BadRowError, match=r"row 1: text is empty.*--on-bad-row skip"):
        softlabel.cache_logits(model, data, tmp_path / "c", task="sequence-classification", tokenizer=bert_tokenizer)


def test_a_full_disk_says_so_and_the_next_run_goes_on(tmp_path, bert_tokenizer, topics, monkeypatch):
    import pyarrow.parquet as pq

    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    settings = {"task": "sequence-classification", "tokenizer": bert_tokenizer, "rows_per_shard": 40}
    write, calls = pq.ParquetWriter.write_table, []

    def full(self, table, **kwargs):
        calls.append(table)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(self, table, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(CacheError, match=r"train-00001\.parquet: the disk is full"):
            softlabel.cache_logits(model, topics, tmp_path / "c", **settings)
    assert [p.name for p in (tmp_path / "c" / "data").iterdir()] == ["train-00000.parquet"]
    assert verify(softlabel.cache_logits(model, topics, tmp_path / "c", **settings).root).problems == ()


def test_a_teacher_without_a_trained_head_is_refused(tmp_path, bert_tokenizer, topics, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    path = save_teacher(model.bert, bert_tokenizer)
    with pytest.raises(ModelError, match=r"lacks 2 weights .*classifier.*train-teacher"):
        softlabel.cache_logits(str(path), topics, tmp_path / "c", task="sequence-classification")
    assert not (tmp_path / "c").exists()


def test_full_logits_of_long_rows_over_a_large_vocabulary_are_refused(tmp_path, lm_tokenizer, documents, monkeypatch):
    monkeypatch.setattr("pipeline.capture.plan.MAX_ROW_BYTES", 1000)
    model = tiny_model("llama", len(lm_tokenizer))
    with pytest.raises(MisuseError, match="--encoding full: a row of 48 tokens"):
        softlabel.cache_logits(
            model, documents, tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, encoding=Full(), max_length=48
        )


def test_longer_rows_than_the_teacher_takes_are_refused(tmp_path, bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    with pytest.raises(MisuseError, match=r"--max-length 65: .* at most 64 tokens"):
        softlabel.cache_logits(
            model, topics, tmp_path / "c", task="sequence-classification", tokenizer=bert_tokenizer, max_length=65
        )


def test_regression_and_several_labels_at_once_are_no_distribution(tmp_path, bert_tokenizer, topics):
    settings = {"task": "sequence-classification", "tokenizer": bert_tokenizer}
    with pytest.raises(ModelError, match="at least 2 exclusive labels"):
        softlabel.cache_logits(
            tiny_model("bert", len(bert_tokenizer), num_labels=1), topics, tmp_path / "c", **settings
        )
    several = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match="multi_label"):
        softlabel.cache_logits(several, topics, tmp_path / "c", **settings)


def test_batches_hold_similar_lengths_within_the_budget():
    lengths = [3, 50, 7, 48, 3, 9, 120]
    batches = plan_batches(lengths, 100)
    assert sorted(i for members, _ in batches for i in members) == list(range(7))
    assert batches[0] == ([6], 120)
    assert batches[1] == ([1, 3], 50)
    assert all(len(members) * length <= 100 or len(members) == 1 for members, length in batches)
    assert batches == plan_batches(lengths, 100)


def test_no_local_path_and_no_secret_stands_in_what_is_shared(
    tmp_path, bert_tokenizer, topics, save_teacher, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    model.config.label2id = {"business": 0, "sport": 1, "film": 2}
    teacher = save_teacher(model, bert_tokenizer)
    cache = softlabel.cache_logits(str(teacher), topics, tmp_path / "c", task="sequence-classification")
    for path in [*cache.root.rglob("*.json"), cache.root / "README.md"]:
        text = path.read_text()
        assert str(tmp_path) not in text, path
        assert "hf_secret" not in text, path
    assert json.loads((cache.root / "manifest.json").read_text())["contract"]["teacher"]["name"] == "teacher"


def test_entropy_of_each_position_on_request(tmp_path, lm_tokenizer, documents):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    cache = softlabel.cache_logits(
        model,
        documents["test"],
        tmp_path / "c",
        task="causal-lm",
        tokenizer=lm_tokenizer,
        max_length=48,
        store_entropy=True,
    )
    for row in cache.dataset("train"):
        logits = own_logits(model, lm_tokenizer, row)
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(row.entropy, expected, atol=1e-3, rtol=2e-3)
        assert row.teacher_entropy_sum == pytest.approx(float(row.entropy.sum()), rel=1e-3)


def test_one_row_in_the_first_shard_is_enough(tmp_path, bert_tokenizer, topics):
    """A first shard with one measured position has an unknown bias; the receipt is still valid."""
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    cache = softlabel.cache_logits(
        model,
        topics["train"].select(range(3)),
        tmp_path / "cache",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        rows_per_shard=1,
    )
    report = json.loads((cache.root / "reports" / "fidelity.json").read_text())
    assert report["positions"] == 1
    assert report["bias"] is None
