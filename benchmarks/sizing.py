"""What a pair takes: weights, bytes per token and layer, arithmetic of a fused prompt. From configs; nothing is run.

python benchmarks/sizing.py zoo/smollm2-135m_from_qwen2.5-coder-1.5b
python benchmarks/sizing.py zoo/* --tokens 500 --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from c2c.fusers import Fuser
from c2c.fusers.base import load_fuser
from c2c.hub_aliases import is_pulled, local_path
from c2c.kv_cache import KVGeometry


def main() -> None:
    """Print one table, or one JSON object."""
    arguments = _arguments()
    found = [sizes(folder, arguments.tokens) for folder in arguments.fusers]
    if arguments.json:
        print(json.dumps({"tokens": arguments.tokens, "pairs": found}))
        return
    print(_table(found, arguments.tokens))


def sizes(folder: str, tokens: int) -> dict[str, Any]:
    """The sizes of one pair, for a prompt of so many tokens."""
    fuser = load_fuser(folder)
    sharer, receiver = KVGeometry(**fuser.config.sharer_kv), KVGeometry(**fuser.config.receiver_kv)
    read = len({layer for layer in fuser.config.layer_map if layer is not None})
    names = {side: fuser.config.identity(side).name for side in ("receiver", "sharer")}
    weights = {side: _weights(name) for side, name in names.items()}
    return {
        "fuser": fuser.family,
        **names,
        "fuser_parameters": fuser.num_parameters(),
        "parameters": {side: count for side, (count, _) in weights.items()},
        "weights_gb_float32": {side: round(4e-9 * count, 2) for side, (count, _) in weights.items()},
        "sharer_bytes_per_token_and_layer": 2 * sharer.width * 2,
        "sharer_bytes_per_token": 2 * sharer.width * read * 2,
        "receiver_bytes_per_token": 2 * receiver.width * receiver.layers * 2,
        "gflop": {
            **{f"{side}_prefill": round(2e-9 * tokens * body, 1) for side, (_, body) in weights.items()},
            "fuse": round(2e-9 * tokens * _per_token(fuser), 1),
        },
    }


def _weights(name: str) -> tuple[int, int]:
    """All parameters of a model, and those that every prompt token passes (not its head's); from its config."""
    config = AutoConfig.from_pretrained(local_path(name) if is_pulled(name) else name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count, body = (sum(p.numel() for p in part.parameters()) for part in (model, model.base_model))
    return count, body - model.get_input_embeddings().weight.numel()


def _per_token(fuser: Fuser) -> int:
    """Multiplications of one fused token: every matrix is passed once."""
    return sum(parameter.numel() for parameter in fuser.parameters() if parameter.dim() > 1)


def _table(found: list[dict[str, Any]], tokens: int) -> str:
    lines = ["| | " + " | ".join(f"{pair['receiver']} <- {pair['sharer']}, {pair['fuser']}" for pair in found) + " |"]
    lines.append("|---" * (len(found) + 1) + "|")
    rows = {
        "receiver, float32": lambda p: f"{p['weights_gb_float32']['receiver']:g} GB",
        "sharer, float32": lambda p: f"{p['weights_gb_float32']['sharer']:g} GB",
        "fuser": lambda p: f"{p['fuser_parameters'] / 1e6:.1f} million parameters",
        "sharer, bytes per token and layer (bfloat16)": lambda p: f"{p['sharer_bytes_per_token_and_layer']:,}",
        "sharer, bytes per token that a fuser reads": lambda p: f"{p['sharer_bytes_per_token']:,}",
        "receiver, bytes per token": lambda p: f"{p['receiver_bytes_per_token']:,}",
        f"sharer prefill of {tokens} tokens": lambda p: f"{p['gflop']['sharer_prefill']:,} GFLOP",
        f"receiver prefill of {tokens} tokens": lambda p: f"{p['gflop']['receiver_prefill']:,} GFLOP",
        f"fusing {tokens} tokens": lambda p: f"{p['gflop']['fuse']:,} GFLOP",
    }
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(map(show, found)) + " |" for name, show in rows.items())])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fusers", nargs="+", help="folders of fusers")
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
