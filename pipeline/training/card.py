"""Write the model card (README.md) of a trained student.

The card states what the student was made from, how accurate it is and how to use it. It is written
once, at the end of training, from the cache's manifest, the training settings and the student's
metrics.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from pipeline.cache import Cache
from pipeline.cache.views.provenance import rows_text
from pipeline.models import LoadedModel, public_name
from pipeline.models.processors import image_size
from pipeline.records import DIVERGENCE_KINDS, Encoding, Loss, ModelInfo, SourceInfo, TrainResult
from pipeline.tasks import Task, get_task
from pipeline.training.scores import DIVERGENCES
from pipeline.training.spans import span_temperature

CARD = "README.md"

_BODY = """
# {title}

{origin}

| | |
|---|---|
| task | {task} |
| labels | {labels} |
{tokenizer}| parameters | {parameters} |
| teacher | {teacher} |
| data set | `{source}`, {split}: {rows:,} {what_rows} |
| cache_id | `{cache_id}` |
| encoding of the cache | {encoding} |
| initial weights | `{start}` |
| loss | {loss} |
| training | {steps:,} steps, learning rate {learning_rate:g}, seed {seed} |

## Evaluation

{metrics}
## Use

{usage}
{limit}

## Intended use and limits

Use it for the task and the kind of {reads} of its teacher, where the teacher is too slow or too large. {repeats}It was not evaluated on {reads} of another kind{or_language} than the data set's, and its safety was not evaluated.

## Licences

Its use is subject to the licences of everything that it was made from:

| what | licence |
|---|---|
{licences}
"""

_ADAPTER = """It is a PEFT adapter. Its base model must be available under the name in `adapter_config.json`:

    softlabel predict --model {folder} --text "a text" --max-length {max_length}
"""

_ORIGIN = {
    "soft": "A student of `{teacher}`, trained by soft-label-pipeline from a cache of the teacher's soft labels; the teacher itself was not loaded.",
    "hard": "A student of `{teacher}`, trained by soft-label-pipeline on the teacher's most likely classes, taken from a cache of its soft labels.",
    "none": "A control beside students of `{teacher}`, trained by soft-label-pipeline on the hard labels of a cache only: it has nothing from the teacher but its initial weights.",
}
_REPEATS = "It was trained to imitate its teacher,\nmistakes and biases included, and is in general less accurate. "

_LONGER = (
    "Texts of more than {max_length} tokens are longer than any training text: {cut}, or do not rely on the result."
)
_UNKNOWN = "unknown: {where} names none; ask before you share or sell it"


def make_card(
    cache: Cache, student: LoadedModel, result: TrainResult, *, splits: Sequence[str], teacher_labels: bool
) -> str:
    """Return the text of the card, with the YAML front matter first.

    The card contains no path of this machine: of a name that is not a hub name, only the last part
    of the path is shown.

    Args:
        student: the finished student; its name is the name of the model that it started from.
        splits: the splits that it was trained on.
        teacher_labels: whether the hard labels were the teacher's.
    """
    contract = cache.manifest.contract
    teacher, source, start = _teacher(contract.teacher), _source(contract.source), _start(student)
    adapter = hasattr(student.model, "peft_config")
    folder = Path(result.output).resolve().name
    model = student.model.get_base_model() if adapter else student.model  # type: ignore[operator]
    task = get_task(contract.task)
    tag = task.hub_category if task.ranks else _pipeline_tag(type(model).__name__)
    soft = result.loss.soft_weight or result.loss.soft_weight_end or result.loss.span_weight
    learnt = "soft" if soft else "hard" if teacher_labels else "none"
    cache_licence, start_licence = licence_of(cache.root), licence_of(Path(student.name))
    parents = [name for name, on_hub in (start, teacher) if on_hub]
    data = ModelCardData(
        base_model=parents[0] if parents else None,
        datasets=[source[0]] if source[1] else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=tag,
        tags=["soft-labels", "knowledge-distillation", "soft-label-pipeline"],
        teacher=teacher[0],
        cache_id=result.cache_id,
    )
    template = _ADAPTER if adapter else task.usage
    of_images, cut = task.reads == "images", "cut them, as above" if "{max_length}" in template else "split them"
    licences = {
        f"the teacher, `{teacher[0]}`": _UNKNOWN.format(where="the cache's manifest"),
        f"the data set, `{source[0]}`": _UNKNOWN.format(where="the cache's manifest"),
        "the cache": cache_licence or _UNKNOWN.format(where="its card"),
        f"the initial model, `{start[0]}`": start_licence or _UNKNOWN.format(where="its card"),
    }
    body = _BODY.format(
        title=folder,
        origin=_ORIGIN[learnt].format(teacher=teacher[0]),
        repeats="" if learnt == "none" else _REPEATS,
        teacher=f"`{teacher[0]}` ({_of_teacher(contract.teacher)})",
        task=contract.task,
        labels="the tokens of its vocabulary" if contract.label_names is None else _labels(contract.label_names),
        tokenizer=_tokenizer(result),
        parameters=f"{result.num_parameters:,}"
        + (
            "" if result.num_trainable == result.num_parameters else f", of which {result.num_trainable:,} were trained"
        ),
        source=source[0],
        split=f"split{'s' * (len(splits) > 1)} " + " and ".join(f"`{split}`" for split in splits),
        rows=sum(shard.rows for split in splits for shard in cache.manifest.split_shards(split)),
        reads="images" if of_images else "texts",
        or_language="" if of_images else " or language",
        what_rows=rows_text(contract) if of_images else f"rows of at most {result.max_length} tokens",
        limit=_pixels(student) if of_images else _LONGER.format(max_length=result.max_length, cut=cut),
        cache_id=result.cache_id,
        encoding=_encoding(contract.encoding),
        start=start[0],
        loss=describe_loss(result.loss, teacher_labels=teacher_labels),
        steps=result.steps,
        learning_rate=result.learning_rate,
        seed=result.seed,
        metrics=_metrics(result, task),
        usage=template.format(tag=tag, folder=folder, max_length=result.max_length),
        licences="\n".join(f"| {what} | {licence} |" for what, licence in licences.items()),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _pixels(student: LoadedModel) -> str:
    """Return a sentence about the size of the images that the student reads."""
    size = image_size(student.tokenizer)
    if size is None:
        return "Its image processor, `preprocessor_config.json`, converts images to pixel values."
    return f"Its image processor, `preprocessor_config.json`, converts images to {size[0]} x {size[1]} pixels."


def _tokenizer(result: TrainResult) -> str:
    """Return a table row about the tokenizer; empty if the student uses the teacher's."""
    own = result.own_tokenizer
    if own is None:
        return ""
    loss = result.loss
    soft = bool(loss.soft_weight or loss.soft_weight_end)
    align = "both" if soft and loss.span_weight else "spans" if loss.span_weight else "map" if soft else None
    return (
        f"| tokenizer | its own, of {own.vocabulary_size:,} tokens, not the teacher's: {own.aligned / max(own.positions, 1):.1%} of its {own.positions:,} positions are aligned with "
        f"the teacher's, at {own.agreeing / max(own.aligned, 1):.1%} of these the mapped teacher's token is the token of the text"
        f"{'' if align is None else f'; `--align {align}`'} |\n"
    )


