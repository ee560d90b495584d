"""``c2c share``: serve a model's prefills to receivers on other machines."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from c2c.cli.options import from_config
from c2c.cli.output import err, out
from c2c.errors import C2CError
from c2c.remote.config import ShareConfig
from c2c.utils import install_command

_EPILOG = """Examples:

c2c share qwen2.5-coder-0.5b

C2C_TOKEN=... c2c share qwen2.5-coder-1.5b --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem

c2c share ./my-model --precision int8 --layers 12-27 --max-tokens 2048 --rate 30

c2c share qwen2.5-coder-1.5b --fuser ./my-memory-fuser

On the other machine: c2c run --sharer https://host:8650 --fuser FUSER --mode c2c "Why is the sky blue?"

A KV cache is as confidential as the text that it was made of: see docs/security.md."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="share", epilog=_EPILOG)(share)


@from_config(ShareConfig, skip=("max_body_mb",))
def share(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or GGUF file of the sharer.")], **options: Any
) -> None:
    """Serve a sharer: receivers on other machines send it prompts, and get its KV cache."""
    config = ShareConfig(**options)
    config.keys()  # refuses an open address without keys, before anything is loaded
    config.layer_list()  # as are layers that can't be read
    missing = [name for name in ("fastapi", "uvicorn", "cachetools") if find_spec(name) is None]
    if missing:
        raise C2CError(f"c2c share needs {' and '.join(missing)}: {install_command('remote')}.")
    with err.status("loading model ..."):
        import torch

        from c2c.fusers.base import load_fuser
        from c2c.language_model import Sharer
        from c2c.remote.server import PrefillWorker, build_app
        from c2c.serving.http_server import listen, serve, url_of
        from c2c.serving.logs import log_to_stderr

        sock = listen(config.host, config.port)
        worker = PrefillWorker(
            Sharer.from_pretrained(model, dtype=config.dtype, device_map=config.device),
            config,
            [load_fuser(folder, dtype=torch.float32) for folder in config.fuser or []],  # as C2CModel does
        )
        app = build_app(worker, config)
    if config.exposed and config.tls_cert is None:
        err.print("[yellow]Without TLS whoever is on the way can read prompts, caches and the token.[/yellow]")
    log_to_stderr()
    out.print(f"sharing {model} at {url_of(sock, config)}", highlight=False, soft_wrap=True)
    if not serve(app, sock, config):
        raise typer.Exit(1)
