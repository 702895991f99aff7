"""Import of server responses: known logits written in each layout are read back unchanged."""

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
from pipeline.sharing.entries import _soft_labels
from tests.conftest import sentence, tiny_model

K = 5


@pytest.fixture
def answers(lm_tokenizer):
    """Token ids and (T, V) log-probabilities of 12 texts; each next token's logit is raised."""
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


def test_a_position_with_classes_outside_has_mass_there():
    """Positions whose rounded masses sum to 1 get a small residual; others are unchanged."""
    ids = np.array([[0, 1], [0, 1], [0, 1]])
    logprobs = np.array([[0.0, -30.0], [0.0, -12.0], [np.log(0.6), np.log(0.3)]])
    soft = _soft_labels(ids, logprobs, 100, 2, np.arange(3)).log_residuals.flatten()
    expected = [np.log(98) - 30, np.log(2.0**-24), np.log(1 - np.exp(logprobs[2]).sum())]
    assert soft.tolist() == pytest.approx(expected)
    assert _soft_labels(ids[:1], logprobs[:1], 2, 2, np.arange(1)).log_residuals.item() == -np.inf


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
    """Tokens of partial UTF-8 characters all have the same replacement text."""
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


# -------------------------------------------------------- several choices, batches, failed requests


def imported(tmp_path, tokenizer, lines, name="c", **settings):
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"tokenizer": tokenizer, "teacher": "t", "top_k": K, **settings}
    return softlabel.import_responses([file], tmp_path / name, **settings)


def rows_of(cache):
    return [row.example.input_ids.tolist() for row in cache.dataset("train")]


@pytest.mark.parametrize("layout", [vllm, completions, chat])
def test_every_choice_is_a_row(tmp_path, answers, lm_tokenizer, layout):
    made = [layout(*answer, lm_tokenizer) for answer in answers[:3]]
    choices = [{**line["choices"][0], "index": i} for i, line in enumerate(made)]
    for choice, line in zip(choices, made, strict=True):
        choice.update({key: value for key, value in line.items() if key != "choices"})
    cache = imported(tmp_path, lm_tokenizer, [{"choices": choices}])
    assert rows_of(cache) == [ids for ids, _ in answers[:3]]
    broken = choices[1].get("prompt_logprobs") or choices[1]["logprobs"].get("content")
    if broken is not None:
        broken.pop()
        broken.append({"token": "no such token", "logprob": -1.0})
        with pytest.raises(SourceError, match="line 1: "):
            imported(tmp_path, lm_tokenizer, [{"choices": choices}], "d")


def test_a_list_of_prompts_goes_to_its_choices(tmp_path, answers, lm_tokenizer):
    made = [vllm(*answer, lm_tokenizer)["choices"][0] for answer in answers[:2]]
    prompts = [made[0].pop("prompt_token_ids"), made[1].pop("prompt_token_ids")]
    line = {"prompt": prompts, "choices": [made[0], made[0], made[1], made[1]]}
    ids = [ids for ids, _ in answers[:2]]
    assert rows_of(imported(tmp_path, lm_tokenizer, [line])) == [ids[0], ids[0], ids[1], ids[1]]
    with pytest.raises(SourceError, match="choices for each of 2 prompts, found 3"):
        imported(tmp_path, lm_tokenizer, [{**line, "choices": line["choices"][:3]}], "d")


def wrapped(name, body, status=200):
    return {"id": "x", "custom_id": name, "error": None, "response": {"status_code": status, "body": body}}


def test_a_batch_file_is_read_and_its_custom_id_kept(tmp_path, answers, lm_tokenizer):
    lines = [wrapped(f"row-{i}", vllm(*answer, lm_tokenizer)) for i, answer in enumerate(answers)]
    cache = imported(tmp_path, lm_tokenizer, lines)
    assert rows_of(cache) == [ids for ids, _ in answers]
    assert [row.example.kept for row in cache.dataset("train")] == [{"custom_id": f"row-{i}"} for i in range(12)]
    assert verify(cache.root).problems == ()


FAILED = [
    {"error": {"message": "rate limit", "code": 429}},
    {"object": "error", "message": "too long"},
    {"custom_id": "a", "response": None, "error": None},
    wrapped("a", {"error": {"message": "bad request"}}, 400),
    wrapped("a", None, 500),
    {"choices": []},
    {"choices": [{"finish_reason": "abort", "text": ""}]},
]


