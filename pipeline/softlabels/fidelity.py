"""Measure what an encoding keeps of the teacher, and how it changes a student's gradient.

All V logits are needed. With q the teacher, t the target and p a student, (V,) each, W the output
matrix (V, H), and g(t) = W'(p - t) the gradient of the loss with respect to the student's hidden
state at one position:

    noise   E |W'(t - q)|^2, over positions and samples: variance that the target adds to g
    bias    |E W'(t - q)|^2: error that no amount of data averages out
    angle   between g(t) and g(q), over all positions of the sample as one vector;
            the norm ratio is |g(t)| / |g(q)|

The student is the teacher with standard normal noise added to its logits. That is about half a nat
from the teacher, like a partly trained student. The ghost bucket has no classes of its own: in the
gradient, its mass is distributed like the student's mass outside the top, so t_i = r p_i / sum p
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.records import Fidelity, SoftLabels, Target
from pipeline.softlabels.ragged import owners

#: Temperatures at which the mass of the kept classes is reported.
TEMPERATURES = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Projection:
    """The output matrix in float32, converted once because it may take gigabytes."""

    matrix: Tensor
    """(V, H); the identity matrix to measure noise of the probabilities themselves."""
    norms: Tensor
    """(V,) float64: the squared norm of each class's row."""

    @classmethod
    def of(cls, matrix: Tensor, device: torch.device | None = None) -> Projection:
        """Convert a (V, H) matrix of any float type, and move it to the device of the logits."""
        wide = matrix.detach().to(device=device or matrix.device, dtype=torch.float32)
        return cls(wide, torch.cat([part.double().square().sum(-1) for part in torch.split(wide, 4096)]))


@dataclass(frozen=True, slots=True)
class Reference:
    """Full distributions of teacher and student at n positions, to compare targets with."""

    logits: Tensor
    """(n, V) float32."""
    logprobs: Tensor
    """(n, V) of the teacher."""
    student: Tensor
    """(n, V) probabilities of the student."""
    matrix: Tensor
    """(V, H) float32."""
    teacher_out: Tensor
    """(n, H): W'q."""
    student_out: Tensor
    """(n, H): W'p."""
    one_draw: Tensor
    """(n,) float64: E |W'(e_y - q)|^2 for a label y drawn from q: the noise of one hard label."""

    @classmethod
    def of(cls, logits: Tensor, projection: Projection, *, temperature: float = 1.0, seed: int = 0) -> Reference:
        """Make a reference from (n, V) teacher logits.

        Args:
            seed: seed of the student's noise, different for every chunk.
        """
        logits, matrix = logits.detach().float(), projection.matrix
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        logprobs = torch.log_softmax(logits / temperature, -1)
        q, p = logprobs.exp(), torch.softmax((logits + noise) / temperature, -1)
        out = q @ matrix
        one_draw = q.double() @ projection.norms - out.double().square().sum(-1)
        return cls(logits, logprobs, p, matrix, out, p @ matrix, one_draw)


class FidelityMeter:
    """Accumulates sums over positions for one encoding; `result` returns the means."""

    def __init__(self) -> None:
        self.positions = 0
        self._sums: dict[str, float] = {}
        self._drift: Tensor | float = 0.0
        self._has_kl = True

    def add(self, reference: Reference, target: Target, soft: SoftLabels | None = None) -> None:
        """Add the target, on the CPU, at the positions of a reference.

        Args:
            soft: the soft labels that the target was made from, to measure the mass of their top.
        """
        device = reference.logits.device
        offsets, owner, ids = target.offsets.to(device), owners(target.offsets).to(device), target.ids.to(device)
        weights = target.weights.to(device)

        def out(values: Tensor) -> Tensor:
            return torch.nn.functional.embedding_bag(
                ids, reference.matrix, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
            )

        made = out(weights)  # (n, H): W't
        self._has_kl &= target.log_residual is not None or len(ids) == reference.logits.numel()
        if target.log_residual is not None:
            rest = target.log_residual.to(device).exp()
            # a sum over the classes outside is exact, unlike 1 - sum
            outside = reference.student.index_put((owner, ids), torch.zeros((), device=device))
            share = rest / outside.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            made = made + share[:, None] * (outside @ reference.matrix)
        if self._has_kl:
            self._add("kl", self._kl(reference, target, owner, ids, weights))
        error = (made - reference.teacher_out).double()
        ours, theirs = (reference.student_out - made).double(), (reference.student_out - reference.teacher_out).double()
        self._add("noise", error.square().sum(-1))
        self._add("one_draw", reference.one_draw)
        self._add("product", (ours * theirs).sum(-1))
        self._add("ours", ours.square().sum(-1))
        self._add("theirs", theirs.square().sum(-1))
        self._drift = self._drift + error.sum(0).cpu()
        self.positions += len(target)
        self._sums["kept"] = self._sums.get("kept", 0.0) + len(ids)
        if soft is not None:
            top_owner, top = owners(soft.top_offsets).to(device), soft.top_ids.to(device)
            for t in TEMPERATURES:
                logprobs = reference.logits[top_owner, top] / t - torch.logsumexp(reference.logits / t, -1)[top_owner]
                self._add(f"mass {t:g}", logprobs.exp())

    def _kl(self, reference: Reference, target: Target, owner: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return (n,) KL(teacher || target), the bucket's mass spread evenly over its classes."""
        count, num_classes = reference.logits.shape
        log_even = torch.full((count,), -torch.inf, device=owner.device)
        if target.log_residual is not None:
            classes = num_classes - torch.bincount(owner, minlength=count)
            log_even = target.log_residual.to(owner.device) - classes.clamp_min(1).log()
        log_target = log_even[:, None].expand(-1, num_classes).clone()
        log_target[owner, ids] = weights.log()
        q = reference.logprobs.exp()
        return (q * (reference.logprobs - log_target)).masked_fill(q == 0, 0.0).double().sum(-1)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())

    def result(self) -> Fidelity | None:
        """Return the means, or None if no position was added."""
        n = self.positions
        if n == 0:
            return None
        sums = self._sums
        # |sum|^2 contains each position's own square, which is noise. Subtracting it makes the
        # estimate of the squared mean unbiased.
        drift = float(torch.as_tensor(self._drift).square().sum())
        bias = max((drift - sums["noise"]) / (n * (n - 1)), 0.0) if n > 1 else None
        cosine = sums["product"] / math.sqrt(max(sums["ours"] * sums["theirs"], 1e-300))
        return Fidelity(
            positions=n,
            kept=sums["kept"] / n,
            kept_mass={f"{t:g}": sums[f"mass {t:g}"] / n for t in TEMPERATURES if f"mass {t:g}" in sums},
            kl=max(sums["kl"] / n, 0.0) if self._has_kl else None,
            noise=sums["noise"] / n,
            noise_share=sums["noise"] / sums["one_draw"] if sums["one_draw"] > 0 else 0.0,
            bias=bias,
            angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
            norm_ratio=math.sqrt(sums["ours"] / sums["theirs"]) if sums["theirs"] > 0 else 1.0,
        )


def spread(count: int, most: int) -> Sequence[int]:
    """Return at most `most` of `count` positions, evenly spaced."""
    step = max(1, -(-count // most))
    return range(0, count, step)
