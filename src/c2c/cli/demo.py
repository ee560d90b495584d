"""``c2c demo``: one prompt, four ways to answer it, side by side in a browser."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from threading import Event
from typing import Annotated

import typer

from c2c.cli.output import err

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


def demo(
    fuser: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a fuser; may be repeated. The first is shown first.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 7860,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens per answer, at first.")] = 16,
    message_tokens: Annotated[int, typer.Option(min=1, help="At most this many for the text that is passed.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Device map: cpu, cuda, auto.")] = None,
    allow_mismatch: Annotated[bool, typer.Option(help="Accept models with other weights than the fuser's.")] = False,
) -> None:
    """Show receiver, sharer, text-to-text and cache-to-cache side by side, with stopwatches, in a browser."""
    _check_packages()
    began = time.perf_counter()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere; read when gradio is imported
    from c2c.demo.server import launch
    from c2c.demo.settings import Settings

    settings = Settings(
        fusers=tuple(fuser or ()),
        host=host,
        port=port,
        open_browser=open_,
        max_new_tokens=max_new_tokens,
        message_tokens=message_tokens,
        dtype=dtype,
        device=device,
        allow_mismatch=allow_mismatch,
    )

    def said(url: str) -> None:
        err.print(
            f"The page is up at {url} after {time.perf_counter() - began:.1f} s. Models are loaded meanwhile. Ctrl-C "
            "ends it.",
            soft_wrap=True,
        )

    page = launch(settings, said=said)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)


def _check_packages() -> None:
    from c2c.errors import C2CError
    from c2c.utils import install_command

    if find_spec("gradio") is None:
        raise C2CError(f"gradio is not installed. The demo needs: {install_command('demo')}.")
