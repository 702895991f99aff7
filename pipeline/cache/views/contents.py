"""Describe the counts over the source rows as text: what was cut, repeated, empty or unlabelled."""

from __future__ import annotations

from pipeline.records import SourceContents


def contents_lines(contents: SourceContents) -> list[str]:
    """Return one line for each count that may be unintended; no lines if there is none."""
    rows = sum(split.rows for split in contents.splits.values())
    lines = []
    if contents.cut_rows:
        lines.append(
            f"{contents.cut_rows:,} of {rows:,} rows were cut at the maximum length and lost {contents.cut_tokens:,} tokens "
            "(--max-length)"
        )
    if contents.cut_supervised_rows:
        lines.append(
            f"{contents.cut_supervised_rows:,} of {rows:,} rows lost tokens to train on (--max-length, "
            "--truncation-side)"
        )
    if contents.split_chats:
        lines.append(
            f"{contents.split_chats:,} of {rows:,} chats are {contents.split_chat_rows:,} rows: the chat template rewrites "
            "earlier turns, so that the assistant's turns do not share one context (--assistant-turns)"
        )
    if contents.shared is None and len(contents.splits) > 1:
        lines.append("it was not checked whether two splits share rows; check it where the data is made")
    for pair, count in (contents.shared or {}).items():
        one, other = pair.split(", ")
        lines.append(f"equal contents in both splits {one} and {other}: {count:,}; a score on either is too high")
    blank = sum(split.blank or 0 for split in contents.splits.values())
    if blank:
        lines.append(f"{blank:,} of {rows:,} rows have a text of white space only")
    unlabelled = {name: split for name, split in contents.splits.items() if split.unlabelled}
    if unlabelled:
        counts = ", ".join(f"{split.unlabelled:,} of {split.rows:,} in {name}" for name, split in unlabelled.items())
        lines.append(f"rows without a label: {counts}")
    return lines
