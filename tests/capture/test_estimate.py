"""The pilot's estimates of bytes and positions, compared with the cache captured afterwards."""

from __future__ import annotations

import json
import random

import pytest
import yaml
from click.testing import CliRunner
from datasets import Dataset

import pipeline as softlabel
from pipeline.cache.views.inspection import totals
from pipeline.cli import main
from pipeline.config import load_config, parse_bytes, resolve
from pipeline.errors import MisuseError
from tests.conftest import sentence, tiny_model


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(3)
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": sentence(rng, rng.randint(20, 60))} for _ in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def teacher(save_teacher, lm_tokenizer):
    return save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer)


def invoke(*arguments):
    return CliRunner().invoke(main, ["estimate", *map(str, arguments)])


@pytest.mark.full
@pytest.mark.parametrize("packing", [(), ("--packing",)])
def test_bytes_and_positions_are_those_of_the_cache(tmp_path, corpus, teacher, monkeypatch, packing):
    common = ("--task", "causal-lm", "--teacher", teacher, "--dataset", corpus, "--max-length", 64, *packing)
    there = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    done = invoke(*common, "--positions", 4000, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert sorted(tmp_path.rglob("*")) == there
    cached = CliRunner().invoke(
        main, ["cache-logits", *map(str, common), "--sample-size", "25", "--output", str(tmp_path / "cache")]
    )
    assert cached.exit_code == 0, cached.output
    total = totals(softlabel.Cache.open(tmp_path / "cache"))["train"]
    line = next(e for e in found["encodings"] if e["encoding"].get("sample_size") == 25)
    assert found["rows"] == 300
    assert found["positions"] == pytest.approx(total["positions"], rel=0.05)
    assert found["tokens"] == pytest.approx(total["tokens"], rel=0.05)
    assert line["bytes_per_position"] == pytest.approx(total["bytes_per_position"], rel=0.2)
    assert line["total_bytes"] == pytest.approx(total["bytes"], rel=0.3)
    assert line["fidelity"]["noise_share"] > 0


def test_the_table_and_the_projection(corpus, teacher):
    done = invoke(
        "--task", "causal-lm", "--teacher", teacher, "--dataset", corpus, "--positions", 300, "--scale", "1e12"
    )
    assert done.exit_code == 0, done.output
    assert "sampled 25" in done.stdout
    assert "top-k 50" in done.stdout
    assert "At 1e+12 tokens on 1 device(s)" in done.stdout
    assert "Assumed" in done.stdout


@pytest.mark.full
def test_noise_and_budget_choose_and_the_file_runs(tmp_path, corpus, teacher):
    common = ("--task", "causal-lm", "--teacher", teacher, "--dataset", corpus, "--positions", 600)
    file = tmp_path / "capture.yaml"
    done = invoke(*common, "--target-noise", 0.02, "--write-config", file)
    assert done.exit_code == 0, done.output
    assert "<- chosen" in done.stdout
    written = yaml.safe_load(file.read_text())
    written["cache-logits"]["output"] = str(tmp_path / "cache")
    file.write_text(yaml.safe_dump(written))
    config = load_config(file)
    resolve(softlabel.config.CacheLogitsConfig, config, config.sections["cache-logits"][0], {})
    made = CliRunner().invoke(main, ["cache-logits", "--config", str(file)])
    assert made.exit_code == 0, made.output
    cache = softlabel.Cache.open(tmp_path / "cache")
    report = json.loads((cache.root / "reports" / "fidelity.json").read_text())
    assert report["noise_share"] < 0.03
    assert "## Fidelity" in (cache.root / "README.md").read_text()

    small, large = (json.loads(invoke(*common, "--budget", size, "--json").stdout) for size in ("250kB", "100GB"))
    sizes = {json.dumps(e["encoding"]): e["total_bytes"] for e in small["encodings"]}
    assert sizes[json.dumps(small["chosen"])] <= 250_000
    assert large["chosen"]["kind"] == "full"


def test_what_cannot_be_is_one_line(tmp_path, corpus, teacher):
    common = ("--task", "causal-lm", "--teacher", teacher, "--dataset", corpus, "--positions", 200)
    for extra, message in (
        (("--budget", "10B"), "the smallest of those compared takes"),
        (("--budget", "much"), "expected a size as 500MB"),
        (("--budget", "1GB", "--target-noise", "0.1"), "each choose an encoding"),
        (("--write-config", tmp_path / "x.yaml"), "goes with --target-noise or --budget"),
    ):
        done = invoke(*common, *extra)
        assert message in done.output, done.output
        assert done.exit_code == 2
        assert not (tmp_path / "x.yaml").exists()


def test_a_classifier_is_estimated_too(topics, save_teacher, bert_tokenizer, tmp_path):
    teacher = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0), bert_tokenizer)
    path = tmp_path / "topics.jsonl"
    with path.open("w") as file:
        for row in topics["train"]:
            file.write(json.dumps({"text": row["text"]}) + "\n")
    done = invoke("--task", "sequence-classification", "--teacher", teacher, "--dataset", path)
    assert done.exit_code == 0, done.output
    assert "full" in done.stdout


def test_sizes_as_people_write_them():
    assert parse_bytes("--budget", "100GB") == 100 * 10**9
    assert parse_bytes("--budget", "1.5 tb") == 15 * 10**11
    assert parse_bytes("--budget", "2000") == 2000
    for text in ("", "GB", "0", "-1GB", "5 XB"):
        with pytest.raises(MisuseError):
            parse_bytes("--budget", text)


def test_a_live_data_set_is_a_source_too(lm_tokenizer):
    from pipeline.capture.estimate.run import estimate
    from pipeline.models import LoadedModel
    from pipeline.records import Columns, Tokenization
    from pipeline.sources import from_datasets
    from pipeline.tasks import get_task

    rng = random.Random(0)
    data = Dataset.from_dict({"text": [sentence(rng, 30) for _ in range(50)]})
    model = LoadedModel(tiny_model("gpt2", len(lm_tokenizer)), lm_tokenizer, "tiny")
    found = estimate(
        get_task("causal-lm"),
        from_datasets(data, Columns(label=None)),
        model,
        tokenization=Tokenization(64, packing=True),
        batch_tokens=256,
        positions=400,
    )
    assert 400 <= found.pilot_positions <= 700
    assert found.rows == 50
    assert found.tokens == pytest.approx(
        50 / found.pilot_rows * (found.pilot_positions + found.pilot_positions / 63), rel=0.1
    )
