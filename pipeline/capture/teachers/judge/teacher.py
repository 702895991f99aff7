"""A language model as the teacher of a classifier: it scores label texts after a prompt."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.forward import synchronize
from pipeline.capture.teachers.judge.labels import labels_of
from pipeline.capture.teachers.judge.prompts import (
    CONTENT_FREE,
    Prompts,
    common_prefix,
    cut_shot,
    leading_ids,
)
from pipeline.capture.teachers.judge.scorer import BegunScores, Scorer
from pipeline.capture.teachers.judge.shots import Shots, choose_shots
from pipeline.capture.teachers.judge.template import check_reads, read_template
from pipeline.capture.teachers.protocol import Keep
from pipeline.errors import BadRowError, MisuseError
from pipeline.records import Contract, Encoding, JudgeInfo, Judging, ModelInfo, Tokenization, TokenizedExample
from pipeline.sources import LabelMap, Source
from pipeline.tasks.chats.templates import find_template, make_renderer, with_day

logger = logging.getLogger(__name__)

#: For the check before the first shard: the longest row in tokens that is predicted twice, and the
#: number of labels that are compared.
_SHORT, _LABELS = 512, 8
#: Number of characters of a prompt that are logged.
_SHOWN = 1200


@dataclass(frozen=True, slots=True)
class Judge:
    """A teacher with a causal language model and a prompt; see `Teacher` for the members."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    """The language model's tokenizer; rows are the texts alone, without the prompt."""
    prompts: Prompts
    names: tuple[str, ...]
    prompt: JudgeInfo
    """The prompt's entry in the contract."""
    chat_arguments: tuple[str, ...]
    """Chat template arguments, `KEY=JSON` each: the given ones, and the date if the template
    depends on it."""
    prior: Tensor | None
    """(V,) nats: log of the mean probability of each label after prompts without content; None: not
    calibrated."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.scorer.name

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of `--label-text`, or of the data's labels."""
        return self.names

    @property
    def info(self) -> ModelInfo:
        """The model and the prompt."""
        return dataclasses.replace(self.scorer.info, judge=self.prompt)

    @property
    def device(self) -> str:
        """The device of the language model."""
        return self.scorer.device

    @property
    def longest_input(self) -> int:
        """The largest number of tokens of a text that fits beside prompt and longest label."""
        return self.prompts.longest_text

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the input embedding."""
        return self.scorer.embedding_rows

    @property
    def output_matrix(self) -> Tensor:
        """The identity: a label of several tokens has no row of its own in an output matrix."""
        return torch.eye(self.num_classes)

    @property
    def busy(self) -> bool:
        """Whether the scorer is busy."""
        return self.scorer.busy

    def describe(self, info: ModelInfo) -> str:
        """Return the scorer's description, and that of the prompt."""
        shots = f", {len(self.prompt.shots)} examples" if self.prompt.shots else ""
        calibrated = ", calibrated" if self.prompt.calibrated else ""
        return (
            f"{self.scorer.describe(info)}; labels by prompt ({self.prompt.format}{shots}{calibrated}), "
            f"{self.prompts.overhead:,} tokens beside each text, {len(self.prompts.prefix):,} of them processed once"
        )

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """Add the arguments of the prompt's chat template."""
        return dataclasses.replace(tokenization, chat_template_kwargs=self.chat_arguments)

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Accept every encoding: the log-probabilities of all labels are available."""

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding, keep: Keep | None = None) -> None:
        """Log a prompt, and let the scorer check its scores on short prompts.

        Raises:
            PipelineError: the check fails.
        """
        by_length = sorted(rows, key=lambda row: row.num_tokens)
        found = list(self._of(by_length).items())
        if not found:
            return
        logger.info("the prompt of a row: %r, then one of %s", *self._shown(found[0][1]))
        prompts = [prompt for i, prompt in found if by_length[i].num_tokens <= _SHORT]
        if prompts:
            self.scorer.compare(
                two_lengths(prompts, self.prompts), self.prompts.label_ids[:_LABELS], self.prompts.prefix
            )

    def _of(self, rows: Sequence[TokenizedExample]) -> dict[int, np.ndarray]:
        """Return row index -> prompt for the rows whose text fits."""
        found = {}
        for i, row in enumerate(rows):
            try:
                found[i] = self.prompts.of_row(row)
            except BadRowError as error:
                logger.warning("row %d: %s", row.source_row, error)
        return found

    def _shown(self, prompt: np.ndarray) -> tuple[str, str]:
        ids = prompt.tolist()
        labels = (repr(self.prompts.tokenizer.decode(list(label))) for label in self.prompts.label_ids[:20])
        text = str(self.prompts.tokenizer.decode(ids))
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}", ", ".join(labels)

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Raise `MisuseError`: the measurement would not include the prompts."""
        raise MisuseError("--auto-batch-tokens does not measure prompts; give --batch-tokens")

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> _Begun:
        """Start to score the labels after each row's prompt; NaN for rows that do not fit."""
        found = self._of(rows)
        scores = scored(self.scorer, self.prompts, list(found.values())) if found else None
        return _Begun(scores, self.prior, tuple(found), len(rows), self.num_classes)

    def close(self) -> None:
        """Close the scorer."""
        self.scorer.close()


