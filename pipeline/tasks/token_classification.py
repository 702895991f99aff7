"""Token classification: one class for each word.

N is the number of words of a row; a word's position is its first token. V is the number of labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.metrics import accuracy, entity_counts, expected_calibration_error, mean_nll
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Cut,
    Example,
    LabelSource,
    OtherTokenizers,
    Predictions,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.sources.inputs.words import split_words
from pipeline.tasks.defaults import TaskDefaults
from pipeline.tasks.protocol import pad, refuse_settings_of_language_models, token_block
from pipeline.tasks.whole_texts import collate_texts, in_chunks

_BATCH = 1000
_USAGE = """```python
from transformers import pipeline

tag = pipeline("{tag}", model="{folder}", aggregation_strategy="first")
print(tag("a text"))
```
"""


@dataclass(frozen=True, slots=True)
class TokenClassification(TaskDefaults):
    """Classification of the words of a text; see `Task`."""

    name: str = "token-classification"
    auto_class: Any = AutoModelForTokenClassification
    peft_type: str = "TOKEN_CLS"
    hub_category: str = "token-classification"
    usage: str = _USAGE
    marks_positions: bool = True
    label_source: LabelSource = "positions"
    other_tokenizers: OtherTokenizers = "words"
    main_metric: str = "f1"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept words, or a text that is split into words."""
        if columns.words is None and (columns.text is None or columns.text_pair is not None):
            raise MisuseError(
                f"--task {self.name} reads --words-column, or --text-column with spans in --label-column; chats, prompts, pairs and token ids are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "words, and keeps the first")

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of labels, at least 2."""
        config: Any = model.config
        if config.num_labels < 2:
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected a token classifier of at least 2 labels, found {config.num_labels}"
            )
        return int(config.num_labels)

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Tokenize words as in a text with spaces between them, and truncate to `max_length`.

        Raises:
            MisuseError: the tokenizer is not fast, so that the word of each token is not known; or
                a row has one label for all words.
        """
        if not tokenizer.is_fast:
            raise MisuseError(
                f"--task {self.name} needs a fast tokenizer, which maps tokens to words; found {type(tokenizer).__name__}"
            )
        space = _space(tokenizer)

        def tokenized(chunk: Sequence[Example]) -> Iterator[TokenizedExample | BadRow]:
            return _tokenize_words(chunk, split, tokenizer, settings.max_length, space)

        with_words = (item if isinstance(item, BadRow) else self._with_words(item, split) for item in examples)
        return in_chunks(tokenized, with_words, _BATCH)

    def _with_words(self, example: Example, split: str) -> Example | BadRow:
        if example.label is not None:
            raise MisuseError(
                f"--task {self.name}: row {example.source_row} has one label for the whole row; expected a list of labels, one a word (--words-column), or spans "
                "{start, end, label} of the text; name their column with --label-column"
            )
        if example.words is not None:
            return example
        text = example.text or ""
        words = tuple(text[start:end] for start, end in split_words(text))
        return replace(example, words=words) if words else BadRow(split, example.source_row, "the text has no words")

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """Return True for all tokens."""
        return np.ones(len(input_ids), dtype=bool)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad on the right."""
        tokens = token_block(rows)
        assert tokens.supervised is not None
        return collate_texts(tokens, pad_id, length), pad(tokens.supervised, 0, length).bool()

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return the (N, V) logits at the first token of each word."""
        assert supervised is not None
        logits: Tensor = model(**inputs).logits  # (B, T, V)
        return logits[supervised.to(logits.device)]

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Select the (N, V) logits at the first token of each word from (B, T, V) logits."""
        assert supervised is not None
        return logits[supervised]

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return F1, precision, recall, accuracy, loss and calibration over the labelled words.

        The first three are of entities, or of words if no class is "O".
        """
        known = predictions.labels != NO_LABEL
        correct = predictions.predicted[known] == predictions.labels[known]
        right, found, true = self._entities(predictions).sum(0).tolist()
        return {
            "f1": _share(2 * right, found + true),
            "precision": _share(right, found),
            "recall": _share(right, true),
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "loss": mean_nll(predictions.nll),
            "ece": expected_calibration_error(predictions.confidence[known], correct),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) twice the correct entities, and (R,) predicted plus true entities.

        The ratio of their totals is F1.
        """
        counts = self._entities(predictions).astype(np.float64)
        return 2 * counts[:, 0], counts[:, 1] + counts[:, 2]

    def _entities(self, predictions: Predictions) -> np.ndarray:
        names = predictions.label_names or tuple(map(str, range(1 + int(predictions.labels.max(initial=0)))))
        return entity_counts(
            predictions.labels, predictions.predicted, predictions.rows, names, len(predictions.row_text_bytes)
        )


def _share(part: float, whole: float) -> float:
    """Return `part / whole`; nan if `whole` is 0."""
    return part / whole if whole else float("nan")


def _space(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prefix of words after the first, so that they get the tokens that a text gives.

    It is a space for byte-level tokenizers without `add_prefix_space`, which would otherwise join
    the words into one; else it is empty.
    """

    def ids(words: list[str] | str) -> list[int]:
        encoded = tokenizer(words, is_split_into_words=isinstance(words, list), add_special_tokens=False)
        return list(encoded["input_ids"])

    text = ids("a b")
    return " " if ids(["a", "b"]) != text and ids(["a", " b"]) == text else ""


def _tokenize_words(
    examples: Sequence[Example], split: str, tokenizer: PreTrainedTokenizerBase, max_length: int, space: str
) -> Iterator[TokenizedExample | BadRow]:
    words = [[word if i == 0 else space + word for i, word in enumerate(example.words or ())] for example in examples]
    encoded = tokenizer(words, is_split_into_words=True, return_attention_mask=False, verbose=False)
    if tokenizer.unk_token is not None and _name_unknown(words, encoded, tokenizer.unk_token):
        encoded = tokenizer(words, is_split_into_words=True, return_attention_mask=False, verbose=False)
    cut = _cut(tokenizer, words, max_length)
    types = cut.get("token_type_ids")
    for i, example in enumerate(examples):
        assert example.words is not None
        places = _first_tokens(cut.word_ids(i))
        whole = _first_tokens(encoded.word_ids(i))
        if len(whole) < len(example.words):
            lost = next(k for k in range(len(example.words)) if k not in whole)
            reason = f"word {lost}, {example.words[lost]!r}: the tokenizer makes no token of it and has no unknown token; remove the word and its label"
            yield BadRow(split, example.source_row, reason)
            continue
        if not places:
            yield BadRow(split, example.source_row, f"no word is left within --max-length {max_length}")
            continue
        ids = np.asarray(cut["input_ids"][i], dtype=np.int32)
        supervised = np.zeros(len(ids), dtype=bool)
        supervised[list(places.values())] = True
        labels = example.word_labels or (NO_LABEL,) * len(example.words)
        lost_tokens = len(encoded["input_ids"][i]) - len(ids)
        lost_labels = sum(label != NO_LABEL for label in labels[len(places) :])
        yield TokenizedExample(
            source_row=example.source_row,
            piece=0,
            input_ids=ids,
            supervised=supervised,
            token_type_ids=None if types is None else np.asarray(types[i], dtype=np.int32),
            labels=np.asarray(labels[: len(places)], dtype=np.int32),
            words=example.words[: len(places)],
            kept=example.kept,
            cut=(Cut(example.source_row, lost_tokens, lost_labels),) if lost_tokens else (),
        )


def _cut(tokenizer: PreTrainedTokenizerBase, words: Sequence[list[str]], max_length: int) -> Any:
    """Tokenize words and truncate on the right, whatever the tokenizer's `truncation_side` is."""
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        return tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=max_length, return_attention_mask=False
        )
    finally:
        tokenizer.truncation_side = side


def _name_unknown(words: Sequence[list[str]], encoded: Any, unknown: str) -> bool:
    """Replace words that become no token, such as zero-width marks, by the unknown token, in place.

    Returns:
        Whether there are any.
    """
    found = False
    for i, row in enumerate(words):
        missing = set(range(len(row))) - set(encoded.word_ids(i))
        found = found or bool(missing)
        for k in missing:
            row[k] = unknown
    return found


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Return the index of each word's first token, by the number of the word."""
    found: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, place)
    return found
