import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from pipeline.config import DataConfig
from pipeline.errors import SourceError
from pipeline.records import BadRow, Columns, Example, Message
from pipeline.sources import LabelMap, batches, from_datasets, load_source, read_examples, rows


def examples(data: dict[str, list[Any]] | datasets.Dataset, columns: Columns) -> list[Example | BadRow]:
    dataset = datasets.Dataset.from_dict(data) if isinstance(data, dict) else data
    return list(read_examples(from_datasets(dataset, columns), "train", 0, len(dataset), None))


def reasons(data: dict[str, list[Any]] | datasets.Dataset, columns: Columns) -> list[str | None]:
    return [item.reason if isinstance(item, BadRow) else None for item in examples(data, columns)]


def test_text_with_pair_label_and_kept() -> None:
    rows = {"text": ["a", "b"], "other": ["c", "d"], "label": ["x", None], "id": [7, 8], "score": [0.5, None]}
    source = from_datasets(datasets.Dataset.from_dict(rows), Columns(text_pair="other", keep=("id", "score")))
    found = list(read_examples(source, "train", 0, 2, LabelMap.for_names(source, ("w", "x"))))
    assert found == [
        Example(0, text="a", text_pair="c", label=1, kept={"id": 7, "score": 0.5}),
        Example(1, text="b", text_pair="d", label=None, kept={"id": 8, "score": None}),
    ]
    assert [item.label for item in read_examples(source, "train", 0, 2, None) if isinstance(item, Example)] == [
        None,
        None,
    ]


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_ranges_keep_the_row_numbers_of_the_split(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", batch)
    dataset = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(10)]})
    for formatted in (dataset, dataset.with_format("numpy")):
        source = from_datasets(formatted, Columns())
        found = list(read_examples(source, "train", 4, 9, None))
        assert found == [Example(i, text=f"text {i}") for i in range(4, 9)]
    assert list(read_examples(source, "train", 3, 3, None)) == []


def test_rows_after_a_holdout_are_counted_in_their_own_split() -> None:
    dataset = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(60)]})
    source = from_datasets(dataset, Columns(), holdout=0.3)
    found = {split: list(read_examples(source, split, 0, len(part), None)) for split, part in source.splits.items()}
    assert all(
        [item.source_row for item in items if isinstance(item, Example)] == list(range(len(items)))
        for items in found.values()
    )
    every = [item.text for items in found.values() for item in items if isinstance(item, Example)]
    assert sorted(map(str, every)) == sorted(dataset["text"])


def test_a_split_or_range_that_is_not_there() -> None:
    source = from_datasets(datasets.Dataset.from_dict({"text": ["a"]}), Columns())
    with pytest.raises(SourceError, match="in-memory: no split 'test'; found train"):
        read_examples(source, "test", 0, 1, None)
    with pytest.raises(SourceError, match="split train has 1 rows, expected rows 0 to 2; is it the same data set"):
        read_examples(source, "train", 0, 2, None)


def test_texts_that_cannot_be_read() -> None:
    rows = {"text": ["a", "", None, "d", "e"], "other": ["c", "d", "e", "", None]}
    assert reasons(rows, Columns(text_pair="other")) == [
        None,
        "text is empty",
        "text is null",
        "other is empty",
        "other is null",
    ]
    assert examples({"text": ["", "b"]}, Columns())[0] == BadRow("train", 0, "text is empty")


def test_bytes_that_are_not_utf8_spoil_only_their_row() -> None:
    raw = pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string())
    dataset = datasets.Dataset(pa.table({"text": raw, "id": pa.array([1, 2, 3])}))
    assert examples(dataset, Columns(keep=("id",))) == [
        Example(0, text="ok", kept={"id": 1}),
        BadRow("train", 1, "text that is not valid UTF-8"),
        Example(2, text="fine", kept={"id": 3}),
    ]


def test_bytes_that_are_not_utf8_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    source = load_source(DataConfig(dataset=str(tmp_path / "d.jsonl")))
    assert list(read_examples(source, "train", 0, 2, None)) == [
        Example(0, text="a"),
        BadRow("train", 1, "text that is not valid UTF-8"),
    ]


