"""``c2c convert``: a published checkpoint to a fuser folder, or a fuser to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2c.cli.inspect import describe, is_published
from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_json
from c2c.errors import FuserError


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with projector_*.pt, or above it; or a fuser.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the fuser to.")],
    receiver: Annotated[str | None, typer.Option(help="Load this receiver and record its identity.")] = None,
    sharer: Annotated[str | None, typer.Option(help="Load this sharer and record its identity.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; as stored if not given.")] = None,
    force: Annotated[bool, typer.Option(help="Write into a folder that already holds a fuser.")] = False,
    json_: Json = False,
) -> None:
    """Convert a published checkpoint to one safetensors file and a config, without running anything in it.

    A fuser of this package is written again with weights of another --dtype, say bfloat16 to publish it.
    """
    from c2c.fusers.base import Fuser, load_fuser
    from c2c.language_model import Receiver, Sharer
    from c2c.loading import parse_dtype
    from c2c.published import import_published

    if (output / "config.json").exists() and not force:
        raise FuserError(f"{output} already holds a fuser; choose another folder or pass --force.")
    weights = parse_dtype(dtype)
    again = not is_published(checkpoint) and (checkpoint / "config.json").is_file()
    if again and dtype is None:
        raise FuserError(
            f"{checkpoint} is no published checkpoint (expected projector_*.pt) but a fuser already. To write it with "
            "weights of another type pass --dtype, say bfloat16."
        )
    with err.status("converting ..."):
        ours = Receiver.from_pretrained(receiver) if receiver else None
        theirs = Sharer.from_pretrained(sharer) if sharer else None
        fuser: Fuser
        if again:  # its statistics stay in float32
            fuser = load_fuser(checkpoint, dtype=weights)
        else:
            kv = [model.geometry if model else None for model in (ours, theirs)]
            fuser = import_published(checkpoint, receiver=kv[0], sharer=kv[1], dtype=weights)
        fuser.config.receiver = ours.identity.to_dict() if ours else fuser.config.receiver
        fuser.config.sharer = theirs.identity.to_dict() if theirs else fuser.config.sharer
        fuser.save_pretrained(output)
    data = describe(fuser) | {"output": str(output)}
    if json_:
        print_json(data)
        return
    out.print(f"{output}: {data['parameters']:,} parameters, {human_bytes(data['bytes'])}. Look: c2c inspect {output}")
    if not (fuser.config.receiver and fuser.config.sharer):
        out.print(
            "The checkpoint does not record which models it was trained with beyond their names; pass --receiver and "
            "--sharer to store their identities."
        )
