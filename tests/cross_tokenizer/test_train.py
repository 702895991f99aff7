"""Tokenizers that are trained on a cache's text, and students that use them."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import pipeline as softlabel
from pipeline.capture.run import run as capture
from pipeline.cli import main
from pipeline.config import InitStudentConfig, TrainStudentConfig
from pipeline.cross_tokenizer.embeddings import new_vocabulary
from pipeline.cross_tokenizer.students import run
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.train import _Read, _rebuilt_texts, train_on_cache, train_tokenizer
from pipeline.errors import CacheError, MisuseError, ModelError
from pipeline.models import tokenizer_info
from pipeline.training.run import run as train
from tests.conftest import tiny_model
from tests.cross_tokenizer.test_training import byte_level
from tests.support.captures import config  # noqa: F401
from tests.support.chats import FAMILIES as CHATS
from tests.support.chats import tokenizer_of
from tests.tasks.families import FAMILIES

TEXTS = ["the cat sat on a mat", "it isn't 10 or 20, naïve 漢字 😀", "def f(x):\n    return x + 1\n"] * 20
SAMPLE = "the cat isn't 漢字 \r\n  on <|user|>a naïve 😀 mat"


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def saved(tokenizer: Any, path: Any) -> Any:
    tokenizer.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_gives_a_byte_level_tokenizer_with_its_special_tokens(tmp_path, name):
    base = FAMILIES[name]
    made = train_tokenizer(base, iter(TEXTS), 290)
    again = saved(made, tmp_path / "made")
    assert len(made) == 290
    assert tokenizer_info(again) == tokenizer_info(made) == tokenizer_info(train_tokenizer(base, TEXTS, 290))
    assert again.special_tokens_map == base.special_tokens_map
    assert set(again.all_special_tokens) == set(base.all_special_tokens)
    codes, theirs = TokenBytes.of(again), TokenBytes.of(base)
    assert codes.vocabulary.family == "byte-level"
    assert {bytes([b]) for b in range(256)} <= set(codes.pieces)
    ours, whose = codes.vocabulary, theirs.vocabulary
    for mine, other in ((ours.prefix, whose.prefix), (ours.suffix, whose.suffix)):
        assert again.convert_ids_to_tokens(mine) == base.convert_ids_to_tokens(other)
    ids = np.array(again(SAMPLE, add_special_tokens=False)["input_ids"])
    rebuilt = "<|user|>".join(run.text.decode() for run in codes.runs(ids))
    assert rebuilt == (
        SAMPLE
        if again.backend_tokenizer.normalizer is None
        else again.backend_tokenizer.normalizer.normalize_str(SAMPLE)
    )


@pytest.mark.parametrize("name", sorted(CHATS))
def test_chat_templates_render_to_the_same_special_tokens(tmp_path, name):
    base = tokenizer_of(name)
    made = saved(train_tokenizer(base, TEXTS, 330), tmp_path / "made")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    text = base.apply_chat_template(chat, tokenize=False)
    assert made.apply_chat_template(chat, tokenize=False) == text

    def special(tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [t for t in tokenizer.convert_ids_to_tokens(ids) if t in base.get_added_vocab()]

    assert special(made) == special(base)
    assert special(made)


def test_what_stands_around_a_text_has_the_new_ids_inside_a_sequence_too(tmp_path):
    """Covers a template inside a sequence of post-processors, as Llama 3 uses to add its BOS."""
    base = byte_level(300)
    base.add_tokens(["<think>", "</think>"])
    eos = base.eos_token_id
    base.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<end> $A <pad>", special_tokens=[("<end>", eos), ("<pad>", 1)]),
        ]
    )
    base.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    made = saved(train_tokenizer(base, TEXTS, 280), tmp_path / "made")
    assert len(made) == 280
    tokens = made.convert_ids_to_tokens(made("a<think>b<extra>")["input_ids"])
    assert tokens == ["<end>", "a", "<think>", "b", "<extra>", "<pad>"]
    assert not made.added_tokens_decoder[made.convert_tokens_to_ids("<think>")].special
    assert made.added_tokens_decoder[made.convert_tokens_to_ids("<extra>")].special
    assert made.convert_tokens_to_ids("<extra>") != base.convert_tokens_to_ids("<extra>")


def test_sizes_that_cannot_be(lm_tokenizer):
    with pytest.raises(MisuseError, match=r"train:257: expected at least 258 tokens: 256 bytes, and the 2 special"):
        train_tokenizer(lm_tokenizer, TEXTS, 257)
    assert len(train_tokenizer(lm_tokenizer, TEXTS, 258)) == 258
    for size in ("", "8k", "-1", "255", "1.5"):
        with pytest.raises(MisuseError, match="expected train:SIZE with a number of tokens"):
            InitStudentConfig(teacher="t", output="o", tokenizer=f"train:{size}", cache="c")
    with pytest.raises(MisuseError, match="needs --cache"):
        InitStudentConfig(teacher="t", output="o", tokenizer="train:300")
    for tokenizer in (None, "dir"):
        with pytest.raises(MisuseError, match="--cache goes with --tokenizer train:SIZE"):
            InitStudentConfig(teacher="t", output="o", tokenizer=tokenizer, cache="c")


def test_a_tokenizer_of_a_caches_text_is_that_of_the_texts(config, documents, lm_tokenizer, caplog):
    cache = capture(config("cache"))
    with caplog.at_level(logging.INFO, logger="pipeline"):
        made = train_on_cache(cache, lm_tokenizer, 300)
    texts = documents["train"]["text"]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert f"300 tokens, trained on {num_bytes} bytes of text in " in caplog.text  # including the text at row ends
    caplog.clear()
    whole = train_on_cache(cache, lm_tokenizer, 5000)
    assert len(whole) < 5000
    assert f"the vocabulary has {len(whole)} tokens, fewer than asked for" in caplog.text
    assert set(made.get_vocab()) < set(whole.get_vocab())


def test_a_stored_text_stands_in_for_unknown_tokens():
    codes = TokenBytes.of(FAMILIES["bert"])
    known, unknown = (codes.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "the 漢"))
    table = pa.table({"input_ids": [known, unknown], "piece": pa.array([0, 0], pa.int32())})
    read = _Read()
    assert [text.strip() for text in _rebuilt_texts(table, codes, read, packed=False)] == ["the cat"]
    assert read.num_unknown == 1
    stored = table.append_column("text", pa.array(["The cat", "The 漢"]))
    read = _Read()
    assert [text.strip() for text in _rebuilt_texts(stored, codes, read, packed=False)] == ["the cat", "The 漢"]
    assert read.num_unknown == 0


def test_a_capture_a_student_with_its_own_tokenizer_and_its_training(tmp_path, config):
    capture(config("cache"))
    output = tmp_path / "init"
    made = run(
        InitStudentConfig(
            teacher=str(tmp_path / "teacher"), output=str(output), tokenizer="train:290", cache=str(tmp_path / "cache"),
            num_layers=1, hidden_size=16, num_heads=2,
        )
    )  # fmt: skip
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert made.vocabulary is not None
    assert (len(tokenizer), model.config.vocab_size, model.get_input_embeddings().num_embeddings) == (290, 290, 290)
    for part in (model.config, model.generation_config):
        assert (part.pad_token_id, part.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    found = train(
        TrainStudentConfig(
            cache=(str(tmp_path / "cache"),), student=str(output), output=str(tmp_path / "out"), learning_rate=3e-3,
            epochs=3, batch_size=8, training={"logging_steps": 5},
        )
    )  # fmt: skip
    assert found.soft_loss is not None
    assert np.isfinite(found.soft_loss)
    log = [e for e in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("opt", True), ("cohere", True)]
)
def test_copied_layers_keep_rows_of_equal_tokens_and_average_the_others(tmp_path, lm_tokenizer, kind, tied):
    teacher = tiny_model(kind, len(lm_tokenizer) + 3, seed=2, tie_word_embeddings=tied)  # 3 rows without a token
    student = train_tokenizer(byte_level(300), TEXTS, 300)
    path = softlabel.init_student(
        teacher, tmp_path / "s", layers=[0], tokenizer=student, teacher_tokenizer=lm_tokenizer
    )
    made = AutoModelForCausalLM.from_pretrained(path)
    assert made.config.vocab_size == 300
    assert tokenizer_info(AutoTokenizer.from_pretrained(path)) == tokenizer_info(student)
    ours, theirs = TokenBytes.of(student), TokenBytes.of(lm_tokenizer)
    for new, old in [
        (made.get_input_embeddings().weight, teacher.get_input_embeddings().weight),
        (made.get_output_embeddings().weight, teacher.get_output_embeddings().weight),
    ]:
        seen = set()
        for i, piece in enumerate(ours.pieces):
            if piece is None:
                name = student.convert_ids_to_tokens(i)
                other = {"<pad>": lm_tokenizer.pad_token_id, "<end>": lm_tokenizer.eos_token_id}.get(name)
                expected = old.mean(0) if other is None else old[other]
            elif piece in theirs.pieces:
                expected = old[theirs.pieces.index(piece)]
                seen.add("copied")
            else:
                parts = lm_tokenizer.backend_tokenizer.model.tokenize(student.convert_ids_to_tokens(i))
                assert b"".join(theirs.pieces[t.id] or b"" for t in parts) == piece
                expected = old[[t.id for t in parts]].mean(0)
                seen.add("averaged")
            torch.testing.assert_close(new[i], expected)
        assert seen == {"copied", "averaged"}
    shared = made.get_input_embeddings().weight is made.get_output_embeddings().weight
    assert shared == (teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight) == tied
    assert torch.isfinite(made(input_ids=torch.arange(300)[None, :60]).logits).all()


@pytest.mark.parametrize("teacher", sorted(FAMILIES))
@pytest.mark.parametrize("student", ["gpt2", "llama2", "bert"])
def test_parts_of_a_token_spell_its_bytes(teacher, student):
    """The teacher tokens that are averaged for a new token spell the new token's bytes.

    Bytes for which the teacher has no token are omitted.
    """
    theirs, ours = TokenBytes.of(FAMILIES[teacher]), TokenBytes.of(FAMILIES[student])
    found = new_vocabulary(FAMILIES[teacher], FAMILIES[student], with_rows=True)
    sources = found.sources
    assert sources is not None
    assert found.num_copied + found.num_averaged + found.num_unknown == len(ours.pieces)
    known = set(b"".join(piece for piece in theirs.pieces if piece))
    for i, piece in enumerate(ours.pieces):
        parts = sources.values[sources.offsets[i] : sources.offsets[i + 1]]
        spelled = b"".join(theirs.pieces[t] or b"" for t in parts)
        if piece is not None and known == set(range(256)):
            assert spelled == piece
        elif piece is not None:
            assert len(spelled) <= len(piece)
    assert found.num_copied > 0


def test_ids_of_the_configuration_become_those_of_the_counterparts(tmp_path, lm_tokenizer):
    teacher = tiny_model("llama", len(lm_tokenizer))
    teacher.config.eos_token_id = [1, 300]  # the second is not a special token
    teacher.config.bos_token_id = -1
    teacher.config.architectures = [type(teacher).__name__]
    student = byte_level(290)
    path = softlabel.init_student(
        teacher, tmp_path / "s", config=softlabel.Shape(1, 16, 2), tokenizer=student, teacher_tokenizer=lm_tokenizer
    )
    made = AutoModelForCausalLM.from_pretrained(path)
    for part in (made.config, made.generation_config):
        assert (part.bos_token_id, part.eos_token_id, part.pad_token_id) == (None, [2], 1)
    small = made.config.__class__(**{**made.config.to_dict(), "vocab_size": 280})
    with pytest.raises(
        MisuseError, match="expected a vocab_size of at least 290, as the tokenizer has tokens, found 280"
    ):
        softlabel.init_student(teacher, tmp_path / "t", config=small, tokenizer=student, teacher_tokenizer=lm_tokenizer)


def test_another_tokenizer_leaves_no_file_of_the_one_before(tmp_path, lm_tokenizer, save_teacher):
    chat = tokenizer_of("smollm2")
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    chat.save_pretrained(tmp_path / "chat")
    output = tmp_path / "s"
    shape = softlabel.Shape(1, 16, 2)
    softlabel.init_student(teacher, output, config=shape, tokenizer=str(tmp_path / "chat"))
    assert AutoTokenizer.from_pretrained(output).chat_template == chat.chat_template
    softlabel.init_student(teacher, output, config=shape)
    assert AutoTokenizer.from_pretrained(output).chat_template is None
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == len(lm_tokenizer)


def test_what_is_wrong_with_the_student_is_said_before_a_tokenizer_is_trained(tmp_path, config, monkeypatch):
    capture(config("cache"))
    monkeypatch.setattr("pipeline.cross_tokenizer.students.train_on_cache", lambda *_: pytest.fail("was trained"))
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    for more, output, said in [
        ({"layers": [9]}, "s", "layers 0 to 3"),
        ({"config": softlabel.Shape(1, 30, 4)}, "s", "expected a multiple of --num-heads"),
        ({}, "teacher", "is the teacher's own directory"),
    ]:
        with pytest.raises(MisuseError, match=said):
            softlabel.init_student(teacher, tmp_path / output, tokenizer="train:300", cache=cache, **more)


def test_the_same_tokenizer_is_the_ordinary_student(tmp_path, lm_tokenizer, save_teacher):
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    plain = softlabel.init_student(teacher, tmp_path / "a")
    named = softlabel.init_student(teacher, tmp_path / "b", tokenizer=teacher)
    assert (plain / "model.safetensors").read_bytes() == (named / "model.safetensors").read_bytes()


def test_what_is_no_tokenizer_or_has_no_text(tmp_path, lm_tokenizer, bert_tokenizer, save_teacher, topics):
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    (tmp_path / "empty").mkdir()
    for name, said in {
        "empty": "empty: expected a directory with a tokenizer",
        "absent": "no such file or directory",
    }.items():
        with pytest.raises(ModelError, match=said) as error:
            softlabel.init_student(teacher, tmp_path / "s", tokenizer=str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(CacheError, match="nothing"):
        softlabel.init_student(teacher, tmp_path / "s", tokenizer="train:300", cache=tmp_path / "nothing")
    with pytest.raises(MisuseError, match="go together"):
        softlabel.init_student(teacher, tmp_path / "s", tokenizer="train:300")
    with pytest.raises(MisuseError, match="teacher_tokenizer"):
        softlabel.init_student(tiny_model("llama", 320), tmp_path / "s", tokenizer=str(teacher))
    classifier = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer, "classifier")
    settings = {"task": "sequence-classification", "max_length": 32, "encoding": softlabel.Full()}
    cache = softlabel.cache_logits(
        str(classifier), topics["train"].remove_columns("label"), tmp_path / "c", store_text=False, **settings
    )
    with pytest.raises(CacheError, match="holds none; cache again with --store-text"):
        softlabel.init_student(classifier, tmp_path / "s", tokenizer="train:300", cache=cache)
    assert not (tmp_path / "s").exists()


def test_a_classifiers_student_has_its_own_tokenizer_too(tmp_path, bert_tokenizer, save_teacher, topics):
    classifier = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer, "classifier")
    softlabel.cache_logits(
        str(classifier), topics["train"].remove_columns("label"), tmp_path / "c", task="sequence-classification", max_length=32,
    )  # fmt: skip
    for name, more in {"layers": {}, "random": {"config": softlabel.Shape(1, 16, 2)}}.items():
        path = softlabel.init_student(classifier, tmp_path / name, tokenizer="train:290", cache=tmp_path / "c", **more)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer("the cat")["input_ids"]
        assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
        found = train(
            TrainStudentConfig(
                cache=(str(tmp_path / "c"),), student=str(path), output=str(tmp_path / f"{name}-out"), max_steps=2,
                batch_size=8, soft_weight=1.0, hard_weight=0.0,
            )
        )  # fmt: skip
        assert found.soft_loss is not None
        assert np.isfinite(found.soft_loss)


def test_the_command_says_where_embeddings_come_from(tmp_path, config, lm_tokenizer):
    from click.testing import CliRunner

    capture(config("cache"))
    flags = ["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "init")]
    done = CliRunner().invoke(
        main, ["init-student", *flags, "--tokenizer", "train:290", "--cache", str(tmp_path / "cache")]
    )
    assert done.exit_code == 0, done.output
    assert "tokenizer: its own, 290 tokens; of their embeddings " in done.stdout
    assert "0 the mean of all" in done.stdout
    failed = CliRunner().invoke(main, ["init-student", *flags, "--tokenizer", "train:8k"])
    assert failed.exit_code == 2
    assert failed.stderr.startswith("Error: --tokenizer train:8k: expected train:SIZE")
