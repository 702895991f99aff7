"""Check that the columns of a row group fit each other and the contract, before any row is used.

Training uses class ids as indices and counts as offsets. A wrong value would return the soft labels
of another row, or abort the process on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.format.codec import COLUMNS
from pipeline.errors import IntegrityError
from pipeline.records import Contract, Full, Sampled, Score, is_known
from pipeline.tasks import get_task

#: Columns that may be null, apart from those copied from the source.
_NULLABLE = ("label",)
#: Upper bound of an image's width and height, in pixels.
_MOST_PIXELS = 1 << 24
#: Tolerance for log-probabilities above 0 that come from float16 rounding, nats.
_SLACK = 1e-2


def check_contents(table: pa.Table, contract: Contract, where: str) -> int:
    """Check nulls, lengths, counts and ranges of every row.

    Args:
        where: the file and row group, for messages.

    Returns:
        The number of supervised positions.

    Raises:
        IntegrityError: names `where` and the column.
    """
    check = _Check(where)
    ours = [name for name in table.column_names if name in _CHECKED]
    if not table.num_rows:
        return 0
    lists = {name: _list(table, name, check) for name in ours if pa.types.is_list(table.schema.field(name).type)}
    for name in ours:
        if name not in lists and name not in _NULLABLE:
            check(table.column(name).null_count == 0, f"{name}: expected a value in every row")
    if "encoded_image" in ours:
        _check_images(table, lists.get("image_view"), check)
        tokens = _List("input_ids", np.zeros(table.num_rows, dtype=np.int64), np.zeros(0, dtype=np.int64))
    else:
        tokens = lists["input_ids"]
        _check_tokens(tokens, contract, check)
    if "token_type_ids" in lists:
        check.same(lists["token_type_ids"].counts, tokens.counts, "token_type_ids: expected one for each token")
        check.range(lists["token_type_ids"].values, 1 << 16, "token_type_ids")
    positions = np.ones(table.num_rows, dtype=np.int64)
    if "supervised" in lists:
        flags = lists["supervised"]
        check.same(flags.counts, tokens.counts, "supervised: expected one flag for each token")
        if get_task(contract.task).label_source == "tokens":
            check(not flags.values[flags.ends - 1].any(), "supervised: expected false for the last token of every row")
        positions = flags.sums()
    if "document_lengths" in lists:
        documents = lists["document_lengths"]
        if contract.tokenization.num_choices is None:
            check(bool((documents.values > 0).all()), "document_lengths: expected at least 1")
        else:
            _check_choices(documents, contract.tokenization.num_choices, check)
        check.same(documents.sums(), tokens.counts, "document_lengths: expected the tokens of the row in all")
    if "label" in ours:
        labels = table.column("label").drop_null().to_numpy()
        check.range(labels, contract.num_classes, "label")
    if "position_labels" in lists:
        if "supervised" not in lists:  # one position for each label name
            positions = np.full(table.num_rows, len(contract.label_names or ()), dtype=np.int64)
        check.same(lists["position_labels"].counts, positions, "position_labels: expected one per position")
        known = lists["position_labels"].values
        known = known[is_known(known)]
        if isinstance(contract.encoding, Score):
            check(bool(np.isfinite(known).all()), "position_labels: expected finite scores")
        else:
            check.range(known, contract.num_classes, "position_labels")
    if "position_words" in table.column_names:
        words = _list(table, "position_words", check, values=False)
        check.same(words.counts, positions, "position_words: expected one per position")
    if "text_bytes" in ours:
        check(int(table.column("text_bytes").to_numpy().min()) >= 0, "text_bytes: expected at least 0")
    if "entropy" in lists:
        check.same(lists["entropy"].counts, positions, "entropy: expected one per position")
    if "label_logprobs" in lists:
        check.same(lists["label_logprobs"].counts, positions, "label_logprobs: expected one per position")
        found = lists["label_logprobs"].values
        check(_are_log_probabilities(found), "label_logprobs: expected log-probabilities, at most 0")
    if isinstance(contract.encoding, Full):
        logits = lists["logits"]
        check.same(
            logits.counts, positions * contract.num_classes, f"logits: expected {contract.num_classes} per position"
        )
        check(
            not bool((logits.values.max(initial=-np.inf) > _SLACK) | np.isnan(logits.values.max(initial=-np.inf))),
            "logits: expected at most 0",
        )
    elif isinstance(contract.encoding, Score):
        check.same(lists["teacher_scores"].counts, positions, "teacher_scores: expected one per position")
        check(bool(np.isfinite(lists["teacher_scores"].values).all()), "teacher_scores: expected finite scores")
    else:
        _check_kept(check, lists, contract, positions)
    return int(positions.sum())


def _check_tokens(tokens: _List, contract: Contract, check: _Check) -> None:
    longest = contract.tokenization.max_length * (contract.tokenization.num_choices or 1)
    check(bool((tokens.counts > 0).all()), "input_ids: expected at least one token in every row")
    check(not longest or int(tokens.counts.max()) <= longest, f"input_ids: expected at most {longest} tokens in a row")
    check.range(tokens.values, contract.tokenizer.vocabulary_size, "input_ids")


def _check_choices(lengths: _List, choices: int, check: _Check) -> None:
    check(bool((lengths.counts == choices).all()), f"document_lengths: expected {choices} in every row, one per choice")
    found = lengths.values.reshape(-1, choices)
    check(
        bool((found >= 0).all() and ((found > 0).sum(1) > 1).all()),
        "document_lengths: expected two choices in every row",
    )
    check(
        bool((np.diff(found > 0, axis=1).sum(1) <= 1).all()),
        "document_lengths: expected missing choices at the end of a row only",
    )


def _check_images(table: pa.Table, views: _List | None, check: _Check) -> None:
    images = table.column("encoded_image").combine_chunks()
    if "image_sha256" in table.column_names:
        _check_files(images.field("path"), table.column("image_sha256"), check)
    else:
        data = images.field("bytes")
        check(data.null_count == 0, "encoded_image: expected bytes in every row")
        check(pc.min(pc.binary_length(data)).as_py() > 0, "encoded_image: expected at least one byte in every row")
    if views is None:
        return
    check(bool(np.isin(views.counts, (0, 5)).all()), "image_view: expected 0 or 5 numbers in every row")
    parts = views.values.reshape(-1, 5)
    check.range(parts, _MOST_PIXELS, "image_view")
    check(bool((parts[:, 2:4] > 0).all()), "image_view: expected a width and a height of at least 1")
    check(bool((parts[:, 4] <= 1).all()), "image_view: expected 0 or 1, whether it is mirrored")


def _check_files(paths: pa.Array, hashes: pa.ChunkedArray, check: _Check) -> None:
    """Check that no path leads outside the directory of images."""
    check(paths.null_count == 0, "encoded_image: expected a path in every row")
    for path in map(PurePosixPath, paths.to_pylist()):
        inside = not path.is_absolute() and bool(path.parts) and not {"..", "\\", "\0"} & {*path.parts, *str(path)}
        check(inside, f"encoded_image: expected a path below the directory of images, found {str(path)[:80]!r}")
    check(
        bool(pc.all(pc.match_substring_regex(hashes, "^[0-9a-f]{64}$")).as_py()),
        "image_sha256: expected 64 hexadecimal digits",
    )


def _check_kept(check: _Check, lists: dict[str, _List], contract: Contract, positions: np.ndarray) -> None:
    encoding, classes = contract.encoding, contract.num_classes
    values = lists["top_weights" if isinstance(encoding, Sampled) else "top_logprobs"]
    counts, ids = lists["top_count"], lists["top_ids"]
    check.same(counts.counts, positions, "top_count: expected one per position")
    check(bool((counts.values > 0).all()), "top_count: expected at least 1")
    check.same(ids.counts, counts.sums(), "top_ids: expected as many as top_count says")
    check.same(values.counts, ids.counts, f"{values.name}: expected as many as top_count says")
    check.range(ids.values, classes, "top_ids")
    if isinstance(encoding, Sampled):
        check.range(values.values, encoding.steps + 1, "top_weights")
        tails, gaps = lists["tail_count"], lists["tail_gaps"]
        check.same(tails.counts, positions, "tail_count: expected one per position")
        check.same(gaps.counts, tails.sums(), "tail_gaps: expected as many as tail_count says")
        # the last class of each position; 0 without a tail
        last = _List("tail_gaps", tails.values.astype(np.int64), gaps.values).sums()
        check.range(last, classes, "tail_gaps")
        return
    grid = len(getattr(encoding, "temperatures", ()))
    residuals = lists["log_residuals"]
    check.same(residuals.counts, positions * grid, f"log_residuals: expected {grid} per position")
    for name in ("top_logprobs", "log_residuals"):
        check(_are_log_probabilities(lists[name].values), f"{name}: expected log-probabilities, at most 0")


#: Columns whose values are checked: all that the schema defines except texts, of which only the
#: number is checked.
_CHECKED = COLUMNS - {"text", "text_pair", "messages", "position_words", "choice_texts"}


@dataclass(frozen=True, slots=True)
class _List:
    """One list column, flattened."""

    name: str
    counts: np.ndarray
    """(rows,) int64."""
    values: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """(rows,): the end of each row in `values`."""
        ends: np.ndarray = np.cumsum(self.counts)
        return ends

    def sums(self) -> np.ndarray:
        """Return the sum of each row's values, (rows,) int64."""
        total = np.append(0, np.cumsum(self.values, dtype=np.int64))
        sums: np.ndarray = total[self.ends] - total[self.ends - self.counts]
        return sums