@dataclass(frozen=True, slots=True)
class _Begun:
    scores: BegunScores | None
    prior: Tensor | None
    places: tuple[int, ...]
    """Indices of the rows that have scores."""
    rows: int
    num_classes: int

    def result(self) -> Tensor:
        """Wait for the (N, V) log-probabilities of the labels, up to a constant per row."""
        if self.scores is None:
            return torch.full((self.rows, self.num_classes), torch.nan)
        found = self.scores.result()
        synchronize(found)
        found = found if self.prior is None else found - self.prior.to(found)
        if len(found) == self.rows:
            return found
        whole = found.new_full((self.rows, self.num_classes), torch.nan)
        whole[list(self.places)] = found
        return whole


def two_lengths(rows: Sequence[np.ndarray], prompts: Prompts) -> list[np.ndarray]:
    """Return the first prompt and the next one of another length, to check a padded batch.

    Both begin with the common prefix, if any prompt does. If all prompts have the same length, the
    second one is the prompt without a text.
    """
    size = len(prompts.prefix)
    alike = [ids for ids in rows if np.array_equal(ids[:size], prompts.prefix)] or list(rows)
    bare = prompts.ids("", "" if prompts.paired else None)
    return [alike[0], next(ids for ids in (*alike, bare) if len(ids) != len(alike[0]) or ids is bare)]


def scored(scorer: Scorer, prompts: Prompts, batch: Sequence[np.ndarray]) -> BegunScores:
    """Start to score a batch of prompts."""
    return scorer.begin(batch, prompts.label_ids, prompts.prefix)


def make_judge(
    scorer: Scorer,
    judging: Judging,
    source: Source,
    *,
    label_map: Sequence[str] = (),
    seed: int = 0,
    chat_arguments: Sequence[str] = (),
    begun: Contract | None = None,
) -> Judge:
    """Build the judge that the flags select.

    Args:
        seed: seed of the choice of examples.
        chat_arguments: `KEY=JSON` each, for the chat template.
        begun: the contract of an existing cache, whose examples are kept.

    Raises:
        MisuseError: an unusable template, label or number of examples. The scorer is closed then.
    """
    try:
        return _make_judge(scorer, judging, source, label_map, seed, chat_arguments, begun)
    except BaseException:
        scorer.close()
        raise


