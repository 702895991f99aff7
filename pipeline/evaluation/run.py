"""Evaluate students and their teacher on one split of a cache.

The teacher's metrics come from the cache; the teacher is not loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.cache import Cache
from pipeline.cache.format.codec import positions_of, text_bytes_of, tokens_of, unpack_soft
from pipeline.cache.format.manifest import dump
from pipeline.cache.storage.commit import write_text
from pipeline.cache.views.units import resampled_name
from pipeline.config import EvaluateConfig, parse_bytes
from pipeline.config.options import name_and_path
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.errors import MisuseError
from pipeline.evaluation.basis import OF_TOKENS, Basis, on_bytes_of
from pipeline.evaluation.continuations import check_prompts, continue_prompts
from pipeline.evaluation.passes import logits_by_batch
from pipeline.evaluation.targets import with_chrf
from pipeline.evaluation.text_bytes import warn_of_text_bytes
from pipeline.metrics import agreement_of, bootstrap_ratio
from pipeline.models import LoadedModel
from pipeline.models.adapters import adapter_config
from pipeline.models.doubts import warn_of_doubts
from pipeline.models.scoring import score_of
from pipeline.progress import track
from pipeline.records import EvaluationReport, ModelEvaluation, Outline, Predictions, RowBlock, is_known
from pipeline.softlabels import default_temperature, most_likely, served_temperature
from pipeline.tasks import Task, get_task
from pipeline.training.losses import distance
from pipeline.training.student import check_fit, load_student


def run(config: EvaluateConfig) -> EvaluationReport:
    """Run `softlabel evaluate`; writes `evaluation.json` if an output directory is given."""
    students, cache, bases = _opened(config)
    report = evaluate(
        cache, students, split=config.split, batch_size=config.batch_size, base_models=bases, cache_dir=config.cache_dir
    )
    models = students if config.teacher is None else {"teacher": config.teacher, **students}
    report = with_chrf(report, cache, students, config.teacher, config.write_rows, base_models=bases)
    if config.prompt:
        report = dataclasses.replace(
            report, continuations=continue_prompts(cache, models, config.prompt, base_models=bases)
        )
    if config.output is not None:
        write_text(Path(config.output, "evaluation.json"), dump(report))
    return report


def _opened(config: EvaluateConfig) -> tuple[dict[str, str], Cache, dict[str, str]]:
    """Students by name, the cache, and the base models of adapters."""
    students = dict(name_and_path(student) for student in config.student)
    if len(students) < len(config.student):
        raise MisuseError("--student: two students have the same name; give NAME=DIR")
    if config.teacher is not None and "teacher" in students:
        raise MisuseError("--student: 'teacher' is the name of --teacher; give the student another one, as NAME=DIR")
    cache = Cache.open(
        config.cache, cache_dir=config.cache_dir, cache_bytes=parse_bytes("--cache-bytes", config.cache_bytes)
    )
    writes = get_task(cache.manifest.contract.task).label_source == "target" and config.write_rows
    if config.teacher is not None and not config.prompt and not writes:
        raise MisuseError(
            "--teacher goes with --prompt: it is only loaded to continue texts; its metrics come from the cache"
        )
    return students, cache, _bases(students, config.base_model)


def outline(config: EvaluateConfig) -> Outline:
    """Describe what `run` would do; loads and checks each student, but writes nothing.

    Raises:
        PipelineError: `run` would raise it.
    """
    students, cache, bases = _opened(config)
    contract = cache.manifest.contract
    task, rows = get_task(contract.task), len(cache.dataset(config.split))
    if config.prompt:
        check_prompts(task)
    lines = [("reads", f"{cache.where}: {config.split}, {rows:,} rows, {contract.num_classes:,} classes")]
    for name, path in students.items():
        base = bases.get(name)
        view = cache_for(cache, path, config.split, base_model=base, cache_dir=config.cache_dir, teaches=False)
        known = view.manifest.contract
        loaded = load_student(known, path, new_head=False, base_model=base)
        count = sum(p.numel() for p in loaded.model.parameters())
        lines.append((name, f"{path}: {count:,} parameters, on {loaded.model.device.type}"))
    lines.append(("batch", f"{config.batch_size or task.default_eval_rows} rows a forward pass"))
    output = "nothing" if config.output is None else str(Path(config.output, "evaluation.json"))
    return (*lines, ("writes", output))


def evaluate(
    cache: Cache | str | Path,
    students: Mapping[str, str | Path | PreTrainedModel],
    *,
    split: str = "test",
    batch_size: int | None = None,
    seed: int = 0,
    base_models: Mapping[str, str] | None = None,
    cache_dir: str | Path | None = None,
) -> EvaluationReport:
    """Compare students with their teacher.

    Args:
        students: name -> directory, hub name, or live model (with the cache's tokenizer).
        batch_size: rows in a forward pass; None: the task's default.
        seed: seed of the bootstrap.
        base_models: name -> base model of an adapter; overrides the one in its configuration.
        cache_dir: where aligned rows of students with another tokenizer are stored; None:
            `softlabel` in the user's cache directory.

    Returns:
        Metrics of the teacher and of each student. For each student also agreement with the
        teacher, KL(teacher || student) in nats per position, the teacher's size divided by the
        student's, and retention with its 95% interval.

        With `top-k` and `top-p`, KL is over the kept classes and one bucket for the rest, a lower
        bound; with `sampled` it is an unbiased estimate. A split without hard labels has no metrics
        and no retention. If a student has another tokenizer, retention is of bits per byte, metrics
        per token are left out, and agreement and KL are over positions aligned with the teacher's.

    Raises:
        PipelineError: a student does not fit the cache, or the split does not exist.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    contract = opened.manifest.contract
    task = get_task(contract.task)
    rows = opened.dataset(split)
    counted = track(rows.blocks(), "teacher's labels", len(rows), size=len)
    teacher_predictions = predictions_of_teacher(
        task, counted, default_temperature(contract.encoding, 1.0), contract.label_names, groups_of(opened, split)
    )
    labelled = int(is_known(teacher_predictions.labels).sum())
    warn_of_doubts(teacher_predictions, "teacher", split)
    warn_of_text_bytes(opened, split)
    teacher = ModelEvaluation(
        name="teacher",
        num_parameters=contract.teacher.num_parameters,
        metrics=task.metrics(teacher_predictions, contract.num_classes) if labelled else {},
    )
    views = {
        name: cache_for(
            opened,
            str(student),
            split,
            base_model=(base_models or {}).get(name),
            cache_dir=cache_dir,
            teaches=False,
        )
        for name, student in students.items()
        if isinstance(student, str | Path)
    }
    basis = Basis(task, in_bytes=any(v is not opened for v in views.values()))
    comparison = _Comparison(basis, teacher, teacher_predictions, seed)
    lines = []
    for name, student in students.items():
        view = views.get(name, opened)
        known = view.manifest.contract
        if isinstance(student, str | Path):
            loaded = load_student(known, str(student), new_head=False, base_model=(base_models or {}).get(name))
        else:
            loaded = LoadedModel(student.eval(), opened.tokenizer, name)
            check_fit(task, contract, loaded)
        predictions, kl = _predict(view, task, loaded, name, split, batch_size or task.default_eval_rows)
        warn_of_doubts(predictions, name, split)
        lines.append(comparison.line(name, loaded, predictions, kl, view))
    return EvaluationReport(
        cache_id=opened.manifest.cache_id,
        task=task.name,
        split=split,
        rows=len(rows),
        positions=len(teacher_predictions.labels),
        main_metric=basis.main_metric,
        teacher=teacher,
        students=tuple(lines),
        temperature=served_temperature(contract.encoding),
        labelled=labelled,
    )


def _bases(students: Mapping[str, str], base_model: str | None) -> dict[str, str]:
    """The value of `--base-model` for each student that is an adapter.

    Raises:
        MisuseError: `--base-model` is given and no student is an adapter.
    """
    if base_model is None:
        return {}
    adapters = [name for name, path in students.items() if adapter_config(path) is not None]
    if not adapters:
        raise MisuseError(f"--base-model {base_model}: is for PEFT adapters, and no --student is one")
    return dict.fromkeys(adapters, base_model)


@dataclasses.dataclass(frozen=True, slots=True)
class _Comparison:
    """Compares students with the teacher by one metric."""

    basis: Basis
    teacher: ModelEvaluation
    predictions: Predictions
    """The teacher's predictions."""
    seed: int

    def line(self, name: str, loaded: LoadedModel, found: Predictions, kl: float, cache: Cache) -> ModelEvaluation:
        """The evaluation of one student."""
        num_parameters = sum(p.numel() for p in loaded.model.parameters())
        line = ModelEvaluation(
            name=name,
            num_parameters=num_parameters,
            metrics={},
            agreement=agreement_of(found),
            kl=kl,
            size_ratio=self.teacher.num_parameters / num_parameters if self.teacher.num_parameters else None,
        )
        if not self.teacher.metrics:  # no hard label
            return line
        metrics = self.basis.task.metrics(found, cache.manifest.contract.num_classes)
        if cache.vocabulary_map is not None:  # metrics per token cannot be compared
            metrics = {key: value for key, value in metrics.items() if key not in OF_TOKENS}
        main = self.basis.main_metric
        ours, theirs = metrics[main], self.teacher.metrics[main]
        scores, weights = self._row_scores(found)
        teacher_scores, teacher_weights = self._row_scores(self.predictions)
        alike = self.basis.in_bytes or np.array_equal(weights, teacher_weights)  # rows have equal weights for both
        each = weights > 0 if alike else (weights > 0) | (teacher_weights > 0)
        higher = self.basis.higher_is_better
        return dataclasses.replace(
            line,
            metrics=metrics,
            retention=_ratio(ours, theirs) if higher else _ratio(theirs, ours),
            retention_interval=bootstrap_ratio(
                scores[each],
                teacher_scores[each],
                of=None if alike else (weights[each], teacher_weights[each]),
                seed=self.seed,
                inverse=not higher,
            ),
        )

    def _row_scores(self, found: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """`Basis.row_scores`; in bytes, rescaled to the bytes that the teacher predicts."""
        scores, weights = self.basis.row_scores(found)
        return (
            on_bytes_of(scores, weights, self.predictions.row_text_bytes) if self.basis.in_bytes else (scores, weights)
        )


def _predict(
    cache: Cache, task: Task, student: LoadedModel, name: str, split: str, batch_size: int
) -> tuple[Predictions, float]:
    """A student's predictions on a split and its KL(teacher || student) in nats per position.

    KL is the mean over positions that have a soft label: aligned ones, for another tokenizer.
    """
    temperature = served_temperature(cache.manifest.contract.encoding)
    parts, labels, owners, kl = [], [], [], []
    teacher: list[np.ndarray] = []
    text_bytes: list[np.ndarray] = []
    done = compared = 0
    for rows, batch, logits in logits_by_batch(cache, task, student, split, batch_size, f"evaluate {name}"):
        with torch.inference_mode():
            divergence = distance(logits, batch.target, temperature=temperature).double().cpu().numpy()
        assert batch.teacher_predicted is not None
        parts.append(score_of(task, logits, batch.labels))
        labels.append(batch.labels.cpu().numpy())
        teacher.append(batch.teacher_predicted.cpu().numpy())
        text_bytes.append(text_bytes_of(rows))
        owner = np.repeat(np.arange(len(rows)), positions_of(rows))
        kl.append(np.bincount(owner, weights=divergence, minlength=len(rows)))
        compared += int((batch.soft_weights > 0).sum())
        owners.append(owner + done)
        done += len(rows)
    predictions = Predictions(
        labels=np.concatenate(labels),
        predicted=np.concatenate([part.predicted for part in parts]),
        confidence=np.concatenate([part.confidence for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        teacher_predicted=np.concatenate(teacher),
        rows=np.concatenate(owners),
        row_kl=np.concatenate(kl),
        row_text_bytes=np.concatenate(text_bytes),
        label_names=cache.manifest.contract.label_names,
        groups=groups_of(cache, split),
    )
    return predictions, float(predictions.row_kl.sum() / max(compared, 1))


def groups_of(cache: Cache, split: str) -> np.ndarray | None:
    """(R,) int64: the group of each row, or None if rows are independent.

    A group is a list of candidates, or the masked copies or windows of one text.
    """
    if resampled_name(get_task(cache.manifest.contract.task)) == "text":
        return np.unique(cache.dataset(split).column("source_row"), return_inverse=True)[1].astype(np.int64)
    if "score_group" not in cache.manifest.contract.columns:
        return None
    groups = cache.dataset(split).column("score_group")
    numbers: np.ndarray = np.cumsum(np.append(0, groups[1:] != groups[:-1]))
    return numbers


def predictions_of_teacher(
    task: Task,
    blocks: Iterable[RowBlock],
    temperature: float,
    label_names: tuple[str, ...] | None = None,
    groups: np.ndarray | None = None,
) -> Predictions:
    """The teacher's predictions, read from the cache.

    Its loss is exact: the stored sums are over the full distribution.

    Args:
        temperature: temperature of the stored probabilities. Confidence is nan unless it is 1, the
            temperature at which students are scored.
    """
    labels, predicted, confidence, nll, owners, text_bytes = [], [], [], [], [], []
    done = 0
    for rows in blocks:
        truth = task.hard_labels(tokens_of(rows))
        best, peak = most_likely(unpack_soft(rows))
        owner = np.repeat(np.arange(len(rows)), positions_of(rows))
        labels.append(truth)
        predicted.append(best.numpy())
        confidence.append(peak.double().exp().numpy() if temperature == 1 else np.full(len(truth), np.nan))
        known = is_known(truth)
        num_known = np.bincount(owner[known], minlength=len(rows))
        means = rows.numbers["teacher_nll_sum"].astype(np.float64) / np.where(num_known, num_known, np.nan)
        errors = np.square(best.double().numpy() - truth) if task.target == "score" else means[owner]
        nll.append(np.where(known, errors, np.nan))
        owners.append(owner + done)
        text_bytes.append(text_bytes_of(rows))
        done += len(rows)
    argmax = np.concatenate(predicted)
    return Predictions(
        labels=np.concatenate(labels),
        predicted=argmax,
        confidence=np.concatenate(confidence),
        nll=np.concatenate(nll),
        teacher_predicted=argmax,
        rows=np.concatenate(owners),
        row_kl=np.zeros(done),
        row_text_bytes=np.concatenate(text_bytes),
        label_names=label_names,
        groups=groups,
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
