"""The dense losses against float64 PyTorch: value and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.errors import ContractError, TrainingError
from pipeline.records import Full, Loss, Sampled, Spans, TopK
from pipeline.softlabels import encode, target, teacher_scores
from pipeline.training import distillation_loss
from pipeline.training.losses import forward_kl
from pipeline.training.spans import span_loss


def pair(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(count, classes, dtype=torch.float64, generator=generator) * 3
    student = torch.randn(count, classes, dtype=torch.float64, generator=generator) * 2
    return teacher, student.requires_grad_()


def reference_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute torch's own KL over all V, (N,)."""
    p, q = torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)
    return torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)


def assert_same(found: torch.Tensor, expected: torch.Tensor, student: torch.Tensor) -> None:
    """Compare value and gradient; the tolerance allows for the float32 target."""
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    gradient = torch.autograd.grad(found.sum(), student, retain_graph=True)[0]
    wanted = torch.autograd.grad(expected.sum(), student, retain_graph=True)[0]
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("classes", [2, 41, 401])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_of_full_is_torchs(count, classes, temperature):
    teacher, student = pair(count, classes)
    found = forward_kl(student, target(encode(teacher, Full()), temperature), temperature=temperature)
    assert_same(found, reference_kl(teacher, student, temperature), student)


@pytest.mark.parametrize("classes", [41, 401])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_ghost_is_the_kl_over_k_plus_one_buckets(classes, temperature):
    teacher, student = pair(5, classes)
    soft = encode(teacher, TopK(6))
    ids = soft.top_ids.reshape(5, 6)
    q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    q_top, p_top = q.gather(1, ids), p.gather(1, ids)
    q_all = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], -1)
    p_all = torch.cat([p_top, 1 - p_top.sum(-1, keepdim=True)], -1)
    expected = (q_all * (q_all.log() - p_all.log())).sum(-1)
    assert_same(forward_kl(student, target(soft, temperature), temperature=temperature), expected, student)


def test_top_k_of_all_classes_is_full():
    teacher, student = pair(5, 41)
    for k in (41, 100):
        found = forward_kl(student, target(encode(teacher, TopK(k)), 2.0), temperature=2.0)
        assert_same(found, reference_kl(teacher, student, 2.0), student)


def test_sampled_gives_the_full_gradient_and_kl_on_average():
    """Means over 3,000 draws are within 4 standard errors in every coordinate.

    The entropy of the full distribution turns the loss into the true KL.
    """
    teacher, student = pair(1, 41)
    draws = 3000
    uniforms = torch.linspace(0, 1, draws + 1, dtype=torch.float64)[
        :-1
    ]  # systematic: each interval of u in proportion to its length
    soft = encode(teacher.expand(draws, -1), Sampled(5.0), uniforms=uniforms)
    entropy = teacher_scores(teacher, torch.tensor([-100])).entropy.expand(draws)
    wide = student.expand(draws, -1)
    mean = forward_kl(wide, target(soft, 1.0, entropy=entropy), temperature=1.0).mean()
    expected = reference_kl(teacher, student, 1.0)[0]
    torch.testing.assert_close(mean, expected, atol=2e-3, rtol=1e-3)
    gradient = torch.autograd.grad(mean, student, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], atol=1e-3, rtol=1e-2)


def test_zero_when_equal_and_finite_when_the_student_is_sure():
    teacher, _ = pair(6, 41)
    for encoding in (Full(), TopK(6)):
        goal = target(encode(teacher, encoding), 1.0)
        assert forward_kl(teacher, goal, temperature=1.0).abs().max() < 1e-6
        sure = (
            teacher.float() * 60
        ).requires_grad_()  # in float32 the mass outside the top rounds to 0, its log does not
        loss = forward_kl(sure, goal, temperature=1.0).sum()
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, sure)[0]).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_loss_with_its_weights(temperature):
    teacher, student = pair(8, 41)
    labels = torch.tensor([0, 5, -100, 40, -100, 3, 3, 9])
    loss = Loss(hard_weight=0.3, soft_weight=0.7, temperature=temperature)
    terms = distillation_loss(student, target(encode(teacher, Full()), temperature), labels=labels, loss=loss)
    hard = torch.nn.functional.cross_entropy(student, labels, ignore_index=-100)
    soft = temperature**2 * reference_kl(teacher, student, temperature).mean()
    assert_same(terms.total, 0.3 * hard + 0.7 * soft, student)
    assert int(terms.num_hard) == 6
    torch.testing.assert_close(terms.hard_sum / 6, hard.detach())
    torch.testing.assert_close(terms.soft_sum / 8, soft.detach(), atol=1e-6, rtol=1e-5)


