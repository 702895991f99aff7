"""Describe how a cache was made, as a command that makes it again."""

from __future__ import annotations

import shlex

from pipeline.cache.views.units import unit_of
from pipeline.records import Contract, Full, Manifest, Masking, ModelInfo, Sampled, Score, TopK, TopP, Views
from pipeline.tasks import get_task


def origin(manifest: Manifest) -> str:
    """Return Markdown with the command that made a cache, and the transforms applied since.

    If no command made it, says how it was made instead.
    """
    contract = manifest.contract
    if contract.batch_tokens == 0:
        text = "Written by `write_cache` or `softlabel import`, from soft labels that were made elsewhere."
    elif contract.source.name == "in-memory":
        text = f"Made by `cache_logits` from Python, of data in memory; the settings are those of\n\n    {command(contract)}"
    else:
        text = f"    {command(contract)}"
    if manifest.ancestry:
        steps = "".join(f"{i}. `{a.operation}` of `{a.cache_id}`\n" for i, a in enumerate(manifest.ancestry, start=1))
        text += f"\n\nThen:\n\n{steps.rstrip()}"
    return text


#: Descriptions of the values of `assistant_turns`.
_TURNS = {
    "auto": "turns of the assistant by rendering the chat up to each, in the fewest rows in which each has its own context",
    "all": "turns of the assistant by rendering the chat up to each, in one row",
    "each": "each turn of the assistant in a row of its own",
    "last": "the last turn of the assistant alone",
}


def rows_text(contract: Contract) -> str:
    """Describe a row: its maximum length, packing, and how chats and texts become rows."""
    settings = contract.tokenization
    if get_task(contract.task).reads == "images":
        return _views_text(settings.views)
    parts = [f"at most {settings.max_length} tokens", *["packed"] * settings.packing]
    parts += [] if settings.assistant_turns is None else [_TURNS[settings.assistant_turns]]
    parts += [f"chat template with {item}" for item in settings.chat_template_kwargs]
    parts += [] if settings.truncation_side is None else ["cut on the left"]
    if (masking := settings.masking) is not None:
        parts.append(f"{masking.share:.0%} of the tokens hidden{', whole words' * masking.whole_words}")
        parts += [f"{masking.copies} masks of each text"] * (masking.copies > 1)
    return ", ".join(parts)


def _views_text(views: Views | None) -> str:
    if views is None:
        return "whole images"
    mirrored = ", half of them mirrored" if views.mirror else ""
    return f"{views.count} parts of each image of train, of at least {views.smallest:.0%} of its area{mirrored}; other splits whole images"


def tokenizer_name(contract: Contract) -> str:
    """Return `tokenizer`, or `image processor` for a cache of images."""
    return "image processor" if get_task(contract.task).reads == "images" else "tokenizer"


def tokenizer_text(contract: Contract, *, short: bool = False) -> str:
    """Return the vocabulary size and hash of the tokenizer, or the hash of the image processor."""
    sha256 = contract.tokenizer.sha256[:12] if short else contract.tokenizer.sha256
    if get_task(contract.task).reads == "images":
        return f"sha256 {sha256}"
    return (
        f"{contract.tokenizer.vocabulary_size} tokens, sha256 {sha256}"
        if short
        else f"{contract.tokenizer.vocabulary_size:,} tokens, {sha256}"
    )


