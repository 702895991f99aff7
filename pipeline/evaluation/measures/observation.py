"""Predictions and divergences of one model at every position of a split.

All other parts of the report are computed from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.format.codec import labelled_positions_of, positions_of, text_bytes_of, unpack_soft
from pipeline.cache.views.units import a_position
from pipeline.evaluation.passes import logits_by_batch
from pipeline.evaluation.run import groups_of, predictions_of_teacher
from pipeline.metrics.scores import correlation_influence
from pipeline.models import LoadedModel
from pipeline.models.scoring import score_of
from pipeline.progress import track
from pipeline.records import NO_LABEL, Contract, Full, Predictions, Sampled, Score, Target, is_known
from pipeline.softlabels import default_temperature, served_temperature, target
from pipeline.tasks import Task, get_task
from pipeline.training.batches.collate import aligned_positions
from pipeline.training.divergences import divergence, forward_kl
from pipeline.training.losses import distance


@dataclass(frozen=True, slots=True)
class Observation:
    """Results of one model on the N positions of a split."""

    predictions: Predictions
    brier: np.ndarray
    """(N,) Brier score: sum over classes of (p - truth)^2; nan without a label or if unknown."""
    kl: np.ndarray
    """(N,) KL(teacher || model) in nats. Sums over a row are valid for every encoding, single
    values only if `position_kl_is_known`."""
    js: np.ndarray | None
    """(N,) Jensen-Shannon divergence in nats; None: not defined for the encoding."""
    surprise: np.ndarray
    """(N,) -log p in nats of the teacher's most likely class under the model; 0 if the model has no
    such class."""
    teacher_position: np.ndarray | None = None
    """(N,) int64: the aligned position of the teacher, for a model with another tokenizer. -1:
    none; KL and JS are then 0 and `agrees` is False. None: the positions are the teacher's."""

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return len(self.predictions.row_text_bytes)

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool: positions with a hard label."""
        known: np.ndarray = is_known(self.predictions.labels)
        return known

    @property
    def is_score(self) -> bool:
        """Whether the task predicts scores, not classes."""
        return self.predictions.labels.dtype.kind == "f"

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: labelled positions whose label is predicted."""
        same: np.ndarray = self.labelled & (self.predictions.predicted == self.predictions.labels)
        return same

    @property
    def agrees(self) -> np.ndarray:
        """(N,) bool: positions with the teacher's prediction."""
        same: np.ndarray = self.predictions.predicted == self.predictions.teacher_predicted
        return same

    def at(self, where: np.ndarray) -> np.ndarray:
        """Select the model's positions aligned with selected positions of the teacher.

        Args:
            where: (T,) bool, over the teacher's positions.

        Returns:
            (N,) bool, over the model's positions.
        """
        if self.teacher_position is None:
            return where
        known = (self.teacher_position >= 0) & (self.predictions.teacher_predicted != NO_LABEL)
        found: np.ndarray = known & where[np.maximum(self.teacher_position, 0)]
        return found

    def by_position(self) -> Mapping[str, np.ndarray]:
        """Metric -> (N,) values whose mean is the metric.

        Metrics of the truth are 0 at positions without a label, and left out for a model with
        another tokenizer.
        """
        if self.teacher_position is not None:
            values = {"agreement": self.agrees.astype(np.float64), "kl": self.kl}
            return values if self.js is None else {**values, "js": self.js}
        known = self.labelled
        if self.is_score:
            return {
                "mse": np.where(known, self.predictions.nll, 0.0),
                "agreement": self._correlation(),
                "kl": self.kl,
            }
        values = {
            "accuracy": self.right.astype(np.float64),
            "loss": np.where(known, self.predictions.nll, 0.0),
            "brier": np.where(known, self.brier, 0.0),
            "agreement": self.agrees.astype(np.float64),
            "kl": self.kl,
        }
        return values if self.js is None else {**values, "js": self.js}

    def _correlation(self) -> np.ndarray:
        """(N,): the part of each score in the correlation with the teacher, mean over outputs.

        See `metrics.correlation_influence`.
        """
        names = self.predictions.label_names or ("",)
        ours, theirs = (
            values.reshape(-1, len(names)).T
            for values in (self.predictions.predicted, self.predictions.teacher_predicted)
        )
        return np.stack([correlation_influence(*pair) for pair in zip(theirs, ours, strict=True)], 1).flatten()

    def row_sums(self, values: np.ndarray) -> np.ndarray:
        """Sum (N,) values to (R,) rows, or (groups,) groups: the units that intervals resample."""
        lists = self.predictions.groups
        if lists is not None:
            return np.bincount(lists[self.predictions.rows], weights=values, minlength=1 + int(lists.max(initial=-1)))
        return np.bincount(self.predictions.rows, weights=values, minlength=self.num_rows)

    def row_weights(self, metric: str) -> np.ndarray:
        """(R,): the number of positions per row that a metric counts.

        Labelled positions, or all aligned ones for metrics without hard labels.
        """
        if metric not in ("agreement", "kl", "js"):
            known = self.labelled
        elif self.teacher_position is None:
            known = np.ones(len(self.agrees), dtype=bool)
        else:
            known = (
                (self.predictions.teacher_predicted != NO_LABEL)
                if metric == "agreement"
                else self.teacher_position >= 0
            )
        return self.row_sums(known.astype(np.float64))


