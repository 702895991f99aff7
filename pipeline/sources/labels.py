"""Map the class labels of a data set, names or numbers, to the class ids of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.records import NO_LABEL
from pipeline.sources.batches import UNREADABLE, read_rows
from pipeline.sources.columns import check_label, class_names, holds_spans
from pipeline.sources.source import Source

logger = logging.getLogger(__name__)

MEND = "correct the row, or name another column with --label-column"


@dataclass(frozen=True, slots=True)
class Names:
    """Names with ids; lookup is exact first, then ignores case and surrounding space."""

    ids: Mapping[str, int]
    folded: Mapping[str, tuple[str, ...]]
    """Name after `fold` -> the original names."""

    @classmethod
    def of(cls, ids: Mapping[str, int]) -> Names:
        """Build from names with ids."""
        groups: dict[str, tuple[str, ...]] = {}
        for name in ids:
            groups[fold(name)] = (*groups.get(fold(name), ()), name)
        return cls(ids, groups)

    def find(self, text: str, where: str) -> int | None:
        """Return the id of a name; None: there is no such name.

        Raises:
            SourceError: there is no exact match, and names with different ids match apart from case
                and space.
        """
        if text in self.ids:
            return self.ids[text]
        near = self.folded.get(fold(text), ())
        if len({self.ids[name] for name in near}) > 1:
            raise SourceError(
                f"{where}: label {text!r} may be {' or '.join(map(repr, near))}, which differ in case or space alone; {_WRITE_IT}"
            )
        return self.ids[near[0]] if near else None


_WRITE_IT = "write one of them exactly, or say which with --label-map DATA=MODEL"


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Maps raw values of a label column to class ids."""

    source: str
    """Name of the source, for messages."""
    names: Names
    """The model's class names."""
    numbers: Mapping[int, int]
    """Whole number -> class id: by name if a name is this number, else by position."""
    unclear: frozenset[int]
    """Ambiguous numbers: they are not a name, and the class at this position is named by another
    number."""
    class_ids: Mapping[str, tuple[int, ...]]
    """Split with a `ClassLabel` column -> the class id of each of its numbers."""
    class_names: Mapping[str, tuple[str, ...]]
    """Split with a `ClassLabel` column -> its names."""
    given: Names
    """`--label-map`: data value -> class id. It takes precedence over all other rules."""
    several: bool = False
    """Whether a row has several labels at once."""

    @classmethod
    def for_names(
        cls, source: Source, names: tuple[str, ...], label_map: Sequence[str] = (), *, several: bool = False
    ) -> LabelMap:
        """Build a map to positions in `names`.

        Text is matched to names, ignoring case and surrounding space. An integer is matched to a
        name that is this number, else it is a position. Integers of a `ClassLabel` are matched by
        the names of the `ClassLabel`, if `names` has all of them.

        Args:
            label_map: `DATA=MODEL` each: a name or number of the data, and a name, `LABEL_i` or
                number of the model.
            several: a row has several labels at once.

        Raises:
            SourceError: the label column has another type, the classes of a `ClassLabel` do not
                match, or one side of the label map is not known.
        """
        known = Names.of({name: i for i, name in enumerate(names)})
        numbers, unclear = _numbers(names)
        given = Names.of(_given(label_map, known, numbers))
        column = source.columns.label
        if label_map and column is None:
            found = ", ".join(next(iter(source.splits.values())).column_names)
            raise SourceError(
                f"{source.name}: --label-map: no label column; found {found}; name it with --label-column"
            )
        if label_map and any(holds_spans(dataset, column or "") for dataset in source.splits.values()):
            raise SourceError(
                f"{source.name}: --label-map is for labels of rows and words, and column {column!r} holds spans; rename their labels in the data"
            )
        class_ids: dict[str, tuple[int, ...]] = {}
        named: dict[str, tuple[str, ...]] = {}
        for split, dataset in source.splits.items():
            if column is None or column not in dataset.column_names:
                continue
            where = f"{source.name}: split {split}"
            check_label(where, dataset, source.columns, holds="classes" if several else "class")
            found_names = class_names(dataset.features[column])
            if found_names:
                named[split] = found_names
            if found_names and not holds_spans(dataset, column):
                class_ids[split] = _class_ids(named[split], known, given, where)
        made = cls(source.name, known, numbers, unclear, class_ids, named, given, several)
        if column is not None:
            made._check_given(source, column)
        return made

    def class_id(self, value: object, *, split: str, row: int) -> int | None:
        """Return the class id of a raw value; None: unlabelled.

        Null and NaN mean unlabelled, and so does -1 unless a class has that name.

        Raises:
            SourceError: the name is unknown, or the number is not a class.
        """
        where = f"{self.source}: split {split}, row {row}"
        key = self._given_key(value, split, where)
        if key is not None:
            return self.given.ids[key]
        if isinstance(value, str):
            found = self.names.find(value, where)
            if found is None:
                raise SourceError(f"{where}: unknown label {value!r}; expected one of {listed(self.names.ids)}; {_MAP}")
            return found
        if isinstance(value, bool) and (found := self.names.find(str(value), where)) is not None:
            return found
        by_class = self.class_ids.get(split)
        if by_class is None and value == -1 and -1 in self.numbers:
            return self.numbers[-1]
        number = whole_number(value, where)
        if number is None:
            return None
        if by_class is not None:
            if not 0 <= number < len(by_class):
                raise SourceError(
                    f"{where}: label {number} out of range; expected 0 to {len(by_class) - 1} ({listed(self.class_names[split])}); {_MAP}"
                )
            return by_class[number]
        if number in self.unclear:
            raise SourceError(
                f"{where}: label {number} is ambiguous: it is the name of no class, and the class at position {number} is named by another number ({listed(self.names.ids)}); "
                "say which with --label-map DATA=MODEL"
            )
        if number not in self.numbers:
            expected = (
                f"0 to {len(self.numbers) - 1} ({listed(self.names.ids)})"
                if self.numbers.keys() == set(range(len(self.numbers)))
                else f"one of the classes named {listed(self.names.ids)}"
            )
            raise SourceError(f"{where}: label {number} out of range; expected {expected}; {_MAP}")
        return self.numbers[number]

    def shown(self, value: object, split: str) -> str:
        """Return a raw value in the form of the side DATA of `--label-map`."""
        names = self.class_names.get(split)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            return names[int(value)] if names is not None and 0 <= value < len(names) else f"{value:.0f}"
        return str(value)

    @property
    def contract_form(self) -> tuple[str, ...]:
        """The label map as the contract records it: sorted, with class names."""
        return tuple(sorted(f"{data}={self.class_name(i)}" for data, i in self.given.ids.items()))

    def class_name(self, class_id: int) -> str:
        """Return the model's name of a class, or `LABEL_i` if another class has the same name."""
        return next((name for name, i in self.names.ids.items() if i == class_id), f"LABEL_{class_id}")

    def _given_key(self, value: object, split: str, where: str) -> str | None:
        """Return the side DATA of the label map that matches a raw value; None: there is none."""
        if not self.given.ids or value is None or value is UNREADABLE or value != value:
            return None
        forms = [self.shown(value, split)]
        if isinstance(value, int | float):
            forms.append(f"{value:.0f}")
        for form in forms:
            if self.given.find(form, where) is not None:
                return form if form in self.given.ids else self.given.folded[fold(form)][0]
        return None

    def _check_given(self, source: Source, column: str) -> None:
        """Check that every DATA of the label map occurs in the data.

        Raises:
            SourceError: one does not occur.
        """
        if not self.given.ids:
            return
        values: dict[str, None] = {}
        used: set[str | None] = set()
        for split in source.splits:
            raw: Sequence[object] = range(-1, len(self.class_names.get(split, ())))
            if split not in self.class_names:
                raw = list(dict.fromkeys(value for _, value in raw_labels(source, column, (split,))))
            for value in raw:
                used.add(self._given_key(value, split, f"{source.name}: split {split}"))
                if value is not None and value != -1:
                    values[self.shown(value, split)] = None
        unknown = [data for data in self.given.ids if data not in used]
        if unknown:
            raise SourceError(
                f"{source.name}: --label-map: no row has the label {unknown[0]!r}; expected DATA=MODEL with DATA one of {listed(sorted(values, key=order))}"
            )