@pytest.mark.parametrize("failed", FAILED)
def test_a_failed_request_stops_or_is_set_aside(tmp_path, answers, lm_tokenizer, failed):
    good = [vllm(*answer, lm_tokenizer) for answer in answers[:4]]
    with pytest.raises(BadRowError, match=r"r\.jsonl line 3: .*the request has failed"):
        imported(tmp_path, lm_tokenizer, [*good[:2], failed, *good[2:]])
    for name, at in (("first", 0), ("middle", 2), ("last", 4)) if failed is FAILED[0] else ():
        cache = imported(tmp_path, lm_tokenizer, [*good[:at], failed, *good[at:]], name, on_bad_row="skip")
        assert rows_of(cache) == [ids for ids, _ in answers[:4]]
        assert cache.manifest.bad_rows == 1
        assert cache.manifest.contract.on_bad_row == "skip"
        listed = (cache.root / "reports" / "bad-rows.tsv").read_text().split("\t")
        assert listed[:2] == ["train", str(at)]
        assert f"r.jsonl line {at + 1}: " in listed[2]
        assert verify(cache.root).problems == ()
    with pytest.raises(SourceError, match=r"every one was set aside; the first: r\.jsonl line 1"):
        imported(tmp_path, lm_tokenizer, [failed], "none", on_bad_row="skip")


def entry_of(change):
    """A layout like `vllm` that changes the entry of token 3, which is predicted at position 2."""

    def line(ids, logprobs, tokenizer):
        made = vllm(ids, logprobs, tokenizer)
        entries = made["choices"][0]["prompt_logprobs"]
        entries[3] = change(entries[3], str(ids[3]))
        return made

    return line


def ranked(entry, own):
    """Add ranks as vLLM does: 1 to K, and a larger rank for the prompt token."""
    return {t: {**value, "rank": 99 if t == own else i} for i, (t, value) in enumerate(entry.items(), 1)}


def logits_of(ids, logprobs, tokenizer):
    made = vllm(ids, logprobs, tokenizer)
    for entry in made["choices"][0]["prompt_logprobs"][1:]:
        for value in entry.values():
            value["logprob"] -= 12.0
    return made


def alone(ids, logprobs, _tokenizer):
    """The layout of vLLM with prompt_logprobs=0: only the prompt token itself, with its rank."""
    entries = [None] + [
        {str(i): {"logprob": float(logprobs[j][i]), "rank": int((logprobs[j] >= logprobs[j][i]).sum())}}
        for j, i in enumerate(ids[1:])
    ]
    entries[3] = {str(ids[3]): {"logprob": -4.0, "rank": 9}}
    return {"prompt_logprobs": entries, "prompt_token_ids": ids}


def alone_unranked(ids, logprobs, tokenizer):
    made = alone(ids, logprobs, tokenizer)
    made["prompt_logprobs"] = [e and {t: v["logprob"] for t, v in e.items()} for e in made["prompt_logprobs"]]
    return made


def stale(ids, logprobs, tokenizer):
    made = vllm(ids, logprobs, tokenizer)
    made["choices"][0]["prompt_token_ids"] = [*ids[:10], *reversed(ids[10:])]
    return made


@pytest.mark.parametrize(
    ("layout", "top_k", "message"),
    [
        (alone, 1, "position 2: the log-probability of the token itself is there alone"),
        (alone_unranked, 1, r"position \d+: the log-probability of the token itself is there alone"),
        (logits_of, K, r"position \d+: expected log-probabilities of the most likely classes"),
        (stale, K, r"position \d+: expected the log-probability of token \d+, which follows there"),
        (entry_of(lambda e, own: {t: v for t, v in e.items() if t != own}), 3, "position 2: expected the log-prob"),
        (
            entry_of(lambda e, own: ranked({**e, "7": {"logprob": -9.0}}, "7")),
            K,
            "position 2: .* found that of token 7",
        ),
        (entry_of(lambda e, own: {}), K, "position 2: expected log-probabilities, found an empty entry"),
        (entry_of(lambda e, own: {t: {"logprob": 12.5} for t in e}), K, "position 2: .* found 12.5; are they logits"),
        (entry_of(lambda e, own: {t: {"logprob": float("nan")} for t in e}), K, "position 2: .* found nan"),
        (entry_of(lambda e, own: {t: {"logprob": -0.1} for t in e}), K, "position 2: expected .* mass of at most 1"),
        (entry_of(lambda e, own: {**e, "9999": {"logprob": -0.5}}), K, "position 2: expected class ids of 0 to 319"),
    ],
)
def test_entries_that_are_no_log_probabilities_of_their_token_are_named(
    tmp_path, answers, lm_tokenizer, layout, top_k, message
):
    good = vllm(*answers[0], lm_tokenizer)
    lines = [good, layout(*answers[1], lm_tokenizer)]
    with pytest.raises(BadRowError, match=rf"r\.jsonl line 2: {message}"):
        imported(tmp_path, lm_tokenizer, lines, top_k=top_k, position_zero="empty")
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_ids_beyond_the_tokenizer_and_long_rows_are_named(tmp_path, answers, lm_tokenizer):
    lines = [vllm(*answer, lm_tokenizer) for answer in answers[:2]]
    with pytest.raises(BadRowError, match=r"r\.jsonl line 1: expected at most 8 tokens, found"):
        imported(tmp_path, lm_tokenizer, lines, max_length=8)
    lines[1]["choices"][0]["prompt_token_ids"] = [*answers[1][0][:-1], 2**40]
    with pytest.raises(BadRowError, match=r"line 2: token \d+: expected ids of 0 to 319"):
        imported(tmp_path, lm_tokenizer, lines, "d")


