"""Options of a command, made from a config dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from c2c.cli.options import Json, from_config


@dataclass
class Config:
    """Fields of every type that can be an option, and one that can't."""

    fuser: str = field(metadata={"help": "Folder of a fuser."})
    limit: int | None = field(default=None, metadata={"help": "At most so many rows.", "min": 1})
    rate: float = field(default=0.5, metadata={"help": "A rate.", "max": 2.0})
    form: Literal["letter", "sentence"] = field(default="letter", metadata={"help": "How to ask."})
    data: list[str] = field(default_factory=list, metadata={"help": "Files; see [docs]."})
    layers: tuple[int, ...] = field(default=(), metadata={"help": "Layers."})
    folder: Path | None = field(default=None, metadata={"help": "Where to."})
    open_: bool = field(default=False, metadata={"help": "Open it.", "flag": "--open"})
    resume: bool = field(default=True, metadata={"help": "Go on."})
    nested: dict[str, int] = field(default_factory=dict, metadata={"cli": False})


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


def test_defaults_are_those_of_the_fields():
    got = invoke(["x", "--fuser", "f"]).got
    assert got == {
        "name": "x",
        "json_": False,
        "fuser": "f",
        "limit": None,
        "rate": 0.5,
        "form": "letter",
        "data": [],
        "layers": [],
        "folder": None,
        "open_": False,
        "resume": True,
    }


def test_values_have_the_types_of_the_fields():
    given = (
        "x --fuser f --limit 3 --rate 1 --form sentence --data a --data b --layers 1 --folder out --open --no-resume"
    )
    got = invoke([*given.split(), "--json"]).got
    assert got["limit"] == 3
    assert got["rate"] == 1.0
    assert got["form"] == "sentence"
    assert got["data"] == ["a", "b"]
    assert got["layers"] == [1]
    assert got["folder"] == Path("out")
    assert (got["open_"], got["resume"], got["json_"]) == (True, False, True)


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


def test_only_skip_and_required():
    assert set(invoke(["x"], only=["rate", "limit"], skip=["rate"]).got) == {"name", "json_", "limit"}
    assert invoke(["x"], only=["limit"], required=["limit"]).exit_code == 2
    with pytest.raises(ValueError, match="no fields"):
        from_config(Config, skip=["fusr"])


def test_a_parameter_of_the_command_replaces_the_field():
    app = typer.Typer()
    got: list[Any] = []

    @app.command()
    @from_config(Config, only=["data", "limit"])
    def command(data: Annotated[str, typer.Argument()], **options: Any) -> None:
        got.extend([data, options])

    assert CliRunner().invoke(app, ["one,two"]).exit_code == 0
    assert got == ["one,two", {"limit": None}]


def test_two_configs():
    @dataclass
    class Other:
        seed: int = 0

    app = typer.Typer()
    got: dict[str, Any] = {}
    decorated = from_config(Other)(from_config(Config, only=["limit"])(lambda **options: got.update(options)))
    app.command()(decorated)
    assert CliRunner().invoke(app, ["--limit", "2", "--seed", "1"]).exit_code == 0
    assert got == {"limit": 2, "seed": 1}


def test_a_field_that_can_be_no_option():
    @dataclass
    class Other:
        mixed: int | str = 0

    with pytest.raises(TypeError, match="mixed"):
        from_config(Other)(lambda **options: None)
