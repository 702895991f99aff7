"""Run `softlabel predict`: try a model on texts or images from the command line.

The result depends on the model's task: class probabilities of a text or of each of its words, a
continuation, an answer, or scores.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import PredictConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.models.detect import detect_task
from pipeline.models.load import LoadedModel, class_names, load_model, longest_input, pad_id
from pipeline.models.saved import trained_length
from pipeline.records import BadRow, Example, Image, TextPrediction, Tokenization, TokenizedExample, WordPrediction
from pipeline.tasks import Task, check_ids, embedding_rows
from pipeline.tasks.answers.question_answering import encode_windows, of_text

logger = logging.getLogger(__name__)

#: Candidate tokens per token that is shown, since several tokens may have the same text.
_CANDIDATES = 4


def run(config: PredictConfig) -> Iterator[TextPrediction]:
    """Run `softlabel predict` on the texts of the command line, a file or standard input."""
    given = config.text or config.image
    texts = _checked(given, "--text" if config.text else "--image") if given else _read(config.input)
    task = detect_task(config.model, trust_remote_code=config.trust_remote_code, base_model=config.base_model)
    loaded = load_model(task, config.model, trust_remote_code=config.trust_remote_code, base_model=config.base_model)
    if bool(config.image) != (task.reads == "images") and given:
        reads = "images: give --image" if task.reads == "images" else "texts: give --text"
        raise MisuseError(f"{config.model}: reads {reads}")
    if task.reads == "images" and config.max_length is not None:
        raise MisuseError(f"{config.model}: reads images, and --max-length is for texts; leave it out")
    if bool(config.choice) != (task.reads == "choices"):
        reads = (
            "is a multiple-choice model: give --choice for each choice"
            if not config.choice
            else "is no multiple-choice model: leave out --choice"
        )
        raise MisuseError(f"{config.model}: {reads}")
    if (config.context is not None) != (task.names == "places"):
        reads = (
            "answers questions about a text: give --context"
            if config.context is None
            else "is no question-answering model: leave out --context"
        )
        raise MisuseError(f"{config.model}: {reads}")
    if task.reads == "images":
        yield from classify_images(task, loaded, texts, top=config.top, batch_size=task.default_eval_rows)
        return
    longest = config.max_length or trained_length(config.model) or longest_input(loaded.model, loaded.tokenizer)
    if task.reads == "choices":
        yield from choose(task, loaded, texts, config.choice, max_length=longest, top=config.top)
    elif task.names == "places":
        for question in texts:
            yield answer(task, loaded, question, config.context or "", max_length=longest, top=config.top)
    elif task.continues_prompts:
        for text in texts:
            yield TextPrediction(text, continuation=continue_text(loaded, text, config.max_new_tokens))
    elif task.label_source == "target":
        for text in texts:
            source = loaded.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            yield TextPrediction(text, target=write_targets(loaded, source, config.max_new_tokens)[0])
    elif task.label_source == "hidden":
        yield from fill_masks(loaded, texts, max_length=longest, top=config.top)
    elif task.target == "score":
        yield from give_scores(task, loaded, texts, max_length=longest, batch_size=task.default_eval_rows)
    elif task.marks_positions:
        yield from label_words(task, loaded, texts, max_length=longest, batch_size=task.default_eval_rows)
    else:
        yield from classify(task, loaded, texts, max_length=longest, top=config.top, batch_size=task.default_eval_rows)


def write_targets(loaded: LoadedModel, inputs: Mapping[str, Tensor], max_new_tokens: int) -> list[str]:
    """Return the texts that an encoder-decoder generates for B texts, with greedy decoding.

    Args:
        inputs: `input_ids` and `attention_mask`, (B, S) each.
    """
    model: Any = loaded.model
    sources = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        made = model.generate(**sources, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True)
    return [str(text).strip() for text in loaded.tokenizer.batch_decode(made, skip_special_tokens=True)]


def fill_masks(loaded: LoadedModel, texts: Sequence[str], *, max_length: int, top: int) -> Iterator[TextPrediction]:
    """Predict the most likely tokens for the mask token of each text.

    For a text with several mask tokens, only the most likely token of each is given.

    Raises:
        SourceError: a text without a mask token within `max_length` tokens.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    for number, text in enumerate(texts, 1):
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
        if not len(places):
            raise SourceError(
                f"text {number}: expected a {tokenizer.mask_token} to fill within {max_length} tokens, found none"
            )
        with torch.inference_mode():
            logits = model(**inputs).logits[0, places].float()  # (masks, V)
        found = torch.softmax(logits, -1).topk(min(_CANDIDATES * top, logits.shape[-1]))
        named = [
            _by_name(tokenizer, ids, top) for ids in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        if len(places) == 1:
            yield TextPrediction(text, named[0])
        else:
            mask = str(tokenizer.mask_token)
            words = tuple(WordPrediction(mask, *next(iter(each.items()))) for each in named)
            yield TextPrediction(text, words=words)


def _by_name(tokenizer: Any, found: tuple[list[int], list[float]], top: int) -> dict[str, float]:
    """Return the probabilities of the most likely tokens by their text.

    Of tokens that differ only in spaces (`the`, ` the`), the more likely one is kept.
    """
    names: dict[str, float] = {}
    for i, share in zip(*found, strict=True):
        names.setdefault(str(tokenizer.decode([i])).strip(), share)
    return dict(itertools.islice(names.items(), top))


def give_scores(
    task: Task, loaded: LoadedModel, texts: Sequence[str], *, max_length: int, batch_size: int
) -> Iterator[TextPrediction]:
    """Predict the scores of each text, by the names of the outputs.

    Args:
        max_length: tokens; longer texts are truncated.

    Raises:
        ModelError: the model gives no scores.
    """
    task.num_classes(loaded.model, loaded.tokenizer)
    names = class_names(loaded.model)
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        examples = [Example(source_row=i, text=text) for i, text in enumerate(chunk)]
        rows = task.tokenize(examples, "", loaded.tokenizer, Tokenization(max_length))
        found = _logits(task, loaded, [row for row in rows if isinstance(row, TokenizedExample)])
        for text, scores in zip(chunk, found.view(len(chunk), -1).tolist(), strict=True):
            yield TextPrediction(text, scores=dict(zip(names, scores, strict=True)))


def _probabilities(task: Task, loaded: LoadedModel, rows: Sequence[TokenizedExample]) -> Tensor:
    """Return (N, V) probabilities at all positions of the rows."""
    return torch.softmax(_logits(task, loaded, rows), -1)


def _logits(task: Task, loaded: LoadedModel, rows: Sequence[TokenizedExample]) -> Tensor:
    """Return (N, V) float32 logits at all positions of the rows."""
    model: Any = loaded.model
    if task.reads != "images":
        check_ids(embedding_rows(model), rows, loaded.tokenizer, loaded.name)
    inputs, supervised = task.collate(rows, pad_id(loaded.tokenizer, model), processor=loaded.tokenizer)
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        return task.gather_logits(model, placed, supervised).float()


def classify(
    task: Task, loaded: LoadedModel, texts: Sequence[str], *, max_length: int, top: int, batch_size: int
) -> Iterator[TextPrediction]:
    """Predict the `top` most likely labels of each text with their probabilities.

    With several labels per text (multi-label), each label has its own probability.

    Args:
        max_length: tokens; longer texts are truncated.

    Raises:
        ModelError: the model is no classifier of texts.
    """
    task.num_classes(loaded.model, loaded.tokenizer)  # raises ModelError if it has no labels
    names = class_names(loaded.model)
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        examples = [Example(source_row=i, text=text) for i, text in enumerate(chunk)]
        rows = task.tokenize(examples, "", loaded.tokenizer, Tokenization(max_length))
        shares = _probabilities(task, loaded, [row for row in rows if isinstance(row, TokenizedExample)])
        if task.names == "positions":  # the probability that the text has each label
            shares = shares[:, 1].view(len(chunk), len(names))
        found = shares.topk(min(top, len(names)))
        for text, values, ids in zip(chunk, found.values.tolist(), found.indices.tolist(), strict=True):
            yield TextPrediction(text, {names[i]: value for i, value in zip(ids, values, strict=True)})


def choose(
    task: Task, loaded: LoadedModel, texts: Sequence[str], choices: Sequence[str], *, max_length: int, top: int
) -> Iterator[TextPrediction]:
    """Predict the most likely of the given choices for each text, with their probabilities.

    Raises:
        SourceError: a text or a choice without tokens.
    """
    settings = Tokenization(max_length, num_choices=len(choices))
    for number, text in enumerate(texts, 1):
        (row,) = task.tokenize([Example(0, text, choices=tuple(choices))], "", loaded.tokenizer, settings)
        if isinstance(row, BadRow):
            raise SourceError(f"text {number}: {row.reason}")
        found = _probabilities(task, loaded, [row])[0].topk(min(top, len(choices)))
        named = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        yield TextPrediction(text, {choices[i]: value for i, value in named})


def answer(
    task: Task, loaded: LoadedModel, question: str, context: str, *, max_length: int, top: int
) -> TextPrediction:
    """Find the most likely answers to a question in a text, with their probabilities.

    The probability of an answer is the product of those of its start and end; "" is no answer.
    Windows of a long text are evaluated one by one, and the most likely answers of all are
    returned.

    Raises:
        SourceError: the question leaves no room for the text.
    """
    settings = Tokenization(max_length)
    encoded = encode_windows(question, context, loaded.tokenizer, settings)
    if encoded is None:
        raise SourceError(f"--text: expected a question that leaves room for the text within {max_length} tokens")
    found: dict[str, float] = {}
    windows = task.tokenize([Example(0, question, context)], "", loaded.tokenizer, settings)
    for number, row in enumerate(window for window in windows if isinstance(window, TokenizedExample)):
        shares = _probabilities(task, loaded, [row])[:, : len(row.input_ids)].double()  # (2, T)
        pairs = torch.triu(shares[0][:, None] * shares[1][None])
        places, offsets = of_text(encoded, number), encoded["offset_mapping"][number]
        inside = torch.zeros(len(row.input_ids), dtype=torch.bool)
        inside[places] = True
        outside = pairs[~inside][:, ~inside].sum()  # no answer: the CLS token, or other places outside the text
        found[""] = max(found.get("", 0.0), float(outside))
        of_answers = pairs * inside[:, None] * inside[None]
        best = of_answers.flatten().topk(min(4 * top, of_answers.numel()))
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            first, last = divmod(index, len(row.input_ids))
            if value > 0:
                text = context[offsets[first][0] : offsets[last][1]].strip()
                found[text] = max(found.get(text, 0.0), value)
    likeliest = sorted(found.items(), key=lambda item: -item[1])[:top]
    return TextPrediction(question, dict(likeliest))


def classify_images(
    task: Task, loaded: LoadedModel, files: Sequence[str], *, top: int, batch_size: int
) -> Iterator[TextPrediction]:
    """Predict the most likely labels of the image in each file, with their probabilities.

    Raises:
        ModelError: the model is no image classifier.
        SourceError: a file cannot be read as an image.
    """
    task.num_classes(loaded.model, loaded.tokenizer)
    names = class_names(loaded.model)
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        examples = [Example(source_row=i, image=_read_image(file)) for i, file in enumerate(chunk)]
        rows = []
        for row in task.tokenize(examples, "", loaded.tokenizer, Tokenization(1)):
            if isinstance(row, BadRow):
                raise SourceError(f"{chunk[row.source_row]}: {row.reason.partition(': ')[2]}")
            rows.append(row)
        found = _probabilities(task, loaded, rows).topk(min(top, len(names)))
        for file, values, ids in zip(chunk, found.values.tolist(), found.indices.tolist(), strict=True):
            yield TextPrediction(file, {names[i]: value for i, value in zip(ids, values, strict=True)})


def _read_image(file: str) -> Image:
    try:
        return Image(Path(file).expanduser().read_bytes(), Path(file).name)
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}); expected a file of an image") from None