_MAP = f"{MEND}, or say which class it is with --label-map DATA=MODEL"


def fold(name: str) -> str:
    """Normalise a name for comparison without case and surrounding space."""
    return name.strip().casefold()


def order(name: str) -> tuple[int, int, str]:
    """Return a sort key of names: whole numbers come first, in numeric order."""
    return (0, int(name), name) if is_number(name) else (1, 0, name)


def is_number(name: str) -> bool:
    """Return whether a name is a whole number."""
    return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", name) is not None


def listed(names: Sequence[str] | Mapping[str, int]) -> str:
    """List the first 20 names, for messages; names with white space around them in quotes."""
    return ", ".join(name if name == name.strip() else repr(name) for name in list(names)[:20]) + (
        f", ... ({len(names)} in all)" if len(names) > 20 else ""
    )


def sides(item: str) -> tuple[str, str]:
    """Split one `--label-map` into DATA and MODEL at its last `=`."""
    data, _, model = item.rpartition("=")
    return data, model


def raw_labels(source: Source, column: str, splits: Sequence[str] = ()) -> Iterator[tuple[str, object]]:
    """Yield every value of a label column with its location, for messages.

    Values in lists and spans are yielded one by one, without -100.

    Args:
        splits: the splits to read; empty: all.
    """
    for split in splits or source.splits:
        for i, row in enumerate(read_rows(source.splits[split], [column])):
            value = row.get(column)
            for each in [each for each in value if each != NO_LABEL] if isinstance(value, list) else [value]:
                yield f"{source.name}: split {split}, row {i}", each["label"] if isinstance(each, dict) else each


