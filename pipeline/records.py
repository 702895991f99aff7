"""All record types that modules exchange, in the order in which data flows through them.

    source -> Example -> TokenizedExample -> teacher -> SoftLabels -> shard -> Manifest   (capture)
    Manifest -> shard -> RowBlock -> StudentBatch -> loss -> student -> EvaluationReport (training)

They are in one module, longer than the others, so that it can be read first.

Letters for shapes: B rows of a batch, R rows, T tokens, N supervised positions, K kept classes, V
classes, G temperatures, S spans.

The target of a position is one distribution over V classes. If a row can have any number of labels,
each label is a position with two classes. A score is a position with one class (V = 1), whose logit
is the score in the unit of the data.

Row n of `SoftLabels` is the prediction *made at* supervised position n. A sequence classifier makes
one prediction per example. A causal language model makes one per supervised token position t, for
token t + 1: the hard label of position t is `input_ids[t + 1]`. The last token of a row and the
last token of a document are never supervised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from pipeline.errors import MisuseError

if TYPE_CHECKING:  # `--help` imports this module, and must not import torch
    import pyarrow as pa
    from torch import Tensor

#: Hard label of positions without one, which the losses and `transformers` ignore. Scores use nan
#: instead.
NO_LABEL = -100

Scalar = str | int | float | bool | None

#: What `--dry-run` prints: pairs of a heading and its text.
Outline = tuple[tuple[str, str], ...]

#: Assistant turns of a chat to learn: all of them, in one row if they share one context (`auto`);
#: all in one row (`all`); each in a row of its own (`each`); only the last (`last`).
AssistantTurns = Literal["auto", "all", "each", "last"]

#: Source of the hard labels: a value of the data set for each row (`row`) or each position
#: (`positions`), or tokens of the text: the token after a position (`tokens`), the masked token
#: (`hidden`), or the token of a target text at the position (`target`).
LabelSource = Literal["row", "positions", "tokens", "hidden", "target"]

#: What the label column of a data set holds: one class per row (or per word), a set of classes per
#: row, scores, or answers that are spans of a text.
LabelColumn = Literal["class", "classes", "scores", "answers"]

#: Type of a position's target: a distribution over classes, or one number.
TargetKind = Literal["distribution", "score"]

#: What the label names of a cache belong to. `classes`: the classes of every position. `positions`:
#: the positions of every row, each of which is one binary label. `choices`: the choices of every
#: row, by number. `places`: the first and last token of an answer; the classes of these two
#: positions are the places of the row's tokens. Models have no names for `choices` and `places`.
LabelNames = Literal["classes", "positions", "choices", "places"]

#: Input of a model: token ids, the pixel values of an image, or the token ids of several texts of
#: which one is chosen.
Inputs = Literal["tokens", "images", "choices"]

#: How a student with another tokenizer is trained from a cache: the stored texts or words are
#: tokenized again, the tokens of both are aligned by their bytes, or the student's own image
#: processor reads the stored images.
OtherTokenizers = Literal["texts", "bytes", "words", "images"]


# --------------------------------------------------------------------------------- source -> tokens


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a data set, by role; None: there is no such column."""

    text: str | None = "text"
    text_pair: str | None = None
    image: str | None = None
    """Images, or the paths of image files. Omitted from manifests if None."""
    choices: tuple[str, ...] = ()
    """Either one column with lists of texts to choose from, or one column per choice. Omitted from
    manifests if empty."""
    words: str | None = None
    """Lists of words, each of which has a label."""
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: str | None = None
    labels: str | None = None
    label: str | None = "label"
    keep: tuple[str, ...] = ()
    group: str | None = None
    """Rankings: rows with equal values form a list that is ranked, such as the documents of one
    query. Omitted from manifests if None."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str | None
    """None: the turn has only `fields`, for example a tool call."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Other fields of the turn for the chat template, such as `tool_calls` and
    `reasoning_content`."""
    learnt: bool = True
    """False: the turn is context only, even if the template marks it as the assistant's."""


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image: the bytes of a PNG, JPEG or other file."""

    data: bytes
    path: str | None = None
    """Last part of the file's name, for display. In a cache that refers to images: the file's path
    below `SOFTLABEL_IMAGES`."""
    file: str | None = None
    """Path of the file below the directory that contains the data set: the name of the data set,
    and the path in it. None: the image is not a file, or is stored elsewhere."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a source with its columns mapped, before tokenization.

    Exactly one of these inputs is set: `text`, `image`, `words`, `messages`, `prompt_completion`,
    `input_ids`.
    """

    source_row: int
    text: str | None = None
    text_pair: str | None = None
    choices: tuple[str, ...] | None = None
    """With `text`: the choices, of which one is the answer. Each begins with `text_pair`, if that
    is set."""
    image: Image | None = None
    words: tuple[str, ...] | None = None
    word_labels: tuple[int, ...] | None = None
    """One class id per word, -100 for a word without a label; None: the row has no labels."""
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, object], ...] | None = None
    """Chats: descriptions of the tools, for the chat template."""
    prompt_completion: tuple[str, str] | None = None
    input_ids: tuple[int, ...] | None = None
    token_labels: tuple[int, ...] | None = None
    """Pre-tokenized rows: -100 for tokens that are not learnt; aligned with `input_ids` (not
    shifted)."""
    label: int | None = None
    flags: tuple[int, ...] | None = None
    """Multi-label classification: 1 for each of the model's labels that the row has, 0 for the
    others, -100 if unknown."""
    scores: tuple[float, ...] | None = None
    """One score for each of the model's outputs, nan if unknown."""
    answers: tuple[tuple[int, int], ...] | None = None
    """Question answering: character ranges `[start, end)` of `text_pair` that answer `text`. Empty:
    there is no answer. None: unknown."""
    group: int | None = None
    """Rankings: a hash of the value that all rows of one list share."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Masking:
    """Settings for choosing the tokens that a masked language model predicts."""

    share: float = 0.15
    """Share of a row's tokens that are masked."""
    whole_words: bool = False
    """Whether to mask either all tokens of a word or none."""
    copies: int = 1
    """Number of rows made from each text, each with a different mask."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Views:
    """Settings for cutting random parts from images; each part is a row (Shen and Xing, 2022).

    The coordinates are stored, so teacher and students see the same parts.
    """

    count: int
    """Rows made of each image of the split `train`; other splits have one row with the whole
    image."""
    smallest: float = 0.08
    """Smallest area of a part, as a share of the image's area."""
    mirror: bool = True
    """Whether half of the parts are flipped horizontally."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise MisuseError(f"--views: expected at least 1, found {self.count}")
        if not 0 < self.smallest <= 1:
            raise MisuseError(f"--view-area: expected a share above 0, at most 1, found {self.smallest}")

    def rows_of_an_image(self, split: str) -> int:
        """Return `count` for the split `train`, 1 for others."""
        return self.count if split == "train" else 1


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Settings that, with the tokenizer, determine `input_ids`.

    An image counts as one token. Manifests omit the settings of chats and prompts if they are
    empty.
    """

    max_length: int
    packing: bool = False
    isolate_documents: bool = False
    """Packed rows: attention and position ids restart at every document."""
    assistant_turns: AssistantTurns | None = None
    """Chats: which turns are learnt, and in how many rows. None in a contract: the turns that the
    chat template marks."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Chats: sorted `KEY=JSON` strings, the keyword arguments of the chat template."""
    truncation_side: Literal["left"] | None = None
    """Chats, prompts and token ids with labels: the side on which rows that are too long are
    truncated. None: at the end."""
    masking: Masking | None = None
    """Masked language models. Omitted from manifests if None."""
    views: Views | None = None
    """Images. Omitted from manifests if rows are whole images."""
    num_choices: int | None = None
    """The largest number of choices of a row. Omitted from manifests if rows have none."""
    stride: int | None = None
    """Question answering: number of tokens by which two windows of a text overlap. None: the task's
    default. Omitted from manifests if None."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens that were cut from a source row because it exceeds the maximum length."""

    source_row: int
    tokens: int
    supervised: int = 0
    """The number of these tokens that are supervised."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row of a cache before the teacher's forward pass.

    A row is a text, a piece of a long text, several packed texts, or an image.
    """

    source_row: int
    piece: int
    input_ids: np.ndarray
    """(T,) int32; (0,) for an image."""
    supervised: np.ndarray | None = None
    """(T,) bool: the positions that have soft labels. None: the row has one position, or one for
    each label name."""
    token_type_ids: np.ndarray | None = None
    label: int | None = None
    labels: np.ndarray | None = None
    """(N,) the hard label of each position: int32, -100 if unknown; scores: float32, nan if
    unknown. None: the task has no labels by position."""
    words: tuple[str, ...] | None = None
    """(N,) words; the supervised positions are at the first token of each."""
    group: int | None = None
    """As in `Example`."""
    text: str | None = None
    """Language models, if texts are stored: the part of the source's text that the tokens cover."""
    text_pair: str | None = None
    image: Image | None = None
    view: np.ndarray | None = None
    """(5,) int32: left, top, width and height of the part of the image in pixels, and 1 if it is
    flipped. (0,): the whole image. None: the cache has no views."""
    messages: str | None = None
    """Chats, if texts are stored: JSON of the turns that the row was rendered from, the tools, and
    the numbers of the turns that the row learns."""
    document_lengths: np.ndarray | None = None
    """int32 lengths in tokens of the isolated documents that the row is packed from; None:
    attention is not restricted. For choices, the length of each, 0 for missing choices."""
    choices: tuple[str, ...] | None = None
    """As in `Example`, if texts are stored."""
    num_classes: int | None = None
    """Question answering: V, the number of places in the longest row; not stored."""
    text_bytes: int = 0
    """UTF-8 bytes of the text that the supervised positions predict."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    cut: tuple[Cut, ...] = ()
    """For each source row in this row that was truncated, what was cut off; not stored."""
    split_chats: tuple[int, ...] = ()
    """For each chat that makes several rows, and has its first row here, the number of its rows;
    not stored."""

    @property
    def num_tokens(self) -> int:
        """T; 1 for an image."""
        return len(self.input_ids) if self.image is None else 1

    @property
    def num_positions(self) -> int:
        """N, the number of supervised positions of this row."""
        if self.labels is not None:
            return len(self.labels)
        return 1 if self.supervised is None else int(self.supervised.sum())


def offsets_of_counts(counts: np.ndarray) -> np.ndarray:
    """Convert (R,) counts to (R + 1,) int64 offsets."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list of numbers for each of R rows, stored as one array with offsets."""

    values: np.ndarray
    """(sum of counts,) the lists of all rows, concatenated."""
    counts: np.ndarray
    """(R,) integers: the length of each row's list."""
    offsets: np.ndarray
    """(R + 1,) int64: the list of row r is `values[offsets[r]:offsets[r + 1]]`."""

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> Ragged:
        """Create it from values and counts; computes the offsets."""
        return cls(values, counts, offsets_of_counts(counts))


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Tokens and labels of R rows by column, the input for collating a batch."""

    input_ids: Ragged
    supervised: Ragged | None = None
    """As in `TokenizedExample`; None: one position per row, or one for each label name."""
    token_type_ids: Ragged | None = None
    document_lengths: Ragged | None = None
    label: np.ndarray | None = None
    """(R,) int64, -100 if unknown; None: the task has no label per row."""
    labels: Ragged | None = None
    """One hard label per supervised position, -100 if unknown (scores: nan); None: the task has no
    labels by position."""
    images: Sequence[Image] | None = None
    """(R,) images; None: rows are tokens."""
    views: Ragged | None = None
    """As in `TokenizedExample`."""
    num_classes: int | None = None
    """V of the cache; None: unknown, or not used by the task."""


def is_known(labels: Any) -> Any:
    """Return (N,) bool for (N,) hard labels: whether a class id is not -100, or a score is not nan.

    Args:
        labels: a NumPy array or a tensor.
    """
    is_float = labels.dtype.kind == "f" if isinstance(labels, np.ndarray) else labels.is_floating_point()
    return labels == labels if is_float else labels != NO_LABEL


# -------------------------------------------------------------------------------------- soft labels


@dataclass(frozen=True, slots=True)
class Full:
    """All V log-probabilities of every position; the default for classifiers."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest probabilities, and the remaining mass at a grid of temperatures."""

    k: int
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    kind: Literal["top-k"] = "top-k"


