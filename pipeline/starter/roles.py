"""Choose the columns of text and label by type, values and names.

If several columns are equally plausible, an error names the flag that decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import InitConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.starter.facts import Facts


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Usual words in the names of columns, in English and a few other languages.
_TEXT = _words(
    "text texts body content contents message document sentence review comment description utterance headline tweet "
    "abstract article post inhalt beschreibung nachricht bewertung kommentar anfrage texte contenu texto contenido"
)
_LABEL = _words(
    "label labels class classes category categories kategorie klasse rubrik target topic intent sentiment tag y gold "
    "emotion rating stars genre classe categorie catégorie etiquette étiquette clase categoria categoría"
)
_NEVER_LABEL = _words(
    "id ids uid uuid index idx nr no nummer number date datum day time zeit timestamp year jahr month monat url link "
    "language lang sprache split source file"
)
#: Words of `_NEVER_LABEL` that also number classes: `class_id`, `label no`.
_NUMBERING = _words("id ids index idx nr no nummer number")
_CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
_SHORT_CHARS, _SHORT_WORDS = 12, 2.5


@dataclass(frozen=True, slots=True)
class Roles:
    """The columns that are read, by role."""

    text: str | None = None
    text_pair: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: str | None = None
    label: str | None = None

    @property
    def is_generative(self) -> bool:
        """Whether the input is of a kind that only language models read."""
        return self.text is None

    @property
    def named(self) -> frozenset[str]:
        """The names of all columns that are read."""
        fields = (self.text, self.text_pair, self.messages, self.prompt, self.completion, self.input_ids, self.label)
        return frozenset(name for name in fields if name is not None)


def choose_roles(where: str, facts: Mapping[str, Facts], config: InitConfig, *, tokens: bool | None) -> Roles:
    """Choose the columns: those given by flags, else those inferred from the data.

    Args:
        where: the location that begins error messages.
        tokens: whether the task's classes are tokens; None: not known.

    Raises:
        SourceError: a column does not exist, or no column can be the text or the label.
        MisuseError: several columns can be; the message names the flag that decides.
    """
    asked = [config.text_column, config.text_pair_column, config.label_column, config.messages_column]
    for name in (*asked, config.prompt_column, config.completion_column):
        if name is not None and name not in facts:
            raise SourceError(f"{where}: no column {name!r}; found {', '.join(facts)}")
    _check_flags(config, tokens=tokens)
    if config.prompt_column is not None:
        return Roles(prompt=config.prompt_column, completion=config.completion_column)
    if config.messages_column is not None:
        return Roles(messages=config.messages_column)
    is_text = config.text_column is not None or config.label_column is not None or tokens is False
    if not is_text:
        found = _generative(where, facts, named_alone=tokens is None)
        if found is not None:
            return found
    try:
        text = _text(where, facts, config)
    except MisuseError:  # question and answer without a label
        found = _generative(where, facts, named_alone=False) if tokens is None and not is_text else None
        if found is None or _label_candidates(facts, found.named):
            raise
        return found
    pair = config.text_pair_column
    if tokens:
        return Roles(text=text)
    label = _label(where, facts, config, {text, pair})
    if label is None and config.teacher is None:
        found = _generative(where, facts, named_alone=False) if tokens is None else None
        if found is not None:
            return found
        scores = "" if not any(each.fractions for each in facts.values()) else " (scores are not supported)"
        raise SourceError(
            f"{where}: no column that can be the label, a few values that come again and again; found "
            f"{listed(facts.values())}{scores}; name it with --label-column, or give --task causal-lm for a language model, or "
            "--teacher for a classifier that needs no labels"
        )
    if label is not None and len(text.split()) >= 5 and label in {value for value, _ in facts[label].values}:
        raise SourceError(
            f"{where}: the first line is a row, and no names of columns ({text[:40]!r}, {label!r}); put a line of names first, as text,label"
        )
    return Roles(text=text, text_pair=pair, label=label)


def _check_flags(config: InitConfig, *, tokens: bool | None) -> None:
    """Check that models of the task read the columns given by flags.

    Raises:
        MisuseError: they do not read one of them.
    """
    if tokens is None:
        return
    of_chats = ("messages_column", "prompt_column", "completion_column")
    wrong = ("text_pair_column", "label_column") if tokens else of_chats
    given = next((name for name in wrong if getattr(config, name) is not None), None)
    if given is not None:
        named = "--teacher" if config.task is None else f"--task {config.task}"
        model, other = ("a language model", "classifier") if tokens else ("a classifier", "language model")
        raise MisuseError(
            f"--{given.replace('_', '-')} does not go with {named}: {model} does not read such a column; drop the flag, or name a {other}"
        )


def listed(facts: Iterable[Facts]) -> str:
    """List columns with a summary of each, for messages."""
    shown = [f"{each.name!r} ({summary(each)})" for each in facts]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def summary(each: Facts) -> str:
    """A short summary of a column's content."""
    if not each.is_scalar:
        return each.kind
    if not each.filled:
        return "empty"
    if each.distinct == 1:
        return "the same value on every row" if each.filled == each.rows else "one value"
    if each.looks in ("url", "date"):
        return f"{each.looks}s"
    if each.fractions:
        return "scores: numbers with fractions"
    if each.distinct >= 0.95 * each.filled and each.filled > 5 and not is_long(each):
        return f"{each.kind}, a different value on each row"
    if is_long(each):
        return f"text, {each.mean_chars:,.0f} characters on average"
    return f"{each.kind}, {each.distinct:,} values"


def is_long(each: Facts) -> bool:
    """Whether a column holds written text, not codes or names."""
    return (
        each.kind == "text"
        and not each.looks
        and (each.mean_chars >= _SHORT_CHARS or each.mean_words >= _SHORT_WORDS)
        and each.distinct >= 0.3 * each.filled
    )


