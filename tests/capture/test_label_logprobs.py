"""`--store-label-logprobs` stores the teacher's log-probability of each following token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.format.contents import check_contents
from pipeline.cache.format.rows import block_of, gather, rows_of
from pipeline.cache.format.schema import cache_schema
from pipeline.cache.transforms import convert, filter_rows, merge
from pipeline.cache.views.inspection import describe
from pipeline.capture import shard as module
from pipeline.capture.run import run
from pipeline.errors import ContractError, IntegrityError, MisuseError
from pipeline.records import Full, Sampled, TopK, TopP
from tests.capture.test_capture import own_logits
from tests.conftest import tiny_model
from tests.support.captures import config, hashes  # noqa: F401 - a fixture
from tests.support.rows import token_row
from tests.support.served import serving

FEW = "0:14"


def expected_of(model, tokenizer, row) -> torch.Tensor:
    """(N,) log_softmax of the model's logits at the token after each position."""
    following = torch.from_numpy(row.example.input_ids[np.flatnonzero(row.example.supervised) + 1].astype(np.int64))
    return torch.log_softmax(own_logits(model, tokenizer, row).double(), -1).gather(-1, following[:, None])[:, 0]


def assert_stored(cache: Cache, model, tokenizer) -> int:
    positions = 0
    for row in cache.dataset("train"):
        expected = expected_of(model, tokenizer, row)
        torch.testing.assert_close(row.label_logprobs.double(), expected, atol=1e-3, rtol=1e-3)
        assert row.teacher_nll_sum == pytest.approx(-float(row.label_logprobs.double().sum()), rel=1e-3)
        positions += len(expected)
    return positions


@pytest.mark.parametrize(
    ("encoding", "packing"),
    [
        (Full(), False),
        (TopK(4), True),
        (TopP(0.8), False),
        (Sampled(6.0), True),
        (Sampled(6.0, temperature=2.0), False),
    ],
    ids=str,
)
def test_it_is_the_log_softmax_at_the_next_token(tmp_path, lm_tokenizer, documents, encoding, packing):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    settings = {"task": "causal-lm", "tokenizer": lm_tokenizer, "max_length": 48, "encoding": encoding}
    settings |= {"packing": packing, "rows_per_shard": 5}
    plain = softlabel.cache_logits(model, documents["test"], tmp_path / "plain", **settings)
    found = softlabel.cache_logits(model, documents["test"], tmp_path / "c", store_label_logprobs=True, **settings)
    assert found.manifest.contract.columns["label_logprobs"] == "list<halffloat>"
    assert "label_logprobs" not in plain.manifest.contract.columns
    assert plain.dataset("train")[0].label_logprobs is None
    assert assert_stored(found, model, lm_tokenizer) == sum(shard.positions for shard in plain.manifest.shards)
    assert verify(found.root).problems == ()
    assert "--store-label-logprobs" in (found.root / "README.md").read_text()
    shown = [list(describe(cache, split=None, rows=1, tokens=4, top=2)) for cache in (plain, found)]
    assert [any("logprob" in line for line in lines) for lines in shown] == [False, True]
    assert f"{float(found.dataset('train')[0].label_logprobs[0]):>9.2f}  '" in "\n".join(shown[1])
    hashed = [[row.content_hash for row in cache.dataset("train")] for cache in (plain, found)]
    assert hashed[0] == hashed[1]


def test_a_stopped_capture_goes_on_with_it_and_without_it_is_another(config, monkeypatch):
    plain, made = module.record, []

    def stops(layout, receipt):
        plain(layout, receipt)
        made.append(receipt)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "record", stops)
    settings = {"store_label_logprobs": True, "rows": FEW}
    with pytest.raises(KeyboardInterrupt):
        run(config(**settings))
    monkeypatch.setattr(module, "record", plain)
    with pytest.raises(ContractError, match=r"columns\.label_logprobs"):
        run(config(rows=FEW))
    assert hashes(run(config(**settings))) == hashes(run(config("whole", **settings)))


