"""Every in-memory type, in the order in which data flows through them: one page, longer than others, so that there is one to read first.

    source -> Example -> TokenizedExample -> teacher -> SoftLabels -> shard -> Manifest        capture
    Manifest -> shard -> RowBlock -> StudentBatch -> loss -> student -> EvaluationReport       training

Shape letters, used everywhere: B batch, T tokens, N supervised positions, K kept classes, V
classes, G temperatures.

A position's target is one distribution over V classes. Several independent ones (labels of which a
text may have none or all) are several positions of two classes. A score is a position of one class,
V = 1, whose logit is the score itself, in the unit of the data.

Row n of a `SoftLabels` is the prediction *made at* supervised position n. A sequence classifier
makes one per example. A causal language model makes one per supervised token position t, and it
predicts token t + 1: the hard label of position t is `input_ids[t + 1]`. The last token of a row
and the last token of a document are never supervised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import MisuseError

if TYPE_CHECKING:  # records are read by `--help`, which must not wait for torch
    import pyarrow as pa
    from torch import Tensor

#: What the losses and `transformers` skip: a position without a hard label. Where labels are
#: scores, nan is.
NO_LABEL = -100

Scalar = str | int | float | bool | None

#: What a command would do, as `--dry-run` prints it: what is told, and what there is to say of it.
Outline = tuple[tuple[str, str], ...]

#: Which turns of the assistant are learnt: all of them, in one row if they have one context; each
#: in a row; the last.
AssistantTurns = Literal["auto", "all", "each", "last"]

#: Where hard labels come from: a value of the source for each row, or for each position; or the
#: text itself: the token that follows a position, the one that the input hides there, or the one of
#: a target text that stands there.
LabelSource = Literal["row", "positions", "tokens", "hidden", "target"]

#: What the label column of a data set holds: one class a row (of words one a word), the classes
#: that a row has, scores, or answers that stand in a text.
LabelColumn = Literal["class", "classes", "scores", "answers"]

#: What a position's target is: a distribution over classes, or one number.
TargetKind = Literal["distribution", "score"]

#: What the label names of a cache are of: the classes of every position; the positions of every
#: row, of which each is one label that is there or not; the choices of every row, by their numbers;
#: or two positions whose classes are the places of the row's tokens. Models state neither of the
#: last two.
LabelNames = Literal["classes", "positions", "choices", "places"]

#: What a model reads: token ids, the pixel values of an image, or the token ids of several texts of
#: which one is chosen.
Inputs = Literal["tokens", "images", "choices"]

#: How a student with another tokenizer learns from a cache: the stored texts or words are tokenized
#: anew, the tokens of both are aligned by their bytes, or, of images, its own image processor reads
#: the stored images.
OtherTokenizers = Literal["texts", "bytes", "words", "images"]


# ------------------------------------------------------------------------------------------------ source -> tokens


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a data set holds what. `None`: there is no such column."""

    text: str | None = "text"
    text_pair: str | None = None
    image: str | None = None
    """Images, or the paths of their files. Manifests leave it out where there is none."""
    choices: tuple[str, ...] = ()
    """Lists of texts to choose from, or one column for each choice. Manifests leave it out where
    there is none."""
    words: str | None = None
    """Lists of words, of which each has a label."""
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: str | None = None
    labels: str | None = None
    label: str | None = "label"
    keep: tuple[str, ...] = ()
    group: str | None = None
    """Whose rows of one value are compared with each other: the query of some documents. Manifests
    leave it out where there is none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str | None
    """None: the turn is made of `fields` alone, a tool call for example."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """What else the turn has, for the chat template: `tool_calls`, `reasoning_content` and so
    on."""
    learnt: bool = True
    """False: only context, where the template would mark it as the assistant's."""


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image: the bytes of a PNG, JPEG or other file."""

    data: bytes
    path: str | None = None
    """The file's name, for people: its last part. Of a cache that refers to images, where the file
    lies below `SOFTLABEL_IMAGES`."""
    file: str | None = None
    """Where the file lies below the directory that holds the data set: the data set's name, and the
    path in it. None: it is no file, or lies elsewhere."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a source, columns mapped, not tokenized. Exactly one of the six inputs is set."""

    source_row: int
    text: str | None = None
    text_pair: str | None = None
    choices: tuple[str, ...] | None = None
    """Beside `text`: of these one is chosen; `text_pair` begins each."""
    image: Image | None = None
    words: tuple[str, ...] | None = None
    word_labels: tuple[int, ...] | None = None
    """Class ids, one a word, -100 where a word has none; None: the row has no labels."""
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, object], ...] | None = None
    """Chats only: the descriptions of the tools, for the chat template."""
    prompt_completion: tuple[str, str] | None = None
    input_ids: tuple[int, ...] | None = None
    token_labels: tuple[int, ...] | None = None
    """Pre-tokenized rows only: -100 where a token is not to be learnt, aligned with `input_ids`
    (not shifted)."""
    label: int | None = None
    flags: tuple[int, ...] | None = None
    """Several labels at once: 1 for each of the model's labels that the row has, 0 for the others,
    -100 where it is not known."""
    scores: tuple[float, ...] | None = None
    """One for each of the model's outputs, nan where it is not known."""
    answers: tuple[tuple[int, int], ...] | None = None
    """Characters `[start, end)` of `text_pair` that answer `text`; (): none does. None: not
    known."""
    group: int | None = None
    """Rankings: a hash of the value that the rows of one list share."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens a masked language model predicts."""

    share: float = 0.15
    """Of the tokens of a row that are hidden."""
    whole_words: bool = False
    """Hide all tokens of a word or none."""
    copies: int = 1
    """Rows made of each text, each with another mask."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Views:
    """Random parts of each image, each a row of its own: teacher and students see the same ones (Shen and Xing, 2022)."""

    count: int
    """Rows made of each image of the split `train`; other splits have the whole image, once."""
    smallest: float = 0.08
    """Share of the image's area that a part has at least."""
    mirror: bool = True
    """Whether half of the parts are mirrored, left to right."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise MisuseError(f"--views: expected at least 1, found {self.count}")
        if not 0 < self.smallest <= 1:
            raise MisuseError(f"--view-area: expected a share above 0, at most 1, found {self.smallest}")

    def rows_of_an_image(self, split: str) -> int:
        """`count` for the split `train`; 1 for the others."""
        return self.count if split == "train" else 1


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How texts become tokens: all that decides `input_ids`, beside the tokenizer itself.

    An image counts as one token.

    Manifests leave out the settings of chats and prompts where they are empty.
    """

    max_length: int
    packing: bool = False
    isolate_documents: bool = False
    """Packed rows only: attention and positions start anew at every document."""
    assistant_turns: AssistantTurns | None = None
    """Chats: which turns are learnt, and in how many rows. None in a contract: as the chat template
    marks them."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Chats: `KEY=JSON` each, sorted: keyword arguments of the chat template."""
    truncation_side: Literal["left"] | None = None
    """Chats, prompts and token ids with labels: where a row that is too long loses tokens. None: at
    its end."""
    masking: Masking | None = None
    """Masked language models. Manifests leave it out where there is none."""
    views: Views | None = None
    """Images. Manifests leave it out where rows are whole images."""
    num_choices: int | None = None
    """The most choices that a row has. Manifests leave it out where rows have none."""
    stride: int | None = None
    """Question answering: tokens that two windows of a text share; None: as the task does.
    Manifests leave it out where it is not given."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens that a source row has lost to the longest row allowed."""

    source_row: int
    tokens: int
    supervised: int = 0
    """Those of them that were to be learnt."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row of a cache before the teacher has seen it: a text, a piece of a long one, several packed, or an image."""

    source_row: int
    piece: int
    input_ids: np.ndarray
    """(T,) int32; of an image (0,)."""
    supervised: np.ndarray | None = None
    """(T,) bool: the positions that carry soft labels. None: the task has one position per example,
    or one for each of the model's labels."""
    token_type_ids: np.ndarray | None = None
    label: int | None = None
    labels: np.ndarray | None = None
    """(N,) int32: the hard label of each supervised position, -100 where there is none; of scores
    float32, nan where there is none. None: the task has none by position."""
    words: tuple[str, ...] | None = None
    """(N,) the words that the supervised positions are the beginnings of."""
    group: int | None = None
    """As in `Example`."""
    text: str | None = None
    """Language models, where it is kept: the part of the source's text that the tokens cover."""
    text_pair: str | None = None
    image: Image | None = None
    view: np.ndarray | None = None
    """(5,) int32: left, top, width and height of the part of the image that is seen, in pixels, and
    1 where it is mirrored; (0,): the whole image. None: no row is a part."""
    messages: str | None = None
    """Chats, where they are kept: JSON of the turns that the row was rendered from, the tools, and
    the numbers of the turns that it learns."""
    document_lengths: np.ndarray | None = None
    """Lengths in tokens of the isolated documents that the row is packed from, int32; None:
    attention is not cut. Of choices their lengths, 0 where the row has fewer than others."""
    choices: tuple[str, ...] | None = None
    """As in `Example`, where the texts are kept."""
    num_classes: int | None = None
    """Question answering: V, the places that the longest row may have; not stored."""
    text_bytes: int = 0
    """UTF-8 bytes of the text that the supervised positions predict."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    cut: tuple[Cut, ...] = ()
    """What was cut off, of each source row in it that lost some; not stored."""
    split_chats: tuple[int, ...] = ()
    """Rows of each chat that is more than one, and has its first row here; not stored."""

    @property
    def num_tokens(self) -> int:
        """T; 1 for an image."""
        return len(self.input_ids) if self.image is None else 1

    @property
    def num_positions(self) -> int:
        """N of this row."""
        if self.labels is not None:
            return len(self.labels)
        return 1 if self.supervised is None else int(self.supervised.sum())


def offsets_of_counts(counts: np.ndarray) -> np.ndarray:
    """(R,) counts -> (R + 1,) offsets, int64."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list of numbers for each of R rows: the numbers of all rows one after another."""

    values: np.ndarray
    """(sum of the counts,)."""
    counts: np.ndarray
    """(R,) integers: how many numbers each row has."""
    offsets: np.ndarray
    """(R + 1,) int64: row r owns `values[offsets[r]:offsets[r + 1]]`."""

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> Ragged:
        """With the offsets that the counts make."""
        return cls(values, counts, offsets_of_counts(counts))


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """The tokens and labels of R rows, by column: what a task collates."""

    input_ids: Ragged
    supervised: Ragged | None = None
    """As in `TokenizedExample`; None: one position a row."""
    token_type_ids: Ragged | None = None
    document_lengths: Ragged | None = None
    label: np.ndarray | None = None
    """(R,) int64, -100 where there is none; None: the task has no label a row."""
    labels: Ragged | None = None
    """One a supervised position, -100 (of scores nan) where there is none; None: the task has none
    by position."""
    images: Sequence[Image] | None = None
    """(R,) images; None: rows are tokens."""
    views: Ragged | None = None
    """As in `TokenizedExample`."""
    num_classes: int | None = None
    """V of the cache; None: not known, or of no use to the task."""


