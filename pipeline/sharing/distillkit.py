"""Decode DistillKit's packed log-probabilities (Goddard and Atkins, Arcee AI, 2024).

A position's K classes are sorted by falling log-probability. `compressed_logprobs` holds, one after
another: the first `exact_k` of them as floats; the coefficients of a least-squares fit of the
others over their rank t, in the terms t^i, sqrt(t), exp(t); and the residuals of the fit in bins,
each with a scale and a number of quantized integers of a given width in bits. With `delta_encoding`
the values are differences between consecutive classes. `bytepacked_indices` holds the class ids in
ceil(log2 d) bits each. Integers are packed consecutively, highest bit first, and padded to a byte.

Decoded values are as exact as the fit. DistillKit's own reader rounds them to `exact_dtype`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.errors import SourceError

FloatName = Literal["float16", "bfloat16", "float32", "float64"]
Term = int | Literal["sqrt", "exp"]

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

#: File in which DistillKit's sampler stores the layout, and the keys under which its training files
#: repeat it.
CONFIG_NAME = "compression_config.yaml"
_SECTIONS = ("teacher", "logprob_compressor")


@dataclass(frozen=True, slots=True)
class ResidualBin:
    """A bin of residuals of the fit that are quantized with one scale."""

    scale_dtype: FloatName
    element_bits: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The layout of packed positions, with the names and defaults of DistillKit."""

    d: int
    """Size of the vocabulary; it determines the bits of an id."""
    k: int
    exact_k: int
    residual_bins: tuple[ResidualBin, ...] = ()
    exact_dtype: FloatName = "float32"
    polynomial_terms: tuple[Term, ...] | None = None
    term_dtype: FloatName = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits per class id."""
        return math.ceil(math.log2(self.d))

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes per position: of the log-probabilities, and of the ids."""
        floats = self.exact_k * _size(self.exact_dtype) + len(self.polynomial_terms or ()) * _size(self.term_dtype)
        bins = sum(_size(b.scale_dtype) + _bytes(b.element_bits * b.num_elements) for b in self.residual_bins)
        return floats + bins, _bytes(self.index_bits * self.k)


def load_layout(path: Path) -> PackedLayout:
    """Read a compression configuration: the sampler's own file, or a training file that repeats it.

    Raises:
        SourceError: the file does not exist or is not a compression configuration.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SourceError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    for section in _SECTIONS:
        if isinstance(content, dict) and isinstance(content.get(section), dict):
            content = content[section]
    try:
        layout = TypeAdapter(PackedLayout).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SourceError(f"{path}: not a compression configuration of DistillKit: {where}: {first['msg']}") from None
    if not 0 <= layout.exact_k <= layout.k or layout.k < 1 or layout.d < 2:
        raise SourceError(
            f"{path}: expected 0 <= exact_k <= k and d of at least 2, found {layout.exact_k}, {layout.k}, {layout.d}"
        )
    return layout


def unpack(logprobs: np.ndarray, ids: np.ndarray, layout: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
    """Decode L packed positions.

    Returns:
        (L, K) int64 class ids and (L, K) float64 log-probabilities in nats.

    Raises:
        SourceError: the number of bytes per position does not match the layout.
    """
    for name, packed, expected in zip(
        ("compressed_logprobs", "bytepacked_indices"), (logprobs, ids), layout.num_bytes, strict=True
    ):
        if packed.ndim != 2 or packed.shape[1] != expected:
            raise SourceError(
                f"{name}: expected {expected} bytes a position, as the compression configuration says, found {packed.shape[-1]}; give the file that "
                "the data were packed with, with --compression-config"
            )
    return unpack_integers(ids, layout.index_bits, layout.k), _unpack_logprobs(logprobs, layout)


def unpack_integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack integers of `bits` bits: (L, B) bytes -> (L, count) int64."""
    flags = np.unpackbits(np.ascontiguousarray(packed), axis=-1)[:, : bits * count].reshape(len(packed), count, bits)
    values: np.ndarray = flags.astype(np.int64) @ (np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return values


def _unpack_logprobs(packed: np.ndarray, layout: PackedLayout) -> np.ndarray:
    reader = _Reader(packed)
    exact = reader.floats(layout.exact_dtype, layout.exact_k).double()
    rest = layout.k - layout.exact_k
    fit = torch.zeros(len(packed), rest, dtype=torch.float64)
    if layout.polynomial_terms:
        coefficients = reader.floats(layout.term_dtype, len(layout.polynomial_terms))
        terms = _terms(layout.polynomial_terms, rest, normalized=layout.normalize_t).to(coefficients.dtype)
        fit = (terms * coefficients.unsqueeze(-2)).sum(-1).double()
    start = 0
    for part in layout.residual_bins:
        scale = reader.floats(part.scale_dtype, 1).double()
        values = torch.from_numpy(reader.integers(part.element_bits, part.num_elements)).double()
        signed = values * 2 - 1 if part.element_bits == 1 else values - 2.0 ** (part.element_bits - 1)
        fit[:, start : start + part.num_elements] += signed * scale
        start += part.num_elements
    found = torch.cat([exact, fit], -1)
    if layout.delta_encoding:
        found = found.cumsum(-1)
    return np.asarray(found.numpy())


class _Reader:
    """Reads the bytes of all positions in parallel, from front to back."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = packed
        self._at = 0

    def _take(self, count: int) -> np.ndarray:
        self._at += count
        return self._packed[:, self._at - count : self._at].copy()

    def floats(self, name: FloatName, count: int) -> Tensor:
        """Read (L, count) floats of the given type."""
        if count == 0:
            return torch.zeros(len(self._packed), 0, dtype=_DTYPES[name])
        return torch.from_numpy(self._take(count * _size(name))).view(_DTYPES[name])

    def integers(self, bits: int, count: int) -> np.ndarray:
        """Read integers of `bits` bits as (L, count) int64."""
        return unpack_integers(self._take(_bytes(bits * count)), bits, count)


def _terms(terms: tuple[Term, ...], count: int, *, normalized: bool) -> Tensor:
    """(count, terms) float32: the terms at t = 0, 1, ..., or at t in [0, 1] if normalized."""
    t = torch.linspace(0, 1, count) if normalized else torch.arange(count, dtype=torch.float32)
    values = [t**term if isinstance(term, int) else t.sqrt() if term == "sqrt" else t.exp() for term in terms]
    return torch.stack(values, -1)


def _size(name: FloatName) -> int:
    return int(_DTYPES[name].itemsize)


def _bytes(bits: int) -> int:
    return -(-bits // 8)
