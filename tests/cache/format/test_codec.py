"""Round trips of the codec: soft labels are unchanged, up to the rounding of `narrow`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.format.codec import content_hash, pack, unpack
from pipeline.cache.format.rows import block_of, rows_of
from pipeline.cache.format.schema import cache_schema
from pipeline.errors import MisuseError
from pipeline.records import CachedExample, Full, Sampled, TokenizedExample, TopK, TopP
from pipeline.softlabels import encode, narrow
from tests.support.profile import examples
from tests.support.rows import class_row, token_row

ENCODINGS = [Full(), TopK(4), TopK(1000), TopP(0.7), Sampled(6.0)]


def assert_same_row(found, expected) -> None:
    for field in dataclasses.fields(expected.example):
        one, other = getattr(found.example, field.name), getattr(expected.example, field.name)
        if isinstance(other, np.ndarray):
            assert np.array_equal(one, other), field.name
        else:
            assert one == other, field.name
    for name in ("top_offsets", "top_ids", "tail_offsets", "tail_ids"):
        assert torch.equal(getattr(found.soft, name), getattr(expected.soft, name)), name
    close = {"atol": 1e-5, "rtol": 2.0**-11}
    torch.testing.assert_close(found.soft.top_logprobs, expected.soft.top_logprobs, **close)
    torch.testing.assert_close(found.soft.log_residuals, expected.soft.log_residuals, **close)
    assert found.content_hash == expected.content_hash
    assert found.teacher_nll_sum == pytest.approx(expected.teacher_nll_sum)
    assert found.teacher_entropy_sum == pytest.approx(expected.teacher_entropy_sum)


@settings(deadline=None, max_examples=examples(40, 400))
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=6),
    st.sampled_from([2, 41, 70_001]),
    st.sampled_from(ENCODINGS),
    st.integers(0, 2**16),
)
def test_token_rows_come_back(lengths, classes, encoding, seed):
    if classes > 1000 and encoding == Full():
        return
    rows = [token_row(n, encoding, classes, length=length, seed=seed) for n, length in enumerate(lengths)]
    schema = cache_schema(encoding, classes, labels="tokens", marks_positions=True, kept={"id": pa.string()})
    found = rows_of(unpack(pack(block_of(rows, schema), schema), encoding, classes))
    assert len(found) == len(rows)
    for one, other in zip(found, rows, strict=True):
        assert_same_row(one, other)


@settings(deadline=None, max_examples=examples(40, 400))
@given(
    st.sampled_from([1, 2, 7, 65_536, 300_000]),
    st.sampled_from(ENCODINGS),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.sampled_from([torch.float16, torch.float32]),
    st.integers(0, 2**16),
)
def test_any_logits_come_back(classes, encoding, spread, dtype, seed):
    """Covers ties, probability 0, extreme float16 values, one class, and ids beyond uint16."""
    if classes > 1000 and encoding in (Full(), TopK(1000), TopP(0.7)):
        return
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(np.round(rng.normal(size=(3, classes)), 1) * spread).to(dtype)
    logits[torch.from_numpy(rng.random((3, classes)) < 0.3)] = -torch.inf
    logits[:, -1] = torch.tensor([65504.0, 6e-8, -65504.0])
    uniforms = torch.from_numpy(rng.random(3))
    soft = narrow(encode(logits, encoding, uniforms=uniforms), uniforms)
    example = TokenizedExample(0, 0, np.arange(4, dtype=np.int32), supervised=np.asarray([True, True, True, False]))
    row = CachedExample(example, soft, 1.0, 2.0, content_hash(example))
    schema = cache_schema(encoding, classes, labels="tokens", marks_positions=True)
    (found,) = rows_of(unpack(pack(block_of([row], schema), schema), encoding, classes))
    for name in ("top_offsets", "top_ids", "tail_offsets", "tail_ids"):
        assert torch.equal(getattr(found.soft, name), getattr(soft, name)), name
    probabilities = found.soft.top_logprobs.exp(), soft.top_logprobs.exp()
    torch.testing.assert_close(*probabilities, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
@pytest.mark.parametrize("classes", [2, 5, 150])
def test_class_rows_come_back(encoding, classes):
    rows = [class_row(n, encoding, classes) for n in range(20)]
    schema = cache_schema(encoding, classes, labels="row", marks_positions=False, text=True)
    for one, other in zip(rows_of(unpack(pack(block_of(rows, schema), schema), encoding, classes)), rows, strict=True):
        assert_same_row(one, other)


def test_ids_take_two_bytes_up_to_65536_classes_and_four_beyond():
    assert (
        cache_schema(TopK(4), 65536, labels="tokens", marks_positions=True).field("top_ids").type.value_type
        == pa.uint16()
    )
    assert (
        cache_schema(TopK(4), 65537, labels="tokens", marks_positions=True).field("top_ids").type.value_type
        == pa.uint32()
    )


def test_logits_of_full_are_centred():
    row, schema = class_row(0, Full(), 5), cache_schema(Full(), 5, labels="row", marks_positions=False)
    logits = pack(block_of([row], schema), schema).column("logits").to_pylist()[0]
    assert max(logits) == 0


def test_a_slice_of_a_table_unpacks_as_its_rows():
    rows = [token_row(n, Sampled(6.0), 41) for n in range(6)]
    schema = cache_schema(Sampled(6.0), 41, labels="tokens", marks_positions=True, kept={"id": pa.string()})
    table = pack(block_of(rows, schema), schema)
    for one, other in zip(rows_of(unpack(table.slice(2, 3), Sampled(6.0), 41)), rows[2:5], strict=True):
        assert_same_row(one, other)


def test_content_hash_is_of_tokens_and_label():
    row = class_row(0, Full(), 5).example
    assert content_hash(row) == content_hash(dataclasses.replace(row, source_row=7, text="other"))
    assert content_hash(row) != content_hash(dataclasses.replace(row, label=None))
    assert content_hash(row) != content_hash(dataclasses.replace(row, input_ids=row.input_ids[::-1]))


def test_a_kept_column_may_not_take_the_name_of_ours():
    with pytest.raises(MisuseError, match="--keep-column input_ids"):
        cache_schema(Full(), 5, labels="row", marks_positions=False, kept={"input_ids": pa.int64()})
