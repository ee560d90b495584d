"""What holds for every test: one thread, no hub, no user cache, and no deprecated use of transformers."""

from __future__ import annotations

import logging
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported

import pytest
import torch

torch.set_num_threads(1)


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            self.messages.append(f"{record.name}: {message}")


_DEPRECATIONS = _Deprecations()
# transformers logs these instead of warning, each once per process
logging.getLogger("transformers").addHandler(_DEPRECATIONS)


@pytest.fixture(autouse=True)
def no_deprecated_transformers():
    """Fail the first test in which transformers calls something deprecated, wider fixtures included."""
    yield
    messages, _DEPRECATIONS.messages = _DEPRECATIONS.messages, []
    assert not messages, messages


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No test sees or changes the user's models."""
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "c2c-cache"))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: playwright's own, one of the system, or the one that ``C2C_CHROMIUM`` names."""
    playwright = pytest.importorskip("playwright.sync_api")
    system = os.environ.get("C2C_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as missing:
            pytest.skip(f"no Chromium can be started: {missing}")
        yield started
        started.close()
