"""`softlabel audit`: check that a cache holds its teacher's predictions.

Some rows are run through the teacher again and compared with the stored soft labels.

Float results depend on the shape of a batch, so exact equality cannot be required. The teacher runs
twice, in batches and row by row. The difference between the two runs is the floor. The cache may
differ from the teacher by a multiple of the floor plus the rounding of storage. The random tail of
`sampled` is compared as a statistic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.format.manifest import Layout, dump, load_receipt
from pipeline.cache.storage.commit import write_text
from pipeline.cache.views.provenance import tokenizer_name
from pipeline.capture.forward import device_name, teacher_logits
from pipeline.capture.plan import plan_batches
from pipeline.config import AuditConfig
from pipeline.errors import ContractError, MisuseError
from pipeline.models import LoadedModel, load_model, model_info, tokenizer_info
from pipeline.progress import Progress
from pipeline.records import (
    NO_LABEL,
    CachedExample,
    Contract,
    Encoding,
    Full,
    Sampled,
    Score,
)
from pipeline.softlabels.ragged import owners
from pipeline.tasks import Task, get_task

#: The largest allowed difference between cache and teacher, as a multiple of the floor.
_FLOORS = 8.0
#: Least allowance in nats if the shards come from another device: float32 results of two devices
#: differ more than those of two batch shapes.
_OTHER_DEVICE = {"float32": 1e-3, "float16": 2e-2}
_OTHER_DEVICE_HALF = 1e-1
#: Smaller log-probabilities are not compared: their rounding errors would dominate.
_LOWEST = -20.0
_STANDARD_ERRORS = 5.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One comparison: its worst row, or for a statistic its value over all positions."""

    what: str
    found: float
    """Difference between cache and teacher."""
    floor: float
    """Difference between the two runs of the teacher."""
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the limit."""
        return self.found <= self.limit


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit, stored in `reports/`."""

    cache_id: str
    teacher: str
    time: str
    """In UTC."""
    rows: int
    positions: int
    seed: int
    device: str
    made_on: tuple[str, ...]
    """The devices on which the shards were made."""
    figures: tuple[Figure, ...]
    verdict: Literal["agrees", "differs"]


def run(config: AuditConfig) -> Audit:
    """Audit a cache and write the report into its directory.

    Raises:
        ContractError: the weights or the tokenizer are not those of the manifest.
        PipelineError: see the subclasses.
    """
    cache, teacher = open_both(config)
    found = audit(cache, teacher, rows=config.rows, seed=config.seed)
    stamp = found.time.replace("-", "").replace(":", "")
    write_text(cache.root / "reports" / f"audit-{stamp}.json", dump(found))
    return found


def open_both(config: AuditConfig) -> tuple[Cache, LoadedModel]:
    """Open the cache, and load the teacher with the revision and precision of the manifest.

    Raises:
        MisuseError: the teacher was a language model that labels by prompt.
    """
    cache = Cache.open(config.cache)
    made_by = cache.manifest.contract.teacher
    if made_by.judge is not None:
        raise MisuseError(
            f"{config.cache}: its teacher was a language model with a prompt, which audit does not support; "
            "cache some rows again with the same flags (--rows) into another --output and compare the two"
        )
    teacher = load_model(
        get_task(cache.manifest.contract.task),
        config.teacher,
        revision=config.teacher_revision or (made_by.revision if not Path(config.teacher).exists() else None),
        dtype=made_by.dtype if made_by.dtype in ("float32", "bfloat16", "float16") else "auto",
        attn_implementation=config.attn_implementation or made_by.attn_implementation,
        device_map=config.device_map,
        quantization=made_by.quantization if made_by.server is None else None,  # not a server's
        trust_remote_code=config.trust_remote_code,
        base_model=config.base_model,
    )
    return cache, teacher


def audit(cache: Cache, teacher: LoadedModel, *, rows: int = 64, seed: int = 0) -> Audit:
    """Compare some rows of a cache with a teacher. Write nothing.

    Raises:
        ContractError: the weights or the tokenizer are not those of the manifest.
    """
    contract = cache.manifest.contract
    check_teacher(contract, teacher)
    task = get_task(contract.task)
    chosen = choose_rows(cache, rows, seed)
    marks = _Marks(contract.encoding)
    budget = contract.batch_tokens or task.default_batch_tokens
    with torch.inference_mode(), Progress("audit", len(chosen)) as progress:
        for members, width in plan_batches([row.example.num_tokens for row in chosen], budget):
            part = [chosen[i] for i in members]
            together = _logits(task, teacher, part, contract, width)
            start = 0
            for row in part:
                stop = start + row.example.num_positions
                alone = _logits(task, teacher, [row], contract, None)
                marks.add(row, together[start:stop], alone, torch.from_numpy(task.hard_labels([row.example])))
                progress.update(1, tokens=row.example.num_tokens)
                start = stop
    device = device_name(teacher)
    made_on = _devices(cache)
    slack = 0.0 if set(made_on) <= {device} else _OTHER_DEVICE.get(contract.teacher.dtype, _OTHER_DEVICE_HALF)
    figures = marks.figures(slack)
    return Audit(
        cache_id=cache.manifest.cache_id,
        teacher=contract.teacher.name,
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        rows=len(chosen),
        positions=sum(row.example.num_positions for row in chosen),
        seed=seed,
        device=device,
        made_on=made_on,
        figures=figures,
        verdict="agrees" if all(figure.agrees for figure in figures) else "differs",
    )