def _list(table: pa.Table, name: str, check: _Check, *, values: bool = True) -> _List:
    """Flatten a list column, and check that it has no nulls; `values=False` omits the values."""
    array = table.column(name).combine_chunks()
    offsets = array.offsets.to_numpy()
    items = array.values[offsets[0] : offsets[-1]]
    check(array.null_count == 0 and items.null_count == 0, f"{name}: expected a value everywhere, found nulls")
    numbers = items.to_numpy(zero_copy_only=False) if values else np.zeros(0)
    return _List(name, np.diff(offsets).astype(np.int64), numbers)


def _are_log_probabilities(values: np.ndarray) -> bool:
    """Whether no value is NaN or above 0, up to rounding.

    float16 values are compared by their bits, which is faster.
    """
    if values.dtype != np.float16:
        return not bool((values > _SLACK).any() or np.isnan(values).any())
    bits = values.view(np.uint16)
    most = int(np.float16(_SLACK).view(np.uint16))
    positive, negative = bits < 0x8000, bits & 0x7FFF
    return not bool(((negative > 0x7C00) | (positive & (bits > most))).any())


class _Check:
    """Raises `IntegrityError` if a condition is false."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, condition: bool, what: str) -> None:
        if not condition:
            raise IntegrityError(f"{self._where}: {what}")

    def same(self, found: np.ndarray, expected: np.ndarray, what: str) -> None:
        """Check that two arrays of one number per row are equal."""
        if not np.array_equal(found, expected):
            row = int(np.flatnonzero(found != expected)[0])
            self(False, f"{what} (row {row} of the group: expected {expected[row]}, found {found[row]})")

    def range(self, values: np.ndarray, stop: int, name: str) -> None:
        """Check that all integers are in [0, stop)."""
        if len(values):
            low, high = int(values.min()), int(values.max())
            self(low >= 0 and high < stop, f"{name}: expected 0 to {stop - 1}, found {low if low < 0 else high}")