@dataclass(frozen=True, slots=True)
class TopP:
    """The fewest classes whose mass reaches p, and the remaining mass at a grid of temperatures."""

    p: float
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    kind: Literal["top-p"] = "top-p"


@dataclass(frozen=True, slots=True)
class Sampled:
    """Exact weights of classes with a probability of at least 1/c, and a sample of the others.

    c is `sample_size`. The sample is unbiased: each sampled class has weight 1/c, so that E[target]
    = q, with at most about c classes per position. This is the default for language models.

    The default is c = 25 because it takes 24 bytes per position and has 1.4% of the noise of a
    single label drawn from the teacher. That is less noise than 50 draws with replacement have in
    61 bytes (`make bench-encodings`), and students learn as much from either. Half the bytes have
    four times the noise. Twice the bytes remove only noise that more text averages out as well.
    """

    sample_size: float = 25.0
    temperature: float = 1.0
    steps: int = 0
    """Top weights are stored as integer multiples of 1/steps, rounded without bias. 0:
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
    """Return the default resolution for storing the top weights, as the number of steps per unit.

    On news text the rounding adds 0.9% to the variance of sampling, at c = 18, 25 and 54 alike.
    """
    return min(math.ceil(3.2 * sample_size), _MOST_STEPS)


#: The largest uint16.
_MOST_STEPS = 65_535


@dataclass(frozen=True, slots=True)
class Score:
    """The teacher's score of every position, stored in full; a score is not a distribution."""

    kind: Literal["score"] = "score"


