"""The application of ``c2c share``: the handshake, and prefills as streams of records."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from c2c.remote.protocol import HANDSHAKE_PATH, PREFILL_PATH, PrefillRequest
from c2c.remote.wire import MEDIA_TYPE
from c2c.remote.worker import PrefillJob, PrefillWorker
from c2c.serving.config import HTTPConfig
from c2c.serving.http_server import RequestRecord, ServerState, create_app
from c2c.version import __version__


class PrefillStream(StreamingResponse):
    """Stream the records of a job, cut at a deadline (on the monotonic clock) even where the client does not read."""

    def __init__(self, job: PrefillJob, first: dict[str, Any], deadline: float, record: RequestRecord) -> None:
        super().__init__(job.records(first), media_type=MEDIA_TYPE)
        self._job, self._deadline, self._record = job, deadline, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, and record what is logged."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed without the last record, which the client notices
        finally:
            self._job.stop()
            self._record.code = self._job.facts.pop("code")
            self._record.facts |= self._job.facts


def build_app(worker: PrefillWorker, config: HTTPConfig) -> FastAPI:
    """Make the application around a worker.

    Raises:
        ServerError: keys that can't be used, or none and an address that others can reach.
    """
    router, made = APIRouter(), worker.handshake
    handshakes = {
        wanted: gzip.compress(made.model_dump_json(exclude=None if wanted else {"tokenizer"}).encode())
        for wanted in (True, False)
    }

    @router.get(HANDSHAKE_PATH)
    async def handshake(request: Request, tokenizer: bool = False) -> Response:
        request.state.record.facts["kind"] = "handshake"
        return Response(handshakes[tokenizer], media_type="application/json", headers={"Content-Encoding": "gzip"})

    @router.post(PREFILL_PATH)
    async def prefill(body: PrefillRequest, request: Request) -> Response:
        record = request.state.record
        record.facts |= {"kind": body.kind, "rows": len(body.ids), "precision": body.precision}
        record.facts["tokens"] = sum(map(len, body.ids))
        deadline = record.began + config.timeout
        first = {"sharer": worker.handshake.sharer, "precision": body.precision}
        return PrefillStream(worker.submit(body, deadline), first, deadline, record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    state = ServerState(lambda: {"version": __version__, "waiting": worker.waiting}, abort=worker.stop)
    return create_app(config, [router], state, lifespan)
