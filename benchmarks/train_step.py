"""What a training step costs: seconds per optimizer step and peak memory.

Shapes of SmolLM2-135M <- Qwen2.5-0.5B with random weights, so that nothing has to be downloaded; 200 prompt tokens, 32
response tokens, one example per step, one thread. A step is what ``c2c train`` does: loss, backward, clipping, AdamW
(fused, as the Trainer has it). ``warm`` finds the caches of the prompt in the store, ``cold`` computes both prefills
within the step; ``_bf16`` has ``precision: bfloat16``, which needs a CPU with such instructions to be quicker. Each
fuser and precision runs in a process of its own, as a training run does, so that each has its own peak; there, warm and
cold steps alternate and medians are taken over rounds. Where other work runs beside it, read the CPU seconds.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --rounds 5 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from c2c import C2CModel
from c2c.alignment import Alignment
from c2c.data.formats import Row
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from c2c.training.config import Precision
from c2c.training.examples import Example
from c2c.training.prefill_store import PrefillStore
from c2c.training.shared_context import SharedContextObjective
from prefill import RECEIVER, SHARER

KINDS: dict[str, dict[str, Any]] = {"warm": {}, "cold": {"budget": 0}}
FUSERS: dict[str, dict[str, Any]] = {"default": {}, "published": {"fuser": "c2c", "layer_map": "terminal"}}
PRECISIONS: dict[str, Precision] = {"": "float32", "_bf16": "bfloat16"}
RUNS = {f"{fuser}{suffix}": (fuser, suffix) for fuser in FUSERS for suffix in PRECISIONS}

# The published code (thu-nics/C2C at commit d03cc7b) with these shapes, both prefills within the step and autograd's
# anomaly mode off: timed once on 2 vCPU with one thread, not in alternation with ours.
REFERENCE_SECONDS = 11.4
REFERENCE_RSS_GB = 10.3


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    result = summary({name: _in_process_of_its_own(name, arguments) for name in RUNS}, arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)


def measure(
    name: str, arguments: argparse.Namespace, receiver: LlamaConfig = RECEIVER, sharer: Qwen2Config = SHARER
) -> dict[str, Any]:
    """Medians of every kind of step of one fuser in one precision, and the peak memory of this process."""
    fuser, suffix = RUNS[name]
    torch.set_num_threads(1)
    model = _model(fuser, receiver, sharer, arguments.seed)
    model.fusers[0].train()
    optimizer = torch.optim.AdamW(model.fusers[0].parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    example = _example(arguments, min(receiver.vocab_size, sharer.vocab_size))
    steps = {
        kind: _step(_training(model, PRECISIONS[suffix], **store), example, optimizer) for kind, store in KINDS.items()
    }
    seconds, cpu_seconds = _medians(steps, arguments.rounds)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_gb": _peak_rss_gb(),
        "parameters": sum(p.numel() for p in model.fusers[0].parameters()),
    }


def summary(parts: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """One object for all fusers and precisions, with ratios to the published code: above 1 is better than it."""
    seconds = {f"{name}_{kind}": value for name, part in parts.items() for kind, value in part["seconds"].items()}
    peak = max(part["peak_rss_gb"] for part in parts.values())
    return {
        **{f"seconds_{name}": value for name, value in seconds.items()},
        **{
            f"cpu_seconds_{name}_{kind}": value
            for name, part in parts.items()
            for kind, value in part["cpu_seconds"].items()
        },
        "peak_rss_gb": peak,
        "ratios": {
            **{f"speedup_{name}": round(REFERENCE_SECONDS / value, 2) for name, value in seconds.items()},
            "peak_rss": round(REFERENCE_RSS_GB / peak, 2),
        },
        "reference": {"seconds": REFERENCE_SECONDS, "peak_rss_gb": REFERENCE_RSS_GB},
        "runs": parts,
        "prompt_tokens": arguments.tokens,
        "response_tokens": arguments.response,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "bfloat16_instructions": _bfloat16_instructions(),
        "load_average": round(os.getloadavg()[0], 1),  # above 1: other work ran beside
    }


def _in_process_of_its_own(fuser: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", fuser]
    for name in ("tokens", "response", "rounds", "seed"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    part: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return part


def _step(training: SharedContextObjective, example: Example, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    def run() -> float:
        loss = training([example])["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return run


def _medians(steps: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Wall and CPU seconds of every step, after one warm-up; the order is reversed in every second round."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(-1, rounds):
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            began = time.perf_counter(), time.process_time()
            steps[name]()
            if turn >= 0:
                samples[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = (
        {name: round(statistics.median(sample[clock] for sample in taken), 4) for name, taken in samples.items()}
        for clock in (0, 1)
    )
    return wall, cpu


def _model(fuser: str, receiver: LlamaConfig, sharer: Qwen2Config, seed: int) -> C2CModel:
    torch.manual_seed(seed)
    return C2CModel.from_models(
        Receiver(LlamaForCausalLM(receiver), name="receiver"),
        Sharer(Qwen2ForCausalLM(sharer), name="sharer"),
        **FUSERS[fuser],
    )


def _training(model: C2CModel, precision: Precision = "float32", **store: Any) -> SharedContextObjective:
    """The step with stores in memory, as ``c2c train`` makes them."""
    fuser: Any = model.fusers[0].config
    training = SharedContextObjective(
        model,
        PrefillStore(model.receiver, range(model.receiver.geometry.layers), **store),
        PrefillStore(model.sharers[0], fuser.source_layers, **store),
    )
    training.precision = precision
    return training


def _example(arguments: argparse.Namespace, vocab_size: int) -> Example:
    """Random tokens, both models reading the same; every token but the last is fused."""
    generator = torch.Generator().manual_seed(arguments.seed)
    prompt, response = (
        torch.randint(10, vocab_size, (count,), generator=generator).tolist()
        for count in (arguments.tokens, arguments.response)
    )
    return Example(
        row=Row("0", [], "", ""),
        receiver_ids=prompt,
        prefix=len(prompt) - 1,
        sharer_ids=prompt[:-1],
        alignment=Alignment.from_pairs([(0, column, column) for column in range(len(prompt) - 1)]),
        response_ids=response,
        weights=[1 / len(response)] * len(response),
        decisive=0,
        choice_ids=[],
        message_ids=[],
    )


def _bfloat16_instructions() -> list[str] | None:
    """Those of the CPU, None where that can't be read."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    return sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _peak_rss_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def _show(result: dict[str, Any]) -> None:
    table = Table("", "seconds", "CPU seconds", "published code", "times faster", "peak GB")
    for name, part in result["runs"].items():
        for kind, seconds in part["seconds"].items():
            table.add_row(
                f"{name}, {kind}",
                f"{seconds:.3f}",
                f"{part['cpu_seconds'][kind]:.3f}",
                f"{REFERENCE_SECONDS}",
                f"{REFERENCE_SECONDS / seconds:.1f}",
                f"{part['peak_rss_gb']} ({REFERENCE_RSS_GB})",
            )
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="prompt tokens")
    parser.add_argument("--response", type=int, default=32, help="response tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
