"""The card's section on reading a cache: column descriptions, and code that tests execute."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cache.views.units import unit_of
from pipeline.records import NO_LABEL, Contract, Encoding, Full, Manifest, Sampled, Score
from pipeline.tasks import get_task


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to read one encoding."""

    name: str
    """The encoding with its parameters."""
    columns: str
    """Description of its columns."""
    numpy: str
    """Code that converts a mapping `row` to `positions`, a list of (classes, weights)."""
    kept_mass: str | None
    """SQL expression for the mass on the classes kept for certain, summed over a row's positions.
    None: all mass is kept."""


def recipe(contract: Contract) -> Recipe:
    """Return the recipe of a cache's encoding."""
    encoding: Encoding = contract.encoding
    if isinstance(encoding, Full):
        return Recipe("full", _FULL, _FULL_NUMPY.format(num_classes=contract.num_classes), None)
    if isinstance(encoding, Score):
        return Recipe("score", _SCORE, _SCORE_NUMPY, None)
    if isinstance(encoding, Sampled):
        values = {"temperature": encoding.temperature, "size": encoding.sample_size, "steps": encoding.steps}
        return Recipe(
            f"sampled, sample size {encoding.sample_size:g}, temperature {encoding.temperature:g}",
            _SAMPLED.format(**values),
            _SAMPLED_NUMPY.format(**values),
            f"list_sum(top_weights) / {encoding.steps}.0",
        )
    grid = ", ".join(f"{t:g}" for t in encoding.temperatures)
    knob = getattr(encoding, "k", None) or getattr(encoding, "p", None)
    return Recipe(
        f"{encoding.kind} {knob}, temperatures {grid}",
        _TOP.format(grid=grid),
        _TOP_NUMPY,
        "list_sum([exp(x::double) for x in top_logprobs])",
    )


def on_request(contract: Contract) -> list[str]:
    """Return a description of each column that holds labels, words or optional data."""
    unit = unit_of(get_task(contract.task))
    if isinstance(contract.encoding, Score):
        return [_OF_SCORES]
    if unit == "labels":
        return [_OF_LABELS]
    if "supervised" not in contract.columns:
        return []
    if get_task(contract.task).label_source in ("hidden", "target"):
        return [_OF_HIDDEN if get_task(contract.task).label_source == "hidden" else _OF_TARGET]
    if unit == "words":
        return [text for name, text in _OF_WORDS.items() if name in contract.columns]
    return [text for name, text in _ON_REQUEST.items() if name in contract.columns]


