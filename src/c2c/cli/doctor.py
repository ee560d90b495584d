"""``c2c doctor``: what this machine has, and whether c2c can work with it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.markup import escape

from c2c.cli.output import human_bytes, out, print_json
from c2c.errors import ModelLoadError
from c2c.pull import ALIASES, cache_dir, is_pulled
from c2c.pull.http import hide_password, open_client
from c2c.pull.index import index_url
from c2c.utils import DISTRIBUTION
from c2c.version import __version__

_INDEX_TIMEOUT = 5.0  # seconds
_LOW_MEMORY = 4e9  # bytes: two small models in float32
_LOW_DISK = 5e9  # bytes: the largest alias, converted, and its GGUF

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

_EPILOG = (
    "Examples:\n\n"
    "c2c doctor\n\n"
    "c2c doctor --offline\n\n"
    "c2c doctor --json | jq '.checks[] | select(.status != \"ok\")'\n\n"
    "The exit code is 1 if something that c2c needs is missing or too old; warnings do not count."
)


@dataclass(frozen=True)
class Check:
    """One line of the report. ``fail`` means that c2c can't work; ``warn`` that something is out of reach."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


def register(app: typer.Typer) -> None:
    """Add the ``doctor`` command to the main app."""
    app.command("doctor", epilog=_EPILOG)(doctor)


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the package index.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Report versions, hardware, cache and network, with ok, warn or fail for each."""
    checks = list(run_checks(offline))
    healthy = all(check.status != "fail" for check in checks)
    if json_:
        data = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
        print_json(data)
    else:
        _show(checks)
    if not healthy:
        raise typer.Exit(1)


def run_checks(offline: bool = False) -> Iterator[Check]:
    """All checks, in the order of the report."""
    yield Check("c2c", "ok", __version__)
    yield _check_python()
    yield Check("platform", "ok", f"{platform.platform()}, {platform.machine()}")
    yield Check("cpu", "ok", _describe_cpu())
    yield _check_memory()
    yield from _check_packages()
    yield from _check_torch()
    yield from _check_cache()
    yield _check_pulled()
    if not offline:
        yield _check_index()


def _check_python() -> Check:
    here = platform.python_version()
    wanted = _supported_python()
    fits = SpecifierSet(wanted).contains(here, prereleases=True)
    detail = f"{here} (supported: {wanted or 'any'}), {sys.executable}"
    return Check("python", "ok" if fits else "fail", detail)


def _supported_python() -> str:
    try:
        return metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:  # run from a source tree
        return ""


def _describe_cpu() -> str:
    if hasattr(os, "sched_getaffinity"):
        return f"{os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them for this process"
    return f"{os.cpu_count()} cores"


def _check_memory() -> Check:
    try:
        memory = import_module("psutil").virtual_memory()  # accelerate brings it
    except ImportError:
        return Check("memory", "warn", "unknown (psutil is not installed)")
    detail = f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}"
    return Check("memory", "ok" if memory.available >= _LOW_MEMORY else "warn", detail)


def _check_packages() -> Iterator[Check]:
    """Each dependency against the range that the installed package states."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Check("packages", "warn", f"{DISTRIBUTION} is not installed, so the ranges are unknown")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _check_package(requirement)


def _check_package(requirement: Requirement) -> Check:
    wanted = str(requirement.specifier) or "any version"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "fail", f"not installed; run: pip install '{requirement}'")
    if requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "ok", f"{found} (supported: {wanted})")
    return Check(requirement.name, "fail", f"{found}, supported: {wanted}; run: pip install '{requirement}'")


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
    used = human_bytes(_folder_size(folder)) if folder.is_dir() else "empty"
    detail = f"{folder} ({used})"
    advice = "" if writable else "; not writable, set C2C_CACHE to another folder"
    yield Check("cache", "ok" if writable else "warn", detail + advice)
    free = shutil.disk_usage(existing).free
    yield Check("free disk", "ok" if free >= _LOW_DISK else "warn", human_bytes(free))


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_pulled() -> Check:
    pulled = [name for name in ALIASES if is_pulled(name)]
    return Check("pulled models", "ok", ", ".join(pulled) or "none; see: c2c pull --list")


def _check_index() -> Check:
    url = index_url()
    shown = hide_password(url)
    try:
        with open_client(_INDEX_TIMEOUT) as client:
            response = client.get(f"{url}/{next(iter(ALIASES.values())).parts[0].distribution}/")
    except ModelLoadError as error:
        return Check("package index", "warn", str(error))
    except Exception as error:  # whatever it is, the report goes on
        reason = " ".join(str(error).split()) or type(error).__name__
        return Check("package index", "warn", f"{shown} can't be reached: {reason} (needed by `c2c pull` only)")
    if response.status_code >= 400:
        return Check("package index", "warn", f"{shown} answered {response.status_code} {response.reason_phrase}")
    return Check("package index", "ok", f"{shown} answers")


def _show(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks) + 2
    for check in checks:
        mark = f"[{_COLOURS[check.status]}]{check.status:<4}[/]"
        out.print(f"{mark}  {check.name:<{width}}{escape(check.detail)}", highlight=False, soft_wrap=True)