def is_known(labels: Any) -> Any:
    """(N,) hard labels, a NumPy array or a tensor -> (N,) bool: which of them are known; class ids but -100, scores but nan."""
    is_float = labels.dtype.kind == "f" if isinstance(labels, np.ndarray) else labels.is_floating_point()
    return labels == labels if is_float else labels != NO_LABEL


# ---------------------------------------------------------------------------------------------------- soft labels


@dataclass(frozen=True, slots=True)
class Full:
    """All V log-probabilities of every position. The default for classifiers."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest, and the exact mass outside them at each temperature of a grid."""

    k: int
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    kind: Literal["top-k"] = "top-k"


@dataclass(frozen=True, slots=True)
class TopP:
    """The fewest classes whose mass reaches p, and the exact mass outside them at each temperature of a grid."""

    p: float
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    kind: Literal["top-p"] = "top-p"


@dataclass(frozen=True, slots=True)
class Sampled:
    """Every class of at least 1/c exactly, an unbiased sample of the rest at weight 1/c (c = `sample_size`).

    The default for language models: E[target] = q, at about c classes or fewer a position. c = 25
    because there 24 bytes a position hold 1.4% of the noise of one drawn label, less than 50 draws
    with replacement do in 61 (`make bench-encodings`): students learn as much from either. Half the
    bytes have four times the noise; twice the bytes save only noise that more text averages away as
    well.
    """

    sample_size: float = 25.0
    temperature: float = 1.0
    steps: int = 0
    """The top's weights are stored as whole numbers of 1/steps, rounded without bias. 0:
    `top_steps(sample_size)`."""
    kind: Literal["sampled"] = "sampled"

    def __post_init__(self) -> None:
        if not 1 <= self.sample_size < math.inf:
            raise MisuseError(f"sample_size: expected at least 1, found {self.sample_size}")
        if not 0 < self.temperature < math.inf:
            raise MisuseError(f"temperature: expected above 0, found {self.temperature}")
        if not self.steps:
            object.__setattr__(self, "steps", top_steps(self.sample_size))
        if not 1 <= self.steps <= _MOST_STEPS:
            raise MisuseError(f"steps: expected 1 to {_MOST_STEPS}, found {self.steps}")


