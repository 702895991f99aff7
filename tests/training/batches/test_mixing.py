"""Several caches for one student: several teachers of the same rows, or different data."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.cache import Cache
from pipeline.cache.transforms import filter_rows
from pipeline.cli import main
from pipeline.config import TrainStudentConfig
from pipeline.errors import ContractError, EncodingError, MisuseError, TrainingError
from pipeline.records import Full, Loss, Sampled, TopK
from pipeline.softlabels import target
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator, Picked, TrainingRows
from pipeline.training.batches.mixing import AlignedDataset, JoinedDataset, Proportions, TeachersCollator, make_mixture
from pipeline.training.batches.order import BatchOrder
from pipeline.training.fused import Head, fused_loss
from pipeline.training.losses import distillation_loss
from pipeline.training.run import run
from tests.conftest import tiny_model
from tests.support.rows import block_from, build_cache


@pytest.fixture
def make(tmp_path, lm_tokenizer):
    return lambda name, encoding, **settings: build_cache(
        tmp_path / name, lm_tokenizer, encoding=encoding, **{"classes": 320, "per_shard": 20, **settings}
    )


def batch_of(caches, weights, temperature=1.0):
    collator = Collator(get_task("causal-lm"), caches[0].tokenizer, temperature)
    rows = TrainingRows(AlignedDataset(caches, "train", window=4))
    return TeachersCollator(collator, weights).collate(rows.__getitems__([0, 3, 17, ~20]))


@pytest.mark.parametrize(
    ("encodings", "divergence"),
    [
        ((Sampled(6.0), Sampled(9.0)), "forward-kl"),
        ((TopK(4), TopK(7)), "forward-kl"),
        ((TopK(4), Full()), "jensen-shannon"),
        ((Sampled(6.0), TopK(5)), "forward-kl"),
        ((Full(), Full()), "logit-mse"),
    ],
    ids=str,
)
def test_the_soft_term_is_the_weighted_sum_over_the_teachers_value_and_gradient(make, encodings, divergence):
    caches = [make(f"c{i}", encoding) for i, encoding in enumerate(encodings)]
    weights, loss = (0.3, 0.7), Loss(0.4, 0.6, divergence=divergence)
    batch = batch_of(caches, weights)
    count = len(batch.labels) // 2
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(320, 16, generator=generator, dtype=torch.float64)
    labels, counts = batch.labels[:count], batch.weights[:count]
    expected = 0.0
    for t, cache in enumerate(caches):
        goals = [target(cache.dataset("train")[i].soft, 1.0) for i in (0, 3, 17, 20)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([g.offsets.diff() for g in goals]).cumsum(0)])
        own = target(cache.dataset("train")[0].soft, 1.0)
        own = type(own)(
            320,
            offsets,
            torch.cat([g.ids for g in goals]),
            torch.cat([g.weights for g in goals]),
            None if own.log_residual is None else torch.cat([g.log_residual for g in goals]),
            batch.target.negative_entropy[t * count : (t + 1) * count],
        )
        terms = distillation_loss(hidden @ matrix.T, own, labels=labels, loss=loss, weights=counts)
        hard = distillation_loss(
            hidden @ matrix.T, own, labels=labels, loss=loss, weights=counts, loss_weights=(0.4, 0)
        )
        expected = expected + weights[t] * (terms.total - hard.total) + (hard.total if t == 0 else 0.0)
    gradient = torch.autograd.grad(expected, hidden)[0]
    settings = {"labels": batch.labels, "weights": batch.weights, "soft_weights": batch.soft_weights, "loss": loss}
    rows = hidden.repeat(2, 1)
    found = distillation_loss(rows @ matrix.T, batch.target, **settings)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found.total, hidden)[0], gradient, rtol=1e-6, atol=1e-9)
    fused = fused_loss(hidden.repeat(2, 1), Head(matrix), batch.target, temperature=1.0, **settings)
    torch.testing.assert_close(fused.total, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(fused.total, hidden)[0], gradient, rtol=1e-6, atol=1e-9)
    assert float(found.num_soft) == pytest.approx(float(counts.sum()))


def student(tmp_path, tokenizer):
    path = tmp_path / "student"
    tiny_model("llama", 320, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def train(caches, student_path, output, **settings):
    settings = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "training": {"logging_steps": 1}, **settings}
    return run(
        TrainStudentConfig(
            cache=tuple(str(c.root) for c in caches), student=student_path, output=str(output), **settings
        )
    )


def test_a_teacher_beside_itself_changes_nothing(tmp_path, make, lm_tokenizer):
    cache, path = make("a", TopK(8)), student(tmp_path, lm_tokenizer)
    one = train([cache], path, tmp_path / "one")
    two = train([cache, cache], path, tmp_path / "two", mix="teachers", teacher_weight=(3.0, 1.0))
    assert two.soft_loss == pytest.approx(one.soft_loss, rel=1e-5)
    assert two.hard_loss == pytest.approx(one.hard_loss, rel=1e-5)
    assert [(m.kind, m.share) for m in two.mixed] == [("teachers", 0.75), ("teachers", 0.25)]
    assert (
        json.loads((tmp_path / "two" / "distillation.json").read_text())["mixed"][1]["cache_id"]
        == cache.manifest.cache_id
    )
    assert one.mixed == ()


def test_evaluation_goes_over_the_same_pairs(tmp_path, make, lm_tokenizer):
    """Metrics use the first teacher, with one value per position.

    The loss is the training loss over both teachers.
    """
    caches = [make("a", TopK(4)), make("b", Full())]
    settings = {"eval_split": "train", "training": {"eval_strategy": "steps", "eval_steps": 6}, "hard_weight": 0.0}
    path = student(tmp_path, lm_tokenizer)
    logged = {}
    for name, shares in (("one", None), ("both", (0.5, 0.5)), ("second", (1e-9, 1.0))):
        given = caches[:1] if shares is None else caches
        train(
            given,
            path,
            tmp_path / name,
            **settings,
            **({} if shares is None else {"teacher_weight": shares}),
            learning_rate=0.0,
        )
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        logged[name] = next(entry for entry in state["log_history"] if "eval_loss" in entry)
    for metric in ("eval_agreement", "eval_divergence", "eval_nll"):
        assert logged["both"][metric] == pytest.approx(logged["one"][metric], rel=1e-5)
    middle = (logged["one"]["eval_loss"] + logged["second"]["eval_loss"]) / 2
    assert logged["both"]["eval_loss"] == pytest.approx(middle, rel=1e-5)
    assert logged["one"]["eval_loss"] != pytest.approx(logged["second"]["eval_loss"], rel=1e-3)


def test_data_is_mixed_every_row_once_or_in_proportion(make):
    caches = [make("a", TopK(4), per_shard=30), make("b", TopK(4), per_shard=10, classes=320)]
    rows = JoinedDataset(caches, "train", window=64)
    assert len(rows) == 80
    assert [rows[i].example.source_row for i in (0, 59, 60, 79)] == [0, 59, 0, 19]
    assert list(rows.column("source_row")[[59, 60]]) == [59, 0]
    taken = [i for batch in BatchOrder(rows, 8, seed=0) for i in batch]
    assert sorted(taken) == list(range(80))
    shares = Proportions((0, 60, 80), (0.5, 0.5), None, seed=0)
    order = BatchOrder(rows, 8, seed=0, keep=shares)
    seen, each = Counter(), []
    for epoch in range(6):
        order.set_epoch(epoch)
        part = [i for batch in order for i in batch]
        assert len(part) == 40
        assert len(order) == 5
        assert sum(i >= 60 for i in part) == 20
        assert part == [i for batch in order for i in batch]
        seen.update(part)
        each.append(frozenset(part))
    assert set(seen) == set(range(80))  # all rows of the larger cache occur in turn
    assert {seen[i] for i in range(60)} == {2}
    assert len(set(each)) > 1


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.starts[-1])


def test_ranks_take_the_same_rows_of_mixed_data():
    rows = Rows(starts=np.cumsum([0, *[7] * 30]), manifest=SimpleNamespace(cache_id="a" * 64), remote=None)
    shares = Proportions((0, 140, 210), (0.8, 0.2), None, seed=1)
    alone = [sorted(b) for b in BatchOrder(rows, 16, seed=0, keep=shares)]
    ranks = [list(BatchOrder(rows, 8, seed=0, keep=shares, rank=r, world_size=2)) for r in (0, 1)]
    together = [sorted(i for batch in step for i in batch if i >= 0) for step in zip(*ranks, strict=True)]
    assert together == alone


def test_a_student_trains_on_two_data_sets_and_resumes(tmp_path, make, lm_tokenizer):
    caches = [make("a", TopK(4), per_shard=30), make("b", TopK(4), per_shard=10)]
    path = student(tmp_path, lm_tokenizer)
    settings = {"proportion": (1.0, 3.0), "training": {"save_steps": 3, "save_strategy": "steps"}}
    whole = train(caches, path, tmp_path / "whole", **settings)
    assert [(m.kind, m.share) for m in whole.mixed] == [("data", 0.25), ("data", 0.75)]
    resumed = train(caches, path, tmp_path / "whole", resume=True, **{**settings, "max_steps": 9})
    assert resumed.steps == 9
    with pytest.raises(ContractError, match="--resume: the checkpoints are of another run: mixed"):
        train(caches, path, tmp_path / "whole", resume=True, **{**settings, "proportion": (1.0, 2.0)})
    with pytest.raises(MisuseError, match="--batch-tokens"):
        train(caches, path, tmp_path / "x", proportion=(1.0, 3.0), batch_tokens=100)


def test_what_does_not_align_is_refused(tmp_path, make, lm_tokenizer, bert_tokenizer):
    first, fewer = make("a", TopK(4)), make("b", TopK(4), shards=1)
    path = student(tmp_path, lm_tokenizer)
    with pytest.raises(MisuseError, match=r"--mix teachers .* or --mix data"):
        train([first, fewer], path, tmp_path / "x")
    with pytest.raises(ContractError, match="each of the 40 rows that the first cache has, found 20 missing"):
        train([first, fewer], path, tmp_path / "x", mix="teachers")
    with pytest.raises(ContractError, match="number of classes: expected 320"):
        train([first, make("c", TopK(4), classes=41)], path, tmp_path / "x", mix="data")
    with pytest.raises(ContractError, match="encoding: expected"):
        train([first, make("d", TopK(5))], path, tmp_path / "x", mix="data")
    with pytest.raises(EncodingError, match="serves 1"):
        train([first, make("e", Sampled(6.0))], path, tmp_path / "x", mix="teachers", temperature=2.0)
    with pytest.raises(EncodingError, match="not linear"):
        train([first, make("f", Sampled(6.0))], path, tmp_path / "x", mix="teachers", divergence="reverse-kl")
    with pytest.raises(MisuseError, match="--teacher-weight: expected 2 above 0"):
        make_mixture([first, fewer], "teachers", (1.0, 0.0))
    other = build_cache(tmp_path / "bert", bert_tokenizer, encoding=TopK(4), classes=len(bert_tokenizer))
    fitting = make("g", TopK(4), classes=len(bert_tokenizer))
    with pytest.raises(ContractError, match="tokenizer: expected"):
        make_mixture([fitting, other], "data", ())
    for wrong in ({"mix": "teachers"}, {"proportion": (1.0,)}):
        with pytest.raises(MisuseError, match="go with several --cache"):
            TrainStudentConfig(cache=("a",), student="s", output="o", **wrong)
    with pytest.raises(MisuseError, match="use one of them"):
        TrainStudentConfig(cache=("a", "b"), student="s", output="o", teacher_weight=(1, 1), mix="data")


def test_teachers_of_other_positions_are_refused(make):
    cache = make("a", TopK(4))
    row = cache.dataset("train")[0]
    other = dataclasses.replace(row, example=dataclasses.replace(row.example, supervised=~row.example.supervised))
    collator = TeachersCollator(Collator(get_task("causal-lm"), cache.tokenizer, 1.0), (0.5, 0.5))
    with pytest.raises(ContractError, match="source row 0: the teachers labelled different positions"):
        collator.collate(Picked(([(block_from(row), 0, 1)], [(block_from(other), 0, 1)]), np.array([True])))


def test_teachers_in_another_order_of_rows(tmp_path, make):
    """The second cache has more rows in other shards; rows are paired by content."""
    larger = make("a", TopK(4), per_shard=15, shards=3)
    smaller = filter_rows(larger, tmp_path / "few", where="source_row % 3 = 1")
    rows = AlignedDataset([Cache.open(smaller.root), larger], "train", window=2)
    assert len(rows) == 15
    for i in range(15):
        one, other = rows[i]
        assert one.content_hash == other.content_hash
        assert one.example.source_row == other.example.source_row == 3 * i + 1


def test_the_command(tmp_path, make, lm_tokenizer):
    one, other = make("a", TopK(4)), make("b", TopK(6))
    command = ["train-student", "--student", student(tmp_path, lm_tokenizer), "--output", str(tmp_path / "out")]
    command += [
        "--cache",
        str(one.root),
        "--cache",
        str(other.root),
        "--teacher-weight",
        "0.7",
        "--teacher-weight",
        "0.3",
    ]
    done = CliRunner().invoke(main, [*command, "--max-steps", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.stdout


def test_a_share_that_leaves_no_row_and_a_cache_without_rows_are_told_apart():
    with pytest.raises(TrainingError, match=r"--proportion: cache 2 has no row to learn from \(of 2"):
        Proportions((0, 4, 4), (0.5, 0.5), None, 0)(0)
    keep = np.array([False, False, True, True])
    with pytest.raises(TrainingError, match="cache 1 has no row to learn from"):
        Proportions((0, 2, 4), (0.5, 0.5), keep, 0)(0)
    with pytest.raises(TrainingError, match=r"cache 1 has no row in an epoch of 4\.0 rows, .*its share is 0\.01"):
        Proportions((0, 400, 404), (0.01, 0.99), None, 0)(0)
