"""Import of data sets from other tools: each layout is written from known logits and read back."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.errors import BadRowError, SourceError
from pipeline.sharing.distillkit import PackedLayout, ResidualBin, load_layout, unpack

K = 12


@pytest.fixture(scope="module")
def known(lm_tokenizer):
    """Rows of token ids and (T, V) log-probabilities at each token, from few distinct tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(10):
        ids = torch.randint(100, 125, (40,), generator=generator)
        logits = torch.randn(40, len(lm_tokenizer), generator=generator, dtype=torch.float64)
        logits[torch.arange(39), ids[1:]] += 6.0
        rows.append((ids.tolist(), torch.log_softmax(logits, -1)))
    return rows


# ------------------------------------------------- a second implementation of DistillKit's packing


def pack_integers(values, bits):
    """(L, N) -> (L, B) bytes: integers one after another, most significant bit first."""
    out = []
    for row in values:
        stream = "".join(format(int(v), f"0{bits}b") for v in row)
        stream += "0" * (-len(stream) % 8)
        out.append([int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)])
    return np.asarray(out, dtype=np.uint8)


def floats(values, dtype):
    return values.to(dtype).contiguous().view(torch.uint8).reshape(len(values), -1).numpy()


def pack_distillkit(logprobs, ids, layout):
    """Pack (L, K) log-probabilities and (L, K) ids to bytes as the format's description defines.

    The bytes hold exact floats, a least-squares fit of the rest, and its errors in bins.
    """
    values = logprobs.clone()
    if layout.delta_encoding:
        values = torch.cat([values[:, :1], values.diff(dim=-1)], -1)
    parts = []
    if layout.exact_k:
        parts.append(floats(values[:, : layout.exact_k], getattr(torch, layout.exact_dtype)))
    rest = values[:, layout.exact_k :]
    count = rest.shape[1]
    if layout.polynomial_terms:
        t = torch.linspace(0, 1, count, dtype=torch.float64) if layout.normalize_t else torch.arange(count).double()
        terms = [t**i if isinstance(i, int) else getattr(torch, i)(t) for i in layout.polynomial_terms]
        x = torch.stack(terms, -1)
        coefficients = torch.linalg.lstsq(x, rest.T).solution.T
        parts.append(floats(coefficients, getattr(torch, layout.term_dtype)))
        rest = rest - coefficients.float().double() @ x.T
    start = 0
    for part in layout.residual_bins:
        chosen = rest[:, start : start + part.num_elements]
        steps = 1.0 if part.element_bits == 1 else 2.0 ** (part.element_bits - 1)
        scale = (chosen.abs().amax(-1, keepdim=True) / steps).to(getattr(torch, part.scale_dtype))
        whole = (chosen / scale.double()).round().clamp(-steps, steps - 1)
        parts += [floats(scale, scale.dtype), pack_integers((whole + steps).long().numpy(), part.element_bits)]
        start += part.num_elements
    return np.concatenate(parts, -1), pack_integers(ids.numpy(), math.ceil(math.log2(layout.d)))


