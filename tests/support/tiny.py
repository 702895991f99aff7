"""Tiny models built from a config, tokenizers, and small data sets; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import hypothesis  # noqa: F401 - before `heap`: when it is imported, it looks for what refers to random generators
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

torch.set_num_threads(1)

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "over",
    "under",
    "mat",
    "hill",
    "tree",
    "and",
    "then",
    "home",
    "river",
    "stone",
    "bright",
    "dark",
    "old",
    "new",
    "market",
    "profit",
    "bank",
    "goal",
    "match",
    "team",
    "film",
    "star",
    "court",
    "minister",
    "vote",
    "party",
    "phone",
    "game",
    "code",
    "chip",
]
TOPICS = {
    "business": ["market", "profit", "bank"],
    "sport": ["goal", "match", "team"],
    "film": ["film", "star", "court"],
}


@pytest.fixture(scope="session", autouse=True)
def arrow_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Redirect everything that `datasets` writes to a folder of the test run."""
    folder = tmp_path_factory.mktemp("arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def heap() -> Iterator[None]:
    """Unfreeze the garbage collector after a file's tests; see `frozen_heap`."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap(heap: None) -> None:
    """Exclude existing objects from garbage collection during a file's tests.

    Accelerate collects garbage at the start of every training run. With the objects of torch,
    transformers and hypothesis a collection takes a third of a second, longer than a tiny student
    trains.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Replace `os.fsync` by a no-op.

    Without a power failure the contents of files and the order of writes are the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def sentence(rng: random.Random, words: int, topic: str | None = None) -> str:
    """Return a text of `words` random words; with a topic, half of them are from it."""
    return " ".join(
        rng.choice(TOPICS[topic]) if topic and rng.random() < 0.5 else rng.choice(WORDS) for _ in range(words)
    )


#: Vocabulary that `WordPieceTrainer` learned from `WORDS`. It is stored here because the trainer
#: orders the tokens differently in every process, which changes the outputs of a random model.
_PIECES = """
a b c d e f g h i k l m n o p r s t u v w y ##n ##d ##e ##r ##a ##k ##t ##o ##f ##i ##l ##y ##v
##h ##p ##w ##s ##m ##g ##c ##u ##er ##ar ##at co mat st th ##nd ##ne ##ew ##an ##am ##one ##il
##ver ##ark the and br bi ban ch cat do dark fl fil go gam ho hil mi mark new on ol over pr ph
par ri ran sat te tr und vo ##ni ##de ##ee ##et ##rd ##rt ##al ##te ##ty ##ter ##of ##it ##ip
##ig ##ht ##ster ##me ##ch ##urt code court match star stone then brig bird bank chip dog flew
film goal game home hill mini market old prof phone party river team tree under vote bright
minister profit
"""


def wordpiece(special: Sequence[str], pieces: Sequence[str], *, unknown: str) -> Tokenizer:
    """Return a WordPiece tokenizer with this vocabulary, the special tokens first."""
    vocabulary = {token: i for i, token in enumerate([*special, *pieces])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(list(special))
    return raw


@pytest.fixture(scope="session")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with token types, like BERT's."""
    raw = wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], _PIECES.split(), unknown="[UNK]")
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def lm_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with EOS and padding, like GPT-2's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", model_max_length=128)


#: Small configuration of each architecture, with odd sizes where the architecture allows them.
TINY: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "modernbert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
    "deberta-v2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
    },
    "gemma2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "final_logit_softcapping": 3.0,
    },
    "cohere": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "logit_scale": 0.25,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "mixtral": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_local_experts": 2,
    },
}


def tiny_model(
    kind: str, vocabulary: int, *, num_labels: int | None = None, seed: int = 0, spread: float = 1.0, **overrides: Any
) -> Any:
    """Return a model with random weights, a classifier if `num_labels` is given.

    `spread` scales its logits, so that they are not nearly equal.
    """
    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=1, **{**TINY[kind], **overrides}
    )
    if num_labels is not None:
        config.num_labels = num_labels
    set_seed(seed)
    model = (AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model.eval()


@pytest.fixture
def topics() -> DatasetDict:
    """Return 90 + 30 texts of three topics; every fifth training row has no label."""
    rng = random.Random(0)

    def split(count: int, unlabelled: bool) -> Dataset:
        names = [list(TOPICS)[i % 3] for i in range(count)]
        texts = [sentence(rng, rng.randint(4, 20), name) for name in names]
        labels = [None if unlabelled and i % 5 == 4 else name for i, name in enumerate(names)]
        return Dataset.from_dict({"id": [f"row-{i}" for i in range(count)], "text": texts, "label": labels})

    return DatasetDict({"train": split(90, True), "test": split(30, False)})


@pytest.fixture
def documents() -> DatasetDict:
    """Return 40 + 12 texts of 3 to 60 words."""
    rng = random.Random(1)

    def split(count: int) -> Dataset:
        return Dataset.from_dict({"text": [sentence(rng, rng.randint(3, 60)) for _ in range(count)]})

    return DatasetDict({"train": split(40), "test": split(12)})


@pytest.fixture
def save_teacher(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a model and its tokenizer to a directory."""

    def save(model: Any, tokenizer: PreTrainedTokenizerFast, name: str = "teacher") -> Path:
        path = tmp_path / name
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save