def label_words(
    task: Task, loaded: LoadedModel, texts: Sequence[str], *, max_length: int, batch_size: int
) -> Iterator[TextPrediction]:
    """Predict the most likely label of each word of each text, with its probability.

    Args:
        max_length: tokens; words beyond them have no prediction, and a warning counts the texts.

    Raises:
        ModelError: the model is no token classifier.
        SourceError: a text without a word that can be read.
    """
    task.num_classes(loaded.model, loaded.tokenizer)
    names = class_names(loaded.model)
    num_cut = lost_tokens = 0
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        examples = [Example(source_row=start + i, text=text) for i, text in enumerate(chunk)]
        tokens = []
        for number, row in enumerate(
            task.tokenize(examples, "", loaded.tokenizer, Tokenization(max_length)), start + 1
        ):
            if isinstance(row, BadRow):
                raise SourceError(f"text {number}: {row.reason}")
            tokens.append(row)
            num_cut += bool(row.cut)
            lost_tokens += sum(cut.tokens for cut in row.cut)
        found = _probabilities(task, loaded, tokens).max(-1)
        answers = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        for text, row in zip(chunk, tokens, strict=True):
            said = [(word, *next(answers)) for word in row.words or ()]
            yield TextPrediction(text, words=tuple(WordPrediction(word, names[i], value) for word, value, i in said))
    if num_cut:
        logger.warning(
            "%d of %d texts were cut to %d tokens, and lost %d: the words beyond have no label; --max-length sets the limit",
            num_cut, len(texts), max_length, lost_tokens,
        )  # fmt: skip


