"""The demo's server: the page is up at once, models are loaded behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING

from c2c.demo import DemoConfig
from c2c.demo.fusers import FuserChoice, default_fuser, find_fusers
from c2c.demo.session import ModelCache
from c2c.errors import C2CError

if TYPE_CHECKING:
    import gradio as gr


def launch(config: DemoConfig, models: ModelCache | None = None, on_start: Callable[[str], None] = print) -> gr.Blocks:
    """Start the demo and return the running page, which ``close()`` ends.

    ``on_start`` is called with the page's address once it is up; models are loaded then.

    Raises:
        FuserError: no fuser, or a folder that is none.
        ServerError: the port is taken.
    """
    choices = find_fusers(config.fuser or [], config.model or [])
    from c2c.demo.page import build, style
    from c2c.serving.http_server import listen

    with listen(config.host, config.port) as probe:  # Gradio takes no port 0, and its error names no option
        port = probe.getsockname()[1]
    models = models or ModelCache(config.dtype, config.device, config.allow_mismatch)
    page = build(models, choices, config)
    _, url, _ = page.launch(
        server_name=config.host,
        server_port=port,
        inbrowser=config.open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        max_file_size="1mb",
        footer_links=[],
        **style(),
    )
    on_start(url)
    first = default_fuser(choices, private=False) or default_fuser(choices, private=True)
    if first is not None:
        Thread(target=_preload, args=(models, first), daemon=True).start()
    return page


def _preload(models: ModelCache, choice: FuserChoice) -> None:
    with suppress(C2CError), models.use(choice):  # the page shows errors, and the next question tries again
        pass
