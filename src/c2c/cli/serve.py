"""``c2c serve``: a pair behind the interface of the OpenAI API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from c2c.cli.output import err
from c2c.pull.defaults import DEFAULT_RECEIVER, DEFAULT_SHARER

if TYPE_CHECKING:
    from c2c.model import C2CModel

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_KEY_VARIABLE = "C2C_API_KEY"

_EPILOG = """Examples:

c2c serve --fuser ./my-fuser

c2c serve --fuser ./my-fuser --name pair --port 8000 --max-batch 16 --timeout 120

C2C_API_KEY=secret c2c serve --fuser ./my-fuser --host 0.0.0.0

curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
-d '{"model": "my-fuser", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Model names choose the way: NAME is cache-to-cache, NAME/receiver and NAME/sharer are the models alone, NAME/text is
text-to-text. Needs the server's packages: pip install 'cache2cache\\[serve]'."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="serve", epilog=_EPILOG)(serve)


def serve(
    fuser: Annotated[str | None, typer.Option(help="Folder or hub id of a fuser; untrained if not given.")] = None,
    receiver: Annotated[
        str | None,
        typer.Option(help=f"Alias, hub id, folder or GGUF. [default: the fuser's, else {DEFAULT_RECEIVER}]"),
    ] = None,
    sharer: Annotated[
        str | None,
        typer.Option(
            help=f"Alias, hub id, folder, GGUF, or URL of c2c share. [default: the fuser's, else {DEFAULT_SHARER}]"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. [default: the fuser's folder, else 'c2c']")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Key that clients must send; may be repeated. Better in {_KEY_VARIABLE}, with commas."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 16,
    batch_window_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a request waits for others to run with it.")
    ] = 10.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take, waiting included.")] = 300.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of a request at most.")] = 4.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens for requests that do not say how many.")] = 256,
    message_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the sharer's text, in text-to-text.")] = 128,
    handoffs: Annotated[int, typer.Option(min=0, help="Handoffs kept at a time.")] = 64,
    handoff_mb: Annotated[float, typer.Option(min=0, help="Megabytes of all handoffs together.")] = 1000.0,
    handoff_seconds: Annotated[float, typer.Option(min=1, help="How long a handoff is kept.")] = 3600.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Device map: cpu, cuda, auto.")] = None,
    allow_mismatch: Annotated[bool, typer.Option(help="Accept models with other weights than the fuser's.")] = False,
) -> None:
    """Serve a pair over HTTP, as the OpenAI API does: chat completions, completions, models."""
    _check_packages()
    from c2c.serving.server import listen

    sock = listen(host, port)
    with err.status("loading models ..."):
        model = _load(fuser, receiver, sharer, allow_mismatch, dtype=dtype, device_map=device)
    if not model.trained:
        err.print("The fuser is untrained: cache-to-cache answers equal the receiver's.", style="yellow")
    from c2c.serving.app import create_app
    from c2c.serving.huggingface import HuggingFaceEngine
    from c2c.serving.logs import log_to_stderr
    from c2c.serving.server import serve as run
    from c2c.serving.settings import Settings

    engine = HuggingFaceEngine(
        model,
        max_queue=max_queue,
        max_batch=max_batch,
        window=batch_window_ms / 1000,
        max_tokens=max_tokens,
        message_tokens=message_tokens,
    )
    settings = Settings(
        name=name or (Path(fuser).name if fuser else "c2c"),
        api_keys=_keys(api_key),
        timeout=timeout,
        max_body=int(max_body_mb * 1e6),
        max_batch=max_batch,
        max_handoffs=handoffs,
        max_handoff_bytes=int(handoff_mb * 1e6),
        handoff_seconds=handoff_seconds,
    )
    log_to_stderr()
    if not run(create_app(engine, settings), sock):
        raise typer.Exit(1)


def _check_packages() -> None:
    from c2c.serving.errors import MissingServerError

    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingServerError(
            f"{', '.join(missing)} not installed. The server needs: pip install 'cache2cache[serve]'."
        )


def _load(fuser: str | None, receiver: str | None, sharer: str | None, allow_mismatch: bool, **kwargs: Any) -> C2CModel:
    from c2c.model import C2CModel

    if fuser is not None:
        return C2CModel.from_pretrained(
            fuser, receiver=receiver, sharer=sharer, allow_mismatch=allow_mismatch, **kwargs
        )
    return C2CModel.from_models(receiver or DEFAULT_RECEIVER, sharer or DEFAULT_SHARER, **kwargs)


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """Keys of the command line, else of the environment."""
    found = given or os.environ.get(_KEY_VARIABLE, "").split(",")
    return tuple(key.strip() for key in found if key.strip())
