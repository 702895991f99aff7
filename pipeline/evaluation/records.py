"""Records of a report: verdict, quality, fidelity, calibration, cost, training, determinants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.records import Interval, Loss

Role = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Measured:
    """An estimate with its 95% confidence intervals."""

    value: float
    """The mean over seeds, or a function of such means."""
    rows: Interval | None
    """Uncertainty from the sample of rows, for fixed students: percentile bootstrap over rows.
    None: not defined."""
    seeds: Interval | None = None
    """Uncertainty from the training seed, for fixed rows: Student's t over the seeds. None: fewer
    than two seeds."""
    both: Interval | None = None
    """Uncertainty from rows and seeds: the sum of both variances. None: fewer than two seeds."""

    @property
    def interval(self) -> Interval | None:
        """The most general interval available: over rows and seeds, else over rows alone."""
        return self.both or self.rows


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a model was trained, as recorded in its directory; None: not recorded."""

    directory: str
    cache_id: str | None = None
    loss: Loss | None = None
    teacher_labels: bool | None = None
    seed: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    seconds: float | None = None
    passes: float | None = None
    """Epochs over the training split: steps * rows per step / rows of the split."""
    history: tuple[Mapping[str, float], ...] = ()
    """The log of the Trainer: one mapping per entry, each with `step`."""


@dataclass(frozen=True, slots=True)
class Model:
    """One student or control, with the runs of all its seeds."""

    name: str
    role: Role
    architecture: str
    """For example `BertForSequenceClassification, 2 layers of 128`."""
    num_parameters: int
    cache_id: str
    """The cache whose teacher it is compared with: its training cache if that is given."""
    runs: tuple[Provenance, ...]

    @property
    def made_by(self) -> str:
        """A short description of the training loss; '' if it is not known."""
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
    """`teacher`; teachers of further caches have the name of the cache added."""
    cache: str
    cache_id: str
    num_parameters: int
    metrics: Mapping[str, Measured]


@dataclass(frozen=True, slots=True)
class Quality:
    """Metrics of one model on the true labels."""

    name: str
    role: Role
    teacher: str
    num_seeds: int
    metrics: Mapping[str, Measured]
    retention: Measured
    """The model's main metric divided by the teacher's (inverted for a loss)."""
    difference: Measured
    """Difference from the teacher in the unit of the main metric; above 0: better than it."""
    scaled: bool = False
    """Whether temperature scaling is applied after training."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired comparison of two models on the same rows."""

    first: str
    second: str
    metric: str
    difference: Measured
    """Above 0: the first is better."""
    test: str
    p_value: float
    p_adjusted: float
    """The p-value with Holm's correction over all comparisons of the report."""
    p_seeds: float | None = None
    """p-value of a paired t-test over seeds, not adjusted; None: fewer than two, or unequal."""


