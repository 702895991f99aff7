"""`softlabel estimate`: what each encoding would cost and lose, from a pilot over a few rows of the data set. It writes no cache."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipeline.cache.format.codec import unpack, unpack_soft
from pipeline.cache.format.rows import in_order
from pipeline.cache.format.schema import cache_schema
from pipeline.cache.reading.shards import open_shard
from pipeline.cache.storage.commit import write_text
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.estimate_table import human
from pipeline.capture.forward import broken_rows, output_matrix, synchronize, teacher_logits, without
from pipeline.capture.job import load_teacher, row_length
from pipeline.capture.plan import (
    default_rows_per_shard,
    full_row_is_too_large,
    kept_types,
    plan_batches,
    plan_shards,
    ranges_of,
)
from pipeline.capture.shard import label_rows
from pipeline.capture.teachers.local import LocalTeacher
from pipeline.config import EstimateConfig, parse_bytes
from pipeline.errors import MisuseError, SourceError
from pipeline.models import LoadedModel
from pipeline.progress import Progress
from pipeline.records import (
    BadRow,
    Encoding,
    Estimate,
    EstimatedEncoding,
    Example,
    Full,
    RowBlock,
    Sampled,
    ShardPlan,
    Tokenization,
    TokenizedExample,
    TopK,
    TopP,
)
from pipeline.softlabels import encode, narrow, target
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference, spread
from pipeline.softlabels.names import encoding_name
from pipeline.sources import LabelMap, Source, load_source, read_examples
from pipeline.tasks import Task, check_ids, embedding_rows, get_task

#: The choices that are compared, where they have fewer classes than V.
SAMPLE_SIZES = (6.0, 8.0, 12.0, 17.0, 25.0, 35.0, 50.0, 70.0, 100.0, 200.0)
TOP_KS = (12, 50, 128)
TOP_PS = (0.9, 0.98)
#: Runs of neighbouring rows that a pilot reads, evenly spaced over the split.
_RUNS = 8
_FEW_CLASSES = 4096
#: Positions of a batch that fidelity is measured at.
_MEASURED_OF_BATCH = 256


def run(config: EstimateConfig) -> Estimate:
    """The pilot and what it says; with `--write-config` also a YAML file.

    Raises:
        PipelineError: see the subclasses.
    """
    task = get_task(config.task)
    task.check_columns(config.data.columns, config.data.tokenization(2))
    if config.write_config is not None and Path(config.write_config).exists():
        raise MisuseError(f"--write-config {config.write_config}: is there already; remove it, or name another file")
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
    found = dataclasses.replace(found, chosen=_choose(found, config), scale_tokens=config.scale, gpus=config.gpus)
    if config.write_config is not None:
        _write_config(config, found)
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
    """Run the teacher over about so many positions and encode them in every way."""
    num_classes = task.num_classes(teacher.model, teacher.tokenizer)
    matrix = output_matrix(teacher.model, num_classes)
    projection = None
    split = next(iter(source.splits))
    examples, source_rows = _pilot_rows(task, source, teacher, split, tokenization, positions, label_map)
    check_ids(embedding_rows(teacher.model), examples, teacher.tokenizer, teacher.name)
    kept = kept_types(source)

    def pilot_of(encoding: Encoding) -> _Pilot:
        return _Pilot(encoding, _schema(task, encoding, num_classes, examples[0], store_text, kept))

    pilots = [*map(pilot_of, _encodings(task, num_classes, tokenization.max_length, temperature))]
    generator = torch.Generator().manual_seed(seed)
    forward_seconds = 0.0
    shortest = min(examples, key=lambda example: example.num_tokens)
    teacher_logits(task, teacher, teacher.tokenizer, [shortest], num_classes)  # the first pass warms up
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
        if broken:  # cache-logits will stop at these, or set them aside
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
            # All classes of all rows would fill the memory: one row of each batch stands for them.
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
    scale = total_rows / source_rows
    if not pilots[0].rows:
        raise SourceError(f"{source.name}: split {split}: the teacher's logits are not finite on any row of the pilot")
    lines = []
    for pilot in pilots:
        size, decoded = _bytes_and_decoding(in_order(pilot.blocks, pilot.rows), pilot.schema)
        per_shard = default_rows_per_shard(
            pilot.encoding, num_classes, max_length=tokenization.max_length, token_classes=task.classes_are_tokens
        )
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
    )


# ---------------------------------------------------------------------------------------------------------- the pilot


def _pilot_rows(
    task: Task,
    source: Source,
    teacher: LoadedModel,
    split: str,
    settings: Tokenization,
    positions: int,
    label_map: Sequence[str],
) -> tuple[list[TokenizedExample], int]:
    """Rows with about so many positions, from evenly spaced runs of neighbours, and how many source rows they are.

    Raises:
        SourceError: no row of them can be used.
    """
    count = len(source.splits[split])
    labels = None
    if not task.classes_are_tokens:
        config: Any = teacher.model.config
        labels = LabelMap.for_names(source, tuple(str(config.id2label[i]) for i in range(config.num_labels)), label_map)
    runs = max(1, min(_RUNS, positions // settings.max_length, count))
    starts = [count * i // runs for i in range(runs)]
    unpacked = dataclasses.replace(settings, packing=False, isolate_documents=False)
    examples: list[TokenizedExample] = []
    used = 0
    for start, stop in itertools.pairwise([*starts, count]):
        # Whole source rows, as many as have the positions, and then exactly those: a packed row would end in the middle of one.
        taken: list[Example | BadRow] = []
        quota = positions / runs
        for item in read_examples(source, split, start, stop, labels):
            pieces = task.tokenize([item], split, teacher.tokenizer, unpacked)
            quota -= sum(piece.num_positions for piece in pieces if isinstance(piece, TokenizedExample))
            taken.append(item)
            if quota <= 0:
                break
        used += len(taken)
        made = task.tokenize(taken, split, teacher.tokenizer, settings)
        examples += [item for item in made if isinstance(item, TokenizedExample)]
    if not examples:
        raise SourceError(
            f"{source.name}: split {split}: no usable row in the pilot; see softlabel cache-logits --on-bad-row skip"
        )
    return examples, used


def _encodings(task: Task, num_classes: int, max_length: int, temperature: float) -> list[Encoding]:
    grid = tuple(sorted({1.0, 2.0, 4.0, temperature}))
    found: list[Encoding] = [Sampled(c, temperature) for c in SAMPLE_SIZES if c < num_classes]
    found += [TopK(k, grid) for k in TOP_KS if k < num_classes]
    found += [TopP(p, grid) for p in TOP_PS]
    if not full_row_is_too_large(task, num_classes, max_length):
        found.append(Full())
    return found


@dataclasses.dataclass(slots=True)
class _Pilot:
    """What one encoding has made so far."""

    encoding: Encoding
    schema: pa.Schema
    blocks: list[RowBlock] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    """The place of each row of the blocks among the pilot's rows."""
    positions: int = 0
    seconds: float = 0.0
    meter: FidelityMeter = dataclasses.field(default_factory=FidelityMeter)


