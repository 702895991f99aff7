"""Records of a report: verdict, quality, fidelity, calibration, cost, training, determinants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.records import Interval, Loss

Role = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure and what is known of its uncertainty, at 95% confidence."""

    value: float
    """The mean over seeds, or what is made of means over seeds."""
    rows: Interval | None
    """Over other rows of this kind, the students as they are: percentiles of a bootstrap over rows.
    None: not defined."""
    seeds: Interval | None = None
    """Over other seeds, the rows as they are: Student's t over the seeds. None: fewer than two
    seeds."""
    both: Interval | None = None
    """Over other rows and other seeds: variances added. None: fewer than two seeds."""

    @property
    def interval(self) -> Interval | None:
        """The widest claim that the data allows: over rows and seeds, or over rows alone."""
        return self.both or self.rows


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a model directory says of how it was made; None where it does not say."""

    directory: str
    cache_id: str | None = None
    loss: Loss | None = None
    teacher_labels: bool | None = None
    seed: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    seconds: float | None = None
    passes: float | None = None
    """Over the training split: steps times rows a step, over its rows."""
    history: tuple[Mapping[str, float], ...] = ()
    """Trainer's log: one mapping an entry, each with `step`."""


@dataclass(frozen=True, slots=True)
class Model:
    """One student or control: all its seeds."""

    name: str
    role: Role
    architecture: str
    """As `BertForSequenceClassification, 2 layers of 128`."""
    num_parameters: int
    cache_id: str
    """Of the cache whose teacher it is compared with: its own, where that is among the caches."""
    runs: tuple[Provenance, ...]

    @property
    def made_by(self) -> str:
        """How it was trained, in a few words; '' where that is not known."""
        loss, teacher_labels = self.runs[0].loss, self.runs[0].teacher_labels
        if loss is None:
            return ""
        parts = []
        if loss.soft_weight or loss.soft_weight_end:
            parts.append(f"{loss.soft_weight:g} {loss.divergence} at T = {loss.temperature:g}")
        if loss.hard_weight or loss.hard_weight_end:
            parts.append(f"{loss.hard_weight:g} {'teacher' if teacher_labels else 'hard'} labels")
        if loss.span_weight:
            parts.append(f"{loss.span_weight:g} aligned spans")
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class TeacherLine:
    """The teacher of one cache."""

    name: str
    """`teacher`; of further caches with the name of their own."""
    cache: str
    cache_id: str
    num_parameters: int
    metrics: Mapping[str, Measured]


@dataclass(frozen=True, slots=True)
class Quality:
    """One model against the truth."""

    name: str
    role: Role
    teacher: str
    num_seeds: int
    metrics: Mapping[str, Measured]
    retention: Measured
    """Its main metric over the teacher's (for a loss the teacher's over its own)."""
    difference: Measured
    """To the teacher, in the unit of the main metric; above 0: better than the teacher."""
    scaled: bool = False
    """With temperature scaling after training."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same rows."""

    first: str
    second: str
    metric: str
    difference: Measured
    """Above 0: the first is better."""
    test: str
    p_value: float
    p_adjusted: float
    """By Holm over all comparisons of the report."""
    p_seeds: float | None = None
    """Paired t-test over the seeds, not adjusted; None: fewer than two, or not the same ones."""


@dataclass(frozen=True, slots=True)
class GapShare:
    """How much of the way from a control to the teacher a student goes."""

    student: str
    control: str
    metric: str
    share: Measured | None
    """(student - control) / (teacher - control); None: the control is not clearly worse than the
    teacher, and the share of nothing is nothing."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One model against its teacher."""

    name: str
    role: Role
    agreement: Measured
    on_right: float
    """Agreement where the teacher is right."""
    on_errors: float
    """Agreement where the teacher is wrong: mistakes that it copies."""
    mended: float
    """Right answers where the teacher is wrong; nan of tokens that are not the teacher's."""
    kl: Measured | None
    js: Measured | None


@dataclass(frozen=True, slots=True)
class SliceLine:
    """One model on one class, or on one band of token frequencies."""

    name: str
    accuracy: float | None
    """None, as `loss`: of tokens that are not the teacher's."""
    loss: float | None
    agreement: float
    kl: float | None


