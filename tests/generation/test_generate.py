"""A model writes a data set: the same from every worker, whatever dies, and read by the next stage."""

from __future__ import annotations

import pytest

import pipeline as softlabel
from tests.conftest import tiny_model


@pytest.fixture
def model(lm_tokenizer, save_teacher):
    return save_teacher(tiny_model("llama", len(lm_tokenizer), spread=3.0), lm_tokenizer)

def test_smoke(model, tmp_path):
    found = softlabel.generate(model, ["the cat sat on", "a dog", "the bird flew over the hill"], tmp_path / "out", num_samples=3, max_new_tokens=12)
    print(found)
    import datasets
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    print(rows)
    for row in rows: print(row)
    print((tmp_path/"out"/"README.md").read_text())
    import subprocess
    print(subprocess.run(["find", str(tmp_path/"out")], capture_output=True, text=True).stdout)
