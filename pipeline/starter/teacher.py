"""Properties of a teacher without loading it: files, tokenizer, maximum length, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.models import load_model, load_tokenizer, pad_id
from pipeline.models.initialize import evenly_spaced
from pipeline.models.load import load_config, longest_of
from pipeline.records import TokenizedExample
from pipeline.sources import Source, read_examples
from pipeline.starter.facts import sampled_ranges
from pipeline.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pipeline.config import DataConfig

#: Models with more bytes of weights are not loaded to measure their speed.
_MOST_BYTES = 800_000_000
_SAMPLE = 1000
_SECONDS_TO_CONNECT = 3.0
_SECONDS_TO_MEASURE = 3.0
#: Floating-point operations of a timed batch, and its maximum number of rows.
_OPERATIONS = 20_000_000_000
_MOST_OF_BATCH = 8
#: Speed that each of several threads adds, relative to a single thread.
_OF_EACH_THREAD = 0.8


@dataclass(frozen=True, slots=True)
class Known:
    """Properties of a model without its weights.

    Fields are None if the model is neither on this machine nor reachable.
    """

    name: str
    directory: Path | None
    """Local directory of its files."""
    tokenizer: PreTrainedTokenizerBase | None
    longest: int | None
    """Maximum number of tokens that it has positions for."""
    layers: int | None
    weights: int | None
    """Number of parameters without embeddings."""
    labels: tuple[str, ...]
    """Class names of a fine-tuned classifier."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per token of a forward pass."""

    seconds: float
    is_measured: bool
    """Whether it is measured; else estimated from the number of parameters."""
    student: float
    """Time of a student with a third of the layers, as a share of the teacher's."""


def look_up(name: str) -> Known:
    """Look up tokenizer and configuration of a model in a directory, the hub's cache or the hub.

    Raises:
        ModelError: the directory is not a model, or the hub does not have the model.
    """
    directory = _directory(name)
    if directory is None and not _looks_local(name) and not _hub_answers():
        return nothing_of(name)
    place = name if directory is None else str(directory)
    config, tokenizer = load_config(place), load_tokenizer(place)
    text: Any = config.get_text_config()
    labels: dict[int, str] = getattr(config, "id2label", None) or {}
    return Known(
        name,
        directory,
        tokenizer,
        longest_of(config, tokenizer),
        getattr(text, "num_hidden_layers", None) or getattr(text, "n_layers", None),
        _weights(config),
        tuple(str(labels[i]) for i in sorted(labels)),
    )


def nothing_of(name: str) -> Known:
    """A model of which only the name is known."""
    return Known(name, None, None, None, None, None, ())


def sample(source: Source, task: Task, known: Known, data: DataConfig) -> list[TokenizedExample]:
    """Tokenize a sample of the rows of `train`, without truncation.

    Raises:
        PipelineError: rows cannot be tokenized, for example chats without a template.
    """
    if known.tokenizer is None:
        return []
    split = "train" if "train" in source.splits else next(iter(source.splits))
    settings = task.settle(data.tokenization(1 << 20), known.tokenizer, chats=data.columns.messages is not None)
    found: list[TokenizedExample] = []
    for part in sampled_ranges(source.splits[split], _SAMPLE):
        rows = read_examples(source, split, part.start, part.stop, None)
        found += [
            row for row in task.tokenize(rows, split, known.tokenizer, settings) if isinstance(row, TokenizedExample)
        ]
    return found


def measure(
    task: Task, known: Known, rows: Sequence[TokenizedExample], labels: Sequence[str], length: int
) -> Speed | None:
    """The speed of the model on this machine; None: not known.

    Measured on a batch if the weights are local and small, else estimated from the size of the
    model.
    """
    if known.layers is None:
        return None
    student = len(evenly_spaced(known.layers)) / known.layers
    few = _few(rows, known.weights or 1, length)
    if few and known.directory is not None and 0 < _bytes(known.directory) < _MOST_BYTES:
        try:
            return Speed(_timed(task, str(known.directory), few, labels), True, student)
        except (PipelineError, RuntimeError, ValueError):  # an estimate in a comment must not cause an error
            pass
    if known.weights is None:
        return None
    return Speed(2 * known.weights / _operations_per_second(), False, student)


def _timed(task: Task, place: str, rows: Sequence[TokenizedExample], labels: Sequence[str]) -> float:
    names = tuple(labels) or None if task.names is not None else None
    loaded = load_model(task, place, dtype="float32", label_names=names, new_head=task.names is not None)
    model = loaded.model
    inputs, supervised = task.collate(rows, pad_id(loaded.tokenizer, model))
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    where = None if supervised is None else supervised.to(model.device)
    seconds = _fastest(lambda: task.gather_logits(model, moved, where), on_cpu=model.device.type == "cpu")
    return seconds / sum(len(row.input_ids) for row in rows)


def _few(rows: Sequence[TokenizedExample], weights: int, length: int) -> list[TokenizedExample]:
    """Rows of similar length for about a second; empty if one row takes much longer."""
    tokens = max(1, _OPERATIONS // (2 * weights))
    whole = sorted((row for row in rows if len(row.input_ids) <= length), key=lambda row: len(row.input_ids))
    middle = whole[len(whole) // 2 :] if whole and len(whole[len(whole) // 2].input_ids) <= tokens else whole[:1]
    found: list[TokenizedExample] = []
    for row in middle[:_MOST_OF_BATCH]:
        if found and (len(found) + 1) * len(row.input_ids) > tokens:
            break
        found.append(row)
    return found if found and len(found[0].input_ids) <= 5 * tokens else []


def _operations_per_second() -> float:
    """Rough estimate: half of the speed of a large matrix product on this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    return 0.5 * 2 * 1024**3 / _fastest(lambda: a @ a, on_cpu=device == "cpu")


def _fastest(compute: Callable[[], Tensor], *, on_cpu: bool) -> float:
    """Seconds of a computation with all threads; on CPUs without the time of other programs."""
    import torch

    threads = torch.get_num_threads()
    clock = time.thread_time if on_cpu else time.perf_counter
    times: list[float] = []
    began = time.perf_counter()
    try:
        if on_cpu:
            torch.set_num_threads(1)
        with torch.inference_mode():
            while len(times) < 5 and (len(times) < 2 or time.perf_counter() - began < _SECONDS_TO_MEASURE):
                started = clock()
                float(compute().sum())
                times.append(clock() - started)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:]) / (max(1.0, _OF_EACH_THREAD * threads) if on_cpu else 1.0)


def _weights(config: Any) -> int | None:
    """Number of parameters without embeddings, from the configuration alone."""
    import torch
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        table = model.get_input_embeddings()
        return int(sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in table.parameters()))
    except Exception:  # configurations with remote code, or of heads only
        return None


def _directory(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if _looks_local(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return None
    return Path(found[0]).parent if all(isinstance(file, str) for file in found) else None  # type: ignore[arg-type]


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _hub_answers() -> bool:
    """Whether the hub answers; asked once with a short timeout, since its client retries long."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_CONNECT)
    except Exception:  # any error of the network
        return False
    return True
