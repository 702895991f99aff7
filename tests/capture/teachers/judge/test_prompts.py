"""Prompts of judges: templates, label tokens, few-shot examples and truncation of long texts."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.capture.teachers.judge.labels import labels_of
from pipeline.capture.teachers.judge.local import LocalScorer
from pipeline.capture.teachers.judge.shots import choose_shots
from pipeline.capture.teachers.judge.teacher import make_judge
from pipeline.capture.teachers.judge.template import DEFAULT, read_template
from pipeline.errors import MisuseError, ModelError, SourceError
from pipeline.models import LoadedModel
from pipeline.records import Columns, Full, Judging, Tokenization
from pipeline.sources import LabelMap, from_datasets, read_examples
from pipeline.tasks import get_task
from tests.conftest import TINY, tiny_model
from tests.support.chats import tokenizer_of

TASK = get_task("sequence-classification")
SHORT = "{{ text }} ="
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture
def tokenizer(lm_tokenizer):
    found = copy.deepcopy(lm_tokenizer)
    found.model_max_length = 400
    return found


@pytest.fixture
def with_bos(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"bos_token": "<eos>"})
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", pair="<eos> $A <eos> $B", special_tokens=[("<eos>", 1)]
    )
    return found


def judge_of(tokenizer, data, judging=Judging(), columns=Columns(), **settings):  # noqa: B008
    model = tiny_model("llama", len(tokenizer), spread=3.0)
    source = from_datasets(data, columns)
    return make_judge(LocalScorer(LoadedModel(model, tokenizer, "tiny"), 4096), judging, source, **settings)


def rows_of(judge, data, split="train", length=40, columns=Columns()):  # noqa: B008
    source = from_datasets(data, columns)
    labels = LabelMap.for_names(source, judge.names)
    examples = read_examples(source, split, 0, len(data[split]), labels)
    return list(TASK.tokenize(examples, split, judge.tokenizer, Tokenization(length)))


# ------------------------------------------------------------------------------------------- labels


def test_labels_of_the_data_and_of_flags(topics):
    source = from_datasets(topics, Columns())
    assert labels_of(source, ()) == (("business", "film", "sport"),) * 2
    given = labels_of(source, ("sport=about a match", "film", "business=a=b"))
    assert given == (("sport", "film", "business"), ("about a match", "film", "a=b"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a=b", "a=c"), "--label-text a: the class is given twice"),
        (("a=b",), "expected at least 2 classes, found a"),
        (("a=",), "expected NAME=TEXT"),
        (("=b", "c"), "expected NAME=TEXT"),
        (("a=b\nc", "c"), "expected NAME=TEXT"),
    ],
)
def test_bad_label_texts(topics, texts, message):
    with pytest.raises(MisuseError, match=message):
        labels_of(from_datasets(topics, Columns()), texts)


def test_numbers_and_missing_labels_need_texts():
    numbered = DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})})
    with pytest.raises(MisuseError, match=r"labels are numbers \(0, 1\).* --label-text 0=sport"):
        labels_of(from_datasets(numbered, Columns()), ())
    bare = DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"]})})
    with pytest.raises(MisuseError, match="no label column to take the names of the labels from; give each class"):
        labels_of(from_datasets(bare, Columns(label=None)), ())
    assert labels_of(from_datasets(numbered, Columns()), ("no", "yes"))[0] == ("no", "yes")


@pytest.mark.parametrize(
    ("end", "label", "behind"),
    [
        (" is", "cat", " cat"),
        (":", "cat", " cat"),
        (":\n\n", "cat", "cat"),  # a final line end is not part of a template
        (": ", "cat", " cat"),  # the space moves to the label
        (' "', "cat", "cat"),
        (" (", "cat", "cat"),
        ("\uff1a", "cat", "cat"),  # a full-width colon
        (":", " cat", " cat"),
    ],
)
def test_a_label_is_what_it_adds_to_the_prompt(tokenizer, topics, end, label, behind):
    judge = judge_of(tokenizer, topics, Judging("{{ text }}" + end, (f"a={label}", "b=dog ran")))
    prompts = judge.prompts
    assert tokenizer.decode(list(prompts.label_ids[0])) == behind
    for name, ids in zip((behind, "dog ran" if behind[0] != " " else " dog ran"), prompts.label_ids, strict=True):
        prompt = prompts.text("the mat", None)
        joint = tokenizer(prompt + name)["input_ids"]
        assert joint == [*prompts.ids("the mat", None).tolist(), *ids]


def test_bos_comes_once(with_bos, topics):
    plain = judge_of(with_bos, topics, Judging(SHORT))
    assert plain.prompts.ids("the cat", None).tolist() == with_bos("the cat =")["input_ids"]
    assert with_bos("the")["input_ids"][0] == 1
    own = judge_of(with_bos, topics, Judging("<eos>{{ text }} ="))
    assert own.prompts.ids("the cat", None).tolist() == with_bos("the cat =")["input_ids"]
    assert 1 not in sum(plain.prompts.label_ids, ())
    with_bos.chat_template = CHAT
    chat = judge_of(with_bos, topics, Judging(SHORT))
    ids = chat.prompts.ids("the cat", None).tolist()
    assert ids.count(1) == 1
    assert with_bos.decode(ids) == "<eos>[user]\nthe cat =\n[assistant]\n"


def test_a_chat_template_says_what_stands_before_an_answer(tokenizer, topics):
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "")
    judge = judge_of(tokenizer, topics, Judging(SHORT))
    assert judge.prompt.format == "chat"
    assert [tokenizer.decode(list(ids)) for ids in judge.prompts.label_ids] == ["business", "film", "sport"]
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{% endif %}{% endfor %}"
    judge = judge_of(tokenizer, topics, Judging(SHORT))
    assert [tokenizer.decode(list(ids)) for ids in judge.prompts.label_ids] == [" business", " film", " sport"]
    plain = judge_of(tokenizer, topics, Judging(SHORT, format="plain"))
    assert plain.prompt.format == "plain"
    assert tokenizer.decode(plain.prompts.ids("the cat", None).tolist()) == "the cat ="


THINKS = (
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_a_label_stands_where_the_chat_template_puts_an_answer(tokenizer, topics):
    tokenizer.chat_template = THINKS
    asked, off = (
        judge_of(tokenizer, topics, Judging(SHORT), chat_arguments=a) for a in ((), ["enable_thinking=false"])
    )
    assert asked.prompts.text("a", None).endswith("<assistant>\n<think>\n\n</think>\n\n")
    assert asked.prompts.text("a", None) == off.prompts.text("a", None)
    assert asked.prompts.label_ids == off.prompts.label_ids
    assert [tokenizer.decode(list(ids)) for ids in asked.prompts.label_ids] == ["business", "film", "sport"]
    # The text before the label contains the label; its trailing white space moves to the label.
    tokenizer.chat_template = THINKS.replace("</think>\n\n", "</think> ")
    found = judge_of(tokenizer, topics, Judging(SHORT, ("a=think", "b=cat"))).prompts
    assert found.text("a", None).endswith("</think>")
    assert [tokenizer.decode(list(ids)) for ids in found.label_ids] == [" think", " cat"]


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("qwen-3", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("gpt-oss", "<|start|>assistant<|channel|>final<|message|>"),
        ("qwen-2.5", "<|im_start|>assistant\n"),
        ("mistral-v0.3", "[/INST]"),
    ],
)
def test_prompts_of_model_families_end_where_an_answer_begins(family, end, topics):
    judge = judge_of(tokenizer_of(family), topics, Judging(SHORT))
    assert judge.prompts.text("a", None).endswith(end)


def test_a_generation_prompt_that_no_answer_has_is_said(tokenizer, topics, caplog):
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "").replace(
        "[assistant]\n{% endif", "[assistant]\n<think>\n{% endif"
    )
    judge = judge_of(tokenizer, topics, Judging(SHORT))
    assert judge.prompts.text("a", None).endswith("[assistant]\n<think>\n")
    assert r"ends the prompt with '<think>\n', and does not put that before an answer" in caplog.text


def test_arguments_of_the_chat_template(tokenizer, topics):
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "{{ mood }}")
    judge = judge_of(tokenizer, topics, Judging(SHORT), chat_arguments=['mood="calm"'])
    assert judge.prompts.text("a", None).startswith("calm[user]")
    with pytest.raises(MisuseError, match="does not read it"):
        judge_of(tokenizer, topics, Judging(SHORT), chat_arguments=["other=1"])
    with pytest.raises(MisuseError, match="--chat-template-kwargs goes with --prompt-format chat"):
        judge_of(tokenizer, topics, Judging(SHORT, format="plain"), chat_arguments=["other=1"])
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="no chat template"):
        judge_of(tokenizer, topics, Judging(SHORT, format="chat"))


@pytest.mark.parametrize("mark", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_the_day_of_a_chat_template_stands_in_the_contract(tokenizer, topics, mark):
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') }} {% for m in messages %}[{{ m.role }}] CONTENT {% endfor %}".replace(
            "CONTENT", mark[0] + "{{ m.content }}" + mark[1]
        )
    )
    judge = judge_of(tokenizer, topics, Judging(SHORT))
    assert judge.prompts.text("a", None).startswith("2024 [user] a =")
    assert judge.settle(Tokenization(9)).chat_template_kwargs == ('strftime_now="2024-07-26"',)
    other = judge_of(tokenizer, topics, Judging(SHORT), chat_arguments=['strftime_now="1999-01-01"'])
    assert other.prompts.text("a", None).startswith("1999 ")
    assert other.settle(Tokenization(9)).chat_template_kwargs == ('strftime_now="1999-01-01"',)
    plain = judge_of(tokenizer, topics, Judging(SHORT, format="plain"))
    assert plain.settle(Tokenization(9)) == Tokenization(9)


def test_labels_without_tokens_or_with_those_of_another(bert_tokenizer, topics):
    found = copy.deepcopy(bert_tokenizer)
    with pytest.raises(MisuseError, match=r"--label-text: '\\u200b': the tokenizer makes no token of it"):
        judge_of(found, topics, Judging(SHORT, ("a=\u200b", "b=dog")))
    with pytest.raises(MisuseError, match="'DOG': has the tokens of the label 'dog'"):
        judge_of(found, topics, Judging(SHORT, ("a=dog", "b=DOG")))


def test_a_label_that_becomes_one_token_with_the_prompt():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        ["市场 市场 市民 狗"] * 5,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=100)
    data = DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(MisuseError, match="'场': the tokenizer merges its first token with the prompt's last"):
        judge_of(made, data, Judging("{{ text }} 市", ("a=场", "b=狗")), Columns(label=None))


def test_a_label_that_begins_another_is_said(tokenizer, topics, caplog):
    judge_of(tokenizer, topics, Judging(SHORT, ("a=dog", "b=dog ran")))
    assert "the tokens of 'dog' begin those of 'dog ran'" in caplog.text


# ---------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ txt }}", "cannot be rendered: 'txt' is undefined; a template reads text, text_pair, labels and shots"),
        ("no variable {{ labels }}", "does not read text; put {{ text }} in it"),
        ("{{ text }}\n{% if %}", "line 2: Expected an expression"),
        ("{{ text }}\tx", "line 1: expected text without control characters, found '\\\\t'"),
        ("{{ text }}" + "x" * 10_000, "expected at most 10,000 characters"),
        ("{{ text }}{{ ''.__class__.__mro__ }}", "cannot be rendered: access to attribute"),
        ("{{ text }}{{ 1 / 0 }}", "cannot be rendered: division by zero"),
    ],
)
def test_bad_templates(tokenizer, topics, source, message):
    with pytest.raises(MisuseError, match=message.replace("{", r"\{").replace("(", r"\(")):
        judge_of(tokenizer, topics, Judging(source))


def test_a_template_that_leaves_out_shots_or_the_second_text(tokenizer, topics):
    with pytest.raises(MisuseError, match="does not read shots"):
        judge_of(tokenizer, topics, Judging(SHORT, shots=2))
    pairs = topics.map(lambda row: {"other": row["text"][::-1]})
    with pytest.raises(MisuseError, match="does not read text_pair"):
        judge_of(tokenizer, pairs, Judging(SHORT), Columns(text_pair="other"))


def test_a_template_in_a_file(tmp_path):
    file = tmp_path / "prompt.jinja"
    file.write_bytes(b"a\r\n{{ text }}:\r\n")
    template = read_template(str(file))
    assert template.lines == ("a", "{{ text }}:", "")
    assert template.render("x", None, ["l"], []) == "a\nx:"
    with pytest.raises(MisuseError, match=r"--prompt-template .*absent.jinja: cannot be read \(No such file"):
        read_template(str(tmp_path / "absent.jinja"))


def test_the_default_template(tokenizer, topics):
    judge = judge_of(tokenizer, topics, Judging(shots=2, shot_tokens=6))
    text = judge.prompts.text("THE ROW", None)
    first, second = judge.prompts.shots.chosen
    assert text == (
        "Classify the text into one of these categories: business, film, sport.\n\n"
        f"Text: {first.shown}\nCategory: {judge.names[first.label]}\n\n"
        f"Text: {second.shown}\nCategory: {judge.names[second.label]}\n\n"
        "Text: THE ROW\nCategory:"
    )
    assert judge.prompt.template == tuple(DEFAULT.split("\n"))
    pairs = topics.map(lambda row: {"other": "river"})
    paired = judge_of(tokenizer, pairs, Judging(), Columns(text_pair="other"))
    assert paired.prompts.text("A", "B").endswith("Text: A\nSecond text: B\nCategory:")


# -------------------------------------------------------------------------------------------- shots


def chosen(data, count, seed=0, begun=()):
    source = from_datasets(data, Columns())
    names = ("business", "film", "sport")
    return choose_shots(source, LabelMap.for_names(source, names), names, count, seed, begun)


def test_shots_are_labelled_rows_of_train_each_label_in_turn(topics):
    shots = chosen(topics, 7)
    assert shots == chosen(topics, 7)
    assert shots != chosen(topics, 7, seed=1)
    assert sorted(np.bincount([shot.label for shot in shots.chosen]).tolist()) == [2, 2, 3]
    rows = topics["train"]
    for shot in (*shots.chosen, *shots.reserve):
        assert rows[shot.row]["text"] == shot.text
        assert rows[shot.row]["label"] == ("business", "film", "sport")[shot.label]
    assert {shot.label for shot in shots.reserve} == {0, 1, 2}


def test_a_row_is_never_its_own_example(topics):
    shots = chosen(topics, 5)
    for shot in shots.chosen:
        others = shots.of(f" {shot.text}\n", None)
        assert len(others) == 5
        assert shot.text not in [other.text for other in others]
        assert [other.label for other in others] == [other.label for other in shots.chosen]
    assert shots.of("a text of its own", None) == shots.chosen


def test_a_row_that_is_cut_is_never_its_own_example_either(tokenizer, topics):
    judge = judge_of(tokenizer, topics, Judging(shots=4, shot_tokens=5))
    shots = judge.prompts.shots
    rows = {row.source_row: row for row in rows_of(judge, topics, length=12)}
    assert any(rows[shot.row].cut and shot.shown != shot.text for shot in shots.chosen)
    for shot in shots.chosen:
        prompt = tokenizer.decode(judge.prompts.of_row(rows[shot.row]).tolist())
        spare = next(other for other in reversed(shots.reserve) if other.label == shot.label)
        assert f"Text: {shot.shown}\nCategory: {judge.names[shot.label]}\n" not in prompt
        assert f"Text: {spare.shown}\nCategory: {judge.names[shot.label]}\n" in prompt
        assert prompt.count("Text: ") == 5


def test_rows_that_are_added_displace_no_example(topics):
    first = chosen(DatasetDict({"train": topics["train"].select(range(40))}), 6)
    places = [shot.place for shot in first.chosen]
    grown = chosen(topics, 6)
    assert grown.chosen != first.chosen
    kept = chosen(topics, 6, begun=places)
    assert kept.chosen == first.chosen
    assert {shot.label for shot in kept.reserve} == {0, 1, 2}
    assert not {shot.place for shot in kept.reserve} & set(places)
    assert chosen(topics, 6, begun=[shot.place for shot in grown.chosen]) == grown
    assert chosen(topics, 6, begun=["train:1000", *places[1:]]) == grown  # no such row: ignored
    assert chosen(topics, 5, begun=places) == chosen(topics, 5)


def test_shots_of_duplicates_other_splits_and_too_few(topics):
    twice = DatasetDict(
        {"train": Dataset.from_dict({"text": ["a", "a", "b", ""], "label": ["film", "film", "sport", "film"]})}
    )
    shots = chosen(twice, 2)
    assert sorted(shot.text for shot in shots.chosen) == ["a", "b"]
    with pytest.raises(MisuseError, match="--shots 3: in-memory: split train has 2 labelled rows with a text"):
        chosen(twice, 3)
    with pytest.raises(MisuseError, match="no labelled rows in a split train, found test; examples never come"):
        chosen(DatasetDict({"test": topics["test"]}), 2)


def test_a_label_without_an_example_is_said(topics, caplog):
    only = topics["train"].filter(lambda row: row["label"] in ("film", "sport"))
    assert len(chosen(DatasetDict({"train": only}), 6).chosen) == 6
    assert "no labelled row of train has the label 'business'" in caplog.text


# --------------------------------------------------------------------------------------- long texts


def test_a_long_text_is_cut_and_the_template_is_not(tokenizer, topics):
    judge = judge_of(tokenizer, topics, Judging("<<{{ text }}>> ="))
    for row in rows_of(judge, topics, length=10):
        prompt = tokenizer.decode(judge.prompts.of_row(row).tolist())
        assert prompt.startswith("<<")
        assert prompt.endswith(">> =")
        assert row.text.startswith(prompt[2:-4])
        assert tokenizer(prompt[2:-4])["input_ids"] == row.input_ids.tolist()
        assert bool(row.cut) == (prompt[2:-4] != row.text)


@pytest.mark.parametrize("source", ["{{ text }} = ", "{{ text }} {{ text }} {{ labels }} =", DEFAULT])
def test_prompt_and_label_fit_the_model(tokenizer, source):
    tokenizer.model_max_length = 100
    long = "".join(chr(200 + i % 90) for i in range(500))  # two or three tokens per character
    data = DatasetDict({"train": Dataset.from_dict({"text": [long, "the cat"], "label": ["cat", "the long market"]})})
    judge = judge_of(tokenizer, data, Judging(source))
    longest = max(map(len, judge.prompts.label_ids))
    assert 10 < judge.longest_input < 100
    for row in rows_of(judge, data, length=judge.longest_input):
        assert len(judge.prompts.of_row(row)) + longest <= 100
    # The template may repeat the text, so that the rendered prompt is longer.
    ids = dataclasses.replace(judge.prompts, repeats=1).fitted(long, None)
    assert len(ids) + longest <= 100


def test_a_tokenizer_that_cuts_at_the_beginning_is_told_to_cut_at_the_end(tokenizer, topics):
    plain = judge_of(tokenizer, topics, Judging("<<{{ text }}>> ="))
    tokenizer.truncation_side = "left"
    judge = judge_of(tokenizer, topics, Judging("<<{{ text }}>> ="))
    assert tokenizer.truncation_side == "left"  # the caller's tokenizer is unchanged
    found = rows_of(judge, topics, length=10)
    assert any(row.cut for row in found)
    for row, other in zip(found, rows_of(plain, topics, length=10), strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert judge.prompts.of_row(row).tolist() == plain.prompts.of_row(other).tolist()


def test_a_row_without_room_for_its_text_is_a_bad_row(tokenizer, topics, caplog):
    # The length of the text that the template adds depends on the row.
    tokenizer.model_max_length = 60
    judge = judge_of(tokenizer, topics, Judging("{{ ' the' * (90 if text[:1] == 'Z' else 0) }}{{ text }} ="))
    texts = ["the cat ran", "Zoo market", "a dog", "Z"]
    data = DatasetDict({"train": Dataset.from_dict({"text": texts, "label": ["film"] * 4})})
    rows = rows_of(judge, data)
    found = judge.begin(rows, None, Full()).result()
    assert found.isfinite().all(-1).tolist() == [True, False, True, False]
    assert found.isnan().all(-1).tolist() == [False, True, False, True]
    np.testing.assert_allclose(found[::2], judge.begin(rows[::2], None, Full()).result(), atol=1e-4)
    assert judge.begin(rows[1::2], None, Full()).result().isnan().all()
    assert "row 1: no room for the text in the prompt" in caplog.text
    judge.compare(rows, Full())
    judge.compare(rows[1::2], Full())


def test_a_prompt_without_room_is_refused(tokenizer, topics):
    tokenizer.model_max_length = 30
    with pytest.raises(
        MisuseError, match=r"tiny: the prompt without a text takes \d+ tokens, and the model has positions for 30"
    ):
        judge_of(tokenizer, topics)


def test_calibration_takes_the_prior_of_empty_prompts_out(tokenizer, topics):
    plain, calibrated = (judge_of(tokenizer, topics, Judging(SHORT, calibrate=c)) for c in (False, True))
    rows = rows_of(plain, topics)[:5]
    one, two = (judge.begin(rows, None, Full()).result().softmax(-1) for judge in (plain, calibrated))
    free = plain.scorer.begin(
        [plain.prompts.ids(text, None) for text in ("N/A", "[MASK]", "")], plain.prompts.label_ids, plain.prompts.prefix
    ).result()
    expected = one / free.softmax(-1).mean(0)
    np.testing.assert_allclose(two, expected / expected.sum(-1, keepdim=True), rtol=1e-4)
    assert calibrated.prompt.calibrated


@pytest.mark.parametrize("texts", [("the cat ran", "a dog ran", "the dog ran"), ("the cat ran", "a dog", "the cat")])
def test_two_rows_of_different_lengths_are_compared(tokenizer, texts, monkeypatch):
    data = DatasetDict({"train": Dataset.from_dict({"text": texts, "label": ["film", "sport", "film"]})})
    judge = judge_of(tokenizer, data, Judging("Say what it is: {{ text }} ="))
    seen = []
    monkeypatch.setattr(LocalScorer, "compare", lambda _, prompts, labels, prefix: seen.append((prompts, prefix)))
    judge.compare(rows_of(judge, data), Full())
    ((one, other), prefix), *_ = seen
    assert len(one) != len(other)
    assert len(prefix) > 2
    for ids in (one, other):
        assert ids[: len(prefix)].tolist() == prefix.tolist()


def test_a_model_that_counts_positions_by_itself_is_refused_where_padding_shifts_them(tokenizer, topics, monkeypatch):
    monkeypatch.setitem(TINY, "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2})
    monkeypatch.setattr(LocalScorer, "_allows_gaps", True)
    source = from_datasets(topics, Columns())
    model = tiny_model("mpt", len(tokenizer), spread=3.0)
    judge = make_judge(LocalScorer(LoadedModel(model, tokenizer, "tiny"), 4096), Judging(), source)
    with pytest.raises(ModelError, match="differ from those of one pass for each"):
        judge.compare(rows_of(judge, topics), Full())
