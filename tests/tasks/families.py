"""Tiny tokenizers of the families that language models use."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import wordpiece

CORPUS = ["the cat sat on a mat 2+2= 4 it isn't 10 <|user|>"] * 5
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _fast(raw: Any, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<|user|>"], **special
    )


def _byte_level(*, trimmed: bool = False, nfc: bool = False, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    if nfc:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    if trimmed:
        raw.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    elif not nfc:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _fast(raw, bos_token="<s>")


def _metaspace(*, legacy: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *_BYTES], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    content = json.loads(raw.to_str())  # byte tokens are ordinary tokens, as in Llama 2
    content["added_tokens"] = content["added_tokens"][: len(special)]
    raw = Tokenizer.from_str(json.dumps(content))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(raw, bos_token="<s>", unk_token="<unk>")


def _pieces(special: list[str]) -> Tokenizer:
    """Return a Unigram tokenizer of letters, and of each word its first letter and the rest.

    Its vocabulary is fixed, since training yields another one in every process.
    """
    words = CORPUS[0].split()
    letters = sorted({"▁", *"".join(words)})
    parts = dict.fromkeys(part for word in words for part in (f"▁{word[0]}", word[1:]) if len(part) > 1)
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(letter, -6.0) for letter in letters] + [(part, -2.0) for part in parts]
    raw = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    raw.add_special_tokens(special)
    return raw


def _unigram() -> PreTrainedTokenizerFast:
    raw = _pieces(["<pad>", "</s>", "<unk>", "<|user|>"])
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(raw, unk_token="<unk>")


def _gemma() -> PreTrainedTokenizerFast:
    """Replace spaces by metaspaces and prepend none; unknown characters become bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "</s>", "<s>", "<unk>", "<|user|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *_BYTES], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    content = json.loads(raw.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    raw = Tokenizer.from_str(json.dumps(content))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return _fast(raw, bos_token="<s>", unk_token="<unk>")


def _deberta() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer that prepends a metaspace, like DeBERTa's second version.

    It strips surrounding whitespace, and adds a token at the start and at the end of a row.
    """
    raw = _pieces(["<pad>", "</s>", "<unk>", "<s>", "<|user|>"])
    raw.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)])
    return _fast(raw, bos_token="<s>", unk_token="<unk>")


def _wordpiece() -> PreTrainedTokenizerFast:
    words = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(CORPUS[0])]
    letters = sorted(set("".join(words)))
    pieces = list(dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *words]))
    raw = wordpiece(["<pad>", "</s>", "<unk>", "<s>", "<|user|>"], pieces, unknown="<unk>")
    raw.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 3))
    return _fast(raw, bos_token="<s>", unk_token="<unk>")


FAMILIES = {
    "gpt2": _byte_level(),
    "roberta": _byte_level(trimmed=True),
    "qwen": _byte_level(nfc=True),
    "prefix-space": _byte_level(prefix_space=True),
    "llama2": _metaspace(legacy=True),
    "mistral": _metaspace(legacy=False),
    "gemma": _gemma(),
    "t5": _unigram(),
    "deberta": _deberta(),
    "bert": _wordpiece(),
}
