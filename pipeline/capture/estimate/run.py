"""`softlabel estimate`: cost and errors of each encoding, from a pilot over a few rows.

It writes no cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from pipeline.cache.format.codec import unpack, unpack_soft
from pipeline.cache.format.rows import in_order
from pipeline.cache.format.schema import cache_schema
from pipeline.cache.reading.shards import open_shard
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.estimate.choice import choose, write_config
from pipeline.capture.forward import broken_rows, output_matrix, synchronize, teacher_logits, without
from pipeline.capture.job import load_teacher, row_length
from pipeline.capture.plan import (
    check_stored,
    choices_of,
    default_rows_per_shard,
    full_row_is_too_large,
    kept_types,
    plan_batches,
    plan_shards,
    ranges_of,
    text_columns,
)
from pipeline.capture.shard import label_rows
from pipeline.capture.teachers.local import LocalTeacher
from pipeline.config import EstimateConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.models import LoadedModel, class_names
from pipeline.progress import Progress
from pipeline.records import (
    BadRow,
    Encoding,
    Estimate,
    EstimatedColumn,
    EstimatedEncoding,
    Example,
    Full,
    RowBlock,
    Sampled,
    Score,
    ShardPlan,
    Tokenization,
    TokenizedExample,
    TopK,
    TopP,
)
from pipeline.softlabels import encode, narrow, target
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference, spread
from pipeline.sources import Source, holds_chats, label_reader, load_source, read_examples
from pipeline.tasks import Task, check_columns, check_ids, embedding_rows, get_task, label_column

#: The settings that are compared; those with as many classes as V or more are left out.
SAMPLE_SIZES = (6.0, 8.0, 12.0, 17.0, 25.0, 35.0, 50.0, 70.0, 100.0, 200.0)
TOP_KS = (12, 50, 128)
TOP_PS = (0.9, 0.98)
#: Runs of consecutive rows that a pilot reads, evenly spaced over the split.
_RUNS = 8
_FEW_CLASSES = 4096
#: Columns of language models that are stored on request: flag -> column names, of which a cache has
#: one.
_ON_REQUEST = {"--store-text": ("text", "messages"), "--store-label-logprobs": ("label_logprobs",)}
#: Number of positions per batch at which fidelity is measured.
_MEASURED_OF_BATCH = 256


def run(config: EstimateConfig) -> Estimate:
    """Run the pilot and return the estimate; with `--write-config`, also write a YAML file.

    Raises:
        PipelineError: see the subclasses.
    """
    task = get_task(config.task)
    check_columns(task, config.data.columns, config.data.tokenization(2))
    if config.write_config is not None and Path(config.write_config).exists():
        raise MisuseError(f"--write-config {config.write_config}: exists already; remove it, or name another file")
    source = load_source(config.data)
    teacher = load_teacher(task, config)
    length = row_length(task, LocalTeacher(task, teacher, teacher.tokenizer), config.data.max_length)
    found = estimate(
        task,
        source,
        teacher,
        tokenization=config.data.tokenization(length),
        store_text=config.data.store_text,
        batch_tokens=config.batch_tokens or task.default_batch_tokens,
        positions=config.positions,
        temperature=config.temperature,
        seed=config.seed,
        label_map=config.data.label_map,
    )
    found = dataclasses.replace(found, chosen=choose(found, config), scale_tokens=config.scale, gpus=config.gpus)
    if config.write_config is not None:
        write_config(config, found)
    return found


def estimate(
    task: Task,
    source: Source,
    teacher: LoadedModel,
    *,
    tokenization: Tokenization,
    store_text: bool | None = None,
    batch_tokens: int,
    positions: int = 2048,
    temperature: float = 1.0,
    seed: int = 0,
    label_map: Sequence[str] = (),
) -> Estimate:
    """Run the teacher over about `positions` positions and encode its output in every encoding.

    Raises:
        SourceError: no usable row in the pilot, or no row with finite logits.
    """
    fast = bool(getattr(teacher.tokenizer, "is_fast", False))
    check_stored(task, source.columns, tokenization, store_text=store_text, fast_tokenizer=fast)
    choices = choices_of(task, source)
    num_classes = choices or task.num_classes(teacher.model, teacher.tokenizer)
    if task.names == "places":
        num_classes = tokenization.max_length
    tokenization = dataclasses.replace(tokenization, num_choices=choices)
    matrix = None if task.target == "score" else output_matrix(teacher.model, num_classes)
    projection = None
    split = next(iter(source.splits))
    with_texts = fast and not tokenization.packing and source.columns.input_ids is None
    examples, source_rows = _pilot_rows(
        task, source, teacher, split, tokenization, positions, label_map, texts=with_texts
    )
    if task.reads != "images":
        check_ids(embedding_rows(teacher.model), examples, teacher.tokenizer, teacher.name)
    kept = kept_types(source)

    def schema_of(encoding: Encoding, texts: bool | None, *, label_logprobs: bool = False) -> pa.Schema:
        texts_of = text_columns(task, texts, chats=holds_chats(source))
        return _schema(task, encoding, num_classes, examples[0], texts_of, kept, label_logprobs=label_logprobs)

    encodings = _encodings(task, num_classes, tokenization.max_length, temperature)
    pilots = [_Pilot(encoding, schema_of(encoding, store_text)) for encoding in encodings]
    if task.label_source == "tokens":  # add the columns stored on request
        more = schema_of(pilots[0].encoding, with_texts, label_logprobs=True)
        pilots[0].asked, pilots[0].schema = frozenset(pilots[0].schema.names), more
    generator = torch.Generator().manual_seed(seed)
    forward_seconds = 0.0
    shortest = min(examples, key=lambda example: example.num_tokens)
    teacher_logits(task, teacher, teacher.tokenizer, [shortest], num_classes)  # warm-up
    batches = plan_batches([example.num_tokens for example in examples], batch_tokens)
    progress = Progress("estimate", len(examples))
    for members, width in batches:
        part = [examples[i] for i in members]
        progress.update(len(part), tokens=sum(example.num_tokens for example in part))
        started = time.perf_counter()
        logits = teacher_logits(task, teacher, teacher.tokenizer, part, num_classes, width)
        synchronize(logits)
        forward_seconds += time.perf_counter() - started
        broken = broken_rows(part, logits, split)
        if broken:  # cache-logits stops at these, or skips them
            logits = without(broken, part, logits)
            members = [row for i, row in enumerate(members) if i not in broken]
            part = [examples[i] for i in members]
            if not part:
                continue
        picked = logits[torch.tensor(spread(len(logits), _MEASURED_OF_BATCH), device=logits.device)]
        uniforms = torch.rand(len(picked), generator=generator, dtype=torch.float64)
        reference = None
        if matrix is not None:
            projection = projection or Projection.of(matrix, logits.device)
            reference = Reference.of(picked, projection, temperature=temperature, seed=seed + members[0])
        for pilot in pilots:
            # All classes of all rows do not fit in memory; one row of each batch is measured
            # instead.
            some = part[:1] if isinstance(pilot.encoding, Full) and num_classes > _FEW_CLASSES else part
            positions_taken = sum(example.num_positions for example in some)
            started = time.perf_counter()
            made = label_rows(
                task, some, logits[:positions_taken], pilot.encoding, pilot.schema, split=split, seed=seed
            )
            synchronize(logits)
            pilot.seconds += time.perf_counter() - started
            pilot.positions += positions_taken
            pilot.blocks.append(made)
            pilot.rows += members[: len(some)]
            if reference is not None:
                soft = narrow(encode(picked, pilot.encoding, uniforms=uniforms), uniforms)
                pilot.meter.add(reference, target(soft, temperature), soft)
    progress.close()
    counted = sum(example.num_positions for example in examples)
    tokens = sum(example.num_tokens for example in examples)
    total_rows = sum(len(part) for part in source.splits.values())
    of_an_image = {
        name: 1 if (views := tokenization.views) is None else views.rows_of_an_image(name) for name in source.splits
    }
    alike = sum(len(part) * of_an_image[name] for name, part in source.splits.items()) / of_an_image[split]
    scale = alike / source_rows
    if not pilots[0].rows:
        raise SourceError(f"{source.name}: split {split}: the teacher's logits are not finite on any row of the pilot")
    lines = []
    columns: list[EstimatedColumn] = []
    for pilot in pilots:
        sizes, decoded = _bytes_and_decoding(in_order(pilot.blocks, pilot.rows), pilot.schema)
        if pilot.asked is not None:
            columns = _on_request(sizes, pilot.asked, pilot.positions, counted * scale)
        size = sum(taken for name, taken in sizes.items() if pilot.asked is None or name in pilot.asked)
        per_shard = default_rows_per_shard(task, pilot.encoding, num_classes, tokenization)
        seconds = pilot.seconds / pilot.positions * counted
        lines.append(
            EstimatedEncoding(
                encoding=pilot.encoding,
                bytes_per_position=size / pilot.positions,
                total_bytes=int(size / pilot.positions * counted * scale),
                num_shards=len(plan_shards(ranges_of(source), per_shard, row_groups=source.row_groups)),
                hours=(forward_seconds + seconds) * scale / 3600,
                overhead=seconds / forward_seconds,
                decoded_per_second=pilot.positions / decoded,
                fidelity=pilot.meter.result(),
            )
        )
    return Estimate(
        teacher=teacher.name,
        source=source.name,
        temperature=temperature,
        pilot_rows=source_rows,
        pilot_positions=counted,
        rows=total_rows,
        tokens=int(tokens * scale),
        positions=int(counted * scale),
        tokens_per_second=tokens / forward_seconds,
        encodings=tuple(lines),
        columns=tuple(columns),
    )


def _on_request(
    sizes: Mapping[str, int], asked: frozenset[str], positions: int, all_positions: float
) -> list[EstimatedColumn]:
    """Return the size of each column that is stored on request.

    Args:
        sizes: bytes of each column of the pilot.
        asked: the columns that the figures of the encodings include.
    """
    return [
        EstimatedColumn(flag, sizes[name] / positions, int(sizes[name] / positions * all_positions), name in asked)
        for flag, names in _ON_REQUEST.items()
        for name in names
        if name in sizes
    ]


# ---------------------------------------------------------------------------------------- the pilot


def _pilot_rows(
    task: Task,
    source: Source,
    teacher: LoadedModel,
    split: str,
    settings: Tokenization,
    positions: int,
    label_map: Sequence[str],
    *,
    texts: bool,
) -> tuple[list[TokenizedExample], int]:
    """Read rows with about `positions` positions, from evenly spaced runs of consecutive rows.

    Returns:
        The tokenized rows, and the number of source rows that were read.

    Raises:
        SourceError: none of the rows can be used.
    """
    count = len(source.splits[split])
    labels = None
    if task.names in ("classes", "positions", "places"):
        labels = label_reader(source, class_names(teacher.model), label_map, holds=label_column(task))
    runs = max(1, min(_RUNS, positions // settings.max_length, count))
    starts = [count * i // runs for i in range(runs)]
    unpacked = dataclasses.replace(settings, packing=False, isolate_documents=False)
    examples: list[TokenizedExample] = []
    used = 0
    for start, stop in itertools.pairwise([*starts, count]):
        # Take whole source rows until they have enough positions, then tokenize exactly these: a
        # packed row would end in the middle of a source row.
        taken: list[Example | BadRow] = []
        quota = positions / runs
        for item in read_examples(source, split, start, stop, labels):
            pieces = task.tokenize([item], split, teacher.tokenizer, unpacked)
            quota -= sum(piece.num_positions for piece in pieces if isinstance(piece, TokenizedExample))
            taken.append(item)
            if quota <= 0:
                break
        used += len(taken)
        made = task.tokenize(taken, split, teacher.tokenizer, settings, texts=texts)
        examples += [item for item in made if isinstance(item, TokenizedExample)]
    if not examples:
        raise SourceError(
            f"{source.name}: split {split}: no usable row in the pilot; see softlabel cache-logits --on-bad-row skip"
        )
    return examples, used


def _encodings(task: Task, num_classes: int, max_length: int, temperature: float) -> list[Encoding]:
    if task.target == "score":
        return [Score()]
    grid = tuple(sorted({1.0, 2.0, 4.0, temperature}))
    found: list[Encoding] = [Sampled(c, temperature) for c in SAMPLE_SIZES if c < num_classes]
    found += [TopK(k, grid) for k in TOP_KS if k < num_classes]
    found += [TopP(p, grid) for p in TOP_PS]
    if not full_row_is_too_large(task, num_classes, max_length):
        found.append(Full())
    return found


@dataclasses.dataclass(slots=True)
class _Pilot:
    """The results of one encoding so far."""

    encoding: Encoding
    schema: pa.Schema
    blocks: list[RowBlock] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    """The index in the pilot of each row of the blocks."""
    positions: int = 0
    seconds: float = 0.0
    meter: FidelityMeter = dataclasses.field(default_factory=FidelityMeter)
    asked: frozenset[str] | None = None
    """The columns that the figures include, if the schema has additional columns."""


def _schema(
    task: Task,
    encoding: Encoding,
    num_classes: int,
    example: TokenizedExample,
    texts: Mapping[str, bool],
    kept: Mapping[str, pa.DataType],
    *,
    label_logprobs: bool,
) -> pa.Schema:
    """Return the columns that cache-logits would write for rows like `example`."""
    return cache_schema(
        encoding,
        num_classes,
        labels=task.label_source,
        marks_positions=task.marks_positions,
        token_type_ids=example.token_type_ids is not None,
        **texts,
        text_pair=example.text_pair is not None,
        images=example.image is not None,
        views=example.view is not None,
        groups=example.group is not None,
        documents=example.document_lengths is not None,
        label_logprobs=label_logprobs,
        kept=kept,
    )


def _bytes_and_decoding(rows: RowBlock, schema: pa.Schema) -> tuple[dict[str, int], float]:
    """Return the bytes of each column in Parquet, and the seconds of reading in one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pilot.parquet"
        write_shard(path, ShardPlan("pilot", "train", 0, len(rows)), rows, schema)
        file = open_shard(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = dict.fromkeys(schema.names, 0)
        for column in (group.column(i) for group in groups for i in range(group.num_columns)):
            sizes[column.path_in_schema.partition(".")[0]] += column.total_compressed_size
        started = time.perf_counter()
        unpack_soft(unpack(file.read(use_threads=False), rows.encoding, rows.num_classes))
        return sizes, time.perf_counter() - started