def top_steps(sample_size: float) -> int:
    """How finely the top's weights are stored.

    On news text the rounding adds 0.9% to the variance of sampling, at c = 18, 25 and 54 alike.
    """
    return min(math.ceil(3.2 * sample_size), _MOST_STEPS)


#: What fits uint16.
_MOST_STEPS = 65_535


@dataclass(frozen=True, slots=True)
class Score:
    """The score of every position as the teacher gives it: no distribution, and nothing to leave out."""

    kind: Literal["score"] = "score"


Encoding = Full | TopK | TopP | Sampled | Score


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """What a teacher believes at N positions: top + tail + log-residuals.

    Ragged: position n owns `[offsets[n]:offsets[n + 1]]`.
    """

    encoding: Encoding
    num_classes: int
    top_offsets: Tensor
    """(N + 1,) int64."""
    top_ids: Tensor
    """(sum K,) int64, by falling probability (`full`: by id)."""
    top_logprobs: Tensor
    """(sum K,) float32, nats, of softmax(z), or of softmax(z / T) for `sampled`; there, once
    narrow, of a whole number of 1/steps, which may be 0. `score`: the score."""
    tail_offsets: Tensor
    """(N + 1,) int64."""
    tail_ids: Tensor
    """(sum K,) int64, rising. Each has the weight 1 / sample_size."""
    log_residuals: Tensor
    """(N, G) float32, nats: log of the mass outside the top at each temperature of the grid. G = 0
    for `full`, `sampled`."""

    def __len__(self) -> int:
        return self.top_offsets.numel() - 1


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """What the full logits say and the kept classes do not, per position, nats."""

    nll: Tensor
    """(N,) float32, -log softmax(z)[hard label], of scores the squared error; 0 where there is no
    hard label."""
    entropy: Tensor
    """(N,) float32, of the distribution whose log-probabilities are kept (T = 1, or the T of
    `sampled`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """The distribution a student is trained towards at N positions: ragged weights, and one bucket for the rest."""

    num_classes: int
    offsets: Tensor
    """(N + 1,) int64."""
    ids: Tensor
    """(sum K,) int64."""
    weights: Tensor
    """(sum K,) float: probabilities, or unbiased estimates of them (then they need not sum to 1);
    `score`: the scores."""
    log_residual: Tensor | None
    """(N,) float, log of the teacher's mass outside `ids`; None: there is none to match."""
    negative_entropy: Tensor
    """(N,) float, nats: sum_i q_i log q_i of each position, which turns a cross-entropy into a KL
    (`sampled`: the mean over the row)."""
    unit: Tensor | None = None
    """(N,) float, scores alone: the standard deviation of the teacher's scores of the position's
    output, in which differences are taken."""
    group: Tensor | None = None
    """(N,) int64, scores alone: which positions are compared with each other; None: the data names
    no groups."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """A linear map of distributions: the mass of teacher token t goes to student token `first_token[t]`.

    A target that is unbiased stays so: E[M q_hat] = M q, where M has one 1 in each column.
    """

    first_token: np.ndarray
    """(V of the teacher,) int64; -1 where the student has no token for it: its mass is left out."""
    num_classes: int
    """V of the student."""
    is_special: np.ndarray
    """(V of the student,) bool: stands for no text."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Stretches of text where the tokens of teacher and student begin and end together, over N positions of the student.

    The student's log-probability of a span is the sum over its positions of those of their hard
    labels: the tokens of the text.
    """

    owner: Tensor
    """(N,) int64: the span that the position's hard label is a token of; -1: none."""
    teacher_logprobs: Tensor
    """(S,) float, nats: the teacher's log-probability of the span's text, the sum over its own
    tokens."""
    weights: Tensor
    """(S,) float, at least 0: how much each span counts; 0 for those of the rows that do not
    count."""

    def __len__(self) -> int:
        return self.teacher_logprobs.numel()


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How faithful an encoding's target is, measured on a sample of positions with all V logits at hand; `softlabels.fidelity` has the formulas."""

    positions: int
    kept: float
    """Classes a position."""
    kept_mass: Mapping[str, float]
    """Temperature -> the teacher's mass on the classes that are kept for certain."""
    kl: float | None
    """Nats a position, KL(teacher || target); None where the target gives classes of the teacher no
    mass."""
    noise: float
    noise_share: float
    """The noise over that of one hard label drawn from the teacher."""
    bias: float | None
    """None: of one position it is not known."""
    angle: float
    """Degrees, between the gradients with this target and with the whole distribution."""
    norm_ratio: float
    """Of the lengths of those gradients."""


