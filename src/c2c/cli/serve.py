"""``c2c serve``: a pair behind the interface of the OpenAI API."""

from __future__ import annotations

import gc
import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from c2c.cli.output import err
from c2c.hub_aliases import DEFAULT_RECEIVER, DEFAULT_SHARER

if TYPE_CHECKING:
    from c2c.model import C2CModel
    from c2c.serving.engine import Engine

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_KEY_VARIABLE = "C2C_API_KEY"
_SHARER_SECONDS = 60.0


class EngineName(StrEnum):
    """What runs a model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class OnFailure(StrEnum):
    """Policies for a lost sharer, or a fused cache that vLLM did not take."""

    RAISE = "raise"
    RECEIVER_ONLY = "receiver_only"


_EPILOG = """Examples:

c2c serve ./my-fuser

c2c serve ./my-fuser --name pair --port 8000 --max-batch 16 --timeout 120

C2C_API_KEY=secret c2c serve ./my-fuser --host 0.0.0.0

C2C_TOKEN=... c2c serve ./my-fuser --sharer https://host:8650 --on-failure receiver_only

c2c serve ./my-fuser --engine vllm --engine-option max_model_len=4096

curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
-d '{"model": "my-fuser", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Model names choose the way: NAME is cache-to-cache, NAME/receiver and NAME/sharer are the models alone, NAME/text is
text-to-text. Needs the server's packages: pip install 'cache2cache\\[serve]'."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="serve", epilog=_EPILOG)(serve)


def serve(
    fuser: Annotated[
        str | None, typer.Argument(metavar="[FUSER]", help="Folder or hub id of a fuser; untrained if not given.")
    ] = None,
    fuser_option: Annotated[
        str | None, typer.Option("--fuser", help="The same, as other commands take it.", show_default=False)
    ] = None,
    receiver: Annotated[
        str | None,
        typer.Option(help=f"Alias, hub id, folder or GGUF; by default the fuser's, else {DEFAULT_RECEIVER}."),
    ] = None,
    sharer: Annotated[
        str | None,
        typer.Option(
            help=f"Alias, hub id, folder, GGUF, or URL of c2c share; by default the fuser's, else {DEFAULT_SHARER}."
        ),
    ] = None,
    on_failure: Annotated[
        OnFailure | None,
        typer.Option(
            help="When the sharer at a URL is lost, or vLLM does not take a fused cache: an error, or the receiver "
            "alone; raise by default."
        ),
    ] = None,
    sharer_timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds for a request to the sharer at a URL; 60 by default.")
    ] = None,
    sharer_precision: Annotated[
        str | None, typer.Option(help="In which its entries cross, such as int8; the model's own by default.")
    ] = None,
    sharer_ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust for it; those of the system by default.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="What runs the receiver; vllm needs an environment of its own, see the docs.")
    ] = EngineName.TRANSFORMERS,
    sharer_engine: Annotated[
        EngineName, typer.Option(help="The same for the sharer; vllm only beside --engine vllm.")
    ] = EngineName.TRANSFORMERS,
    engine_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of vLLM, such as max_model_len=4096; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the fuser's folder, else 'c2c'.")
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
    sharer_dtype: Annotated[str | None, typer.Option(help="The same for the sharer; --dtype by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Device map: cpu, cuda, auto.")] = None,
    allow_mismatch: Annotated[bool, typer.Option(help="Accept models with other weights than the fuser's.")] = False,
) -> None:
    """Serve a pair over HTTP, as the OpenAI API does: chat completions, completions, models."""
    _check_packages()
    from c2c.serving.http_config import HTTPConfig
    from c2c.serving.server import listen

    HTTPConfig(
        host=host, api_key=list(_keys(api_key))
    ).keys()  # refuses an open address without keys, before models load
    fuser = _one_fuser(fuser, fuser_option)
    extra = _engine_options(engine, sharer_engine, engine_option)
    sock = listen(host, port)
    with err.status("loading models ..."):
        theirs = _sharer(sharer, on_failure, sharer_timeout, sharer_precision, sharer_ca, engine)
        loading = {"dtype": dtype, "sharer_dtype": sharer_dtype, "device_map": device}
        model = _load(fuser, receiver, theirs, allow_mismatch, **loading)
    if not model.trained:
        err.print("The fuser is untrained: cache-to-cache answers equal the receiver's.", style="yellow")
    from c2c.serving.app import create_app
    from c2c.serving.logs import log_to_stderr
    from c2c.serving.server import serve as run
    from c2c.serving.settings import Settings

    limits: dict[str, Any] = {"max_queue": max_queue, "max_batch": max_batch}
    limits |= {"max_tokens": max_tokens, "message_tokens": message_tokens}
    if engine is EngineName.VLLM:
        policy = on_failure or OnFailure.RAISE
        made = _vllm(model, limits, policy, sharer_engine is EngineName.VLLM, extra)
    else:
        made = _transformers(model, limits, batch_window_ms / 1000)
    settings = Settings(
        name=name or (Path(fuser).resolve().name if fuser else "c2c"),
        api_keys=_keys(api_key),
        timeout=timeout,
        max_body=int(max_body_mb * 1e6),
        max_batch=max_batch,
        max_handoffs=handoffs,
        max_handoff_bytes=int(handoff_mb * 1e6),
        handoff_seconds=handoff_seconds,
    )
    log_to_stderr()
    answered = run(create_app(made, settings), sock)
    if engine is EngineName.TRANSFORMERS:  # with vLLM libraries would complain about what is left
        gc.freeze()  # the interpreter would look for garbage among a million objects before it ends
    if not answered:
        raise typer.Exit(1)


