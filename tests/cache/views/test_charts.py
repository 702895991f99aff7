"""Charts count each value once, label their axes correctly, and draw nothing outside the frame."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from pipeline.cache.views.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Axis, bars, histogram


def test_the_histogram_counts_each_value_once():
    values = np.asarray([1, 1, 2, 7, 20, np.nan])
    chart = histogram("t", values, "c", axis=Axis("tokens", whole=True), of="rows")
    assert [bar.title for bar in chart.bars] == ["1: 2 (40.0%)", "2: 1 (20.0%)", "7: 1 (20.0%)", "20: 1 (20.0%)"]
    assert [round(bar.height / (BOTTOM - TOP), 3) for bar in chart.bars] == [1, 0.5, 0.5, 0.5]
    assert all(bar.x >= chart.left and bar.x + bar.width <= RIGHT for bar in chart.bars)
    assert all(bar.y + bar.height == pytest.approx(BOTTOM, abs=0.02) for bar in chart.bars)
    assert [label.text for label in chart.y_labels] == ["0", "1", "2"]
    assert chart.summary == "mean 6.2 · median 2.0 · 80% in 1.0 to 14.8 · 1 not known"


def test_nothing_known_and_one_value():
    assert histogram("t", np.full(3, np.nan), "c", axis=Axis("nats"), of="rows") is None
    assert histogram("t", np.zeros(0), "c", axis=Axis("nats"), of="rows") is None
    same = histogram("t", np.full(4, 2.5), "c", axis=Axis("nats"), of="rows")
    assert [bar.title for bar in same.bars] == ["2.50 to 2.54: 4 (100.0%)"]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 999, 123_456, 50_000_000])
def test_counts_on_the_y_axis_stand_where_bars_of_that_height_end(most):
    chart = bars("t", [("a", most), ("b", 0), ("c", most // 2)], "c", x_title="x", of="rows")
    assert chart.bars[0].title == f"a: {most:,} ({most / (most + most // 2):.1%})"
    scale = chart.bars[0].height / most
    texts = [int(label.text.replace(",", "")) for label in chart.y_labels]
    assert texts[0] == 0
    assert 2 <= len(texts) <= 5
    assert texts[-1] <= most
    for count, label in zip(texts, chart.y_labels, strict=True):
        assert label.at == pytest.approx(BOTTOM - scale * count, abs=0.05)


@pytest.mark.parametrize("classes", [2, 5, 49_152, 262_144])
def test_the_mark_of_the_uniform_distribution(classes):
    uniform = math.log(classes)
    axis = Axis("nats", 0.0, uniform, mark=(uniform, f"ln V = {uniform:.3f}: uniform over {classes:,} classes"))
    chart = histogram("Entropy", np.linspace(0, uniform, 50), "c", axis=axis, of="positions")
    assert chart.mark.at == pytest.approx(RIGHT)
    assert chart.mark.anchor == "end"
    # A value at half the range is drawn at half the width.
    half = histogram("Entropy", np.asarray([uniform / 2 + 1e-6]), "c", axis=axis, of="positions").bars[0]
    assert half.x == pytest.approx((chart.left + RIGHT) / 2, abs=1)
    # Rounding may push an entropy above ln V: it is counted, and the mark stays at ln V.
    above = histogram("Entropy", np.asarray([0.0, uniform * 1.01]), "c", axis=axis, of="positions")
    assert sum(int(re.search(r": (\d+) \(", bar.title)[1]) for bar in above.bars) == 2
    assert above.mark.at < RIGHT


def test_ticks_are_round_and_inside():
    chart = histogram("t", np.asarray([0.2, 0.9]), "c", axis=Axis("share", 0.0, 1.0, percent=True), of="rows")
    assert [label.text for label in chart.x_labels] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    chart = histogram("t", np.asarray([0.0, 1.609]), "c", axis=Axis("nats", 0.0, 1.609), of="rows")
    assert [label.text for label in chart.x_labels] == ["0.0", "0.5", "1.0", "1.5"]
    chart = histogram("t", np.full(3, 3), "c", axis=Axis("classes", whole=True), of="rows")
    assert [label.text for label in chart.x_labels] == [str(i) for i in range(3, 11)]
    for low, high in ((1, 1), (1, 9), (3, 512), (48, 131_072)):
        chart = histogram("t", np.asarray([low, high]), "c", axis=Axis("tokens", whole=True), of="rows")
        assert all(float(label.text.replace(",", "")).is_integer() for label in chart.x_labels)
        assert all(chart.left <= label.at <= RIGHT <= WIDTH for label in chart.x_labels)
    assert BOTTOM < HEIGHT
