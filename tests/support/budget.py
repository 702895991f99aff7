"""Time budget of each test file in seconds.

Files with the largest budgets run first, and the end of a run lists those that exceeded theirs.

The figures are for one process on the 2-core machine that the project is tested on, with a margin
for noise. No test fails for exceeding its budget; the table shows where a slow run spent its time.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.profile import FULL

#: Budget of a file that is not listed.
OTHERS = 6.0
BUDGET = {
    "tests/capture/engines/test_engines.py": 60.0,
    "tests/capture/test_capture.py": 40.0,
    "tests/training/test_trainer.py": 40.0,
    "tests/sweep/test_sweep.py": 30.0,
    "tests/training/test_train.py": 30.0,
    "tests/training/test_scores.py": 30.0,
    "tests/training/test_masked.py": 25.0,
    "tests/training/test_seq2seq.py": 30.0,
    "tests/training/test_images.py": 40.0,
    "tests/training/test_choices.py": 25.0,
    "tests/training/test_question_answering.py": 30.0,
    "tests/test_cli.py": 30.0,
    "tests/test_first_hour.py": 25.0,
    "tests/capture/test_machine.py": 25.0,
    "tests/evaluation/report/test_report.py": 25.0,
    "tests/generation/test_generate.py": 30.0,
    "tests/capture/teachers/test_served.py": 25.0,
    "tests/faults/test_faults.py": 20.0,
    "tests/test_rounds.py": 25.0,
    "tests/capture/test_rows_and_outputs.py": 20.0,
    "tests/evaluation/measures/test_cost.py": 15.0,
    "tests/starter/test_run.py": 15.0,
    "tests/sharing/test_hub.py": 15.0,
    "tests/sharing/test_share.py": 15.0,
    "tests/generation/test_served.py": 12.0,
    "tests/capture/test_estimate.py": 12.0,
    "tests/capture/test_judged_captures.py": 15.0,
    "tests/capture/test_label_logprobs.py": 15.0,
    "tests/capture/test_stored_texts.py": 20.0,
    "tests/tasks/test_texts.py": 10.0,
    "tests/cross_tokenizer/test_train.py": 15.0,
    "tests/cross_tokenizer/test_training.py": 20.0,
    "tests/cross_tokenizer/test_options.py": 20.0,
    "tests/cross_tokenizer/test_rows.py": 10.0,
    "tests/cross_tokenizer/test_kept.py": 15.0,
    "tests/cross_tokenizer/test_ranks.py": 20.0,
    "tests/cross_tokenizer/test_chats.py": 10.0,
    "tests/evaluation/report/test_report_tokenizers.py": 30.0,
    "tests/sweep/test_tokenizers.py": 15.0,
    "tests/cache/reading/test_hostile.py": 12.0,
    "tests/training/test_remote.py": 12.0,
    "tests/training/test_distributed.py": 18.0,
    "tests/training/test_spans.py": 12.0,
    "tests/training/test_words.py": 10.0,
    "tests/training/test_several_labels.py": 10.0,
    "tests/cache/transforms/test_transforms.py": 12.0,
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