@dataclass(frozen=True, slots=True)
class GapShare:
    """The share of the gap between a control and the teacher that a student closes."""

    student: str
    control: str
    metric: str
    share: Measured | None
    """(student - control) / (teacher - control); None: the control is not clearly worse than the
    teacher, so the share is undefined."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """How closely one model matches its teacher."""

    name: str
    role: Role
    agreement: Measured
    on_right: float
    """Agreement where the teacher is right."""
    on_errors: float
    """Agreement where the teacher is wrong: the model makes the same mistake."""
    mended: float
    """Share of right answers where the teacher is wrong; nan if the tokenizers differ."""
    kl: Measured | None
    js: Measured | None


@dataclass(frozen=True, slots=True)
class SliceLine:
    """Results of one model on one `Slice`."""

    name: str
    accuracy: float | None
    """`accuracy` and `loss` are None if the model has another tokenizer than the teacher."""
    loss: float | None
    agreement: float
    kl: float | None


@dataclass(frozen=True, slots=True)
class Slice:
    """The positions of one class, or of tokens in one band of frequencies."""

    name: str
    positions: int
    teacher_accuracy: float
    models: tuple[SliceLine, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A position at which a student is far from its teacher."""

    student: str
    source_row: int
    text: str | None
    """None: the cache stores no texts."""
    truth: str
    teacher: str
    """The teacher's most likely class, with its probability if known."""
    answer: str
    """The student's most likely class."""
    distance: float
    """KL in nats if it is known per position; else log(q / p) of the teacher's most likely class,
    with the teacher's probability q and the student's p."""
    is_kl: bool = True


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of a reliability diagram."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well a model's confidence matches its accuracy."""

    name: str
    ece: float
    brier: Measured | None
    nll: Measured | None
    """None: the model has another tokenizer than the teacher."""
    bins: tuple[Bin, ...]
    temperature: float | None = None
    """Temperature of temperature scaling, mean over seeds and folds. None: not scaled."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements."""

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
    """Seconds for a single row."""
    throughput: Spread | None = None
    """Rows per second, in batches."""
    speedup: Spread | None = None
    """The teacher's latency divided by this model's, per round; None: the teacher was not
    measured."""
    speedup_batched: Spread | None = None
    peak_bytes: int | None = None
    """Peak resident memory above that of the process before it loads the model."""
    joules_per_thousand: float | None = None
    bytes_per_second: Spread | None = None
    """Bytes of text per second, in batches; None: all models have the same tokenizer."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine on which costs were measured, and how."""

    device: str
    threads: int
    rounds: int
    batch_rows: int
    tokens: int
    """Mean number of tokens of the measured rows."""
    energy: str
    """How the energy was measured, in words."""
    bytes_per_row: int | None = None
    """Mean bytes of text per row; None: all models have the same tokenizer."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """When a cache costs less than training with the teacher in the loop."""

    cache: str
    cache_bytes: int
    capture_seconds: float
    """Time to capture the training split: forward passes, encoding, writing."""
    pass_seconds: float
    """Time of the teacher's forward passes over the training split: what each epoch would cost with
    the teacher in the loop."""
    device: str
    passes: float
    """Break-even: epochs, summed over students, after which the cache saves time."""
    passes_made: float | None
    """Epochs of the students trained on this cache, summed; None: not recorded for all."""
    saved_seconds: float | None


@dataclass(frozen=True, slots=True)
class Level:
    """The students with the same value of a factor."""

    value: str
    students: tuple[str, ...]
    mean: float
    """Mean of the main metric."""
    low: float
    high: float
    retention: float


@dataclass(frozen=True, slots=True)
class Determinant:
    """How the main metric varies with one factor over the students."""

    question: str
    factor: str
    levels: tuple[Level, ...]
    spread: float
    """Difference between the highest and the lowest mean of a level."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusion of the report: does a student replace its teacher?"""

    student: str
    chosen: str
    """How the student was chosen, in words."""
    answer: Literal["yes", "no", "better", "open", "unknown"]
    sentence: str
    controls: str
    """What the controls retain, as a sentence; '' without controls."""
    gap: str
    """The `GapShare` of each control, as a sentence; '' where it is not defined."""

    @property
    def text(self) -> str:
        """The whole verdict."""
        return " ".join(part for part in (self.sentence, self.controls, self.gap) if part)


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report, as written to `report.json`."""

    task: str
    split: str
    rows: int
    positions: int
    main_metric: str
    higher_is_better: bool
    encoding: str
    temperature: float
    """The temperature of KL and JS."""
    calibration: str
    """The rows that temperatures were fitted on, in words."""
    verdict: Verdict
    teachers: tuple[TeacherLine, ...]
    models: tuple[Model, ...]
    quality: tuple[Quality, ...]
    comparisons: tuple[Comparison, ...]
    gap_shares: tuple[GapShare, ...]
    closeness: tuple[Closeness, ...]
    divergence_note: str
    """How to read KL and JS with this encoding."""
    slices: tuple[Slice, ...]
    slice_kind: str
    examples: tuple[Example, ...]
    calibrations: tuple[Calibration, ...]
    costs: tuple[Cost, ...]
    machine: Machine | None
    break_even: tuple[BreakEven, ...]
    determinants: tuple[Determinant, ...]
    tokenizer_notes: tuple[str, ...] = ()
    """If a model has another tokenizer than its teacher: what is compared, and what is left out."""
    doubts: tuple[str, ...] = ()
    """Models that are no better than the most common class, or poorly calibrated."""
