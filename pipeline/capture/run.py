"""The steps of stage 1, from the command's configuration or from Python arguments."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.cache import Cache
from pipeline.cache.writing.place import current_plan, open_layout
from pipeline.capture.engines.in_process import CAPTURE, capture
from pipeline.capture.job import make_job, prepare, row_length
from pipeline.capture.plan import choices_of, judges_task
from pipeline.capture.teachers.judge.local import LocalScorer
from pipeline.capture.teachers.judge.scorer import Scorer
from pipeline.capture.teachers.judge.served import ServedScorer
from pipeline.capture.teachers.judge.teacher import make_judge
from pipeline.capture.teachers.local import LocalTeacher
from pipeline.capture.teachers.protocol import Teacher
from pipeline.capture.teachers.served import ServedTeacher, serve
from pipeline.config import CacheLogitsConfig, DataConfig, chat_template_kwargs, judging_of
from pipeline.config.capture import SERVED_TOP_K
from pipeline.errors import MisuseError
from pipeline.models import LoadedModel, load_model, load_tokenizer
from pipeline.models.processors import in_place_of_tokenizer, is_image_processor
from pipeline.records import AssistantTurns, Columns, Encoding, Judging, Tokenization, TopK, Views, check_is_encoding
from pipeline.sources import Source, from_datasets, load_source, with_unlabelled
from pipeline.tasks import Task, check_columns, get_task

#: Settings of a teacher that labels rows by prompt.
_OF_JUDGES = frozenset(("prompt_format", "shots", "shot_tokens", "calibrate"))
#: Keyword arguments that `cache_logits` accepts as `settings`.
_SETTINGS = _OF_JUDGES.union(
    ("packing", "isolate_documents", "masking", "views", "stride", "truncation_side"),
    ("assistant_turns", "chat_template_kwargs"),
    ("store_text", "store_images", "store_entropy", "store_label_logprobs"),
    ("batch_tokens", "rows_per_shard", "rows", "on_bad_row", "overwrite", "append"),
    ("server_model", "server_api", "concurrency", "server_patience", "check_with", "top_logprobs"),
)


def run(config: CacheLogitsConfig) -> Cache | None:
    """Run `softlabel cache-logits` with the engine that the flags select.

    Returns:
        The finished cache, or None if this part is done but others are not.

    Raises:
        PipelineError: see the subclasses. No shard is half-written; the same command resumes the
            capture.
    """
    if config.engine == "ray":
        from pipeline.capture.engines.on_ray import run_on_ray

        return _cache(run_on_ray(CAPTURE, config))
    if config.num_workers is not None:
        from pipeline.capture.engines.workers import run_workers

        return _cache(run_workers(CAPTURE, config, config.num_workers))
    job = prepare(config)
    try:
        return capture(job, part=config.parsed_part)
    finally:
        job.teacher.close()


def _cache(found: Any) -> Cache | None:
    assert found is None or isinstance(found, Cache)
    return found


def cache_logits(
    teacher: str | Path | PreTrainedModel,
    dataset: Any,
    output: str | Path,
    *,
    task: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoding: Encoding | None = None,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    max_length: int | None = None,
    seed: int = 0,
    label_map: Mapping[str | int, str | int] | None = None,
    unlabelled: Sequence[Any] = (),
    server: str | Sequence[str] = (),
    prompt_template: str | Path | None = None,
    label_text: Mapping[str, str] | Sequence[str] = (),
    **settings: Any,
) -> Cache:
    """Run a teacher over a data set and write its soft labels.

    Args:
        teacher: a name, a path, or a model in memory (which needs its `tokenizer`).
        dataset: a `datasets.Dataset` or `DatasetDict`, or a name or path as for `softlabel
            cache-logits --dataset`.
        task: a name as for `--task`. For image tasks, `tokenizer` is the image processor.
        encoding: default: `Full()` for classifiers, `Sampled()` for language models.
        label_map: label of the data (name or number) -> class of the teacher (name, `LABEL_i` or
            number), for labels that are not matched by name.
        unlabelled: data sets, as `dataset`, whose rows are added to the split `train` without
            labels.
        server: addresses of vLLM or SGLang servers that run the teacher, such as
            "http://host:8000/v1"; `teacher` is then the name of its tokenizer, and the default
            encoding is `TopK(20, (1.0,))`.
        prompt_template: for a language model that labels rows by prompt: the file of a Jinja
            template, its text, or "default".
        label_text: class -> text that the language model reads for it, or the classes alone.
            Default: the data's labels.
        settings: packing, isolate_documents, store_text, store_images, views (`records.Views`),
            masking (`records.Masking`), stride, store_entropy, store_label_logprobs, batch_tokens,
            rows_per_shard, rows, on_bad_row, overwrite, append. With a server: server_model,
            server_api, concurrency, server_patience (seconds), check_with (local weights),
            top_logprobs (number requested per position, for `TopP`). With a prompt: prompt_format
            ("auto", "chat", "plain"), shots, shot_tokens, calibrate. For chats: assistant_turns
            ("auto", "all", "each", "last"), chat_template_kwargs (a mapping). For chats and
            prompts: truncation_side ("right", "left").

    Returns:
        The finished cache. Calling again with the same arguments resumes an interrupted capture.

    Raises:
        PipelineError: see the subclasses.
    """
    chosen = get_task(task)
    _check_known(settings)
    if encoding is not None:
        check_is_encoding(encoding)
    servers = (server,) if isinstance(server, str) else tuple(server)
    judging = _judging(prompt_template, label_text, settings)
    if servers and encoding is None and judging is None:
        encoding = TopK(SERVED_TOP_K, (1.0,))
    layout = open_layout(output)
    begun = None if settings.get("overwrite") else current_plan(layout)
    tokenization = _tokenization(2, settings)
    chat_arguments = tokenization.chat_template_kwargs
    check_columns(
        chosen, columns, tokenization if judging is None else dataclasses.replace(tokenization, chat_template_kwargs=())
    )
    source, *others = (
        _named_source(str(each), columns, labelled=not i)
        if isinstance(each, str | Path)
        else from_datasets(each, columns, labelled=not i)
        for i, each in enumerate((dataset, *unlabelled))
    )
    source = with_unlabelled(source, others)
    label_maps = [f"{data}={model}" for data, model in (label_map or {}).items()]
    made: Teacher
    if judging is not None:
        scorer = _scorer(judges_task(chosen), teacher, servers, tokenizer, chosen.default_batch_tokens, settings)
        there = None if begun is None else begun.contract
        made = make_judge(
            scorer, judging, source, label_map=label_maps, seed=seed, chat_arguments=chat_arguments, begun=there
        )
    elif servers:
        made = _served(chosen, teacher, servers, tokenizer, encoding, settings)
    else:
        loaded = _loaded(chosen, teacher, tokenizer)
        made = LocalTeacher(chosen, loaded, loaded.tokenizer, choices_of(chosen, source))
    try:
        settings = {
            "batch_tokens": chosen.default_batch_tokens,
            "encoding": encoding or chosen.default_encoding,
            **settings,
        }
        job = make_job(
            chosen,
            source,
            made,
            layout,
            tokenization=dataclasses.replace(tokenization, max_length=row_length(chosen, made, max_length, begun)),
            seed=seed,
            label_map=label_maps,
            **settings,
        )
        cache = capture(job)
    finally:
        made.close()
    assert cache is not None  # never None without `part`
    return cache


def _judging(
    prompt_template: str | Path | None, label_text: Mapping[str, str] | Sequence[str], settings: dict[str, Any]
) -> Judging | None:
    """Remove the settings of a prompted teacher from `settings`, and return them if it has one."""
    texts = [f"{name}={text}" for name, text in label_text.items()] if isinstance(label_text, Mapping) else label_text
    asked = {name: settings.pop(name) for name in _OF_JUDGES & settings.keys()}
    return judging_of(None if prompt_template is None else str(prompt_template), tuple(texts), **asked)


def _scorer(
    task: Task,
    teacher: str | Path | PreTrainedModel,
    servers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    batch_tokens: int,
    settings: dict[str, Any],
) -> Scorer:
    """Load the language model of a judge; the settings of a server are removed from `settings`."""
    if servers:
        return ServedScorer(_served(task, teacher, servers, tokenizer, TopK(1, (1.0,)), settings))
    loaded = _loaded(task, teacher, tokenizer)
    return LocalScorer(loaded, settings.get("batch_tokens") or batch_tokens)


def _loaded(
    task: Task, teacher: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> LoadedModel:
    """Load a teacher by name, or wrap a model in memory.

    Raises:
        MisuseError: a model in memory without its tokenizer, or a tokenizer that does not fit the
            task.
    """
    if isinstance(teacher, str | Path):
        loaded = load_model(task, str(teacher))
        if tokenizer is not None and task.reads == "images":
            tokenizer = in_place_of_tokenizer(tokenizer)
        return loaded if tokenizer is None else dataclasses.replace(loaded, tokenizer=tokenizer)
    if tokenizer is None:
        raise MisuseError(
            f"cache_logits: a live model needs its tokenizer=...{' (the image processor)' * (task.reads == 'images')}"
        )
    if is_image_processor(tokenizer) != (task.reads == "images"):
        raise MisuseError(
            f"cache_logits: tokenizer: --task {task.name} reads {task.reads}, found a {type(tokenizer).__name__}"
        )
    if task.reads == "images":
        tokenizer = in_place_of_tokenizer(tokenizer)
    teacher.eval()
    return LoadedModel(teacher, tokenizer, teacher.config.name_or_path or type(teacher).__name__)


def _served(
    task: Task,
    teacher: str | Path | PreTrainedModel,
    servers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    encoding: Encoding | None,
    settings: dict[str, Any],
) -> ServedTeacher:
    """Connect to the servers of a teacher; their settings are removed from `settings`."""
    if not isinstance(teacher, str | Path):
        raise MisuseError(
            "cache_logits: with server=... the teacher is the name or path of its tokenizer, found a model"
        )
    asked = settings.pop("top_logprobs", SERVED_TOP_K)
    return serve(
        task,
        str(teacher),
        tokenizer or load_tokenizer(str(teacher)),
        servers,
        model=settings.pop("server_model", None),
        api=settings.pop("server_api", None),
        concurrency=settings.pop("concurrency", None),
        patience=settings.pop("server_patience", 600.0),
        top_logprobs=encoding.k if isinstance(encoding, TopK) else asked,
        check_with=settings.pop("check_with", None),
    )


def _tokenization(max_length: int, settings: dict[str, Any]) -> Tokenization:
    """Build the tokenization settings, and remove them from `settings`.

    Raises:
        MisuseError: a value is not one of the allowed ones.
    """
    arguments = settings.pop("chat_template_kwargs", {}).items()
    turns = _one_of(settings, "assistant_turns", typing.get_args(AssistantTurns))
    return Tokenization(
        max_length=max_length,
        packing=settings.pop("packing", False),
        isolate_documents=settings.pop("isolate_documents", False),
        assistant_turns=None if turns == "auto" else turns,
        chat_template_kwargs=chat_template_kwargs(f"{key}={json.dumps(value)}" for key, value in arguments),
        truncation_side="left" if _one_of(settings, "truncation_side", ("right", "left")) == "left" else None,
        masking=settings.pop("masking", None),
        views=_views(settings.pop("views", None)),
        stride=settings.pop("stride", None),
    )


def _views(given: Any) -> Views | None:
    return Views(given) if isinstance(given, int) else given


def _check_known(settings: Mapping[str, Any]) -> None:
    """Raise `MisuseError` for an unknown setting; the message suggests the nearest known one."""
    for name in settings:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1)
            column = name.endswith("_column") and name.removesuffix("_column") in {
                each.name for each in dataclasses.fields(Columns)
            }
            hint = f"columns=Columns({name.removesuffix('_column')}=...)" if column else near[0] if near else ""
            raise MisuseError(f"cache_logits: {name}: unknown setting{f'; did you mean {hint}?' if hint else ''}")


def _one_of(settings: dict[str, Any], name: str, known: Sequence[str]) -> Any:
    value = settings.pop(name, known[0])
    if value not in known:
        raise MisuseError(f"cache_logits: {name}: expected one of {', '.join(known)}, found {value!r}")
    return value


def _named_source(name: str, columns: Columns, *, labelled: bool) -> Source:
    data = DataConfig(
        dataset=name,
        text_column=columns.text or "text",
        text_pair_column=columns.text_pair,
        image_column=columns.image,
        choices_column=columns.choices,
        words_column=columns.words,
        messages_column=columns.messages,
        prompt_column=columns.prompt,
        completion_column=columns.completion,
        input_ids_column=columns.input_ids,
        labels_column=columns.labels,
        label_column=columns.label or "label",
        keep_column=columns.keep,
        group_column=columns.group,
    )
    return load_source(data, labelled=labelled)
