"""A language model as the teacher of a classifier: labels are scored by their text after a prompt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.forward import device_name, synchronize
from pipeline.capture.teachers.judge.labels import labels_of
from pipeline.capture.teachers.judge.prompts import (
    CONTENT_FREE,
    Prompts,
    common_prefix,
    cut_shot,
    leading_ids,
)
from pipeline.capture.teachers.judge.scores import LabelScores
from pipeline.capture.teachers.judge.shots import Shots, choose_shots
from pipeline.capture.teachers.judge.template import check_reads, read_template
from pipeline.capture.teachers.local import Computed
from pipeline.errors import MisuseError, ModelError
from pipeline.models import LoadedModel, longest_input, model_info
from pipeline.records import Encoding, JudgeInfo, Judging, ModelInfo, Tokenization, TokenizedExample
from pipeline.sources import LabelMap, Source
from pipeline.tasks import embedding_rows
from pipeline.tasks.templates import find_template, make_renderer

logger = logging.getLogger(__name__)

#: Rows, and tokens of a row's text, that are predicted twice before the first shard.
_ROWS, _SHORT = 2, 64


@dataclass(frozen=True, slots=True)
class Judge:
    """A causal language model with a prompt; the protocol says what each member is."""

    loaded: LoadedModel
    prompts: Prompts
    scores: LabelScores
    names: tuple[str, ...]
    prompt: JudgeInfo
    prior: Tensor | None
    """(V,) nats: log of the mean probability of each label after prompts without content; None: not calibrated."""

    @property
    def name(self) -> str:
        """As messages name it."""
        return self.loaded.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's; rows are the texts alone, without the prompt."""
        return self.prompts.tokenizer

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of `--label-text`, or of the data."""
        return self.names

    @property
    def info(self) -> ModelInfo:
        """The model, and the prompt."""
        return dataclasses.replace(model_info(self.loaded), judge=self.prompt)

    @property
    def device(self) -> str:
        """The device model."""
        return device_name(self.loaded)

    @property
    def longest_input(self) -> int:
        """Tokens of a text that there are positions for, beside the prompt and the longest label."""
        return self.prompts.longest_text

    @property
    def embedding_rows(self) -> int:
        """Of its input embedding."""
        return embedding_rows(self.loaded.model)

    @property
    def output_matrix(self) -> Tensor:
        """The identity: a label's score is made of many passes of the output matrix."""
        return torch.eye(self.num_classes, device=self.loaded.model.device)

    @property
    def busy(self) -> bool:
        """Always, as a local model is."""
        return True

    def describe(self, info: ModelInfo) -> str:
        """Parameters, precision, device and prompt."""
        shots = f", {len(self.prompt.shots)} examples" if self.prompt.shots else ""
        calibrated = ", calibrated" if self.prompt.calibrated else ""
        return (
            f"{self.name}: {info.num_parameters:,} parameters, {info.dtype}, on {self.device}; labels by prompt ({self.prompt.format}{shots}{calibrated}), "
            f"{self.prompts.overhead:,} tokens beside each text, {len(self.prompts.prefix):,} of them passed once"
        )

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Log-probabilities of all labels serve every encoding."""

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding) -> None:
        """Show a prompt; compare the labels' scores with those of whole prompts, one row and one label at a time.

        Raises:
            ModelError: they differ by more than the precision explains.
        """
        short = sorted((row for row in rows if row.num_tokens <= _SHORT), key=lambda row: row.num_tokens)
        if rows:
            row = min(rows, key=lambda row: row.num_tokens)
            logger.info("the prompt of a row: %r, then one of %s", *self._shown(row))
        if not short:
            return
        batch = [self.prompts.of_row(row) for row in (short[0], short[-1])[: min(len(short), _ROWS)]]
        found = self.scores(batch)
        plain = torch.cat([self.scores.plain([prompt]) for prompt in batch])
        tolerance = 1e-4 if self.loaded.model.dtype in (torch.float32, torch.float64) else 5e-2
        finite = plain.isfinite()  # those that are not are told row by row, later
        if not bool(finite.any()):
            return
        worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
        if not worst <= tolerance:
            raise ModelError(
                f"{self.name}: log-probabilities of the labels after a shared prompt differ from those of one pass for each by {worst:.2g} (expected at most "
                f"{tolerance:g}); try --attn-implementation eager, and please report this architecture"
            )

    def _shown(self, row: TokenizedExample) -> tuple[str, str]:
        ids = self.prompts.of_row(row).tolist()
        labels = (repr(self.tokenizer.decode(list(label))) for label in self.prompts.label_ids[:20])
        return str(self.tokenizer.decode(ids)), ", ".join(labels)

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Not measured: the prompt counts beside the rows."""
        raise MisuseError("--auto-batch-tokens does not measure prompts; give --batch-tokens")

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> Computed:
        """Score the labels after the prompt of each row."""
        logits = self.scores([self.prompts.of_row(row) for row in rows])
        if self.prior is not None:
            logits = logits - self.prior.to(logits)
        return Computed(logits)


