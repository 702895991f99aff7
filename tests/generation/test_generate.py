"""Generation of a data set by a model.

The result is the same for all workers and after kills, and the next stages can read it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from transformers import AddedToken

import pipeline as softlabel
from pipeline.config import CacheLogitsConfig, DataConfig, TrainStudentConfig
from pipeline.errors import CacheError, ContractError, IntegrityError, MisuseError, ModelError
from pipeline.generation.run import run
from tests.conftest import tiny_model
from tests.support.generations import config, hashes, writing_model  # noqa: F401 - a fixture
from tests.support.processes import forked, python  # noqa: F401 - a fixture


def rows_of(found, split="train"):
    return datasets.load_dataset(str(found.root), split=split).to_list()


@pytest.mark.full
def test_workers_parts_and_this_process_write_the_same_bytes(config, forked, tmp_path):
    serial = run(config("serial"))
    assert len(serial.end.shards) == 5
    assert run(config("parts", part="0/2")) is None
    assert not (tmp_path / "parts" / "generation.json").exists()
    for other in (run(config("workers", num_workers=2)), run(config("parts", part="1/2"))):
        assert other.end == serial.end
        assert hashes(other) == hashes(serial)
        names = {path.relative_to(other.root) for path in other.root.rglob("*.*") if path.is_file()}
        assert names == {path.relative_to(serial.root) for path in serial.root.rglob("*.*") if path.is_file()}
    assert run(config("parts", part="0/2")).end == serial.end  # already finished


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_the_draws_depend_on_no_batch(config, batch_tokens):
    """Draws are equal for all batch sizes in float32, whose rounding changes none of these.

    The sums of log-probabilities differ in their last digits.
    """
    first, other = (rows_of(run(config(f"b{size}", batch_tokens=size))) for size in (128, batch_tokens))
    for one, two in zip(first, other, strict=True):
        assert one.pop("logprob") == pytest.approx(two.pop("logprob"), rel=1e-5)
        assert one == two


def test_the_draws_depend_on_no_shard(config):
    few, many = run(config("few", rows_per_shard=3)), run(config("many", rows_per_shard=100))
    assert [row["input_ids"] for row in rows_of(few)] == [row["input_ids"] for row in rows_of(many)]


def test_seeds_rows_and_samples_differ(config):
    rows = rows_of(run(config("one", max_new_tokens=6)))
    others = rows_of(run(config("two", max_new_tokens=6, seed=1)))
    written = {tuple(row["input_ids"][row["prompt_tokens"] :]) for row in [*rows, *others]}
    assert len(written) > 0.9 * 2 * len(rows)


@pytest.mark.parametrize("number", [1, 8, 12, 17, 31, 37, 40, 41])
def test_killed_anywhere_the_same_command_goes_on(config, tmp_path, number):
    """A run killed at any file is continued, keeps its receipts and ends with the same bytes.

    It is killed at the plan, a shard, a receipt, a shard of the data set, the card and the end.
    """
    settings = config("killed", num_samples=1, max_new_tokens=4, drop=("cut",), rows="0:8")
    code = f"""
import os, signal
from pipeline.cache.storage.crash import hooked
from pipeline.config import GenerateConfig
from pipeline.generation.run import run
seen = []
def hook(point):
    seen.append(point)
    if len(seen) == {number} + 1:
        os.kill(os.getpid(), signal.SIGKILL)
with hooked(hook):
    run({settings!r})
