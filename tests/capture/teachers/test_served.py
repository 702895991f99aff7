"""A capture from an inference server equals that of the local model, also after server faults."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments

import pipeline as softlabel
from pipeline.cache.format.manifest import Layout
from pipeline.capture.audit import audit
from pipeline.capture.run import run
from pipeline.errors import BadRowError, ContractError, MisuseError, ModelError, PipelineError, ServerError
from pipeline.models import LoadedModel
from pipeline.outlines.capture import outline
from pipeline.records import TopK, TopP
from pipeline.servers import pool, scoring
from tests.conftest import tiny_model
from tests.support.captures import config, hashes  # noqa: F401 - a fixture
from tests.support.processes import forked  # noqa: F401 - a fixture
from tests.support.served import serving

K = 8
#: The default source rows of each split: three shards of train and two of test.
FEW = "0:14"


@pytest.fixture
def model(lm_tokenizer):
    return tiny_model("llama", len(lm_tokenizer), spread=3.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Reduce the waiting time between retries to milliseconds."""
    monkeypatch.setattr(pool, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(pool, "LAST_WAIT", 0.05)


@pytest.fixture(params=["vllm", "sglang"])
def stand_in(request, model):
    with serving(model, api=request.param) as found:
        yield found


@pytest.fixture
def vllm(model):
    with serving(model) as found:
        yield found


def served(config, stand_in, output="served", **settings):
    return config(output, **{"server": (stand_in.url,), "top_k": K, "server_patience": 10.0, "rows": FEW, **settings})


def local(config, output="local", **settings):
    return config(output, **{"encoding": "top-k", "top_k": K, "temperature": (1.0,), "rows": FEW, **settings})


def assert_same(one, other):
    """Check equal rows and positions, equal classes up to ties, and values up to rounding."""
    for split in one.splits:
        for a, b in zip(one.dataset(split), other.dataset(split), strict=True):
            assert a.example.input_ids.tolist() == b.example.input_ids.tolist()
            assert a.content_hash == b.content_hash
            assert (a.soft.top_offsets == b.soft.top_offsets).all()
            np.testing.assert_allclose(a.soft.top_logprobs, b.soft.top_logprobs, atol=5e-3)
            apart = a.soft.top_ids != b.soft.top_ids
            assert not (apart & ((a.soft.top_logprobs - b.soft.top_logprobs).abs() > 2e-3)).any()
            assert apart.float().mean() < 0.05
            np.testing.assert_allclose(a.soft.log_residuals.exp(), b.soft.log_residuals.exp(), atol=2e-3)
            assert a.teacher_nll_sum == pytest.approx(b.teacher_nll_sum, rel=1e-4, abs=1e-4)


def test_it_is_the_local_capture(config, stand_in):
    found, expected = run(served(config, stand_in)), run(local(config))
    assert_same(found, expected)
    contract = found.manifest.contract
    assert contract.encoding == TopK(K, (1.0,))
    server = contract.teacher.server
    assert (server.api, server.version, server.top_logprobs) == (stand_in.api, "0.32.0", K)
    assert contract.teacher.name == "tiny"
    assert stand_in.url not in (found.root / "manifest.json").read_text()
    assert np.isnan(found.dataset("train")[0].teacher_entropy_sum)
    card = (found.root / "README.md").read_text()
    assert f"behind {stand_in.api} 0.32.0, the top 8 log-probabilities of each position" in card
    assert "--server URL --server-model tiny" in card
    assert "unknown parameters" not in card
    assert "--dtype" not in card
    receipt = json.loads(Layout(found.root).receipt("train-00000").read_text())
    assert receipt["device"] == f"{stand_in.api} 0.32.0"
    assert found.manifest.probe.verdict != "misaligned"
    for body in stand_in.asked:
        assert all(isinstance(token, int) for token in body.get("prompt", body.get("input_ids")))


def test_the_audit_compares_it_with_local_weights(config, vllm, lm_tokenizer):
    found = run(served(config, vllm))
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    assert audit(found, LoadedModel(model, lm_tokenizer, "teacher"), rows=16).verdict == "agrees"
    other = tiny_model("llama", len(lm_tokenizer), spread=3.0, seed=5)
    assert audit(found, LoadedModel(other, lm_tokenizer, "teacher"), rows=16).verdict == "differs"


def test_a_student_learns_from_it(config, vllm, lm_tokenizer, tmp_path):
    found = run(served(config, vllm))
    student = tiny_model("llama", len(lm_tokenizer), seed=3)
    args = TrainingArguments(output_dir=str(tmp_path / "x"), max_steps=2, report_to="none", disable_tqdm=True)
    result = softlabel.train_student(found.root, student, tmp_path / "student", args=args)
    assert np.isfinite(result.soft_loss)


def test_a_local_manifest_has_no_word_of_servers(config):
    assert '"server"' not in (run(local(config)).root / "manifest.json").read_text()


def test_top_p_is_cut_from_what_was_asked(config, vllm):
    found = run(served(config, vllm, top_p=0.6, top_k=12))
    assert found.manifest.contract.encoding == TopP(0.6, (1.0,))
    assert found.manifest.contract.teacher.server.top_logprobs == 12
    for row in found.dataset("test"):
        mass = row.soft.top_logprobs.exp()
        for a, b in zip(row.soft.top_offsets[:-1].tolist(), row.soft.top_offsets[1:].tolist(), strict=True):
            assert b - a == 12 or mass[a:b].sum() >= 0.6 - 1e-2
            assert mass[a : b - 1].sum() < 0.6 + 1e-2


def test_the_default_is_what_servers_give_by_default(config, vllm):
    assert run(served(config, vllm, top_k=None)).manifest.contract.encoding == TopK(20, (1.0,))


def test_isolated_documents_are_asked_one_by_one(tmp_path, documents, lm_tokenizer, save_teacher, model, stand_in):
    path = save_teacher(model, lm_tokenizer)
    settings = {"task": "causal-lm", "packing": True, "isolate_documents": True, "max_length": 64}
    found = softlabel.cache_logits(
        path, documents, tmp_path / "served", server=stand_in.url, encoding=TopK(K, (1.0,)), **settings
    )
    expected = softlabel.cache_logits(path, documents, tmp_path / "local", encoding=TopK(K, (1.0,)), **settings)
    assert_same(found, expected)


def test_long_prompts_are_split_by_position(config, model, monkeypatch):
    monkeypatch.setattr(scoring, "_POSITIONS", 7)
    with serving(model, api="sglang") as sglang:
        assert_same(run(served(config, sglang)), run(local(config)))
        assert max(len(body["input_ids"]) - body["logprob_start_len"] for body in sglang.asked) == 8


@pytest.mark.full
def test_parts_workers_and_several_servers(config, model, vllm, forked):
    expected = run(served(config, vllm, "one"))
    with serving(model) as second:
        both = (vllm.url, second.url)
        assert run(served(config, vllm, "parts", server=both, part="0/2")) is None
        assert hashes(run(served(config, vllm, "parts", server=both, part="1/2"))) == hashes(expected)
        assert second.answered
    found = run(served(config, vllm, "workers", num_workers=2))
    assert found.manifest == expected.manifest


def test_rows_are_appended(config, vllm):
    run(served(config, vllm, rows="0:12"))
    expected = run(served(config, vllm, "whole", rows="0:24"))
    assert hashes(run(served(config, vllm, rows="0:24", append=True))) == hashes(expected)


def test_dry_run_writes_nothing(config, vllm, tmp_path):
    before = set(threading.enumerate())
    lines = dict(outline(served(config, vllm)))
    assert not [each for each in threading.enumerate() if each.name == "server-request" and each not in before]
    assert "tiny behind http://127.0.0.1" in lines["teacher"]
    assert not (tmp_path / "served").exists()


# ------------------------------------------------------------------------------------------- faults


def _wrong_ids(answer):
    text = json.dumps(answer)
    return json.loads(text.replace('"prompt_token_ids": [', '"prompt_token_ids": [1, '))


def _nan(answer):
    entry = answer["choices"][0]["prompt_logprobs"][1]
    next(iter(entry.values()))["logprob"] = float("nan")
    return answer


def _null(answer):
    answer["choices"][0]["prompt_logprobs"][1] = None
    return answer


def _fewer(answer):
    entry = answer["choices"][0]["prompt_logprobs"][1]
    entry.popitem()
    entry.popitem()
    return answer


def _missing(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


FAULTS = {
    "reset": lambda answer: None,
    "429": lambda answer: 429,
    "500": lambda answer: 500,
    "503": lambda answer: 503,
    "garbage": lambda answer: b'{"choices": [{"prompt_lo',
    "wrong ids": _wrong_ids,
    "nan": _nan,
    "null": _null,
    "fewer": _fewer,
    "missing": _missing,
}


def test_with_every_fault_nothing_is_lost_or_repeated(config, vllm):
    expected = run(served(config, vllm, "whole", rows=None))
    vllm.answered.clear()
    vllm.faults, vllm.fault_every, vllm.most_faults = [*FAULTS.values()] * 2, 2, 2
    found = run(served(config, vllm, "faults", rows=None, concurrency=4))
    assert not vllm.faults
    assert found.manifest == expected.manifest
    rows = [tuple(row.example.input_ids.tolist()) for split in found.splits for row in found.dataset(split)]
    assert sum(vllm.answered.values()) == len(rows) + 2  # each row once, and one row twice before the first shard


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("wrong ids", r"row \d+: expected an answer for the token ids that were sent.*asked 4 times"),
        pytest.param(
            "null", r"http://127.*row \d+: position 0: expected log-probabilities, found None", marks=pytest.mark.full
        ),
        pytest.param("fewer", r"row \d+: position 0: expected 8 log-probabilities, found \d", marks=pytest.mark.full),
        pytest.param(
            "missing", r"row \d+: expected log-probabilities of \d+ tokens, found \d+", marks=pytest.mark.full
        ),
        pytest.param("garbage", r"row \d+: expected JSON, found b'", marks=pytest.mark.full),
    ],
)
def test_an_answer_that_stays_wrong_is_one_line(config, vllm, monkeypatch, fault, line):
    monkeypatch.setattr("pipeline.capture.engines.in_process.check_head", lambda job: None)
    vllm.faults = [FAULTS[fault]] * 1000
    with pytest.raises(ServerError, match=line):
        run(served(config, vllm, on_bad_row="skip"))
    vllm.faults = []
    assert_same(run(served(config, vllm, on_bad_row="skip")), run(local(config, on_bad_row="skip")))


