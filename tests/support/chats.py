"""Chat templates of model families, each with a tiny tokenizer."""

# ruff: noqa: RUF001 - control tokens of DeepSeek
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.records import Message

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """Tokenizer settings of a model family: control tokens, BOS and EOS."""

    control: str
    bos: str | None
    eos: str
    tools: bool = True
    """Whether the template supports tools."""
    reasoning: bool = False
    """Whether the template supports `reasoning_content`."""


_CHATML = "<|im_start|> <|im_end|>"
_MISTRAL = "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
_R1 = (
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> </think> <｜tool▁sep｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> "
    "<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
)
_PHI = (
    "<|endoftext|> <|end|> <|user|> <|assistant|> <|system|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|> "
    "<|tool_response|>"
)
FAMILIES = {
    "llama-3.1": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|begin_of_text|>", "<|eot_id|>"
    ),
    "qwen-2.5": Family(f"{_CHATML} <tool_call> </tool_call>", None, "<|im_end|>"),
    "qwen-3": Family(f"{_CHATML} <tool_call> </tool_call> <think> </think>", None, "<|im_end|>", reasoning=True),
    "gemma-3": Family("<bos> <eos> <start_of_turn> <end_of_turn>", "<bos>", "<eos>", tools=False),
    "mistral-v0.3": Family(_MISTRAL, "<s>", "</s>"),
    "mistral-v7": Family(f"{_MISTRAL} [SYSTEM_PROMPT] [/SYSTEM_PROMPT]", "<s>", "</s>"),
    "gpt-oss": Family(
        "<|start|> <|message|> <|channel|> <|end|> <|return|> <|call|>", None, "<|return|>", reasoning=True
    ),
    "deepseek-r1": Family(_R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "phi-4": Family(f"{_CHATML} <|im_sep|>", None, "<|im_end|>", tools=False),
    "phi-4-mini": Family(_PHI, None, "<|endoftext|>"),
    "smollm2": Family(_CHATML, None, "<|im_end|>", tools=False),
}


@lru_cache
def tokenizer_of(name: str) -> Any:
    """Return a byte-level tokenizer with the control tokens and chat template of a family."""
    family = FAMILIES[name]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", *family.control.split()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=family.bos, eos_token=family.eos, pad_token="<pad>"
    )
    tokenizer.chat_template = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def turn(role: str, content: str | None = None, **fields: Any) -> Message:
    """Return one turn."""
    return Message(role, content, fields)


def call(arguments: Any, content: str | None = None, **fields: Any) -> Message:
    """Return a turn of the assistant that calls the tool `find`."""
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": arguments}}]
    return Message("assistant", content, {**fields, "tool_calls": calls})


def result(content: str) -> Message:
    """Return the tool's answer."""
    return Message("tool", content, {"tool_call_id": "abcdefghi"})


TOOLS = ({"type": "function", "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}}},)