def test_chats() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "name": "x"}]
    assert examples({"chat": [turns]}, Columns(messages="chat")) == [
        Example(0, messages=(Message("user", "hi"), Message("assistant", "", {"name": "x"})))
    ]
    rows: dict[str, list[Any]] = {
        "chat": [
            [],
            None,
            [{"role": "user", "content": None, "tool_calls": []}],
            [{"role": None, "content": "x", "tool_calls": None}],
            [{"role": "", "content": "x", "tool_calls": None}],
            [
                {"role": "user", "content": "x", "tool_calls": []},
                {"role": "assistant", "content": "", "tool_calls": ["f"]},
            ],
        ]
    }
    assert reasons(rows, Columns(messages="chat")) == [
        "chat is empty",
        "chat is null",
        "chat[0].content is null",
        "chat[0].role is null",
        "chat[0].role is empty",
        None,
    ]


def messages_of(*turns: dict[str, Any]) -> Any:
    """Return the turns of one chat read from mixed JSON, where missing keys are not filled in."""
    (found,) = examples({"chat": [json.loads(json.dumps(turns))]}, Columns(messages="chat"))
    return found.reason if isinstance(found, BadRow) else found.messages


def test_text_in_parts_is_joined_and_other_parts_are_bad_rows() -> None:
    part = {"type": "text", "text": "hi"}
    assert messages_of({"role": "user", "content": [part, {**part, "text": " you"}]}) == (Message("user", "hi you"),)
    other = messages_of({"role": "user", "content": [part, {"type": "refusal", "text": None}]})
    assert other == "chat[0].content[1]: expected {type: text, text}, found the keys type and the type refusal"


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image"}, "an image"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}, "an image"),
        ({"type": "input_audio", "input_audio": {"data": "aaaa", "format": "wav"}}, "audio"),
        ({"audio": "a.wav"}, "audio"),
        ({"type": "video", "video": "a.mp4"}, "a video"),
    ],
)
def test_a_part_that_is_no_text_is_named_with_its_turn(part: dict[str, Any], found: str) -> None:
    text = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    reason = messages_of(text, {"role": "user", "content": [{"type": "text", "text": "look"}, part]})
    assert reason == f"chat[1].content[1]: expected text, found {found}; chats are read as text alone"


def test_keys_beside_role_and_content_are_kept_for_the_template_and_nulls_are_absent() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert messages_of(
        {"role": "user", "content": "hi", "reasoning_content": None},
        {"role": "assistant", "content": "a", "reasoning_content": "why"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ) == (
        Message("user", "hi"),
        Message("assistant", "a", {"reasoning_content": "why"}),
        Message("assistant", None, {"tool_calls": [call]}),
    )


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False), ({"train": True, "weight": 0}, False)],
)
def test_a_weight_of_0_makes_a_turn_context(keys: dict[str, Any], learnt: bool) -> None:
    assert messages_of({"role": "assistant", "content": "a", **keys}) == (Message("assistant", "a", learnt=learnt),)


def test_other_weights_are_bad_rows() -> None:
    assert (
        messages_of({"role": "assistant", "content": "a", "weight": 0.5})
        == "chat[0].weight: expected 0 or 1, found '0.5'"
    )