"""
    done = python("-c", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = {path: path.stat().st_mtime_ns for path in Path(settings.output).glob("receipts/[!.]*.json")}
    found = run(settings)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert not list(found.root.rglob(".tmp-*"))
    assert not (found.root / "samples").exists()
    whole = run(config("whole", num_samples=1, max_new_tokens=4, drop=("cut",), rows="0:8"))
    assert found.end == whole.end
    assert {path.name: path.read_bytes() for path in found.root.glob("data/*")} == {
        path.name: path.read_bytes() for path in whole.root.glob("data/*")
    }
    assert (found.root / "README.md").read_bytes() == (whole.root / "README.md").read_bytes()


def test_ended_completions_have_their_end_token_and_cut_ones_have_none(config, lm_tokenizer):
    found = run(config(num_samples=6))
    ends = set(found.end.contract.end_ids)
    assert len(ends) == 8
    reasons = set()
    for row in rows_of(found):
        prompt, written = row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] :]
        assert row["labels"] == [-100] * len(prompt) + written
        assert prompt == lm_tokenizer(row["prompt"])["input_ids"]
        assert len(written) == row["completion_tokens"]
        reasons.add(row["finish_reason"])
        assert row["ids_from"] == "model"
        assert row["logprob"] < 0
        assert not ends & set(written[:-1])
        assert (written[-1] in ends) == (row["finish_reason"] == "eos")
        assert row["finish_reason"] == "eos" or len(written) == 10
        assert row["completion"] == lm_tokenizer.decode(written, skip_special_tokens=True)
    assert reasons == {"eos", "length"}
    counts = found.counts
    assert counts.ended + counts.cut == counts.completions == counts.kept == 18 * 6


def test_log_probabilities_are_those_of_the_model(config, lm_tokenizer):
    """Log-probabilities equal those of one pass over the row, for any temperature and filters."""
    import torch

    model = writing_model(len(lm_tokenizer))
    for row in rows_of(run(config(temperature=0.6, top_p=0.9, rows="0:4"))):
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            plain = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        each = plain.gather(1, ids[0, 1:, None])[row["prompt_tokens"] - 1 :, 0]
        assert row["logprob"] == pytest.approx(float(each.sum()), rel=1e-5)


def test_settings_of_the_models_files_change_no_draw(config, tmp_path, lm_tokenizer, save_teacher):
    """Repetition penalty, filters and temperature of generation_config.json are ignored."""
    model = writing_model(len(lm_tokenizer))
    for name, value in (("repetition_penalty", 1.7), ("top_k", 2), ("temperature", 0.1), ("do_sample", True)):
        setattr(model.generation_config, name, value)
    other = save_teacher(model, lm_tokenizer, "opinionated")
    plain = rows_of(run(config("plain")))
    assert [row["input_ids"] for row in rows_of(run(config("other", model=str(other))))] == [
        row["input_ids"] for row in plain
    ]


def test_a_stop_text_ends_a_completion_and_is_no_part_of_its_text(config, lm_tokenizer):
    found = run(config(stop=("e", "th"), num_samples=8, max_new_tokens=24))
    stopped = [row for row in rows_of(found) if row["finish_reason"] == "stop"]
    assert stopped
    assert found.counts.stopped > 0
    for row in rows_of(found):
        assert "e" not in row["completion"]
        assert "th" not in row["completion"]
    for row in stopped:
        written = lm_tokenizer.decode(row["input_ids"][row["prompt_tokens"] :], skip_special_tokens=True)
        assert written.startswith(row["completion"])
        assert written[len(row["completion"]) :].startswith(("e", "th"))
        assert not {"e", "th"} & {lm_tokenizer.decode(row["input_ids"][row["prompt_tokens"] : -1])}


def test_what_is_written_is_labelled_and_learnt_by_its_ids(config, tmp_path, lm_tokenizer, save_teacher):
    """Runs generate, cache-logits on token ids, and train-student.

    Exactly the tokens of the completions are supervised.
    """
    from pipeline.capture.run import run as capture
    from pipeline.training.run import run as train

    found = run(config(num_samples=3))
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer), seed=5), lm_tokenizer, "teacher")
    cache = capture(
        CacheLogitsConfig(
            task="causal-lm",
            teacher=str(teacher),
            data=DataConfig(dataset=str(found.root), input_ids_column="input_ids", labels_column="labels"),
            output=str(tmp_path / "cache"),
        )
    )
    written = rows_of(found)
    cached = list(cache.dataset("train"))
    assert len(cached) == len(written)
    for row, one in zip(written, cached, strict=True):
        assert one.example.input_ids.tolist() == row["input_ids"]
        positions = np.flatnonzero(one.example.supervised)
        assert positions.tolist() == list(range(row["prompt_tokens"] - 1, len(row["input_ids"]) - 1))
    assert sum(shard.positions for shard in cache.manifest.shards) == found.counts.tokens
    student = save_teacher(tiny_model("llama", len(lm_tokenizer), seed=9), lm_tokenizer, "student")
    train(
        TrainStudentConfig(
            cache=(str(tmp_path / "cache"),), student=str(student), output=str(tmp_path / "trained"), max_steps=2
        )
    )
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_a_live_model_and_data_in_memory(lm_tokenizer, tmp_path):
    """The model keeps its training mode and generation settings."""
    model = writing_model(len(lm_tokenizer)).train()
    before = model.generation_config
    settings = {"tokenizer": lm_tokenizer, "max_new_tokens": 5, "num_samples": 2}
    found = softlabel.generate(model, ["the cat", "a dog"], tmp_path / "a", **settings)
    assert model.training
    assert model.generation_config is before
    assert found.counts.completions == 4
    data = Dataset.from_dict({"prompt": ["the cat", "a dog"]})
    assert softlabel.generate(model, {"train": data}, tmp_path / "b", **settings).end == found.end
    assert softlabel.generate(model, ["the cat", "a dog"], tmp_path / "a", **settings).end == found.end
    with pytest.raises(MisuseError, match="a live model needs its tokenizer"):
        softlabel.generate(model, ["the cat"], tmp_path / "c")
    with pytest.raises(MisuseError, match="workers load models and data sets by name"):
        softlabel.generate(model, ["the cat"], tmp_path / "c", tokenizer=lm_tokenizer, num_workers=2)


def test_other_settings_and_other_files_are_refused(config, tmp_path):
    run(config(rows="0:4"))
    with pytest.raises(
        ContractError, match=r"out: holds another generation: contract.sampling.temperature: expected 1"
    ):
        run(config(rows="0:4", temperature=0.5))
    with pytest.raises(ContractError, match=r"contract\.source\.fingerprints"):
        run(config())
    assert run(config(rows="0:4", temperature=0.5, overwrite=True)).end.contract.sampling.temperature == 0.5
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match=r"no generated data set|deletes generated data sets only"):
            run(config("full", overwrite=overwrite))
    with pytest.raises(MisuseError, match="generate writes to a directory"):
        run(dataclasses.replace(config(), output="s3://bucket/x"))


def test_a_cache_and_a_generated_data_set_never_replace_each_other(config, tmp_path, lm_tokenizer):
    found = run(config(rows="0:4"))
    settings = CacheLogitsConfig(
        task="causal-lm",
        teacher=config().model,
        data=DataConfig(dataset=str(found.root), input_ids_column="input_ids", labels_column="labels"),
        output=str(found.root),
        overwrite=True,
    )
    from pipeline.capture.run import run as capture

    with pytest.raises(CacheError, match="deletes caches only"):
        capture(settings)
    assert run(config(rows="0:4")).end == found.end


def test_a_damaged_data_set_is_told(config):
    found = run(config(rows="0:4"))
    path = found.root / "data" / f"{found.end.shards[0].name}.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"differs from generation.json; .* --overwrite"):
        run(config(rows="0:4"))
    assert run(config(rows="0:4", overwrite=True)).end == found.end


def test_the_first_prompt_and_completion_are_shown(config, caplog):
    with caplog.at_level(logging.INFO, "pipeline"):
        run(config(rows="0:4"))
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("first prompt of train (") for line in said)
    assert any(line.startswith("its first completion (") for line in said)
    assert said[-1].startswith(f"{config().output}: 16 of 16 completions kept: 0 empty, ")
    assert "none dropped (see --drop)" in said[-1]


@pytest.mark.parametrize("text", ["the cat", "the cat sat on a mat " * 9])
def test_a_model_that_reads_its_padding_is_refused_whatever_its_prompts(text, lm_tokenizer, tmp_path):
    """Also for prompts that are longer than the 64 tokens that are compared."""
    model = writing_model(len(lm_tokenizer))
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args, **kwargs):
        return whole(*args, **{**kwargs, "attention_mask": None, "position_ids": None})

    model.forward = forward
    settings = {"tokenizer": lm_tokenizer, "max_new_tokens": 2}
    with pytest.raises(ModelError, match=r"differ by .* with padding on the left"):
        softlabel.generate(model, [text], tmp_path / "a", **settings)


def test_a_stop_that_is_a_special_token_is_an_end(lm_tokenizer, tmp_path, caplog):
    """Decoded completions omit special tokens, so the id ends the completion; it is supervised."""
    tokenizer = copy.deepcopy(lm_tokenizer)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    token = tokenizer.convert_tokens_to_ids("<|turn|>")
    model = writing_model(len(tokenizer), ends=0)
    model.generation_config.eos_token_id = [1]
    settings = {"tokenizer": tokenizer, "max_new_tokens": 24, "num_samples": 40, "temperature": 2.0}
    with caplog.at_level(logging.INFO, "pipeline"):
        found = softlabel.generate(model, ["the cat"], tmp_path / "a", stop=("<|turn|>",), **settings)
    assert f"--stop <|turn|> is a special token (id {token}): it ends a completion" in caplog.text
    assert found.end.contract.end_ids == (1, token)
    rows = [row["input_ids"][row["prompt_tokens"] :] for row in rows_of(found)]
    assert any(row[-1] == token for row in rows)
    assert not any(token in row[:-1] for row in rows)
    assert all((row["finish_reason"] == "eos") == (row["input_ids"][-1] in (1, token)) for row in rows_of(found))
