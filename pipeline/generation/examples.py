"""Prompts from a template and label names; each prompt asks for an example of one label."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from pipeline.config import GenerateConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.generation.prompts import template_kwargs, text_prompt
from pipeline.generation.records import Prompt, PromptSettings
from pipeline.records import BadRow, Columns, Example
from pipeline.sources import LabelMap, Source, from_datasets, label_names, load_source, read_examples
from pipeline.tasks.pieces import Vocabulary, read_vocabulary

#: The variables that a template may use.
_KNOWN = ("label", "labels", "number", "shots")
_SPLIT = "train"


@dataclass(frozen=True, slots=True)
class Shot:
    """A labelled row, as passed to a template."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class LabelPrompts:
    """`num_examples` prompts that take the labels in turn; see `Prompts`."""

    settings: PromptSettings
    source: Source | None
    ranges: Mapping[str, tuple[int, int]]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    template: jinja2.Template
    shots: Mapping[str, Sequence[Shot]]
    """Label -> its labelled rows."""
    seed: int

    def read(self, split: str, start: int, stop: int) -> Iterator[Prompt | BadRow]:
        """Yield the prompts; row i asks for an example of label i modulo the number of labels."""
        labels = self.settings.labels
        for row in range(start, stop):
            label = labels[row % len(labels)]
            try:
                text = self.template.render(
                    label=label, labels=list(labels), number=row // len(labels), shots=self._shots(row, label)
                )
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
                raise SourceError(f"--template: label {label!r}: cannot be rendered: {error}") from None
            if not text.strip():
                yield BadRow(split, row, "the template renders an empty prompt")
                continue
            rendered, ids = text_prompt(text, self.settings, self.tokenizer, self.vocabulary)
            yield Prompt(row, rendered, ids, label=label, is_chat=self.settings.are_chats)

    def _shots(self, row: int, label: str) -> list[Shot]:
        """Draw the examples of a prompt without replacement, by the seed and the row."""
        known = self.shots.get(label, ())
        return random.Random(f"shots/{self.seed}/{row}").sample(known, min(self.settings.shots, len(known)))


def label_prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, *, live: Any = None) -> LabelPrompts:
    """Build the prompts of `--template` and the flags that go with it.

    Raises:
        MisuseError: the template does not use `label`, or uses an unknown variable.
        SourceError: no labels, or too few rows of a label for `--shots`.
    """
    assert config.template is not None
    text = _read(config.template)
    template = _parsed(config.template, text)
    source = None if config.dataset is None and live is None else _labelled(config, live)
    names = () if source is None else label_names(source)
    shots = _read_shots(source, names) if source is not None and config.shots else {}
    labels = config.label or names
    if config.shots:
        without = [label for label in labels if len(shots.get(label, ())) < config.shots]
        if without:
            raise SourceError(
                f"{source.name if source else ''}: --shots {config.shots}: the label {without[0]!r} has "
                f"{len(shots.get(without[0], ()))} rows; the labels there are {', '.join(names[:10])}"
            )
    settings = PromptSettings(
        kind="template",
        as_chat=config.as_chat,
        chat_template_kwargs=template_kwargs(config, tokenizer) if config.as_chat else (),
        template=text,
        labels=labels,
        num_examples=config.num_examples,
        shots=config.shots,
    )
    ranges = {_SPLIT: (0, config.num_examples or 0)}
    return LabelPrompts(settings, source, ranges, tokenizer, read_vocabulary(tokenizer), template, shots, config.seed)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MisuseError(f"--template {file}: cannot be read ({reason})") from None


def _parsed(file: str, text: str) -> jinja2.Template:
    """Parse a template in a sandbox, as transformers does with chat templates.

    Raises:
        MisuseError: invalid Jinja, an unknown variable, or no use of `label`.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=False
    )
    try:
        read = meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise MisuseError(f"--template {file}, line {error.lineno}: is not Jinja: {error.message}") from None
    unknown = sorted(read - set(_KNOWN) - set(environment.globals))
    if unknown:
        raise MisuseError(f"--template {file}: reads {unknown[0]!r}; there are {', '.join(_KNOWN)}")
    if "label" not in read:
        raise MisuseError(
            f"--template {file}: does not read the variable label, so that the prompts of all labels would be the same; "
            "write {{ label }} where it belongs"
        )
    return environment.from_string(text)


def _labelled(config: GenerateConfig, live: Any) -> Source:
    columns = Columns(text=config.text_column or "text", label=config.label_column)
    if live is not None:
        source = from_datasets(live, columns, splits=config.split)
    else:
        source = load_source(
            config.data(text_column=config.text_column, label_column=config.label_column), label_required=True
        )
    if source.columns.label is None:
        raise SourceError(f"{source.name}: no label column {config.label_column!r}; name it with --label-column")
    return source


def _read_shots(source: Source, names: Sequence[str]) -> Mapping[str, Sequence[Shot]]:
    """Return label -> its rows, of `train` if that split exists: test rows are never examples."""
    found: dict[str, list[Shot]] = {name: [] for name in names}
    known = LabelMap.for_names(source, tuple(names), ())
    for split in (_SPLIT,) if _SPLIT in source.splits else source.splits:
        for row in read_examples(source, split, 0, len(source.splits[split]), known):
            if isinstance(row, Example) and row.label is not None and row.text and row.text.strip():
                found[names[row.label]].append(Shot(row.text, names[row.label]))
    return found
