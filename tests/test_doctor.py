"""``c2c doctor``."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from c2c.cli import doctor as doctor_command
from c2c.cli.doctor import Check, run_checks
from c2c.pull.cache import model_dir


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    doctor_command.register(app)
    return app


def checks(offline: bool = True) -> dict[str, Check]:
    return {check.name: check for check in run_checks(offline)}


def test_report_names_what_matters() -> None:
    found = checks()
    expected = {"c2c", "python", "platform", "cpu", "memory", "torch", "transformers", "gpu", "cache", "free disk"}
    assert expected - {"gpu"} <= set(found)
    assert any(name.startswith("gpu") for name in found)
    assert "package index" not in found
    assert metadata.version("torch") in found["torch"].detail
    assert "none" in found["pulled models"].detail


def test_pulled_models_and_cache_size() -> None:
    folder = model_dir("smollm2-135m")
    folder.mkdir(parents=True)
    (folder / "c2c_source.json").write_text("{}" + " " * 4998)
    found = checks()
    assert found["pulled models"].detail == "smollm2-135m"
    assert "5.0 kB" in found["cache"].detail


def test_package_that_is_too_old(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0" if name == "transformers" else real(name))
    found = checks()["transformers"]
    assert found.status == "fail"
    assert "pip install 'transformers" in found.detail
    result = CliRunner().invoke(app, ["doctor", "--offline", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["healthy"] is False


def test_package_that_is_missing() -> None:
    found = doctor_command._check_package(Requirement("no-such-package-here>=1"))
    assert found.status == "fail"
    assert "not installed" in found.detail


def test_extras_are_not_required() -> None:
    assert "hypothesis" not in checks()


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libtorch.so: not found")

    monkeypatch.setattr(doctor_command, "import_module", fail)
    found = checks()
    assert found["torch import"].status == "fail"
    assert found["memory"].status == "warn"


def test_cache_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert checks()["cache"].status == "warn"


def test_unreachable_index_is_a_warning(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2C_PYPI_INDEX", "http://user:secret@127.0.0.1:9/simple")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    line = result.stdout.splitlines()[-1]
    assert line.startswith("warn  package index")
    assert "http://127.0.0.1:9/simple can't be reached" in line
    assert "secret" not in result.stdout


def test_json_is_one_object(app: typer.Typer) -> None:
    data = json.loads(CliRunner().invoke(app, ["doctor", "--offline", "--json"]).stdout)
    assert data["healthy"] is True
    assert {check["status"] for check in data["checks"]} <= {"ok", "warn"}