@dataclass(frozen=True, slots=True)
class Slice:
    """The positions of one class, or of tokens of one band of frequency."""

    name: str
    positions: int
    teacher_accuracy: float
    models: tuple[SliceLine, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """Where a student is far from its teacher."""

    student: str
    source_row: int
    text: str | None
    """None: the cache keeps no texts."""
    truth: str
    teacher: str
    """Its most likely class, with its probability where that is known."""
    answer: str
    """The student's."""
    distance: float
    """KL in nats where it is known by position; else log q / p of the teacher's likeliest class, q
    being the teacher's probability and p the student's."""
    is_kl: bool = True


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of a reliability diagram."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far a model may be believed."""

    name: str
    ece: float
    brier: Measured | None
    nll: Measured | None
    """None: of tokens that are not the teacher's."""
    bins: tuple[Bin, ...]
    temperature: float | None = None
    """Of temperature scaling; the mean over seeds and folds. None: as trained."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of repeated measurements."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one model costs to run."""

    name: str
    num_parameters: int
    disk_bytes: int | None
    latency: Spread | None = None
    """Seconds of one row by itself."""
    throughput: Spread | None = None
    """Rows a second, in batches."""
    speedup: Spread | None = None
    """Seconds of the teacher's row over this model's, round by round; None: the teacher was not
    measured."""
    speedup_batched: Spread | None = None
    peak_bytes: int | None = None
    """Most resident memory while it ran, above that of the process before it loaded the model."""
    joules_per_thousand: float | None = None
    bytes_per_second: Spread | None = None
    """Bytes of text a second, in batches; None: all models have the same tokens."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how costs were measured."""

    device: str
    threads: int
    rounds: int
    batch_rows: int
    tokens: int
    """Of the rows measured, on average."""
    energy: str
    """How the energy was found, in words."""
    bytes_per_row: int | None = None
    """Of text, on average; None: all models have the same tokens."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """A cache against a teacher in the loop."""

    cache: str
    cache_bytes: int
    capture_seconds: float
    """Of the training split: forward passes, encoding, writing."""
    pass_seconds: float
    """The teacher's forward passes alone, once over the training split: what each epoch would cost
    with the teacher in the loop."""
    device: str
    passes: float
    """Epochs times students after which the cache has paid for itself."""
    passes_made: float | None
    """By the students here."""
    saved_seconds: float | None


@dataclass(frozen=True, slots=True)
class Level:
    """The students that share one value of a factor."""

    value: str
    students: tuple[str, ...]
    mean: float
    """Of the main metric."""
    low: float
    high: float
    retention: float


@dataclass(frozen=True, slots=True)
class Determinant:
    """How the main metric goes with one factor, over the students."""

    question: str
    factor: str
    levels: tuple[Level, ...]
    spread: float
    """Between the best level's mean and the worst's."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer."""

    student: str
    chosen: str
    """How, in words."""
    answer: Literal["yes", "no", "better", "open", "unknown"]
    sentence: str
    controls: str
    """What they keep; '' without controls."""
    gap: str
    """How much of the way from each control to the teacher the student goes; '' where that is not
    defined."""

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(part for part in (self.sentence, self.controls, self.gap) if part)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything; `report.json`."""

    task: str
    split: str
    rows: int
    positions: int
    main_metric: str
    higher_is_better: bool
    encoding: str
    temperature: float
    """At which KL and JS are taken."""
    calibration: str
    """What temperatures were fitted on, in words."""
    verdict: Verdict
    teachers: tuple[TeacherLine, ...]
    models: tuple[Model, ...]
    quality: tuple[Quality, ...]
    comparisons: tuple[Comparison, ...]
    gap_shares: tuple[GapShare, ...]
    closeness: tuple[Closeness, ...]
    divergence_note: str
    """What KL and JS mean with this encoding."""
    slices: tuple[Slice, ...]
    slice_kind: str
    examples: tuple[Example, ...]
    calibrations: tuple[Calibration, ...]
    costs: tuple[Cost, ...]
    machine: Machine | None
    break_even: tuple[BreakEven, ...]
    determinants: tuple[Determinant, ...]
    tokenizer_notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    """Models that are no better than the most common class, or poorly calibrated."""
    """Where a model has another tokenizer than its teacher: what is compared, and what is left
    out."""
