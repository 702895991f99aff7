"""Detection of the text and label columns from their content and names."""

from __future__ import annotations

import random
from typing import Any

import datasets
import pytest

from pipeline.config import InitConfig
from pipeline.errors import MisuseError, PipelineError, SourceError
from pipeline.starter.facts import column_facts
from pipeline.starter.roles import Roles, choose_roles
from tests.conftest import sentence

RNG = random.Random(0)
TEXTS = [sentence(RNG, 12) for _ in range(60)]
OTHERS = [sentence(RNG, 11) for _ in range(60)]
TITLES = [sentence(RNG, 3) for _ in range(60)]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
IDS = list(range(1000, 1060))
DATES = [f"2024-01-{i % 28 + 1:02} 10:00" for i in range(60)]
LINKS = [f"https://a.example/{i}" for i in range(60)]


def few(*values: Any) -> list[Any]:
    return [values[i % len(values)] for i in range(60)]


def roles(tokens: bool | None = None, flags: dict[str, Any] | None = None, **columns: list[Any]) -> Roles:
    rows = datasets.Dataset.from_dict({name.replace("__", " "): values for name, values in columns.items()})
    config = InitConfig(dataset="d", output="o.yaml", **flags or {})
    return choose_roles("d.csv", column_facts({"train": rows}), config, tokens=tokens)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": TEXTS, "label": few(0, 1)}, Roles(text="text", label="label")),
        ({"Ticket__Body": TEXTS, "Kategorie": few("A", "B", None)}, Roles(text="Ticket Body", label="Kategorie")),
        ({"id": IDS, "Titel": TITLES, "Inhalt": TEXTS, "thema": few("x", "y")}, Roles(text="Inhalt", label="thema")),
        ({"date": DATES, "link": LINKS, "a": TEXTS, "b": few("x", "y", "z")}, Roles(text="a", label="b")),
        (
            {"text": TEXTS, "priority": few("hi", "lo"), "Category": few("x", "y", "z")},
            Roles(text="text", label="Category"),
        ),
        ({"comment": TEXTS, "stars": few(1, 2, 3, 4, 5)}, Roles(text="comment", label="stars")),
        ({"text": TEXTS, "is_spam": few(True, False)}, Roles(text="text", label="is_spam")),
        ({"text": TEXTS, "label": few(0.0, 1.0, None)}, Roles(text="text", label="label")),
        ({"text": TITLES, "body": TEXTS, "label": few("x", "y")}, Roles(text="text", label="label")),
        ({"ticketBody": TEXTS, "other": OTHERS, "topic": few("x", "y")}, Roles(text="ticketBody", label="topic")),
        ({"text": TEXTS, "class_id": few(0, 1, 2), "annotator": few("p", "q")}, Roles(text="text", label="class_id")),
        ({"text": TEXTS, "labelId": few(0, 1), "note": few("p", "q")}, Roles(text="text", label="labelId")),
        ({"text": TEXTS, "topic_no": few(0, 1), "class_date": few("p", "q")}, Roles(text="text", label="topic_no")),
        ({"messages": CHATS, "source": few("a", "b")}, Roles(messages="messages")),
        ({"conversations": CHATS, "chosen": CHATS}, Roles(messages="conversations")),
        ({"prompt": TEXTS, "completion": OTHERS}, Roles(prompt="prompt", completion="completion")),
        ({"Question": TEXTS, "Answer": OTHERS, "id": IDS}, Roles(prompt="Question", completion="Answer")),
        ({"input_ids": few([1, 2], [3])}, Roles(input_ids="input_ids")),
    ],
)
def test_the_columns_are_found(columns: dict[str, list[Any]], expected: Roles) -> None:
    assert roles(**columns) == expected


@pytest.mark.parametrize(
    ("flags", "columns", "expected"),
    [
        ({"text_column": "summary"}, {"body": TEXTS, "summary": OTHERS, "label": few(0, 1)}, ("summary", "label")),
        (
            {"label_column": "priority"},
            {"text": TEXTS, "label": few(0, 1), "priority": few("h", "l")},
            ("text", "priority"),
        ),
        ({"label_column": "kind"}, {"text": TEXTS, "messages": CHATS, "kind": few("h", "l")}, ("text", "kind")),
    ],
)
def test_a_flag_comes_first(flags: dict[str, Any], columns: dict[str, list[Any]], expected: tuple[str, str]) -> None:
    found = roles(flags=flags, **columns)
    assert (found.text, found.label) == expected


