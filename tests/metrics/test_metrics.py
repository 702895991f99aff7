from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from pipeline import metrics
from pipeline.metrics import (
    accuracy,
    agreement,
    bits_per_byte,
    bootstrap_ratio,
    entities,
    entity_counts,
    expected_calibration_error,
    label_scores,
    macro_f1,
    mean_nll,
    paired_mean_interval,
    perplexity,
)
from pipeline.records import NO_LABEL, Interval

EMPTY = np.array([], dtype=np.int64)
UNLABELLED = np.full(3, NO_LABEL)


def classified(seed: int, num_rows: int = 200, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(N,) labels, a quarter of them unknown, and (N,) predictions with accuracy above chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    predicted = np.where(rng.random(num_rows) < 0.6, labels, rng.integers(0, num_classes, num_rows))
    return np.where(rng.random(num_rows) < 0.25, NO_LABEL, labels), predicted


def is_unknown(interval: Interval) -> bool:
    return math.isnan(interval.low) and math.isnan(interval.high)


def coverage_bounds(simulations: int) -> tuple[int, int]:
    """The 0.1% and 99.9% quantiles of the number of 95% intervals that hold the truth."""
    low, high = stats.binom.ppf([0.001, 0.999], simulations, 0.95)
    return int(low), int(high)


# -------------------------------------------------------------------------------------- hard labels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes", [7, 11])  # 11: the last four never occur
def test_scores_of_classes_are_those_of_torchmetrics(seed: int, num_classes: int) -> None:
    labels, predicted = classified(seed)
    tensors = torch.from_numpy(predicted), torch.from_numpy(labels)
    micro = multiclass_accuracy(*tensors, num_classes=num_classes, average="micro", ignore_index=NO_LABEL)
    macro = multiclass_f1_score(*tensors, num_classes=num_classes, average="macro", ignore_index=NO_LABEL)
    assert accuracy(labels, predicted) == pytest.approx(float(micro), abs=1e-6)
    assert macro_f1(labels, predicted, num_classes=num_classes) == pytest.approx(float(macro), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes", [7, 11])
def test_scores_of_classes_are_those_of_scikit_learn(seed: int, num_classes: int) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    labels, predicted = classified(seed)
    pair = labels[labels != NO_LABEL], predicted[labels != NO_LABEL]
    macro = sklearn_metrics.f1_score(*pair, average="macro")
    assert accuracy(labels, predicted) == pytest.approx(sklearn_metrics.accuracy_score(*pair), abs=1e-12)
    assert macro_f1(labels, predicted, num_classes=num_classes) == pytest.approx(macro, abs=1e-6)


def test_macro_f1_leaves_out_what_occurs_nowhere_and_counts_the_rest() -> None:
    perfect = np.array([0, 1])
    assert macro_f1(perfect, perfect, num_classes=5) == 1.0
    assert macro_f1(np.array([0, 0, 1]), np.array([0, 0, 2]), num_classes=5) == pytest.approx(1 / 3)  # classes 0, 1, 2
    assert macro_f1(np.array([0, NO_LABEL]), np.array([0, 3]), num_classes=5) == 1.0  # 3 only at an unknown label


def test_without_a_label_nothing_can_be_said() -> None:
    for labels in (EMPTY, UNLABELLED):
        predicted = np.zeros_like(labels)
        assert math.isnan(accuracy(labels, predicted))
        assert math.isnan(macro_f1(labels, predicted, num_classes=4))
    assert math.isnan(expected_calibration_error(np.array([]), np.array([], dtype=bool)))
    assert math.isnan(mean_nll(np.array([])))
    assert math.isnan(mean_nll(np.array([np.nan, np.nan])))
    assert math.isnan(perplexity(math.nan))
    assert math.isnan(agreement(EMPTY, EMPTY))


def test_one_row() -> None:
    one = np.array([2])
    assert accuracy(one, one) == 1.0
    assert macro_f1(one, one, num_classes=4) == 1.0
    assert expected_calibration_error(np.array([0.75]), np.array([True])) == pytest.approx(0.25)
    assert mean_nll(np.array([0.5])) == 0.5


@pytest.mark.parametrize("num_bins", [1, 15, 40])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_calibration_error_is_that_of_all_classes(num_bins: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(500, 5)))
    labels = torch.distributions.Categorical(logits=logits).sample()
    probabilities = (logits / temperature).softmax(-1)
    confidence, predicted = probabilities.max(-1)
    found = expected_calibration_error(confidence.numpy(), (predicted == labels).numpy(), num_bins=num_bins)
    reference = multiclass_calibration_error(probabilities, labels, num_classes=5, n_bins=num_bins, norm="l1")
    assert found == pytest.approx(float(reference), abs=1e-6)


def test_calibration_error_of_known_cases() -> None:
    assert expected_calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == pytest.approx(0.0)
    assert expected_calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1.0
    # In float32, exp() may exceed 1; torchmetrics would then treat both values as logits.
    over = np.array([np.nextafter(np.float32(1), np.float32(2)), 0.5], dtype=np.float32)
    assert expected_calibration_error(over, np.array([True, True])) == pytest.approx(0.25)
    assert math.isnan(expected_calibration_error(np.array([np.nan, 0.5]), np.array([True, True])))


def test_likelihoods() -> None:
    assert mean_nll(np.array([1.0, np.nan, 3.0])) == 2.0
    assert mean_nll(np.full(100_000, 0.1, dtype=np.float32)) == pytest.approx(float(np.float32(0.1)), rel=1e-9)
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e4) == math.inf
    assert perplexity(math.inf) == math.inf
    assert bits_per_byte(80 * math.log(2), 10) == pytest.approx(8.0)
    assert math.isnan(bits_per_byte(0.0, 0))


