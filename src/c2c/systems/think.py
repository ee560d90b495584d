"""Cache-to-cache with the sharer's thinking steps, and its controls; a filler takes as many steps without a thought."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.systems.base import SystemOptions
from c2c.systems.fused import CacheToCache, Control, Deranged, Rows


class Think(CacheToCache):
    """Cache-to-cache with thinking steps, under its name in results."""

    name: ClassVar[str] = "think"
    title: ClassVar[str] = "cache-to-cache with thinking steps"


class ThinkDeranged(Deranged):
    """Control of thinking: another conversation's context and thoughts."""

    name: ClassVar[str] = "think_deranged"
    title: ClassVar[str] = "thinking steps, deranged"
    drafts: ClassVar[bool] = True


class ThinkFiller(Think):
    """Control of thinking: as many entries, of one token again and again."""

    name: ClassVar[str] = "think_filler"
    title: ClassVar[str] = "filler in place of thinking steps"

    def __init__(self, model: C2CModel, options: SystemOptions | None = None) -> None:
        super().__init__(model, replace(options or SystemOptions(), realign="filler"))


class ThinkZero(Control):
    """Control of thinking: the context as it is, and zeros for the entries of the thoughts."""

    name: ClassVar[str] = "think_zero"
    title: ClassVar[str] = "zeros in place of thinking steps"
    drafts: ClassVar[bool] = True

    def exchange(self, rows: Rows, batch: list[Conversation], options: RenderOptions) -> Rows:
        """Return handoffs whose thoughts are zeros."""
        return [[[handoff.zeros_like(handoff.thoughts) for handoff in several] for several in row] for row in rows]
