"""Partial handoffs: what one fuser needs of a prompt that was read on another machine, and not the whole cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Never

from c2c.errors import HandoffError
from c2c.fusers import Fuser
from c2c.handoff import Handoff
from c2c.kv_cache import KeyValue
from c2c.remote.protocol import fuser_hash

_ADVICE = "Read with sharer.read(...), which sends everything."


@dataclass(frozen=True)
class PartialHandoff(Handoff):
    """Hold what one fuser needs: its layers at the columns that are handed over, or what it has made of them.

    Attributes:
        fuser: hash of the fuser that the server projected with, None where layers were sent.
        entries: what it made, keys without rotation and values per receiver layer; None where layers were sent.
        wire_bytes: of the entries, as they crossed.
    """

    fuser: str | None = None
    entries: Sequence[KeyValue] | None = field(default=None, repr=False)
    wire_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the entries that were sent, as they crossed."""
        return self.wire_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that it takes here, where entries lie unpacked at their columns."""
        packed = [part.nbytes for pair in self.layers for part in pair]
        return sum(packed) + sum(entry.nbytes for pair in self.entries or () for entry in pair)

    def projected(self, fuser: Fuser) -> list[KeyValue] | None:
        """Return what the server made with this fuser; None where it sent layers.

        Raises:
            HandoffError: it was read for another fuser.
        """
        if self.entries is not None:
            if fuser_hash(fuser) != self.fuser:
                raise HandoffError(f"this handoff was projected with another fuser on the sharer's machine. {_ADVICE}")
            return list(self.entries)
        if missing := [i for i in sorted(set(fuser.config.source_layers)) if not self.layers[i][0].data.numel()]:
            raise HandoffError(f"this handoff was read for another fuser: layers {missing} are not in it. {_ADVICE}")
        return None

    def zeros_like(self) -> Handoff:
        """Return zeros for keys and values; refused for entries that were projected already, which would stay."""
        return super().zeros_like() if self.entries is None else self._refuse()

    def _refuse(self, *args: Any, **kwargs: Any) -> Never:
        # what is missing would be missing for other fusers, and the precision was chosen when it crossed
        raise HandoffError(
            f"this handoff holds only what one fuser reads, as {self.precision}: it has no whole cache, and is neither "
            f"converted, zeroed nor saved. {_ADVICE}"
        )

    cache = to = save = _refuse
