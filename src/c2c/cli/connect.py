"""``c2c connect``: the methods that two models have of working together, before anything is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, out, print_result, print_table
from c2c.config import option


@dataclass(frozen=True)
class ConnectConfig:
    """Options of ``c2c connect``."""

    fuser: str | None = option(None, "Folder or hub id of a fuser; else those in $C2C_FUSERS and zoo/ are tried.")
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")


@from_config(ConnectConfig)
def connect(
    receiver: Annotated[str, typer.Argument(help="The model that answers: alias, hub id, folder or GGUF.")],
    sharer: Annotated[str, typer.Argument(help="The model that reads: the same, or the URL of c2c share.")],
    *,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show by which methods two models can work together, which is the best, and why not a better one."""
    config = ConnectConfig(**options)
    from c2c.connection import connect as connect_models

    with err.status("loading models ..."):
        connection = connect_models(receiver, sharer, config.fuser, dtype=config.dtype, device_map=config.device)

    def show(data: dict[str, Any]) -> None:
        out.print(f"[bold]receiver[/bold] {data['receiver']}   [bold]sharer[/bold] {data['sharer']}")
        print_table(
            ("context", "method", "", "why"),
            (
                (
                    one["context"],
                    one["method"],
                    "chosen" if one["chosen"] else "" if one["available"] else "no",
                    one["reason"],
                )
                for one in data["methods"]
            ),
        )
        out.print("private: only the sharer reads something; shared: both read the same messages", style="dim")

    print_result(connection.to_dict(), json_, show)
