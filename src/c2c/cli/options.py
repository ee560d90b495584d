"""Options of a command from the fields of a config dataclass, so that name, type, default and help stand once.

A field becomes an option by its type and its metadata::

    @dataclass
    class Config:
        limit: int | None = option(None, "Read at most this many rows.", min=1)

Metadata keys: ``help``; ``flag`` (a name such as ``--json`` in place of the field's); ``cli`` (False: no option);
others as in :func:`typer.Option`, such as ``min``. ``--help`` imports configs, so their modules must not import torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

F = TypeVar("F", bound=Callable[..., Any])

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def from_config(
    config: type, *, only: Sequence[str] | None = None, skip: Sequence[str] = (), override: bool = False
) -> Callable[[F], F]:
    """Give a command ``def command(..., **options)`` one option per field of a config dataclass.

    The command gets the values under the fields' names. In ``--help`` they stand after its positional parameters and
    before its keyword-only ones. A field that the command declares itself is left out. Several configs can be stacked.

    Args:
        config: dataclass whose fields hold text, numbers, paths, choices (``Literal``), lists of these, or None
            besides.
        only: fields to take; all by default.
        skip: fields to leave out.
        override: the values replace those of a file: each option is None where it was not given, and its help shows
            the field's default.

    Raises:
        TypeError: a field of another type; leave it out.
        ValueError: ``only`` or ``skip`` name a field that the config does not have.
    """
    fields = {one.name: one for one in dataclasses.fields(config)}
    if unknown := {*(only or ()), *skip} - set(fields):
        raise ValueError(f"{config.__name__} has no fields {sorted(unknown)}; expected some of {list(fields)}.")
    hints = get_type_hints(config)

    def decorate(command: F) -> F:
        resolved = get_type_hints(command, include_extras=True)
        own = {
            name: one.replace(annotation=resolved.get(name, one.annotation))  # another config's are resolved
            for name, one in inspect.signature(command).parameters.items()
            if one.kind is not one.VAR_KEYWORD
        }
        options = [
            _parameter(field, hints[name], override)
            for name, field in fields.items()
            if name in (only or fields) and name not in (*skip, *own) and field.metadata.get("cli", True)
        ]
        keywords = [one for one in own.values() if one.kind is one.KEYWORD_ONLY]
        positional = [one for one in own.values() if one.kind is not one.KEYWORD_ONLY]
        signature = inspect.Signature([*positional, *options, *keywords])
        setattr(command, "__signature__", signature)  # noqa: B010  (a function has no such attribute for mypy)
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any, override: bool) -> inspect.Parameter:
    """Make the keyword parameter that typer reads for a field."""
    extra = {key: value for key, value in field.metadata.items() if key != "cli"}
    flags = [extra.pop("flag")] if "flag" in extra else []
    kind, text = _option_type(field.name, hint), extra.pop("help", "")
    default: Any = inspect.Parameter.empty
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    if override:
        text += f" [default: {default}]" if default not in (inspect.Parameter.empty, None, "", [], ()) else ""
        default, kind = None, kind | None
    option = typer.Option(*flags, help=escape(text), **extra)  # escaped, as rich takes [...] for markup
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=Annotated[kind, option])


def _option_type(name: str, hint: Any) -> Any:
    """Return the type that typer takes for a field's; sequences become lists."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not NoneType]
    if origin in (Union, UnionType) and len(parts) == 1:
        return _option_type(name, parts[0]) | None
    if origin in (list, tuple) and parts:
        return list[_option_type(name, parts[0])]  # type: ignore[misc]
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, bool | int | float | str | Path)):
        return hint
    raise TypeError(f"field {name}: {hint} can't be an option; leave it out with skip or metadata cli=False.")


def parse_pairs(
    pairs: Sequence[str] | None,
    flag: str,
    example: str,
    convert: Callable[[str], Any] = str,
    is_name: Callable[[str], bool] = bool,
) -> dict[str, Any]:
    """Parse the values NAME=VALUE of an option that may be repeated.

    Raises:
        typer.BadParameter: a name that ``is_name`` refuses, no value, or one that ``convert`` raises ValueError for.
    """
    found = {}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        try:
            if not is_name(name) or not value:
                raise ValueError
            found[name] = convert(value)
        except ValueError:
            message = f"got {pair!r}; expected NAME=VALUE, for instance {example}."
            raise typer.BadParameter(message, param_hint=flag) from None
    return found
