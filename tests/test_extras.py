"""The command that installs an extra."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from c2c.utils import install_command

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages(extra):
    """What pyproject.toml lists, with the extras of this package that are among it."""
    for one in map(Requirement, EXTRAS[extra]):
        if one.name == "cache2cache":
            yield from (package for other in one.extras for package in packages(other))
        else:
            yield one


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev"}))
def test_the_command_names_every_package_of_the_extra_and_no_other(monkeypatch, extra):
    lines = [f"{line}; extra == '{extra}'" for extra, names in EXTRAS.items() for line in names]
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2", *lines])  # whichever version is installed
    command = install_command(extra)
    assert command.startswith("pip install '")
    assert "cache2cache" not in command  # it may come from a clone
    named = [Requirement(part.strip("'")) for part in command.removeprefix("pip install ").split(" ")]
    assert sorted(map(str, named)) == sorted(map(str, packages(extra)))


def test_from_a_folder_of_sources(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("report") == "pip install '.[report]' in the clone"
