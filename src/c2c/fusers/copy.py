"""Private context between two equal models: the sharer's entries as they are, keys rotated to their new place.

Nothing is trained and nothing is lost where the document was read behind the receiver's own leading tokens: its entries
are then those that the receiver would compute itself. Elsewhere each document has attended to other leading tokens than
it now stands behind, which costs right answers; its first few tokens can be computed anew in place (EPIC,
arXiv:2410.15332), or all of the one that the question is about. From a variant (other weights of the same structure)
the receiver may take some layers and recompute the others (DroidSpeak, arXiv:2411.02820).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from c2c.errors import CacheError, FuserError, MismatchError
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.identity import ModelIdentity, differences
from c2c.kv_cache import KeyValue
from c2c.recompute import check_range


@strict
class CopyConfig(FuserConfig):
    """Configuration of the copy fuser.

    Attributes:
        refresh: tokens at the beginning of each document that the receiver computes itself, in place, where the
            document was read behind other tokens than it stands behind.
        reread: of four documents or more, how many the receiver computes whole: those nearest to the question. Nothing
            of the others is then refreshed.
        variant: accept a sharer with other weights of the same structure and tokenizer, such as a fine-tune.
        recompute: layers ``(first, stop)`` of a document that the receiver computes itself, from the tokens for layer
            0, else from the sharer's hidden states; None for none.
    """

    model_type = "c2c_fuser_copy"
    refresh: int = 16
    reread: int = 1
    variant: bool = False
    recompute: Sequence[int] | None = None


class CopyFuser(Fuser):
    """Hand over the entries of a model to the same model; no parameters."""

    config_class = CopyConfig
    config: CopyConfig
    family: ClassVar[str] = "copy"
    context: ClassVar[str] = "private"
    needs_rotary: ClassVar[bool] = True
    keeps_tokens: ClassVar[bool] = True

    place: Tensor

    def __init__(self, config: CopyConfig) -> None:
        super().__init__(config)
        sharer, receiver = config.geometries
        if sharer != receiver or config.layer_map != list(range(receiver.layers)):
            raise FuserError(
                f"a copy fuser takes entries as they are, and the sharer's cache has {sharer}, the receiver's "
                f"{receiver}, with the layer map {config.layer_map}. Use the same model on both sides, or a trained "
                "'memory' fuser."
            )
        for name, what in (("refresh", "tokens"), ("reread", "documents")):
            if getattr(config, name) < 0:
                raise FuserError(f"{name} is {getattr(config, name)}; expected a number of {what} from 0.")
        if config.recompute is not None:
            try:
                config.recompute = list(check_range(config.recompute, receiver.layers))
            except CacheError as error:
                raise FuserError(str(error)) from None
        self.register_buffer("place", torch.zeros(1))  # a file without any tensor would not be loaded
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where entries are rotated; there are no parameters that could tell."""
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which entries are rotated."""
        return self.place.dtype

    @property
    def trained(self) -> bool:
        """True: there is nothing to train."""
        return True

    def gates(self) -> Tensor:
        """Return ones, ``[layers, 2]``: copied entries have no gate."""
        return torch.ones(len(self.config.layer_map), 2)

    def check_models(self, receiver: ModelIdentity, sharer: ModelIdentity) -> None:
        """Refuse two models whose entries mean different things.

        Raises:
            MismatchError: another structure, tokenizer or rotation; other weights, unless ``variant`` is set.
        """
        hard, soft = differences("sharer", receiver, sharer, "receiver")
        soft = [line for line in soft if not line.startswith("sharer template")]  # text around documents is re-read
        if self.config.variant:
            soft = [line for line in soft if not line.startswith("sharer weights")]
        if hard or soft:
            raise MismatchError(
                hard + soft,
                "The copy fuser needs the same model on both sides (fuser_options={'variant': True} accepts other "
                "weights of the same structure); for other pairs train a 'memory' fuser.",
                "copy fuser",
            )

    def forward(self, sharer: Entries, receiver: Entries | None = None, mask: Tensor | None = None) -> list[KeyValue]:
        """Return the sharer's entries, keys without rotation in float32, ``[batch, kv_heads, positions, head_dim]``."""
        keys = list(sharer.keys)
        if sharer.rotary is not None:  # in float32, since each turn would round bfloat16
            keys = [table.undo(key.float()) for table, key in zip(sharer.rotary, keys, strict=True)]
        return list(zip(keys, sharer.values, strict=True))
