"""`--base-model` on the command line.

Covers adapters whose base is missing or null, and the use of another base.
"""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from datasets import Dataset, DatasetDict

import pipeline as softlabel
from pipeline.cli import main
from pipeline.models import load_model
from pipeline.models.adapters import LABELS
from pipeline.tasks import get_task
from tests.conftest import tiny_model
from tests.support.classifier import classifier, even

peft = pytest.importorskip("peft")
ABSENT = object()


def call(*args):
    return CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)


def names_base(path, base):
    """Set the base model that an adapter names."""
    file = path / "adapter_config.json"
    said = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not ABSENT}))


def copied(path, name, base):
    """Return a copy of an adapter that names another base."""
    names_base(shutil.copytree(path, path.with_name(name)), base)
    return path.with_name(name)


@pytest.fixture
def classes(tmp_path, bert_tokenizer, save_teacher):
    """Create a cache, two bases, and an adapter trained on the first."""
    teacher, texts, labels = even(bert_tokenizer)
    rows = Dataset.from_dict({"text": texts[:40], "label": labels[:40]})
    softlabel.cache_logits(
        teacher,
        DatasetDict({"train": rows, "test": rows}),
        tmp_path / "cache",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
    )
    for seed, name in ((1, "base"), (2, "other")):
        save_teacher(classifier(bert_tokenizer, seed).bert, bert_tokenizer, name)
    assert trained(tmp_path, "base", "adapter", "--lora-r", 2).exit_code == 0
    return tmp_path


def trained(root, student, output, *flags):
    settings = ("--max-steps", 2, "--batch-size", 8, "--soft-weight", 1)
    return call(
        "train-student",
        "--cache",
        root / "cache",
        "--student",
        root / student,
        "--output",
        root / output,
        *settings,
        *flags,
    )


def evaluated(root, *students, flags=()):
    named = [part for student in students for part in ("--student", root / student)]
    return call("evaluate", "--cache", root / "cache", *named, "--json", *flags)


@pytest.mark.parametrize("base", [None, "", ABSENT, 7, "/nowhere/at/all"])
def test_an_adapter_without_a_base_is_one_line_and_a_base_can_be_named(classes, base):
    expected = json.loads(evaluated(classes, "adapter").stdout)["students"][0]
    copied(classes / "adapter", "broken", base)
    flags = ("--base-model", classes / "base")
    for refused in (evaluated(classes, "broken"), trained(classes, "broken", "out")):
        assert refused.exit_code == 1
        (line,) = (line for line in refused.stderr.splitlines() if line.startswith("Error: "))
        assert "broken" in line
        assert line.endswith("--base-model")
        assert "Traceback" not in refused.output
    assert not (classes / "out").exists()
    found = json.loads(evaluated(classes, "broken", flags=flags).stdout)["students"][0]
    assert {**found, "name": "adapter"} == expected
    done = trained(classes, "broken", "out", *flags)
    assert done.exit_code == 0, done.output
    assert json.loads((classes / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        classes / "base"
    )
    assert str(classes) not in (classes / "out" / "README.md").read_text()
    assert evaluated(classes, "out").exit_code == 0


def test_another_base_is_used_for_the_adapters_alone(classes):
    """Full students next to the adapters are loaded unchanged."""
    assert trained(classes, "base", "full").exit_code == 0
    both = ("adapter", "full")
    plain = json.loads(evaluated(classes, *both).stdout)["students"]
    other = json.loads(evaluated(classes, *both, flags=("--base-model", classes / "other")).stdout)["students"]
    assert other[0]["kl"] != plain[0]["kl"]
    assert other[1] == plain[1]
    for refused in (
        evaluated(classes, "full", flags=("--base-model", classes / "other")),
        trained(classes, "full", "out", "--base-model", classes / "other"),
    ):
        assert refused.exit_code == 2
        assert "is for PEFT adapters" in refused.stderr
    assert not (classes / "out").exists()


def test_a_base_that_does_not_fit_is_one_line(classes, lm_tokenizer, save_teacher):
    save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "llama")
    for base, said in (
        ("llama", "adapter"),
        ("nowhere", "its base model is not found"),
        ("adapter", "is an adapter itself"),
    ):
        for refused in (
            evaluated(classes, "adapter", flags=("--base-model", classes / base)),
            trained(classes, "adapter", "out", "--base-model", classes / base),
        ):
            assert refused.exit_code == 1
            assert said in refused.stderr.splitlines()[-1]
            assert "Traceback" not in refused.output
    assert not (classes / "out").exists()


def test_the_labels_of_an_adapter_are_compared_with_the_caches(classes, bert_tokenizer, save_teacher):
    """Compares the adapter's own labels, or those of the given base if the adapter has no head."""
    assert json.loads((classes / "adapter" / LABELS).read_text()) == ["sport", "film", "business"]
    (classes / "adapter" / LABELS).write_text(json.dumps(["film", "sport", "business"]))
    save_teacher(classifier(bert_tokenizer, 1), bert_tokenizer, "classifier")
    model = load_model(get_task("sequence-classification"), str(classes / "classifier")).model
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).save_pretrained(classes / "headless")
    names_base(classes / "headless", None)
    for student, flags in (("adapter", ()), ("headless", ("--base-model", classes / "classifier"))):
        for refused in (evaluated(classes, student, flags=flags), trained(classes, student, "out", *flags)):
            assert refused.exit_code == 1
            assert "label 0: expected 'sport', as in the cache, found" in refused.stderr
    (classes / "adapter" / LABELS).write_text("{")
    assert f"{LABELS}: cannot be read" in evaluated(classes, "adapter").stderr


def test_a_language_model_goes_on_from_a_prompt_on_the_base_that_is_named(
    tmp_path, lm_tokenizer, documents, save_teacher
):
    teacher = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    softlabel.cache_logits(
        teacher, documents, tmp_path / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
    )
    save_teacher(tiny_model("llama", len(lm_tokenizer), seed=1), lm_tokenizer, "base")
    assert trained(tmp_path, "base", "adapter", "--lora-r", 2).exit_code == 0
    copied(tmp_path / "adapter", "broken", None)
    prompt = ("--prompt", "the cat")
    expected = json.loads(evaluated(tmp_path, "adapter", flags=prompt).stdout)["continuations"][0]["texts"]["adapter"]
    found = evaluated(tmp_path, "broken", flags=(*prompt, "--base-model", tmp_path / "base"))
    assert json.loads(found.stdout)["continuations"][0]["texts"] == {"broken": expected}
