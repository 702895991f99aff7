"""Edge cases of the requests to vLLM and SGLang and of parsing their answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.capture.teachers.tops import top_labels
from pipeline.records import TopK, TopP
from pipeline.servers import scoring
from pipeline.servers.answers import UnusableAnswerError
from pipeline.servers.scoring import requests_for
from pipeline.softlabels import target
from pipeline.training.divergences import divergence

IDS = [5, 6, 7, 8]
POSITIONS = np.array([0, 2])


def vllm_answer(**changed):
    entries = [
        None,
        {"6": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -1.5, "rank": 2}},
        None,
        {"8": {"logprob": -7.0, "rank": 40}, "3": {"logprob": -0.2, "rank": 1}, "4": {"logprob": -2.0, "rank": 2}},
    ]
    choice = {"prompt_logprobs": entries, "prompt_token_ids": IDS, **changed}
    return {"choices": [choice]}


def vllm():
    (request,) = requests_for("vllm", "m", IDS, POSITIONS, 2)
    return request


def test_vllm_is_sent_ids_and_asked_for_one_token():
    body = vllm().body
    assert body["prompt"] == IDS
    assert (body["model"], body["max_tokens"], body["prompt_logprobs"]) == ("m", 1, 2)


def test_the_token_that_follows_is_one_more_or_among_the_top():
    found = vllm().read(vllm_answer())
    assert found.ids.tolist() == [[6, 9], [3, 4]]
    np.testing.assert_allclose(found.logprobs, [[-0.5, -1.5], [-0.2, -2.0]])
    np.testing.assert_allclose(found.own, [-0.5, -7.0])


def test_a_prompt_ends_with_the_last_token_that_is_predicted():
    (request,) = requests_for("vllm", "m", [*IDS, 1, 2, 3], POSITIONS, 2)
    assert request.body["prompt"] == IDS


def test_ties_are_in_the_order_of_their_ids_and_what_is_impossible_is_left_out():
    answer = vllm_answer()
    answer["choices"][0]["prompt_logprobs"][1] = {"9": {"logprob": -9999.0}, "6": {"logprob": -0.1}}
    answer["choices"][0]["prompt_logprobs"][3] = {"8": -1.0, "2": -1.0}  # plain numbers are read too
    found = vllm().read(answer)
    assert found.ids.tolist() == [[6, 9], [2, 8]]
    assert found.logprobs[0].tolist() == [-0.1, -np.inf]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({}, "expected choices, found $"),
        ({"choices": []}, "expected one choice, found 0"),
        (vllm_answer(prompt_logprobs=None), "expected prompt_logprobs, found"),
        (vllm_answer(prompt_token_ids=[5, 6, 7, 9]), "for the token ids that were sent"),
        (vllm_answer(prompt_logprobs=[None, {}, None]), "expected log-probabilities of 4 tokens, found 3"),
        (
            vllm_answer(prompt_logprobs=[None, {"6": -1.0}, None, {"8": -1.0, "1": -2.0}]),
            "position 0: expected 2 log-probabilities, found 1",
        ),
        (
            vllm_answer(prompt_logprobs=[None, {"9": -1.0, "1": -2.0}, None, {"8": -1.0, "1": -2.0}]),
            "position 0: .* token 6, which follows there",
        ),
        (
            vllm_answer(prompt_logprobs=[None, {"6": -1.0, "1": 3.0}, None, {"8": -1.0, "1": -2.0}]),
            "position 0: .*return logits",
        ),
        (
            vllm_answer(prompt_logprobs=[None, {"6": -0.01, "1": -0.01}, None, {"8": -1.0, "1": -2.0}]),
            "position 0: .*mass of at most 1",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_position(answer, line):
    with pytest.raises(UnusableAnswerError, match=line):
        vllm().read(answer)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_logits_that_are_all_negative_are_found_out(api):
    (request,) = requests_for(api, "m", IDS, POSITIONS, 2, 50)
    if api == "vllm":
        answer = vllm_answer()
        answer["choices"][0]["prompt_logprobs"][1] = {"6": -4.0, "9": -31.0}  # 1/50 is at -3.9
    else:
        answer = sglang_answer(IDS, 0)
        answer["meta_info"]["input_top_logprobs"][1] = [[-4.0, 6, None], [-31.0, 9, None]]
    with pytest.raises(UnusableAnswerError, match=r"position 0: .*return logits") as caught:
        request.read(answer)
    assert caught.value.of_row
    (unknown,) = requests_for(api, "m", IDS, POSITIONS, 2)
    unknown.read(answer)


def test_an_id_beyond_all_numbers_is_an_answer_that_cannot_be_used():
    answer = vllm_answer()
    answer["choices"][0]["prompt_logprobs"][1] = {"6": -1.0, "99999999999999999999": -2.0}
    with pytest.raises(ArithmeticError):  # the client treats it as an unusable answer
        vllm().read(answer)


def sglang_answer(ids, start, k=2):
    tokens = [[None if i == start else -1.0, ids[i], None] for i in range(start, len(ids))]
    tops = [None, *([[-0.5 - c, 10 + c, None] for c in range(k)] for _ in tokens[1:])]
    return {"meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": tokens, "input_top_logprobs": tops}}


def test_sglang_is_asked_from_the_first_position_on_and_split(monkeypatch):
    monkeypatch.setattr(scoring, "_POSITIONS", 3)
    ids = list(range(100, 112))
    positions = np.array([2, 3, 4, 5, 9, 10])
    requests = requests_for("sglang", "m", ids, positions, 2)
    starts = [request.body["logprob_start_len"] for request in requests]
    assert starts == [2, 5, 9]
    assert [len(request.body["input_ids"]) for request in requests] == [6, 7, 12]
    found = [
        request.read(sglang_answer(request.body["input_ids"], start))
        for request, start in zip(requests, starts, strict=True)
    ]
    assert sum(len(each.ids) for each in found) == len(positions)


def test_sglang_answers_for_other_tokens_are_refused():
    (request,) = requests_for("sglang", "m", IDS, np.array([0, 1, 2]), 2)
    with pytest.raises(UnusableAnswerError, match=r"position 0: .* token 6, which follows there"):
        request.read(sglang_answer([5, 9, 7, 8], 0))
    request.read(sglang_answer([5, 0, 7, 8], 0))  # SGLang writes 0 for the last id of a vocabulary


def test_soft_labels_of_the_top():
    ids = np.array([[3, 1, 9], [0, 2, 1]])
    logprobs = np.log(np.array([[0.5, 0.2, 0.1], [0.9, 0.1, 1e-300]]))
    logprobs[1, 2] = -np.inf
    soft = top_labels(ids, logprobs, TopK(3, (1.0,)), 4)  # class 9 is vocabulary padding
    assert soft.top_ids.tolist() == [3, 1, 0, 2]
    assert soft.top_offsets.tolist() == [0, 2, 4]
    np.testing.assert_allclose(soft.log_residuals[0].exp(), [0.3], rtol=1e-6)
    cut = top_labels(ids, logprobs, TopP(0.4, (1.0,)), 4)
    assert cut.top_ids.tolist() == [3, 0]
    np.testing.assert_allclose(cut.log_residuals.exp().flatten(), [0.5, 0.1], rtol=1e-6)


def test_a_position_with_classes_outside_has_mass_there():
    ids = np.array([[0, 1], [0, 1], [0, 1], [0, 9]])
    logprobs = np.array([[0.0, -30.0], [-1e-9, -12.0], np.log([0.6, 0.3]), [0.0, -30.0]])
    soft = top_labels(ids, logprobs, TopK(2, (1.0,)), 4, rows=6).log_residuals.flatten().tolist()
    assert soft[0] == pytest.approx(np.log(4) - 30)  # at most 4 classes as likely as the second
    assert soft[1] == pytest.approx(np.log(2.0**-24))
    assert soft[2] == pytest.approx(np.log(0.1))
    assert soft[3] == pytest.approx(np.log(2.0**-24))  # class 9 is padding, and outside
    assert top_labels(ids, logprobs, TopP(0.5, (1.0,)), 4, rows=6).log_residuals[2].item() == pytest.approx(np.log(0.4))
    assert top_labels(ids[:1], logprobs[:1], TopK(2, (1.0,)), 2, rows=2).log_residuals.item() == -np.inf
    unknown = top_labels(ids, logprobs, TopK(2, (1.0,)), 4).log_residuals.flatten().tolist()
    assert unknown[0] == pytest.approx(np.log(2.0**-24))


def test_a_reverse_kl_of_a_certain_teacher_is_not_negative():
    """The float32 probabilities of an almost certain teacher may sum to 1 or more."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4096, generator=generator)
    logits[:, 0] += 24
    values, ids = torch.log_softmax(logits, -1).topk(8, -1)
    soft = top_labels(ids.numpy(), values.double().numpy(), TopK(8, (1.0,)), 4096, 4096)
    student = torch.randn(64, 4096, generator=generator)
    student[:, 0] += 10
    for kind in ("forward-kl", "reverse-kl", "jensen-shannon"):
        found = divergence(student, target(soft, 1.0), kind=kind, temperature=1.0)
        assert found.min() > -1e-6