def _generative(where: str, facts: Mapping[str, Facts], *, named_alone: bool) -> Roles | None:
    """Find chats, prompts or token ids; `named_alone`: only unambiguous names."""
    chats = [each.name for each in facts.values() if "role, content" in each.kind or "from, value" in each.kind]
    mixed = [
        n
        for n in facts
        if n.lower() in _CHATS and facts[n].kind in ("values of mixed types", "lists of values of mixed types")
    ]
    usual = [name for name in (*chats, *mixed) if name.lower() in _CHATS]
    lower = {name.lower(): name for name in reversed(list(facts))}
    for prompt, completion in _PAIRS[: 1 if named_alone else None]:
        if prompt in lower and completion in lower:
            return Roles(prompt=lower[prompt], completion=lower[completion])
    found = usual or chats
    if len(found) > 1:
        raise MisuseError(f"{where}: several columns hold chats: {', '.join(found)}; choose with --messages-column")
    if found:
        return Roles(messages=found[0])
    if facts.get("input_ids") is not None and facts["input_ids"].kind == "lists of integers":
        return Roles(input_ids="input_ids")
    return None


def _text(where: str, facts: Mapping[str, Facts], config: InitConfig) -> str:
    if config.text_column is not None:
        return config.text_column
    known = {config.label_column, config.text_pair_column}
    texts = [each for each in facts.values() if each.kind == "text" and each.filled and each.name not in known]
    for each in texts:
        if each.name.lower() == "text":
            return each.name
    found = [each for each in texts if is_long(each)] or [
        each
        for each in texts
        if not each.looks and each.distinct >= 0.5 * each.filled and not each.words & _NEVER_LABEL
    ]
    if not found:
        raise SourceError(
            f"{where}: no column that can be the text; found {listed(facts.values())}; name it with --text-column"
        )
    longest = max(found, key=lambda each: each.mean_chars)
    near = [each for each in found if each.mean_chars >= 0.5 * longest.mean_chars]
    return _only(where, near, _TEXT, "the text", "--text-column", " (and --text-pair-column for pairs of texts)").name


def _possible(facts: Mapping[str, Facts], taken: Collection[str | None]) -> list[Facts]:
    return [each for each in facts.values() if each.name not in taken and not _is_never_label(each)]


def _is_never_label(each: Facts) -> bool:
    """Whether the name is that of an id, a date or similar; `class_id` is not."""
    found = each.words & _NEVER_LABEL
    return bool(found - _NUMBERING if each.words & _LABEL else found)


def _label_candidates(facts: Mapping[str, Facts], taken: Collection[str | None]) -> list[Facts]:
    return [
        each
        for each in _possible(facts, taken)
        if label_fault(each) is None and _can_be_label(each, by_name=bool(each.words & _LABEL))
    ]


def _label(where: str, facts: Mapping[str, Facts], config: InitConfig, taken: set[str | None]) -> str | None:
    if config.label_column is not None:
        fault = label_fault(facts[config.label_column])
        if fault is not None:
            raise SourceError(f"{where}: column {config.label_column!r} (--label-column): {fault}")
        return config.label_column
    others = _possible(facts, taken)
    named = [each for each in others if each.words & _LABEL]
    for each in named:  # the usual name, ignoring case
        if each.name.lower() == "label" and label_fault(each) is None:
            return each.name
    good = _label_candidates(facts, taken)
    if not good:
        faulty = next((each for each in named if label_fault(each) is not None), None)
        if faulty is not None and config.teacher is None:
            raise SourceError(
                f"{where}: column {faulty.name!r}: {label_fault(faulty)}; name another with --label-column"
            )
        return None
    binary = [
        each for each in good if {str(value) for value, _ in each.values} <= {"0", "1", "0.0", "1.0", "False", "True"}
    ]
    if len(binary) >= 3 and not [each for each in good if each in named and each not in binary]:
        names = ", ".join(each.name for each in binary)
        raise MisuseError(
            f"{where}: labels in several columns of 0 and 1 ({names}): a row may have several classes at once, which is not "
            "supported; choose one with --label-column, or make one column with the class of each row"
        )
    return _only(where, good, _LABEL, "the label", "--label-column", "").name


def label_fault(each: Facts) -> str | None:
    """Why a column cannot be the label, regardless of its name; None if it can."""
    if each.kind.startswith("lists"):
        return "several labels on one row are not supported; expected one class a row"
    if not each.filled:
        return "no row has a label"
    if not each.is_scalar:
        return f"expected one name or class id a row, found {each.kind}"
    if each.fractions:
        return "numbers with fractions are scores, which are not supported; expected one class a row"
    if each.distinct == 1:
        return f"one class only ({each.values[0][0]}); expected at least two"
    if each.distinct > 0.7 * each.filled and each.filled > 10:
        return f"{each.distinct:,} different values on {each.filled:,} labelled rows are no classes; expected a few that come again"
    return None


def _can_be_label(each: Facts, *, by_name: bool) -> bool:
    if each.looks in ("url", "date") or (each.kind == "text" and each.mean_chars > 80):
        return False
    often = each.filled / each.distinct
    return often >= 1.5 if by_name else often >= 4 or (each.distinct <= 10 and often >= 2)


def _only(where: str, found: Sequence[Facts], usual: frozenset[str], what: str, flag: str, more: str) -> Facts:
    """The only column, or the only one with a usual word in its name.

    Raises:
        MisuseError: several columns remain.
    """
    named = [each for each in found if each.words & usual]
    choice = found if len(found) == 1 else named
    if len(choice) != 1:
        raise MisuseError(f"{where}: several columns can be {what}: {listed(named or found)}; choose with {flag}{more}")
    return choice[0]
