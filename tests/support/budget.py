"""Time budget of each test file in seconds.

Files with the largest budgets run first, and the end of a run lists those that exceeded theirs.

The figures are for `make test`, one process, on the 2-core machine that the project is tested on,
with a margin for noise. No test fails for exceeding its budget; the table shows where a slow run
spent its time.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.profile import FULL

#: Budget of a file that is not listed.
OTHERS = 6.0
BUDGET = {
    "tests/test_page_commands.py": 45.0,  # with `make test-full` only
    "tests/capture/teachers/test_served.py": 35.0,
    "tests/test_first_hour.py": 27.5,
    "tests/capture/test_capture.py": 25.0,
    "tests/generation/test_generate.py": 22.5,
    "tests/capture/engines/test_engines.py": 20.0,
    "tests/training/test_train.py": 20.0,
    "tests/training/test_scores.py": 20.0,
    "tests/test_cli.py": 20.0,
    "tests/cache/reading/test_hostile.py": 17.5,
    "tests/generation/test_served.py": 17.5,
    "tests/capture/test_judged_captures.py": 17.5,
    "tests/sweep/test_sweep.py": 15.0,
    "tests/evaluation/report/test_report.py": 15.0,
    "tests/cross_tokenizer/test_training.py": 15.0,
    "tests/sharing/test_hub.py": 12.5,
    "tests/training/test_images.py": 12.5,
    "tests/training/test_trainer.py": 12.5,
    "tests/models/test_weights.py": 12.5,
    "tests/capture/test_rows_and_outputs.py": 10.0,
    "tests/cross_tokenizer/test_options.py": 10.0,
    "tests/capture/test_estimate.py": 10.0,
    "tests/capture/test_audit.py": 10.0,
    "tests/training/test_masked.py": 10.0,
    "tests/training/test_seq2seq.py": 10.0,
    "tests/capture/test_label_logprobs.py": 10.0,
    "tests/training/test_question_answering.py": 7.5,
    "tests/sharing/test_share.py": 7.5,
    "tests/test_base_model.py": 7.5,
    "tests/training/test_words.py": 7.5,
    "tests/training/test_teacher.py": 7.5,
}

#: Number of files that the table always shows.
SHOWN = 10

_seconds: Counter[str] = Counter()


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no process is left with one at the end.

    The order within a file is kept. Tests with the marker `full` are skipped in other runs.
    """
    if not FULL:
        for item in items:
            if item.get_closest_marker("full") is not None:
                item.add_marker(pytest.mark.skip(reason="runs with make test-full"))
    items.sort(key=lambda item: -BUDGET.get(_file(item.nodeid), OTHERS))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up setup, call and teardown; with xdist, in the controller."""
    _seconds[_file(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the slowest files, and every file that exceeded its budget."""
    total = sum(_seconds.values())
    if total < OTHERS:
        return
    terminalreporter.section("seconds by file")
    for place, (file, seconds) in enumerate(_seconds.most_common()):
        budget = BUDGET.get(file, OTHERS)
        if place < SHOWN or seconds > budget:
            over = "  over budget" if seconds > budget else ""
            terminalreporter.write_line(f"{seconds:7.1f} of {budget:5.1f}  {file}{over}")
    terminalreporter.write_line(f"{total:7.1f}           {len(_seconds)} files, all processes together")