def describe_loss(loss: Loss, *, teacher_labels: bool = False) -> str:
    """Return the loss as a formula in words, with every setting that changes it."""
    terms = []
    if loss.hard_weight or loss.hard_weight_end:
        labels = f"{'the teacher' if teacher_labels else 'the data'}'s labels"
        weight = _weight(loss.hard_weight, loss.hard_weight_end, loss.schedule)
        kind = "squared error, in standard deviations," if loss.divergence in DIVERGENCES else "cross-entropy"
        terms.append(f"{weight} * {kind} with {labels}")
    if loss.soft_weight or loss.soft_weight_end:
        power = DIVERGENCE_KINDS[loss.divergence].power
        factor = ("", "T * ")[power] if power < 2 else f"T^{power} * "
        weight = _weight(loss.soft_weight, loss.soft_weight_end, loss.schedule)
        terms.append(f"{weight} * {factor}{loss.divergence} from the teacher{_details(loss)}")
    if loss.span_weight:
        terms.append(
            f"{loss.span_weight:g} * binary KL from the teacher over aligned spans at tau = {span_temperature(loss):g}"
        )
    schedule = "" if loss.schedule == "constant" else f" (weights change over the run: {loss.schedule})"
    return " + ".join(terms) + schedule


def _weight(start: float, end: float | None, schedule: str) -> str:
    """Return `0.5`, or `(0.5 to 0.1)` for a weight that changes over the run."""
    if schedule == "constant":
        return f"{start:g}"
    last = (0.0 if schedule == "warmup-stable-decay" else start) if end is None else end
    return f"{start:g}" if last == start else f"({start:g} to {last:g})"