def continue_text(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Return the continuation of a text by a language model, with greedy decoding.

    Raises:
        MisuseError: text and new tokens together are longer than the model accepts.
    """
    model: Any = loaded.model
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    count, longest = inputs["input_ids"].shape[1], longest_input(model, loaded.tokenizer)
    if count + max_new_tokens > longest:
        raise MisuseError(
            f"{loaded.name}: takes at most {longest} tokens, found {count} of the text and {max_new_tokens} new ones; give a shorter text or fewer new tokens"
        )
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad_id(loaded.tokenizer, model),
        )
    return str(loaded.tokenizer.decode(ids[0, count:], skip_special_tokens=True))


def _read(file: str | None) -> Sequence[str]:
    """Read one text per line from a file or standard input.

    Raises:
        SourceError: the file cannot be read, is not UTF-8, or has an empty line.
        MisuseError: standard input is a terminal, so that the command would wait without a prompt.
    """
    if file is None and sys.stdin.isatty():
        raise MisuseError("missing a text; give --text, --input FILE, or one text per line on standard input")
    name = file or "standard input"
    if Path(name).suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise MisuseError(f"--input {file}: is a table; expected a file with one text per line: write its texts to one")
    try:
        data = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
    except OSError as error:
        raise SourceError(
            f"--input {file}: cannot be read ({error.strerror}); expected a file with one text per line"
        ) from None
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(f"{name}: line {line}: expected UTF-8, found the byte 0x{data[error.start]:02x}") from None
    lines = content.split("\n")
    return _checked([line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)], f"{name}: line")


def _checked(texts: Sequence[str], where: str) -> Sequence[str]:
    """Refuse empty texts, for which a model would give a prediction too.

    Raises:
        SourceError: no text, or an empty one.
    """
    if not texts:
        raise SourceError(f"{where.removesuffix(': line')}: expected a text a line, found nothing")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise SourceError(f"{where} {number}: expected a text, found an empty one")
    return texts
