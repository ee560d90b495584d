"""Configuration dataclasses: read from YAML, with every key and type checked. Imports no torch."""

from __future__ import annotations

import inspect
from dataclasses import field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from c2c.errors import C2CError, did_you_mean

Config = TypeVar("Config")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "nothing"}
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
    """Make a configuration object from plain data; the items of lists and mappings are not checked.

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
    if unknown := sorted(set(data) - set(fields)):
        hints = "".join(did_you_mean(name, set(fields) - set(data)) for name in unknown)
        raise ConfigError(f"{where}: unknown keys {unknown}.{hints} Known: {', '.join(fields)}.")
    if missing := [name for name, one in fields.items() if one.default is one.empty and name not in data]:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"{where}: missing keys {missing}. Give them in a config, or as {options}.")
    types = get_type_hints(kind)
    for name, value in data.items():
        if not _fits(value, types[name]):
            raise ConfigError(f"{where}: {name} is {value!r}; expected {_expected(types[name])}.{_number_hint(value)}")
    try:
        return kind(**data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if isinstance(value, bool) and kind in (int, float):
        return False
    return kind is Any or isinstance(value, _ACCEPTED.get(kind, kind))


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_expected(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    kind = get_origin(hint) or hint
    return _WORDS.get(kind, "a list" if kind in (list, tuple) else "keys and values")


def _number_hint(value: Any) -> str:
    """Explain numbers that YAML takes for text, such as 2e-3."""
    try:
        float(value if isinstance(value, str) else "-")
    except ValueError:
        return ""
    return " It is a text in YAML: write numbers without quotes, and with a point, such as 2.0e-3 or 0.002."
