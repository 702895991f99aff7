"""Every divergence against its definition over whole distributions in float64.

Compares value and gradient.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import DIVERGENCE_KINDS, Divergence, Full, Loss, Sampled, TopK, TopP
from pipeline.softlabels import encode, target
from pipeline.training.divergences import check_divergence, divergence, scale_of
from pipeline.training.scores import DIVERGENCES
from tests.training.test_losses import assert_same, pair

#: The divergences over buckets.
KINDS = ["forward-kl", "reverse-kl", "jensen-shannon", "skewed-kl", "total-variation"]
PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def defined(kind: str, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Compute D(q, p) over whole distributions, as defined in the papers."""
    if kind == "forward-kl":
        return kl(q, p)
    if kind == "reverse-kl":
        return kl(p, q)
    if kind == "jensen-shannon":
        return (kl(q, (q + p) / 2) + kl(p, (q + p) / 2)) / 2
    if kind == "skewed-kl":
        return kl(q, 0.1 * q + 0.9 * p)
    assert kind == "total-variation", kind
    return (q - p).abs().sum(-1) / 2


def test_each_divergence_has_properties_a_definition_here_and_a_row_in_the_page():
    assert set(get_args(Divergence)) == DIVERGENCE_KINDS.keys() == {*KINDS, "logit-mse", *DIVERGENCES}
    for kind in DIVERGENCE_KINDS:
        assert re.search(rf"^\| .*`{kind}`", PAGE, re.MULTILINE), kind


@pytest.mark.parametrize("kind", ["mse", "listwise-kl"])
def test_a_divergence_without_a_formula_over_classes_is_no_other_one(kind):
    teacher, student = pair(2, 5)
    with pytest.raises(MisuseError, match=f"--divergence {kind}: has no formula over classes"):
        divergence(student, target(encode(teacher, Full()), 1.0), kind=kind, temperature=1.0)


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"divergence": "hellinger"}, "--divergence"),
        ({"tail": "cut"}, "--tail-policy"),
        ({"schedule": "steep"}, "--weight-schedule"),
        ({"position_weights": "entropy"}, "--position-weights"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_in_python_too(setting, flag):
    (value,) = setting.values()
    with pytest.raises(MisuseError, match=f"{flag}: expected one of .*, found '{value}'"):
        Loss(**setting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 41, 401])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_over_all_classes(kind, classes, temperature):
    teacher, student = pair(5, classes)
    q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    found = divergence(student, target(encode(teacher, Full()), temperature), kind=kind, temperature=temperature)
    assert_same(found, defined(kind, q, p), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_divergence_over_k_plus_one_buckets(kind, temperature):
    teacher, student = pair(5, 41)
    soft = encode(teacher, TopK(6))
    ids = soft.top_ids.reshape(5, 6)
    q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    buckets = [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], -1) for x in (q, p)]
    found = divergence(student, target(soft, temperature), kind=kind, temperature=temperature)
    assert_same(found, defined(kind, *buckets), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_p_has_as_many_buckets_as_a_position_keeps_classes(kind, temperature):
    teacher, student = pair(5, 41)
    soft = encode(teacher, TopP(0.5))
    assert len(set(soft.top_offsets.diff().tolist())) > 1
    expected = []
    for ids, t, s in zip(soft.top_ids.split(soft.top_offsets.diff().tolist()), teacher, student, strict=True):
        whole = [torch.softmax(x / temperature, -1) for x in (t, s)]
        expected.append(defined(kind, *(torch.cat([x[ids], 1 - x[ids].sum(-1, keepdim=True)]) for x in whole)))
    found = divergence(student, target(soft, temperature), kind=kind, temperature=temperature)
    assert_same(found, torch.stack(expected), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", [Full(), TopK(6)])
def test_a_student_that_is_certain_of_another_class_has_a_finite_loss_and_gradient(kind, encoding):
    """The log-probabilities are near -600, so the probabilities are 0 in float32."""
    teacher, _ = pair(3, 41)
    student = torch.zeros(3, 41)
    student[:, 7] = 600.0
    student.requires_grad_()
    found = divergence(student, target(encode(teacher, encoding), 1.0), kind=kind, temperature=1.0)
    assert torch.isfinite(found).all()
    assert (found > 0.1).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), student)[0]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [None, torch.full((2,), -torch.inf)])
