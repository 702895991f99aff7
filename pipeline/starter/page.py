"""Write the YAML file: findings are comments, choices are keys."""

from __future__ import annotations

import glob
import json
import math
import os
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from pipeline.starter.cautions import is_range, label_cautions, text_cautions
from pipeline.starter.records import Start
from pipeline.starter.roles import summary
from pipeline.starter.times import cache_time, student_time, teacher_time

_WIDTH = 100
#: Number of evaluated rows from which the margin of error of an accuracy is at most 5 points.
_MANY = 400
_LONG = 256


def make_page(start: Start) -> str:
    """The YAML file as text."""
    parts = [_head(start), _data(start)]
    if not start.is_teacher:
        parts.append(_train_teacher(start))
    parts += [_cache(start), _init_student(start), _students(start), _evaluate(start)]
    if start.measured:
        parts.append(_report(start))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def scalar(value: object) -> str:
    """Format a value as one line of YAML."""
    found = str(yaml.safe_dump(value, allow_unicode=True, width=1 << 20, default_flow_style=True))
    found = found.split("\n...")[0].strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in found else found


def comment(text: str, indent: int = 0) -> list[str]:
    """Format a text as lines of a comment; line breaks from the data are removed."""
    lead = " " * indent + "# "
    return [lead + line for line in textwrap.wrap(" ".join(text.split()), _WIDTH - len(lead), break_on_hyphens=False)]


def _head(start: Start) -> list[str]:
    what = "a language model" if start.generative else "a classifier"
    lines = [
        *comment(f"Distil {what} into a smaller student. Written by {start.command}"),
        *comment(
            f"Run every stage: softlabel run {shlex.quote(start.path)}. A stage that is done is skipped; "
            "change what you like and run it again."
        ),
        *comment(
            "Paths are relative to the directory in which softlabel is started, data_files to dataset. Keys are flags of the "
            "commands: softlabel help train-student lists them."
        ),
    ]
    if start.speed is not None:
        measured = start.speed.is_measured
        lines += comment(
            "Times are for this machine with nothing else running, from one batch of the model timed "
            "on it: right within a factor of two."
            if measured
            else "Times are rough: worked out from the size of the model, which is not on this machine "
            "or too large to time."
        )
    else:
        lines += comment("No times: the model is not on this machine, and the hub was not reached.")
    return [*lines, f"task: {start.task}"]


def _data(start: Start) -> list[str]:
    data, counts = start.data, start.counts
    lines = ["data:"]
    if data.data_files:
        lines += comment("The directory that the files below lie in.", 2)
    lines.append(f"  dataset: {scalar(data.dataset)}")
    if data.dataset_config is not None:
        lines.append(f"  dataset_config: {scalar(data.dataset_config)}")
    if data.data_files:
        if not start.generative:
            lines += comment(
                f"Rows of a file without the column {start.roles.label!r}, or with nothing in it, have no label.", 2
            )
        if start.moved:
            lines += comment(moved_line(start), 2)
        lines.append("  data_files:")
        files: dict[str, list[str]] = {}
        for item in data.data_files:
            split, _, pattern = item.partition("=")
            files.setdefault(split, []).append(pattern)
        for split, patterns in files.items():
            lines += [
                f"    {split}:",
                *(f"      - {scalar(pattern)}{_of_file(start, pattern)}" for pattern in patterns),
            ]
    if data.split:
        lines += comment(moved_line(start), 2)
        lines.append(f"  split: {scalar(list(data.split))}")
    if data.holdout:
        lines += comment(
            "There is no split test: this share of train is set aside as one, chosen by content; "
            "equal texts stay together.",
            2,
        )
        lines.append(f"  holdout: {data.holdout}")
    for split in counts.splits:
        lines += comment(split_line(start, split), 2)
    lines += _columns(start)
    lines += comment(length_line(start), 2)
    lines.append(f"  max_length: {data.max_length}")
    return lines


def _of_file(start: Start, pattern: str) -> str:
    """A remark for the line of a file."""
    for name, rows in start.unlabelled_files.items():
        if glob.escape(os.path.relpath(Path(name).expanduser(), start.data.dataset)) == pattern:
            return f"  # {rows:,} rows without a label"
    return ""


def few_line(start: Start) -> str:
    """A note on the margin of error if few rows are labelled for evaluation; else empty."""
    if start.generative or not 0 < start.measured < _MANY:
        return ""
    points = 98 / math.sqrt(start.measured)
    return (
        f"Only {start.measured:,} labelled rows in {start.evaluated}: an accuracy near 50% has a margin of error of "
        f"{points:.0f} points. Label more rows, or give test more rows."
    )