def test_chats_as_sharegpt_writes_them() -> None:
    assert messages_of(
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "three"},
    ) == (
        Message("user", "hi"),
        Message("assistant", None, {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
        Message("tool", "3"),
        Message("assistant", "three"),
    )
    assert messages_of({"role": "gpt", "content": "a"}) == (Message("assistant", "a"),)


def test_the_tools_of_a_chat_are_a_list_or_its_json_text() -> None:
    chat = [[{"role": "assistant", "content": "a"}]] * 2
    tools = [{"type": "function", "function": {"name": "f"}}]
    for column in ([tools, []], [json.dumps(tools), ""]):
        found = examples({"chat": chat, "tools": column}, Columns(messages="chat"))
        assert [item.tools for item in found if isinstance(item, Example)] == [tuple(tools), None]
    assert reasons({"chat": chat, "tools": ["f()", "{}"]}, Columns(messages="chat"))[0] == (
        "tools: expected a list of tools or its JSON text, found other text"
    )


def test_prompts_and_completions_of_turns_are_one_chat() -> None:
    turns = {"p": [[{"role": "assistant", "content": "q"}]], "c": [[{"role": "assistant", "content": "a"}]]}
    assert examples(turns, Columns(prompt="p", completion="c")) == [
        Example(0, messages=(Message("assistant", "q", learnt=False), Message("assistant", "a")))
    ]


def test_padding_is_left_out_by_the_attention_mask() -> None:
    rows = {
        "ids": [[5, 6, 0, 0], [0, 0, 5, 6], [5, 6], [5, 0, 6], [5, 6], [5, 6], [5, 6]],
        "attention_mask": [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1], [1, 0, 1], [0, 0], [1], [1, 2]],
        "labels": [[5, 6, 0, 0], [0, 0, -100, 6], [5, 6], [5, 0, 6], [5, 6], [5, 6], [5, 6]],
    }
    found = examples(rows, Columns(input_ids="ids", labels="labels"))
    assert [(e.input_ids, e.token_labels) for e in found[:3] if isinstance(e, Example)] == [
        ((5, 6), (5, 6)),
        ((5, 6), (-100, 6)),
        ((5, 6), (5, 6)),
    ]
    assert [item.reason for item in found[3:] if isinstance(item, BadRow)] == [
        "attention_mask[1]: expected 0 only at the beginning and the end, found 0 between two values of 1",
        "attention_mask: expected a 1, found 2 times 0",
        "attention_mask: expected 2 values of 0 or 1, one per token, found 1 values of [1]",
        "attention_mask: expected 2 values of 0 or 1, one per token, found 2 values of [1, 2]",
    ]


def test_chats_of_mixed_types_from_a_file(tmp_path: Path) -> None:
    """`datasets` keeps columns of mixed types as JSON."""
    rows: list[Any] = [
        [{"role": "user", "content": "3"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": "hi"}, "stray"],
        "no list",
        [{"role": "user", "content": "caf\u00e9 \ud83d\ude00"}],
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    source = load_source(DataConfig(dataset=str(path), messages_column="chat"))
    assert list(read_examples(source, "train", 0, 5, None)) == [
        Example(0, messages=(Message("user", "3"),)),
        Example(1, messages=(Message("user", "hi"),)),
        BadRow("train", 2, "chat[1]: expected {role, content}, found str"),
        BadRow("train", 3, "chat: expected a list of messages, found str"),
        Example(4, messages=(Message("user", "café 😀"),)),
    ]


def test_lone_surrogates_spoil_only_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the row with the surrogate becomes a bad row.

    In Arrow, lone surrogates are bytes that are not UTF-8. Python strings with one occur in other
    sources.
    """
    raw = pa.array([b"\xed\xa0\x80", b"ok"]).view(pa.string())
    assert reasons(datasets.Dataset(pa.table({"text": raw})), Columns()) == ["text that is not valid UTF-8", None]
    monkeypatch.setattr(rows, "read_rows", lambda *args: iter([{"text": "\ud800"}, {"text": "caf\u00e9"}]))
    assert reasons({"text": ["a", "b"]}, Columns()) == [
        "text: text that is not valid Unicode (a lone surrogate)",
        None,
    ]


def test_prompt_and_completion() -> None:
    rows = {"p": ["q", "", "q", None], "c": ["a", "a", "", "a"]}
    assert examples(rows, Columns(prompt="p", completion="c")) == [
        Example(0, prompt_completion=("q", "a")),
        Example(1, prompt_completion=("", "a")),
        BadRow("train", 2, "c is empty"),
        BadRow("train", 3, "p is null"),
    ]


def test_token_ids_and_their_labels() -> None:
    rows = {
        "ids": [[5, 6], [5, 6], [5, 6], [5, 6], [5], [], None, [-1], [5, None], [2**31]],
        "mask": [[-100, 6], [6, -100], [-100], [-100, None], None, [], [], [5], [5, 5], [-100]],
    }
    assert reasons(rows, Columns(input_ids="ids", labels="mask")) == [
        None,
        "mask[0]: expected -100 or the token there, 5 (not shifted), found 6",
        "mask: expected 2 values, one for each token, found 1",
        "mask holds a null",
        "mask is null",
        "ids is empty",
        "ids is null",
        "ids: expected 0 to 2147483647, found -1 to -1",
        "ids holds a null",
        "ids: expected 0 to 2147483647, found 2147483648 to 2147483648",
    ]
    assert examples(rows, Columns(input_ids="ids", labels="mask"))[0] == Example(
        0, input_ids=(5, 6), token_labels=(-100, 6)
    )
    assert examples({"ids": [[5]]}, Columns(input_ids="ids")) == [Example(0, input_ids=(5,))]


def test_a_bad_row_is_told_before_its_label() -> None:
    source = from_datasets(datasets.Dataset.from_dict({"text": ["", "b"], "label": ["?", "x"]}), Columns())
    found = list(read_examples(source, "train", 0, 2, LabelMap.for_names(source, ("x",))))
    assert found == [BadRow("train", 0, "text is empty"), Example(1, text="b", label=0)]
