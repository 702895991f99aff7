"""What a report compares and omits for models with another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.measures.subjects import Subject


def tokenizer_notes(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """One line per topic; empty if all models have the tokenizer of their teachers."""
    own = [subject for subject in subjects if subject.has_own_tokens]
    if not own:
        return ()
    names = ", ".join(subject.name for subject in own)
    return (
        f"Another tokenizer than the teacher's: {names}. Models are compared by bits per byte of text, each over its own tokens of the same rows.",
        *(_bytes_and_positions(subject) for subject in own),
        f"Left out for {names}, whose tokens are not the teacher's: loss, perplexity, accuracy, Brier score, NLL, and the share of corrected teacher errors.",
        f"Agreement, KL and Jensen-Shannon divergence of {names} are over the positions that are aligned with the teacher's, whose distribution is mapped to the model's "
        "tokens. Where the encoding samples, the teacher's entropy stands for that of the mapped distribution, which is at most as large, so that KL is rather too small; "
        "without --store-entropy it is a row's mean entropy.",
    )


def _bytes_and_positions(subject: Subject) -> str:
    """The share of text and positions that a model's metrics cover, in words."""
    seen = subject.seen[0]
    assert seen.teacher_position is not None
    theirs = int(subject.teacher.seen.predictions.row_text_bytes.sum())
    ours, count = int(seen.predictions.row_text_bytes.sum()), len(seen.teacher_position)
    aligned = int((seen.teacher_position >= 0).sum())
    return (
        f"{subject.name} predicts {ours:,} bytes of these rows in {count:,} tokens, its teacher {theirs:,} bytes in {len(subject.teacher.seen.predictions.labels):,}; "
        f"{aligned / max(count, 1):.1%} of its positions are aligned."
    )
