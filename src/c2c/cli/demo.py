"""``c2c demo``: one prompt, answered by four systems, side by side in a browser."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from threading import Event
from typing import Any

import typer

from c2c.cli.options import from_config
from c2c.cli.output import err
from c2c.demo.config import DemoConfig
from c2c.errors import C2CError
from c2c.utils import install_command

_EPILOG = """Examples:

c2c demo

c2c demo --open --port 0

c2c demo --fuser ./my-fuser --fuser ./my-memory-fuser --max-new-tokens 64

c2c demo --host 0.0.0.0 --dtype bfloat16

The fusers in zoo/ are offered as well; the best of them is the default. A fuser of the family 'memory' opens the tab
for private context. Models are fetched before: c2c pull smollm2-135m qwen2.5-coder-1.5b. Everyone who reaches the
address can ask. Needs: pip install 'cache2cache\\[demo]'."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="demo", epilog=_EPILOG)(demo)


@from_config(DemoConfig)
def demo(**options: Any) -> None:
    """Show receiver, sharer, text-to-text and cache-to-cache side by side, with stopwatches, in a browser."""
    if find_spec("gradio") is None:
        raise C2CError(f"gradio is not installed. The demo needs: {install_command('demo')}.")
    began = time.perf_counter()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere; read when gradio is imported
    from c2c.demo.server import launch

    def on_start(url: str) -> None:
        err.print(
            f"The page is up at {url} after {time.perf_counter() - began:.1f} s. Models are loaded meanwhile. Ctrl-C "
            "ends it.",
            soft_wrap=True,
        )

    page = launch(DemoConfig(**options), on_start=on_start)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)
