"""A changed flag of cache-logits is refused on resume, unless it cannot affect the cache."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pipeline.capture import run as stage
from pipeline.capture.engines import in_process
from pipeline.config import CacheLogitsConfig, DataConfig
from pipeline.errors import ContractError
from tests.conftest import tiny_model

#: Flag -> a different value, and the field that the error message names.
CONTRACT: dict[str, tuple[Any, str]] = {
    "task": ("sequence-classification", "task"),
    "teacher": ("other-teacher", "teacher.name"),
    "teacher_revision": ("v2", "teacher.revision"),
    "dtype": ("bfloat16", "teacher.(weights_sha256|dtype)"),
    "attn_implementation": ("eager", "teacher.attn_implementation"),
    "encoding": ("full", "encoding"),
    "top_k": (5, "encoding"),
    "top_p": (0.5, "encoding"),
    "sample_size": (7.0, "encoding.sample_size"),
    "temperature": ((2.0,), "encoding.temperature"),
    "store_entropy": (True, "columns.entropy"),
    "store_label_logprobs": (True, "columns.label_logprobs"),
    "rows_per_shard": (9, "shards"),
    "batch_tokens": (77, "batch_tokens"),
    "torch_compile": ("eager", "teacher.compiler"),
    "rows": ("0:5", "source"),
    "unlabelled": (("other.jsonl",), "source.fingerprints"),
    "seed": (1, "seed"),
    "on_bad_row": ("skip", "on_bad_row"),
}
DATA: dict[str, tuple[Any, str]] = {
    "dataset": ("other.jsonl", "source"),
    "holdout": (0.3, "source"),
    "text_column": ("copy", "source.columns.text"),
    "label_column": ("copy", "source.columns.label"),
    "keep_column": (("id",), "source.columns.keep"),
    "max_length": (24, "tokenization.max_length"),
    "packing": (True, "tokenization.packing"),
    "chat_template": ("template.jinja", "tokenizer.chat_template_sha256"),
}
#: Flags that are in the contract but need other data or hardware; `test_contract` tests them, or
#: the test named beside them.
ELSEWHERE = {
    *("prompt_template", "label_text", "prompt_format", "shots", "shot_tokens", "calibrate"),  # `test_judged_captures`
    *("quantization", "base_model", "label_map"),
    *(
        "data_files",
        "dataset_config",
        "dataset_revision",
        "split",
        "text_pair_column",
        "words_column",
        "messages_column",
        "prompt_column",
        "group_column",
        "mask_share",
        "whole_words",
        "mask_copies",
        "mask_seed",
        "choices_column",
        "stride",
        *("image_column", "views", "view_area", "view_mirror", "view_seed", "store_images"),
    ),
    *("chat_template_kwargs", "assistant_turns", "truncation_side"),  # `test_chat_captures`
    *("completion_column", "input_ids_column", "labels_column", "isolate_documents", "store_text"),
    *("server", "server_model", "server_api"),  # `teachers/test_served`
}
#: Flags that change neither logits nor columns.
NO_EFFECT = {
    *("data", "output", "overwrite", "append", "device_map", "trust_remote_code"),
    *("engine", "num_workers", "gpus_per_worker", "part", "auto_batch_tokens"),
    *("concurrency", "server_patience", "check_with"),
}


@pytest.mark.parametrize(("config", "known"), [(CacheLogitsConfig, CONTRACT), (DataConfig, DATA)])
def test_every_flag_is_one_or_the_other(config, known):
    """Each flag is in one of the sets above; add new flags there."""
    unknown = {field.name for field in dataclasses.fields(config)} - set(known) - ELSEWHERE - NO_EFFECT
    assert not unknown


@pytest.fixture(scope="module")
def begun(tmp_path_factory, lm_tokenizer):
    """The folder of a capture that was stopped before its first shard."""
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("teacher", 0), ("other-teacher", 1)):
            model = tiny_model("llama", len(lm_tokenizer), seed=seed)
            model.save_pretrained(name)
            lm_tokenizer.save_pretrained(name)
        classifier = tiny_model("llama", len(lm_tokenizer), num_labels=2)
        classifier.save_pretrained("classifier")
        lm_tokenizer.save_pretrained("classifier")
        rows = [{"text": f"the cat sat {i}", "copy": f"a dog {i}", "id": i} for i in range(20)]
        for name, part in (("data.jsonl", rows), ("other.jsonl", rows[1:])):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
        (folder / "template.jinja").write_text("{% generation %}{% endgeneration %}")
        patch.setattr(in_process, "capture_shards", _stopped)
        with pytest.raises(_StoppedError):
            stage.run(config_of())
    return folder


class _StoppedError(Exception):
    """Raised in place of capturing the first shard."""


def _stopped(*_args: Any) -> Any:
    raise _StoppedError


def config_of(data: dict[str, Any] | None = None, **changed: Any) -> CacheLogitsConfig:
    settings = {"task": "causal-lm", "teacher": "teacher", "output": "cache", "rows_per_shard": 10, **changed}
    if settings["task"] != "causal-lm":
        settings["teacher"] = "classifier"
    return CacheLogitsConfig(data=DataConfig(**{"dataset": "data.jsonl", "max_length": 32, **(data or {})}), **settings)


def test_the_same_settings_go_on(begun, monkeypatch):
    monkeypatch.chdir(begun)
    monkeypatch.setattr(in_process, "capture_shards", _stopped)
    with pytest.raises(_StoppedError):
        stage.run(config_of())


@pytest.mark.parametrize("name", [*CONTRACT, *DATA])
def test_another_value_is_refused_before_the_first_step(begun, monkeypatch, name):
    monkeypatch.chdir(begun)
    monkeypatch.setattr(in_process, "capture_shards", _stopped)
    value, named = CONTRACT.get(name) or DATA[name]
    changed = config_of(**{name: value}) if name in CONTRACT else config_of({name: value})
    with pytest.raises(ContractError, match=rf"cache: holds another capture: (contract\.)?{named}"):
        stage.run(changed)
