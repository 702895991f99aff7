"""Targets mapped to another vocabulary, against a float64 matrix product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.records import NO_LABEL, Full, Loss, Target, TopK, VocabularyMap
from pipeline.softlabels import encode, sample_tail, target
from pipeline.softlabels.blocks import BLOCK, in_blocks
from pipeline.softlabels.mapped import at_positions, map_classes, map_target
from pipeline.training.fused import Head, fused_loss
from pipeline.training.losses import distillation_loss

TEACHER, STUDENT = 40, 23
RNG = np.random.default_rng(0)
MAPPING = VocabularyMap(RNG.integers(0, STUDENT, TEACHER), STUDENT, np.zeros(STUDENT, dtype=bool))
LOSSY = VocabularyMap(
    np.where(np.arange(TEACHER) % 7 == 3, -1, MAPPING.first_token), STUDENT, np.zeros(STUDENT, dtype=bool)
)
POSITIONS = torch.tensor([2, -1, 0, 5, 5, -1, 1])


def matrix(mapping: VocabularyMap) -> torch.Tensor:
    """Return the map as (V of the student, V of the teacher) float64 zeros and ones."""
    found = torch.zeros(STUDENT, TEACHER, dtype=torch.float64)
    for token, first in enumerate(mapping.first_token.tolist()):
        if first >= 0:
            found[first, token] = 1
    return found


def logits(positions: int = 6, classes: int = TEACHER, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(positions, classes, generator=torch.Generator().manual_seed(seed))


def dense(found) -> torch.Tensor:
    """Return a ragged target as (N, V) float64."""
    owner = torch.repeat_interleave(torch.arange(len(found)), found.offsets.diff())
    return torch.zeros(len(found), found.num_classes, dtype=torch.float64).index_put(
        (owner, found.ids), found.weights.double(), accumulate=True
    )


def exact(z: torch.Tensor, mapping: VocabularyMap) -> torch.Tensor:
    """Return M q for all of the student's positions, (N, V of the student) float64."""
    q = torch.softmax(z.double(), -1) @ matrix(mapping).T
    return torch.where((POSITIONS >= 0)[:, None], q[POSITIONS.clamp_min(0)], 0.0)


@pytest.mark.parametrize("mapping", [MAPPING, LOSSY], ids=["whole", "lossy"])
def test_a_whole_distribution_is_mapped_as_by_the_matrix(mapping):
    z = logits()
    found = map_target(target(encode(z, Full()), 1.0), POSITIONS, mapping)
    assert torch.allclose(dense(found), exact(z, mapping), atol=1e-6)
    assert found.num_classes == STUDENT
    assert all(len(set(part.tolist())) == len(part) for part in found.ids.split(found.offsets.diff().tolist()))


def test_a_sample_stays_unbiased_through_the_map():
    """Computes the exact mean over u.

    The sampled tail is constant in u between the fractional parts of its running sums, so the mean
    is a sum over these intervals.
    """
    c = 12.0
    q = torch.softmax(logits(1, seed=4).double(), -1)
    tail = q.masked_fill(q >= 1 / c, 0.0)
    ends = torch.cat(
        [
            torch.zeros(1, dtype=torch.float64),
            ((tail * c)[0].cumsum(0) % 1.0).sort().values,
            torch.ones(1, dtype=torch.float64),
        ]
    )
    middles, lengths = (ends[1:] + ends[:-1]) / 2, ends.diff()
    blocks = in_blocks(torch.nn.functional.pad(tail, (0, -tail.shape[1] % BLOCK)))
    mean = torch.zeros(STUDENT, dtype=torch.float64)
    top = (q[0] >= 1 / c).nonzero().squeeze(-1)
    for u, length in zip(middles, lengths, strict=True):
        _, drawn = sample_tail(blocks, blocks.double().sum(-1), torch.tensor([c], dtype=torch.float64), u[None])
        ids = torch.cat([top, drawn])
        weights = torch.cat([q[0, top], torch.full((len(drawn),), 1 / c, dtype=torch.float64)])
        goal = Target(TEACHER, torch.tensor([0, len(ids)]), ids, weights, None, torch.zeros(1))
        mean += length * dense(map_target(goal, torch.zeros(1, dtype=torch.int64), MAPPING))[0]
    assert torch.allclose(mean, matrix(MAPPING) @ q[0], atol=1e-12)


