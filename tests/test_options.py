"""Options of a command, made from a config dataclass."""
# ruff: noqa: RUF009 - option() returns a dataclass field

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from c2c.cli.options import Json, from_config
from c2c.config import option


@dataclass
class Config:
    """Fields of every type that can be an option, and one that can't."""

    fuser: str = field(metadata={"help": "Folder of a fuser."})
    limit: int | None = option(None, "At most so many rows.", min=1)
    rate: float = option(0.5, "A rate.", max=2.0)
    form: Literal["letter", "sentence"] = option("letter", "How to ask.")
    data: list[str] = option([], "Files; see [docs].")
    layers: tuple[int, ...] = option((), "Layers.")
    folder: Path | None = option(None, "Where to.")
    open_: bool = option(False, "Open it.", flag="--open")
    resume: bool = option(True, "Go on.")
    nested: dict[str, int] = option({}, "", cli=False)


def invoke(arguments: list[str], **how: Any) -> Any:
    """Run a command that has the config's options; returns typer's result, with what the command got in ``got``."""
    app = typer.Typer(rich_markup_mode="rich")
    got: dict[str, Any] = {}

    @app.command()
    @from_config(Config, **how)
    def command(name: Annotated[str, typer.Argument()], *, json_: Json = False, **options: Any) -> None:
        got.update(options, name=name, json_=json_)

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    result.got = got
    return result


GIVEN = "--limit 3 --rate 1 --form sentence --data a --data b --layers 1 --folder out --open --no-resume --json"
VALUES = {
    "limit": 3,
    "rate": 1.0,
    "form": "sentence",
    "data": ["a", "b"],
    "layers": [1],
    "folder": Path("out"),
    "open_": True,
    "resume": False,
    "json_": True,
}


@pytest.mark.parametrize(("arguments", "values"), [("", {}), (GIVEN, VALUES)])
def test_values_have_names_types_and_defaults_of_the_fields(arguments, values):
    defaults = asdict(Config("f")) | {"name": "x", "json_": False, "layers": []}
    got = invoke(["x", "--fuser", "f", *arguments.split()]).got
    assert got | {"nested": {}} == defaults | values


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--fuser"),
        (["--fuser", "f", "--limit", "0"], "limit"),
        (["--fuser", "f", "--rate", "3"], "rate"),
        (["--fuser", "f", "--form", "x"], "form"),
        (["--fuser", "f", "--nested", "1"], "nested"),
    ],
)
def test_wrong_values_are_wrong_usage(arguments, part):
    result = invoke(["x", *arguments])
    assert result.exit_code == 2
    assert part in result.stderr


def test_override_gives_none_and_shows_the_default():
    assert set(invoke(["x"], override=True).got.values()) == {"x", False, None}
    assert "[default: 0.5]" in invoke(["--help"], override=True).stdout


def test_help_comes_from_the_fields():
    text = invoke(["--help"]).stdout
    assert "Folder of a fuser." in text
    assert "see [docs]." in text
    assert text.index("--fuser") < text.index("--resume") < text.index("--json")


def test_only_and_skip():
    assert set(invoke(["x"], only=["rate", "limit"], skip=["rate"]).got) == {"name", "json_", "limit"}
    with pytest.raises(ValueError, match="no fields"):
        from_config(Config, skip=["fusr"])


def test_two_configs_and_a_parameter_that_replaces_a_field():
    @dataclass
    class Other:
        seed: int = 0

    app = typer.Typer()
    got: list[Any] = []

    @app.command()
    @from_config(Other)
    @from_config(Config, only=["data", "limit"])
    def command(data: Annotated[str, typer.Argument()], **options: Any) -> None:
        got.extend([data, options])

    assert CliRunner().invoke(app, ["one,two", "--seed", "1"]).exit_code == 0
    assert got == ["one,two", {"limit": None, "seed": 1}]


def test_a_field_that_can_be_no_option():
    @dataclass
    class Other:
        mixed: int | str = 0

    with pytest.raises(TypeError, match="mixed"):
        from_config(Other)(lambda **options: None)