def moved_line(start: Start) -> str:
    """A note on the use of a split `test` without labels; empty if there is none."""
    if start.moved:
        return f"The split {start.moved[0]} has no labels to measure with: its rows are read with those of train."
    return "The split test has no labels to measure with and is left out." if start.data.split else ""


def split_line(start: Start, split: str) -> str:
    """The number of rows of a split, with labelled, empty and repeated rows."""
    found = start.counts.splits[split]
    sampled = "" if found.read == found.rows else f" (of a sample of {found.read:,})"
    parts = [f"{split}: {found.rows:,} rows"]
    if not start.generative:
        parts.append(f"{found.labelled:,} with a label{sampled}")
    if found.empty:
        parts.append(f"{found.empty:,} empty, which are left out")
    if found.repeated:
        parts.append(f"{found.repeated:,} that repeat another")
    unused = "" if split in ("train", "validation", "test") else " It is cached, and nothing is trained on it."
    return ", ".join(parts) + "." + unused


def _columns(start: Start) -> Iterator[str]:
    roles, data = start.roles, start.data
    keys = ("text", "text_pair", "messages", "prompt", "completion", "input_ids", "label")
    for key in keys:
        name = getattr(roles, key)
        if name is None:
            continue
        if key == "label":
            yield from comment(class_line(start), 2)
            for caution in label_cautions(start):
                yield from comment(f"Caution: {caution}", 2)
        else:
            yield from comment(f"{summary(start.facts[name]).capitalize()}.", 2)
        yield f"  {key}_column: {scalar(name)}"
    if data.label_map:
        yield f"  label_map: {scalar(list(data.label_map))}"
    if start.others:
        yield from comment(f"Other columns, not read: {other_columns(start)}.", 2)
    for caution in text_cautions(start):
        yield from comment(f"Caution: {caution}", 2)
    for pair, number in start.counts.shared.items():
        yield from comment(f"Caution: equal inputs in both of the splits {pair}: {number:,}.", 2)


def class_line(start: Start) -> str:
    """The number of classes, and of rows per class."""
    known = [f"{name} {number:,}" for name, number in sorted(start.counts.classes.items(), key=lambda item: -item[1])]
    more = f", and {len(known) - 12} more" if len(known) > 12 else ""
    unused = [name for name, number in start.counts.classes.items() if not number]
    numbers = ", numbers being class ids from 0" if is_range(start) else ""
    without = f" ({len(unused)} without a row{numbers})" if unused else ""
    return f"{len(known)} classes{without}: {', '.join(known[:12])}{more}."


def other_columns(start: Start) -> str:
    """The columns that are not read, with a summary of their content."""
    shown = [f"{each.name} ({summary(each)})" for each in start.others[:12]]
    return ", ".join(shown) + (f" and {len(start.others) - 12} more" if len(start.others) > 12 else "")


def length_line(start: Start) -> str:
    """The lengths of rows in tokens, and the share that is cut or split."""
    found = start.lengths
    counted = (
        "Tokens of a row"
        if found.is_counted
        else "Tokens of a row, estimated from characters since the tokenizer is not on this machine"
    )
    fate = "are read in several pieces" if start.is_split else "lose their end"
    cut = f"; {found.cut:.0%} of the rows {fate}" if found.cut else "; no row is cut"
    takes = start.known.longest
    more = f" (the model takes up to {takes:,})" if takes is not None and found.cut and takes > found.chosen else ""
    more += "; with a smaller number all stages are faster" if found.chosen >= _LONG else ""
    return f"{counted}: half have at most {found.median:,}, 95% at most {found.most:,}, the longest {found.longest:,}{cut}{more}."


def _train_teacher(start: Start) -> list[str]:
    lines = comment(
        "The teacher: a pretrained model, fine-tuned on the rows with a label."
        if not start.generative
        else "The teacher: a pretrained model, fine-tuned on train."
    )
    if start.is_default:
        lines += comment(
            "The model is a small encoder from the hub, "
            + (
                "for English texts"
                if "multilingual" not in start.known.name
                else "for many languages, since the texts are not all English"
            )
            + ". Any other name or directory may stand here; a larger one is a better teacher and takes longer."
        )
    lines += ["train-teacher:", f"  model: {scalar(start.known.name)}", f"  output: {_path(start, 'teacher')}"]
    if start.has_empty:
        lines.append("  on_bad_row: skip               # rows without text")
    return _timed(lines, teacher_time(start))