@pytest.mark.parametrize("mapping", [MAPPING, LOSSY], ids=["whole", "lossy"])
def test_the_rest_stays_one_bucket(mapping):
    z = logits()
    goal = target(encode(z, TopK(6)), 1.0)
    found = map_target(goal, POSITIONS, mapping)
    kept = at_positions(dense(goal).sum(-1), POSITIONS, 0.0)
    assert found.log_residual is not None
    sums = dense(found).sum(-1) + found.log_residual.double().exp()
    assert torch.allclose(sums, (POSITIONS >= 0).double(), atol=1e-6)
    if mapping is MAPPING:
        assert torch.allclose(dense(found).sum(-1), kept, atol=1e-6)
    p = torch.cat([dense(found), found.log_residual.double().exp()[:, None]], -1)
    assert torch.allclose(found.negative_entropy.double(), torch.xlogy(p, p).sum(-1), atol=1e-6)


@pytest.mark.parametrize("encoding", [Full(), TopK(6)], ids=["full", "top-k"])
def test_value_and_gradient_of_the_fused_loss_are_those_of_the_dense_map(encoding):
    torch.manual_seed(0)
    hidden = torch.randn(len(POSITIONS), 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(STUDENT + 3, 8, dtype=torch.float64, requires_grad=True)
    goal = map_target(target(encode(logits(), encoding), 1.0), POSITIONS, MAPPING)
    aligned = (POSITIONS >= 0).double()
    labels = torch.tensor([1, 2, 3, NO_LABEL, 5, 6, 22])
    loss = Loss(0.3, 0.7)
    given = {"labels": labels, "loss": loss, "temperature": 1.0}
    fused = fused_loss(
        hidden, Head(weight), goal, weights=torch.ones(7), soft_weights=aligned.float(), chunk_positions=3, **given
    )
    fused.total.backward()
    gradients = hidden.grad, weight.grad
    assert gradients[0] is not None
    hidden.grad = weight.grad = None
    z = hidden @ weight[:STUDENT].T
    logp = torch.log_softmax(z, -1)
    known = labels != NO_LABEL
    hard = -logp[known, labels[known]].mean()
    if isinstance(encoding, Full):
        p = exact(logits(), MAPPING)
        soft = (torch.xlogy(p, p) - p * logp).sum(-1)
    else:  # buckets: the kept classes of each position, and the others
        p = dense(goal)
        kept = torch.zeros_like(p, dtype=torch.bool)
        owner = torch.repeat_interleave(torch.arange(7), goal.offsets.diff())
        kept[owner, goal.ids] = True
        rest = goal.log_residual.double().exp()
        outside = torch.logsumexp(logp.masked_fill(kept, -torch.inf), -1)
        soft = (torch.xlogy(p, p) - p * logp).sum(-1) + torch.xlogy(rest, rest) - rest * outside
    reference = 0.3 * hard + 0.7 * (soft * aligned).sum() / aligned.sum()
    reference.backward()
    assert fused.total.item() == pytest.approx(reference.item(), rel=1e-6)
    assert torch.allclose(gradients[0], hidden.grad, atol=1e-6)
    assert torch.allclose(gradients[1], weight.grad, atol=1e-6)
    with_logits = distillation_loss(z.detach(), goal, weights=torch.ones(7), soft_weights=aligned, **given)
    assert float(with_logits.total) == pytest.approx(reference.item(), rel=1e-6)


def test_no_position_of_the_teacher_is_no_mass_and_no_class():
    nothing = map_target(target(encode(logits(), TopK(3)), 1.0), torch.full((4,), -1), MAPPING)
    assert nothing.ids.numel() == 0
    assert nothing.offsets.tolist() == [0] * 5
    empty = map_target(target(encode(logits(0), Full()), 1.0), torch.full((2,), -1), MAPPING)
    assert len(empty) == 2
    assert map_classes(torch.tensor([3, 10]), torch.tensor([1, -1, 0]), LOSSY).tolist() == [
        NO_LABEL,
        NO_LABEL,
        NO_LABEL,
    ]
    assert map_classes(torch.tensor([0]), torch.tensor([0]), LOSSY).tolist() == [int(LOSSY.first_token[0])]
