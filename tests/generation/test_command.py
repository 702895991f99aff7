"""The command `softlabel generate`: output, dry run, YAML file and one-line errors."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from pipeline.cli import main
from tests.support.generations import config  # noqa: F401 - a fixture


def flags_of(settings) -> list[str]:
    return [
        "--model",
        settings.model,
        "--dataset",
        settings.dataset,
        "--output",
        settings.output,
        "--max-new-tokens",
        "6",
    ]


def test_it_prints_one_line_and_goes_on_where_it_was_stopped(config, caplog):
    command = ["generate", *flags_of(config()), "--num-samples", "3", "--split", "test"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"data set: {config().output}  12 of 12 completions (test), ")
    assert len(done.stdout.splitlines()) == 1
    assert "first prompt of test (" in caplog.text
    assert "12 of 12 completions kept: 0 empty" in caplog.text
    again = CliRunner().invoke(main, command)
    assert again.stdout == done.stdout
    assert "is finished already; nothing to do" in caplog.text


def test_a_dry_run_shows_the_first_prompt_and_the_plan_and_writes_nothing(config, caplog):
    done = CliRunner().invoke(main, ["generate", *flags_of(config()), "--top-p", "0.9", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert not Path(config().output).exists()
    assert "first prompt of train" in caplog.text
    assert "its first completion" not in caplog.text
    for line in ("train 14 rows, test 4 rows", "temperature 1, top-p 0.9, seed 0", "18 completions, up to 108 tokens"):
        assert line in done.stdout, done.stdout
    assert CliRunner().invoke(main, ["generate", *flags_of(config()), "--rows", "0:1"]).exit_code == 0
    clash = CliRunner().invoke(main, ["generate", *flags_of(config()), "--dry-run"])
    assert clash.exit_code == 1
    assert "holds another generation" in clash.stderr


def test_settings_in_a_file(config, tmp_path, caplog):
    settings = config()
    (tmp_path / "run.yaml").write_text(
        f"generate: {{model: {settings.model}, dataset: {settings.dataset}, output: {settings.output}, "
        "max-new-tokens: 4, stop: [e], rows: '0:2', drop: [empty, duplicate]}\n"
    )
    done = CliRunner().invoke(main, ["generate", "--config", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    assert "dropped (--drop empty --drop duplicate)" in caplog.text


def test_mistakes_are_one_line(config, tmp_path):
    for flags, line in (
        (["--temperature", "0", "--num-samples", "2"], "all 2 samples of a prompt would be the same"),
        (["--prompt-column", "question"], "no column 'question'"),
        (["--template", str(tmp_path / "none"), "--num-examples", "3"], "cannot be read"),
    ):
        done = CliRunner().invoke(main, ["generate", *flags_of(config()), *flags])
        assert done.exit_code in (1, 2)
        *_, last = done.stderr.splitlines()
        assert last.startswith("Error: ")
        assert line in last
