"""The fused negative log-likelihood against dense PyTorch in float64.

Value and gradients, at awkward sizes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ContractError, TrainingError
from pipeline.training.spans import fused_nll
from pipeline.training.spans.head import Head

CHUNKS = [1, 4, 1000, None]


def make(count: int, classes: int, *, padded: int = 0, bias: bool = True, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(count + classes)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    hidden, weight = draw(count, 7).requires_grad_(), draw(classes + padded, 7).requires_grad_()
    offset = draw(classes + padded).requires_grad_() if bias else None
    labels = torch.randint(0, classes, (count,), generator=generator)
    labels[::3] = -100
    return hidden, weight, offset, labels, draw(count)


def dense(head: Head, hidden: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head.logits(hidden)[:, :classes], labels, reduction="none")


def assert_equal_to_dense(hidden, weight, offset, labels, outer, *, classes: int, scale=1.0, cap=math.inf):
    head = Head(weight, offset, scale, cap)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None and leaf.requires_grad]
    expected = dense(head, hidden, labels, classes)
    grads = torch.autograd.grad((outer * expected).sum(), leaves)
    for chunk in CHUNKS:
        found = fused_nll(hidden, head, labels, num_classes=classes, chunk_positions=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert not found[labels == -100].any()
        for a, b in zip(torch.autograd.grad((outer * found).sum(), leaves), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("classes", [2, 41, 1271])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_the_dense_ones(count, classes, bias):
    assert_equal_to_dense(*make(count, classes, bias=bias), classes=classes)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, math.inf), (1.0, 3.0), (2.0, 5.0)])
def test_scales_and_soft_caps(scale, cap):
    assert_equal_to_dense(*make(9, 41), classes=41, scale=scale, cap=cap)


def test_padded_rows_of_the_matrix_get_no_gradient():
    hidden, weight, offset, labels, outer = make(9, 41, padded=7)
    assert_equal_to_dense(hidden, weight, offset, labels, outer, classes=41)
    fused_nll(hidden, Head(weight, offset), labels, num_classes=41).sum().backward()
    assert not weight.grad[41:].any()
    assert weight.grad[:41].any()


@pytest.mark.parametrize("frozen", ["hidden", "matrix", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, offset, labels, outer = make(9, 41)
    {"hidden": hidden, "matrix": weight, "bias": offset}[frozen].requires_grad_(False)
    assert_equal_to_dense(hidden, weight, offset, labels, outer, classes=41)
    fused_nll(hidden, Head(weight, offset), labels, num_classes=41).sum().backward()
    assert [leaf.grad is None for leaf in (hidden, weight, offset)] == [
        name == frozen for name in ("hidden", "matrix", "bias")
    ]


def test_no_label_at_all_and_no_position_at_all():
    hidden, weight, offset, labels, _ = make(9, 41)
    found = fused_nll(hidden, Head(weight, offset), torch.full_like(labels, -100), num_classes=41)
    assert not found.any()
    assert not any(grad.any() for grad in torch.autograd.grad(found.sum(), [hidden, weight, offset]))
    found = fused_nll(hidden[:0], Head(weight, offset), labels[:0], num_classes=41)
    assert found.shape == (0,)
    assert not any(grad.any() for grad in torch.autograd.grad(found.sum(), [hidden, weight, offset]))


def test_without_gradients_nothing_is_kept():
    hidden, weight, offset, labels, _ = make(9, 41)
    with torch.no_grad():
        found = fused_nll(hidden, Head(weight, offset), labels, num_classes=41)
    assert not found.requires_grad
    torch.testing.assert_close(found, dense(Head(weight, offset), hidden, labels, 41).detach())


def test_logits_are_never_kept_for_the_backward_pass():
    hidden, weight, offset, labels, _ = make(11, 401)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        fused_nll(hidden, Head(weight, offset), labels, num_classes=401, chunk_positions=4)
    assert sum(kept) == hidden.numel() + weight.numel() + offset.numel() + labels.numel()


def test_inside_a_checkpoint_the_gradients_are_the_same():
    hidden, weight, offset, labels, outer = make(9, 41)

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return (outer * fused_nll(inputs.tanh(), Head(weight, offset), labels, num_classes=41)).sum()

    leaves = [hidden, weight, offset]
    plain = torch.autograd.grad(loss(hidden), leaves)
    for a, b in zip(torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), leaves), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_products_and_float32_sums(autocast):
    """The loss and the sums over positions stay in float32.

    Holds under autocast, and for a student in bfloat16.
    """
    exact = make(64, 401)
    expected = dense(Head(exact[1], exact[2]), exact[0], exact[3], 401)
    wanted = torch.autograd.grad((exact[4] * expected).sum(), exact[:3])
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, offset, labels, outer = make(64, 401, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = fused_nll(hidden, Head(weight, offset), labels, num_classes=401, chunk_positions=16)
    assert found.dtype == torch.float32
    assert 0 < float((found.double() - expected).abs().max().detach()) < 0.1  # close, but not all in float32
    grads = torch.autograd.grad((outer * found).sum(), [hidden, weight, offset])
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < 0.02


def test_float16_is_computed_in_float32():
    hidden, weight, offset, labels, _ = make(9, 41, dtype=torch.float16)
    head = Head(weight.float(), offset.float())
    found = fused_nll(hidden, Head(weight, offset), labels, num_classes=41)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense(head, hidden.float(), labels, 41), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    hidden, weight, offset, labels, _ = make(9, 41)
    with pytest.raises(ContractError, match="the student has 41 classes, the cache 42"):
        fused_nll(hidden, Head(weight, offset), labels, num_classes=42)
    with pytest.raises(TrainingError, match="hard label: expected 0 to 19"):
        fused_nll(hidden, Head(weight, offset), labels.masked_fill(labels != -100, 30), num_classes=20)