def command(contract: Contract) -> str:
    """Return the `softlabel cache-logits` command that makes a cache with this contract.

    It has every setting that differs from its default, and those whose default depends on the
    models.
    """
    teacher, source, columns = contract.teacher, contract.source, contract.source.columns
    flags: list[tuple[str, object]] = [
        ("--task", contract.task),
        *_teacher(teacher),
        *_judge(contract),
        ("--dataset", source.name),
        *(("--unlabelled", each.name) for each in source.unlabelled_sources),
        ("--dataset-config", source.config),
        ("--dataset-revision", source.revision),
        *(("--split", split) for split in source.fingerprints),
        ("--holdout", source.holdout or None),
        ("--text-column", columns.text if columns.text != "text" else None),
        ("--text-pair-column", columns.text_pair),
        *(("--choices-column", name) for name in columns.choices),
        ("--image-column", columns.image),
        ("--words-column", columns.words),
        ("--messages-column", columns.messages),
        ("--prompt-column", columns.prompt),
        ("--completion-column", columns.completion),
        ("--input-ids-column", columns.input_ids),
        ("--labels-column", columns.labels),
        ("--label-column", columns.label if columns.label != "label" else None),
        *(("--keep-column", name) for name in columns.keep),
        ("--group-column", columns.group),
        *_masks(contract.tokenization.masking),
        *_views(contract.tokenization.views),
        ("--stride", contract.tokenization.stride),
        ("--max-length", contract.tokenization.max_length if columns.image is None else None),
        *(("--chat-template-kwargs", item) for item in contract.tokenization.chat_template_kwargs),
        ("--assistant-turns", _unless(contract.tokenization.assistant_turns, "auto")),
        ("--truncation-side", contract.tokenization.truncation_side),
        *_encoding(contract),
        ("--batch-tokens", contract.batch_tokens),
        ("--seed", contract.seed),
        ("--on-bad-row", contract.on_bad_row if contract.on_bad_row != "stop" else None),
    ]
    of_words = unit_of(get_task(contract.task)) == "words"
    words = ["softlabel", "cache-logits"]
    for flag, value in flags:
        if value is not None:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    views = contract.tokenization.views
    words += [] if views is None or views.mirror else ["--no-view-mirror"]
    words += ["--no-store-images"] * ("image_sha256" in contract.columns)
    words += ["--packing"] * contract.tokenization.packing
    words += ["--whole-words"] * bool(contract.tokenization.masking and contract.tokenization.masking.whole_words)
    words += ["--isolate-documents"] * contract.tokenization.isolate_documents
    words += ["--calibrate"] * (teacher.judge is not None and teacher.judge.calibrated)
    words += ["--store-entropy"] * ("entropy" in contract.columns)
    words += ["--store-text"] * bool(
        "supervised" in contract.columns and contract.columns.keys() & {"text", "messages"}
    )
    words += ["--no-store-text"] * (of_words and "position_words" not in contract.columns)
    words += ["--store-label-logprobs"] * ("label_logprobs" in contract.columns)
    return shlex.join([*words, "--output", "DIR"])


def _views(views: Views | None) -> list[tuple[str, object]]:
    if views is None:
        return []
    return [("--views", views.count), ("--view-area", repr(views.smallest)), ("--view-seed", views.seed or None)]


def _masks(masking: Masking | None) -> list[tuple[str, object]]:
    if masking is None:
        return []
    return [
        ("--mask-share", masking.share),
        ("--mask-copies", masking.copies if masking.copies > 1 else None),
        ("--mask-seed", masking.seed or None),
    ]


def _judge(contract: Contract) -> list[tuple[str, object]]:
    """Return the flags of a language model that labels by prompt.

    The manifest stores its template, but not the template's file name.
    """
    judge = contract.teacher.judge
    if judge is None:
        return []
    names = contract.label_names or ()
    return [
        ("--prompt-template", "prompt.jinja"),
        *(("--label-text", f"{name}={text}") for name, text in zip(names, judge.label_texts, strict=False)),
        ("--prompt-format", judge.format),
        ("--shots", len(judge.shots) or None),
        ("--shot-tokens", judge.shot_tokens),
    ]


def judge_text(contract: Contract) -> str | None:
    """Describe how a language model labels by prompt; None if the teacher does not do so."""
    judge = contract.teacher.judge
    if judge is None:
        return None
    examples = f", {len(judge.shots)} examples ({', '.join(judge.shots[:20])})" if judge.shots else ""
    calibrated = ", calibrated by prompts without content" if judge.calibrated else ""
    return f"softmax over the labels of the log-probability of their texts after a prompt ({judge.format}{examples}{calibrated})"


def _teacher(teacher: ModelInfo) -> list[tuple[str, object]]:
    if teacher.server is not None:
        return [("--teacher", "DIR/tokenizer"), ("--server", "URL"), ("--server-model", teacher.name)]
    return [
        ("--teacher", teacher.name),
        ("--teacher-revision", teacher.revision),
        ("--dtype", teacher.dtype),
        ("--attn-implementation", teacher.attn_implementation),
        ("--quantization", teacher.quantization),
    ]


def _unless(value: str | None, default: str) -> str | None:
    return None if value == default else value


def _encoding(contract: Contract) -> list[tuple[str, object]]:
    encoding = contract.encoding
    flags: list[tuple[str, object]] = [("--encoding", encoding.kind)]
    if isinstance(encoding, Score):
        return []
    if isinstance(encoding, Full):
        return flags
    if isinstance(encoding, Sampled):
        return [*flags, ("--sample-size", encoding.sample_size), ("--temperature", encoding.temperature)]
    knob = {TopK: ("--top-k", getattr(encoding, "k", None)), TopP: ("--top-p", getattr(encoding, "p", None))}
    asked = contract.teacher.server
    more = [("--top-k", asked.top_logprobs)] if asked is not None and isinstance(encoding, TopP) else []
    return [*flags, knob[type(encoding)], *more, *(("--temperature", t) for t in encoding.temperatures)]
