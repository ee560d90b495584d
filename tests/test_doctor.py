"""``c2c doctor``."""

from __future__ import annotations

import json
import sys
from importlib import metadata

from typer.testing import CliRunner

from c2c.cli import app
from c2c.hub_aliases import model_dir


def doctor(*arguments, code=0):
    """Run the command with --json; returns status and detail of each check by its name."""
    result = CliRunner().invoke(app, ["doctor", "--json", *(arguments or ("--offline",))])
    assert result.exit_code == code, result.output
    data = json.loads(result.stdout)
    assert data["healthy"] is (code == 0)
    return {check["name"]: (check["status"], check["detail"]) for check in data["checks"]}


def test_report():
    folder = model_dir("smollm2-135m")
    assert "none" in doctor()["pulled models"][1]
    folder.mkdir(parents=True)
    (folder / "c2c_source.json").write_text(" " * 5000)
    found = doctor()
    assert {"c2c", "python", "platform", "cpu", "memory", "torch", "transformers", "cache", "free disk"} <= set(found)
    assert any(name.startswith("gpu") for name in found)
    assert not {"package index", "hypothesis"} & set(found)  # the latter is of an extra
    assert metadata.version("torch") in found["torch"][1]
    assert found["pulled models"][1] == "smollm2-135m"
    assert "5.0 kB" in found["cache"][1]


def test_packages_that_are_too_old_or_missing(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "safetensors":
            raise metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = doctor("--offline", code=1)
    for name in ("transformers", "safetensors"):
        assert found[name][0] == "fail"
        assert f"pip install '{name}" in found[name][1]


def test_libraries_that_do_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = doctor("--offline", code=1)
    assert (found["torch import"][0], found["memory"][0]) == ("fail", "warn")


def test_a_clone_and_a_cache_that_is_not_writable(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = doctor()
    assert (found["packages"][0], found["cache"][0]) == ("warn", "warn")


def test_the_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("C2C_PYPI_INDEX", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("warn  package index")
    assert "secret" not in result.stdout