def test_numbers_that_are_none_are_a_bad_row(config, vllm, monkeypatch):
    monkeypatch.setattr("pipeline.capture.engines.in_process.check_head", lambda job: None)
    whole = vllm.post
    poison = []

    def post(path, body):
        answer = whole(path, body)
        poison[:] = poison or [body["prompt"]]
        return _nan(answer) if body["prompt"] == poison[0] else answer

    vllm.post = post
    with pytest.raises(
        BadRowError, match=r"split train, row \d+: position 0: expected log-probabilities.*nan.*--on-bad-row skip"
    ):
        run(served(config, vllm, "stop"))
    found = run(served(config, vllm, "skip", on_bad_row="skip"))
    assert found.manifest.bad_rows == 1
    assert "position 0" in (found.root / "reports" / "bad-rows.tsv").read_text()


def test_a_row_that_the_server_always_fails_is_a_bad_row(config, vllm):
    whole, poison = vllm.post, []

    def post(path, body):
        if len(vllm.asked) > 5:
            poison[:] = poison or [body["prompt"]]
        return 500 if poison == [body["prompt"]] else whole(path, body)

    vllm.post = post
    found = run(served(config, vllm, on_bad_row="skip", server_patience=5.0))
    assert found.manifest.bad_rows == 1
    assert (
        "\tthe server refuses it: 500 an injected fault; where" in (found.root / "reports" / "bad-rows.tsv").read_text()
    )
    assert not [path for path in found.root.rglob("*") if path.is_file() and b"127.0.0.1" in path.read_bytes()]