def test_agreement_counts_every_position() -> None:
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 0])) == 0.5


# ---------------------------------------------------------------------------------------- intervals


def test_a_student_equal_to_its_teacher_is_one_exactly() -> None:
    scores = np.random.default_rng(0).random(37)
    assert bootstrap_ratio(scores, scores) == Interval(1.0, 1.0)
    assert bootstrap_ratio(scores, scores, scores, inverse=True) == Interval(1.0, 1.0)
    rare = np.array([0, 0, 0, 1])  # a third of the resamples are 0 / 0
    assert bootstrap_ratio(rare, rare) == Interval(1.0, 1.0)


def test_the_ratio_is_resampled_as_scipy_does() -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.random(80), rng.random(80)

    def ratio(numerator: np.ndarray, denominator: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(numerator.sum(axis=axis) / denominator.sum(axis=axis))

    reference = stats.bootstrap(
        (student, teacher), ratio, n_resamples=2000, paired=True, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    found = bootstrap_ratio(student, teacher, seed=5)
    assert found.low == pytest.approx(reference.low, abs=2e-3)  # scipy interpolates between order statistics
    assert found.high == pytest.approx(reference.high, abs=2e-3)
    assert found.low < student.sum() / teacher.sum() < found.high


def test_the_inverse_is_the_ratio_of_the_roles_exchanged() -> None:
    rng = np.random.default_rng(4)
    student, teacher = rng.random(50), rng.random(50)
    assert bootstrap_ratio(student, teacher, inverse=True) == bootstrap_ratio(teacher, student)


def test_weights_turn_means_into_sums() -> None:
    rng = np.random.default_rng(6)
    lengths = rng.integers(1, 30, 60)
    student, teacher = rng.random(60), rng.random(60)
    expected = bootstrap_ratio(student * lengths, teacher * lengths)
    assert bootstrap_ratio(student, teacher, lengths) == expected
    assert bootstrap_ratio(student, teacher) != expected


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    student, teacher = rng.random(41), rng.random(41)
    whole = bootstrap_ratio(student, teacher, resamples=101)
    for chunk in (1, 41 * 10):  # fewer elements than rows: one resample at a time
        monkeypatch.setattr(metrics, "RESAMPLE_CHUNK", chunk)
        assert bootstrap_ratio(student, teacher, resamples=101) == whole
    assert bootstrap_ratio(student, teacher, resamples=101, seed=1) != whole


def test_rows_without_a_label_are_left_out() -> None:
    rng = np.random.default_rng(8)
    student, teacher, weights = rng.random((3, 30))
    gaps = [0, 7, 29]
    whole = bootstrap_ratio(*(np.delete(values, gaps) for values in (student, teacher, weights)))
    student[gaps] = teacher[gaps] = np.nan
    assert bootstrap_ratio(student, teacher, weights) == whole
    student[3] = np.nan  # NaN in one model only is a failure, not a missing label
    assert is_unknown(bootstrap_ratio(student, teacher, weights))


def test_too_little_for_a_ratio() -> None:
    nothing = np.array([])
    assert is_unknown(bootstrap_ratio(nothing, nothing))
    assert is_unknown(bootstrap_ratio(np.ones(1), np.ones(1)))
    assert is_unknown(bootstrap_ratio(np.full(5, np.nan), np.full(5, np.nan)))
    assert is_unknown(bootstrap_ratio(np.zeros(5), np.zeros(5)))
    assert bootstrap_ratio(np.ones(5), np.zeros(5)) == Interval(math.inf, math.inf)
    assert bootstrap_ratio(np.zeros(5), np.ones(5)) == Interval(0.0, 0.0)
    assert bootstrap_ratio(np.ones(4), np.array([0.0, 0.0, 0.0, 1.0])).high == math.inf


def test_arrays_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        bootstrap_ratio(np.ones(5), np.ones(1))
    with pytest.raises(ValueError, match="shape"):
        bootstrap_ratio(np.ones(5), np.ones(5), np.ones(1))


def right_answers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Counts of correct predictions of two models in 150 rows of 1 to 20 positions.

    Both models share the rows' difficulty. The true ratio is 0.8 / 0.9.
    """
    lengths = rng.integers(1, 21, 150)
    difficulty = rng.uniform(-0.1, 0.1, 150)
    return rng.binomial(lengths, 0.8 + difficulty), rng.binomial(lengths, 0.9 + difficulty), 0.8 / 0.9


def losses(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Skewed, correlated losses of two models in nats per row; the true ratio is 1.25."""
    shared = rng.gamma(2.0, 1.0, 150)
    return shared + rng.gamma(0.5, 1.0, 150), shared, 1.25


@pytest.mark.parametrize("draw", [right_answers, losses])
def test_the_ratio_lies_in_its_interval_95_times_in_100(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, float]],
) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        student, teacher, truth = draw(rng)
        interval = bootstrap_ratio(student, teacher, seed=seed, resamples=500)
        covered += interval.low <= truth <= interval.high
    low, high = coverage_bounds(200)
    assert low <= covered <= high


