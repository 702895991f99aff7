"""Loading and fingerprints of models, students built from teachers, fine-tuned teachers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import pipeline as softlabel
from pipeline.config import InitStudentConfig
from pipeline.cross_tokenizer.students import run
from pipeline.errors import MisuseError, ModelError
from pipeline.models import load_model, longest_input, model_info, public_name, tokenizer_info
from pipeline.models.initialize import evenly_spaced
from pipeline.models.load import LoadedModel
from pipeline.tasks import get_task
from tests.conftest import TINY, tiny_model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2", "cohere", "opt", "gpt_neox", "mixtral"])
def test_chosen_layers_are_the_teachers(tmp_path, lm_tokenizer, kind):
    teacher = tiny_model(kind, len(lm_tokenizer), seed=3)
    last = teacher.config.num_hidden_layers - 1
    path = softlabel.init_student(teacher, tmp_path / "s", layers=[last], tokenizer=lm_tokenizer)
    student = AutoModelForCausalLM.from_pretrained(path)
    assert student.config.num_hidden_layers == 1
    ids = torch.randint(2, 300, (2, 9))
    kept = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        source = name.replace(".0.", f".{last}.", 1) if ".0." in name else name
        assert torch.equal(tensor, kept[source]), name
    assert torch.isfinite(student(input_ids=ids).logits).all()


@pytest.mark.parametrize("kind", sorted(TINY))
def test_a_smaller_shape_of_every_architecture(tmp_path, lm_tokenizer, kind):
    classifier = kind in ("bert", "roberta", "distilbert", "modernbert", "deberta-v2")
    teacher = tiny_model(kind, len(lm_tokenizer), num_labels=3 if classifier else None)
    teacher.config.architectures = [type(teacher).__name__]
    path = softlabel.init_student(
        teacher, tmp_path / "s", config=softlabel.Shape(1, 16, 2), tokenizer=lm_tokenizer, seed=1
    )
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    student = auto.from_pretrained(path)
    assert type(student) is type(teacher)
    assert student.config.hidden_size == 16
    assert student.num_parameters() < teacher.num_parameters()
    logits = student(input_ids=torch.randint(2, 300, (2, 9))).logits
    assert logits.shape[-1] == (3 if classifier else len(lm_tokenizer))
    again = softlabel.init_student(
        teacher, tmp_path / "t", config=softlabel.Shape(1, 16, 2), tokenizer=lm_tokenizer, seed=1
    )
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_init_student_refuses_what_cannot_be(tmp_path, lm_tokenizer, save_teacher):
    teacher = tiny_model("llama", len(lm_tokenizer))
    teacher.config.architectures = [type(teacher).__name__]
    with pytest.raises(MisuseError, match="layers 0 to 3"):
        softlabel.init_student(teacher, tmp_path / "s", layers=[4], tokenizer=lm_tokenizer)
    with pytest.raises(MisuseError, match="--hidden-size 30: expected a multiple"):
        softlabel.init_student(teacher, tmp_path / "s", config=softlabel.Shape(1, 30, 4), tokenizer=lm_tokenizer)
    with pytest.raises(MisuseError, match="either layers"):
        softlabel.init_student(
            teacher, tmp_path / "s", layers=[0], config=softlabel.Shape(1, 32, 2), tokenizer=lm_tokenizer
        )
    with pytest.raises(ModelError, match="no such directory"):
        softlabel.init_student("./not/here", tmp_path / "s", layers=[0])
    own = save_teacher(teacher, lm_tokenizer, "own")
    with pytest.raises(MisuseError, match="the teacher's own directory"):
        softlabel.init_student(own, own, layers=[0])
    assert not (tmp_path / "s").exists()


def test_fingerprints_are_of_content(tmp_path, lm_tokenizer, save_teacher):
    model = tiny_model("llama", len(lm_tokenizer))
    one, other = save_teacher(model, lm_tokenizer, "one"), save_teacher(model, lm_tokenizer, "other")
    task = get_task("causal-lm")
    infos = [model_info(load_model(task, str(path))) for path in (one, other)]
    assert infos[0].weights_sha256 == infos[1].weights_sha256
    assert infos[0].dtype == "float32"
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert model_info(LoadedModel(model, lm_tokenizer, "x")).weights_sha256 != infos[0].weights_sha256


def test_tokenizer_fingerprints_survive_saving_and_see_every_change(tmp_path, bert_tokenizer, lm_tokenizer):
    for tokenizer in (bert_tokenizer, lm_tokenizer):
        before = tokenizer_info(tokenizer)
        tokenizer("the cat", truncation=True, max_length=5, padding="max_length")  # must not matter
        tokenizer.save_pretrained(tmp_path / "t")
        again = AutoTokenizer.from_pretrained(tmp_path / "t")
        assert tokenizer_info(again) == before
        again.add_tokens(["zebra"])
        assert tokenizer_info(again).sha256 != before.sha256
        other = AutoTokenizer.from_pretrained(tmp_path / "t")
        other.chat_template = "{{ messages }}"
        assert tokenizer_info(other).sha256 == before.sha256
        assert tokenizer_info(other).chat_template_sha256 != before.chat_template_sha256


def test_public_names_hold_no_place_of_one_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("org/name") == "org/name"
    assert public_name("runs/teacher") == "runs/teacher"
    assert public_name(str(tmp_path / "runs" / "teacher")) == "runs/teacher"
    assert public_name("/somewhere/else/teacher") == "teacher"


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_the_longest_row_is_what_the_model_has_positions_for(kind, bert_tokenizer):
    model = tiny_model(kind, 150, num_labels=2, max_position_embeddings=40)
    length = longest_input(model, bert_tokenizer)
    assert length == (39 if kind == "roberta" else 40)
    model(input_ids=torch.full((1, length), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 7))


@pytest.mark.parametrize("dtype", ["float64x", "int8", "nonsense"])
def test_unknown_dtypes(tmp_path, lm_tokenizer, save_teacher, dtype):
    path = save_teacher(tiny_model("gpt2", len(lm_tokenizer)), lm_tokenizer)
    with pytest.raises(MisuseError, match="--dtype"):
        load_model(get_task("causal-lm"), str(path), dtype=dtype)


def test_bf16_teachers_give_what_bf16_gives(tmp_path, lm_tokenizer, documents, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=3.0).bfloat16(), lm_tokenizer)
    cache = softlabel.cache_logits(
        str(path), documents["test"], tmp_path / "c", task="causal-lm", max_length=32, encoding=softlabel.TopK(5)
    )
    assert cache.manifest.contract.teacher.dtype == "bfloat16"


def test_without_a_shape_evenly_spaced_layers_are_copied(tmp_path, lm_tokenizer, save_teacher):
    assert [evenly_spaced(n) for n in (1, 3, 4, 6, 12)] == [(0,), (0,), (0,), (0, 5), (0, 4, 7, 11)]
    teacher = tiny_model("llama", len(lm_tokenizer), num_hidden_layers=6)
    made = run(InitStudentConfig(teacher=str(save_teacher(teacher, lm_tokenizer)), output=str(tmp_path / "s")))
    assert (made.layers, made.num_layers, made.teacher_layers) == ((0, 5), 2, 6)
    assert (made.num_parameters, made.teacher_parameters) == (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(made.path).parameters()),
        sum(p.numel() for p in teacher.parameters()),
    )
    kept = AutoModelForCausalLM.from_pretrained(made.path).state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(kept, teacher.state_dict()["model.layers.5.mlp.up_proj.weight"])
    shaped = InitStudentConfig(
        teacher=str(tmp_path / "teacher"), output=str(tmp_path / "r"), num_layers=1, hidden_size=16, num_heads=2
    )
    made = run(shaped)
    assert (made.layers, made.teacher_parameters) == ((), sum(p.numel() for p in teacher.parameters()))
    with pytest.raises(MisuseError, match="go together; without them evenly spaced layers"):
        InitStudentConfig(teacher="t", output="o", num_layers=1)


def test_an_unfinished_training_is_no_model_and_a_hub_that_is_not_asked_has_none(tmp_path, monkeypatch):
    (tmp_path / "student" / "checkpoint-5").mkdir(parents=True)
    task = get_task("sequence-classification")
    with pytest.raises(ModelError, match=r"; its training is not finished: run the command that trains it again$"):
        load_model(task, str(tmp_path / "student"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"did you mean student\?; the hub was not asked \(HF_HUB_OFFLINE\), expected a model"
    ):
        load_model(task, "studnt")
