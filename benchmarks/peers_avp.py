"""Worker of peers.py: answers with avp, in avp's own environment. One JSON object per line, in and out.

First ``{"sharer": FOLDER, "receiver": FOLDER, "dtype": ..., "threads": ...}``; then, for each question,
``{"thoughts": [...], "question": ..., "steps": ..., "new_tokens": ...}``. Several thoughts are read one behind the
other, each in the context of those before it. An answer has ``text``, ``read``, ``first`` and ``total`` (seconds),
``bytes`` and ``remarks``; or ``error``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from importlib import metadata
from typing import Any

import torch
from avp import HuggingFaceConnector
from transformers import StoppingCriteria, StoppingCriteriaList


class FirstToken(StoppingCriteria):
    """Record when the first new token was there; never stop."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Record the time of the first call."""
        self.seconds = self.seconds or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(request: dict[str, Any]) -> tuple[HuggingFaceConnector, HuggingFaceConnector]:
    """Load both models; one where they are the same."""
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    receiver = HuggingFaceConnector.from_pretrained(request["receiver"], device="cpu", dtype=dtype)
    if request["sharer"] == request["receiver"]:
        return receiver, receiver
    sharer = HuggingFaceConnector.from_pretrained(request["sharer"], device="cpu", dtype=dtype)
    receiver._get_or_calibrate_map(sharer)  # once per pair of models, and so no part of an answer's time
    return sharer, receiver


def answer(sharer: HuggingFaceConnector, receiver: HuggingFaceConnector, request: dict[str, Any]) -> dict[str, Any]:
    """Think and generate as the package's README has it."""
    began, context = time.perf_counter(), None
    *before, last = request["thoughts"]
    for thought in before:  # only behind the last one it thinks
        context = sharer.think(thought, steps=0, context=context)
    context = sharer.think(last, steps=request["steps"], context=context)
    read = time.perf_counter()
    crossing = {} if sharer is receiver else {"source": sharer, "cross_model": True}
    size = context.last_hidden_state.nbytes if crossing else len(context.to_bytes())
    first, started = FirstToken(), time.perf_counter()
    text = receiver.generate(
        request["question"],
        context=context,
        do_sample=False,
        max_new_tokens=request["new_tokens"],
        stopping_criteria=StoppingCriteriaList([first]),
        **crossing,
    )
    ended = time.perf_counter()
    return {
        "text": text,
        "read": read - began,
        "first": (first.seconds or ended) - started,
        "total": read - began + ended - started,
        "bytes": size,
    }


def main() -> None:
    """Answer until there are no more lines."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print is no reply
    models = load(json.loads(sys.stdin.readline()))
    versions = {name: metadata.version(name) for name in ("avp", "torch", "transformers")}
    print(json.dumps({"versions": versions}), file=replies, flush=True)
    for line in sys.stdin:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                reply = answer(*models, json.loads(line))
            except Exception as error:  # of whatever kind the package raises: this question has no answer
                reply = {"error": f"{type(error).__name__}: {error}"}
        remarks = {str(warning.message) for warning in caught if str(warning.message).startswith("AVP")}
        print(json.dumps(reply | {"remarks": sorted(remarks)}), file=replies, flush=True)


if __name__ == "__main__":
    main()
