"""Responses of servers, made here from known logits in each layout, come back as those logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.cli import main
from pipeline.errors import BadRowError, SourceError
from tests.conftest import sentence, tiny_model

K = 5


@pytest.fixture
def answers(lm_tokenizer):
    """Token ids and (T, V) log-probabilities of 12 texts, by a model that has learnt which token follows."""
    import random

    model = tiny_model("llama", len(lm_tokenizer), spread=2.0)
    rng = random.Random(0)
    out = []
    for _ in range(12):
        ids = lm_tokenizer(sentence(rng, 30))["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        logits = logits.clone()
        logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])] += 4.0
        out.append((ids, torch.log_softmax(logits.double(), -1)))
    return out


def top(logprobs: torch.Tensor, token: int | None) -> dict[int, float]:
    values, ids = logprobs.topk(K)
    entry = dict(zip(ids.tolist(), values.tolist(), strict=True))
    if token is not None:
        entry.setdefault(token, float(logprobs[token]))
    return entry


def vllm(ids, logprobs, _tokenizer):
    entries = [None] + [
        {str(t): {"logprob": v, "rank": 1, "decoded_token": ""} for t, v in top(logprobs[j - 1], ids[j]).items()}
        for j in range(1, len(ids))
    ]
    return {"choices": [{"text": "", "prompt_logprobs": entries, "prompt_token_ids": ids}]}


def vllm_filled(ids, logprobs, _tokenizer):
    entries = [
        {str(t): {"logprob": v} for t, v in top(logprobs[j], ids[j + 1] if j + 1 < len(ids) else None).items()}
        for j in range(len(ids))
    ]
    return {"prompt_logprobs": entries, "prompt_token_ids": ids}


def completions(ids, logprobs, _tokenizer):
    tokens = [f"token_id:{i}" for i in ids]
    tops = [None] + [{f"token_id:{t}": v for t, v in top(logprobs[j - 1], None).items()} for j in range(1, len(ids))]
    values = [None] + [float(logprobs[j - 1][ids[j]]) for j in range(1, len(ids))]
    return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}]}


def completions_text(ids, logprobs, tokenizer):
    content = completions(ids, logprobs, tokenizer)
    text = lambda token: tokenizer.decode([int(token.removeprefix("token_id:"))])  # noqa: E731
    inner = content["choices"][0]["logprobs"]
    inner["tokens"] = [text(token) for token in inner["tokens"]]
    inner["top_logprobs"] = [None if e is None else {text(t): v for t, v in e.items()} for e in inner["top_logprobs"]]
    return content


def chat(ids, logprobs, _tokenizer):
    content = [
        {
            "token": f"token_id:{ids[j]}",
            "logprob": float(logprobs[j - 1][ids[j]]),
            "top_logprobs": [{"token": f"token_id:{t}", "logprob": v} for t, v in top(logprobs[j - 1], None).items()],
        }
        for j in range(6, len(ids))
    ]
    return {"prompt_token_ids": ids[:6], "choices": [{"logprobs": {"content": content}}]}


def write(path, answers, layout, tokenizer):
    path.write_text("".join(json.dumps(layout(*answer, tokenizer)) + "\n" for answer in answers))
    return path


@pytest.mark.parametrize("layout", [vllm, vllm_filled, completions, chat])
def test_every_layout_comes_back_as_the_logits_it_was_made_from(tmp_path, answers, lm_tokenizer, layout):
    file = write(tmp_path / "r.jsonl", answers, layout, lm_tokenizer)
    cache = softlabel.import_responses([file], tmp_path / "c", tokenizer=lm_tokenizer, teacher="org/teacher", top_k=K)
    assert verify(cache.root).problems == ()
    assert cache.manifest.probe.verdict in ("aligned", "inconclusive")
    assert cache.manifest.contract.teacher.name == "org/teacher"
    for row, (ids, logprobs) in zip(cache.dataset("train"), answers, strict=True):
        assert row.example.input_ids.tolist() == ids
        positions = np.flatnonzero(row.example.supervised)
        expected = list(range(5 if layout is chat else 0, len(ids) - 1))
        assert positions.tolist() == expected
        kept = row.soft.top_logprobs.reshape(-1, K).double()
        torch.testing.assert_close(kept, logprobs[positions].topk(K).values, atol=2e-3, rtol=2e-3)
        rest = 1 - logprobs[positions].topk(K).values.exp().sum(-1)
        torch.testing.assert_close(row.soft.log_residuals[:, 0].double().exp(), rest, atol=2e-3, rtol=2e-3)
        nll = -logprobs[positions, torch.tensor(ids)[positions + 1]].sum()
        assert row.teacher_nll_sum == pytest.approx(float(nll), rel=1e-4)


def test_a_student_trains_from_an_imported_cache(tmp_path, answers, lm_tokenizer):
    file = write(tmp_path / "r.jsonl", answers, vllm, lm_tokenizer)
    cache = softlabel.import_responses([file], tmp_path / "c", tokenizer=lm_tokenizer, teacher="t", top_k=K)
    student = tiny_model("llama", len(lm_tokenizer), seed=1)
    before = softlabel.evaluate(cache, {"s": student}, split="train").students[0].kl
    args = softlabel_arguments(tmp_path / "out")
    softlabel.train_student(cache, student, tmp_path / "out", loss=softlabel.Loss(0.0, 1.0), args=args)
    assert softlabel.evaluate(cache, {"s": student}, split="train").students[0].kl < before


def softlabel_arguments(output):
    from pipeline.models.arguments import training_arguments

    return training_arguments(str(output), {}, max_steps=10, learning_rate=3e-3, save_strategy="no")


def test_token_texts_are_told_apart_or_refused(tmp_path, answers, lm_tokenizer):
    """A byte that is no character by itself has the same text as the others of its kind."""
    plain = [(ids, logprobs.clone()) for ids, logprobs in answers[:3]]
    texts = [lm_tokenizer.decode([i]) for i in range(len(lm_tokenizer))]
    for _, logprobs in plain:
        logprobs[:, [i for i, text in enumerate(texts) if texts.count(text) > 1]] = -50.0
    file = write(tmp_path / "r.jsonl", plain, completions_text, lm_tokenizer)
    settings = {"tokenizer": lm_tokenizer, "teacher": "t", "top_k": K, "position_zero": "empty"}
    cache = softlabel.import_responses([file], tmp_path / "c", **settings)
    assert [row.example.input_ids.tolist() for row in cache.dataset("train")] == [ids for ids, _ in plain]
    file.write_text(file.read_text().replace(json.dumps(texts[plain[0][0][3]]), json.dumps("\ufffd")))
    with pytest.raises(SourceError, match="--return-tokens-as-token-ids"):
        softlabel.import_responses([file], tmp_path / "d", **settings)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{}", SourceError, "r.jsonl line 2: expected prompt_logprobs"),
        ("[1]", SourceError, "line 2: expected an object"),
        ("{nonsense", SourceError, "line 2: not a response"),
        (json.dumps({"prompt_logprobs": [None, {"5": -0.1}]}), SourceError, "line 2: expected prompt_token_ids"),
        (
            json.dumps({"prompt_logprobs": [None, {"5": -0.1}], "prompt_token_ids": [4, 5]}),
            BadRowError,
            "line 2: position 0: expected 5 log-prob",
        ),
    ],
)
def test_lines_that_are_no_response_are_named(tmp_path, answers, lm_tokenizer, line, error, message):
    file = write(tmp_path / "r.jsonl", answers[:1], vllm, lm_tokenizer)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(error, match=message):
        softlabel.import_responses([file], tmp_path / "c", tokenizer=lm_tokenizer, teacher="t", top_k=K)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_shift_that_cannot_be_told_is_asked_for(tmp_path, lm_tokenizer):
    both = {str(token): -2.0 for token in range(20, 25)}
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"prompt_logprobs": [None] + [both] * 8, "prompt_token_ids": [20, 21, 22, 23, 24, 20, 21, 22, 23]})
    )
    settings = {"tokenizer": lm_tokenizer, "teacher": "t", "top_k": K}
    with pytest.raises(SourceError, match="--position-zero"):
        softlabel.import_responses([tmp_path / "r.jsonl"], tmp_path / "c", **settings)
    cache = softlabel.import_responses([tmp_path / "r.jsonl"], tmp_path / "c", position_zero="empty", **settings)
    assert cache.dataset("train")[0].example.num_positions == 8


def test_the_command(tmp_path, answers, lm_tokenizer):
    file = write(tmp_path / "r.jsonl", answers, vllm, lm_tokenizer)
    lm_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [
        "import",
        "--input",
        str(file),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--teacher",
        "org/t",
        "--top-k",
        str(K),
    ]
    done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "c")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "12 rows" in done.stdout
