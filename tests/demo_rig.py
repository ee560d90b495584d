"""Tiny random models for the demo: one fuser that merges, one of private context."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import torch

from c2c import C2CModel
from tiny import open_fusers, pair_folders


def fuser_folders(make_folder) -> dict[str, str]:
    """Folders of both fusers by name; ``make_folder(name)`` makes one. Their configs say that they are trained."""
    receiver, sharer = pair_folders(make_folder)
    home = Path(make_folder("fusers"))
    folders = {}
    for name, family in (("merging", "bottleneck"), ("remembering", "memory")):
        model = C2CModel.from_models(receiver, sharer, fuser=family)
        open_fusers(model)
        fuser = model.fusers[0]
        if family == "memory":
            torch.nn.init.normal_(fuser.weight, std=0.3, generator=torch.Generator().manual_seed(4))
        fuser.config.training = {"config": {"train": [{"kind": "multiple_choice", "form": "letter"}]}}
        fuser.save_pretrained(home / name)
        folders[name] = str(home / name)
    return folders


class Visitor:
    """Use a running page as a browser does: events through Gradio's queue, all of one session."""

    def __init__(self, address: str) -> None:
        import httpx

        self.session = uuid.uuid4().hex
        self.http = httpx.Client(base_url=address, timeout=60)
        config = self.http.get("config").json()
        self.components = {component["id"]: component for component in config["components"]}
        self.events = config["dependencies"]

    def trigger(self, name: str, event: str, **fields: Any) -> dict[str, Any]:
        """Trigger an event of an element such as ``ask-run``; ``fields`` hold ``ask_prompt`` and the like.

        Returns:
            What the event's last message sets, by element.
        """
        found = next(
            one
            for one in self.events
            if one["backend_fn"] and any((self._name(target), what) == (name, event) for target, what in one["targets"])
        )
        defaults = [self.components[one]["props"].get("value") for one in found["inputs"]]
        names = [self._name(one).replace("-", "_") for one in found["inputs"]]
        values = [fields.get(name, default) for name, default in zip(names, defaults, strict=True)]
        body = {"data": values, "fn_index": found["id"], "session_hash": self.session}
        if found["queue"] is False:
            output = self.http.post("gradio_api/run/predict", json=body).json()
        else:
            output = self._queued(body)
        return dict(zip(map(self._name, found["outputs"]), output["data"], strict=True))

    def _name(self, component: int | None) -> str:
        return str(self.components.get(component, {"props": {}})["props"].get("elem_id"))

    def _queued(self, body: dict[str, Any]) -> dict[str, Any]:
        self.http.post("gradio_api/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as messages:
            for line in messages.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    return message["output"]
        raise AssertionError("the queue ended without an answer")