Encoding = Full | TopK | TopP | Sampled | Score


def check_is_encoding(found: object) -> None:
    """Refuse anything but an encoding, such as its name.

    Raises:
        MisuseError: `found` is not an encoding.
    """
    if not isinstance(found, Encoding):
        raise MisuseError(f"encoding: expected Full(), TopK(...), TopP(...), Sampled(...) or Score(), found {found!r}")


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """Compressed teacher distributions at N positions: top classes, sampled tail, residual mass.

    Ragged: the values of position n are `[offsets[n]:offsets[n + 1]]`.
    """

    encoding: Encoding
    num_classes: int
    top_offsets: Tensor
    """(N + 1,) int64."""
    top_ids: Tensor
    """(sum K,) int64 class ids, by descending probability (`full`: by id)."""
    top_logprobs: Tensor
    """(sum K,) float32, nats: log softmax(z), or log softmax(z / T) for `sampled`. After `narrow`,
    `sampled` has logs of multiples of 1/steps, which may be 0 (log: -inf). `score`: the scores."""
    tail_offsets: Tensor
    """(N + 1,) int64."""
    tail_ids: Tensor
    """(sum K,) int64 class ids, ascending. Each has the weight 1 / sample_size."""
    log_residuals: Tensor
    """(N, G) float32, nats: log of the mass outside the top at each temperature of the grid. G = 0
    for `full`, `sampled` and `score`."""

    def __len__(self) -> int:
        return self.top_offsets.numel() - 1


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """Statistics of the full logits that the kept classes do not determine: (N,) each, nats."""

    nll: Tensor
    """(N,) float32: -log softmax(z)[hard label]; for scores, the squared error. 0 without a hard
    label."""
    entropy: Tensor
    """(N,) float32: entropy of the distribution whose log-probabilities are kept (at T = 1, or the
    T of `sampled`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """The distribution that a student is trained to match at N positions.

    It has ragged class weights, and optionally one bucket for the mass of all other classes.
    """

    num_classes: int
    offsets: Tensor
    """(N + 1,) int64."""
    ids: Tensor
    """(sum K,) int64."""
    weights: Tensor
    """(sum K,) float: probabilities, or unbiased estimates of them (which need not sum to 1);
    `score`: the scores."""
    log_residual: Tensor | None
    """(N,) float, nats: log of the teacher's mass outside `ids`; None: no such mass is matched."""
    negative_entropy: Tensor
    """(N,) float, nats: sum_i q_i log q_i, which turns a cross-entropy into a KL divergence
    (`sampled`: the mean over the row, unless entropies are stored by position)."""
    unit: Tensor | None = None
    """Scores: (N,) float, the standard deviation of the teacher's scores of this output, by which
    differences are divided."""
    group: Tensor | None = None
    """Scores: (N,) int64, equal for positions that are compared with each other; None: the data has
    no groups."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """A linear map from the teacher's vocabulary to a student's.

    The mass of each teacher token goes to one student token. An unbiased target stays unbiased: E[M
    q_hat] = M q, where M has at most one 1 in each column.
    """

    first_token: np.ndarray
    """(V of the teacher,) int64: the student's token that receives the mass of each teacher token;
    -1: none, and `softlabels.mapped` drops the mass or adds it to the bucket of other classes."""
    num_classes: int
    """V of the student."""
    is_special: np.ndarray
    """(V of the student,) bool: whether a token stands for no text."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Aligned spans: stretches of text that begin and end at token boundaries of both tokenizers.

    They refer to N positions of the student. The student's log-probability of a span is the sum of
    the log-probabilities of its tokens, which are hard labels of these positions.
    """

    owner: Tensor
    """(N,) int64: the span that contains the token which is the position's hard label; -1: none."""
    teacher_logprobs: Tensor
    """(S,) float, nats: the teacher's log-probability of the span's text, summed over the teacher's
    tokens."""
    weights: Tensor
    """(S,) float, at least 0: the weight of each span; 0 for spans of padding rows."""

    def __len__(self) -> int:
        return self.teacher_logprobs.numel()


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How closely the targets of an encoding match the teacher, measured with all V logits.

    The measurement uses a sample of positions; `softlabels.fidelity` has the formulas.
    """

    positions: int
    kept: float
    """Mean number of kept classes per position."""
    kept_mass: Mapping[str, float]
    """Temperature -> the teacher's mass on the classes that are kept for certain."""
    kl: float | None
    """KL(teacher || target), nats per position; None if the target gives a class of the teacher no
    mass."""
    noise: float
    noise_share: float
    """`noise` relative to that of one hard label drawn from the teacher."""
    bias: float | None
    """None: unknown, since there is one position only."""
    angle: float
    """Degrees between the gradients with this target and with the full distribution."""
    norm_ratio: float
    """Ratio of the norms of these gradients."""


