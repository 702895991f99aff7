"""Read the YAML file, and combine it with flags and defaults into one configuration."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.data import DataConfig, over
from pipeline.config.options import flag_name
from pipeline.config.sections import SECTIONS
from pipeline.errors import ConfigError, MisuseError

ConfigType = TypeVar("ConfigType")

#: The field of `KEY=JSON` items; a list in it is a single value.
_AS_JSON = "chat_template_kwargs"
#: Fields that hold a path, a name that may be a path, or NAME=PATH.
PATHS = frozenset(
    [
        "base_model",
        "cache",
        "cache_dir",
        "check_with",
        "chat_template",
        "compression_config",
        "control",
        "data_files",
        "dataset",
        "from_",
        "html",
        "image",
        "input",
        "model",
        "output",
        "prompt_template",
        "requests",
        "runs",
        "student",
        "teacher",
        "template",
        "to",
        "tokenizer",
        "training",
        "unlabelled",
        "write_config",
    ]
)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A parsed YAML file: the shared part, and one or more sections per stage."""

    path: str
    shared: Mapping[str, Any]
    sections: Mapping[str, tuple[Mapping[str, Any], ...]]
    rounds: int | None = None
    """Number of rounds, see `pipeline.config.rounds`; None: the file has no rounds."""


def load_config(path: str | Path) -> ConfigFile:
    """Read a YAML file and check every key in it.

    Raises:
        ConfigError: the file does not exist or is not YAML, or a key is unknown (the nearest key
            is suggested).
    """
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _given_twice(yaml.compose(text, Loader=yaml.SafeLoader), set())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML file with a section per command") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if twice is not None:
        key, first, second = twice
        raise ConfigError(
            f"{path}: {key}: is given in line {first} and again in line {second}, where the second alone would count; "
            "remove one, or make several sections of one command a list (- {...})"
        )
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with a section per command, found {type(content).__name__}")
    shared: dict[str, Any] = {}
    sections: dict[str, tuple[Mapping[str, Any], ...]] = {}
    rounds: int | None = None
    for key, value in content.items():
        _check_key(path, "", key, ["task", "rounds", "data", *SECTIONS])
        if key == "task":
            shared["task"] = value
        elif key == "rounds":
            rounds = _checked_rounds(path, value)
        elif key == "data":
            shared["data"] = _checked_section(path, "data", value, DataConfig)
        else:
            parts = value if isinstance(value, list) else [value]
            sections[key] = tuple(_checked_section(path, key, part, SECTIONS[key]) for part in parts)
    return ConfigFile(str(path), shared, sections, rounds)