def _cache(start: Start) -> list[str]:
    lines = comment("The teacher reads every row once; its predictions are kept, and it is not needed again.")
    lines += ["cache-logits:", f"  teacher: {_teacher(start)}"]
    if start.added:
        lines += comment("More rows of train; their labels, if they have any, are not read.", 2)
        lines += ["  unlabelled:", *(f"    - {scalar(name)}" for name in start.added)]
    lines.append(f"  output: {_path(start, 'cache')}")
    if start.has_empty:
        lines.append("  on_bad_row: skip")
    return _timed(lines, cache_time(start))


def _init_student(start: Start) -> list[str]:
    layers = ""
    if start.known.layers is not None:
        from pipeline.models.initialize import evenly_spaced

        layers = f": {len(evenly_spaced(start.known.layers))} of {start.known.layers}"
    return [
        *comment(
            f"The student begins as a third of the teacher's layers{layers}. "
            "For one of another shape: num_layers, hidden_size, num_heads."
        ),
        "init-student:",
        f"  teacher: {_teacher(start)}",
        f"  output: {_path(start, 'student-init')}",
    ]


def _students(start: Start) -> list[str]:
    lines = comment(
        "The student, and controls that show what the soft labels add: the same student without soft labels."
    )
    own = f"    student: {_path(start, 'student-init')}"
    cache = f"  - cache: {_path(start, 'cache')}"
    lines += [*_timed(["train-student:"], student_time(start), each=True)]
    about = "soft labels of every row" + (", and labels where there are any" if start.has_unlabelled else "")
    lines += [*comment(f"The student: {about}.", 2), cache, own, f"    output: {_path(start, 'student')}"]
    hard = ["    hard_weight: 1", "    soft_weight: 0"]
    if start.has_labels:
        what = "the tokens of the data alone" if start.generative else "labels alone"
        rows = f": {start.labelled:,} rows" if start.has_unlabelled else ""
        lines += [
            *comment(f"Control: {what}{rows}.", 2),
            cache,
            own,
            f"    output: {_path(start, 'control-labels')}",
            *hard,
        ]
    if start.has_unlabelled:
        lines += [
            *comment(
                "Control: the teacher's most likely class for every row. The difference to the student "
                "shows what soft labels add over the teacher's hard predictions.",
                2,
            ),
            *(cache, own, f"    output: {_path(start, 'control-teacher-labels')}", "    hard_labels: teacher", *hard),
        ]
    return lines


def _evaluate(start: Start) -> list[str]:
    return [
        *comment("Quality of each on rows that none has seen, and how much of the teacher's is kept."),
        *comment(few_line(start)),
        "evaluate:",
        f"  cache: {_path(start, 'cache')}",
        f"  split: {start.evaluated}",
        "  student:",
        *(f"    - {scalar(f'{name}={start.runs}/{name}')}" for name in ("student", *_controls(start))),
        f"  output: {scalar(start.runs)}",
    ]


def _report(start: Start) -> list[str]:
    lines = [
        "report:",
        f"  cache: {_path(start, 'cache')}",
        f"  teacher: {_teacher(start)}",
        f"  split: {start.evaluated}",
        "  student:",
        f"    - {scalar(f'student={start.runs}/student')}",
        "  control:",
        *(f"    - {scalar(f'{name}={start.runs}/{name}')}" for name in _controls(start)),
        f"  output: {_path(start, 'report')}",
    ]
    head = comment("The answer on one page, report.html: with intervals, controls, speed and memory.")
    if not start.can_draw:
        head += comment("It needs matplotlib: pip install 'soft-label-pipeline[report]', then take away the # below.")
        lines = [f"# {line}" for line in lines]
    return [*head, *lines]


def _controls(start: Start) -> Sequence[str]:
    labels = ["control-labels"] if start.has_labels else []
    return [*labels, *(["control-teacher-labels"] if start.has_unlabelled else [])]


def _teacher(start: Start) -> str:
    return scalar(start.known.name) if start.is_teacher else _path(start, "teacher")


def _path(start: Start, name: str) -> str:
    return scalar(f"{start.runs}/{name}")


def _timed(lines: list[str], time: str, *, each: bool = False) -> list[str]:
    """Insert the estimated time above the first key of a section."""
    if not time:
        return lines
    at = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    said = comment(f"{'Each takes' if each else 'Takes'} {time}.")
    return [*lines[:at], *said, *lines[at:]]