def test_other_settings_after_a_restart_make_no_bad_rows(config, vllm, tmp_path):
    whole = vllm.post

    def post(path, body):
        vllm.most_logprobs = 5 if len(vllm.asked) > 20 else 400
        return whole(path, body)

    vllm.post = post
    with pytest.raises(ServerError, match=r"greater than max allowed: 5"):
        run(served(config, vllm, on_bad_row="skip", concurrency=2))
    assert not (tmp_path / "served" / "manifest.json").exists()


def test_other_weights_do_not_go_on_with_a_capture(config, vllm, lm_tokenizer):
    found = run(served(config, vllm))
    assert b"127.0.0.1" not in (found.root / "reports" / "first-answer.json").read_bytes()
    Layout(found.root).shard("train-00001").unlink()
    with serving(tiny_model("llama", len(lm_tokenizer), spread=3.0, seed=5)) as other:
        for ask in (run, outline):
            with pytest.raises(ServerError, match=r"differ from those of the server that this capture began with by"):
                ask(served(config, other))
        outline(served(config, other, overwrite=True))
    assert hashes(run(served(config, vllm))) == hashes(found)


def test_the_weights_that_vllm_names_stand_in_the_contract(config, vllm):
    vllm.root = "/srv/models/tiny-v1/"
    found = run(served(config, vllm, rows="0:6"))
    assert found.manifest.contract.teacher.server.settings == {"root": "tiny-v1"}
    assert "/srv/models" not in (found.root / "manifest.json").read_text()


