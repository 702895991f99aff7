from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config import (
    STAGES,
    CacheLogitsConfig,
    ConfigFile,
    DataConfig,
    EvaluateConfig,
    InitStudentConfig,
    TrainStudentConfig,
    load_config,
    make_encoding,
    resolve,
)
from pipeline.config.file import PATHS
from pipeline.errors import ConfigError, MisuseError
from pipeline.records import Columns, Full, Loss, Sampled, Tokenization, TopK, TopP

CAPTURE: dict[str, Any] = {"task": "causal-lm", "teacher": "t", "output": "o", "dataset": "d"}
STUDENT: dict[str, Any] = {"cache": "c", "student": "s", "output": "o"}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> ConfigFile:
    return load_config(write(folder, text))


def capture(**flags: Any) -> CacheLogitsConfig:
    return resolve(CacheLogitsConfig, None, {}, CAPTURE | flags)


def student(**flags: Any) -> TrainStudentConfig:
    return resolve(TrainStudentConfig, None, {}, STUDENT | flags)


# ----------------------------------------------------------------------------------------- the file


def test_a_file_is_split_into_its_shared_part_and_its_sections(tmp_path: Path) -> None:
    file = load(
        tmp_path, "task: causal-lm\ndata: {dataset: d, text-column: body}\ncache-logits: {top-k: 8}\nevaluate:\n"
    )
    assert file.path == str(tmp_path / "run.yaml")
    assert file.shared == {"task": "causal-lm", "data": {"dataset": "d", "text_column": "body"}}
    assert file.sections == {"cache-logits": ({"top_k": 8},), "evaluate": ({},)}


def test_dashes_and_underscores_are_the_same_in_a_section(tmp_path: Path) -> None:
    dashes = load(tmp_path, "train-student: {batch-size: 4}").sections
    assert load(tmp_path, "train-student: {batch_size: 4}").sections == dashes


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("generate: {model: a}\ntask: causal-lm\ngenerate: {model: b}\n", "generate", (1, 3)),
        ("train-student:\n  cache: c\n  epochs: 1\n  epochs: 2\n", "epochs", (3, 4)),
        ("train-student:\n- cache: c\n  training:\n    optim: a\n    optim: b\n", "optim", (4, 5)),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, key: str, lines: tuple[int, int]) -> None:
    """YAML itself keeps the last one, so that a whole section would be lost silently."""
    with pytest.raises(
        ConfigError, match=rf"run.yaml: {key}: is given in line {lines[0]} and again in line {lines[1]},"
    ):
        load(tmp_path, text)


def test_aliases_and_merged_keys_are_no_key_given_twice(tmp_path: Path) -> None:
    text = (
        "evaluate: &one {cache: c, split: a}\nreport: {<<: *one, split: b}\ntrain-student: {training: &t {optim: *t}}\n"
    )
    assert load(tmp_path, text).sections["report"][0]["split"] == "b"


def test_a_list_of_sections_is_several_students(tmp_path: Path) -> None:
    file = load(tmp_path, "train-student:\n- {cache: c, student: s, output: a}\n- {cache: c, student: s, output: b}\n")
    runs = [resolve(TrainStudentConfig, file, section, {}) for section in file.sections["train-student"]]
    assert [run.output for run in runs] == ["a", "b"]


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    text = "data: {dataset: d, split: train}\ncache-logits: {task: causal-lm, teacher: t, output: o, temperature: 2}\n"
    file = load(tmp_path, text)
    found = resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], {})
    assert (found.data.split, found.temperature) == (("train",), (2.0,))


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    file = load(tmp_path, "train-student: {cache: c, student: s, output: o, learning-rate: 1e-4}")  # YAML 1.1: a string
    assert resolve(TrainStudentConfig, file, file.sections["train-student"][0], {}).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("cache_logits: {}", "cache_logits", "cache-logits"),
        ("tasks: causal-lm", "tasks", "task"),
        ("train-student: {learning-rat: 1}", "learning.rat", "learning.rate"),
        ("train-student:\n- {}\n- {learning-rat: 1}", "learning.rat", "learning.rate"),
        ("data: {datasets: d}", "datasets", "dataset"),
        ("cache-logits: {data: {hold-out: 0.1}}", "hold.out", "holdout"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, unknown: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml.*'{unknown}'.*'{nearest}'"):
        load(tmp_path, text)


@pytest.mark.parametrize(("text", "known"), [("zzz: 1", "train-student"), ("evaluate: {zzz: 1}", "batch.size")])
def test_an_unknown_key_near_nothing_lists_the_known_ones(tmp_path: Path, text: str, known: str) -> None:
    with pytest.raises(ConfigError, match=f"zzz.*{known}"):
        load(tmp_path, text)


def test_a_stage_without_data_has_no_data_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init-student.*'data'"):
        load(tmp_path, "init-student: {data: {dataset: d}}")


@pytest.mark.parametrize(
    "text", ["", "just words", "- task", "data: [", "task: \x00", "data: d", "evaluate: 3", "evaluate: [3]"]
)
def test_what_is_not_a_mapping_of_sections_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"task: \xff\xfe")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