def test_parts_of_a_batch_add_up_when_the_counts_are_given():
    teacher, student = pair(8, 41)
    labels = torch.tensor([0, -100, -100, 40, -100, 3, 3, 9])
    loss = Loss(temperature=2.0)
    whole = distillation_loss(student, target(encode(teacher, Full()), 2.0), labels=labels, loss=loss).total
    parts = [
        distillation_loss(
            student[part],
            target(encode(teacher[part], Full()), 2.0),
            labels=labels[part],
            loss=loss,
            num_hard=5,
            num_soft=8,
        ).total
        for part in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_positions_of_weight_zero_change_nothing():
    teacher, student = pair(8, 41)
    labels, weights = torch.arange(8), torch.tensor([1.0] * 6 + [0.0] * 2)
    goal = target(encode(teacher, TopK(4)), 1.0)
    some = distillation_loss(student, goal, labels=labels, loss=Loss(), weights=weights)
    fewer = distillation_loss(student[:6], target(encode(teacher[:6], TopK(4)), 1.0), labels=labels[:6], loss=Loss())
    torch.testing.assert_close(some.total, fewer.total)
    assert (torch.autograd.grad(some.total, student)[0][6:] == 0).all()


def test_everything_masked_is_zero_with_a_gradient_of_zero():
    teacher, student = pair(3, 41)
    goal = target(encode(teacher, Full()), 1.0)
    terms = distillation_loss(student, goal, labels=torch.full((3,), -100), loss=Loss(1.0, 0.0))
    assert terms.total.item() == 0
    assert (torch.autograd.grad(terms.total, student)[0] == 0).all()


def test_columns_of_a_padded_vocabulary_are_cut_off():
    teacher, student = pair(4, 41)
    padded = torch.cat([student, torch.full((4, 7), 50.0, dtype=torch.float64)], -1)
    goal = target(encode(teacher, Full()), 1.0)
    labels = torch.arange(4)
    torch.testing.assert_close(
        distillation_loss(padded, goal, labels=labels, loss=Loss()).total,
        distillation_loss(student, goal, labels=labels, loss=Loss()).total,
    )
    with pytest.raises(ContractError, match="40 classes, the cache 41"):
        distillation_loss(student[:, :40], goal, loss=Loss())


@pytest.mark.parametrize("label", [41, -1])
def test_a_label_that_is_no_class_is_refused(label):
    teacher, student = pair(2, 41)
    with pytest.raises(TrainingError, match=f"0 to 40.*found {label}"):
        distillation_loss(student, target(encode(teacher, Full()), 1.0), labels=torch.tensor([1, label]), loss=Loss())


def test_aligned_spans_are_a_third_mean():
    teacher, student = torch.randn(6, 41), torch.randn(6, 41, requires_grad=True)
    goal = target(encode(teacher, TopK(4)), 1.0)
    labels = torch.tensor([3, 5, 40, 0, 7, 9])
    spans = Spans(torch.tensor([0, 0, -1, 1, 1, 1]), torch.tensor([-2.0, -5.0]), torch.tensor([1.0, 0.5]))
    plain = distillation_loss(student, goal, labels=labels, loss=Loss())
    loss = Loss(span_weight=0.3, span_temperature=2.0)
    found = distillation_loss(student, goal, labels=labels, loss=loss, spans=spans)
    nll = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    each = span_loss(
        torch.stack([nll[:2].sum(), nll[3:].sum()]), replace(spans, owner=torch.arange(2)), temperature=2.0
    )
    expected = each[0] + 0.5 * each[1]
    torch.testing.assert_close(found.span_sum, expected.detach())
    assert float(found.num_spans) == 1.5
    torch.testing.assert_close(found.total, plain.total + 0.3 * expected / 1.5)
    assert (float(found.hard_sum), float(found.soft_sum)) == (float(plain.hard_sum), float(plain.soft_sum))
    larger = distillation_loss(student, goal, labels=labels, loss=loss, spans=spans, num_spans=6)
    torch.testing.assert_close(larger.total, plain.total + 0.3 * expected / 6)
    (grad,) = torch.autograd.grad(found.total - plain.total, student)
    assert not grad[2].any()  # in no span