LAYOUTS = {
    "exact": PackedLayout(d=321, k=K, exact_k=K, delta_encoding=False),
    "bf16": PackedLayout(d=321, k=K, exact_k=K, exact_dtype="bfloat16", delta_encoding=False),
    "delta": PackedLayout(d=512, k=K, exact_k=K),
    "recommended": PackedLayout(
        d=321, k=K, exact_k=4, exact_dtype="bfloat16", polynomial_terms=(0, 1, 2, "sqrt"), delta_encoding=False
    ),
    "bins": PackedLayout(
        d=321,
        k=K,
        exact_k=2,
        polynomial_terms=(0, 1, 2),
        residual_bins=(ResidualBin("float32", 11, 6), ResidualBin("float16", 5, 4)),
        normalize_t=True,
    ),
    "no-fit": PackedLayout(
        d=321, k=K, exact_k=1, residual_bins=(ResidualBin("float32", 16, 11),), delta_encoding=False
    ),
}
CLOSE = {"exact": 1e-6, "bf16": 2e-2, "delta": 1e-5, "recommended": 0.2, "bins": 0.15, "no-fit": 1e-3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_distillkits_packing_is_undone(known, name):
    top = known[0][1].topk(K)
    ids, logprobs = unpack(*pack_distillkit(top.values, top.indices, LAYOUTS[name]), LAYOUTS[name])
    np.testing.assert_array_equal(ids, top.indices)
    np.testing.assert_allclose(logprobs, top.values, atol=CLOSE[name])


def test_the_bytes_of_a_known_position():
    """Packed by hand: two float32, a constant fit of -1.5, and the ids 5, 300, 1 of nine bits."""
    layout = PackedLayout(d=321, k=3, exact_k=2, polynomial_terms=(0,), delta_encoding=False)
    packed = np.frombuffer(np.asarray([-0.5, -1.0, -1.5], dtype="<f4").tobytes(), dtype=np.uint8)[None]
    bits = "00000010110010110000000000100000"
    ids = np.asarray([[int(bits[i : i + 8], 2) for i in range(0, 32, 8)]], dtype=np.uint8)
    found_ids, found = unpack(packed, ids, layout)
    assert found_ids.tolist() == [[5, 300, 1]]
    assert found.tolist() == [[-0.5, -1.0, -1.5]]


# ---------------------------------------------------------------------------------- layouts of rows


def nested(values, kind):
    return pa.array([v.tolist() if hasattr(v, "tolist") else v for v in values], type=pa.list_(pa.list_(kind)))


def tops(known, drop):
    """The top K of each row without the last `drop` positions, which predict beyond the end."""
    return [logprobs[: len(ids) - drop].topk(K) for ids, logprobs in known]


def token_column(known):
    return pa.array([ids for ids, _ in known], type=pa.list_(pa.uint64()))


def distillkit(known, folder):
    packed = [pack_distillkit(t.values, t.indices, LAYOUTS["exact"]) for t in tops(known, 1)]
    table = pa.table(
        {
            "input_ids": token_column(known),
            "compressed_logprobs": nested([a for a, _ in packed], pa.uint8()),
            "bytepacked_indices": nested([b for _, b in packed], pa.uint8()),
        }
    )
    pq.write_table(table.slice(0, 6), folder / "data_2.parquet")
    pq.write_table(table.slice(6), folder / "data_10.parquet")
    written = {"d": 321, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False, "exact_dtype": "float32"}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(written))
    return folder


def token_ids(known, folder):
    top = tops(known, 0)
    columns = {
        "token_ids": nested([t.indices for t in top], pa.int32()),
        "top_values": nested([t.values for t in top], pa.float32()),
    }
    pq.write_table(
        pa.table({"input_ids": token_column(known), "text": ["x"] * len(known), **columns}), folder / "a.parquet"
    )
    return folder / "a.parquet"


def target_token_ids(known, folder):
    top = tops(known, 1)
    columns = {
        "logprobs": nested([t.values for t in top], pa.float64()),
        "target_token_ids": nested([t.indices for t in top], pa.int64()),
    }
    pq.write_table(pa.table({"input_ids": token_column(known), **columns}), folder / "a.parquet")
    return folder / "a.parquet"


def own_token(known, folder):
    """A layout whose entry j predicts token j; the first entry is empty."""
    lists = [
        [[]] + [list(zip(v.tolist(), i.tolist(), strict=True)) for v, i in zip(t.values, t.indices, strict=True)]
        for t in tops(known, 1)
    ]
    item = pa.struct([("logprob", pa.float32()), ("token", pa.int32())])
    column = pa.array(
        [[[{"logprob": v, "token": i} for v, i in entry] for entry in row] for row in lists],
        type=pa.list_(pa.list_(item)),
    )
    pq.write_table(pa.table({"input_ids": token_column(known), "logprobs": column}), folder / "a.parquet")
    return folder / "a.parquet"