@dataclass(frozen=True, slots=True)
class EstimatedEncoding:
    """Estimated cost and fidelity of one encoding."""

    encoding: Encoding
    bytes_per_position: float
    """All columns, in Parquet."""
    total_bytes: int
    num_shards: int
    hours: float
    """Teacher's forward passes and encoding, on one device like the pilot's."""
    overhead: float
    """Seconds of encoding divided by seconds of the teacher's forward passes."""
    decoded_per_second: float
    """Positions that one thread decodes per second."""
    fidelity: Fidelity | None


@dataclass(frozen=True, slots=True)
class EstimatedColumn:
    """Estimated size of an optional column, which does not depend on the encoding."""

    flag: str
    bytes_per_position: float
    """In Parquet."""
    total_bytes: int
    included: bool
    """Whether the figures of the encodings include it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Results of `softlabel estimate`; totals are scaled from a pilot by the number of rows."""

    teacher: str
    source: str
    temperature: float
    pilot_rows: int
    pilot_positions: int
    rows: int
    """Source rows of all splits."""
    tokens: int
    positions: int
    tokens_per_second: float
    encodings: tuple[EstimatedEncoding, ...]
    chosen: Encoding | None = None
    scale_tokens: float | None = None
    gpus: int = 1
    columns: tuple[EstimatedColumn, ...] = ()
    """Optional columns of language models."""