def test_a_position_without_teacher_mass_has_no_divergence_and_no_gradient(kind, residual):
    """Students with another tokenizer have such positions, aligned with no teacher token."""
    teacher, student = pair(1, 11)
    one = target(encode(teacher, Full()), 1.0)
    student = torch.cat([student, torch.randn(1, 11, dtype=student.dtype)]).detach().requires_grad_()
    goal = dataclasses.replace(
        one,
        offsets=torch.cat([one.offsets, one.offsets[-1:]]),
        log_residual=residual,
        negative_entropy=torch.cat([one.negative_entropy, torch.zeros(1)]),
    )
    found = divergence(student, goal, kind=kind, temperature=1.0)
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert found[1] == 0
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().sum() > 0


@pytest.mark.parametrize("mixture", [0.1, 0.7])
def test_the_mixture_is_the_teachers_share(mixture):
    teacher, student = pair(4, 17)
    q, p = torch.softmax(teacher, -1), torch.softmax(student, -1)
    m = mixture * q + (1 - mixture) * p
    goal = target(encode(teacher, Full()), 1.0)
    found = divergence(student, goal, kind="jensen-shannon", temperature=1.0, mixture=mixture)
    assert_same(found, mixture * kl(q, m) + (1 - mixture) * kl(p, m), student)
    found = divergence(student, goal, kind="skewed-kl", temperature=1.0, mixture=mixture)
    assert_same(found, kl(q, m), student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_mse_centres_both_and_knows_no_temperature(temperature):
    teacher, student = pair(4, 17)
    expected = (
        ((student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))).square().mean(-1)
    )
    found = divergence(student, target(encode(teacher, Full()), temperature), kind="logit-mse", temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert scale_of("logit-mse", temperature) == 1.0
    gradient = torch.autograd.grad(found.sum(), student)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "logit-mse"])
def test_zero_where_equal(kind):
    teacher, _ = pair(3, 41)
    found = divergence(teacher, target(encode(teacher, Full()), 2.0), kind=kind, temperature=2.0)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "logit-mse"])
def test_classes_of_no_probability_leave_value_and_gradient_finite(kind):
    teacher, student = pair(3, 11)
    teacher = teacher.clone()
    teacher[:, 3] = -torch.inf
    found = divergence(student, target(encode(teacher, Full()), 1.0), kind=kind, temperature=1.0)
    assert torch.isfinite(found).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), student)[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_of_t_keeps_the_gradient_in_proportion(kind):
    """In the limit of a high temperature the scaled gradient does not depend on it."""
    teacher, student = pair(6, 41)

    def gradient(temperature: float) -> float:
        goal = target(encode(teacher, Full()), temperature)
        value = divergence(student, goal, kind=kind, temperature=temperature).sum() * scale_of(kind, temperature)
        return float(torch.autograd.grad(value, student)[0].norm())

    assert math.isclose(gradient(64.0), gradient(128.0), rel_tol=0.1)


def test_what_an_encoding_cannot_serve_is_refused():
    for kind in (*KINDS[1:], "logit-mse"):
        with pytest.raises(EncodingError, match=f"--divergence {kind}.*sampled"):
            check_divergence(Sampled(8.0), Loss(divergence=kind))
    check_divergence(Sampled(8.0), Loss())
    with pytest.raises(EncodingError, match=r"logit-mse.*top-k.*--encoding full"):
        check_divergence(TopK(4), Loss(divergence="logit-mse"))
    with pytest.raises(MisuseError, match=r"renormalize.*use ghost"):
        check_divergence(TopK(4), Loss(divergence="reverse-kl", tail="renormalize"))
    with pytest.raises(MisuseError, match="--mixture"):
        Loss(divergence="reverse-kl", mixture=0.5)