def test_a_completion_without_echo_stands_behind_its_prompt(tmp_path, answers, lm_tokenizer):
    def cut(ids, logprobs):
        inner = completions(ids, logprobs, lm_tokenizer)["choices"][0]["logprobs"]
        return {"choices": [{"logprobs": {key: value[6:] for key, value in inner.items()}}]}

    lines = [cut(*answer) for answer in answers]
    with pytest.raises(SourceError, match="line 1: the first token has log-probabilities, so that the prompt"):
        imported(tmp_path, lm_tokenizer, lines)
    lines = [{**line, "prompt_token_ids": ids[:6]} for line, (ids, _) in zip(lines, answers, strict=True)]
    cache = imported(tmp_path, lm_tokenizer, lines, "d")
    assert rows_of(cache) == [ids for ids, _ in answers]
    assert np.flatnonzero(cache.dataset("train")[0].example.supervised)[0] == 5


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} then{% endif %}"


def test_chat_answers_without_prompt_ids_take_the_template(tmp_path, answers, lm_tokenizer, caplog):
    import copy

    tokenizer = copy.deepcopy(lm_tokenizer)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": [{"type": "text", "text": "the cat sat"}]}]
    text = [{"role": "user", "content": "the cat sat"}]
    prompt = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
    body = lambda answer: {"choices": chat(*answer, None)["choices"]}  # noqa: E731
    lines = [wrapped(f"q{i}", body(answer)) for i, answer in enumerate(answers)]
    with pytest.raises(SourceError, match=r"line 1: expected prompt_token_ids .* --requests FILE.jsonl"):
        imported(tmp_path, tokenizer, lines)
    asked = [{"custom_id": f"q{i}", "body": {"messages": messages}} for i in reversed(range(12))]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in asked))
    cache = imported(tmp_path, tokenizer, lines, requests=requests, position_zero="empty")
    assert rows_of(cache) == [[*prompt, *ids[6:]] for ids, _ in answers]
    assert sum("tokenised with the chat template" in record.message for record in caplog.records) == 1
    beside = [{"messages": text, **body(answer)} for answer in answers]
    assert rows_of(imported(tmp_path, tokenizer, beside, "d", position_zero="empty")) == rows_of(cache)
    lines[4]["custom_id"] = "other"
    with pytest.raises(SourceError, match="line 5: custom_id 'other': expected a request"):
        imported(tmp_path, tokenizer, lines, "e", requests=requests)
    lines[4] = wrapped("q4", json.loads(json.dumps(body(answers[4])).replace('"token_id:', '"no_id:')))
    with pytest.raises(SourceError, match="line 5: entry 0: token 'no_id:"):
        imported(tmp_path, tokenizer, lines, "f", requests=requests)
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match=r"line 1: .* a tokenizer with a chat template"):
        imported(tmp_path, tokenizer, beside, "g")
    requests.write_text(requests.read_text() + json.dumps(asked[0]) + "\n")
    with pytest.raises(SourceError, match=r"requests\.jsonl line 13: custom_id 'q11' is there twice"):
        imported(tmp_path, tokenizer, lines, "h", requests=requests)


def unlikely(ids, logprobs):
    """The same text, with every fourth token outside the top K."""
    lower = logprobs.clone()
    places = torch.arange(3, len(ids) - 1, 4)
    lower[places, torch.tensor(ids)[places + 1]] -= 12.0
    return ids, torch.log_softmax(lower, -1)


@pytest.mark.parametrize("layout", [vllm, vllm_filled, completions, chat])
def test_the_log_probability_of_each_next_token_is_kept_on_request(tmp_path, answers, lm_tokenizer, layout):
    """A server returns it for every prompt token, within the top K or not."""
    answers = [unlikely(*answer) for answer in answers]
    file = write(tmp_path / "r.jsonl", answers, layout, lm_tokenizer)
    lm_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [
        "import",
        "--input",
        str(file),
        "--output",
        str(tmp_path / "c"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    done = CliRunner().invoke(main, [*words, "--teacher", "t", "--top-k", str(K), "--store-label-logprobs"])
    assert done.exit_code == 0, done.output
    cache = softlabel.Cache.open(tmp_path / "c")
    outside = 0
    for row, (ids, logprobs) in zip(cache.dataset("train"), answers, strict=True):
        positions = np.flatnonzero(row.example.supervised)
        expected = logprobs[positions, torch.tensor(ids)[positions + 1]]
        torch.testing.assert_close(row.label_logprobs.double(), expected, atol=1e-3, rtol=1e-3)
        outside += int((expected < logprobs[positions].topk(K).values[:, -1]).sum())
    assert outside > 0
    assert verify(cache.root).problems == ()