def test_the_task_decides() -> None:
    columns = {"text": TEXTS, "messages": CHATS, "label": few(0, 1)}
    assert roles(tokens=True, **columns).messages == "messages"
    assert roles(tokens=False, **columns) == Roles(text="text", label="label")
    assert roles(tokens=True, text=TEXTS, label=few(0, 1)) == Roles(text="text")


def test_a_teacher_needs_no_labels() -> None:
    assert roles(tokens=False, flags={"teacher": "t"}, text=TEXTS, id=IDS) == Roles(text="text")


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ({"id": IDS}, SourceError, r"no column that can be the text; found 'id' \(integers, a different value .*--text-column"),
        ({"a": TEXTS, "b": OTHERS, "label": few(0, 1)}, MisuseError, "'a' .*'b' .*choose with --text-column .*--text-pair-column"),
        ({"text": TEXTS, "team": few("x", "y"), "priority": few("h", "l")}, MisuseError, "'team' .*'priority' .*--label-column"),
        ({"text": TEXTS, "topic": few("x", "y"), "intent": few("h", "l")}, MisuseError, "'topic' .*'intent' .*--label-column"),
        ({"text": TEXTS, "label": few("spam")}, SourceError, r"column 'label': one class only \(spam\)"),
        ({"text": TEXTS, "label": few(None)}, SourceError, "column 'label': no row has a label"),
        ({"text": TEXTS, "label": [i / 7 for i in range(60)]}, SourceError, "scores, which are not supported"),
        ({"text": TEXTS, "score": [i / 7 for i in range(60)]}, SourceError, r"no column that can be the label.*scores are not"),
        ({"text": TEXTS, "label": TITLES}, SourceError, "60 different values on 60 labelled rows are no classes"),
        ({"text": TEXTS, "labels": few(["a", "b"])}, SourceError, "several labels on one row are not supported"),
        ({"text": TEXTS, "p": few(0, 1), "q": few(1, 0, 0), "r": few(0, 0, 1)}, MisuseError, r"labels in several columns .*\(p, q, r\)"),
        ({"text": TEXTS, "id": IDS}, SourceError, "no column that can be the label.*--label-column.*--task causal-lm.*--teacher"),
        ({"the dog ran over the hill": TEXTS, "x": few("x", "y")}, SourceError, "the first line is a row, and no names of columns"),
        ({"a": CHATS, "b": CHATS}, MisuseError, "several columns hold chats: a, b; choose with --messages-column"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_one_line(
    columns: dict[str, list[Any]], kind: type[PipelineError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        roles(**columns)
    assert "\n" not in str(caught.value)


def test_a_flag_that_cannot_be() -> None:
    with pytest.raises(SourceError, match="no column 'nothing'; found text, label"):
        roles(flags={"text_column": "nothing"}, text=TEXTS, label=few(0, 1))
    with pytest.raises(SourceError, match=r"column 'text' \(--label-column\): 60 different values"):
        roles(flags={"label_column": "text", "text_column": "other"}, text=TEXTS, other=OTHERS)


@pytest.mark.parametrize(
    ("task", "flags", "flag"),
    [
        ("sequence-classification", {"messages_column": "chat"}, "--messages-column"),
        ("sequence-classification", {"prompt_column": "a", "completion_column": "b"}, "--prompt-column"),
        ("causal-lm", {"text_column": "a", "text_pair_column": "b"}, "--text-pair-column"),
        ("causal-lm", {"label_column": "b"}, "--label-column"),
    ],
)
def test_a_column_that_models_of_the_task_do_not_read(task: str, flags: dict[str, Any], flag: str) -> None:
    with pytest.raises(MisuseError, match=f"{flag} does not go with --task {task}: .* drop the flag"):
        roles(flags={"task": task, **flags}, tokens=task == "causal-lm", a=TEXTS, b=OTHERS, chat=CHATS)