# --------------------------------------------------------------------------------------- precedence


def test_flag_before_section_before_shared_before_default(tmp_path: Path) -> None:
    shared = "task: causal-lm\ndata: {dataset: shared, holdout: 0.1, text-column: shared, max-length: 64}\n"
    section = "cache-logits: {teacher: section, output: section, seed: 1, data: {holdout: 0.2, text-column: section}}\n"
    file = load(tmp_path, shared + section)
    flags = {"output": "flag", "text_column": "flag", "split": ("test",)}
    found = resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], flags)
    assert (found.task, found.teacher, found.output, found.seed) == ("causal-lm", "section", "flag", 1)
    assert found.data == DataConfig(dataset="shared", holdout=0.2, text_column="flag", max_length=64, split=("test",))
    assert found.batch_tokens == CacheLogitsConfig.__dataclass_fields__["batch_tokens"].default


def test_section_and_flag_override_the_shared_task(tmp_path: Path) -> None:
    file = load(tmp_path, "task: causal-lm\ncache-logits: {task: sequence-classification}")
    section = file.sections["cache-logits"][0]
    flags = {k: v for k, v in CAPTURE.items() if k != "task"}
    assert resolve(CacheLogitsConfig, file, section, flags).task == "sequence-classification"
    assert resolve(CacheLogitsConfig, file, section, flags | {"task": "causal-lm"}).task == "causal-lm"


def test_the_shared_part_goes_only_where_it_is_known(tmp_path: Path) -> None:
    file = load(tmp_path, "task: causal-lm\ndata: {dataset: d, split: test}")
    assert resolve(TrainStudentConfig, file, {}, STUDENT).split == ("train",)


def test_resolving_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = load(tmp_path, "data: {dataset: d}\ncache-logits: {data: {holdout: 0.2}}")
    resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], CAPTURE | {"dataset": "flag", "holdout": 0.3})
    assert file == load(tmp_path, "data: {dataset: d}\ncache-logits: {data: {holdout: 0.2}}")


# ----------------------------------------------------------------------------------- invalid values


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"task": "translation"}, "task.*translation"),
        ({"teacher": 3}, "teacher.*3"),
        ({"seed": "many"}, "seed.*many"),
        ({"seed": 1.5}, "seed.*1.5"),
        ({"overwrite": "perhaps"}, "overwrite.*perhaps"),
        ({"encoding": "bottom-k"}, "encoding.*bottom-k"),
        ({"temperature": ("warm",)}, "temperature.*warm"),
        ({"holdout": "some"}, "holdout.*some"),
        ({"dataset": None}, "dataset.*None"),
    ],
)
def test_a_value_of_another_type_is_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        capture(**flags)
    assert "\n" not in str(caught.value)


def test_a_value_of_another_type_names_its_file(tmp_path: Path) -> None:
    file = load(tmp_path, "evaluate: {cache: c, student: s, batch-size: big}")
    with pytest.raises(ConfigError, match=r"run\.yaml: evaluate: batch.size.*big"):
        resolve(EvaluateConfig, file, file.sections["evaluate"][0], {})