def _details(loss: Loss) -> str:
    """Return temperature, mixture, tail and position weights that differ from the defaults."""
    details = []
    kind = DIVERGENCE_KINDS[loss.divergence]
    if kind.power and loss.temperature is not None:
        details.append(f" at T = {loss.temperature:g}")
    if kind.mixture is not None:
        share = kind.mixture if loss.mixture is None else loss.mixture
        details.append(f", the teacher's share in the mixture {share:g}")
    if loss.tail != "ghost":
        details.append(f", classes outside the top: {loss.tail}")
    if loss.position_weights != "equal":
        details.append(f", positions weighted by the teacher's {loss.position_weights}")
    return "".join(details)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the model card in a directory states; None if it states none."""
    try:
        name = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _cell(str(name)) if name else None


def _of_teacher(teacher: ModelInfo) -> str:
    """Return the known facts about a teacher; few are known of a teacher behind a server."""
    facts = [
        ("unknown" not in teacher.architecture, teacher.architecture),
        (teacher.num_parameters > 0, f"{teacher.num_parameters:,} parameters"),
        (teacher.dtype != "unknown", teacher.dtype),
        (teacher.weights_sha256 != "unknown", f"SHA-256 of the weights `{teacher.weights_sha256[:16]}`"),
        (teacher.revision is not None, f"revision `{teacher.revision}`"),
    ]
    return ", ".join(text for known, text in facts if known) or "no other facts are known"


def _teacher(teacher: ModelInfo) -> tuple[str, bool]:
    """Return a name to show and whether it is a hub name; only hub models have a revision."""
    return (teacher.name, True) if teacher.revision is not None else (PurePath(teacher.name).name, False)


def _source(source: SourceInfo) -> tuple[str, bool]:
    return (source.name, True) if source.revision is not None else (PurePath(source.name).name, False)


def _start(student: LoadedModel) -> tuple[str, bool]:
    name = public_name(student.name)
    return (name, True) if student.revision is not None else (PurePath(name).name, False)


def _pipeline_tag(architecture: str) -> str | None:
    """Return the hub's pipeline tag for a model class; None if `transformers` lists none."""
    mapping: dict[str, Any] = dict(TASK_MAPPING)
    return next((tag for tag, classes in mapping.items() if architecture in classes.values()), None)


def _labels(names: tuple[str, ...], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_cell(name) for name in names[:most]) + more


def _encoding(encoding: Encoding) -> str:
    knobs = {name: value for name, value in dataclasses.asdict(encoding).items() if name != "kind"}
    shown = {k: ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value for k, value in knobs.items()}
    return ", ".join([encoding.kind, *(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())])


def _metrics(result: TrainResult, task: Task) -> str:
    if not result.metrics:
        return "It was not evaluated during training: the cache has no split `validation`. `softlabel evaluate` compares it with its teacher.\n"
    lines = "".join(f"| {name} | {value:.4f} |\n" for name, value in result.metrics.items())
    if task.target == "score":
        lines += "\n`mse` is in squared units of the data, `correlation` is that with the teacher's scores, `divergence` and the losses are in standard deviations of the teacher's scores.\n"
    elif task.names == "positions":
        lines += "\n`f1` is of all labels together (micro), `macro_f1` and `average_precision` are means over labels, `accuracy` is of single labels.\n"
    elif task.names == "places":
        lines += "\n`f1` is of the tokens of answers and `exact` of whole answers, over windows; `accuracy` is of their single ends.\n"
    elif "f1" in result.metrics:
        lines += "\n`f1`, `precision` and `recall` are of entities, which are correct if label, start and end are (without a class `O`: of words); `accuracy` is of words.\n"
    if result.own_tokenizer is not None:
        lines += (
            "\n`nll`, `loss`, `perplexity` and `accuracy` are of its own tokens, which are not the teacher's: between tokenizers compare `bits_per_byte`. `agreement` and "
            "`divergence` are over the aligned positions.\n"
        )
    counted = "" if result.eval_rows is None else f", {result.eval_rows:,} rows"
    if "held out" in (result.eval_split or ""):
        lines += "\nThe teacher may have been trained on the labels of these rows: `softlabel evaluate` on a split of its own shows how the student performs on new ones.\n"
    return (
        f"At the end of training, on the cache's split `{result.eval_split}`{counted} (losses and divergences in nats; `nll` with the labels, `agreement` and `divergence` with the "
        f"teacher):\n\n| metric | value |\n|---|---|\n{lines}"
    )


def _cell(text: str) -> str:
    """Escape a text of a data set for a cell of a Markdown table: one line, no markup, no HTML."""
    return re.sub(r"([|`<>\\*_\[\]])", r"\\\1", " ".join(text.split()))
