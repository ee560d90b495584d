"""One hash for a fuser: client and server have the same one only if they would project alike."""

from __future__ import annotations

import hashlib
import json

import torch

from c2c.fusers import Fuser


def fuser_hash(fuser: Fuser) -> str:
    """sha256 over family, layer map, geometries, identities and all weights."""
    config = fuser.config
    facts = [
        fuser.family,
        fuser.trained,
        config.layer_map,
        config.sharer_kv,
        config.receiver_kv,
        config.sharer,
        getattr(config, "slots", None),
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(fuser.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
