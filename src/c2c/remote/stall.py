"""The stall: one model with what a server needs to answer orders. It reads for one order at a time."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from torch import nn

from c2c.errors import C2CError
from c2c.fusers import Fuser
from c2c.handoff import Precision
from c2c.identity import ModelIdentity, check, differences
from c2c.language_model import Sharer
from c2c.remote.frame import Frame, FrameError, body_of, encode
from c2c.remote.fuser_hash import fuser_hash
from c2c.remote.limits import Limits
from c2c.remote.order import Menu, Order, allowed_precisions
from c2c.remote.packing import pack
from c2c.remote.refusal import Refusal
from c2c.remote.signature import Signer
from c2c.remote.skeleton import config_of, rotary_sums
from c2c.remote.tokenizer_files import to_files
from c2c.remote.work import Begin, End, Layer, Part, Work
from c2c.version import __version__


class Stall:
    """Answers orders with frames.

    Args:
        sharer: the model.
        signer: tags what is sent.
        limits: bounds.
        layers: those whose entries may be sent; all by default.
        finest: the precision of most bytes that is sent.
        fusers: fusers of private context to project with.

    Raises:
        C2CError: layers that the model does not have, or a fuser that was made for another model.
    """

    def __init__(
        self,
        sharer: Sharer,
        signer: Signer,
        limits: Limits,
        layers: Sequence[int] | None = None,
        finest: str = "float32",
        fusers: Sequence[Fuser] = (),
    ) -> None:
        self.sharer, self._signer, self.limits = sharer, signer, limits
        self.identity = _public(sharer.identity)
        self._fusers = {fuser_hash(fuser): _fitting(fuser, sharer) for fuser in fusers}
        count = sharer.geometry.layers
        given = range(count) if layers is None else layers
        if outside := [layer for layer in given if not 0 <= layer < count]:
            raise C2CError(f"layers {outside} do not exist: {sharer.name} has layers 0 to {count - 1}.")
        self.menu = Menu(
            frozenset(given),
            allowed_precisions(finest),
            sharer.model.get_input_embeddings().num_embeddings,
            sharer.context_length,
            limits.tokens,
            frozenset(self._fusers),
        )
        self._facts, self._files = self._describe(), None if sharer.tokenizer is None else to_files(sharer.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sharer")
        self.waiting = 0

    def hello(self, frame: Frame) -> list[bytes]:
        """Who the model is and what is given, and if asked for the tokenizer's files: one frame."""
        files = self._files if frame.header.get("files") else None
        body = zlib.compress(json.dumps(self._facts | {"files": files}).encode())
        return encode(_reply(frame, 0, "hello"), body, self._signer)

    def order(self, frame: Frame) -> Order:
        """Read and check an order.

        Raises:
            Refusal: it can't be fulfilled, or was meant for another model (409).
        """
        self._check_identity(frame.header.get("sharer"))
        try:
            order = self.menu.order(frame)
        except FrameError as error:
            raise Refusal(400, error.code, str(error)) from error
        if self.waiting >= self.limits.waiting:
            raise Refusal(503, "busy", f"{self.waiting} requests are under way; try again.", retry_after=1)
        return order

    async def answer(
        self, frame: Frame, order: Order, deadline: float, outcome: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """The frames of an answer: begin, layers as they are made, end.

        Args:
            frame: the request.
            order: what it asks.
            deadline: on the monotonic clock.
            outcome: filled with ``layers``, ``bytes`` and ``code``, for the log.
        """
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Part] = asyncio.Queue()
        work = Work(
            self.sharer, self._fusers, order, lambda part: loop.call_soon_threadsafe(parts.put_nowait, part), deadline
        )
        self.waiting += 1
        done = loop.run_in_executor(self._thread, work.run)
        done.add_done_callback(lambda _: self._leave())
        outcome |= {"layers": 0, "bytes": 0, "code": "cut"}  # until the end is reached
        number = 0
        try:
            while True:
                part = await parts.get()
                header, tensors = await asyncio.to_thread(self._message, order, part)
                pieces = await asyncio.to_thread(
                    encode, _reply(frame, number, "") | header, body_of(tensors), self._signer
                )
                number += 1
                outcome["layers"] += isinstance(part, Layer)
                outcome["bytes"] += sum(map(len, pieces))
                for piece in filter(None, pieces):
                    yield piece
                if isinstance(part, End):
                    outcome["code"] = part.code
                    return
        finally:
            work.stop()

    def close(self) -> None:
        """Wait for what is under way, and take no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _message(self, order: Order, part: Part) -> tuple[dict[str, Any], Mapping[str, Any]]:
        if isinstance(part, Begin):
            facts = {"sharer": self.identity.to_dict(), "drafted": part.drafted, "precision": order.precision}
            return {"kind": "begin", "tokens": order.token_hash} | facts, {}
        if isinstance(part, Layer):
            tensors = pack(part.entries, part.columns, cast(Precision, order.precision))
            counts = [len(columns) for columns in part.columns]
            heads, dim = part.entries[0].shape[1], part.entries[0].shape[3]
            shapes = {"columns": counts, "kv_heads": heads, "head_dim": dim, "precision": order.precision}
            return {"kind": part.kind, "layer": part.index, "tokens": order.token_hash} | shapes, tensors
        if part.error is not None:
            return {"kind": "error", "code": part.code, "message": part.error}, {}
        return {"kind": "end", "tokens": order.token_hash}, {}

    def _leave(self) -> None:
        self.waiting -= 1

    def _check_identity(self, given: Any) -> None:
        try:
            expected = ModelIdentity.from_dict(given)
        except (TypeError, AttributeError) as error:
            raise Refusal(400, "malformed", "sharer must be the identity of the model that is asked.") from error
        hard, soft = differences("sharer", expected, self.identity, "request")
        if hard or soft:
            raise Refusal(
                409,
                "mismatch",
                "the request is for another model than the one that is served here.",
                sharer=self.identity.to_dict(),
            )

    def _describe(self) -> dict[str, Any]:
        sharer = self.sharer
        try:
            sharer.check_rotary()
            rotary = None
        except C2CError as error:
            rotary = str(error)
        return {
            "version": __version__,
            "sharer": self.identity.to_dict(),
            "config": config_of(sharer.model),
            "dtype": str(sharer.dtype).removeprefix("torch."),
            "layers": sorted(self.menu.layers),
            "precisions": list(self.menu.precisions),
            "fusers": sorted(self._fusers),
            "tokens": self.limits.tokens,
            "seconds": self.limits.seconds,
            "rotary": rotary_sums(sharer.model),
            "rotary_error": rotary,
        }


def _fitting(fuser: Fuser, sharer: Sharer) -> Fuser:
    """A fuser that can project here."""
    if fuser.context != "private":
        raise C2CError(
            f"a {fuser.family} fuser merges into the receiver's entries, which are not here: it can't project. Leave "
            "out --fuser, and its entries are fused where the receiver is."
        )
    check([("sharer", fuser.config.identity("sharer"), sharer.identity)], allow_mismatch=False)
    nn.Module.to(fuser, sharer.device)
    fuser.eval()
    return fuser


def _reply(frame: Frame, number: int, kind: str) -> dict[str, Any]:
    asked = frame.header
    return {
        "kind": kind,
        "request": asked["request"],
        "nonce": asked["nonce"],
        "time": time.time(),
        "number": number,
    }


def _public(identity: ModelIdentity) -> ModelIdentity:
    """The identity without the folder that a model was loaded from."""
    facts = identity.to_dict()
    name = identity.name
    return ModelIdentity.from_dict(facts | {"name": Path(name).name if Path(name).is_absolute() else name})
