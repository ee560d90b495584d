"""Tests of the command that installs an extra."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from c2c.utils import install_command

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - {"dev"}))
def test_the_command_names_every_package_of_the_extra_and_no_other(extra):
    wanted = {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}
    command = install_command(extra)
    assert command.startswith("pip install '")
    named = [Requirement(part.strip("'")) for part in command.removeprefix("pip install ").split(" ")]
    assert {one.name for one in named} == wanted
    assert "cache2cache" not in command  # it may have come from a clone


def test_from_a_folder_of_sources(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("report") == "pip install '.[report]' in the clone"