def test_a_tokenizer_alone_is_a_warning(config, vllm, tmp_path, lm_tokenizer, caplog):
    lm_tokenizer.save_pretrained(tmp_path / "alone")
    settings = dataclasses.replace(served(config, vllm, rows="0:6"), teacher=str(tmp_path / "alone"))
    assert run(settings).manifest.contract.num_classes == len(lm_tokenizer)
    assert "the number of classes and the longest row" in caplog.text


def test_a_server_that_restarts_costs_nothing(config, vllm):
    expected = run(served(config, vllm, "whole"))
    vllm.latency = 0.01
    before = len(vllm.asked)

    def restart():
        while len(vllm.asked) < before + 20:
            time.sleep(0.005)
        vllm.stop()
        time.sleep(0.3)
        vllm.start()

    thread = threading.Thread(target=restart)
    thread.start()
    found = run(served(config, vllm, "again", concurrency=4))
    thread.join()
    assert found.manifest == expected.manifest


def test_a_dead_server_ends_in_one_line_and_the_same_command_goes_on(config, vllm, tmp_path):
    whole = vllm.post

    def post(path, body):
        if len(list((tmp_path / "served" / "receipts").glob("train-*.json"))) >= 2:
            vllm.server.socket.close()  # refuses new connections, drops the open ones
            raise ConnectionResetError
        return whole(path, body)

    vllm.post = post
    with pytest.raises(ServerError, match=r"http://127.*(--server-patience).*run the same command again") as caught:
        run(served(config, vllm, server_patience=0.5, concurrency=2))
    assert "\n" not in str(caught.value)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "served" / "data").glob("*.parquet")}
    assert done
    vllm.stop()
    vllm.post = whole
    vllm.start()
    found = run(served(config, vllm))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert found.manifest == run(served(config, vllm, "whole")).manifest


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"encoding": "sampled", "top_k": None}, r"--encoding sampled: .*use --encoding top-k.*without --server"),
        ({"encoding": "full", "top_k": None}, r"--encoding full: .*use --encoding top-k"),
        ({"temperature": (1.0, 2.0)}, r"--temperature 1, 2: .*use --temperature 1"),
        ({"store_entropy": True}, r"--store-entropy: .*leave it out"),
        ({"dtype": "bfloat16"}, r"--dtype is for local weights"),
        ({"gpus_per_worker": 1, "num_workers": 2}, r"--gpus-per-worker is for local weights"),
        ({"auto_batch_tokens": True, "batch_tokens": None}, r"--auto-batch-tokens is for local weights"),
        ({"server": ("localhost:8000",)}, r"expected an address as http://host:8000/v1"),
        (
            {"server": ("http://me:secret@host/v1",)},
            r"--server http://\*\*\*@host/v1: expected an address without a user",
        ),
        ({"concurrency": 0}, r"--concurrency: expected at least 1"),
        ({"top_k": 100_000}, r"--top-k 100000: expected at most the \d+ classes"),
    ],
)
def test_what_a_server_cannot_give_is_refused(config, vllm, settings, line):
    with pytest.raises(MisuseError, match=line) as caught:
        run(served(config, vllm, **settings))
    assert "secret" not in str(caught.value)


