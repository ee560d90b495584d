"""Puts the page on the air, then loads the models behind it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from c2c.demo.choice import find_choices
from c2c.demo.desk import Desk
from c2c.demo.errors import DemoError
from c2c.demo.loader import Load, Loader, loading
from c2c.demo.settings import Settings

if TYPE_CHECKING:
    import gradio as gr


def launch(settings: Settings, load: Load | None = None, said: Callable[[str], None] = print) -> gr.Blocks:
    """Start the demo and come back while it runs.

    Args:
        settings: what it is started with.
        load: how a pair is loaded; by default by name.
        said: called with the page's address once it is up.

    Returns:
        The running page; ``close()`` ends it.

    Raises:
        DemoError: no fuser, or the port is taken.
    """
    choices = find_choices(settings.fusers)
    port = _free_port(settings.host, settings.port)
    from c2c.demo.page import build, style, theme

    how = load or loading(dtype=settings.dtype, device_map=settings.device, allow_mismatch=settings.allow_mismatch)
    desk = Desk(choices, Loader(how))
    page = build(desk, settings)
    first = desk.default(private=False) or desk.default(private=True)
    _, url, _ = page.launch(
        server_name=settings.host,
        server_port=port,
        inbrowser=settings.open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        max_file_size="2mb",
        footer_links=[],
        theme=theme(),
        css=style(),
    )
    said(url)
    desk.start(first)
    return page


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        DemoError: it is taken, or there is no such address.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"can't listen at {host}:{port}: {error.strerror or error}. Choose another --port, or 0 for a free one."
            ) from error
        return int(probe.getsockname()[1])
