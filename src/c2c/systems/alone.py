"""One model alone: the receiver, the receiver that reads the context as text, or the sharer."""

from __future__ import annotations

from typing import ClassVar

from c2c.language_model import LanguageModel
from c2c.systems.base import System


class ReceiverAlone(System):
    """Answer with the receiver, without what only the sharer has read."""

    name: ClassVar[str] = "receiver"
    title: ClassVar[str] = "receiver alone"
    reads_context: ClassVar[bool] = False


class Reader(System):
    """Answer with the receiver, which reads the context itself: what private context is measured against."""

    name: ClassVar[str] = "reader"
    title: ClassVar[str] = "receiver that reads the text"


class SharerAlone(System):
    """Answer with the first sharer, which reads its context and the question."""

    name: ClassVar[str] = "sharer"
    title: ClassVar[str] = "sharer alone"
    generates_sharer: ClassVar[bool] = True

    @property
    def language_model(self) -> LanguageModel:
        """The model that answers."""
        return self.model.sharers[0]