def rows_and_positions(manifest: Manifest) -> str:
    """Describe in Markdown what a row is, and what each of its soft labels belongs to."""
    if get_task(manifest.contract.task).target == "score":
        return "A row has one teacher score for each of `label_names` of `manifest.json`, in their order. The scores of the data are in `position_labels`."
    if get_task(manifest.contract.task).names == "positions":
        return (
            "A row has soft labels for each of `label_names` of `manifest.json`, in their order: what the teacher predicts of it, whether the row has the label,\n"
            "over two classes, no and yes. Their hard labels are in `position_labels`."
        )
    if IMAGE_COLUMN in manifest.contract.columns:
        part = "" if manifest.contract.tokenization.views is None else _OF_VIEWS
        part += _OF_FILES * ("image_sha256" in manifest.contract.columns)
        return (
            "The soft labels of a row are what the teacher predicts for the image `encoded_image`, the classes those of `label`. "
            f"The image processor in `tokenizer/` makes pixel values of it.{part}"
        )
    if get_task(manifest.contract.task).names == "places":
        return (
            "A row has two positions, the first and the last token of the answer, whose classes are the places of the row's `input_ids`, from 0. The place of the\n"
            "CLS token stands for no answer in this window. `position_labels` has both places. Windows of a text are rows with one `source_row`, numbered by `piece`."
        )
    if get_task(manifest.contract.task).reads == "choices":
        return (
            "The soft labels of a row are the teacher's distribution over its choices, numbered from 0, as is `label`. `input_ids` has the text with each choice, one\n"
            "after another, `document_lengths` their lengths in tokens, 0 where a row has fewer choices than others; such a choice has the probability 0."
        )
    if "supervised" not in manifest.contract.columns:
        return (
            "The soft labels of a row are what the teacher predicts for the whole of it, the classes those of `label`."
        )
    if get_task(manifest.contract.task).label_source == "positions":
        return (
            "`supervised` marks the positions of `input_ids` that carry soft labels, the first token of each word: the n-th of them has\n"
            "the n-th soft labels, which are what the teacher predicts for the n-th word. A word that was cut off has no position."
        )
    if get_task(manifest.contract.task).label_source == "target":
        return (
            "`input_ids` has the tokens of the source and behind them those of the target, which `supervised` marks: the n-th of them has the n-th soft labels,\n"
            "the prediction of that token from the source and the target tokens before it."
        )
    if get_task(manifest.contract.task).label_source == "hidden":
        return (
            "`supervised` marks the positions of `input_ids` whose tokens were hidden: the n-th of them has the n-th soft labels, which are the\n"
            "prediction of the token there, and the n-th of `position_labels`, the token itself. `input_ids` has the mask token, a random token or the token itself there."
        )
    text = (
        "`supervised` marks the positions of `input_ids` that carry soft labels: the n-th of them has the n-th soft labels, which are\n"
        "the prediction made *at* that position, of the token after it."
    )
    probe = manifest.probe
    if probe is None:
        return text
    return (
        f"{text} The alignment probe found the mean weight of the token before, at and after the\n"
        f"expected one to be {probe.previous:.4f}, {probe.aligned:.4f} and {probe.following:.4f} over {probe.positions:,} positions: {probe.verdict}."
    )


def kept_mass_sql(manifest: Manifest) -> str | None:
    """Return a DuckDB query for the mean kept mass of each split, or None if all mass is kept.

    It is run in the cache's directory. Kept mass is the mass on the classes that are kept for
    certain.
    """
    mass = recipe(manifest.contract).kept_mass
    positions = "len(top_count)"
    if mass is None:
        return None
    files = {
        split: [f"data/{shard.name}.parquet" for shard in manifest.split_shards(split)] for split in manifest.splits
    }
    numbered = all(shard.name.startswith(f"{shard.split}-") for shard in manifest.shards)
    several = len({name.rpartition("-")[0] for name in (shard.name for shard in manifest.shards)}) == len(files)
    if numbered and several:  # the names that a capture gives
        split = "regexp_extract(parse_filename(filename), '(.*)-[^-]*', 1)"
    else:
        cases = " ".join(
            f"when parse_filename(filename) in ({', '.join(repr(name.rpartition('/')[2]) for name in names)}) then '{split}'"
            for split, names in files.items()
        )
        split = f"case {cases} end"
    return (
        f"select {split} as split, sum({mass}) / sum({positions}) as kept_mass\n"
        "from read_parquet('data/*.parquet', filename = true) group by split order by split;\n"
    )


IMAGE_COLUMN = "encoded_image"
_OF_VIEWS = (
    " `image_view` is the part that the teacher saw: left, top, width and height in pixels of the image turned as its orientation\n"
    "says, and 1 where it is mirrored; empty where it is the whole image. `piece` numbers the parts of an image."
)

_OF_FILES = " The cache holds no images: `encoded_image.path` is a file below the directory in `SOFTLABEL_IMAGES`, whose SHA-256 is `image_sha256`."