@pytest.mark.parametrize("name", ["task", "teacher", "output", "dataset"])
def test_a_missing_option_is_named_by_its_flag(name: str) -> None:
    with pytest.raises(MisuseError, match=f"--{name}"):
        resolve(CacheLogitsConfig, None, {}, {k: v for k, v in CAPTURE.items() if k != name})


def test_all_missing_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"run\.yaml.*--cache.*--student.*--output"):
        resolve(TrainStudentConfig, load(tmp_path, "train-student:\n"), {}, {})


@pytest.mark.parametrize("kind", STAGES.values())
def test_each_stage_says_what_it_misses(kind: type) -> None:
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name != "data" and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    with pytest.raises(MisuseError) as caught:
        resolve(kind, None, {}, {})
    assert re.findall(r"--[a-z-]+(?=,|;)", str(caught.value)) == [f"--{name.replace('_', '-')}" for name in required]


# ----------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"holdout": 1.0}, "--holdout"),
        ({"holdout": -0.1}, "--holdout"),
        ({"holdout": float("nan")}, "--holdout"),
        ({"max_length": 1}, "--max-length"),
        ({"prompt_column": "p"}, "--completion-column"),
        ({"completion_column": "c"}, "--prompt-column"),
        ({"labels_column": "l"}, "--input-ids-column"),
        ({"isolate_documents": True}, "--packing"),
        ({"messages_column": "m", "input_ids_column": "i"}, "m, i"),
        ({"messages_column": "m", "prompt_column": "p", "completion_column": "c"}, "m, p"),
        ({"rows_per_shard": 0}, "--rows-per-shard"),
        ({"batch_tokens": 0}, "--batch-tokens"),
        # a setting of another encoding
        ({"encoding": "full", "top_k": 4}, "--top-k"),
        ({"encoding": "full", "top_p": 0.9}, "--top-p"),
        ({"encoding": "full", "sample_size": 9.0}, "--sample-size"),
        ({"encoding": "full", "temperature": (2.0,)}, "--temperature"),
        ({"encoding": "top-k", "top_k": 4, "top_p": 0.9}, "--top-p"),
        ({"encoding": "top-k", "top_k": 4, "sample_size": 9.0}, "--sample-size"),
        ({"encoding": "top-p", "top_p": 0.9, "top_k": 4}, "--top-k"),
        ({"encoding": "top-p", "top_p": 0.9, "sample_size": 9.0}, "--sample-size"),
        ({"encoding": "sampled", "top_k": 4}, "--top-k"),
        ({"encoding": "sampled", "top_p": 0.9}, "--top-p"),
        ({"top_k": 4, "sample_size": 9.0}, "--sample-size"),
        # a missing or invalid setting
        ({"encoding": "top-k"}, "--top-k"),
        ({"top_k": 0}, "--top-k"),
        ({"encoding": "top-p"}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"sample_size": 0.5}, "--sample-size"),
        ({"sample_size": 9.0, "temperature": (1.0, 2.0)}, "--temperature"),
        ({"top_k": 4, "temperature": (1.0, 0.0)}, "--temperature"),
    ],
)
def test_capture_refuses_contradictions(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(MisuseError, match=named):
        capture(**flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"hard_weight": -1.0}, "--hard-weight"),
        ({"soft_weight": -1.0}, "--soft-weight"),
        ({"hard_weight": 0.0, "soft_weight": 0.0}, "--soft-weight"),
        ({"temperature": 0.0}, "--temperature"),
        ({"lora_alpha": 16}, "--lora-r"),
        ({"lora_target": ("q_proj",)}, "--lora-r"),
    ],
)
def test_training_refuses_contradictions(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(MisuseError, match=named):
        student(**flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_layers": 2, "hidden_size": 8}, "--num-heads"),
        ({"layer": (0,), "num_layers": 2}, "--layer"),
        ({"layer": (0,), "hidden_size": 8}, "--layer"),
        ({"layer": (0,), "num_heads": 2}, "--layer"),
    ],
)
def test_a_new_student_is_layers_or_a_shape(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(MisuseError, match=named):
        resolve(InitStudentConfig, None, {}, {"teacher": "t", "output": "o"} | flags)


def test_a_new_student_of_either_kind() -> None:
    base = {"teacher": "t", "output": "o"}
    assert resolve(InitStudentConfig, None, {}, base | {"layer": (0, 3)}).layer == (0, 3)
    shape = {"num_layers": 2, "hidden_size": 8, "num_heads": 2}
    assert resolve(InitStudentConfig, None, {}, base | shape).num_heads == 2


@pytest.mark.parametrize(
    ("flags", "named"), [({"student": ()}, "--student"), ({"student": ("s",), "batch_size": 0}, "--batch-size")]
)
def test_evaluation_refuses_contradictions(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(MisuseError, match=named):
        resolve(EvaluateConfig, None, {}, {"cache": "c"} | flags)


# --------------------------------------------------------------------- meaning of the configuration


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("full", None, None, None, ()), Full()),
        (("top-k", 8, None, None, ()), TopK(8, (1.0, 2.0, 4.0))),
        (("top-k", 8, None, None, (4.0, 1.0, 4.0)), TopK(8, (1.0, 4.0))),
        (("top-p", None, 1.0, None, (3.0,)), TopP(1.0, (3.0,))),
        (("sampled", None, None, None, ()), Sampled()),
        (("sampled", None, None, 50.0, (2.0,)), Sampled(50.0, 2.0)),
    ],
)
def test_make_encoding(arguments: tuple[Any, ...], expected: object) -> None:
    assert make_encoding(*arguments) == expected


