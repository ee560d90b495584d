"""``c2c serve``: a pair of models behind the interface of the OpenAI API."""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from c2c.cli.options import from_config
from c2c.cli.output import err
from c2c.hub_aliases import DEFAULT_RECEIVER, DEFAULT_SHARER
from c2c.serving.config import ServeConfig

if TYPE_CHECKING:
    from c2c.model import C2CModel
    from c2c.serving.engine import Engine

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "sse_starlette", "cachetools")
_SHARER_SECONDS = 60.0  # a sharer that is waited for holds up the whole server

_EPILOG = """Examples:

c2c serve ./my-fuser

c2c serve ./my-fuser --name pair --port 8000 --max-batch 16 --timeout 120

C2C_API_KEY=secret c2c serve ./my-fuser --host 0.0.0.0

c2c serve ./my-fuser --sharer https://host:8650 --on-failure receiver_only

c2c serve ./my-fuser --engine vllm --engine-option max_model_len=4096

curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
-d '{"model": "my-fuser", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

The model name chooses who answers: NAME is cache-to-cache, NAME/receiver and NAME/sharer are the models alone,
NAME/text is text-to-text. API keys are better given in C2C_API_KEY, separated by commas. Needs the packages of the
server: pip install 'cache2cache\\[serve]'."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="serve", epilog=_EPILOG)(serve)


@from_config(ServeConfig)
def serve(
    fuser_argument: Annotated[
        str | None, typer.Argument(metavar="[FUSER]", help="Folder or hub id of a fuser; untrained if not given.")
    ] = None,
    *,
    fuser: Annotated[
        str | None, typer.Option("--fuser", help="The same, as other commands take it.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Serve a pair over HTTP, as the OpenAI API does: chat completions, completions, models."""
    _check_packages()
    from c2c.serving.http_server import listen

    if fuser_argument is not None and fuser is not None:
        raise typer.BadParameter(f"a fuser is given already: {fuser_argument}. Give one.", param_hint="--fuser")
    fuser = fuser_argument or fuser
    config = ServeConfig(**options)
    config = replace(config, name=config.name or (Path(fuser).resolve().name if fuser else "c2c"))
    config.keys()  # refuses an open address without keys, before models load
    vllm_options = _vllm_options(config)
    sock = listen(config.host, config.port)
    with err.status("loading models ..."):
        model = _load(fuser, config)
    if not model.trained:
        err.print("The fuser is untrained: cache-to-cache answers equal the receiver's.", style="yellow")
    _run(_engine(model, config, vllm_options), config, sock)


def _run(engine: Engine, config: ServeConfig, sock: Any) -> None:
    from c2c.serving import http_server
    from c2c.serving.app import create_app
    from c2c.serving.logs import log_to_stderr

    log_to_stderr()
    answered = http_server.serve(create_app(engine, config), sock, config)
    if config.engine != "vllm":  # with it libraries would complain about what is left
        gc.freeze()  # the interpreter would look for garbage among a million objects before it ends
    if not answered:
        raise typer.Exit(1)


def _check_packages() -> None:
    from c2c.serving.errors import MissingServerError
    from c2c.utils import install_command

    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingServerError(f"{', '.join(missing)} not installed. The server needs: {install_command('serve')}.")


def _engine(model: C2CModel, config: ServeConfig, vllm_options: dict[str, Any]) -> Engine:
    if config.engine == "vllm":
        from c2c.integrations.vllm.engine import VLLMEngine

        with err.status("starting vLLM ..."):
            return VLLMEngine(model, config, vllm_options)
    from c2c.serving.transformers_engine import TransformersEngine

    return TransformersEngine(model, config)


def _vllm_options(config: ServeConfig) -> dict[str, Any]:
    """Return the arguments of vLLM, after checking that it is there, before models are loaded."""
    if config.engine != "vllm":
        if config.engine_option or config.sharer_engine == "vllm":
            raise typer.BadParameter(
                "--engine-option and --sharer-engine vllm are for --engine vllm. Give it, or leave them out.",
                param_hint="--engine",
            )
        return {}
    from c2c.integrations.vllm.versions import check_version, installed

    check_version(installed())
    options: dict[str, Any] = {}
    for pair in config.engine_option or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise typer.BadParameter(
                f"got {pair!r}; expected NAME=VALUE, such as max_model_len=4096.", param_hint="--engine-option"
            )
        options[key] = yaml.safe_load(value)
    return options


def _load(fuser: str | None, config: ServeConfig) -> C2CModel:
    from c2c.model import C2CModel

    kwargs: dict[str, Any] = {"dtype": config.dtype, "sharer_dtype": config.sharer_dtype, "device_map": config.device}
    sharer = _sharer(config)
    if fuser is None:
        return C2CModel.from_models(config.receiver or DEFAULT_RECEIVER, sharer or DEFAULT_SHARER, **kwargs)
    return C2CModel.from_pretrained(
        fuser, receiver=config.receiver, sharer=sharer, allow_mismatch=config.allow_mismatch, **kwargs
    )


def _sharer(config: ServeConfig) -> Any:
    """Return the sharer as it was named; connect to one at a URL, with the key of the environment."""
    given: dict[str, Any] = {
        "on_failure": config.on_failure,
        "timeout": config.sharer_timeout,
        "precision": config.sharer_precision,
        "verify": config.sharer_ca,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if config.sharer is not None and config.sharer.startswith(("http://", "https://")):
        from c2c.remote import RemoteSharer

        return RemoteSharer(config.sharer, **{"timeout": _SHARER_SECONDS, **given})
    if config.engine == "vllm":
        given.pop("on_failure", None)  # which is for its fused caches too
    if given:
        raise typer.BadParameter(
            "--on-failure, --sharer-timeout, --sharer-precision and --sharer-ca are for a sharer at a URL; got "
            f"{config.sharer or 'none'}. Give the URL of c2c share, or leave them out.",
            param_hint="--sharer",
        )
    return config.sharer