@dataclass(frozen=True, slots=True)
class EstimatedEncoding:
    """What one encoding would cost and lose."""

    encoding: Encoding
    bytes_per_position: float
    """Of all columns, in Parquet."""
    total_bytes: int
    num_shards: int
    hours: float
    """Of one device like the pilot's: the teacher's pass and the encoding after it."""
    overhead: float
    """Seconds of encoding over those of the teacher's pass."""
    decoded_per_second: float
    """Positions that one thread reads back."""
    fidelity: Fidelity | None


@dataclass(frozen=True, slots=True)
class EstimatedColumn:
    """What a column that is stored on request takes, whatever the encoding."""

    flag: str
    bytes_per_position: float
    """In Parquet."""
    total_bytes: int
    included: bool
    """Whether the figures of the encodings have it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `softlabel estimate` found out; the totals are the pilot's, scaled up by source rows."""

    teacher: str
    source: str
    temperature: float
    pilot_rows: int
    pilot_positions: int
    rows: int
    """Of all splits."""
    tokens: int
    positions: int
    tokens_per_second: float
    encodings: tuple[EstimatedEncoding, ...]
    chosen: Encoding | None = None
    scale_tokens: float | None = None
    gpus: int = 1
    columns: tuple[EstimatedColumn, ...] = ()
    """Of language models."""


# ----------------------------------------------------------------------------------------------- the cache on disk


