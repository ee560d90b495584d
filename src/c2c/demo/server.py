"""The demo's server: the page is up at once, models are loaded behind it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Thread
from typing import TYPE_CHECKING

from c2c.demo.config import DemoConfig
from c2c.demo.fusers import FuserChoice, default_fuser, find_fusers
from c2c.demo.models import ModelCache
from c2c.errors import C2CError

if TYPE_CHECKING:
    import gradio as gr


def launch(config: DemoConfig, models: ModelCache | None = None, on_start: Callable[[str], None] = print) -> gr.Blocks:
    """Start the demo and return while it runs.

    Args:
        config: options.
        models: where models are loaded; by default a new cache with the options of ``config``.
        on_start: called with the page's address once it is up.

    Returns:
        The running page; ``close()`` ends it.

    Raises:
        FuserError: no fuser, or a folder that is none.
        C2CError: the port is taken.
    """
    choices = find_fusers(config.fuser or [])
    port = _free_port(config.host, config.port)
    from c2c.demo.page import build, style, theme

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
        theme=theme(),
        css=style(),
    )
    on_start(url)
    first = default_fuser(choices, private=False) or default_fuser(choices, private=True)
    if first is not None:
        Thread(target=_preload, args=(models, first), daemon=True).start()
    return page


def _preload(models: ModelCache, choice: FuserChoice) -> None:
    try:
        with models.use(choice):
            pass
    except C2CError:  # the page shows it, and the next question tries again
        pass


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        C2CError: it is taken, or there is no such address.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise C2CError(
                f"can't listen at {host}:{port}: {error.strerror or error}. Choose another --port, or 0 for a free one."
            ) from error
        return int(probe.getsockname()[1])