@pytest.mark.parametrize(
    ("flags", "default_kind", "expected"),
    [
        ({}, "full", Full()),
        ({}, "sampled", Sampled()),
        ({"encoding": "full"}, "sampled", Full()),
        ({"top_k": 4}, "sampled", TopK(4)),
        ({"top_p": 0.9}, "full", TopP(0.9)),
        ({"sample_size": 9.0, "temperature": (2.0,)}, "full", Sampled(9.0, 2.0)),
        ({"temperature": (2.0,)}, "sampled", Sampled(temperature=2.0)),
    ],
)
def test_a_knob_names_its_encoding(flags: dict[str, Any], default_kind: str, expected: object) -> None:
    assert capture(**flags).resolve_encoding(default_kind) == expected


def test_the_loss_is_what_the_flags_say() -> None:
    found = student(hard_weight=0.0, soft_weight=2.0, temperature=3.0, tail_policy="ignore").loss_over(Loss())
    assert found == Loss(hard_weight=0.0, soft_weight=2.0, temperature=3.0, tail="ignore")


def test_what_the_flags_leave_out_of_the_loss_is_chosen() -> None:
    chosen = Loss(0.1, 0.9, 2.0)
    assert student().loss_over(chosen) == chosen
    assert student(soft_weight=0.0).loss_over(chosen) == Loss(0.1, 0.0, 2.0)
    assert student(divergence="reverse-kl").loss_over(chosen) == Loss(0.1, 0.9, None, "reverse-kl")
    assert student(temperature=4.0).loss_over(chosen) == Loss(0.1, 0.9, 4.0)


def test_text_is_a_column_only_where_nothing_else_is_the_input() -> None:
    assert DataConfig(dataset="d", keep_column=("id",)).columns == Columns(keep=("id",))
    assert DataConfig(dataset="d", messages_column="m").columns == Columns(text=None, messages="m")
    pair = DataConfig(dataset="d", prompt_column="p", completion_column="c").columns
    assert pair == Columns(text=None, prompt="p", completion="c")
    tokens = DataConfig(dataset="d", input_ids_column="i", labels_column="l").columns
    assert tokens == Columns(text=None, input_ids="i", labels="l")


def test_tokenization_is_what_the_flags_say() -> None:
    found = DataConfig(dataset="d", packing=True, isolate_documents=True).tokenization(128)
    assert found == Tokenization(max_length=128, packing=True, isolate_documents=True)


def test_flags_are_the_fields_of_the_command_and_of_its_data() -> None:
    names = [f.name for f in config.cli_fields(CacheLogitsConfig)]
    assert {"dataset", "holdout", "teacher", "top_k"} <= set(names)
    assert "data" not in names
    assert len(names) == len(set(names))
    assert "training" not in [f.name for f in config.cli_fields(TrainStudentConfig)]


