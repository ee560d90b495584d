"""What a slow link costs a remote sharer, and what sending layers while the next ones are computed saves.

The shape of Qwen2.5-0.5B with random weights. Client and server run in one process and share its threads; a proxy
between them limits the rate. Every round times all cases one after the other; medians over rounds.

    python benchmarks/remote.py
    python benchmarks/remote.py --rates 10 --tokens 200 --rounds 5 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import threading
import time
from typing import Any

import httpx
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from c2c.remote import RemoteSharer
from c2c.remote import server as server_module
from c2c.remote.config import ShareConfig
from c2c.remote.server import PrefillJob, PrefillWorker, build_app
from c2c.serving.http_server import Server, listen, url_of
from c2c.sharer import Sharer
from c2c.tokens import left_pad

SHARER = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


class Link:
    """A TCP proxy that passes answers at so many bytes per second."""

    def __init__(self, port: int) -> None:
        self.rate = 1e9
        self._port, self._socket = port, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._socket.accept()
            server = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        free = time.monotonic()  # when the link has carried what was given to it so far
        try:
            while piece := source.recv(1 << 14):
                if limited:
                    free = max(free, time.monotonic()) + len(piece) / self.rate
                    time.sleep(max(0.0, free - time.monotonic()))
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # one side has gone


class LateJob(PrefillJob):
    """The same job where nothing is sent before the whole prefill is done."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = False


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    with torch.no_grad():
        sharer = Sharer(Qwen2ForCausalLM(SHARER), None, "random")
    config = ShareConfig(port=0, rate=0, timeout=600)
    server, sock = Server(build_app(PrefillWorker(sharer, config), config), config), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while True:
        try:
            httpx.get(url_of(sock, config) + "/health")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    try:
        result = measure(sharer, Link(sock.getsockname()[1]), arguments)
    finally:
        server.should_exit = True
        thread.join()
    print(json.dumps(result) if arguments.json else _table(result))


def measure(sharer: Sharer, link: Link, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a prefill here, and of one from afar per rate, precision and way of sending."""
    batch = left_pad([torch.randint(0, 32000, (arguments.tokens,)).tolist()], 0)
    clients = {name: RemoteSharer(link.url, precision=name, timeout=600) for name in arguments.precisions}
    times: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    sharer.prefill(batch)
    for _ in range(arguments.rounds):
        times.setdefault("here", []).append(_seconds(lambda: sharer.prefill(batch)))
        for rate in arguments.rates:
            for name, client in clients.items():
                for way, work in (("late", LateJob), ("overlapped", PrefillJob)):
                    setattr(server_module, "PrefillJob", work)  # noqa: B010  (mypy)
                    link.rate = rate * 1e6 / 8
                    before = client.traffic.received
                    case = f"{rate:g} Mbit/s {name} {way}"
                    times.setdefault(case, []).append(_seconds(lambda client=client: client.prefill(batch)))
                    sizes[name] = client.traffic.received - before
    return {
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "bytes": sizes,
        "seconds": {case: round(statistics.median(found), 3) for case, found in times.items()},
        "all": {case: [round(second, 3) for second in found] for case, found in times.items()},
    }


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['tokens']} tokens, {result['rounds']} rounds, {result['threads']} thread(s); medians in seconds"]
    lines += [f"{name:10} {size / 1e6:8.2f} MB" for name, size in result["bytes"].items()]
    lines += [f"{case:36} {seconds:8.3f}" for case, seconds in result["seconds"].items()]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 100.0], help="Mbit/s")
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