def whole_number(value: object, where: str) -> int | None:
    """Convert an integer, boolean or whole float to an integer; null, NaN and -1 to None.

    Raises:
        SourceError: the value is of another kind; the message begins with `where`.
    """
    if value is None or value is UNREADABLE or value == -1 or value != value:
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise SourceError(f"{where}: label {value!r} is no class; expected a name or a whole number; {MEND}")


def _numbers(names: tuple[str, ...]) -> tuple[dict[int, int], frozenset[int]]:
    """Return class ids by number, and the ambiguous numbers.

    A number is the class with this name, else the class at this position. It is ambiguous if that
    class is named by another number.
    """
    named = {int(name): i for i, name in enumerate(names) if is_number(name)}
    if len(named) == len(names):
        return named, frozenset()
    unclear = {i for i, name in enumerate(names) if is_number(name) and i not in named}
    return {**{i: i for i in range(len(names)) if i not in unclear}, **named}, frozenset(unclear)


def _given(label_map: Sequence[str], names: Names, numbers: Mapping[int, int]) -> dict[str, int]:
    """Parse a label map into class ids by DATA.

    Raises:
        SourceError: the model does not have a class, or one label has two classes.
    """
    found: dict[str, int] = {}
    for item in label_map:
        data, model = sides(item)
        where = f"--label-map {item}"
        known = names.find(model, where)
        position = re.fullmatch(r"\s*LABEL_([0-9]+)\s*", model)
        if known is None and position is not None and int(position[1]) < len(names.ids):
            known = int(position[1])
        if known is None and is_number(model):
            known = numbers.get(int(model))
        if known is None:
            raise SourceError(f"{where}: unknown class {model!r}; expected one of {listed(names.ids)}")
        if found.setdefault(data, known) != known:
            raise SourceError(f"{where}: label {data!r} is given two classes; give it one")
    return found


def _class_ids(found: tuple[str, ...], names: Names, given: Names, where: str) -> tuple[int, ...]:
    """Return the class id of each name of a `ClassLabel`.

    The classes are matched by name if the model has all of the names, else by number.

    Raises:
        SourceError: the model lacks a name, and has another number of classes, has some of the
            names at other positions, or a label map is given.
    """
    ids: list[int | None] = []
    for number, name in enumerate(found):
        mapped = given.find(name, where)
        if mapped is None:
            mapped = given.find(str(number), where)
        ids.append(names.find(name, where) if mapped is None else mapped)
    whole = tuple(i for i in ids if i is not None)
    if len(whole) == len(ids):
        return whole
    model = list(names.ids)
    if len(found) != len(model):
        raise SourceError(
            f"{where}: expected the model's {len(model)} labels ({listed(model)}), found {len(found)} in the data's list of classes for all splits ({listed(found)}); "
            "rename the data's labels to the model's, or give --label-map DATA=MODEL for each"
        )
    if given.ids:
        unknown = next(name for name, i in zip(found, ids, strict=True) if i is None)
        raise SourceError(
            f"{where}: unknown label {unknown!r}; expected one of {listed(names.ids)}; give --label-map {unknown}=MODEL too"
        )
    for number, (name, i) in enumerate(zip(found, ids, strict=True)):
        if i is not None and i != number:
            unknown = next(name for name, i in zip(found, ids, strict=True) if i is None)
            raise SourceError(
                f"{where}: label {number} is {name!r}, which is the model's class {i}, and {unknown!r} is none of its classes ({listed(names.ids)}); "
                f"give --label-map {unknown}=MODEL"
            )
    if tuple(model) != tuple(f"LABEL_{i}" for i in range(len(model))):
        logger.warning(
            "%s: the data's labels (%s) are not the model's (%s); they are matched by number: make sure that the order is the same, or give --label-map DATA=MODEL",
            *(where, listed(found), listed(model)),
        )
    return tuple(range(len(model)))
