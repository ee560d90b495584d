"""What an engine says of the model that it serves."""

from __future__ import annotations

from collections.abc import Sequence

from c2c.model import C2CModel
from c2c.remote import RemoteSharer
from c2c.serving.engine import Description, SharerState, Way


def describe(model: C2CModel, ways: Sequence[Way]) -> Description:
    """What is served.

    Args:
        model: receiver, sharers and fusers.
        ways: who can answer.
    """
    names = tuple(sharer.name for sharer in model.sharers)
    return Description(tuple(ways), model.receiver.name, names, model.trained, "private" if model.private else "shared")


def sharer_states(model: C2CModel) -> tuple[SharerState, ...]:
    """Whether each sharer can be asked; one in this process always can."""
    losses = [sharer.lost if isinstance(sharer, RemoteSharer) else None for sharer in model.sharers]
    return tuple(SharerState() if loss is None else SharerState(loss.code, loss.since) for loss in losses)