def position_kl_is_known(contract: Contract) -> bool:
    """Whether KL is valid per position; for `sampled` only with the teacher's stored entropy."""
    return not isinstance(contract.encoding, Sampled) or "entropy" in contract.columns


def divergence_note(contract: Contract) -> str:
    """A sentence for the report on how to read KL and JS with an encoding."""
    encoding = contract.encoding
    if isinstance(encoding, Score):
        return "agreement: correlation with the teacher's scores (Pearson, the mean over outputs); distance: squared difference from them, in their standard deviations."
    task = get_task(contract.task)
    at = f"at temperature {served_temperature(encoding):g}, nats {a_position(task)}"
    if isinstance(encoding, Full):
        return f"KL(teacher, model) and Jensen-Shannon divergence {at}, over all classes."
    if isinstance(encoding, Sampled):
        note = f"KL(teacher, model) {at}: an unbiased estimate, since it is linear in the teacher's probabilities. The Jensen-Shannon divergence is not, and is left out."
        return note if position_kl_is_known(contract) else f"{note} KL by slice needs --store-entropy at capture."
    return f"KL(teacher, model) and Jensen-Shannon divergence {at}, over the kept classes and one bucket for the others: lower bounds."


def observe(
    cache: Cache,
    task: Task,
    model: LoadedModel,
    name: str,
    split: str,
    batch_size: int,
    row_temperatures: np.ndarray | None = None,
) -> tuple[Observation, Observation | None]:
    """Observe a student on a split in one pass: as trained, and with temperature scaling.

    Args:
        row_temperatures: (R,) divisor of each row's logits; None: no scaled observation.

    Returns:
        The observation as trained; the scaled one, or None.
    """
    plain, scaled = _Parts(), _Parts()
    labels, owners, teacher = [], [], []
    text_bytes: list[np.ndarray] = []
    aligned: list[np.ndarray] = []
    done = labelled = 0
    for rows, batch, logits in logits_by_batch(cache, task, model, split, batch_size, f"report {name}"):
        owner = done + np.repeat(np.arange(len(rows)), positions_of(rows))
        assert batch.teacher_predicted is not None
        best = batch.teacher_predicted.cpu()
        is_aligned = None
        if cache.vocabulary_map is not None:
            where = aligned_positions(rows)
            is_aligned = where >= 0
            aligned.append(torch.where(is_aligned, where + labelled, -1).numpy())
            labelled += int(labelled_positions_of(rows).sum())
        plain.add(cache, task, logits, batch.labels, batch.target, best, is_aligned)
        if row_temperatures is not None:
            divisor = torch.from_numpy(row_temperatures[owner]).to(logits)[:, None]
            scaled.add(cache, task, logits / divisor, batch.labels, batch.target, best, is_aligned)
        labels.append(batch.labels.cpu().numpy())
        teacher.append(best.numpy())
        owners.append(owner)
        text_bytes.append(text_bytes_of(rows))
        done += len(rows)
    known: dict[str, Any] = {
        "groups": groups_of(cache, split),
        "labels": np.concatenate(labels),
        "teacher": np.concatenate(teacher),
        "owners": np.concatenate(owners),
        "text_bytes": np.concatenate(text_bytes),
    }
    places = np.concatenate(aligned) if aligned else None
    found = plain.observation(**known, aligned=places, names=cache.manifest.contract.label_names)
    return found, None if row_temperatures is None else scaled.observation(
        **known, aligned=places, names=cache.manifest.contract.label_names
    )


