"""Losses of scores against plain PyTorch in float64, value and gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import Loss, Target
from pipeline.training.scores import check_score_loss, score_divergence, score_loss

LISTS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]


def given(seed: int = 0) -> tuple[Tensor, Target, Tensor]:
    """Return student scores, a target with unit and lists, and labels of 10 rows.

    Some labels are unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    s, t, y, u = torch.randn(4, 10, dtype=torch.float64, generator=generator)
    target = Target(1, torch.arange(11), torch.zeros(10, dtype=torch.int64), 3 * t, None, torch.zeros(10))
    target = Target(
        1, target.offsets, target.ids, target.weights, None, target.negative_entropy,
        unit=u.abs() + 0.5, group=torch.tensor(LISTS) * 7 + 1,
    )  # fmt: skip
    y[[2, 5]] = math.nan
    return s.requires_grad_(), target, y


def lists() -> list[list[int]]:
    return [[i for i, number in enumerate(LISTS) if number == each] for each in range(4)]


def shares() -> Tensor:
    """Return the collator's row weights: 1 over the rows of the list, 0 for a single row."""
    sizes = [LISTS.count(number) for number in LISTS]
    return torch.tensor([1 / size if size > 1 else 0.0 for size in sizes], dtype=torch.float64)


def plain(kind: str, s: Tensor, target: Target, temperature: float) -> Tensor:
    """Compute the soft term directly."""
    t, u = target.weights, target.unit
    if kind == "mse":
        return (((s - t) / u) ** 2).mean()
    terms = []
    for rows in lists():
        if len(rows) < 2:
            continue
        if kind == "margin-mse":
            pairs = [
                (((s[i] / u[i] - s[j] / u[j]) - (t[i] / u[i] - t[j] / u[j])) ** 2)
                for i, j in itertools.permutations(rows, 2)
            ]
            terms.append(torch.stack(pairs).mean())
        else:
            q, log_p = (
                torch.softmax(t[rows] / u[rows] / temperature, 0),
                torch.log_softmax(s[rows] / u[rows] / temperature, 0),
            )
            terms.append(temperature**2 * (q * (q.log() - log_p)).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["mse", "margin-mse", "listwise-kl"])
def test_the_loss_is_the_plain_one(kind, temperature):
    s, target, y = given()
    weights = torch.ones(10, dtype=torch.float64)
    soft = weights if kind == "mse" else shares()
    terms = score_loss(
        s,
        target,
        labels=y,
        loss=Loss(0.3, 0.7, divergence=kind),
        weights=weights,
        soft_weights=soft,
        temperature=temperature,
    )
    known = ~y.isnan()
    hard = (((s - y) / target.unit)[known] ** 2).mean()
    expected = 0.3 * hard + 0.7 * plain(kind, s, target, temperature)
    torch.testing.assert_close(terms.total, expected)
    (ours,) = torch.autograd.grad(terms.total, s)
    (theirs,) = torch.autograd.grad(expected, s)
    torch.testing.assert_close(ours, theirs)
    assert int(terms.num_hard) == 8


def test_a_row_that_does_not_count_leaves_no_trace():
    s, target, y = given()
    weights = torch.ones(10, dtype=torch.float64)
    weights[0] = 0
    terms = score_loss(
        s, target, labels=y, loss=Loss(0.5, 0.5, divergence="mse"), weights=weights, soft_weights=weights
    )
    (gradient,) = torch.autograd.grad(terms.total, s)
    assert gradient[0] == 0
    assert (gradient[1:] != 0).all()


def test_lists_are_compared_whatever_their_numbers_and_a_row_alone_is_nan():
    s, target, _ = given()
    for kind in ("margin-mse", "listwise-kl"):
        found = score_divergence(s, target, kind)
        assert torch.isnan(found).tolist() == [number == 2 for number in LISTS]


def test_scores_that_are_shifted_within_a_list_have_the_same_margins():
    _, target, _ = given()
    shifted = target.weights + 5 * target.unit
    for kind in ("margin-mse", "listwise-kl"):
        found = score_divergence(shifted, target, kind)
        torch.testing.assert_close(
            found[torch.tensor(LISTS) != 2], torch.zeros(9, dtype=torch.float64), atol=1e-9, rtol=0
        )


def test_extreme_scores_stay_finite():
    _, target, _ = given()
    s = torch.where(torch.arange(10) % 2 == 0, 1e4, -1e4).double().requires_grad_()
    found = score_divergence(s, target, "listwise-kl")[torch.tensor(LISTS) != 2].sum()
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize(
    ("loss", "settings", "error", "message"),
    [
        (Loss(), {}, EncodingError, "forward-kl: compares distributions, and the cache holds scores; use mse"),
        (Loss(divergence="mse"), {"is_score": False}, EncodingError, "mse: compares scores, and the cache holds distributions"),
        (Loss(divergence="margin-mse"), {"has_groups": False}, MisuseError, "the cache names no groups"),
        (Loss(divergence="mse", temperature=2.0), {}, MisuseError, "--temperature 2: mse has none"),
        (Loss(divergence="mse"), {"teacher_labels": True}, MisuseError, "--hard-labels teacher: scores have no most likely class"),
        (Loss(divergence="mse", position_weights="certainty"), {}, MisuseError, "--position-weights"),
        (Loss(divergence="mse", tail="ignore"), {}, MisuseError, "--tail-policy"),
    ],
)  # fmt: skip
def test_losses_that_are_refused(loss, settings, error, message):
    with pytest.raises(error, match=message):
        check_score_loss(loss, **{"is_score": True, "has_groups": True, "teacher_labels": False, **settings})
