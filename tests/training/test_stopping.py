"""A finished or unfinished student is only replaced on request.

SIGTERM saves a checkpoint, and the same command resumes from it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import pipeline as softlabel
from pipeline.config import TrainStudentConfig
from pipeline.errors import ContractError, MisuseError
from pipeline.training import stopping
from pipeline.training.run import run
from pipeline.training.stopping import CheckpointOnSigterm
from tests.conftest import tiny_model
from tests.support.once import once
from tests.support.processes import python


@pytest.fixture
def settings(tmp_path, lm_tokenizer, documents) -> TrainStudentConfig:
    def make(folder: Path) -> None:
        teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
        teacher.save_pretrained(folder / "teacher")
        lm_tokenizer.save_pretrained(folder / "teacher")
        softlabel.cache_logits(
            teacher, documents, folder / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
        )
        softlabel.init_student(folder / "teacher", folder / "student", layers=[0])

    once(__name__, make, tmp_path)
    return TrainStudentConfig(
        cache=(str(tmp_path / "cache"),),
        student=str(tmp_path / "student"),
        output=str(tmp_path / "out"),
        max_steps=4,
        batch_size=4,
        training={"save_steps": 2},
    )


def unfinish(output: Path) -> None:
    """Restore the state of a run that was killed after its second step."""
    for name in ("model.safetensors", "config.json", "distillation.json", "README.md"):
        (output / name).unlink()
    shutil.rmtree(output / "checkpoint-4")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def content(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_student_is_not_replaced_unasked_and_an_unfinished_one_goes_on(settings, tmp_path, caplog):
    out = tmp_path / "out"
    run(settings)
    whole, before = weights(out), content(out)
    with pytest.raises(MisuseError, match=rf"{out}: holds a finished student; .*--resume .*--overwrite"):
        run(settings)
    with pytest.raises(MisuseError, match="finished student"):  # a student with other settings too
        softlabel.train_student(tmp_path / "cache", settings.student, out)
    assert content(out) == before

    unfinish(out)
    before = content(out)
    for changed, named in (
        ({"soft_weight": 0.9}, r"loss\.soft_weight"),
        ({"seed": 1}, "seed"),
        ({"max_steps": 6}, r"course\.max_steps: expected 4, found 6.*--resume"),
        ({"training": {"save_steps": 2, "weight_decay": 0.1}}, r"course\.weight_decay"),
    ):
        with pytest.raises(ContractError, match=f"another run that is not finished: {named}.*--overwrite"):
            run(dataclasses.replace(settings, **changed))
    assert content(out) == before

    with caplog.at_level("INFO", logger="pipeline"):
        assert run(settings).steps == 4
    assert "resuming from checkpoint-2" in caplog.text
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out).items())

    run(dataclasses.replace(settings, overwrite=True, max_steps=3, training={"save_strategy": "no"}))
    assert not list(out.glob("checkpoint-*"))
    (out / "distillation.json").unlink()
    with pytest.raises(MisuseError, match="no checkpoint to resume from"):
        run(settings)
    with pytest.raises(MisuseError, match="give only one of them"):
        dataclasses.replace(settings, overwrite=True, resume=True)


def test_a_finished_student_without_checkpoints_is_not_resumed_to_its_loss(settings, tmp_path):
    once = dataclasses.replace(settings, max_steps=2, training={"save_strategy": "no"})
    run(once)
    before = content(tmp_path / "out")
    with pytest.raises(MisuseError, match="no complete checkpoint to resume from"):
        run(dataclasses.replace(once, resume=True))
    assert content(tmp_path / "out") == before


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from pipeline.cli import main
from pipeline.training import run

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

plain = run.DistillationTrainer.__init__
def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Kill())
run.DistillationTrainer.__init__ = init
main(sys.argv[1:])
"""


def test_sigterm_saves_a_whole_checkpoint_and_the_same_command_goes_on(settings, tmp_path):
    """No checkpoint is due, so that the signal alone writes one."""
    command = f"train-student --cache {settings.cache[0]} --student {settings.student} --max-steps 4 --batch-size 4"
    killed = python("-c", KILLED, *command.split(), "--output", str(tmp_path / "out"))
    assert killed.returncode == 143, killed.stderr
    assert "Traceback" not in killed.stderr
    *_, saved, last = killed.stderr.splitlines()
    assert saved.endswith("saved checkpoint-2")
    assert last.startswith("Error: interrupted;")
    assert "run the same command again to go on" in last
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "out" / "distillation.json").exists()

    plain = dataclasses.replace(settings, training={})
    assert run(plain).steps == 4
    run(dataclasses.replace(plain, output=str(tmp_path / "whole")))
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "out").items())


class _Ended(BaseException):
    pass


@pytest.fixture
def handler():
    """Install a SIGTERM handler before training, as the command line does."""

    def end(*_):
        raise _Ended

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


def interrupted(output: Path, *, times: int, wait: float = 0.0) -> CheckpointOnSigterm:
    with CheckpointOnSigterm(output) as stop:
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(wait)
        stop.reached = True
    return stop


@pytest.mark.parametrize(
    ("ranks", "times", "patience", "reached"),
    [(1, 2, 25, False), (1, 1, 0.05, False), (1, 1, 25, True), (2, 2, 25, True), (2, 1, 0.05, False)],
)
def test_a_second_sigterm_or_a_step_that_does_not_end_ends_at_once(
    tmp_path, handler, monkeypatch, ranks, times, patience, reached
):
    """A signal after the last step ends the run too.

    Under torchrun a repeated signal comes from the launcher and is ignored.
    """
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(stopping, "PATIENCE", patience)
    ended = []
    monkeypatch.setattr(CheckpointOnSigterm, "reached", False, raising=False)
    plain = CheckpointOnSigterm.__exit__
    monkeypatch.setattr(
        CheckpointOnSigterm, "__exit__", lambda self, *error: (ended.append(self.reached), plain(self, *error))[1]
    )
    with pytest.raises(_Ended):
        interrupted(tmp_path, times=times, wait=5.0 if patience < 1 else 0.0)
    assert ended == [reached]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_handler_that_only_takes_note_ends_the_run_all_the_same(settings, monkeypatch):
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    from pipeline.training import run as module

    plain = module.show_progress
    monkeypatch.setattr(
        module, "show_progress", lambda trainer, name: (plain(trainer, name), trainer.add_callback(Stop()))
    )
    try:
        with pytest.raises(SystemExit) as stop:
            run(settings)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (noted, stop.value.code) == ([1], 143)
    assert json.loads(Path(settings.output, "checkpoint-1", "trainer_state.json").read_text())["global_step"] == 1
    assert not Path(settings.output, "distillation.json").exists()
