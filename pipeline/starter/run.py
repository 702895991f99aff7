"""`softlabel init`: inspect the data, choose settings, write the file."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.storage.commit import write_text
from pipeline.config import DataConfig, InitConfig
from pipeline.errors import MisuseError, ModelError, SourceError
from pipeline.models.detect import detect_task
from pipeline.records import TokenizedExample
from pipeline.sources import Source, label_names, load_source, load_unlabelled, with_unlabelled
from pipeline.sources.batches import read_rows
from pipeline.sources.prepare import locate
from pipeline.starter.counts import Counts, count
from pipeline.starter.facts import Facts, column_facts, sampled_ranges
from pipeline.starter.page import make_page
from pipeline.starter.places import listed_files, local_files, with_unlabelled_files
from pipeline.starter.records import Lengths, Start
from pipeline.starter.roles import Roles, choose_roles
from pipeline.starter.teacher import Known, look_up, measure, nothing_of, sample
from pipeline.tasks import TASKS, Task, get_task

if TYPE_CHECKING:
    from pipeline.sources.files.joined import Rows

ENGLISH = "sentence-transformers/all-MiniLM-L6-v2"
OTHER_LANGUAGES = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
#: Layers and parameters without embeddings of the default models, if the hub cannot be reached.
_SIZES = {ENGLISH: (6, 10_600_000), OTHER_LANGUAGES: (12, 21_300_000)}
HOLDOUT = 0.1
_FEWEST = 30
#: Texts with a larger share of letters outside a to z are not English (German 2%, English 0.1%).
_FOREIGN = 0.006
#: Flags of other commands that error messages mention -> the equivalent for this command.
_ELSEWHERE = {
    "--data-files": "softlabel init has no --data-files: name files after their splits, as train.csv and test.csv, or give one",
    "--holdout": "softlabel init has no --holdout: add more rows, or a file for the split test",
}
_CHARACTERS_OF_TOKEN = 3.5  # low: a short maximum cuts rows, a long one only costs time
#: Rows of up to this number of tokens are never cut.
_SHORT = 128


def run(config: InitConfig) -> Start:
    """Run `softlabel init`: inspect a data set and write the file.

    Raises:
        PipelineError: as `_written`; a message that names a flag of another command also gives the
            equivalent for this one.
    """
    try:
        return _written(config)
    except (SourceError, MisuseError) as error:
        hint = next((hint for flag, hint in _ELSEWHERE.items() if flag in str(error)), None)
        if hint is None:
            raise
        raise type(error)(f"{error} ({hint})") from error


def _written(config: InitConfig) -> Start:
    """Write the file, and return findings and choices.

    Raises:
        MisuseError: the file exists; several columns can be the text or the label; no teacher is
            given for a language model.
        SourceError: there is no data, no column can be the text or the label, or labels are not
            classes.
        ModelError: the model or the teacher does not exist.
    """
    output = Path(config.output).expanduser()
    _check_output(output, config.overwrite)
    found = locate(DataConfig(dataset=config.dataset, dataset_config=config.dataset_config))
    facts = column_facts(found.splits)
    task = _asked_task(config)
    if task is not None and task.label_source in ("positions", "hidden", "target"):
        raise MisuseError(
            f"--task {task.name}: init writes run files for classification and language models only; write one by hand, as "
            "data/entities/demo.yaml in the repository"
        )
    if not any(each.rows for each in facts.values()):
        raise SourceError(f"{config.dataset}: no rows; expected at least one")
    roles = choose_roles(config.dataset, facts, config, tokens=None if task is None else task.predicts_tokens)
    task = task or _task_of(roles)
    if task.predicts_tokens and config.model is None and config.teacher is None:
        raise MisuseError(
            f"{config.dataset}: {_why_generative(roles)}: a language model needs its teacher named; give --teacher NAME "
            "(used as it is), or --model NAME (fine-tuned on this data first)"
        )
    _check_unlabelled(config, roles)
    data, added = with_unlabelled_files(_data(config, roles, found.splits), config.unlabelled)
    source, known_labels = _read(data, added, roles, config)
    counts = count(source, known_labels, data.label_map)
    moved: tuple[str, ...] = ()
    if roles.label is not None and "test" in counts.splits and not counts.splits["test"].labelled:
        named, moved = _without_test(data, config, counts)
        if named != data:
            data = named
            source, known_labels = _read(data, added, roles, config)
            counts = count(source, known_labels, data.label_map)
    _check_counts(config, roles, facts, counts)
    known = _known(config, counts)
    rows = sample(source, task, known, data)
    lengths = _lengths(task, known, rows, source, roles)
    data = dataclasses.replace(data, max_length=lengths.chosen)
    start = Start(
        path=config.output,
        command=_command(config),
        task=task.name,
        generative=task.continues_prompts,
        data=data,
        added=added,
        roles=roles,
        facts=facts,
        counts=counts,
        unlabelled_files={name: _rows_of(name) for name in config.unlabelled},
        moved=moved,
        lengths=lengths,
        known=known,
        speed=measure(task, known, rows, known_labels, lengths.chosen),
        is_teacher=config.teacher is not None,
        is_default=config.teacher is None and config.model is None,
        evaluated=_evaluated(task, counts),
        can_draw=find_spec("matplotlib") is not None,
        runs=config.runs or f"runs/{output.stem}",
    )
    write_text(output, make_page(start))
    return start


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise MisuseError(f"--output {output}: is a directory; name a YAML file in it")
    if output.suffix not in (".yaml", ".yml"):
        raise MisuseError(f"--output {output}: expected the name of a YAML file, as distil.yaml")
    if output.exists() and not overwrite:
        raise MisuseError(f"--output {output}: is there already; name another file, or --overwrite to replace it")


def _check_unlabelled(config: InitConfig, roles: Roles) -> None:
    """Check that the data sets of `--unlabelled` have the input columns of the labelled one."""
    inputs = roles.named - {roles.label}
    for name in config.unlabelled:
        splits = locate(DataConfig(dataset=name)).splits
        found = (splits.get("train") or next(iter(splits.values()))).column_names
        for column in sorted(inputs - set(found)):
            raise SourceError(
                f"{name}: --unlabelled: no column {column!r}, which is read of {config.dataset}; found {', '.join(found)}; "
                "rename a column, so that both have the same names"
            )


def _asked_task(config: InitConfig) -> Task | None:
    if config.task is not None:
        return get_task(config.task)
    return None if config.teacher is None else detect_task(config.teacher)


def _task_of(roles: Roles) -> Task:
    source = "tokens" if roles.label is None else "row"
    return next(task for task in TASKS.values() if task.label_source == source)


def _why_generative(roles: Roles) -> str:
    if roles.messages is not None:
        return f"column {roles.messages!r} holds chats"
    if roles.prompt is not None:
        return f"columns {roles.prompt!r} and {roles.completion!r} are prompts and completions"
    return f"column {roles.input_ids or roles.text!r} is read by a language model"


def _data(config: InitConfig, roles: Roles, splits: Mapping[str, Rows]) -> DataConfig:
    """The section `data`: the data set as given, with the chosen columns."""
    if "train" not in splits:
        raise SourceError(
            f"{config.dataset}: no split train to learn from; found {', '.join(splits)}; rename a file, or give one file"
        )
    if "test" not in splits and len(splits["train"]) < _FEWEST:
        raise SourceError(
            f"{config.dataset}: {len(splits['train'])} rows are too few to set some aside as test; expected at least {_FEWEST}, "
            "or a directory with files for train and test"
        )
    return DataConfig(
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        holdout=0.0 if "test" in splits else HOLDOUT,
        text_column=roles.text or "text",
        text_pair_column=roles.text_pair,
        messages_column=roles.messages,
        prompt_column=roles.prompt,
        completion_column=roles.completion,
        input_ids_column=roles.input_ids,
        label_column=roles.label or "label",
        label_map=config.label_map,
    )


def _read(data: DataConfig, added: tuple[str, ...], roles: Roles, config: InitConfig) -> tuple[Source, tuple[str, ...]]:
    """Load the data set as the stages will read it, with the names of its classes."""
    source = load_source(data, label_required=roles.label is not None)
    names: tuple[str, ...] = ()
    if roles.label is not None:
        names = label_names(source, data.label_map) if config.teacher is None else look_up(config.teacher).labels
    return with_unlabelled(source, load_unlabelled(added, data)), names


def _without_test(data: DataConfig, config: InitConfig, counts: Counts) -> tuple[DataConfig, tuple[str, ...]]:
    """Move the rows of an unlabelled split `test` to `train`, or leave the split out.

    Returns:
        The section `data`, and the splits whose rows were moved.
    """
    if data.data_files:
        renamed = tuple(
            "train=" + item.removeprefix("test=") if item.startswith("test=") else item for item in data.data_files
        )
        return dataclasses.replace(data, data_files=renamed, holdout=HOLDOUT), ("test",)
    files = local_files(config.dataset)
    if files is not None:
        rest = {split: members for split, members in files.items() if split != "test"}
        joined = {**rest, "train": (*files["train"], *files["test"])}
        return dataclasses.replace(listed_files(data, joined), holdout=HOLDOUT), ("test",)
    if "validation" in counts.splits and counts.splits["validation"].labelled:
        return dataclasses.replace(data, split=tuple(split for split in counts.splits if split != "test")), ()
    return data, ()


def _check_counts(config: InitConfig, roles: Roles, facts: Mapping[str, Facts], counts: Counts) -> None:
    if roles.label is None:
        return
    used = [name for name, number in counts.classes.items() if number]
    is_numeric = facts[roles.label].kind in ("integers", "floats")
    if is_numeric and config.teacher is None and 0 < len(used) < len(counts.classes) / 2:
        more = f" and {len(used) - 5} more" if len(used) > 5 else ""
        raise SourceError(
            f"{config.dataset}: column {roles.label!r}: expected class ids 0 to N without gaps, found only "
            f"{', '.join(used[:5])}{more}, which would make {len(counts.classes)} classes; write names instead"
        )
    if not counts.splits["train"].labelled:
        raise SourceError(f"{config.dataset}: split train has no labelled row in column {roles.label!r}")
    if sum(number > 0 for number in counts.classes.values()) < 2:
        only = next(name for name, number in counts.classes.items() if number)
        raise SourceError(f"{config.dataset}: column {roles.label!r}: one class only ({only}); expected at least two")


def _known(config: InitConfig, counts: Counts) -> Known:
    asked = config.teacher or config.model
    if asked is not None:
        return look_up(asked)
    name = ENGLISH if counts.foreign_letters < _FOREIGN else OTHER_LANGUAGES
    try:
        found = look_up(name)
    except ModelError:  # a mirror without the model
        found = nothing_of(name)
    layers, weights = _SIZES[name]
    return found if found.layers is not None else dataclasses.replace(found, layers=layers, weights=weights)


def _lengths(task: Task, known: Known, rows: list[TokenizedExample], source: Source, roles: Roles) -> Lengths:
    sizes = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    if not len(sizes):
        sizes = _estimated(source, roles)
    limit = min(known.longest or task.default_max_length, task.default_max_length)
    most = int(np.quantile(sizes, 0.95, method="higher"))
    longest = int(sizes.max())
    wanted = longest if longest <= _SHORT else most
    chosen = min(limit, max(16, -(-wanted // 16) * 16))
    in_pieces = task.label_source == "tokens" and roles.text is not None
    return Lengths(
        median=int(np.median(sizes)),
        most=most,
        longest=longest,
        chosen=chosen,
        cut=float((sizes > chosen).mean()),
        mean=float((sizes if in_pieces else np.minimum(sizes, chosen)).mean()),
        is_counted=bool(rows),
    )


def _estimated(source: Source, roles: Roles) -> np.ndarray:
    """(rows,): lengths in tokens, estimated from characters."""
    rows = source.splits["train"]
    names = [name for name in roles.named if name != roles.label]
    found = [
        sum(len(value if isinstance(value, str) else str(value)) for value in row.values() if value is not None)
        for part in sampled_ranges(rows, 2000)
        for row in read_rows(rows, names, part.start, part.stop)
    ]
    return np.ceil(np.array(found) / _CHARACTERS_OF_TOKEN).astype(np.int64) + 2


def _rows_of(name: str) -> int:
    splits = locate(DataConfig(dataset=name)).splits
    return len(splits.get("train") or next(iter(splits.values())))


def _evaluated(task: Task, counts: Counts) -> str:
    for split in ("test", "validation"):
        if split in counts.splits and (task.label_source == "tokens" or counts.splits[split].labelled):
            return split
    return "test"


def _command(config: InitConfig) -> str:
    """The command as given, without flags that repeat a default."""
    words = ["softlabel", "init"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        for item in value if isinstance(value, tuple) else [value]:
            if isinstance(item, str):
                words += [flag, item]
    return shlex.join(words)
