"""Image classification end to end.

Covers a teacher, its cache, students, evaluation, and refused inputs.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image as Pillow
from transformers import AutoImageProcessor, AutoModelForImageClassification

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.filter import filter_rows
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.page import write_page
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import DataConfig, PredictConfig, TrainTeacherConfig
from pipeline.errors import (
    BadRowError,
    CacheError,
    ContractError,
    IntegrityError,
    MisuseError,
    ModelError,
    TrainingError,
)
from pipeline.evaluation import evaluate
from pipeline.models.initialize import Shape, make_student
from pipeline.models.predict import run as predict
from pipeline.records import Columns, Full, Sampled, Tokenization, Views
from pipeline.tasks import get_task
from pipeline.tasks.images.pixels import cut, decode
from pipeline.training.teacher import run as train_teacher
from tests.support.once import once
from tests.support.pictures import NAMES, data_set, encode, folders, pictures, pixels, untrained
from tests.support.profile import in_full
from tests.support.teaching import train

TASK = "image-classification"
IMAGES = Columns(text=None, image="image")
VIEWS = Views(3, smallest=0.5, mirror=True, seed=1)


def rows() -> Any:
    return data_set(train=pictures(0, 150, unlabelled_every=5), test=pictures(1, 60))


@pytest.fixture
def teacher(tmp_path) -> Path:
    def make(folder: Path) -> None:
        data = folders(folder / "data", train=pictures(0, 150), validation=pictures(2, 60))
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK, data=DataConfig(dataset=str(data), image_column="image"), model=str(untrained(folder / "base", num_labels=7)),
                output=str(folder / "teacher"), max_steps=120, batch_size=16, learning_rate=3e-3,
            )
        )  # fmt: skip
        assert metrics["accuracy"] > 0.8

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(
            str(teacher), rows(), folder / "cache", task=TASK, columns=IMAGES, rows_per_shard=70, batch_tokens=16
        )

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


@pytest.fixture
def viewed(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        settings = {"views": VIEWS, "rows_per_shard": 70}
        softlabel.cache_logits(str(teacher), rows(), folder / "viewed", task=TASK, columns=IMAGES, **settings)

    once((__name__, "viewed"), make, tmp_path)
    return Cache.open(tmp_path / "viewed")


def logits_of(folder: Path, image: Any) -> torch.Tensor:
    """Return the logits that plain `transformers` computes for a `PIL.Image.Image`."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(**processor(images=image, return_tensors="pt")).logits[0]


def test_cached_values_are_the_models(cache, teacher):
    assert not verify(cache.root).problems
    contract, source = cache.manifest.contract, rows()
    assert (contract.label_names, contract.tokenization.max_length) == (NAMES, 1)
    assert "input_ids" not in contract.columns
    assert [shard.tokens for shard in cache.manifest.shards] == [70, 70, 10, 60]
    for row in cache.dataset("train"):
        given = source["train"][row.example.source_row]
        assert row.example.label == (None if given["label"] is None else NAMES.index(given["label"]))
        expected = torch.log_softmax(logits_of(teacher, given["image"]), -1)
        torch.testing.assert_close(row.soft.top_logprobs, expected, atol=1e-5, rtol=1e-5)


def test_other_tools_read_it(cache):
    found = load_dataset(str(cache.root), split="train")
    assert isinstance(found[0]["encoded_image"], Pillow.Image)
    assert found[0]["encoded_image"].tobytes() == rows()["train"][0]["image"].tobytes()