# -------------------------------------------------------------------------------- the cache on disk


PromptFormat = Literal["chat", "plain"]
"""Whether a rendered prompt becomes the user's message in the tokenizer's chat template, or is used
as plain text."""


@dataclass(frozen=True, slots=True)
class Judging:
    """Options of `cache-logits` for a language model that labels texts by prompt."""

    template: str | None = None
    """A Jinja template, or the path of one; None: the built-in template."""
    label_text: tuple[str, ...] = ()
    """`NAME=TEXT` or `NAME` for each label; empty: the names of the data's labels."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """auto: `chat` if the tokenizer has a chat template, else `plain`."""
    shots: int = 0
    shot_tokens: int = 64
    """Maximum tokens of an example's text."""
    calibrate: bool = False


@dataclass(frozen=True, slots=True)
class JudgeInfo:
    """The prompt of a language model that labels texts, and every setting that affects it."""

    template: tuple[str, ...]
    """Lines of the Jinja template."""
    format: PromptFormat
    label_texts: tuple[str, ...]
    """The text that stands for each class, in the order of the classes."""
    shots: tuple[str, ...] = ()
    """`SPLIT:ROW` of the source rows used as examples, in the order of the prompt."""
    shot_tokens: int | None = None
    calibrated: bool = False


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A teacher behind an inference server: its settings, and what was requested."""

    api: Literal["vllm", "sglang"]
    version: str
    """Version of the server software."""
    top_logprobs: int
    """Number of log-probabilities that were requested for each position."""
    residual_error: float
    """Error of the residual mass: it is 1 minus the mass of the top, and as exact as the server's
    float32 log-probabilities."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Precision, quantization and so on, if the server reports them."""


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A server's answer for one short row of N positions, recorded when a capture begins.

    Later answers are compared with it.
    """

    input_ids: tuple[int, ...]
    """Token ids of the row."""
    top_ids: tuple[tuple[int, ...], ...]
    """(N, K) class ids."""
    top_logprobs: tuple[tuple[float, ...], ...]
    """(N, K), nats."""
    own_logprobs: tuple[float, ...]
    """(N,), nats: log-probability of the token that follows."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that made the logits, with all settings that affect them."""

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
    """The base model given by `--base-model` instead of the adapter's own."""
    judge: JudgeInfo | None = None
    """The prompt of a language model that labels texts. None: the model has a head for the task."""
    server: ServerInfo | None = None
    """The server of a remote teacher; None: local weights. Omitted from manifests if None."""


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer that made the token ids."""

    sha256: str
    """Hash of vocabulary, merges, normalisation and special tokens: tokenizers with equal hashes
    give equal ids."""
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
    """The data set that was read, and the settings for reading it."""

    name: str
    config: str | None
    revision: str | None
    columns: Columns
    fingerprints: Mapping[str, str]
    """Split -> SHA-256 of the columns that were read. For Parquet files that are read in place:
    `files-` and the SHA-256 of the list of files."""
    holdout: float = 0.0
    rows: tuple[int, int | None] | None = None
    """`--rows`: the range `[start, stop)` of rows of each split that was read; None: all rows."""
    label_map: tuple[str, ...] = ()
    """`--label-map`: sorted `DATA=MODEL` strings. Omitted from manifests if empty."""
    unlabelled_sources: tuple[UnlabelledSource, ...] = ()
    """`--unlabelled`: data sets whose rows follow the others of `train`, in this order. Omitted
    from manifests if empty."""


@dataclass(frozen=True, slots=True)
class Contract:
    """All settings that determine the contents of a cache.

    Two captures with equal contracts may share a directory.
    """

    task: str
    encoding: Encoding
    num_classes: int
    """V of the soft labels. Classes beyond the tokenizer's vocabulary (padded embedding rows) do
    not count."""
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
    """A shard to be made from the source rows `[start, stop)` of a split."""

    name: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A source row that could not be cached and was skipped."""

    split: str
    source_row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and squared deviation of a set of numbers."""

    count: int
    mean: float
    deviation: float
    """Sum of squared differences from the mean."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of each output's scores, by which they are standardised."""

    mean: np.ndarray
    """(outputs,) float32."""
    std: np.ndarray
    """(outputs,) float32, above 0: 1 if the scores do not vary."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One row of the shard table."""

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
    """Hash of the Parquet footer, which page checksums do not cover; verified whenever a shard is
    opened."""
    moments: tuple[Moments, ...] = ()
    """Moments of the teacher's scores of each output, from which students compute their `Scale`.
    Omitted from manifests if empty."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of a finished shard, stored next to it: what was made, and where."""

    shard: Shard
    plan: ShardPlan
    batches: tuple[tuple[int, int], ...]
    """Rows and padded length of each forward pass."""
    device: str
    seconds: float
    forward_seconds: float
    bad_rows: tuple[BadRow, ...] = ()
    fidelity: Fidelity | None = None
    """Only in the receipt of the first shard: measured on a sample of its positions."""
    cut_rows: int = 0
    """Source rows that were truncated to the maximum length."""
    cut_tokens: int = 0
    """Tokens that were cut off."""
    unlabelled_rows: int = 0
    """Source rows without a label."""
    blank_rows: int = 0
    """Source rows whose text is only white space."""
    cut_supervised_rows: int = 0
    """Truncated source rows that lost supervised tokens."""
    split_chats: int = 0
    """Chats that make several rows, since the assistant's turns do not share one context."""
    split_chat_rows: int = 0
    """Rows of these chats."""


