"""The steps of generation, which precedes stage 1."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.cache.format.manifest import Layout
from pipeline.cache.views.tokens import marked_tokens
from pipeline.cache.writing.claims import finished
from pipeline.cache.writing.place import plan_there
from pipeline.capture.engines.in_process import make_here
from pipeline.capture.engines.progress import is_whole, shards_of
from pipeline.capture.engines.work import Work
from pipeline.config import GenerateConfig
from pipeline.config.file import resolve
from pipeline.errors import MisuseError
from pipeline.generation.finish import finish, is_committed, open_generation
from pipeline.generation.job import GenerationJob, few_prompts, generation_layout, prepare
from pipeline.generation.records import Asked, Generation, GenerationPlan
from pipeline.generation.shard import write_shards
from pipeline.models import LoadedModel
from pipeline.records import BadRow, Receipt, ShardPlan

logger = logging.getLogger(__name__)

_SHOWN = 600


def run(config: GenerateConfig) -> Generation | None:
    """Run `softlabel generate` with the engine that the flags select.

    Returns:
        The finished data set, or None if this part is done but others are not.

    Raises:
        PipelineError: see the subclasses. No shard is half-written; the same command resumes the
            run.
    """
    found: Any
    if config.engine == "ray":
        from pipeline.capture.engines.on_ray import run_on_ray

        found = run_on_ray(GENERATION, config)
    elif config.num_workers is not None:
        from pipeline.capture.engines.workers import run_workers

        found = run_workers(GENERATION, config, config.num_workers)
    else:
        found = _here(config)
    assert found is None or isinstance(found, Generation)
    return found


def _here(config: GenerateConfig, **live: Any) -> Any:
    """Run in this process."""
    job = prepare(config, **live)
    with contextlib.closing(job.writer):
        return make_here(GENERATION, job, part=config.parsed_part)


def generate(
    model: str | Path | PreTrainedModel,
    prompts: Any = None,
    output: str | Path = "",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Generation:
    """Generate a data set with a language model.

    Args:
        model: a name, a path, or a model in memory (which needs its `tokenizer`). The model is not
            changed.
        prompts: a `datasets.Dataset` or `DatasetDict`, a list of texts, or a name or path as for
            `softlabel generate --dataset`. With `template`: labelled rows, or None.
        settings: the flags of `softlabel generate`, with underscores: `num_samples`,
            `max_new_tokens`, `temperature`, `prefix_tokens`, `drop`, ...

    Returns:
        The finished data set. Calling again with the same arguments resumes an interrupted run.

    Raises:
        PipelineError: see the subclasses.
    """
    if not str(output):
        raise MisuseError("generate: missing output=..., the directory of the data set")
    is_live = not isinstance(model, str | Path)
    if is_live and tokenizer is None:
        raise MisuseError("generate: a live model needs its tokenizer=...")
    named = isinstance(prompts, str | Path)
    live_prompts = None if prompts is None or named else _dataset(prompts)
    name = (model.config.name_or_path or type(model).__name__) if isinstance(model, PreTrainedModel) else str(model)
    given = {"model": name, "output": str(output), **settings}
    if prompts is not None:
        given["dataset"] = str(prompts) if named else "in-memory"
    config = resolve(GenerateConfig, None, {}, given)
    if not is_live and (named or prompts is None):
        finished_one = run(config)
    elif config.num_workers is not None or config.engine == "ray":
        raise MisuseError(
            "generate: workers load models and data sets by name; give names or paths, or leave num_workers out"
        )
    else:
        with _evaluating(model) if is_live else contextlib.nullcontext():
            loaded = None
            if is_live:
                assert tokenizer is not None
                loaded = LoadedModel(model, tokenizer, name)  # type: ignore[arg-type]
            finished_one = _here(config, live_model=loaded, live_prompts=live_prompts)
    if finished_one is None:
        raise MisuseError(
            f"generate: part {config.part} is done, and other parts are missing; leave part out, or call run()"
        )
    assert isinstance(finished_one, Generation)
    return finished_one


def _dataset(prompts: Any) -> Any:
    """Convert a list of texts to a data set with a column `prompt`."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence) or hasattr(prompts, "features"):
        return prompts
    import datasets

    if not all(isinstance(text, str) for text in prompts):
        raise MisuseError(
            "generate: a list of prompts holds texts; for a list of rows use datasets.Dataset.from_list(rows)"
        )
    return datasets.Dataset.from_dict({"prompt": list(prompts)})


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True, slots=True)
class GenerationWork:
    """The work of `softlabel generate`; see `Work`."""

    command: str = "generate"
    speaks: tuple[str, ...] = ("pipeline.generation.run", "pipeline.generation.prompts")

    def open_layout(self, config: GenerateConfig) -> Layout:
        """Return the layout of the output directory."""
        return generation_layout(config.output)

    def prepare(self, config: GenerateConfig) -> GenerationJob:
        """Build the job, including its model."""
        return prepare(config)

    def after_the_first(self, config: GenerateConfig) -> GenerateConfig:
        """Return the configuration of later workers: without `overwrite`."""
        return dataclasses.replace(config, overwrite=False)

    def current_plan(self, layout: Layout) -> GenerationPlan | None:
        """Return the plan of the existing run, if any."""
        return plan_there(layout, GenerationPlan)

    def outstanding(self, layout: Layout, plan: GenerationPlan, part: tuple[int, int] | None) -> list[ShardPlan]:
        """Return the missing shards of a part.

        A finished data set has none: its shards with all completions are deleted.
        """
        if is_committed(layout, plan):
            return []
        return [shard for shard in shards_of(plan, part) if finished(layout, shard) is None]

    def is_finished(self, layout: Layout, plan: GenerationPlan) -> bool:
        """Return whether there is a `generation.json` of this plan."""
        return is_committed(layout, plan)

    def opened(self, layout: Layout) -> Generation:
        """Open the data set, and check the hashes of its shards."""
        return open_generation(layout.root)

    def finish(self, layout: Layout, plan: GenerationPlan) -> Generation | None:
        """If no shard is missing, drop completions and write the card and `generation.json`."""
        if is_committed(layout, plan):
            return open_generation(layout.root)
        return finish(layout, plan) if is_whole(layout, plan) else None

    def show(self, job: GenerationJob, waiting: Sequence[ShardPlan]) -> None:
        """Log the first prompt and its completion."""
        show_first(job)

    def check_rows(self, job: GenerationJob, waiting: Sequence[ShardPlan]) -> None:
        """Do nothing; a prompt is checked when its shard is made."""

    def check(self, job: GenerationJob) -> None:
        """Check that padding does not change the logits."""
        job.writer.check(few_prompts(job), batch_tokens=job.plan.contract.batch_tokens)

    def make(
        self,
        job: GenerationJob,
        shards: Iterable[ShardPlan],
        done: Callable[[Receipt], None],
        moved: Callable[[int, int], None],
    ) -> None:
        """Make the shards: read prompts, generate and write."""
        write_shards(job, shards, done, moved)


def show_first(job: GenerationJob, *, sample: bool = True) -> None:
    """Log the first prompt as tokens, and its first completion.

    This shows a wrong template or setting at the start.
    """
    prompts = few_prompts(job)
    if not prompts:
        return
    first, split = prompts[0], job.plan.shards[0].split
    shown = marked_tokens(job.tokenizer, first.input_ids.tolist(), None)
    logger.info("first prompt of %s (%d tokens): %s", split, len(first.input_ids), _short(shown))
    if sample:
        found = job.writer.write([Asked(first, split, 0)], job.plan.contract.sampling)[0]
        if isinstance(found, BadRow):
            return
        logger.info(
            "its first completion (%d tokens, finish reason %s%s): %s",
            len(found.token_ids),
            found.finish_reason,
            "" if found.logprob is None else f", log-probability {found.logprob:.1f}",
            _short(repr(found.text)),
        )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


GENERATION: Work = GenerationWork()