def _make_judge(
    scorer: Scorer,
    judging: Judging,
    source: Source,
    label_map: Sequence[str],
    seed: int,
    chat_arguments: Sequence[str],
    begun: Contract | None,
) -> Judge:
    # Another thread tokenizes rows ahead, and each call changes the truncation setting that is
    # stored in a fast tokenizer.
    own, tokenizer = copy.deepcopy(scorer.tokenizer), copy.deepcopy(scorer.tokenizer)
    own.truncation_side = tokenizer.truncation_side = "right"  # a text keeps its beginning
    names, texts = labels_of(source, judging.label_text, label_map)
    template = read_template(judging.template)
    paired = source.columns.text_pair is not None
    check_reads(template, texts, paired=paired, shots=bool(judging.shots))
    chat = None
    if judging.format == "plain" and chat_arguments:
        raise MisuseError("--chat-template-kwargs goes with --prompt-format chat, found plain; leave one out")
    if judging.format == "chat" or (judging.format == "auto" and tokenizer.chat_template):
        found = find_template(tokenizer)
        chat_arguments = with_day(found, chat_arguments)
        chat = make_renderer(found, chat_arguments, tokenizer)
    shots = Shots((), ())
    if judging.shots:
        labels = LabelMap.for_names(source, names, label_map)
        there = None if begun is None else begun.teacher.judge
        shots = choose_shots(source, labels, names, judging.shots, seed, there.shots if there is not None else ())
        shots = Shots(
            *(
                tuple(cut_shot(tokenizer, shot, judging.shot_tokens) for shot in part)
                for part in (shots.chosen, shots.reserve)
            )
        )
    prompts = Prompts(
        tokenizer,
        template,
        chat,
        texts,
        shots,
        paired,
        scorer.positions,
        leading_ids=leading_ids(tokenizer),
    ).opened()
    prompts = _measured(dataclasses.replace(prompts, label_ids=prompts.label_tokens()), scorer.name)
    _warn_of_prefixes(prompts)
    prior = _prior(scorer, prompts) if judging.calibrate else None
    if prior is not None:
        shown = ", ".join(f"{name} {share:.3f}" for name, share in zip(names[:20], prior.exp().tolist(), strict=False))
        logger.info("calibration: the labels' prior, from prompts without content, is %s", shown)
    prompt = JudgeInfo(
        template.lines,
        "plain" if chat is None else "chat",
        texts,
        tuple(shot.place for shot in shots.chosen),
        judging.shot_tokens if judging.shots else None,
        judging.calibrate,
    )
    return Judge(scorer, own, prompts, names, prompt, tuple(chat_arguments), prior)


def _measured(prompts: Prompts, name: str) -> Prompts:
    """Return the prompts with their common prefix, overhead and number of repeats.

    Raises:
        MisuseError: the model has too few positions for prompt and label.
    """
    second = "" if prompts.paired else None
    empty = prompts.ids("", second)
    probes = [prompts.ids(text, second) for text in ("a", "7", "Zz")]
    marker = "softlabel-marker"
    repeats = max(prompts.text(marker, second).count(marker), 1)
    longest_label = max(map(len, prompts.label_ids))
    # A row that is an example itself gets a spare example instead.
    spare = max((_size(prompts, [shot]) for shot in prompts.shots.reserve), default=0)
    least = min((_size(prompts, [shot]) for shot in prompts.shots.chosen), default=0)
    overhead = len(empty) + longest_label + max(spare - least, 0)
    found = dataclasses.replace(prompts, prefix=common_prefix([*probes, empty]), overhead=overhead, repeats=repeats)
    if found.longest_text < 2:
        raise MisuseError(
            f"{name}: the prompt without a text takes {overhead:,} tokens, and the model has positions for {prompts.positions:,}; "
            "use fewer --shots, a smaller --shot-tokens or a shorter --prompt-template"
        )
    return found


def _size(prompts: Prompts, shots: Sequence[Any]) -> int:
    texts = [text for shot in shots for text in (shot.shown, shot.shown_pair or "")]
    return sum(len(ids) for ids in prompts.tokenizer(texts, add_special_tokens=False)["input_ids"])


def _warn_of_prefixes(prompts: Prompts) -> None:
    """Warn if the tokens of one label begin those of another.

    Such a label is never less likely than the longer one, because the tokens after it do not count.
    """
    for i, short in enumerate(prompts.label_ids):
        for j, long in enumerate(prompts.label_ids):
            if i != j and long[: len(short)] == short:
                logger.warning(
                    "--label-text: the tokens of %r begin those of %r, so that the first label is never less likely than the second; give one of them a text that begins differently",
                    *(prompts.label_texts[i], prompts.label_texts[j]),
                )
                return


def _prior(scorer: Scorer, prompts: Prompts) -> Tensor:
    """Return the (V,) log prior of the labels in nats (Zhao et al., 2021, section 5).

    Calibration divides by the prior.

    Their W = diag(p)^-1 with b = 0: each probability is divided by its mean over inputs without
    content, and the result is normalized to a sum of 1.
    """
    batch = [prompts.fitted(text, text if prompts.paired else None) for text in CONTENT_FREE]
    found = scored(scorer, prompts, batch).result()
    return torch.log_softmax(found, dim=-1).exp().mean(0).log()
