"""Generated token ids are only accepted by models with the same vocabulary."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipeline.capture.run import run as capture
from pipeline.capture.written import check_written_ids
from pipeline.config import CacheLogitsConfig, DataConfig, GenerateConfig
from pipeline.errors import ContractError
from pipeline.generation.run import run as generate
from tests.conftest import WORDS, tiny_model
from tests.support.generations import writing_model


def reordered(tokenizer):
    """A tokenizer of the same size with two ids swapped, so that ids decode to other texts."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    first, second = sorted(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    raw = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", model_max_length=128)


def test_ids_of_another_tokenizer_are_refused_before_they_are_labelled(tmp_path, lm_tokenizer, save_teacher):
    other = reordered(lm_tokenizer)
    writer = save_teacher(writing_model(len(other)), other, "writer")
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    Dataset.from_dict({"prompt": WORDS[:4]}).to_json(tmp_path / "prompts.jsonl")
    prompts, written = str(tmp_path / "prompts.jsonl"), str(tmp_path / "written")
    generate(GenerateConfig(model=str(writer), dataset=prompts, output=written, max_new_tokens=4))

    def label(dataset, model, output, **columns):
        data = DataConfig(dataset=dataset, **columns)
        return capture(
            CacheLogitsConfig(task="causal-lm", teacher=str(model), output=str(tmp_path / output), data=data)
        )

    ids = {"input_ids_column": "input_ids", "labels_column": "labels"}
    for dataset in (written, f"{written}/data", f"{written}/data/train-00000.parquet"):
        with pytest.raises(ContractError, match=r"token ids of another tokenizer than that of .*teacher") as refused:
            label(dataset, teacher, "cache", **ids)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache").exists()
    label(written, teacher, "texts", prompt_column="prompt", completion_column="completion")
    label(written, writer, "own", **ids)


def test_another_padding_token_makes_no_other_ids(tmp_path, lm_tokenizer):
    written = tmp_path / "written"
    written.mkdir()
    lm_tokenizer.save_pretrained(written / "tokenizer")
    record = {"contract": {"tokenizer": {"sha256": "0" * 64, "vocabulary_size": len(lm_tokenizer)}}}
    (written / "generation.json").write_text(json.dumps(record))
    check_written_ids(str(written), lm_tokenizer, "teacher")
    shutil.rmtree(written / "tokenizer")
    with pytest.raises(ContractError, match="they stand for other texts"):
        check_written_ids(str(written), lm_tokenizer, "teacher")