def describe(found: Audit) -> str:
    """Format the figures as a table."""
    width = max(len(figure.what) for figure in found.figures)
    lines = [
        f"{found.rows} rows, {found.positions} positions, on {found.device} (made on {', '.join(found.made_on)})",
        f"{'':<{width}}  {'cache':>10}{'floor':>10}{'limit':>10}",
    ]
    lines += [
        f"{figure.what:<{width}}  {figure.found:>10.2g}{figure.floor:>10.2g}{figure.limit:>10.2g}"
        + ("" if figure.agrees else "  differs")
        for figure in found.figures
    ]
    return "\n".join(
        [
            *lines,
            f"verdict: the cache {found.verdict} with its teacher"
            if found.verdict == "agrees"
            else "verdict: the cache differs from its teacher",
        ]
    )


# ----------------------------------------------------------------------------------------- the rows


def check_teacher(contract: Contract, teacher: LoadedModel) -> None:
    """Refuse a teacher other than the one in the manifest.

    Raises:
        ContractError: the weights or the tokenizer differ.
    """
    info, expected = model_info(teacher), contract.teacher
    pairs = {
        "weights": (expected.weights_sha256, info.weights_sha256),
        "adapter": (expected.adapter_sha256, info.adapter_sha256),
    }
    if expected.weights_sha256 == "unknown":  # imported from another program
        pairs = {}
    for what, (old, new) in pairs.items():
        if old != new:
            raise ContractError(
                f"{teacher.name}: is not the teacher of this cache: {what}: expected sha256 {str(old)[:12]}..., found {str(new)[:12]}...; name the teacher that made it ({expected.name})"
            )
    tokens = tokenizer_info(teacher.tokenizer).sha256
    if tokens != contract.tokenizer.sha256:
        raise ContractError(
            f"{teacher.name}: its {tokenizer_name(contract)} is not the cache's: expected sha256 {contract.tokenizer.sha256[:12]}..., found {tokens[:12]}..."
        )


def choose_rows(cache: Cache, rows: int, seed: int) -> list[CachedExample]:
    """Return random rows of all splits, in order, so that each row group is read once."""
    sets = [cache.dataset(split) for split in cache.splits]
    ends = np.cumsum([len(part) for part in sets])
    total = int(ends[-1])
    numbers = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False))
    out = []
    for number in numbers.tolist():
        which = int(np.searchsorted(ends, number, side="right"))
        out.append(sets[which][number - int(ends[which]) + len(sets[which])])
    return out


def _logits(
    task: Task, teacher: LoadedModel, rows: Sequence[CachedExample], contract: Contract, width: int | None
) -> Tensor:
    """Return (N, V) float32 logits on the CPU."""
    examples = [dataclasses.replace(row.example, num_classes=contract.num_classes) for row in rows]
    return teacher_logits(task, teacher, teacher.tokenizer, examples, contract.num_classes, width).float().cpu()


def _devices(cache: Cache) -> tuple[str, ...]:
    receipts = (load_receipt(Layout(cache.root), shard.name) for shard in cache.manifest.shards)
    return tuple(sorted({receipt.device if receipt is not None else "unknown" for receipt in receipts}))


# ----------------------------------------------------------------------------------- the comparison


def _between(values: Tensor) -> Tensor:
    """Return the variance f (1 - f) of unbiased stochastic rounding of values with fraction f."""
    fractions = values - values.floor()
    return fractions * (1 - fractions)


