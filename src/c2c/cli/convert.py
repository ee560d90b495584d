"""``c2c convert``: a published checkpoint to a fuser folder, or a fuser to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_json

if TYPE_CHECKING:
    from c2c.fusers import Fuser
    from c2c.language_model import Receiver, Sharer

_EPILOG = """Examples:

c2c convert ./qwen3_0.6b+qwen2.5_0.5b_Fuser ./fuser

c2c convert ./checkpoint ./fuser --receiver Qwen/Qwen3-0.6B --sharer Qwen/Qwen2.5-0.5B-Instruct

c2c convert runs/laptop/best ./small --dtype bfloat16

c2c inspect ./fuser"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="convert", epilog=_EPILOG)(convert)


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
    from c2c.cli.inspect import describe
    from c2c.errors import FuserError
    from c2c.language_model import Receiver, Sharer

    if (output / "config.json").exists() and not force:
        raise FuserError(f"{output} already holds a fuser; choose another folder or pass --force.")
    with err.status("converting ..."):
        ours = Receiver.from_pretrained(receiver) if receiver else None
        theirs = Sharer.from_pretrained(sharer) if sharer else None
        fuser = _read(checkpoint, dtype, ours, theirs)
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


def _read(source: Path, dtype: str | None, receiver: Receiver | None, sharer: Sharer | None) -> Fuser:
    """Load a published checkpoint, or a fuser with weights of another type (its statistics stay in float32)."""
    from c2c.errors import FuserError
    from c2c.fusers.base import load_fuser
    from c2c.loading import check_dtype
    from c2c.published import import_published
    from c2c.utils import read_json_object

    check_dtype(dtype)
    dtype = dtype.removeprefix("torch.") if dtype else None
    config = source / "config.json"
    known = read_json_object(config, FuserError) if config.is_file() else {}
    if str(known.get("model_type", "")).startswith("c2c_fuser_"):
        if dtype is None:
            raise FuserError(
                f"{source} is no published checkpoint (expected projector_*.pt) but a fuser already. To write it with "
                "weights of another type pass --dtype, say bfloat16."
            )
        return load_fuser(source, dtype=dtype)
    ours, theirs = (model.geometry if model else None for model in (receiver, sharer))
    return import_published(source, receiver=ours, sharer=theirs, dtype=dtype)
