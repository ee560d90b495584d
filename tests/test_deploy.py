"""The files in deploy/: what they call exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from c2c.cli.app import app

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
UNIT = (ROOT / "deploy" / "c2c.service").read_text(encoding="utf-8")
CALLS = {name: service["command"] for name, service in COMPOSE["services"].items() if name != "proxy"}
CALLS["unit"] = re.search(r"^ExecStart=\S+/c2c (.*)$", UNIT, re.MULTILINE)[1]


@pytest.mark.parametrize("name", CALLS)
def test_options_exist(name):
    """Each call is one that the command line takes; nothing is run."""
    command, *arguments = shlex.split(CALLS[name])
    typer.main.get_command(app).commands[command].make_context(command, arguments)


def test_a_fuser_that_is_named_is_there():
    for call in CALLS.values():
        for folder in re.findall(r"zoo/\S+", call):
            assert (ROOT / folder / "config.json").is_file()


def test_the_image_installs_what_serving_needs():
    extras = re.search(r'"\.\[(.*?)\]"', (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"))[1].split(",")
    known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(extras) <= set(known)
