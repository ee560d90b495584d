"""``c2c convert``: a published checkpoint to a fuser folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2c.cli.output import err, human_bytes, out, print_json

_EPILOG = """Examples:

c2c convert ./qwen3_0.6b+qwen2.5_0.5b_Fuser ./fuser

c2c convert ./checkpoint ./fuser --receiver Qwen/Qwen3-0.6B --sharer Qwen/Qwen2.5-0.5B-Instruct

c2c inspect ./fuser"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="convert", epilog=_EPILOG)(convert)


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with projector_*.pt and projector_*.json, or above it.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the fuser to.")],
    receiver: Annotated[str | None, typer.Option(help="Load this receiver and record its identity.")] = None,
    sharer: Annotated[str | None, typer.Option(help="Load this sharer and record its identity.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; as stored if not given.")] = None,
    force: Annotated[bool, typer.Option(help="Write into a folder that already holds a fuser.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Convert a published checkpoint to one safetensors file and a config, without running anything in it."""
    from c2c.cli.inspect import describe
    from c2c.errors import FuserError
    from c2c.published import import_published
    from c2c.receiver import Receiver
    from c2c.sharer import Sharer

    if (output / "config.json").exists() and not force:
        raise FuserError(f"{output} already holds a fuser; choose another folder or pass --force.")
    with err.status("converting ..."):
        ours = Receiver.from_pretrained(receiver) if receiver else None
        theirs = Sharer.from_pretrained(sharer) if sharer else None
        fuser = import_published(
            checkpoint,
            receiver=ours.geometry if ours else None,
            sharer=theirs.geometry if theirs else None,
            dtype=dtype,
        )
        fuser.config.receiver = ours.identity.to_dict() if ours else None
        fuser.config.sharer = theirs.identity.to_dict() if theirs else None
        fuser.save_pretrained(output)
    data = describe(fuser) | {"output": str(output)}
    if json_:
        print_json(data)
        return
    out.print(f"{output}: {data['parameters']:,} parameters, {human_bytes(data['bytes'])}. Look: c2c inspect {output}")
    if not (receiver and sharer):
        out.print(
            "The checkpoint does not record which models it was trained with beyond their names; pass --receiver and "
            "--sharer to store their identities."
        )
