"""``c2c serve``: a pair of models behind the interface of the OpenAI API; ``c2c share``: a sharer's prefills."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from c2c.cli.options import from_config, parse_pairs
from c2c.cli.output import err, out
from c2c.cli.run import load_pair
from c2c.remote.config import ShareConfig
from c2c.serving.config import ServeConfig
from c2c.utils import install_command

if TYPE_CHECKING:
    from c2c.serving.engine import Engine

_SHARER_SECONDS = 60.0  # a sharer that is waited for holds up the whole server


@from_config(ServeConfig)
def serve(
    fuser_argument: Annotated[
        str | None,
        typer.Argument(metavar="[FUSER]", help="Folder or hub id of a fuser; else the best method there is."),
    ] = None,
    *,
    fuser: Annotated[
        str | None, typer.Option("--fuser", help="The same, as other commands take it.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Serve a pair over HTTP, as the OpenAI API does: chat completions, completions, models."""
    _check_packages(("fastapi", "uvicorn", "prometheus_client", "sse_starlette", "cachetools"), "serve")
    from c2c.serving import http_server
    from c2c.serving.logs import log_to_stderr

    if fuser_argument is not None and fuser is not None:
        raise typer.BadParameter(f"a fuser is given already: {fuser_argument}. Give one.", param_hint="--fuser")
    fuser = fuser_argument or fuser
    config = ServeConfig(**options)
    config = replace(config, name=config.name or (Path(fuser).resolve().name if fuser else "c2c"))
    config.keys()  # refuses an open address without keys, before models load
    vllm_options = _vllm_options(config)
    sock = http_server.listen(config.host, config.port)
    with err.status("loading models ..."):
        from c2c.systems import SystemOptions, find_system

        for name in config.systems or ():
            find_system(name)
        dtypes: dict[str, Any] = {"dtype": config.dtype, "sharer_dtype": config.sharer_dtype}
        shared = SystemOptions(message_tokens=config.message_tokens)
        model, connection = load_pair(config, fuser, _sharer(config), shared, device_map=config.device, **dtypes)
    if connection is not None:
        err.print(f"method: {connection}", highlight=False, soft_wrap=True)
    elif not model.trained:
        err.print("The fuser is untrained: cache-to-cache answers equal the receiver's.", style="yellow")
    from c2c.serving.app import create_app

    engine: Engine
    if config.engine == "vllm":
        from c2c.integrations.vllm.engine import VLLMEngine

        with err.status("starting vLLM ..."):
            engine = VLLMEngine(model, config, vllm_options)
    else:
        from c2c.serving.transformers_engine import TransformersEngine

        engine = TransformersEngine(model, config, connection)
    log_to_stderr()
    answered = http_server.serve(create_app(engine, config), sock, config)
    if config.engine != "vllm":  # with it libraries would complain about what is left
        gc.freeze()  # the interpreter would look for garbage among a million objects before it ends
    if not answered:
        raise typer.Exit(1)


def _check_packages(names: Sequence[str], extra: str) -> None:
    from c2c.serving.errors import MissingServerError

    if missing := [name for name in names if find_spec(name) is None]:
        raise MissingServerError(f"{', '.join(missing)} not installed. This command needs: {install_command(extra)}.")


def _vllm_options(config: ServeConfig) -> dict[str, Any]:
    """Return the arguments of vLLM, after checking that it is there, before models are loaded."""
    if config.engine != "vllm":
        if config.engine_option or config.sharer_engine == "vllm":
            raise typer.BadParameter(
                "--engine-option and --sharer-engine vllm are for --engine vllm. Give it, or leave them out.",
                param_hint="--engine",
            )
        return {}
    from c2c.integrations.vllm.errors import check_version, installed

    check_version(installed())
    return parse_pairs(config.engine_option, "--engine-option", "max_model_len=4096", yaml.safe_load, str.isidentifier)


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


@from_config(ShareConfig, skip=("max_body_mb",))
def share(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or GGUF file of the sharer.")], **options: Any
) -> None:
    """Serve a sharer: receivers on other machines send it prompts, and get its KV cache."""
    config = ShareConfig(**options)
    config.keys()  # refuses an open address without keys, before anything is loaded
    _check_packages(("fastapi", "uvicorn", "cachetools"), "remote")
    with err.status("loading model ..."):
        import torch

        from c2c.fusers.base import load_fuser
        from c2c.remote.server import PrefillWorker, build_app
        from c2c.serving import http_server
        from c2c.serving.logs import log_to_stderr
        from c2c.sharer import Sharer

        sock = http_server.listen(config.host, config.port)
        fusers = [load_fuser(folder, dtype=torch.float32) for folder in config.fuser or []]  # as C2CModel does
        worker = PrefillWorker(
            Sharer.from_pretrained(model, dtype=config.dtype, device_map=config.device), config, fusers
        )
        app = build_app(worker, config)
    if config.exposed and config.tls_cert is None:
        err.print("[yellow]Without TLS whoever is on the way can read prompts, caches and the token.[/yellow]")
    log_to_stderr()
    out.print(f"sharing {model} at {http_server.url_of(sock, config)}", highlight=False, soft_wrap=True)
    if not http_server.serve(app, sock, config):
        raise typer.Exit(1)