def resolve(
    config_type: type[ConfigType], file: ConfigFile | None, section: Mapping[str, Any], flags: Mapping[str, Any]
) -> ConfigType:
    """Resolve a configuration from flags, its section and the shared part, in this order.

    Args:
        config_type: one of the dataclasses of `pipeline.config`.
        file: the YAML file, for its shared part.
        section: the command's section of the file.
        flags: options given on the command line, by field name, including fields of `DataConfig`.

    Raises:
        MisuseError: a required option is missing, or options contradict each other.
        ConfigError: a value has the wrong type.
    """
    from pydantic import ValidationError

    values: dict[str, Any] = {}
    names = {f.name for f in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    if file is not None and "task" in names and "task" in file.shared:
        values["task"] = file.shared["task"]
    values.update(section)
    if "data" in names:
        shared_data = file.shared.get("data", {}) if file is not None else {}
        values["data"] = over(shared_data, section.get("data", {}))
        data_names = {f.name for f in dataclasses.fields(DataConfig)}
        values["data"] = over(values["data"], {k: v for k, v in flags.items() if k in data_names and k not in names})
    values.update({k: v for k, v in flags.items() if k in names})
    for listed in (f.name for f in dataclasses.fields(config_type) if str(f.type).startswith("tuple[")):  # type: ignore[arg-type]
        if isinstance(values.get(listed), str):  # a single item without a list
            values[listed] = [values[listed]]
    values = _with_homes(values)
    section_name = next((name for name, known in SECTIONS.items() if known is config_type), None)
    where = "" if file is None else f"{file.path}: " + (f"{section_name}: " if section_name else "")
    for owner, given in ((config_type, values), (DataConfig, values.get("data"))):
        if given is None:
            continue
        missing = [_flag(f) for f in dataclasses.fields(owner) if _required(f) and f.name not in given]  # type: ignore[arg-type]
        if missing:
            or_key = ", or the key in --config FILE.yaml" if config_type in SECTIONS.values() else ""
            raise MisuseError(f"{where}missing {', '.join(missing)}; give the flag{or_key}")
    try:
        checked: ConfigType = _adapter(config_type).validate_python(values)  # type: ignore[arg-type]
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        raise ConfigError(f"{where}{key.replace('_', '-') or config_type.__name__}: {first['msg']}{found}") from None


@functools.cache
def _adapter(config_type: type) -> Any:
    """A type adapter, cached since a file with many rounds has thousands of sections."""
    from pydantic import TypeAdapter

    return TypeAdapter(config_type)


def cli_fields(config_type: type) -> Iterator[dataclasses.Field[Any]]:
    """Yield the fields that become flags: those of the command and of its data section."""
    for item in dataclasses.fields(config_type):
        if item.name == "data":
            yield from dataclasses.fields(DataConfig)
        elif item.name != "training":
            yield item


def _with_homes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Expand `~` and `~user` at the start of each path; hub names never begin with `~`."""
    found = {name: _expanded(value) if name in PATHS else value for name, value in values.items()}
    return {**found, "data": _with_homes(found["data"])} if isinstance(found.get("data"), Mapping) else found


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    if isinstance(value, Mapping):
        return {key: _expanded(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    name, separator, path = value.partition("=~")
    if separator and "/" not in name:
        return f"{name}={os.path.expanduser('~' + path)}"
    return os.path.expanduser(value)


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.name != "data" and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _flag(item: dataclasses.Field[Any]) -> str:
    return "--" + flag_name(item.name)


def _checked_section(path: str | Path, name: str, value: Any, config_type: type) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name}: expected a mapping, found {value!r}")
    known = {flag_name(f.name).replace("-", "_"): f.name for f in dataclasses.fields(config_type)}
    section = {}
    for key, item in value.items():
        field_name = str(key).replace("-", "_")
        _check_key(path, f"{name}: ", field_name, list(known))
        field_name = known[field_name]
        if field_name in section:
            raise ConfigError(f"{path}: {name}: {field_name} is given twice")
        _check_quoted(path, f"{name}: {field_name}", item)
        section[field_name] = (
            _checked_section(path, f"{name}: data", item, DataConfig) if field_name == "data" else item
        )
    for listed in (f.name for f in dataclasses.fields(config_type) if str(f.type).startswith("tuple[")):
        value = section.get(listed, ())
        if isinstance(value, dict):  # `label-map: {3: sport}`
            section[listed] = value = [f"{key}={item}" for key, item in _pairs(value, as_json=listed == _AS_JSON)]
        if not isinstance(value, list | tuple):
            section[listed] = [] if value is None else [value]
    return section


def _given_twice(node: Any, seen: set[int]) -> tuple[str, int, int] | None:
    """Find the first key that a mapping repeats, and its two lines; YAML keeps the last.

    Args:
        seen: ids of visited nodes, to stop at recursive aliases; this node is added.
    """
    if node is None or node.id == "scalar" or id(node) in seen:
        return None
    seen.add(id(node))
    if node.id == "sequence":
        return next((found for item in node.value if (found := _given_twice(item, seen)) is not None), None)
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.id == "scalar" and key.value != "<<":
            if (name := (key.tag, key.value)) in lines:
                return key.value, lines[name], line
            lines[name] = line
        if (found := _given_twice(value, seen)) is not None:
            return found
    return None


def _checked_rounds(path: str | Path, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: rounds: expected a whole number of at least 1, found {value!r}")
    return value


def _check_quoted(path: str | Path, where: str, item: Any) -> None:
    """Check that placeholders are quoted; YAML reads an unquoted `seed: {round}` as a mapping."""
    for value in item if isinstance(item, list) else [item]:
        if isinstance(value, dict) and len(value) == 1 and {"round": None, "previous": None}.items() >= value.items():
            name = next(iter(value))
            raise ConfigError(f'{path}: {where}: put {{{name}}} in quotes: "{{{name}}}"')


def _pairs(value: Mapping[Any, Any], *, as_json: bool) -> Iterator[tuple[Any, Any]]:
    """Yield key and value of each item; a key with a list of values is repeated for each."""
    for key, found in value.items():
        for item in found if isinstance(found, list) and not as_json else [found]:
            yield key, json.dumps(item) if as_json else item


def _check_key(path: str | Path, where: str, key: Any, known: list[str]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
    raise ConfigError(f"{path}: {where}unknown key {key!r}{hint}")