PromptFormat = Literal["chat", "plain"]
"""Whether a rendered prompt is the user's message in the tokenizer's chat template, or the text
itself."""


@dataclass(frozen=True, slots=True)
class Judging:
    """How a language model labels texts by prompt, as the flags of `cache-logits` say it."""

    template: str | None = None
    """File of a Jinja template, or the template itself; None: the built-in one."""
    label_text: tuple[str, ...] = ()
    """`NAME=TEXT` or `NAME` each; none: the names of the data's labels."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """auto: chat where the tokenizer has a chat template."""
    shots: int = 0
    shot_tokens: int = 64
    """Longest text of an example, in tokens."""
    calibrate: bool = False


@dataclass(frozen=True, slots=True)
class JudgeInfo:
    """The prompt of a language model that labels texts, with everything about it that changes a label's probability."""

    template: tuple[str, ...]
    """Lines of the Jinja template."""
    format: PromptFormat
    label_texts: tuple[str, ...]
    """What the model reads for each class, in the order of the classes."""
    shots: tuple[str, ...] = ()
    """`SPLIT:ROW` of the source rows that are the examples, in the order of the prompt."""
    shot_tokens: int | None = None
    calibrated: bool = False


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A teacher behind a server: what it was asked, and what it says of itself."""

    api: Literal["vllm", "sglang"]
    version: str
    """Of the server's software."""
    top_logprobs: int
    """Classes that were asked of each position."""
    residual_error: float
    """Mass: the mass outside the top is 1 - the mass of the top, as exact as the server's float32
    log-probabilities."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Precision, quantization and so on, where it says so."""


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """What a server said of one short row when a capture began, N positions; later answers are compared with it."""

    input_ids: tuple[int, ...]
    """Of the row."""
    top_ids: tuple[tuple[int, ...], ...]
    """(N, K)."""
    top_logprobs: tuple[tuple[float, ...], ...]
    """(N, K), nats."""
    own_logprobs: tuple[float, ...]
    """(N,), nats: of the token that follows."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model made the logits, and everything about its loading that changes one."""

    name: str
    revision: str | None
    architecture: str
    weights_sha256: str
    num_parameters: int
    dtype: str
    attn_implementation: str | None
    quantization: str | None = None
    adapter_sha256: str | None = None
    compiler: str | None = None
    """The backend of `torch.compile`; None: not compiled."""
    base_model: str | None = None
    """What `--base-model` named in place of the adapter's own base."""
    judge: JudgeInfo | None = None
    """A language model that labels by prompt: with which. None: the model has a head for the
    task."""
    server: ServerInfo | None = None
    """Of a teacher behind a server; None: local weights. Manifests leave it out where it is
    empty."""


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """Which tokenizer made the token ids."""

    sha256: str
    """Of vocabulary, merges, normalisation and special tokens: all that makes two tokenizers give
    the same ids."""
    chat_template_sha256: str | None
    vocabulary_size: int
    special_ids: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class UnlabelledSource:
    """A data set whose rows were added to the training split without labels."""

    name: str
    revision: str | None
    rows: int


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Which data set was read, and how."""

    name: str
    config: str | None
    revision: str | None
    columns: Columns
    fingerprints: Mapping[str, str]
    """Split -> SHA-256 over the columns that were read; `files-` and the SHA-256 of the list of
    Parquet files that were read in place."""
    holdout: float = 0.0
    rows: tuple[int, int | None] | None = None
    """`--rows`: the rows `[start, stop)` of each split, which alone were read; None: all."""
    label_map: tuple[str, ...] = ()
    """`--label-map`: `DATA=MODEL` each, sorted. Manifests leave it out where it is empty."""
    unlabelled_sources: tuple[UnlabelledSource, ...] = ()
    """`--unlabelled`: whose rows stand behind the others of `train`, in this order. Manifests leave
    it out where it is empty."""


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything that decides what a cache holds.

    Two captures of one contract may share a directory.
    """

    task: str
    encoding: Encoding
    num_classes: int
    """V of the soft labels: classes beyond the tokenizer's vocabulary (padded embedding rows) are
    not part of it."""
    label_names: tuple[str, ...] | None
    teacher: ModelInfo
    tokenizer: TokenizerInfo
    source: SourceInfo
    tokenization: Tokenization
    store_text: bool
    batch_tokens: int
    seed: int
    versions: Mapping[str, str]
    columns: Mapping[str, str]
    """Name and type of each column of the shards."""
    on_bad_row: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: the source rows `[start, stop)` of a split."""

    name: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A source row that was set aside."""

    split: str
    source_row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Moments:
    """Of some numbers."""

    count: int
    mean: float
    deviation: float
    """Sum of the squared distances from the mean."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of some scores, by output: what they are learnt in."""

    mean: np.ndarray
    """(outputs,) float32."""
    std: np.ndarray
    """(outputs,) float32, above 0: 1 where the scores do not vary."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One line of the shard table."""

    name: str
    split: str
    rows: int
    positions: int
    tokens: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    footer_sha256: str = ""
    """Of what Parquet says of columns and pages, which its page checksums do not cover: checked
    whenever a shard is opened."""
    moments: tuple[Moments, ...] = ()
    """Of the teacher's scores, one for each output, from which students take their unit. Manifests
    leave it out where there are none."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one finished shard leaves beside it: proof of work, and where it was made."""

    shard: Shard
    plan: ShardPlan
    batches: tuple[tuple[int, int], ...]
    """The batch plan: rows and padded length of each forward pass."""
    device: str
    seconds: float
    forward_seconds: float
    bad_rows: tuple[BadRow, ...] = ()
    fidelity: Fidelity | None = None
    """The first shard's: of a sample of its positions."""
    cut_rows: int = 0
    """Source rows that lost tokens to the longest row allowed."""
    cut_tokens: int = 0
    """Tokens that they lost."""
    unlabelled_rows: int = 0
    """Source rows without a label."""
    blank_rows: int = 0
    """Source rows with a text of white space alone."""
    cut_supervised_rows: int = 0
    """Those of these source rows that lost tokens that were to be learnt."""
    split_chats: int = 0
    """Chats that are several rows, since the turns of the assistant have not one context."""
    split_chat_rows: int = 0
    """Rows that they are."""