@pytest.mark.parametrize("kind", [*STAGES.values(), config.VerifyConfig, config.InspectConfig, DataConfig])
def test_every_option_has_its_help(kind: type) -> None:
    assert all(f.metadata["help"] for f in dataclasses.fields(kind) if f.name != "data")


def test_a_label_map_is_a_list_or_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    for text in ("label-map: ['3=sport', '-1=none']", "label_map: {3: sport, -1: none}"):
        path.write_text(f"task: sequence-classification\ndata: {{dataset: d, {text}}}\n")
        file = load_config(path)
        flags = {"teacher": "t", "output": "o"}
        assert resolve(CacheLogitsConfig, file, {}, flags).data.label_map == ("3=sport", "-1=none")
        assert resolve(CacheLogitsConfig, file, {}, {**flags, "label_map": ("1=a",)}).data.label_map == ("1=a",)
    for wrong in ("sport", "=sport", "3= "):
        with pytest.raises(MisuseError, match="--label-map: expected DATA=MODEL, found"):
            DataConfig(dataset="d", label_map=(wrong,))


def test_data_files_are_a_list_or_a_mapping(tmp_path: Path) -> None:
    for text in ("[train=a.csv, train=b.csv, test=c.csv]", "{train: [a.csv, b.csv], test: c.csv}"):
        file = load(tmp_path, f"data: {{dataset: ., data_files: {text}}}")
        found = resolve(CacheLogitsConfig, file, {}, {"task": "causal-lm", "teacher": "t", "output": "o"}).data
        assert found.data_files == ("train=a.csv", "train=b.csv", "test=c.csv")


# --------------------------------------------------------------------------------- home directories


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_each_option_that_may_be_a_path_has_its_home_made_whole() -> None:
    speaks = re.compile(r"[Dd]irectory|[Nn]ame or path|\b[Ff]ile\b|URL")
    named = {
        field.name
        for section in {*config.SECTIONS.values(), DataConfig}
        for field in dataclasses.fields(section)
        if speaks.search(field.metadata.get("help", "")) and field.type not in ("bool", "int", "int | None")
    }
    assert named - PATHS == {"cache_bytes"}


def test_homes_in_flags(home: str) -> None:
    found = resolve(
        TrainStudentConfig, None, {}, {"cache": ("~/a", "hf://datasets/o/n"), "student": "org/name", "output": "~"}
    )
    assert (found.cache, found.student, found.output) == ((f"{home}/a", "hf://datasets/o/n"), "org/name", home)
    named = resolve(EvaluateConfig, None, {}, {"cache": "~/a", "student": ("x=~/b", "~/c", "org/d=~e")})
    assert named.student == (f"x={home}/b", f"{home}/c", "org/d=~e")


def test_homes_in_a_file(home: str, tmp_path: Path) -> None:
    text = (
        "task: causal-lm\ndata: {dataset: ~/d, data-files: [train=~/d/*.txt], chat-template: ~/t, text-column: ~x}\n"
        "cache-logits: {teacher: ~/m, base-model: ~/b, output: ~/o}\n"
        "train-student: {cache: ~/o, student: ~/m, output: ~/s, cache-dir: ~/k, training: {deepspeed: ~/z.json, seed: 1}}\n"
    )
    load(tmp_path, text)
    file = load_config("~/run.yaml")
    captured = resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], {})
    assert (captured.teacher, captured.base_model, captured.output) == (f"{home}/m", f"{home}/b", f"{home}/o")
    data = captured.data
    assert (data.dataset, data.data_files, data.chat_template) == (f"{home}/d", (f"train={home}/d/*.txt",), f"{home}/t")
    assert data.text_column == "~x"
    trained = resolve(TrainStudentConfig, file, file.sections["train-student"][0], {})
    assert (trained.cache, trained.cache_dir) == ((f"{home}/o",), f"{home}/k")
    assert trained.training == {"deepspeed": f"{home}/z.json", "seed": 1}


def test_a_text_is_no_path(home: str) -> None:
    found = resolve(EvaluateConfig, None, {}, {"cache": "c", "student": ("s",), "prompt": ("~ is a tilde", "~/a")})
    assert found.prompt == ("~ is a tilde", "~/a")
