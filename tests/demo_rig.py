"""Tiny random models for the demo: one fuser that merges, one of private context."""

from __future__ import annotations

from pathlib import Path

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
