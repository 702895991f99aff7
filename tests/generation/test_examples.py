"""Generation of labelled examples: the template, its variables, and reading by later stages."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
from datasets import Dataset

from pipeline.config import DataConfig, GenerateConfig, TrainTeacherConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.generation.job import prepare
from pipeline.generation.run import run
from tests.conftest import tiny_model
from tests.support.generations import writing_model


@pytest.fixture
def make(tmp_path, lm_tokenizer, save_teacher):
    model = save_teacher(writing_model(len(lm_tokenizer), ends=80), lm_tokenizer, "w")
    rows = {"text": [f"{name} {i}" for i in range(6) for name in ("film", "sport")], "label": ["film", "sport"] * 6}
    Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")

    def config(text="{{ number }} {{ label }}", **settings):
        (tmp_path / "t.jinja").write_text(text)
        usual = {"label": ("film", "sport", "news")} if "dataset" not in settings else {}
        return GenerateConfig(
            **{
                "model": str(model),
                "template": str(tmp_path / "t.jinja"),
                "num_examples": 30,
                "max_new_tokens": 8,
                "output": str(tmp_path / "out"),
                **usual,
                **settings,
            }
        )

    config.rows = str(tmp_path / "rows.jsonl")
    return config


def prompts_of(settings):
    job = prepare(settings)
    return list(job.prompts.read("train", 0, settings.num_examples))


def test_the_labels_are_asked_for_in_turn(make):
    found = prompts_of(make("{{ number }} {{ label }} of {{ labels | join(',') }}", num_examples=5))
    assert [(item.label, item.text) for item in found] == [
        ("film", "0 film of film,sport,news"),
        ("sport", "0 sport of film,sport,news"),
        ("news", "0 news of film,sport,news"),
        ("film", "1 film of film,sport,news"),
        ("sport", "1 sport of film,sport,news"),
    ]


def test_shots_are_rows_of_the_label_drawn_for_each_prompt(make):
    text = "{% for s in shots %}{{ s.text }}={{ s.label }};{% endfor %}{{ label }}"
    found = prompts_of(make(text, dataset=make.rows, shots=2, num_examples=12))
    for item in found:
        shots = item.text.removesuffix(item.label).split(";")[:-1]
        assert len(set(shots)) == 2
        assert all(shot.startswith(f"{item.label} ") and shot.endswith(f"={item.label}") for shot in shots)
    assert len({item.text for item in found}) > 6
    again = prompts_of(make(text, dataset=make.rows, shots=2, num_examples=12, output=f"{make.rows}-again"))
    assert [item.text for item in again] == [item.text for item in found]


def test_examples_are_labelled_rows_that_a_teacher_learns_from(make, tmp_path, bert_tokenizer, save_teacher):
    """Cut, empty and duplicate texts are dropped by default."""
    from pipeline.training.teacher import run as train

    found = run(make(dataset=make.rows, num_examples=60, temperature=1.5))
    rows = datasets.load_dataset(str(found.root), split="train").to_list()
    assert len(rows) == found.counts.kept < found.counts.completions == 60
    assert found.counts.cut + found.counts.empty > 0
    assert {row["label"] for row in rows} == {"film", "sport"}
    texts = Counter(" ".join(row["text"].split()) for row in rows)
    assert max(texts.values()) == 1
    assert all(row["text"] == row["completion"].strip() and row["finish_reason"] == "eos" for row in rows)
    assert [row["label"] for row in rows] == [("film", "sport")[row["source_row"] % 2] for row in rows]
    model = save_teacher(tiny_model("bert", len(bert_tokenizer)), bert_tokenizer, "bert")
    train(
        TrainTeacherConfig(
            task="sequence-classification",
            model=str(model),
            data=DataConfig(dataset=str(found.root), max_length=32),
            output=str(tmp_path / "teacher"),
            max_steps=1,
        )
    )
    assert (tmp_path / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("write a news item", "does not read the variable label"),
        ("{{ label }} {{ topic }}", "reads 'topic'; there are label, labels, number, shots"),
        ("{{ label ", r"t.jinja, line 1: is not Jinja"),
    ],
)
def test_a_template_that_cannot_be_right_is_a_line(make, text, line):
    with pytest.raises(MisuseError, match=line):
        prepare(make(text))


def test_other_mistakes_are_lines(make, tmp_path):
    with pytest.raises(MisuseError, match="cannot be read"):
        prepare(make(template=str(tmp_path / "none.jinja")))
    with pytest.raises(SourceError, match="label 'film': cannot be rendered"):
        prompts_of(make("{{ label.no.such }}"))
    with pytest.raises(SourceError, match="--shots 7: the label 'film' has 6 rows"):
        prepare(make(dataset=make.rows, shots=7, output=str(tmp_path / "o2")))
    with pytest.raises(SourceError, match="no label column 'topic'"):
        prepare(make(dataset=make.rows, label_column="topic", output=str(tmp_path / "o3")))


def test_a_template_reaches_nothing_but_its_variables(make):
    with pytest.raises(SourceError, match="cannot be rendered: access to attribute '__class__'"):
        prompts_of(make("{{ label.__class__.__mro__ }}"))