_ON_REQUEST = {
    "text": (
        "`text`: the part of the source's text that the row's tokens cover. What is supervised is the end of it, `text_bytes` bytes; a character that two pieces share is in the text of both."
    ),
    "messages": (
        "`messages`: the conversation that the row was rendered from, as JSON: `messages` (the turns, as the chat template was given them), `tools` (or null), and `learnt`, the numbers of\n"
        "the turns that this row learns, from 0. A row that was cut to its longest length has the whole conversation, and no turn among `learnt` that was cut off."
    ),
    "label_logprobs": (
        "`label_logprobs[n]`: the teacher's log-probability (nats, at temperature 1) of the token that follows position n."
    ),
}

_OF_WORDS = {
    "position_labels": f"`position_labels[n]`: the hard label of the n-th word, the number of its class in `label_names` of `manifest.json`, from 0; {NO_LABEL} where it has none.",
    "position_words": "`position_words[n]`: the n-th word, as the source has it or as its text was split.",
}

_OF_HIDDEN = "`position_labels[n]`: the token that the n-th supervised position hides."

_OF_TARGET = "`position_labels[n]`: the n-th token of the target, which is also that of `input_ids` at the n-th supervised position."

_OF_LABELS = f"`position_labels[n]`: 1 where the row has the n-th of `label_names` of `manifest.json`, 0 where it has not, {NO_LABEL} where that is not known. A position is one of these labels, in their order, of two classes: 0 is no, 1 is yes."

_SCORE = "`teacher_scores[n]`: what the teacher gives for the n-th of `label_names` of `manifest.json`, in the unit of the data it was trained on. `moments` of each shard there are the mean of each output and the sum of the squared distances from it."
_SCORE_NUMPY = """import numpy as np

scores = np.asarray(row["teacher_scores"])  # one for each output
positions = [([0], [score]) for score in scores]
"""

_OF_SCORES = "`position_labels[n]`: the score of the data for the n-th output; NaN where there is none."

_FULL = "`logits`: V values a position, nats, the largest is 0. softmax(logits / T) is the teacher at temperature T."
_FULL_NUMPY = """import numpy as np

logits = np.asarray(row["logits"], dtype=np.float64).reshape(-1, {num_classes})
q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
positions = [(range({num_classes}), weights) for weights in q]
"""

_TOP = (
    "`top_count[n]` classes are kept at position n; `top_ids` and `top_logprobs` (nats, of softmax(z)) hold them one position after another, by falling\n"
    "probability. `log_residuals` holds, for each position, the log of the mass outside them at temperature(s) {grid}. At such a T the exact distribution is\n"
    "q_T(i) = (1 - exp(log_residual_T)) * softmax over the kept classes of (top_logprobs / T)."
)
_TOP_NUMPY = """import numpy as np

cuts = np.cumsum(row["top_count"])[:-1]
kept = zip(np.split(row["top_ids"], cuts), np.split(row["top_logprobs"], cuts))
positions = [(ids, np.exp(np.float64(logprobs))) for ids, logprobs in kept]  # at T = 1
"""

_SAMPLED = (
    "`top_count[n]` classes are kept for certain at position n: `top_ids`, by falling probability, and their weights `top_weights`, whole numbers of 1/{steps}. `tail_count[n]`\n"
    "more are an unbiased sample of the rest, each of weight 1/{size:g}: `tail_gaps` holds the first of a position, then the distance from each to the next. The expectation\n"
    "of these weights is the teacher's distribution softmax(z / {temperature:g}); they sum to 1 +- 1/{size:g} + 1/{steps}."
)
_SAMPLED_NUMPY = """import numpy as np

top, tail = np.cumsum(row["top_count"])[:-1], np.cumsum(row["tail_count"])[:-1]
ids, weights = np.split(row["top_ids"], top), np.split(np.asarray(row["top_weights"]) / {steps}, top)
sample = [np.cumsum(gaps) for gaps in np.split(np.asarray(row["tail_gaps"], dtype=np.int64), tail)]
positions = [
    (np.concatenate([i, s]).astype(np.int64), np.concatenate([w, np.full(len(s), 1 / {size:g})]))
    for i, w, s in zip(ids, weights, sample)
]
"""