@dataclass(frozen=True, slots=True)
class SplitContents:
    """Counts over the source rows of one split."""

    rows: int
    unlabelled: int | None
    """Rows without a label; None where the data set has no label column."""
    blank: int | None
    """Rows with a text of white space alone. None: both counts are left to the receipts of the
    shards."""


@dataclass(frozen=True, slots=True)
class SourceContents:
    """`reports/contents.json`: counts over the source rows of a capture."""

    splits: Mapping[str, SplitContents]
    shared: Mapping[str, int] | None
    """"ONE, OTHER" -> distinct inputs that stand in both splits; pairs that share none are left
    out. None: not counted."""
    cut_rows: int = 0
    """Source rows that lost tokens to the longest row allowed."""
    cut_tokens: int = 0
    cut_supervised_rows: int = 0
    """Those of them that lost tokens that were to be learnt."""
    split_chats: int = 0
    """Chats that are several rows, since the turns of the assistant have not one context."""
    split_chat_rows: int = 0


@dataclass(frozen=True, slots=True)
class AlignmentProbe:
    """Mean target weight of the hard label `shift` positions further, over the same positions.

    Shift 0 must win.
    """

    positions: int
    previous: float
    aligned: float
    following: float
    verdict: Literal["aligned", "misaligned", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A cache that this one was made from, and how."""

    cache_id: str
    operation: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contract and the shard table. `cache_id` is the SHA-256 over both."""

    format_version: int
    cache_id: str
    contract: Contract
    shards: tuple[Shard, ...]
    bad_rows: int = 0
    probe: AlignmentProbe | None = None
    ancestry: tuple[Ancestor, ...] = ()
    """Oldest first; not part of the cache_id."""
    sha256: str = ""
    """Of all of the above: what the `cache_id` does not cover may be damaged too."""

    def split_shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of first appearance."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))


# ---------------------------------------------------------------------------------------------- cache -> student

Divergence = Literal[
    "forward-kl",
    "reverse-kl",
    "jensen-shannon",
    "skewed-kl",
    "total-variation",
    "logit-mse",
    "mse",
    "margin-mse",
    "listwise-kl",
]
Schedule = Literal["constant", "linear", "cosine", "warmup-stable-decay"]
PositionWeights = Literal["equal", "certainty", "uncertainty"]


@dataclass(frozen=True, slots=True)
class Loss:
    """hard_weight * cross-entropy(labels) + soft_weight * T^2 * divergence(teacher_T, student_T), and span_weight * the loss over aligned spans."""

    hard_weight: float = 0.5
    soft_weight: float = 0.5
    temperature: float | None = None
    """None: the one of a `sampled` cache, 2 for classes, 1 for tokens."""
    divergence: Divergence = "forward-kl"
    tail: Literal["ghost", "renormalize", "ignore"] = "ghost"
    mixture: float | None = None
    """The teacher's share in what `jensen-shannon` (None: 0.5) and `skewed-kl` (None: 0.1) compare
    with."""
    schedule: Schedule = "constant"
    """How the two weights go from their values to the end values over the run."""
    hard_weight_end: float | None = None
    soft_weight_end: float | None = None
    """None: `warmup-stable-decay` ends at 0, the others where they began."""
    position_weights: PositionWeights = "equal"
    """Soft term: by 1 - H / log V of the teacher (`certainty`) or by H / log V (`uncertainty`), H
    its entropy at the position."""
    span_weight: float = 0.0
    """Of the likelihood of aligned spans, where teacher and student have different tokenizers; no
    schedule changes it."""
    span_temperature: float | None = None
    """By which the spans' log-probabilities are divided; None:
    `training.spans.SPAN_TEMPERATURE`."""

    def __post_init__(self) -> None:
        weights = {
            "--hard-weight": self.hard_weight,
            "--soft-weight": self.soft_weight,
            "--hard-weight-end": self.hard_weight_end or 0.0,
            "--soft-weight-end": self.soft_weight_end or 0.0,
            "--span-weight": self.span_weight,
        }
        for flag, value in weights.items():
            if not 0 <= value < math.inf:
                raise MisuseError(f"{flag}: expected at least 0, found {value}")
        if not any(weights.values()):
            raise MisuseError("--hard-weight and --soft-weight: expected one of them above 0, found 0 and 0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise MisuseError(f"--temperature: expected above 0, found {self.temperature}")
        if self.span_temperature is not None and not self.span_weight:
            raise MisuseError("--span-temperature goes with a --span-weight above 0")
        if self.span_temperature is not None and not 0 < self.span_temperature < math.inf:
            raise MisuseError(f"--span-temperature: expected above 0, found {self.span_temperature}")
        if self.mixture is not None and self.divergence not in ("jensen-shannon", "skewed-kl"):
            raise MisuseError(
                f"--mixture goes with --divergence jensen-shannon or skewed-kl, found --divergence {self.divergence}"
            )
        if self.mixture is not None and not 0 < self.mixture < 1:
            raise MisuseError(f"--mixture: expected between 0 and 1, found {self.mixture}")
        ends = (self.hard_weight_end, self.soft_weight_end)
        if self.schedule == "constant" and ends != (None, None):
            raise MisuseError("--hard-weight-end and --soft-weight-end go with --weight-schedule linear or another")
        if self.schedule in ("linear", "cosine") and ends == (None, None):
            raise MisuseError(
                f"--weight-schedule {self.schedule} needs --hard-weight-end or --soft-weight-end: where to go"
            )


@dataclass(frozen=True, slots=True)
class CachedExample:
    """One row of a cache: what the teacher saw, and what it said."""

    example: TokenizedExample
    soft: SoftLabels
    teacher_nll_sum: float
    teacher_entropy_sum: float
    content_hash: int
    entropy: Tensor | None = None
    """(N,) float32, nats: of each position, where it was stored."""
    label_logprobs: Tensor | None = None
    """(N,) float32, nats: log softmax(z)[hard label] of each position, where it was stored; -inf is
    a probability of 0."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """R rows of a cache, by column, under the names and in the types that they are stored in."""

    encoding: Encoding
    num_classes: int
    lists: Mapping[str, Ragged]
    """Columns of lists: tokens, soft labels."""
    numbers: Mapping[str, np.ndarray]
    """Columns of numbers, (R,) each; `label` is -100 where there is none."""
    others: Mapping[str, pa.Array]
    """Texts, and the columns copied from the source."""

    def __len__(self) -> int:
        return len(self.numbers["source_row"])


Segment = tuple[RowBlock, int, int]
"""The rows `[start, stop)` of a block."""


@dataclass(frozen=True, slots=True)
class StudentBatch:
    """B rows, collated. N counts supervised positions of all rows, in row order."""

    inputs: dict[str, Tensor]
    """What the student's `forward` takes; the first dimension is B."""
    supervised: Tensor | None
    """(B, T) bool: where the N positions are. None: one position a row."""
    labels: Tensor
    """(N,) int64 hard labels, -100 where there is none; of scores float32, nan where there is
    none."""
    target: Target
    weights: Tensor
    """(N,) float: how much each position counts; 0 for the rows that fill up the last step of
    several ranks."""
    soft_weights: Tensor
    """(N,) float: `weights`, times what the teacher's entropy makes of the position in the soft
    term."""
    source_rows: Tensor
    """(B,) int64: which rows of the source these are, for messages."""
    teacher_predicted: Tensor | None = None
    """(N,) int64, for evaluation: the teacher's most likely class; of scores float32, its score."""
    text_bytes: Tensor | None = None
    """(B,) int64, for evaluation: of the rows that count."""
    num_positions: Tensor | None = None
    """(B,) int64, for evaluation: supervised positions of each row."""
    spans: Spans | None = None
    """Over the N positions: what the loss over aligned spans needs."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss and its parts, each a sum over positions of nats at the scale of cross-entropy."""

    total: Tensor
    """() the weighted mean that is minimised."""
    hard_sum: Tensor
    """() sum of cross-entropies with the hard labels."""
    soft_sum: Tensor
    """() sum of T^2-scaled divergences from the teacher."""
    num_hard: Tensor
    """() how many positions have a hard label."""
    num_soft: Tensor
    """() how many positions count."""
    span_sum: Tensor
    """() weighted sum over aligned spans of the losses of `training.spans`; 0 without spans."""
    num_spans: Tensor
    """() the weights of the spans."""


@dataclass(frozen=True, slots=True)
class MixedCache:
    """One of several caches that a student learns from."""

    cache_id: str
    kind: Literal["teachers", "data"]
    share: float | None
    """Of the soft term, or of the rows of an epoch; None: every row once."""


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """Of a student whose tokenizer is not the teacher's: how much of what it was trained on both cut at the same bytes."""

    vocabulary_size: int
    positions: int
    """Of the student, in the training splits."""
    aligned: int
    """Of these: a token of the teacher begins at the same byte as the student's next one."""
    agreeing: int
    """Of these: the teacher's token becomes the one that the text has."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run leaves: kept beside the student as `distillation.json`."""

    output: str
    cache_id: str
    loss: Loss
    learning_rate: float
    seed: int
    steps: int
    seconds: float
    hard_loss: float | None
    """Mean since the losses were last logged, nats; None where there was no hard label, or no
    weight on them."""
    soft_loss: float | None
    num_parameters: int
    num_trainable: int
    max_length: int | None = None
    """Tokens of the longest row that the student may have seen: longer texts are to be cut to
    it."""
    eval_split: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the finished student on `eval_split`, as evaluation during training gives them; empty
    where there is no such split."""
    eval_rows: int | None = None
    """Rows of `eval_split`."""
    split: str | None = None
    """What it was trained on; several splits with a comma between them."""
    rows: int | None = None
    """Rows in one pass over `split`, of all caches."""
    mixed: tuple[MixedCache, ...] = ()
    """Where there are several caches: all of them, the first included."""
    most_steps: int | None = None
    """With early stopping: the steps that it might have taken."""
    best_step: int | None = None
    """The step whose weights were kept, where the best evaluation was; None: the last step's."""
    span_loss: float | None = None
    """As `soft_loss`, over aligned spans; None without them."""
    own_tokenizer: OwnTokenizer | None = None
    """None: the teacher's."""


# ----------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model predicted at N positions, and what the teacher and the truth say there."""

    labels: np.ndarray
    """(N,) int64, -100 where unknown; of scores float, nan where unknown."""
    predicted: np.ndarray
    """(N,) int64, the argmax; of scores float, the score."""
    confidence: np.ndarray
    """(N,) float64, the probability of the argmax; of scores nan."""
    nll: np.ndarray
    """(N,) float64, nats, of scores the squared error; nan where there is no label."""
    teacher_predicted: np.ndarray
    """(N,) int64, of scores float."""
    rows: np.ndarray
    """(N,) int64: the row of the split that each position belongs to. Intervals resample rows,
    since positions of one row depend on each other."""
    row_kl: np.ndarray
    """(R,) float64: the sum over the row's positions of KL(teacher || model), nats."""
    row_text_bytes: np.ndarray
    """(R,) int64."""
    label_names: tuple[str, ...] | None = None
    """Of the classes, or of the positions of every row, where they have names."""
    groups: np.ndarray | None = None
    """(R,) int64: the list of each row of rankings, or the text of each mask, numbered from 0.
    Intervals resample these. None: each row is by itself."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval of 95% confidence."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """One line of the table."""

    name: str
    num_parameters: int
    metrics: Mapping[str, float]
    agreement: float | None = None
    kl: float | None = None
    size_ratio: float | None = None
    """The teacher's parameters over this model's."""
    retention: float | None = None
    """This model's main metric over the teacher's (for a loss-like metric the teacher's over this
    model's)."""
    retention_interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """How each model goes on from one prompt, greedily."""

    prompt: str
    texts: Mapping[str, str]
    """Model name -> text."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Students and their teacher on one split of one cache."""

    cache_id: str
    task: str
    split: str
    rows: int
    positions: int
    main_metric: str
    teacher: ModelEvaluation
    students: tuple[ModelEvaluation, ...]
    temperature: float = 1.0
    """At which KL and agreement are taken: 1, or the temperature that the encoding knows nearest to
    it."""
    continuations: tuple[Continuation, ...] = ()
    labelled: int | None = None
    """Positions with a hard label, which metrics are over. Without any there are no metrics and no
    retention. None: an older report."""


@dataclass(frozen=True, slots=True)
class WordPrediction:
    """The likeliest label of one word."""

    word: str
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class TextPrediction:
    """What a model says of one text."""

    text: str
    labels: Mapping[str, float] = field(default_factory=dict)
    """Classifiers: the likeliest labels and their probabilities, the likeliest first."""
    continuation: str | None = None
    """Language models: how they go on."""
    words: tuple[WordPrediction, ...] = ()
    """Token classifiers: every word that the model has read."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Models of scores: what each output gives."""
    target: str | None = None
    """Encoder-decoders: what they make of the text."""