@dataclass(slots=True)
class _Marks:
    """Accumulates the differences of each row."""

    encoding: Encoding
    found: dict[str, list[float]] = field(default_factory=dict)
    floor: dict[str, list[float]] = field(default_factory=dict)
    rounding: dict[str, list[float]] = field(default_factory=dict)
    statistics: dict[str, list[np.ndarray]] = field(default_factory=dict)
    variances: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """For `statistics`, per position: the variance due to the rounding of the top's weights and to
    the number of classes drawn."""

    def add(self, row: CachedExample, together: Tensor, alone: Tensor, labels: Tensor) -> None:
        """Compare one row.

        Args:
            together: (N, V) logits of the pass in a batch.
            alone: (N, V) logits of the pass of this row alone.
        """
        if isinstance(self.encoding, Score):
            stored = row.soft.top_logprobs
            self._mark(
                "scores, the worst of a row",
                (stored - together[:, 0]).abs().max(),
                (together - alone).abs().max(),
                2.0**-20 * float(stored.abs().max()) + 1e-6,
            )
            return
        temperature = self.encoding.temperature if isinstance(self.encoding, Sampled) else 1.0
        one, two = (torch.log_softmax(logits / temperature, -1) for logits in (together, alone))
        soft = row.soft
        at = (owners(soft.top_offsets), soft.top_ids)
        if isinstance(self.encoding, Sampled):
            weights, steps = soft.top_logprobs.exp(), self.encoding.steps
            distance = ((weights - one[at].exp()).abs() - 1 / steps).clamp_min(0)
            self._mark(
                "weights of the top, beyond their rounding",
                distance.max(),
                (one[at].exp() - two[at].exp()).abs().max(),
                1e-6,
            )
            self._add_statistics(row, one, labels)
        else:
            seen = soft.top_logprobs > _LOWEST
            stored = soft.top_logprobs[seen]
            first, second = one[at][seen], two[at][seen]
            # float16 keeps 11 bits; float32 logits are exact except for the log-sum-exp of each
            # pass.
            narrow = 2.0**-11 if not isinstance(self.encoding, Full) or soft.num_classes >= 4096 else 2.0**-20
            rounding = narrow * float(stored.abs().mean()) + 1e-6
            self._mark(
                "log-probabilities that are kept, nats",
                (stored - first).abs().mean(),
                (first - second).abs().mean(),
                rounding,
            )
            self._mark(
                "  the worst of a row",
                (stored - first).abs().max(),
                (first - second).abs().max(),
                narrow * -_LOWEST + 1e-6,
            )
            for g, t in enumerate(getattr(self.encoding, "temperatures", ())):
                kept = [torch.log_softmax(logits / t, -1) for logits in (together, alone)]
                outside = [self._outside(p.exp(), at) for p in kept]
                stored_mass = soft.log_residuals[:, g].exp()
                self._mark(
                    f"mass outside, T = {t:g}",
                    (stored_mass - outside[0]).abs().max(),
                    (outside[0] - outside[1]).abs().max(),
                    5e-4,
                )
        known = labels != NO_LABEL
        if bool(known.any()) and math.isfinite(row.teacher_nll_sum):
            sums = [
                -float(torch.log_softmax(logits, -1)[known].gather(1, labels[known, None]).double().sum())
                for logits in (together, alone)
            ]
            count = int(known.sum())
            apart, floor = abs(row.teacher_nll_sum - sums[0]) / count, abs(sums[0] - sums[1]) / count
            self._mark("negative log-likelihood, nats a position", apart, floor, 1e-6 * (1 + abs(sums[0])))

    def figures(self, slack: float) -> tuple[Figure, ...]:
        """Return the worst row of each comparison, and each statistic over all positions."""
        out = []
        for what, found in self.found.items():
            floor = max(self.floor[what])
            limit = _FLOORS * floor + max(self.rounding[what]) + slack
            out.append(Figure(what, max(found), floor, limit))
        for what, parts in self.statistics.items():
            values = np.concatenate(parts)
            error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            # With few positions and a nearly certain teacher, all weights may be rounded to the
            # same side and no class drawn; then the sample's own standard deviation is too small.
            error = max(error, math.sqrt(float(np.concatenate(self.variances[what]).sum())) / len(values))
            score = abs(float(values.mean())) / error if error > 0 else 0.0
            out.append(Figure(f"{what}, standard errors from 0", score, 0.0, _STANDARD_ERRORS + slack))
        return tuple(out)

    def _mark(self, what: str, found: Tensor | float, floor: Tensor | float, rounding: float) -> None:
        for kind, value in ((self.found, found), (self.floor, floor), (self.rounding, rounding)):
            kind.setdefault(what, []).append(float(value))

    def _add_statistics(self, row: CachedExample, logprobs: Tensor, labels: Tensor) -> None:
        """Add sums over classes that are linear in the target.

        The target is unbiased, so the mean difference from the teacher's sums is 0 up to sampling
        noise.
        """
        assert isinstance(self.encoding, Sampled)
        soft, q = row.soft, logprobs.exp()
        top, tail = owners(soft.top_offsets), owners(soft.tail_offsets)
        size, is_top = self.encoding.sample_size, q >= 1 / self.encoding.sample_size
        # (N, V)
        rounding = _between(q.double() * self.encoding.steps) / self.encoding.steps**2 * is_top
        rest = q.double() * ~is_top
        drawn = _between(rest.sum(-1) * size) / size**2  # (N,): how many of the rest are drawn
        values = {"log q under the target": logprobs.clamp_min(-30.0), "q under the target": q}
        values["odd classes under the target"] = (torch.arange(q.shape[1]) % 2).expand_as(q)
        for what, table in values.items():
            total = torch.zeros(len(soft), dtype=torch.float64)
            total.index_add_(0, top, soft.top_logprobs.double().exp() * table[top, soft.top_ids].double())
            total.index_add_(0, tail, table[tail, soft.tail_ids].double() / self.encoding.sample_size)
            expected = (q.double() * table.double()).sum(-1)
            self.statistics.setdefault(what, []).append((total - expected).numpy())
            mean = (rest * table.double()).sum(-1) / rest.sum(-1).clamp_min(1e-300)
            variance = (table.double().square() * rounding).sum(-1) + mean.square() * drawn
            self.variances.setdefault(what, []).append(variance.numpy())

    @staticmethod
    def _outside(q: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        rest = q.clone()
        rest[at] = 0.0
        return rest.sum(-1)