def test_flags_of_servers_need_one(config):
    with pytest.raises(MisuseError, match="--concurrency goes with --server"):
        config(concurrency=3)


def test_classes_that_are_no_tokens_are_refused(config, vllm):
    settings = dataclasses.replace(served(config, vllm), task="sequence-classification")
    with pytest.raises(MisuseError, match="sequence-classification has classes that are not tokens"):
        run(settings)


def test_a_server_with_a_lower_limit_says_which_flag(config, model):
    with (
        serving(model, most_logprobs=5) as stand_in,
        pytest.raises(ServerError, match=r"max allowed: 5; start vLLM with --max-logprobs 8"),
    ):
        run(served(config, stand_in))


def test_rows_are_as_long_as_the_server_takes(config, model):
    with (
        serving(model, longest=40) as stand_in,
        pytest.raises(MisuseError, match="--max-length 64: tiny takes at most 39 tokens"),
    ):
        run(served(config, stand_in))
    with (
        serving(model, api="sglang", longest=40) as stand_in,
        pytest.raises(MisuseError, match="--max-length 64: tiny takes at most 33 tokens"),
    ):
        run(served(config, stand_in))


def test_the_key_is_sent_and_shown_nowhere(config, model, monkeypatch):
    with serving(model, key="planted-secret") as stand_in:
        with pytest.raises(ServerError, match=r"refuses the key \(401\); set SOFTLABEL_SERVER_KEY"):
            run(served(config, stand_in))
        monkeypatch.setenv("SOFTLABEL_SERVER_KEY", "planted-secret")
        found = run(served(config, stand_in))
    assert all(
        "planted-secret" not in path.read_text(errors="replace")
        for path in Path(found.root).rglob("*")
        if path.is_file()
    )


def test_another_server_may_go_on_and_another_version_may_not(config, vllm, model):
    found = run(served(config, vllm))
    Layout(found.root).shard("train-00001").unlink()
    with serving(model) as other:
        assert hashes(run(served(config, other))) == hashes(found)
        other.version = "0.33.0"
        with pytest.raises(ContractError, match=r"teacher\.server\.version"):
            run(served(config, other))


def test_servers_that_differ_are_refused(config, vllm, model, lm_tokenizer):
    other_model = tiny_model("llama", len(lm_tokenizer), spread=3.0, seed=5)
    with serving(other_model) as other:
        with pytest.raises(ServerError, match=r"differ from those of http.* by .* nats"):
            run(served(config, vllm, server=(vllm.url, other.url)))
        other.version = "0.1"
        with pytest.raises(ServerError, match=r"expected the same model and version as"):
            run(served(config, vllm, server=(vllm.url, other.url)))


def test_a_server_is_compared_with_local_weights(config, vllm, lm_tokenizer, save_teacher, caplog):
    with caplog.at_level(logging.INFO):
        run(served(config, vllm, check_with=config().teacher))
    assert "differ from" in caplog.text
    other = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=3.0, seed=5), lm_tokenizer, "other")
    with pytest.raises(ModelError, match=r"--check-with .*differ from these weights by"):
        run(served(config, vllm, "refused", check_with=str(other)))


def test_a_server_that_answers_differently_is_a_warning(config, vllm, caplog):
    whole, count = vllm.logprobs, iter(range(1 << 20))
    vllm.logprobs = lambda ids: whole(ids) - 0.01 * (next(count) % 2)
    run(served(config, vllm))
    assert "differ as much" in caplog.text


def test_no_server_or_another_one_is_one_line(config, vllm):
    vllm.stop()
    with pytest.raises(ServerError, match=r"cannot be reached.*--server-patience"):
        run(served(config, vllm, server_patience=0.1))
    vllm.api = "llamacpp"
    vllm.start()
    with pytest.raises(ServerError, match=r"expected vLLM or SGLang, found llamacpp"):
        run(served(config, vllm))
    with pytest.raises(ServerError, match=r"--server-model big: expected one of tiny"):
        run(served(config, vllm, server_model="big"))


def test_every_refusal_is_a_pipeline_error():
    assert issubclass(ServerError, PipelineError)
