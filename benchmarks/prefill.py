"""What fusion costs: prefill and decode, as ratios within one run.

Shapes of SmolLM2-135M <- Qwen2.5-0.5B with random weights, so that nothing has to be downloaded. Every round times all
parts one after the other, and medians are taken over rounds, so that a busy neighbour slows numerator and denominator
alike.

    python benchmarks/prefill.py                 # one thread and two
    python benchmarks/prefill.py --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from c2c import C2CModel, kv_cache
from c2c.alignment.base import Alignment, Chunk, Prompt
from c2c.fusers import Entries
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch, natural_positions

RECEIVER = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
SHARER = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    pair = _models(arguments.seed)
    runs = {str(threads): measure(pair, threads, arguments) for threads in arguments.threads}
    first = runs[str(arguments.threads[0])]
    result = {
        "fused_over_prefills_default": first["ratios"]["fused_over_prefills_default"],
        "fused_over_parts_published": first["ratios"]["fused_over_parts_published"],
        "decode_over_plain": first["ratios"]["decode_over_plain"],
        "threads": runs,
        "parameters": first["parameters"],
        "prompt_tokens": arguments.tokens,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads last",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(runs)


def measure(pair: tuple[Receiver, Sharer], threads: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Medians and ratios at one thread count."""
    torch.set_num_threads(threads)
    receiver, sharer = pair
    tokens = _tokens(arguments.tokens, arguments.seed)
    models = {
        "default": C2CModel.from_models(receiver, sharer),
        "published": C2CModel.from_models(receiver, sharer, fuser="c2c", layer_map="terminal"),
    }
    _open_gates(models["published"])
    parts = _parts(models, receiver, sharer, tokens)
    times = _interleaved(parts, arguments.rounds)
    prefills = times["receiver_prefill"] + times["sharer_prefill"]
    decode = _decode(models["default"], receiver, tokens, arguments)
    return {
        "parameters": {name: sum(p.numel() for p in model.fusers.parameters()) for name, model in models.items()},
        "seconds": {name: round(value, 4) for name, value in (times | decode["seconds"]).items()},
        "ratios": {
            "fused_over_prefills_default": round(times["fused_default"] / prefills, 4),
            "fused_over_parts_published": round(times["fused_published"] / (prefills + times["fuser_published"]), 4),
            "decode_over_plain": round(decode["ratio"], 4),
        },
    }


def _parts(
    models: dict[str, C2CModel], receiver: Receiver, sharer: Sharer, tokens: TokenBatch
) -> dict[str, Callable[[], object]]:
    stop = tokens.length - 1
    chunk = Chunk(stop, (Alignment.from_block(1, 0, stop),))
    prompt = Prompt(tokens, (tokens,), (chunk,))
    parts: dict[str, Callable[[], object]] = {
        "receiver_prefill": lambda: receiver.next_logits(tokens, receiver.prefill(tokens, stop)),
        "sharer_prefill": lambda: sharer.prefill(tokens, stop),
    }
    for name, model in models.items():
        parts[f"fuser_{name}"] = _fuser_alone(model, receiver, sharer, tokens, stop)
        parts[f"fused_{name}"] = _fused(model, prompt)
    return parts


def _fused(model: C2CModel, prompt: Prompt) -> Callable[[], object]:
    """Both prefills, the fusion, and the last token on the fused cache."""

    def run() -> object:
        with torch.no_grad():
            fused = model.fuse_prompts([prompt])
            return model.receiver.next_logits(fused.tokens, fused.cache)

    return run


def _fuser_alone(
    model: C2CModel, receiver: Receiver, sharer: Sharer, tokens: TokenBatch, stop: int
) -> Callable[[], object]:
    """The fuser's arithmetic on entries that are there already."""
    fuser, positions = model.fusers[0], tokens.positions[:, :stop]
    sides = []
    for side, layers in ((sharer, fuser.config.source_layers), (receiver, fuser.config.fused_layers)):
        entries = kv_cache.layers(side.prefill(tokens, stop))
        tables = side.rotary(positions)
        sides.append(
            Entries([entries[i][0] for i in layers], [entries[i][1] for i in layers], [tables[i] for i in layers])
        )

    def run() -> object:
        with torch.no_grad():
            return fuser(*sides)

    return run


def _decode(model: C2CModel, receiver: Receiver, tokens: TokenBatch, arguments: argparse.Namespace) -> dict:
    """Seconds per new token: plain ``generate`` without c2c, against decoding from a fused cache."""
    ids, few, many = tokens.ids, 1, 1 + arguments.new_tokens
    fuse_mask = torch.ones_like(ids, dtype=torch.bool)
    fuse_mask[:, -1] = False

    def plain(count: int) -> Callable[[], object]:
        return lambda: receiver.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    def fused(count: int) -> Callable[[], object]:
        return lambda: model.generate_ids(
            ids, ids, fuse_mask=fuse_mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    jobs = {"plain_few": plain(few), "fused_few": fused(few), "plain_many": plain(many), "fused_many": fused(many)}
    samples = _samples(jobs, arguments.rounds)
    per_token = {
        name: [
            (b - a) / arguments.new_tokens for a, b in zip(samples[f"{name}_few"], samples[f"{name}_many"], strict=True)
        ]
        for name in ("plain", "fused")
    }
    seconds = {f"decode_{name}_per_token": statistics.median(values) for name, values in per_token.items()}
    ratios = [a / b for a, b in zip(per_token["fused"], per_token["plain"], strict=True)]
    return {"seconds": seconds, "ratio": statistics.median(ratios)}


def _interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in _samples(jobs, rounds).items()}


def _samples(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round, after one warm-up; the order is reversed in every second round."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(-1, rounds):
        for name in list(jobs) if turn % 2 else reversed(list(jobs)):
            began = time.perf_counter()
            jobs[name]()
            if turn >= 0:
                samples[name].append(time.perf_counter() - began)
    return samples


def _models(seed: int) -> tuple[Receiver, Sharer]:
    torch.manual_seed(seed)
    return Receiver(LlamaForCausalLM(RECEIVER), name="SmolLM2-135M shape"), Sharer(
        Qwen2ForCausalLM(SHARER), name="Qwen2.5-0.5B shape"
    )


def _open_gates(model: C2CModel) -> None:
    for projector in model.fusers[0].layers:
        for kind in ("key", "value"):
            torch.nn.init.ones_(projector.get_parameter(f"{kind}_gate_logit"))


def _tokens(count: int, seed: int) -> TokenBatch:
    ids = torch.randint(10, 49000, (1, count), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids, mask, natural_positions(mask), padded=False)


def _show(runs: dict[str, dict]) -> None:
    table = Table("", *(f"{threads} thread(s)" for threads in runs))
    for section in ("seconds", "ratios"):
        for name in next(iter(runs.values()))[section]:
            table.add_row(name, *(f"{run[section][name]:.4f}" for run in runs.values()))
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=200, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded tokens per timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
