"""``c2c demo``: one prompt, answered by four systems, side by side in a browser."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from threading import Event
from typing import Any

from c2c.cli.options import from_config
from c2c.cli.output import err
from c2c.demo import DemoConfig
from c2c.errors import C2CError
from c2c.utils import install_command


@from_config(DemoConfig)
def demo(**options: Any) -> None:
    """Show receiver, sharer, text-to-text and cache-to-cache side by side, with stopwatches, in a browser."""
    if find_spec("gradio") is None:
        raise C2CError(f"gradio is not installed. The demo needs: {install_command('demo')}.")
    began = time.perf_counter()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere; read when gradio is imported
    from c2c.demo.server import launch

    def on_start(url: str) -> None:
        up = f"The page is up at {url} after {time.perf_counter() - began:.1f} s."
        err.print(f"{up} Models are loaded meanwhile. Ctrl-C ends it.", soft_wrap=True)

    page = launch(DemoConfig(**options), on_start=on_start)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)