@pytest.mark.full
def test_a_view_is_a_part_of_the_image_that_teacher_and_student_see_alike(viewed, teacher):
    from pipeline.evaluation.passes import collator_of
    from pipeline.models import load_model

    assert not verify(viewed.root).problems
    train_rows, test_rows = list(viewed.dataset("train")), list(viewed.dataset("test"))
    assert (len(train_rows), len(test_rows)) == (450, 60)
    assert [(row.example.source_row, row.example.piece) for row in train_rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert all(len(row.example.view) == 0 for row in test_rows)
    images = rows()["train"]
    for row in train_rows[::7]:
        left, top, width, height, mirrored = row.example.view.tolist()
        image = images[row.example.source_row]["image"].crop((left, top, left + width, top + height))
        image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
        expected = torch.log_softmax(logits_of(teacher, image), -1)
        torch.testing.assert_close(row.soft.top_logprobs, expected, atol=1e-5, rtol=1e-5)
    task = get_task(TASK)
    loaded = load_model(task, str(teacher))
    block = next(iter(viewed.dataset("train").blocks(12)))
    batch = collator_of(viewed, task, loaded).collate_block(block)
    with torch.no_grad():
        seen = torch.log_softmax(loaded.model(**batch.inputs).logits, -1)
    torch.testing.assert_close(
        seen.flatten(), torch.cat([row.soft.top_logprobs for row in train_rows[:12]]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("settings", [*in_full({"num_workers": 2}), {"part": "0/2"}], ids=str)
def test_a_capture_is_the_same_whoever_makes_its_shards(viewed, teacher, tmp_path, settings):
    from pipeline.capture.run import run
    from pipeline.config import CacheLogitsConfig

    data = tmp_path / "rows"
    rows()["train"].to_parquet(data.with_suffix(".parquet"))
    config = CacheLogitsConfig(
        task=TASK, data=DataConfig(dataset=f"{data}.parquet", image_column="image", views=3, view_area=0.5, view_seed=1),
        teacher=str(teacher), output=str(tmp_path / "one"), rows_per_shard=40,
    )  # fmt: skip
    first = run(config)
    other = dataclasses.replace(config, output=str(tmp_path / "two"), **settings)
    run(other)
    found = run(dataclasses.replace(other, part="1/2")) if "part" in settings else Cache.open(tmp_path / "two")
    assert found.manifest.cache_id == first.manifest.cache_id


@pytest.mark.full
def test_students_learn_from_soft_labels_and_from_labels(cache, tmp_path, teacher):
    start = make_student(str(teacher), tmp_path / "start", config=Shape(1, 16, 2)).path
    assert json.loads((start / "preprocessor_config.json").read_text())["size"] == {"height": 8, "width": 8}
    settings = {"max_steps": 150, "learning_rate": 5e-3, "batch_size": 16}
    train(cache, start, tmp_path / "student", hard_weight=0.1, soft_weight=0.9, **settings)
    train(cache, start, tmp_path / "control", hard_weight=1.0, soft_weight=0.0, **settings)
    report = evaluate(cache, {name: tmp_path / name for name in ("start", "student", "control")}, split="test")
    start_line, student, control = report.students
    assert start_line.agreement < 0.6 < 0.8 < student.agreement
    assert student.kl < control.kl
    card = (tmp_path / "student" / "README.md").read_text()
    assert 'pipeline("image-classification"' in card


@pytest.mark.full
def test_a_student_of_another_architecture_and_size_reads_the_images_by_its_own_processor(viewed, tmp_path, caplog):
    """A convolutional network reads crops at 16 x 16 pixels; the teacher read them at 8 x 8."""
    start = untrained(tmp_path / "start", "resnet", side=16)
    with caplog.at_level("INFO"):
        train(viewed, start, tmp_path / "student", hard_weight=0.1, soft_weight=0.9, max_steps=150)
    assert "reads the images by its own image processor" in caplog.text
    report = evaluate(viewed, {"student": tmp_path / "student"}, split="test")
    assert report.students[0].agreement > 0.7


def test_held_out_rows_include_all_parts_of_an_image(viewed, teacher):
    """Uses the default recipe."""
    from pipeline.config import TrainStudentConfig
    from pipeline.training.recipe.make import make_recipe
    from pipeline.training.student import load_student

    flags = TrainStudentConfig(cache=(str(viewed.root),), student=str(teacher), output="unused")
    student = load_student(viewed.manifest.contract, str(teacher))
    held = make_recipe(flags, viewed, student, None).held_out
    assert get_task(TASK).reads == "images"
    source_rows = viewed.dataset("train").column("source_row")
    assert held.num_measured == 45
    assert not set(source_rows[held.measured]) & set(source_rows[held.left])
    assert len(set(source_rows[held.measured] // 30)) == 5  # spread over the whole split


def test_transforms_keep_the_images(viewed, tmp_path):
    kept = filter_rows(viewed, tmp_path / "some", where="piece = 0")
    assert len(kept.dataset("train")) == 150
    sparse = convert(viewed, tmp_path / "sampled", encoding=Sampled(2.0))
    assert not verify(sparse.root).problems
    first = next(iter(sparse.dataset("train"))).example
    assert first.image == next(iter(viewed.dataset("train"))).example.image


def test_pages_show_the_images(viewed, tmp_path):
    write_page(viewed, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img class="picture" src="data:image/png;base64,') >= 6
    assert "img-src data:" in page
    assert "pixels at" in page


def test_rows_labelled_elsewhere(tmp_path, teacher):
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    rng = np.random.default_rng(0)
    given = [LabelledRow(image=encode(pixels("red", rng)), logits=torch.randn(1, 3), label=2) for _ in range(5)]
    cache = write_cache(
        given,
        tmp_path / "cache",
        task=TASK,
        tokenizer=processor,
        encoding=Full(),
        teacher="elsewhere",
        label_names=NAMES,
    )
    assert not verify(cache.root).problems
    assert next(iter(cache.dataset("train"))).example.image.data == given[0].image
    with pytest.raises(MisuseError, match="rows of image-classification have image="):
        write_cache(
            [LabelledRow([1, 2], logits=torch.randn(1, 3))], tmp_path / "no", task=TASK, tokenizer=processor, encoding=Full(),
            teacher="elsewhere", label_names=NAMES,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
@pytest.mark.parametrize("form", ["JPEG", "BMP", "WEBP"])
def test_kinds_of_models_and_files(tmp_path, kind, form):
    """Photographs of several sizes, rotated by their orientation, in grey and with a palette."""
    rng = np.random.default_rng(0)
    images = [encode(pixels("red", rng, width, height), form) for width, height in ((9, 20), (40, 13), (8, 8))]
    grey = encode(pixels("red", rng)[..., 0], "PNG")
    source = data_set(train={"image": [{"bytes": b, "path": None} for b in [*images, grey]], "label": ["red"] * 4})
    model = untrained(
        tmp_path / kind, kind, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    cache = softlabel.cache_logits(str(model), source, tmp_path / "cache", task=TASK, columns=IMAGES)
    for row, image in zip(cache.dataset("train"), source["train"]["image"], strict=True):
        expected = torch.log_softmax(logits_of(model, image.convert("RGB")), -1)
        torch.testing.assert_close(row.soft.top_logprobs, expected, atol=1e-5, rtol=1e-5)


def test_a_live_model_and_processor(tmp_path, teacher):
    model = AutoModelForImageClassification.from_pretrained(teacher)
    processor = AutoImageProcessor.from_pretrained(teacher)
    settings: dict[str, Any] = {"task": TASK, "columns": IMAGES}
    live = softlabel.cache_logits(model, rows(), tmp_path / "live", tokenizer=processor, **settings)
    named = softlabel.cache_logits(str(teacher), rows(), tmp_path / "named", **settings)
    assert live.manifest.contract.tokenizer == named.manifest.contract.tokenizer
    assert live.manifest.shards[0].sha256 == named.manifest.shards[0].sha256


def test_an_image_that_cannot_be_decoded_is_named_or_set_aside(tmp_path, teacher):
    found = pictures(0, 6)
    found["image"][2] = {"bytes": found["image"][2]["bytes"][:60], "path": "torn.png"}
    found["image"][4] = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": "run.eps"}
    found["image"][5] = None
    source = data_set(train=found)
    settings: dict[str, Any] = {"task": TASK, "columns": IMAGES}
    with pytest.raises(BadRowError, match=r"row 2: torn\.png: cannot be decoded"):
        softlabel.cache_logits(str(teacher), source, tmp_path / "stop", **settings)
    cache = softlabel.cache_logits(str(teacher), source, tmp_path / "skip", on_bad_row="skip", **settings)
    assert (cache.manifest.bad_rows, len(cache.dataset("train"))) == (3, 3)
    lines = (tmp_path / "skip" / "reports" / "bad-rows.tsv").read_text()
    assert re.search(r"run\.eps: cannot be decoded: no image in a known format", lines)
    assert "image is null" in lines


def test_a_damaged_image_column_is_found(viewed, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.cache.format.contents import check_contents

    path = viewed.root / "data" / "train-00000.parquet"
    table = pq.read_table(path)
    contract = viewed.manifest.contract
    check_contents(table, contract, "here")
    views = table.column("image_view").to_pylist()
    for bad, what in (
        ([1, 2], "0 or 5 numbers"),
        ([0, 0, 0, 4, 0], "width and a height"),
        ([-1, 0, 2, 2, 0], "image_view"),
    ):
        place, column = table.schema.get_field_index("image_view"), pa.array([bad, *views[1:]], pa.list_(pa.int32()))
        changed = table.set_column(place, "image_view", column)
        with pytest.raises(IntegrityError, match=what):
            check_contents(changed, contract, "here")


def test_a_cache_that_refers_to_images(tmp_path, teacher, cache, monkeypatch):
    """The rows equal those of a cache that contains the images.

    Files are found below a directory, and must be those that the teacher read.
    """
    found = pictures(0, 40)
    for image in found["image"]:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / image["path"]).write_bytes(image["bytes"])
    lines = [f"{image['path']},{label}" for image, label in zip(found["image"], found["label"], strict=True)]
    (tmp_path / "files" / "train.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    settings: dict[str, Any] = {"task": TASK, "columns": Columns(text=None, image="file")}
    held = softlabel.cache_logits(str(teacher), tmp_path / "files", tmp_path / "held", **settings)
    refers = softlabel.cache_logits(
        str(teacher), tmp_path / "files", tmp_path / "refers", store_images=False, **settings
    )
    assert sum(s.bytes for s in refers.manifest.shards) < sum(s.bytes for s in held.manifest.shards)
    monkeypatch.setenv("SOFTLABEL_IMAGES", str(tmp_path))
    assert not verify(refers.root).problems
    for one, other in zip(held.dataset("train"), refers.dataset("train"), strict=True):
        assert one.example.image.data == other.example.image.data
        assert one.content_hash == other.content_hash
        assert torch.equal(one.soft.top_logprobs, other.soft.top_logprobs)
    assert str(tmp_path) not in (refers.root / "manifest.json").read_text()
    train(refers, teacher, tmp_path / "student", max_steps=2)
    (tmp_path / "files" / "003.png").write_bytes(found["image"][4]["bytes"])
    with pytest.raises(IntegrityError, match=r"003\.png: differs from the image that the teacher saw"):
        list(refers.dataset("train"))
    monkeypatch.delenv("SOFTLABEL_IMAGES")
    with pytest.raises(CacheError, match="set SOFTLABEL_IMAGES to the directory that holds files"):
        list(refers.dataset("train"))
    with pytest.raises(MisuseError, match="is not a file in the data set's directory"):
        softlabel.cache_logits(str(teacher), rows(), tmp_path / "no", task=TASK, columns=IMAGES, store_images=False)


def refused(error: type[Exception], match: str, **settings: Any) -> Any:
    return pytest.param(error, match, settings, id=match)


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        refused(MisuseError, "name their column with --image-column", columns=Columns()),
        refused(MisuseError, "--views is for images", columns=Columns(), task="sequence-classification", views=VIEWS),
        refused(MisuseError, "--image-column: --task causal-lm reads texts", task="causal-lm"),
        refused(
            MisuseError,
            "--store-text: rows of --task image-classification hold images: see --store-images",
            store_text=True,
        ),
        refused(MisuseError, "--max-length 12: is for texts", max_length=12),
        refused(MisuseError, "--packing is for language models", packing=True),
    ],
)
def test_what_is_refused_before_anything_is_read(tmp_path, teacher, error, match, settings):
    given = {"task": TASK, "columns": IMAGES, **settings}
    with pytest.raises(error, match=re.escape(match)):
        softlabel.cache_logits(str(teacher), rows(), tmp_path / "cache", **given)


def test_an_estimate_counts_the_views_of_train_alone(viewed, teacher):
    from pipeline.capture.estimate.run import estimate
    from pipeline.models import load_model
    from pipeline.sources import from_datasets

    task = get_task(TASK)
    found = estimate(
        task, from_datasets(rows(), IMAGES), load_model(task, str(teacher)),
        tokenization=Tokenization(1, views=VIEWS), batch_tokens=64, positions=10_000,
    )  # fmt: skip
    assert found.positions == sum(shard.positions for shard in viewed.manifest.shards) == 3 * 150 + 60


@pytest.mark.parametrize("given", [{"choice": ("x", "y")}, {"context": "x"}, {"max_length": 9}])
def test_predict_of_images_refuses_what_is_for_texts(tmp_path, teacher, given):
    (tmp_path / "a.png").write_bytes(pictures(0, 1)["image"][0]["bytes"])
    with pytest.raises(MisuseError, match=r"leave (it|out)"):
        list(predict(PredictConfig(model=str(teacher), image=(str(tmp_path / "a.png"),), **given)))


def test_models_that_do_not_fit(tmp_path, cache):
    other = untrained(tmp_path / "size")
    (other / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}})
    )
    with pytest.raises(ModelError, match="does not take the 12 x 12 pixels that its image processor makes"):
        train(cache, other, tmp_path / "one")
    grey = untrained(tmp_path / "grey", num_channels=1)
    with pytest.raises(ModelError, match="expected a model of images with 3 channels, found 1"):
        train(cache, grey, tmp_path / "two")
    five = untrained(tmp_path / "five", num_labels=5)
    with pytest.raises(ContractError, match="expected 3 labels, as the cache has"):
        train(cache, five, tmp_path / "three")
    stages = untrained(tmp_path / "stages", "resnet")
    with pytest.raises(ModelError, match="has stages of several widths"):
        make_student(str(stages), tmp_path / "four", config=Shape(1, 16, 2))


def test_caches_of_images_merge(cache, viewed, tmp_path):
    halves = [filter_rows(cache, tmp_path / name, where=f"source_row % 2 = {i}") for i, name in enumerate("ab")]
    merged = merge([each.root for each in halves], tmp_path / "merged")
    assert len(merged.dataset("train")) == 150
    assert not verify(merged.root).problems
    with pytest.raises(ContractError):
        merge([cache.root, viewed.root], tmp_path / "no")


def test_the_part_that_is_seen():
    rng = np.random.default_rng(0)
    image = decode(encode(pixels("red", rng, 7, 5)))
    found = np.asarray(cut(image, np.array([2, 1, 4, 3, 1])))
    assert np.array_equal(found, np.asarray(image)[1:4, 2:6][:, ::-1])
    assert cut(image, np.zeros(0, dtype=np.int32)) is image


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_run_that_goes_on_and_the_best_weights_are_those_of_the_checkpoint(cache, tmp_path, kind):
    """A ViT is saved under parameter names of older releases, which Trainer cannot read back."""
    from safetensors.torch import load_file

    start = untrained(tmp_path / "start", kind, seed=1)
    settings: dict[str, Any] = {"batch_size": 16, "learning_rate": 3e-3, "eval_split": "test"}
    saving = {"save_steps": 10, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 10}
    train(cache, start, tmp_path / "whole", max_steps=40, training=saving, **settings)
    train(cache, start, tmp_path / "parts", max_steps=40, training=saving, **settings)
    for path in ("config.json", "model.safetensors", "distillation.json"):
        (tmp_path / "parts" / path).unlink()
    for step in (30, 40):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}", ignore_errors=True)
    train(cache, start, tmp_path / "parts", max_steps=40, training=saving, resume=True, **settings)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    best = {**saving, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    result = train(
        cache,
        start,
        tmp_path / "best",
        max_steps=40,
        training={**best, "learning_rate": 0.05},
        batch_size=16,
        eval_split="test",
    )
    from pipeline.evaluation.run import evaluate as measured

    state = json.loads((tmp_path / "best" / "trainer_state.json").read_text())
    lowest = min(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
    assert result.metrics["loss"] == pytest.approx(lowest, abs=1e-5)
    assert measured(cache, {"best": tmp_path / "best"}, split="test").students


def test_a_checkpoint_under_other_names_is_refused(cache, tmp_path):
    start = untrained(tmp_path / "start", seed=1)
    settings: dict[str, Any] = {
        "batch_size": 16,
        "max_steps": 20,
        "training": {"save_steps": 10, "save_strategy": "steps"},
    }
    train(cache, start, tmp_path / "student", **settings)
    for path in ("config.json", "model.safetensors", "distillation.json"):
        (tmp_path / "student" / path).unlink()
    shutil.rmtree(tmp_path / "student" / "checkpoint-20")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "student" / "checkpoint-10")  # as saved by earlier releases
    with pytest.raises(TrainingError, match="the checkpoint lacks 32 weights of the model"):
        train(cache, start, tmp_path / "student", resume=True, **settings)


def test_half_precision(tmp_path, cache):
    """Pixels are cast to the model's precision, during capture and afterwards."""
    for kind in ("vit", "resnet"):
        path = untrained(
            tmp_path / kind, kind, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
        )
        AutoModelForImageClassification.from_pretrained(path).to(torch.bfloat16).save_pretrained(path)
        found = softlabel.cache_logits(str(path), rows()["test"], tmp_path / f"{kind}-cache", task=TASK, columns=IMAGES)
        assert found.manifest.contract.teacher.dtype == "bfloat16"


def test_a_configuration_of_ones_own(tmp_path):
    from transformers import ResNetConfig

    teacher = untrained(tmp_path / "teacher", "resnet")
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        architectures=["ResNetForImageClassification"],
    )
    made = make_student(str(teacher), tmp_path / "student", config=config)
    assert made.num_parameters < made.teacher_parameters


def test_images_that_are_none_are_refused_by_write_cache(tmp_path, teacher):
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    settings: dict[str, Any] = {
        "task": TASK,
        "tokenizer": processor,
        "encoding": Full(),
        "teacher": "x",
        "label_names": NAMES,
    }
    for image in ("a.png", b"junk", None):
        with pytest.raises((BadRowError, MisuseError), match="image"):
            write_cache([LabelledRow(image=image, logits=torch.randn(1, 3))], tmp_path / "cache", **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image_column": "image"}, r"unknown setting; did you mean columns=Columns\(image=\.\.\.\)"),
        ({"store_image": True}, "did you mean store_images"), ({"views": 0}, "--views: expected at least 1"),
        ({"views": Views}, "views"),
    ],
)  # fmt: skip
def test_settings_in_python(tmp_path, teacher, settings, match):
    if settings.get("views") is Views:
        with pytest.raises(MisuseError, match="--view-area"):
            Views(2, smallest=3.0)
        return
    with pytest.raises(MisuseError, match=match):
        softlabel.cache_logits(str(teacher), rows(), tmp_path / "cache", task=TASK, columns=IMAGES, **settings)
