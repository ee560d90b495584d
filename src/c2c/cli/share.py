"""``c2c share``: serve a model's prefills to receivers on other machines."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from c2c.cli.output import err, out

_EPILOG = """Examples:

c2c share qwen2.5-coder-0.5b

C2C_TOKEN=... c2c share qwen2.5-coder-1.5b --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --key-file shared.key

c2c share ./my-model --precision int8 --layers 12-27 --max-tokens 2048 --rate 30

c2c share qwen2.5-coder-1.5b --fuser ./my-memory-fuser

On the other machine: c2c run --sharer https://host:8650 --fuser FUSER --mode c2c "Why is the sky blue?"

A KV cache is as confidential as the text that it was made of: see docs/security.md."""


class Finest(StrEnum):
    """Precisions."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FLOAT8 = "float8"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="share", epilog=_EPILOG)(share)


def share(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or GGUF file of the sharer.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8650,
    token: Annotated[
        list[str] | None,
        typer.Option(
            envvar="C2C_TOKEN", help="Bearer token that clients must send; may be repeated.", show_default=False
        ),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(envvar="C2C_KEY_FILE", help="File with the key that both sides sign with.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate file for TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a request, padding and drafts included.")
    ] = 8192,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Longest request.")] = 1024,
    rate: Annotated[int, typer.Option(min=0, help="Requests per minute and token; 0 for no limit.")] = 60,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request, transfer included.")] = 120.0,
    waiting: Annotated[int, typer.Option(min=1, help="Most requests under way; more are told to come again.")] = 8,
    precision: Annotated[Finest, typer.Option(help="The finest that is sent.")] = Finest.FLOAT32,
    layers: Annotated[str | None, typer.Option(help="Layers that may be sent, such as 0-11,20. [default: all]")] = None,
    fuser: Annotated[
        list[str] | None, typer.Option(help="Fuser of private context to project with; may be repeated.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Device map: cpu, cuda, auto.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on an address that others can reach without a token.")
    ] = False,
) -> None:
    """Serve a sharer: receivers on other machines ask it to read, and get its KV cache."""
    from c2c.remote.address import is_local

    if any(not given.strip() for given in token or []):
        raise typer.BadParameter("it is empty; give some characters, or leave it out.", param_hint="--token")
    if not is_local(host) and not token and not insecure:
        raise typer.BadParameter(
            f"{host} can be reached by others, who would get the model's caches without a token. Set C2C_TOKEN, or "
            "pass --insecure if that is what you want.",
            param_hint="--host",
        )
    chosen = None if layers is None else _layers(layers)
    with err.status("loading model ..."):
        _require_extra()
        import torch

        from c2c.fusers.base import load_fuser
        from c2c.language_model import Sharer
        from c2c.remote.app import build_app
        from c2c.remote.desk import Desk
        from c2c.remote.limits import Limits
        from c2c.remote.log import Log
        from c2c.remote.server import Server
        from c2c.remote.signature import Signer, read_key
        from c2c.remote.stall import Stall

        limits = Limits(max_tokens, max_body_kb << 10, rate, timeout, waiting)
        signer = Signer(read_key(key_file) if key_file else None)
        sharer = Sharer.from_pretrained(model, dtype=dtype, device_map=device)
        fusers = [load_fuser(folder, dtype=torch.float32) for folder in fuser or []]  # as C2CModel loads them
        stall = Stall(sharer, signer, limits, chosen, precision.value, fusers)
        app = build_app(stall, Desk(token or [], signer, limits), Log())
        server = Server(app, host, port, tls_cert, tls_key, grace=timeout)
    if not is_local(host) and tls_cert is None:
        err.print("[yellow]Without TLS whoever is on the way can read prompts, caches and the token.[/yellow]")
    out.print(f"sharing {model} at {server.url}", highlight=False, soft_wrap=True)
    server.run()


def _require_extra() -> None:
    from c2c.errors import C2CError
    from c2c.utils import install_command

    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise C2CError(f"c2c share needs {' and '.join(missing)}: {install_command('remote')}.")


def _layers(text: str) -> list[int]:
    """``0-3,7`` to 0, 1, 2, 3, 7."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise typer.BadParameter(f"{text!r} can't be read; expected such as 0-11,20.", param_hint="--layers")
        found.update(range(int(first), int(last if dash else first) + 1))
    return sorted(found)