def observe_teacher(cache: Cache, task: Task, split: str) -> Observation:
    """Observe the teacher on a split from its cache, without loading it."""
    encoding = cache.manifest.contract.encoding
    dataset = cache.dataset(split)
    counted = track(dataset.blocks(), "teacher's labels", len(dataset), size=len)
    predictions = predictions_of_teacher(
        task, counted, default_temperature(encoding, 1.0), cache.manifest.contract.label_names, groups_of(cache, split)
    )
    positions = len(predictions.labels)
    brier = np.full(positions, np.nan)
    if isinstance(encoding, Full):
        weights = torch.cat([target(unpack_soft(rows), 1.0).weights for rows in dataset.blocks()]).view(positions, -1)
        brier = brier_scores(weights, torch.from_numpy(predictions.labels))
    zeros = np.zeros(positions)
    if isinstance(encoding, Score):
        return Observation(predictions, brier, zeros, None, zeros)
    surprise = -np.log(np.maximum(predictions.confidence, np.finfo(np.float64).tiny))
    return Observation(predictions, brier, zeros, None if isinstance(encoding, Sampled) else zeros, surprise)


def brier_scores(probabilities: Tensor, labels: Tensor) -> np.ndarray:
    """Brier scores: the sum over classes of (p - truth)^2.

    Args:
        probabilities: (N, V).
        labels: (N,).

    Returns:
        (N,) float64 in [0, 2]; nan without a label.

    Brier 1950.
    """
    p = probabilities.double()
    of_truth = p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    scores = p.square().sum(-1) - 2 * of_truth + 1
    return scores.masked_fill(labels == NO_LABEL, torch.nan).cpu().numpy()


class _Parts:
    """Collects the columns of an observation batch by batch."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {}

    @torch.inference_mode()
    def add(
        self,
        cache: Cache,
        task: Task,
        logits: Tensor,
        labels: Tensor,
        goal: Target,
        best: Tensor,
        is_aligned: Tensor | None,
    ) -> None:
        encoding = cache.manifest.contract.encoding
        temperature = served_temperature(encoding)
        scores = score_of(task, logits, labels)
        if task.target == "score":
            self._append(
                predicted=scores.predicted,
                confidence=scores.confidence,
                nll=scores.nll,
                brier=np.full(len(labels), np.nan),
                kl=(apart := distance(logits, goal, temperature=1.0).double().cpu().numpy()),
                surprise=apart,
            )
            return
        logprobs = torch.log_softmax(logits, -1)
        found = {
            "predicted": scores.predicted,
            "confidence": scores.confidence,
            "nll": scores.nll,
            "brier": brier_scores(logprobs.exp(), labels),
            "kl": forward_kl(logits, goal, temperature=temperature).double().cpu().numpy(),
            "surprise": -logprobs.gather(-1, best.to(logits.device).clamp_min(0)[:, None])[:, 0].double().cpu().numpy(),
        }
        if not isinstance(encoding, Sampled):
            js = divergence(logits, goal, kind="jensen-shannon", temperature=temperature)
            found["js"] = js.double().cpu().numpy()
        if is_aligned is not None:
            for name, known in (("kl", is_aligned), ("js", is_aligned), ("surprise", best != NO_LABEL)):
                if name in found:
                    found[name] = np.where(known.numpy(), found[name], 0.0)
        self._append(**found)

    def _append(self, **found: np.ndarray) -> None:
        for name, values in found.items():
            self.columns.setdefault(name, []).append(values)

    def observation(
        self,
        labels: np.ndarray,
        teacher: np.ndarray,
        owners: np.ndarray,
        text_bytes: np.ndarray,
        aligned: np.ndarray | None,
        names: tuple[str, ...] | None,
        groups: np.ndarray | None,
    ) -> Observation:
        found = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        predictions = Predictions(
            labels=labels,
            predicted=found["predicted"],
            confidence=found["confidence"],
            nll=found["nll"],
            teacher_predicted=teacher,
            rows=owners,
            row_kl=np.bincount(owners, weights=found["kl"], minlength=len(text_bytes)),
            row_text_bytes=text_bytes,
            label_names=names,
            groups=groups,
        )
        return Observation(predictions, found["brier"], found["kl"], found.get("js"), found["surprise"], aligned)
