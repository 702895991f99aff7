"""Stored alignments: damaged files, read-only directories, workers, unknown tokens."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.config import EvaluateConfig
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.cross_tokenizer.view import RetokenizedCache
from pipeline.errors import CacheError, ContractError, EncodingError
from pipeline.evaluation import evaluate
from pipeline.evaluation.run import run as run_evaluate
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator, TrainingRows
from pipeline.training.run import run as train
from tests.conftest import tiny_model
from tests.cross_tokenizer.test_training import (  # noqa: F401
    byte_level,
    cached,
    own_cache_directory,
    student,
    train_config,
)
from tests.support.captures import config  # noqa: F401


def view_of(cache, path: Path, split: str = "train") -> RetokenizedCache:
    found = cache_for(cache, str(path), split)
    assert isinstance(found, RetokenizedCache)
    return found


def rows_of(view) -> list[tuple[list[int], list[int]]]:
    return [
        (block.lists["input_ids"].values.tolist(), block.lists["teacher_position"].values.tolist())
        for block in view.dataset("train").blocks(8)
    ]


def test_a_truncated_file_is_made_again_and_said(tmp_path, cached, caplog):
    path = student(tmp_path, byte_level(290))
    view = view_of(cached, path)
    rows = rows_of(view)
    file = view.kept.path(cached.manifest.split_shards("train")[0].name)
    for damage in (file.read_bytes()[: file.stat().st_size // 2], b"", b"PAR1 nothing PAR1"):
        file.write_bytes(damage)
        caplog.clear()
        assert rows_of(view_of(cached, path)) == rows
        assert f"{file}: is damaged and is computed again" in caplog.text


def test_a_file_of_other_rows_is_made_again(tmp_path, cached, caplog):
    path = student(tmp_path, byte_level(290))
    view = view_of(cached, path)
    rows = rows_of(view)
    test = view_of(cached, path, "test").kept.path(cached.manifest.split_shards("test")[0].name)
    file = view.kept.path(cached.manifest.split_shards("train")[0].name)
    file.write_bytes(test.read_bytes())
    assert rows_of(view_of(cached, path)) == rows
    assert "is damaged" in caplog.text


def test_changed_bytes_are_refused_in_a_line(tmp_path, cached):
    path = student(tmp_path, byte_level(290))
    file = view_of(cached, path).kept.path(cached.manifest.split_shards("train")[0].name)
    whole = file.read_bytes()
    for at in (40, len(whole) // 3):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        file.write_bytes(bytes(changed))
        with pytest.raises(CacheError, match=r"is damaged \(.*delete it, and the same command makes it again"):
            view_of(cached, path)


def test_a_damaged_map_is_made_again(tmp_path, cached, caplog):
    path = student(tmp_path, byte_level(290))
    view = view_of(cached, path)
    first_token = view.vocabulary_map.first_token.tolist()
    file = view.kept.directory / "map.npz"
    whole = file.read_bytes()
    for damage in (b"", whole[:100], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        file.write_bytes(damage)
        caplog.clear()
        assert view_of(cached, path).vocabulary_map.first_token.tolist() == first_token
        assert "map.npz: is damaged and is computed again" in caplog.text
        assert file.read_bytes() == whole


def test_a_directory_that_cannot_be_written_is_said_in_a_line(tmp_path, cached, monkeypatch):
    path = student(tmp_path, byte_level(290))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"file/softlabel/cross-tokenizer/.*cannot be written"):
        cache_for(cached, str(path), "train")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, cached):
    tokenizer = byte_level(290)
    path = tmp_path / "small"
    tiny_model("llama", len(tokenizer) - 20, seed=3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    with pytest.raises(ContractError, match=r"writes the text with token \d+: expected tokens below 270"):
        cache_for(cached, str(path), "train")


def test_another_longest_row_is_kept_apart(tmp_path, cached):
    short, long = (student(tmp_path, byte_level(290), f"of-{n}", max_position_embeddings=n) for n in (40, 300))
    one, other = view_of(cached, short), view_of(cached, long)
    assert one.kept.directory != other.kept.directory
    assert one.dataset("train").num_tokens().max() == 40 < other.dataset("train").num_tokens().max()


@pytest.mark.parametrize("how", ["worker", "pickled"])
def test_workers_read_the_same_batches(tmp_path, cached, how):
    """A worker process that is spawned receives its rows and collator pickled."""
    view = view_of(cached, student(tmp_path, byte_level(290)))
    collator = Collator(get_task("causal-lm"), view.tokenizer, 1.0, pad_id=0, vocabulary_map=view.vocabulary_map)
    rows = TrainingRows(view.dataset("train"))
    alone = DataLoader(rows, batch_size=8, collate_fn=collator)
    given, number = (rows, collator), 1
    if how == "pickled":
        given, number = pickle.loads(pickle.dumps(given)), 0
    by_workers = DataLoader(given[0], batch_size=8, collate_fn=given[1], num_workers=number)
    for one, other in zip(alone, by_workers, strict=True):
        assert torch.equal(one["inputs"]["input_ids"], other["inputs"]["input_ids"])
        assert torch.equal(one["target"]["weights"], other["target"]["weights"])
        assert torch.equal(one["labels"], other["labels"])


def test_evaluate_keeps_rows_where_it_is_told(tmp_path, cached):
    path = student(tmp_path, byte_level(290))
    run_evaluate(
        EvaluateConfig(cache=str(tmp_path / "cache"), student=(str(path),), cache_dir=str(tmp_path / "elsewhere"))
    )
    assert list((tmp_path / "elsewhere" / "cross-tokenizer").glob("*/*.parquet"))
    assert not (tmp_path / "xdg" / "softlabel" / "cross-tokenizer").exists()


def test_where_nothing_is_learnt_from_the_teacher_few_aligned_positions_are_no_error(
    tmp_path, cached, monkeypatch, caplog
):
    monkeypatch.setattr("pipeline.cross_tokenizer.opening._TOO_FEW", 1.1)
    path = student(tmp_path, byte_level(290))
    caplog.set_level(logging.INFO)
    with pytest.raises(ContractError, match="learn almost nothing"):
        train(train_config(tmp_path, path))
    with pytest.raises(ContractError, match="learn almost nothing"):
        train(train_config(tmp_path, path, soft_weight=0.0, hard_labels="teacher"))
    assert train(train_config(tmp_path, path, soft_weight=0.0, epochs=1)).soft_loss is None
    report = evaluate(cached, {"it": str(path)})
    assert report.students[0].metrics["bits_per_byte"] > 0
    assert "are aligned with the teacher's" in caplog.text


def test_a_divergence_over_the_same_classes_is_refused(tmp_path, config):
    from pipeline.capture.run import run as capture

    capture(config("cache", encoding="full"))
    path = student(tmp_path, byte_level(290))
    with pytest.raises(EncodingError, match=r"--divergence logit-mse: .*another tokenizer.*use forward-kl"):
        train(train_config(tmp_path, path, divergence="logit-mse"))
