"""Options of a command from the fields of a config dataclass, so that name, type, default and help stand once.

A field becomes an option by its type and its metadata::

    @dataclass
    class Config:
        limit: int | None = field(default=None, metadata={"help": "Read at most this many rows.", "min": 1})

Metadata keys: ``help``; ``flag`` (a name such as ``--json`` in place of the field's); ``min``, ``max``, ``envvar``,
``metavar``, ``hidden`` (as in :func:`typer.Option`); ``cli`` (False: no option). The module of the config must not
import torch, because ``--help`` imports it.
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

_TYPER_KEYS = ("min", "max", "envvar", "metavar", "hidden")
_SCALARS = (bool, int, float, str, Path)


def from_config(
    config: type,
    *,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    required: Sequence[str] = (),
    override: bool = False,
) -> Callable[[F], F]:
    """Give a command ``def command(..., **options)`` one option per field of a config dataclass.

    The command gets the values under the fields' names. In ``--help`` they stand after its positional parameters and
    before its keyword-only ones. A field that the command declares itself is left out. Several configs can be stacked.

    Args:
        config: dataclass whose fields hold text, numbers, paths, choices (``Literal`` or an enum), lists of these, or
            None besides.
        only: fields to take; all by default.
        skip: fields to leave out.
        required: fields that must be given though they have a default.
        override: the values replace those of a file: each option is None where it was not given, and its help shows
            the field's default.

    Raises:
        TypeError: a field of another type; leave it out.
        ValueError: ``only``, ``skip`` or ``required`` name a field that the config does not have.
    """
    fields = {one.name: one for one in dataclasses.fields(config)}
    unknown = {*(only or ()), *skip, *required} - set(fields)
    if unknown:
        raise ValueError(f"{config.__name__} has no fields {sorted(unknown)}; expected some of {list(fields)}.")
    hints = get_type_hints(config)
    wanted = [
        one
        for name, one in fields.items()
        if (only is None or name in only) and name not in skip and one.metadata.get("cli", True)
    ]

    def decorate(command: F) -> F:
        own_hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=own_hints.get(name, parameter.annotation))  # another config's are resolved
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        own_names = {parameter.name for parameter in own}
        options = [
            _parameter(one, hints[one.name], required=one.name in required, override=override)
            for one in wanted
            if one.name not in own_names
        ]
        positional = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
        keywords = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        signature: Any = inspect.Signature([*positional, *options, *keywords])
        setattr(command, "__signature__", signature)  # noqa: B010  (a function has no such attribute for mypy)
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any, *, required: bool, override: bool) -> inspect.Parameter:
    """Make the keyword parameter that typer reads for a field."""
    default = _default(field)
    text = str(field.metadata.get("help", ""))
    kind = _option_type(field.name, hint)
    if override:
        if default not in (inspect.Parameter.empty, None, "", [], ()):
            text += f" [default: {default}]"
        default, kind = None, kind | None
    if required:
        default = inspect.Parameter.empty
    flags = [field.metadata["flag"]] if "flag" in field.metadata else []
    extra = {key: field.metadata[key] for key in _TYPER_KEYS if key in field.metadata}
    option = typer.Option(*flags, help=escape(text), **extra)  # escaped, as rich takes [...] for markup
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; ``Parameter.empty`` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _option_type(name: str, hint: Any) -> Any:
    """Return the type that typer takes for a field's; sequences become lists."""
    if get_origin(hint) in (Union, UnionType):
        inner = [part for part in get_args(hint) if part is not NoneType]
        if len(inner) == 1:
            return _option_type(name, inner[0]) | None
    elif get_origin(hint) in (list, tuple) and get_args(hint):
        return list[_option_type(name, get_args(hint)[0])]  # type: ignore[misc]
    elif get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, _SCALARS)):
        return hint
    raise TypeError(f"field {name}: {hint} can't be an option; leave it out with skip or metadata cli=False.")