def test_the_mean_of_differences_is_that_of_scipy() -> None:
    differences = np.random.default_rng(9).normal(0.3, 1.0, 6)
    for confidence in (0.95, 0.8):
        reference = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
        found = paired_mean_interval(differences, confidence)
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high), rel=1e-12)


def test_the_mean_lies_in_its_interval_95_times_in_100() -> None:
    samples = np.random.default_rng(10).normal(0.3, 2.0, (400, 3))
    intervals = [paired_mean_interval(sample) for sample in samples]
    low, high = coverage_bounds(400)
    assert low <= sum(interval.low <= 0.3 <= interval.high for interval in intervals) <= high


def test_too_few_differences() -> None:
    assert is_unknown(paired_mean_interval(np.array([])))
    assert is_unknown(paired_mean_interval(np.array([1.0])))
    assert is_unknown(paired_mean_interval(np.array([1.0, np.nan])))
    assert paired_mean_interval(np.array([0.5, 0.5])) == Interval(0.5, 0.5)


# ----------------------------------------------------------------------------------------- entities

TAGS = ("O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B", "I-C")


def test_entities_are_those_of_seqeval() -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    rng = np.random.default_rng(0)
    for _ in range(3000):
        tags = rng.choice(TAGS, rng.integers(0, 10)).tolist()
        assert entities(tags) == [(label, first, last + 1) for label, first, last in get_entities(tags)], tags


def test_entities_of_other_schemes() -> None:
    assert entities(["B-A", "L-A", "U-A", "O"]) == [("A", 0, 2), ("A", 2, 3)]
    assert entities(["A", "A", "O", "A", "B"]) == [
        ("A", 0, 2),
        ("A", 3, 4),
        ("B", 4, 5),
    ]  # no B- or I-: adjacent equal labels are one
    assert entities(["I-A", "I-A", "I-B"]) == [("A", 0, 2), ("B", 2, 3)]
    assert entities(["B-new-york", "X-y"]) == [("new-york", 0, 1), ("X-y", 1, 2)]
    assert entities([]) == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # seqeval warns of labels that never occur
