"""Causal language modelling: next-token prediction at every supervised position.

V is the size of the vocabulary; class i is token i.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.metrics import bits_per_byte
from pipeline.records import (
    BadRow,
    Columns,
    Example,
    LabelSource,
    OtherTokenizers,
    Predictions,
    Ragged,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.chats import check_chat_settings, settle
from pipeline.tasks.documents import Document, read_documents
from pipeline.tasks.protocol import attention_mask, pad, token_block
from pipeline.tasks.token_heads import TokenTask, supervised_logits

_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
inputs = tokenizer("A text", truncation=True, max_length={max_length}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""


@dataclass(frozen=True, slots=True)
class CausalLM(TokenTask):
    """Causal language models; see `Task`."""

    name: str = "causal-lm"
    auto_class: Any = AutoModelForCausalLM
    peft_type: str = "CAUSAL_LM"
    hub_category: str = "text-generation"
    usage: str = _USAGE
    label_source: LabelSource = "tokens"
    fuses_head: bool = True
    continues_prompts: bool = True
    other_tokenizers: OtherTokenizers = "bytes"
    default_max_length: int = 1024
    default_batch_tokens: int = 2048
    default_eval_rows: int = 4

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Refuse text pairs, words, kept columns with packing, and chat settings without chats."""
        if columns.text_pair is not None:
            raise MisuseError(
                f"--text-pair-column is for classifiers; --task {self.name} takes --prompt-column and --completion-column"
            )
        if columns.words is not None:
            raise MisuseError(
                f"--words-column is for token classification; --task {self.name} takes --text-column, --messages-column or --prompt-column"
            )
        if tokenization.packing and columns.keep:
            raise MisuseError("--keep-column does not go with --packing: a packed row holds several source rows")
        check_chat_settings(columns, tokenization)

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings; for chats, with what the chat template determines."""
        if not chats and (settings.assistant_turns is not None or settings.chat_template_kwargs):
            raise MisuseError(
                "--assistant-turns and --chat-template-kwargs go with chats, and the prompts of this data set are plain text"
            )
        return settle(settings, tokenizer) if chats else settings

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Divide documents into rows of `max_length` tokens; with packing, join them by EOS first.

        A piece starts with the last token of the piece before, so that every token except a
        document's first is predicted once. Chats, prompts and rows with labels of their own are
        truncated instead, since a later piece would lack its prompt. Packed rows keep no texts.
        """
        if settings.packing:
            yield from _pack(read_documents(examples, split, tokenizer, settings), split, tokenizer, settings)
            return
        for document in read_documents(examples, split, tokenizer, settings, texts=texts):
            if isinstance(document, BadRow):
                yield document
                continue
            fitted = document if document.may_be_cut else _truncate(document, split, tokenizer, settings)
            if isinstance(fitted, BadRow):
                yield fitted
            else:
                yield from _cut(fitted, settings.max_length)

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """Return True for all tokens except the last, which no token follows."""
        return np.arange(len(input_ids)) < len(input_ids) - 1

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """Return the (N,) tokens that follow the supervised positions."""
        tokens = token_block(rows)
        assert tokens.supervised is not None  # never True for the last token of a row
        return tokens.input_ids.values[np.flatnonzero(tokens.supervised.values) + 1].astype(np.int64)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad on the right.

        With isolated documents, `position_ids` restart at each document; `transformers` derives a
        block-diagonal attention mask from them.
        """
        tokens = token_block(rows)
        assert tokens.supervised is not None
        inputs = {"input_ids": pad(tokens.input_ids, pad_id, length)}
        supervised = pad(tokens.supervised, 0, length).bool()
        if tokens.document_lengths is None:
            inputs["attention_mask"] = attention_mask(tokens.input_ids, length)
        else:
            inputs["position_ids"] = _positions(tokens.input_ids, tokens.document_lengths, inputs["input_ids"].shape[1])
        return inputs, supervised

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (N, V) logits; the output matrix is applied to the supervised positions only."""
        return supervised_logits(model, inputs, supervised, use_cache=False)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return loss, perplexity, bits per byte, next-token accuracy and calibration."""
        found = TokenTask.metrics(self, predictions, num_classes)
        return {
            "loss": found.pop("loss"),
            "perplexity": found.pop("perplexity"),
            "bits_per_byte": bits_per_byte(float(predictions.nll.sum()), int(predictions.row_text_bytes.sum())),
            **found,
        }


def _truncate(
    document: Document, split: str, tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> Document | BadRow:
    """Truncate a document to `max_length`; a `BadRow` if no token to predict is left."""
    longest = settings.max_length
    if len(document.input_ids) <= longest:
        return document
    kept = document.truncated(longest, left=settings.truncation_side == "left", bos_id=tokenizer.bos_token_id)
    if not kept.predicted.any():
        reason = f"no token to predict is left within --max-length {longest}, of {len(document.input_ids)} tokens"
        return BadRow(split, document.example.source_row, reason)
    return kept


def _cut(document: Document, longest: int) -> Iterator[TokenizedExample]:
    piece = document.piece
    for start in range(0, len(document.input_ids) - 1, longest - 1):
        part = document.part(start, start + longest)
        if part.predicted.any():
            yield _row([part], piece, isolate=False)
            piece += 1


def _pack(
    documents: Iterable[Document | BadRow],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Tokenization,
) -> Iterator[TokenizedExample | BadRow]:
    """Pack documents into rows of `max_length` tokens, with EOS after each document.

    A document that does not fit continues in the next row, or starts there if it may not be cut.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise MisuseError("--packing puts EOS between documents, and the tokenizer has none; cache without --packing")
    open_row: list[Document] = []
    pieces: Counter[int] = Counter()
    room = settings.max_length

    def close() -> Iterator[TokenizedExample]:
        if np.concatenate([part.predicted for part in open_row])[1:].any():
            first = open_row[0].example.source_row
            yield _row(open_row, pieces[first], isolate=settings.isolate_documents)
            pieces[first] += 1

    for document in documents:
        if isinstance(document, BadRow):
            yield document
            continue
        closed = document.with_eos(eos_id)
        if not closed.may_be_cut:
            fitted = _truncate(closed, split, tokenizer, settings)
            if isinstance(fitted, BadRow):
                yield fitted
                continue
            closed = fitted
            if len(closed.input_ids) > room:
                yield from close()
                open_row.clear()
                room = settings.max_length
        start = 0
        while len(closed.input_ids) - start > 1:
            part = closed.part(start, start + room)
            open_row.append(part)
            room -= len(part.input_ids)
            start += len(part.input_ids) - 1
            if room < 2:  # a single further token would predict nothing
                yield from close()
                open_row.clear()
                room = settings.max_length
    if open_row:
        yield from close()