def _schema(
    task: Task,
    encoding: Encoding,
    num_classes: int,
    example: TokenizedExample,
    store_text: bool | None,
    kept: Mapping[str, pa.DataType],
) -> pa.Schema:
    """The columns that cache-logits would write for rows like this one."""
    return cache_schema(
        encoding,
        num_classes,
        token_classes=task.classes_are_tokens,
        token_type_ids=example.token_type_ids is not None,
        text=store_text is not False and not task.classes_are_tokens,
        text_pair=example.text_pair is not None,
        documents=example.document_lengths is not None,
        kept=kept,
    )


def _bytes_and_decoding(rows: RowBlock, schema: pa.Schema) -> tuple[int, float]:
    """Bytes of all columns in Parquet, and the seconds that one thread takes to read the rows back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pilot.parquet"
        write_shard(path, ShardPlan("pilot", "train", 0, len(rows)), rows, schema)
        file = open_shard(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        size = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
        started = time.perf_counter()
        unpack_soft(unpack(file.read(use_threads=False), rows.encoding, rows.num_classes))
        return size, time.perf_counter() - started


# --------------------------------------------------------------------------------------------------------- the choice


def _choose(found: Estimate, config: EstimateConfig) -> Encoding | None:
    """What `--target-noise` or `--budget` asks for, of the encodings without bias, which more data does not mend.

    Raises:
        MisuseError: none of those compared reaches it; says what the nearest does.
    """
    if config.target_noise is None and config.budget is None:
        return None
    known = [
        (line.fidelity.noise_share, line)
        for line in found.encodings
        if isinstance(line.encoding, Sampled | Full) and line.fidelity is not None
    ]
    if not known:
        raise MisuseError("--target-noise, --budget: the teacher has no output matrix in memory to tell the noise by")
    if config.target_noise is not None:
        fitting = [line for noise, line in known if noise <= config.target_noise]
        if not fitting:
            noise, best = min(known, key=lambda pair: pair[0])
            raise MisuseError(
                f"--target-noise {config.target_noise:g}: the least noise of those compared is {noise:.4f} ({encoding_name(best.encoding)}); ask for more"
            )
        return min(fitting, key=lambda line: line.bytes_per_position).encoding
    budget = parse_bytes("--budget", config.budget or "")
    affordable = [(noise, line) for noise, line in known if line.total_bytes <= budget]
    if not affordable:
        least = min((line for _, line in known), key=lambda line: line.total_bytes)
        raise MisuseError(
            f"--budget {config.budget}: the smallest of those compared takes {human(least.total_bytes)} ({encoding_name(least.encoding)}); allow more, or cache fewer rows"
        )
    return min(affordable, key=lambda pair: pair[0])[1].encoding


def _write_config(config: EstimateConfig, found: Estimate) -> None:
    """The stage `cache-logits` of a YAML file, ready to run."""
    import yaml

    assert found.chosen is not None
    defaults = {f.name: f.default for f in dataclasses.fields(type(config.data))}
    data = {
        f.name: getattr(config.data, f.name)
        for f in dataclasses.fields(config.data)
        if getattr(config.data, f.name) != defaults[f.name]
    }
    capture = {
        name: getattr(config, name)
        for name in ("teacher", "teacher_revision", "attn_implementation", "device_map", "quantization", "batch_tokens")
        if getattr(config, name) is not None
    }
    if config.trust_remote_code:
        capture["trust_remote_code"] = True
    encoding = found.chosen
    knobs = {"k": "top_k", "p": "top_p", "sample_size": "sample_size"}
    capture.update(dtype=config.dtype, encoding=encoding.kind, output="runs/cache")
    capture.update({key: getattr(encoding, name) for name, key in knobs.items() if hasattr(encoding, name)})
    if not isinstance(encoding, Full):
        capture["temperature"] = list(getattr(encoding, "temperatures", [getattr(encoding, "temperature", 1.0)]))
    content = {
        "task": config.task,
        "data": {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
        "cache-logits": capture,
    }
    write_text(Path(config.write_config or ""), yaml.safe_dump(content, sort_keys=False))
