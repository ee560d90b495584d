"""Configuration dataclasses: read from YAML, with every key and type checked. Imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from c2c.errors import C2CError, did_you_mean

Config = TypeVar("Config")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "nothing"}
_LARGEST = 2**53  # the largest number up to which a float is exact
_ACCEPTED = {float: (int, float), str: (str, Path), list: (list, tuple), tuple: (list, tuple)}  # besides the type


class ConfigError(C2CError, ValueError):
    """A configuration with unknown keys or impossible values."""


def option(default: Any, help: str, *, repr: bool = True, **metadata: Any) -> Any:
    """Make a dataclass field whose help is that of its command-line option too; metadata as in ``c2c.cli.options``."""
    metadata["help"] = help
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, repr=repr, metadata=metadata)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    expected = "Expected a YAML file of keys and values, such as those in configs/."
    if not path.is_file():
        found = f"{path} is a folder, no config" if path.is_dir() else f"no such config: {path}"
        raise ConfigError(f"{found}. {expected}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}\n{expected}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}.")
    return data


def build(kind: type[Config], data: Any, where: str) -> Config:
    """Make a configuration object from plain data.

    Args:
        kind: a dataclass.
        data: keys and values, as YAML gives them.
        where: the file or part of it, for errors.

    Raises:
        ConfigError: not a mapping; unknown, missing or ill-typed keys; or what the class itself refuses.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, got {data!r}.")
    fields = inspect.signature(kind).parameters
    if unknown := sorted(set(data) - set(fields), key=str):
        hints = "".join(did_you_mean(name, set(fields) - set(data)) for name in unknown)
        raise ConfigError(f"{where}: unknown keys {unknown}.{hints} Known: {', '.join(fields)}.")
    if missing := [name for name, one in fields.items() if one.default is one.empty and name not in data]:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"{where}: missing keys {missing}. Give them in a config, or as {options}.")
    try:
        return kind(**data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_values(config: Any, *, skip: Sequence[str] = ()) -> None:
    """Check the fields of a configuration: their types, and the ``min`` and ``max`` of :func:`option`.

    Args:
        config: a dataclass.
        skip: fields that are checked elsewhere.

    Raises:
        ConfigError: another type, no finite number, or out of range.
    """
    types = get_type_hints(type(config))
    for one in dataclasses.fields(config):
        value, hint = getattr(config, one.name), types[one.name]
        if one.name in skip:
            continue
        if not _fits(value, hint):
            raise ConfigError(f"{one.name} is {value!r:.300}; expected {_expected(hint)}.{_hint(value, hint)}")
        low, high = one.metadata.get("min", -math.inf), one.metadata.get("max", math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ConfigError(f"{one.name} is {value!r}; expected {limits}.")


def as_list(value: Any, where: str) -> list[Any]:
    """Return a list of a configuration, empty where there is none; raise ConfigError for anything else."""
    if not isinstance(value, list | tuple | None):
        raise ConfigError(f"{where} is {value!r:.300}; expected a list, such as [{{path: questions.jsonl}}].")
    return list(value or ())


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    kind = origin or hint
    if kind in (int, float):
        number = isinstance(value, _ACCEPTED.get(kind, kind)) and not isinstance(value, bool)
        return number and -_LARGEST <= value <= _LARGEST  # which nan is not
    if kind is not Any and not isinstance(value, _ACCEPTED.get(kind, kind)):
        return False
    if kind is str:
        return "\0" not in str(value) and _encodable(str(value))  # neither can be part of a path
    if kind is dict and parts:
        return all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items())
    return kind not in (list, tuple) or not parts or all(_fits(item, parts[0]) for item in value)


def _encodable(value: str) -> bool:
    """Whether the system could have given this text as an argument: halves of surrogate pairs stand for bytes only."""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _expected(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_expected(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    kind = origin or hint
    if kind in (list, tuple):
        return f"a list, of which each is {_expected(parts[0])}" if parts else "a list"
    return _WORDS.get(kind, "keys and values")


def _hint(value: Any, hint: Any) -> str:
    """Explain what is easily mistaken: numbers that YAML takes for text, and one value where a list is meant."""
    if isinstance(value, str | dict) and get_origin(hint) in (list, tuple):
        return f" Write one as [{value}]." if isinstance(value, str) else ""
    return _number_hint(value)


def _number_hint(value: Any) -> str:
    """Explain numbers that YAML takes for text, such as 2e-3."""
    try:
        float(value if isinstance(value, str) else "-")
    except ValueError:
        return ""
    return " It is a text in YAML: write numbers without quotes, and with a point, such as 2.0e-3 or 0.002."