def _check_packages() -> None:
    from c2c.serving.errors import MissingServerError
    from c2c.utils import install_command

    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingServerError(f"{', '.join(missing)} not installed. The server needs: {install_command('serve')}.")


def _transformers(model: C2CModel, limits: dict[str, Any], window: float) -> Engine:
    from c2c.serving.huggingface import HuggingFaceEngine

    return HuggingFaceEngine(model, window=window, **limits)


def _vllm(
    model: C2CModel, limits: dict[str, Any], policy: OnFailure, sharer_too: bool, options: dict[str, Any]
) -> Engine:
    from c2c.integrations.vllm.engine import VLLMEngine

    with err.status("starting vLLM ..."):
        return VLLMEngine(model, on_load_failure=policy.value, sharer_in_vllm=sharer_too, options=options, **limits)


def _engine_options(engine: EngineName, sharer: EngineName, given: list[str] | None) -> dict[str, Any]:
    """Arguments of vLLM; and whether it is there, before models are loaded."""
    if engine is not EngineName.VLLM:
        if given or sharer is EngineName.VLLM:
            raise typer.BadParameter(
                "--engine-option and --sharer-engine vllm are for --engine vllm. Give it, or leave them out.",
                param_hint="--engine",
            )
        return {}
    from c2c.integrations.vllm.versions import check_version, installed

    check_version(installed())
    options: dict[str, Any] = {}
    for pair in given or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise typer.BadParameter(
                f"got {pair!r}; expected NAME=VALUE, such as max_model_len=4096.", param_hint="--engine-option"
            )
        options[key] = yaml.safe_load(value)
    return options


def _one_fuser(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise typer.BadParameter(f"a fuser is given already: {argument}. Give one of the two.", param_hint="--fuser")
    return argument if argument is not None else option


def _sharer(
    source: str | None,
    on_failure: OnFailure | None,
    timeout: float | None,
    precision: str | None,
    ca: Path | None,
    engine: EngineName,
) -> Any:
    """The sharer as it was named; one at a URL is connected to, with token and key of the environment."""
    given = {"on_failure": on_failure, "timeout": timeout, "precision": precision, "verify": ca}
    given = {name: value for name, value in given.items() if value is not None}
    if source is not None and source.startswith(("http://", "https://")):
        from c2c.remote import RemoteSharer

        options: dict[str, Any] = {"timeout": _SHARER_SECONDS} | given
        return RemoteSharer(source, **options)
    if engine is EngineName.VLLM:
        given.pop("on_failure", None)  # which is for its fused caches too
    if given:
        raise typer.BadParameter(
            "--on-failure, --sharer-timeout, --sharer-precision and --sharer-ca are for a sharer at a URL; got "
            f"{source or 'none'}. Give the URL of c2c share, or leave them out.",
            param_hint="--sharer",
        )
    return source


def _load(fuser: str | None, receiver: str | None, sharer: Any, allow_mismatch: bool, **kwargs: Any) -> C2CModel:
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