@dataclass(frozen=True, slots=True)
class SplitContents:
    """Counts over the source rows of one split."""

    rows: int
    unlabelled: int | None
    """Rows without a label; None: the data set has no label column, or the receipts have the
    count."""
    blank: int | None
    """Rows whose text is only white space; None: the receipts of the shards have both counts."""


@dataclass(frozen=True, slots=True)
class SourceContents:
    """Counts over the source rows of a capture, stored in `reports/contents.json`."""

    splits: Mapping[str, SplitContents]
    shared: Mapping[str, int] | None
    """"ONE, OTHER" -> number of distinct inputs that are in both splits; pairs without any are
    omitted. None: not counted."""
    cut_rows: int = 0
    """Source rows that were truncated to the maximum length."""
    cut_tokens: int = 0
    cut_supervised_rows: int = 0
    """Truncated rows that lost supervised tokens."""
    split_chats: int = 0
    """Chats that make several rows, since the assistant's turns do not share one context."""
    split_chat_rows: int = 0


@dataclass(frozen=True, slots=True)
class AlignmentProbe:
    """Mean target weight of the hard label, and of the tokens before and after it.

    In an aligned cache the hard label (shift 0, `aligned`) has the largest mean weight.
    """

    positions: int
    previous: float
    aligned: float
    following: float
    verdict: Literal["aligned", "misaligned", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A cache that this one was made from, and the operation."""

    cache_id: str
    operation: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a finished cache: contract and shard table.

    `cache_id` is the SHA-256 of both.
    """

    format_version: int
    cache_id: str
    contract: Contract
    shards: tuple[Shard, ...]
    bad_rows: int = 0
    probe: AlignmentProbe | None = None
    ancestry: tuple[Ancestor, ...] = ()
    """Oldest first; not part of the cache_id."""
    sha256: str = ""
    """Hash of all other fields, to detect damage in those that the `cache_id` does not cover."""

    def split_shards(self, split: str) -> tuple[Shard, ...]:
        """Return the shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of first appearance."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))


# --------------------------------------------------------------------------------- cache -> student

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


@dataclass(frozen=True, slots=True)
class DivergenceKind:
    """Properties of a divergence besides its formula."""

    power: int
    """The power of T that the divergence is multiplied by; 0: it has no temperature."""
    mixture: float | None = None
    """Default share of the teacher in the mixture distribution; None: there is no mixture."""


DIVERGENCE_KINDS: dict[Divergence, DivergenceKind] = {
    "forward-kl": DivergenceKind(2),
    "reverse-kl": DivergenceKind(2),
    "jensen-shannon": DivergenceKind(2, mixture=0.5),
    "skewed-kl": DivergenceKind(2, mixture=0.1),
    "total-variation": DivergenceKind(1),
    "logit-mse": DivergenceKind(0),
    "mse": DivergenceKind(0),
    "margin-mse": DivergenceKind(0),
    "listwise-kl": DivergenceKind(2),
}
Schedule = Literal["constant", "linear", "cosine", "warmup-stable-decay"]
PositionWeights = Literal["equal", "certainty", "uncertainty"]


@dataclass(frozen=True, slots=True)
class Loss:
    """Weights and settings of the training loss.

    `hard_weight` * cross-entropy(labels) + `soft_weight` * T^2 * divergence(teacher_T, student_T) +
    `span_weight` * loss over aligned spans.
    """

    hard_weight: float = 0.5
    soft_weight: float = 0.5
    temperature: float | None = None
    """None: that of a `sampled` cache, else 2 for classes and 1 for tokens."""
    divergence: Divergence = "forward-kl"
    tail: Literal["ghost", "renormalize", "ignore"] = "ghost"
    mixture: float | None = None
    """Share of the teacher in the mixture distribution of `jensen-shannon` (None: 0.5) and
    `skewed-kl` (None: 0.1)."""
    schedule: Schedule = "constant"
    """How `hard_weight` and `soft_weight` change to their end values over the run."""
    hard_weight_end: float | None = None
    soft_weight_end: float | None = None
    """None: `warmup-stable-decay` ends at 0, others at the initial value."""
    position_weights: PositionWeights = "equal"
    """Weights of positions in the soft term: 1 - H / log V (`certainty`) or H / log V
    (`uncertainty`), with H the teacher's entropy at the position."""
    span_weight: float = 0.0
    """Weight of the likelihood of aligned spans, if teacher and student have different tokenizers;
    not affected by the schedule."""
    span_temperature: float | None = None
    """Divides the log-probabilities of spans; None: `training.spans.SPAN_TEMPERATURE`."""

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
        for flag, chosen, choices in (
            ("--divergence", self.divergence, tuple(DIVERGENCE_KINDS)),
            ("--tail-policy", self.tail, ("ghost", "renormalize", "ignore")),
            ("--weight-schedule", self.schedule, get_args(Schedule)),
            ("--position-weights", self.position_weights, get_args(PositionWeights)),
        ):
            if chosen not in choices:
                raise MisuseError(f"{flag}: expected one of {', '.join(choices)}, found {chosen!r}")
        if self.mixture is not None and DIVERGENCE_KINDS[self.divergence].mixture is None:
            mixed = " or ".join(name for name, kind in DIVERGENCE_KINDS.items() if kind.mixture is not None)
            raise MisuseError(f"--mixture goes with --divergence {mixed}, found --divergence {self.divergence}")
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
    """One row of a cache: the teacher's input and its soft labels."""

    example: TokenizedExample
    soft: SoftLabels
    teacher_nll_sum: float
    teacher_entropy_sum: float
    content_hash: int
    entropy: Tensor | None = None
    """(N,) float32, nats: entropy at each position, if stored."""
    label_logprobs: Tensor | None = None
    """(N,) float32, nats: log softmax(z)[hard label] at each position, if stored; -inf for
    probability 0."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """R rows of a cache by column, with the stored names and types."""

    encoding: Encoding
    num_classes: int
    lists: Mapping[str, Ragged]
    """Columns of lists: tokens, soft labels."""
    numbers: Mapping[str, np.ndarray]
    """Columns of numbers, (R,) each; `label` is -100 if unknown."""
    others: Mapping[str, pa.Array]
    """Text columns, and the columns copied from the source."""

    def __len__(self) -> int:
        return len(self.numbers["source_row"])


Segment = tuple[RowBlock, int, int]
"""The rows `[start, stop)` of a block."""


@dataclass(frozen=True, slots=True)
class StudentBatch:
    """A collated batch of B rows; N counts the supervised positions of all rows, in row order."""

    inputs: dict[str, Tensor]
    """Arguments of the student's `forward`; the first dimension is B."""
    supervised: Tensor | None
    """(B, T) bool: the N positions. None: one position per row."""
    labels: Tensor
    """(N,) int64 hard labels, -100 if unknown; scores: float32, nan if unknown."""
    target: Target
    weights: Tensor
    """(N,) float: weight of each position; 0 for rows that pad the last step when there are several
    ranks."""
    soft_weights: Tensor
    """(N,) float: `weights`, times the weight of each position in the soft term
    (`Loss.position_weights`)."""
    source_rows: Tensor
    """(B,) int64: source row of each row, for messages."""
    teacher_predicted: Tensor | None = None
    """Evaluation: (N,) int64, the teacher's most likely class; scores: float32, its score."""
    text_bytes: Tensor | None = None
    """Evaluation: (B,) int64, text bytes of each row; 0 for padding rows."""
    num_positions: Tensor | None = None
    """Evaluation: (B,) int64, supervised positions of each row."""
    spans: Spans | None = None
    """Aligned spans over the N positions, for the span loss."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss and its parts: sums over positions, in nats at the scale of cross-entropy."""

    total: Tensor
    """() weighted mean, which is minimised."""
    hard_sum: Tensor
    """() sum of cross-entropies with the hard labels."""
    soft_sum: Tensor
    """() sum of T^2-scaled divergences from the teacher."""
    num_hard: Tensor
    """() number of positions with a hard label."""
    num_soft: Tensor
    """() sum of the positions' weights in the soft term."""
    span_sum: Tensor
    """() weighted sum over aligned spans of the losses of `training.spans`; 0 without spans."""
    num_spans: Tensor
    """() sum of the spans' weights."""


@dataclass(frozen=True, slots=True)
class MixedCache:
    """One of several caches that a student is trained from."""

    cache_id: str
    kind: Literal["teachers", "data"]
    share: float | None
    """Share of the soft term, or of the rows of an epoch; None: every row once per epoch."""


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """Alignment statistics of a student whose tokenizer differs from the teacher's."""

    vocabulary_size: int
    positions: int
    """The student's supervised positions in the training splits."""
    aligned: int
    """Positions for which a token of the teacher begins at the same byte as the student's next
    token."""
    agreeing: int
    """Aligned positions where the teacher's token maps to the student's next token."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a training run, stored next to the student as `distillation.json`."""

    output: str
    cache_id: str
    loss: Loss
    learning_rate: float
    seed: int
    steps: int
    seconds: float
    hard_loss: float | None
    """Mean since the losses were last logged, nats; None: there is no hard label, or their weight
    is 0."""
    soft_loss: float | None
    num_parameters: int
    num_trainable: int
    max_length: int | None = None
    """Tokens of the longest row that the student may have seen; truncate longer texts to it."""
    eval_split: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the final student on `eval_split`, as in evaluation during training; empty without
    such a split."""
    eval_rows: int | None = None
    """Rows of `eval_split`."""
    split: str | None = None
    """The training split; several are joined by commas."""
    rows: int | None = None
    """Rows in one pass over `split`, of all caches."""
    mixed: tuple[MixedCache, ...] = ()
    """All caches, including the first; empty if there is only one."""
    most_steps: int | None = None
    """With early stopping: the maximum number of steps."""
    best_step: int | None = None
    """The step with the best evaluation, whose weights were kept; None: the last step."""
    span_loss: float | None = None
    """Like `soft_loss`, over aligned spans; None without spans."""
    own_tokenizer: OwnTokenizer | None = None
    """None: the student has the teacher's tokenizer."""


# --------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions of one model at N positions, with the teacher's predictions and the labels."""

    labels: np.ndarray
    """(N,) int64, -100 if unknown; scores: float, nan if unknown."""
    predicted: np.ndarray
    """(N,) int64, the argmax; scores: float, the score."""
    confidence: np.ndarray
    """(N,) float64, the probability of the argmax; scores: nan."""
    nll: np.ndarray
    """(N,) float64, nats; scores: the squared error. nan without a label."""
    teacher_predicted: np.ndarray
    """(N,) int64; scores: float."""
    rows: np.ndarray
    """(N,) int64: the row of the split that each position belongs to. Intervals resample rows,
    since positions of one row depend on each other."""
    row_kl: np.ndarray
    """(R,) float64, nats: KL(teacher || model), summed over the row's positions."""
    row_text_bytes: np.ndarray
    """(R,) int64."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes, or of the positions of every row, if they have names."""
    groups: np.ndarray | None = None
    """(R,) int64, from 0: the list of each row in rankings, or the text that a row is made from.
    Intervals resample these. None: each row is a group of its own."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """Results of one model in an evaluation: one row of the table."""

    name: str
    num_parameters: int
    metrics: Mapping[str, float]
    agreement: float | None = None
    kl: float | None = None
    size_ratio: float | None = None
    """The teacher's number of parameters divided by this model's."""
    retention: float | None = None
    """This model's main metric divided by the teacher's (for a metric that is better when smaller,
    the inverse)."""
    retention_interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """Greedy continuations of one prompt by each model."""

    prompt: str
    texts: Mapping[str, str]
    """Model name -> text."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Evaluation of students and their teacher on one split of one cache."""

    cache_id: str
    task: str
    split: str
    rows: int
    positions: int
    main_metric: str
    teacher: ModelEvaluation
    students: tuple[ModelEvaluation, ...]
    temperature: float = 1.0
    """Temperature for KL and agreement: 1, or the nearest one that the encoding serves exactly."""
    continuations: tuple[Continuation, ...] = ()
    labelled: int | None = None
    """Positions with a hard label, over which metrics are computed. If 0, there are no metrics and
    no retention. None: the report is from an older release."""


@dataclass(frozen=True, slots=True)
class WordPrediction:
    """The likeliest label of one word."""

    word: str
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class TextPrediction:
    """A model's prediction for one text."""

    text: str
    labels: Mapping[str, float] = field(default_factory=dict)
    """Classifiers: the likeliest labels with their probabilities, the likeliest first."""
    continuation: str | None = None
    """Language models: the generated continuation."""
    words: tuple[WordPrediction, ...] = ()
    """Token classifiers: all words within the model's maximum length."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Models of scores: the value of each output."""
    target: str | None = None
    """Encoder-decoders: the generated target."""