def _row(parts: Sequence[Document], piece: int, *, isolate: bool) -> TokenizedExample:
    """Join documents into a row; position j is supervised if token j + 1 is predicted."""
    predicted = np.concatenate([part.predicted for part in parts])
    num_bytes = np.concatenate([part.num_bytes for part in parts])
    example, covered, conversation = parts[0].example, parts[0].covered, parts[0].conversation
    return TokenizedExample(
        source_row=example.source_row,
        piece=piece,
        input_ids=np.concatenate([part.input_ids for part in parts]).astype(np.int32),
        supervised=np.append(predicted[1:], False),
        text=None if covered is None else covered.shown,
        messages=None if conversation is None else conversation.to_json(predicted),
        document_lengths=np.asarray([len(part.input_ids) for part in parts], dtype=np.int32) if isolate else None,
        text_bytes=int(num_bytes[1:][predicted[1:]].sum()),
        kept=example.kept,
        cut=tuple(part.cut for part in parts if part.cut is not None),
        split_chats=tuple(part.split_chat for part in parts if part.split_chat),
    )


def _positions(tokens: Ragged, documents: Ragged, width: int) -> Tensor:
    """Return (B, T) position ids that restart at 0 at every document and at the padding."""
    rows = len(tokens.counts)
    lengths = np.insert(documents.values, documents.offsets[1:], width - tokens.counts)
    starts = np.cumsum(lengths) - lengths
    return torch.from_numpy(np.arange(rows * width) - np.repeat(starts, lengths)).view(rows, width)