def lines(known, folder):
    """A layout in JSON lines, with tokens written as `token_id:N` as by vLLM."""
    rows = []
    for (ids, _), t in zip(known, tops(known, 1), strict=True):
        entries = [
            [{"logprob": v, "token": f"token_id:{i}"} for v, i in zip(values.tolist(), classes.tolist(), strict=True)]
            for values, classes in zip(t.values, t.indices, strict=True)
        ]
        rows.append(json.dumps({"input_ids": ids, "top_logprobs": [None, *entries]}) + "\n")
    (folder / "a.jsonl").write_text("".join(rows))
    return folder / "a.jsonl"


@pytest.mark.parametrize("layout", [distillkit, token_ids, target_token_ids, own_token, lines])
def test_every_layout_comes_back_as_the_logits_it_was_made_from(tmp_path, known, lm_tokenizer, layout):
    (tmp_path / "in").mkdir()
    path = layout(known, tmp_path / "in")
    cache = softlabel.import_responses([path], tmp_path / "c", tokenizer=lm_tokenizer, teacher="org/teacher")
    assert verify(cache.root).problems == ()
    assert cache.manifest.probe.verdict in ("aligned", "inconclusive")
    assert cache.manifest.contract.encoding.k == K
    assert len(cache.dataset("train")) == len(known)
    for row, (ids, logprobs) in zip(cache.dataset("train"), known, strict=True):
        assert row.example.input_ids.tolist() == ids
        assert np.flatnonzero(row.example.supervised).tolist() == list(range(len(ids) - 1))
        top = logprobs[:-1].topk(K)
        torch.testing.assert_close(row.soft.top_ids.reshape(-1, K), top.indices)
        torch.testing.assert_close(row.soft.top_logprobs.reshape(-1, K).double(), top.values, atol=2e-3, rtol=2e-3)
        rest = 1 - top.values.exp().sum(-1)
        torch.testing.assert_close(row.soft.log_residuals[:, 0].double().exp(), rest, atol=2e-3, rtol=2e-3)
        nll = -logprobs[torch.arange(len(ids) - 1), torch.tensor(ids)[1:]]
        if row.soft.top_ids.reshape(-1, K).eq(torch.tensor(ids)[1:, None]).any(-1).all():
            assert row.teacher_nll_sum == pytest.approx(float(nll.sum()), rel=1e-4)


def test_fewer_can_be_kept_and_prompts_left_out(tmp_path, known, lm_tokenizer):
    (tmp_path / "in").mkdir()
    path = target_token_ids(known, tmp_path / "in")
    labels = pa.array([[-100] * 20 + ids[20:] for ids, _ in known])
    pq.write_table(pq.read_table(path).append_column("labels", labels), path)
    cache = softlabel.import_responses([path], tmp_path / "c", tokenizer=lm_tokenizer, teacher="t", top_k=3)
    row = cache.dataset("train")[2]
    assert np.flatnonzero(row.example.supervised).tolist() == list(range(19, 39))
    torch.testing.assert_close(row.soft.top_ids.reshape(-1, 3), known[2][1][19:39].topk(3).indices)