def test_rows_are_appended_with_it(config):
    run(config(store_label_logprobs=True, rows="0:8"))
    with pytest.raises(ContractError, match=r"--append: columns\.label_logprobs"):
        run(config(rows="0:14", append=True))
    grown = run(config(store_label_logprobs=True, rows="0:14", append=True))
    whole = run(config("whole", store_label_logprobs=True, rows="0:14"))
    for one, other in zip(grown.dataset("train"), whole.dataset("train"), strict=True):
        torch.testing.assert_close(one.label_logprobs, other.label_logprobs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_servers_give_it_too(config, lm_tokenizer, api):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    with serving(model, api=api) as stand_in:
        settings = {"server": (stand_in.url,), "top_k": 8, "server_patience": 10.0, "rows": FEW}
        found = run(config(store_label_logprobs=True, **settings))
    assert assert_stored(found, model, lm_tokenizer) > 100


def test_what_caches_are_made_of_caches_keep_it(config, lm_tokenizer, tmp_path):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    made = run(config(store_label_logprobs=True, encoding="full", rows=FEW))
    for found in (
        filter_rows(made, tmp_path / "f", where="len(label_logprobs) > 20"),
        convert(made, tmp_path / "t", encoding=TopK(4)),
        convert(made, tmp_path / "s", encoding=Sampled(6.0, temperature=2.0)),
    ):
        assert verify(found.root).problems == ()
        assert assert_stored(found, model, lm_tokenizer) > 20
    other = run(config("other", store_label_logprobs=True, encoding="full", rows="14:20"))
    merged = merge([made, other], tmp_path / "m")
    assert verify(merged.root).problems == ()
    assert_stored(merged, model, lm_tokenizer)
    without = run(config("without", encoding="full", rows="14:20"))
    with pytest.raises(ContractError, match=r"columns\.label_logprobs"):
        merge([made, without], tmp_path / "n")


def row_with(number: int, logprobs: list[float] | None):
    row = token_row(number, TopK(4), 41)
    given = None if logprobs is None else torch.tensor((logprobs * 9)[: len(row.soft)])
    return dataclasses.replace(row, label_logprobs=given)


def block_with(*rows):
    schema = cache_schema(
        TopK(4), 41, labels="tokens", marks_positions=True, label_logprobs=rows[0].label_logprobs is not None
    )
    return block_of(rows, schema)


def test_extreme_values_are_clamped_as_others_are():
    row = row_with(0, [-1e6, -np.inf, -70000.0, 1e-7, -0.5])
    (back,) = rows_of(block_with(row))
    lowest = float(np.finfo(np.float16).min)
    assert back.label_logprobs[:5].tolist() == [lowest, -np.inf, lowest, 0.0, -0.5]


def test_rows_of_a_cache_without_it_leave_it_out_of_a_batch():
    one, other = block_with(row_with(0, [-0.5]), row_with(1, [-0.5])), block_with(row_with(2, None))
    assert "label_logprobs" not in gather([(one, 0, 1), (other, 0, 1)]).lists
    assert "label_logprobs" not in gather([(other, 0, 1), (one, 0, 1)]).lists
    assert "label_logprobs" in gather([(one, 0, 1), (one, 1, 2)]).lists


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: [-0.5] * (n - 1), "label_logprobs: expected one per position"),
        (lambda n: [-0.5] * (n - 1) + [0.5], "label_logprobs: expected log-probabilities, at most 0"),
        (lambda n: [-0.5] * (n - 1) + [np.nan], "label_logprobs: expected log-probabilities, at most 0"),
    ],
)
def test_columns_that_are_none_are_refused(config, values, message):
    made = run(config(store_label_logprobs=True, encoding="top-k", top_k=4, rows="0:6"))
    table = pq.read_table(made.root / "data" / "train-00000.parquet")
    contract = made.manifest.contract
    assert check_contents(table, contract, "t") == made.manifest.shards[0].positions
    lists = [values(len(each)) for each in table.column("label_logprobs").to_pylist()]
    at = table.schema.get_field_index("label_logprobs")
    wrong = table.set_column(at, table.schema.field(at), pa.array(lists, type=pa.list_(pa.float16())))
    with pytest.raises(IntegrityError, match=f"t: {message}"):
        check_contents(wrong, contract, "t")


def test_classifiers_are_refused(tmp_path, bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    with pytest.raises(MisuseError, match=r"--store-label-logprobs is for language models.*leave it out"):
        softlabel.cache_logits(
            model,
            topics,
            tmp_path / "c",
            task="sequence-classification",
            tokenizer=bert_tokenizer,
            store_label_logprobs=True,
        )
    assert not (tmp_path / "c").exists()