def test_counts_of_entities_are_those_of_seqeval() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 12, 40)
    rows = np.repeat(np.arange(40), lengths)
    labels, predicted = rng.integers(0, len(TAGS), (2, len(rows)))
    predicted = np.where(rng.random(len(rows)) < 0.8, labels, predicted)
    right, found, true = entity_counts(labels, predicted, rows, TAGS, 40).sum(0)
    cuts = np.cumsum(lengths)[:-1]
    truth, guess = ([[TAGS[i] for i in part] for part in np.split(values, cuts)] for values in (labels, predicted))
    assert right / found == pytest.approx(precision_score(truth, guess))
    assert right / true == pytest.approx(recall_score(truth, guess))
    assert 2 * right / (found + true) == pytest.approx(f1_score(truth, guess))


def test_words_without_a_label_have_no_part_in_entities() -> None:
    names = ("O", "B-A", "I-A")
    labels, predicted = np.array([1, NO_LABEL, 2, 0]), np.array([1, 2, 2, 1])
    counts = entity_counts(labels, predicted, np.array([0, 0, 0, 2]), names, 4)
    assert counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_shares_of_different_wholes_are_resampled_together() -> None:
    """Student F1 over teacher F1, a ratio of two ratios of sums, equals a direct bootstrap."""
    rng = np.random.default_rng(2)
    a, b, of_a, of_b = rng.random((4, 50)) + 0.5
    found = bootstrap_ratio(a, b, of=(of_a, of_b), seed=3)
    picks = [np.random.default_rng(i).integers(0, 50, 50) for i in range(2000)]
    ratios = [(a[i].sum() / of_a[i].sum()) / (b[i].sum() / of_b[i].sum()) for i in picks]
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert found.low == pytest.approx(low, rel=0.02)
    assert found.high == pytest.approx(high, rel=0.02)
    assert bootstrap_ratio(a, b, of=(of_a, of_a)) == bootstrap_ratio(a, b, of=(2 * of_a, 2 * of_a))
    assert bootstrap_ratio(a, b, of=(of_a, of_b), inverse=True) == bootstrap_ratio(b, a, of=(of_b, of_a))


# -------------------------------------------------------------------------------------- multi-label


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_labels_are_those_of_scikit_learn(seed: int) -> None:
    from sklearn.metrics import average_precision_score, f1_score

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (80, 4))
    shares = np.clip(0.25 * rng.standard_normal((80, 4)) + 0.2 + 0.6 * labels, 0, 1)
    found = label_scores(labels, shares)
    assert found.macro_f1 == pytest.approx(f1_score(labels, shares > 0.5, average="macro"), abs=1e-6)
    assert found.average_precision == pytest.approx(average_precision_score(labels, shares, average="macro"), abs=1e-6)
    errors = [expected_calibration_error_of_yes(labels[:, i], shares[:, i]) for i in range(4)]
    assert found.calibration_error == pytest.approx(np.mean(errors), abs=1e-6)


def expected_calibration_error_of_yes(labels: np.ndarray, shares: np.ndarray) -> float:
    """ECE with 15 bins of equal width, plus a bin for shares of exactly 1 as in torchmetrics."""
    bins = np.floor(shares * 15)
    parts = [bins == number for number in np.unique(bins)]
    return sum(part.mean() * abs(shares[part].mean() - labels[part].mean()) for part in parts)


def test_labels_that_are_not_known_have_no_part() -> None:
    labels = np.array([[1, NO_LABEL], [0, NO_LABEL], [1, NO_LABEL], [NO_LABEL, NO_LABEL]])
    shares = np.array([[0.9, 0.5], [0.1, 0.5], [0.4, 0.5], [0.0, 0.5]])
    found = label_scores(labels, shares)
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.average_precision == pytest.approx(1.0)
    nothing = label_scores(labels[:, 1:], shares[:, 1:])
    assert all(math.isnan(value) for value in (nothing.macro_f1, nothing.average_precision, nothing.calibration_error))


def test_a_label_that_is_nowhere_counts_only_where_it_is_predicted() -> None:
    labels = np.array([[1, 0, 0], [0, 0, 0]])
    shares = np.array([[0.9, 0.1, 0.8], [0.1, 0.2, 0.3]])
    found = label_scores(labels, shares)
    assert found.macro_f1 == pytest.approx((1 + 0) / 2)  # the second label never occurs and is not predicted
    assert found.average_precision == pytest.approx(1.0)