def test_a_shift_that_cannot_be_told_is_asked_for(tmp_path, lm_tokenizer):
    entries = {
        "logprobs": nested([[[-2.0, -3.0]] * 9], pa.float32()),
        "target_token_ids": nested([[[200, 201]] * 9], pa.int32()),
    }
    pq.write_table(pa.table({"input_ids": pa.array([list(range(20, 30))]), **entries}), tmp_path / "a.parquet")
    settings = {"tokenizer": lm_tokenizer, "teacher": "t"}
    with pytest.raises(SourceError, match="--position-zero"):
        softlabel.import_responses([tmp_path / "a.parquet"], tmp_path / "c", **settings)
    cache = softlabel.import_responses([tmp_path / "a.parquet"], tmp_path / "c", position_zero="filled", **settings)
    assert cache.dataset("train")[0].example.num_positions == 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.drop_columns(["input_ids"]), SourceError, "row 0: expected input_ids"),
        (lambda t: t.drop_columns(["target_token_ids"]), SourceError, "row 0: not a response of a known layout"),
        (
            lambda t: t.set_column(0, "input_ids", pa.array([[5, 6]] * len(t))),
            SourceError,
            "entry for each of 2 tokens",
        ),
        (
            lambda t: replaced(t, "target_token_ids", pa.int64(), lambda v: v * 0 + 7),
            BadRowError,
            "position 0: expected each class once",
        ),
        (
            lambda t: replaced(t, "target_token_ids", pa.int64(), lambda v: v + 320),
            BadRowError,
            "class ids of 0 to 319",
        ),
        (lambda t: replaced(t, "logprobs", pa.float64(), lambda v: v * 0), BadRowError, "mass of at most 1"),
    ],
)
def test_rows_that_fit_nothing_are_named(tmp_path, known, lm_tokenizer, change, error, message):
    path = target_token_ids(known, tmp_path)
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(error, match=message):
        softlabel.import_responses([path], tmp_path / "c", tokenizer=lm_tokenizer, teacher="t", position_zero="filled")
    assert not (tmp_path / "c" / "manifest.json").exists()


def replaced(table, name, kind, change):
    values = [np.asarray(row) for row in table.column(name).to_pylist()]
    return table.set_column(table.column_names.index(name), name, nested([change(v) for v in values], kind))


def test_another_compression_than_was_packed_with_is_refused(tmp_path, known, lm_tokenizer):
    folder = distillkit(known, tmp_path)
    config = folder / "compression_config.yaml"
    settings = {"tokenizer": lm_tokenizer, "teacher": "t"}
    config.write_text(
        yaml.safe_dump({"teacher": {"logprob_compressor": {"d": 321, "k": K, "exact_k": 4, "residual_bins": []}}})
    )
    with pytest.raises(
        SourceError, match="expected 16 bytes a position, as the compression configuration says, found 48"
    ):
        softlabel.import_responses([folder], tmp_path / "c", **settings)
    config.write_text("d: many")
    with pytest.raises(SourceError, match="not a compression configuration of DistillKit: d:"):
        load_layout(config)
    config.unlink()
    with pytest.raises(SourceError, match="--compression-config"):
        softlabel.import_responses([folder], tmp_path / "c", **settings)
    legacy = pa.table(
        {
            "input_ids": token_column(known[:1]),
            **{n: nested([[[1]]], pa.int64()) for n in ("packed_indices", "exact_values", "coeffs")},
        }
    )
    pq.write_table(legacy, tmp_path / "old.parquet")
    with pytest.raises(SourceError, match="legacy layout"):
        softlabel.import_responses([tmp_path / "old.parquet"], tmp_path / "c", **settings)