def make_judge(
    loaded: LoadedModel,
    judging: Judging,
    source: Source,
    *,
    label_map: Sequence[str] = (),
    seed: int = 0,
    batch_tokens: int,
    chat_arguments: Sequence[str] = (),
) -> Judge:
    """The judge that the flags ask for.

    Args:
        loaded: a causal language model.
        seed: of the choice of examples.
        batch_tokens: of a forward pass, prompts and padding included.
        chat_arguments: `KEY=JSON` each, for the chat template.

    Raises:
        MisuseError: a template, label or number of examples that cannot be used.
    """
    tokenizer = loaded.tokenizer
    names, texts = labels_of(source, judging.label_text, label_map)
    template = read_template(judging.template)
    paired = source.columns.text_pair is not None
    check_reads(template, texts, paired=paired, shots=bool(judging.shots))
    chat = None
    if judging.format == "plain" and chat_arguments:
        raise MisuseError("--chat-template-kwargs goes with --prompt-format chat, found plain; leave one out")
    if judging.format == "chat" or (judging.format == "auto" and tokenizer.chat_template):
        chat = make_renderer(find_template(tokenizer), chat_arguments, tokenizer)
    shots = Shots((), ())
    if judging.shots:
        labels = LabelMap.for_names(source, names, label_map)
        shots = choose_shots(source, labels, names, judging.shots, seed)
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
        longest_input(loaded.model, tokenizer),
        leading_ids=leading_ids(tokenizer),
    )
    prompts = _measured(dataclasses.replace(prompts, label_ids=prompts.label_tokens()), loaded.name)
    _warn_of_prefixes(prompts)
    scores = LabelScores(loaded, prompts.label_ids, prompts.prefix, batch_tokens)
    prior = _prior(prompts, scores) if judging.calibrate else None
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
    return Judge(loaded, prompts, scores, names, prompt, prior)


def _measured(prompts: Prompts, name: str) -> Prompts:
    """With the common prefix, the tokens that each prompt takes, and how often it shows the texts.

    Raises:
        MisuseError: the model has no positions for prompt and label.
    """
    second = "" if prompts.paired else None
    empty = prompts.ids("", second)
    probes = [prompts.ids(text, second) for text in ("a", "7", "Zz")]
    marker = "softlabel-marker"
    repeats = max(prompts.text(marker, second).count(marker), 1)
    longest_label = max(map(len, prompts.label_ids))
    # A row that is an example itself gets another example in its place.
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
    texts = [text for shot in shots for text in (shot.text, shot.text_pair or "")]
    return sum(len(ids) for ids in prompts.tokenizer(texts, add_special_tokens=False)["input_ids"])


def _warn_of_prefixes(prompts: Prompts) -> None:
    """A label whose tokens begin another's is never less likely than it: tokens that follow it are not counted."""
    for i, short in enumerate(prompts.label_ids):
        for j, long in enumerate(prompts.label_ids):
            if i != j and long[: len(short)] == short:
                logger.warning(
                    "--label-text: the tokens of %r begin those of %r, so that it is never the less likely of the two; give one of them a text that begins otherwise",
                    *(prompts.label_texts[i], prompts.label_texts[j]),
                )
                return


def _prior(prompts: Prompts, scores: LabelScores) -> Tensor:
    """(V,) nats: what the model says without content, which calibration takes out (Zhao et al., 2021, section 5).

    Their W = diag(p)^-1 with b = 0: each probability is divided by the mean one over inputs without content; soft labels
    are what is left, scaled to a sum of 1.
    """
    found = scores([prompts.fitted(text, text if prompts.paired else None) for text in CONTENT_FREE])
    synchronize(found)
    return torch.log_softmax(found, dim=-1).exp().mean(0).log()