def test_a_fit_that_passes_a_mass_of_one_is_scaled_to_it(tmp_path, lm_tokenizer):
    layout = PackedLayout(d=321, k=2, exact_k=2, delta_encoding=False)
    values, ids = torch.tensor([[-0.1, -0.2]] * 3), torch.tensor([[30, 31]] * 3)
    packed = pack_distillkit(values, ids, layout)
    table = {
        "input_ids": [[29, 30, 30, 31]],
        "compressed_logprobs": nested([packed[0]], pa.uint8()),
        "bytepacked_indices": nested([packed[1]], pa.uint8()),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"d": 321, "k": 2, "exact_k": 2, "delta_encoding": False}))
    cache = softlabel.import_responses(
        [tmp_path / "a.parquet"],
        tmp_path / "c",
        tokenizer=lm_tokenizer,
        teacher="t",
        position_zero="filled",
        compression_config=tmp_path / "c.yaml",
    )
    row = cache.dataset("train")[0]
    assert float(row.soft.top_logprobs[:2].exp().sum()) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logprobs", lambda rows: rows[2].__setitem__(3, float("nan")), "position 2: .* found nan"),
        ("logprobs", lambda rows: rows[2].__setitem__(3, 7.5), "position 2: .* found 7.5; are they logits"),
        ("logprobs", lambda rows: rows.__setitem__(2, [-15.0] * K), "position 2: .* are they logits"),
        ("logprobs", lambda rows: rows[2].pop(), "entry 2: expected as many target_token_ids as logprobs"),
        ("target_token_ids", lambda rows: rows[2].pop(), "entry 2: expected as many target_token_ids as logprobs"),
        (
            "target_token_ids",
            lambda rows: rows[2].__setitem__(3, 4.5),
            "target_token_ids: entry 2: expected whole numbers, found 4.5",
        ),
        ("target_token_ids", lambda rows: rows[2].__setitem__(3, None), "position 2: expected class ids of 0 to 319"),
        ("input_ids", lambda ids: ids.__setitem__(2, -1), "token 2: expected ids of 0 to 319"),
        ("input_ids", lambda ids: ids.__setitem__(2, 320), "token 2: expected ids of 0 to 319"),
        (None, lambda row: [row[name].__setitem__(2, []) for name in ("logprobs", "target_token_ids")], "position 2:"),
    ],
)
def test_entries_of_a_row_that_are_wrong_are_named(tmp_path, known, lm_tokenizer, name, change, message):
    rows = []
    for ids, logprobs in known[:2]:
        top = logprobs.topk(K)
        rows.append({"input_ids": [*ids], "logprobs": top.values.tolist(), "target_token_ids": top.indices.tolist()})
    change(rows[1] if name is None else rows[1][name])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tokenizer": lm_tokenizer, "teacher": "t", "position_zero": "filled"}
    with pytest.raises((BadRowError, SourceError), match=rf"a\.jsonl line 2: {message}"):
        softlabel.import_responses([tmp_path / "a.jsonl"], tmp_path / "c", **settings)


@pytest.mark.parametrize(("value", "message"), [(300, "expected bytes"), (None, "expected 48 bytes, as in the first")])
def test_packed_bytes_that_are_wrong_are_named(tmp_path, known, lm_tokenizer, value, message):
    top = tops(known, 1)[0]
    packed, classes = (part.tolist() for part in pack_distillkit(top.values, top.indices, LAYOUTS["exact"]))
    if value is None:
        packed[3].pop()
    else:
        packed[3][0] = value
    row = {"input_ids": known[0][0], "compressed_logprobs": packed, "bytepacked_indices": classes}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    config = {"d": 321, "k": K, "exact_k": K, "delta_encoding": False}
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SourceError, match=f"line 1: compressed_logprobs: entry 3: {message}"):
        softlabel.import_responses([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer=lm_tokenizer, teacher="t")


def test_a_table_that_does_not_know_each_next_token_is_told_so(tmp_path, lm_tokenizer, known):
    (tmp_path / "in").mkdir()
    ids, logprobs = known[0]
    lower = logprobs.clone()
    lower[::4, ids[1:][::4]] -= 20.0
    logprobs = torch.log_softmax(lower, -1)
    path = target_token_ids([(ids, logprobs), *known[1:]], tmp_path / "in")
    settings = {"tokenizer": lm_tokenizer, "teacher": "t", "store_label_logprobs": True}
    following = torch.tensor(ids)[1:, None]
    unknown = int((logprobs[:-1].topk(K).indices != following).all(-1).sum())
    assert unknown > 0
    message = rf"row 0: label_logprobs: .* not known at {unknown} of {len(ids) - 1} positions.*leave out --store-label-logprobs"
    with pytest.raises(BadRowError, match=message):
        softlabel.import_responses([path], tmp_path / "c", **settings)
    cache = softlabel.import_responses([path], tmp_path / "d", on_bad_row="skip", **settings)
    assert [row.example.source_row for row in cache.dataset("train")] == list(range(1, 10))
    following = torch.tensor(known[1][0])[1:, None]
    expected = known[1][1][:-1].gather(-1, following)[:, 0]
    torch.testing.assert_close(cache.dataset("train")[0].label_logprobs.double(), expected, atol=1e-3, rtol=1e-3)
