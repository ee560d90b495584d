"""Two hosts with a slow link between them: cache-to-cache against text-to-text, time and bytes on the wire.

The hosts are network namespaces of this machine, so it takes Linux and root. Each end of the link sends at most so many
Mbit/s (tc tbf); where the kernel has no netem, a relay at the receiver's end holds every piece for the delay. First the
sharer's host runs `c2c share`, then, for text, `c2c serve`. Bytes are counted by the receiver's network interface.

    sudo python benchmarks/two_hosts.py --data questions.jsonl
    sudo python benchmarks/two_hosts.py --data questions.jsonl --rate 20 --delay 40 --limit 20 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHARER_HOST, RECEIVER_HOST = "c2c-sharer", "c2c-receiver"
ADDRESS = "10.77.0.1"
PORT = 8650
FUSER = str(Path(__file__).parent.parent / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b")
PRECISIONS = ("float32", "bfloat16", "int8")
MESSAGE_TOKENS = 128
KEY = "key-of-this-benchmark"  # servers that others can reach want one; both sides read it from the environment


def main() -> None:
    """Run as the parent, or as the receiver's host."""
    arguments = _arguments()
    os.environ |= {"C2C_TOKEN": KEY, "C2C_API_KEY": KEY}
    if arguments.client:
        _client(arguments)
        return
    found: dict[str, Any] = {}
    with hosts(arguments.rate, arguments.delay) as netem:
        link = ["--held", str(0 if netem else arguments.delay)]
        with served("share", _sharer(arguments.fuser), "--rate", "0"):
            found |= _ask(arguments, "cache", link)
        with served("serve", arguments.fuser, "--name", "pair"):
            found |= _ask(arguments, "text", link)
    result = {
        "rate_mbit": arguments.rate,
        "delay_ms": arguments.delay,
        "netem": netem,
        "questions": arguments.limit,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "machine": platform.processor() or platform.machine(),
        "ways": found,
    }
    print(json.dumps(result) if arguments.json else _table(result))


# -- the link --------------------------------------------------------------------------------------------------------


@contextmanager
def hosts(rate: float, delay: float) -> Iterator[bool]:
    """Two namespaces joined by a slow link; yields whether the kernel itself delays."""
    _remove()
    try:
        for host in (SHARER_HOST, RECEIVER_HOST):
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "set", "lo", "up")
        _run(
            "ip",
            "link",
            "add",
            "c2c0",
            "netns",
            SHARER_HOST,
            "type",
            "veth",
            "peer",
            "name",
            "c2c1",
            "netns",
            RECEIVER_HOST,
        )
        netem = True
        for index, host in enumerate((SHARER_HOST, RECEIVER_HOST)):
            device = f"c2c{index}"
            _run("ip", "-n", host, "addr", "add", f"10.77.0.{index + 1}/24", "dev", device)
            _run("ip", "-n", host, "link", "set", device, "up")
            netem = _slow(host, device, rate, delay) and netem
        yield netem
    finally:
        _remove()


def _slow(host: str, device: str, rate: float, delay: float) -> bool:
    """Limit what a device sends; False where only the rate could be limited."""
    limit = ["rate", f"{rate:g}mbit"]
    whole = ["tc", "-n", host, "qdisc", "add", "dev", device, "root"]
    if subprocess.run([*whole, "netem", "delay", f"{delay / 2:g}ms", *limit], capture_output=True).returncode == 0:
        return True
    _run(*whole, "tbf", *limit, "burst", "64kb", "latency", "400ms")
    return False


def _remove() -> None:
    for host in (SHARER_HOST, RECEIVER_HOST):
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}\nNetwork namespaces take Linux, iproute2 and root.")


@contextmanager
def served(command: str, what: str, *options: str) -> Iterator[None]:
    """`c2c share` or `c2c serve` on the sharer's host, until it answers."""
    call = ["ip", "netns", "exec", SHARER_HOST, sys.executable, "-m", "c2c", command, what]
    server = subprocess.Popen(
        [*call, "--host", ADDRESS, "--port", str(PORT), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    threading.Thread(target=lambda: [None for _ in server.stderr or ()], daemon=True).start()
    try:
        probe = ["ip", "netns", "exec", SHARER_HOST, sys.executable, "-c", _PROBE]
        while subprocess.run(probe, capture_output=True).returncode != 0:
            if server.poll() is not None:
                sys.exit(f"c2c {command} ended with {server.returncode}")
            time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait()


_PROBE = f"import urllib.request; urllib.request.urlopen('http://{ADDRESS}:{PORT}/health', timeout=5)"


class Relay:
    """Passes bytes on after a while, in both directions, for kernels that can't delay.

    Args:
        delay: round trip, ms; half of it is spent each way.
    """

    def __init__(self, delay: float) -> None:
        self._seconds, self._socket = delay / 2000, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._socket.accept()
            time.sleep(2 * self._seconds)  # the handshake's round trip
            far = socket.create_connection((ADDRESS, PORT))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        pieces: list[tuple[float, bytes]] = []
        ready = threading.Condition()

        def send() -> None:
            while True:
                with ready:
                    ready.wait_for(lambda: bool(pieces))
                    due, piece = pieces.pop(0)
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    target.sendall(piece) if piece else target.shutdown(socket.SHUT_WR)
                except OSError:
                    return  # one side has gone
                if not piece:
                    return

        threading.Thread(target=send, daemon=True).start()
        while True:
            try:
                piece = source.recv(1 << 14)
            except OSError:
                piece = b""
            with ready:
                pieces.append((time.monotonic() + self._seconds, piece))
                ready.notify()
            if not piece:
                return


# -- the receiver's host ---------------------------------------------------------------------------------------------


def _ask(arguments: argparse.Namespace, way: str, link: list[str]) -> dict[str, Any]:
    call = ["ip", "netns", "exec", RECEIVER_HOST, sys.executable, __file__, "--client", way, *link]
    call += ["--data", arguments.data, "--fuser", arguments.fuser, "--limit", str(arguments.limit)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _client(arguments: argparse.Namespace) -> None:
    held = float(arguments.held)
    url = Relay(held).url if held else f"http://{ADDRESS}:{PORT}"
    print(json.dumps((_text if arguments.client == "text" else _cache)(arguments, url)))


def _cache(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    from c2c import C2CModel
    from c2c.prompting import RenderOptions
    from c2c.remote import RemoteSharer

    found: dict[str, Any] = {}
    receiver: Any = None
    for precision in PRECISIONS:
        sharer = RemoteSharer(url, precision=precision)
        model = C2CModel.from_pretrained(arguments.fuser, receiver=receiver, sharer=sharer)
        receiver = model.receiver

        def answer(row: Any, model: Any = model) -> str:
            options = RenderOptions(answer_prefix=row.answer_prefix)
            return str(model.generate(row.messages, options=options, max_new_tokens=2, do_sample=False).text)

        found[f"cache-to-cache, {precision}"] = _measure(arguments, answer)
    return found


def _text(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    import httpx

    from c2c.fusers.base import load_fuser
    from c2c.language_model import Receiver
    from c2c.prompting import RenderOptions
    from c2c.systems.text_to_text import TextToText

    recorded = load_fuser(arguments.fuser).config.identity("receiver")
    assert recorded is not None
    receiver = Receiver.from_pretrained(recorded.name)
    client = httpx.Client(base_url=url, timeout=600, headers={"Authorization": f"Bearer {KEY}"})

    def answer(row: Any) -> str:
        content = TextToText.request.format(question=row.messages[-1]["content"])
        request = [*row.messages[:-1], {"role": "user", "content": content}]
        asked = {"messages": request, "max_tokens": MESSAGE_TOKENS, "temperature": 0}
        reply = client.post("/v1/chat/completions", json={"model": "pair/sharer"} | asked).raise_for_status().json()
        written = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
        options = RenderOptions(answer_prefix=row.answer_prefix)
        return str(
            receiver.answer(
                [*request, written, row.messages[-1]], options=options, max_new_tokens=2, do_sample=False
            ).text
        )

    return {"text-to-text": _measure(arguments, answer)}


def _measure(arguments: argparse.Namespace, answer: Callable[[Any], str]) -> dict[str, Any]:
    """Medians per question, after one question to warm up."""
    from c2c.data.config import DataSource
    from c2c.data.sources import load_rows

    rows = load_rows([DataSource(arguments.data, limit=arguments.limit + 1)], Path(), 0)[0]
    answer(rows[0])
    seconds, received, right = [], [], 0
    for row in rows[1:]:
        before, began = _received(), time.perf_counter()
        text = answer(row)
        seconds.append(time.perf_counter() - began)
        received.append(_received() - before)
        letter = re.search(r"[A-Z]", text)
        right += letter is not None and ord(letter.group()) - ord("A") == row.answer
    return {
        "seconds": round(statistics.median(seconds), 3),
        "kilobytes": round(statistics.median(received) / 1000, 1),
        "right": right,
        "all_seconds": [round(second, 3) for second in seconds],
    }


def _received() -> int:
    return int(Path("/sys/class/net/c2c1/statistics/rx_bytes").read_text())


def _sharer(fuser: str) -> str:
    from c2c.fusers.base import load_fuser

    recorded = load_fuser(fuser).config.identity("sharer")
    assert recorded is not None
    return str(recorded.name)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['rate_mbit']:g} Mbit/s, {result['delay_ms']:g} ms round trip, {result['questions']} questions"]
    for way, found in result["ways"].items():
        lines.append(f"{way:26} {found['seconds']:8.2f} s {found['kilobytes']:10.1f} kB {found['right']:4} right")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="multiple-choice questions, JSON lines")
    parser.add_argument("--fuser", default=FUSER, help="of shared context")
    parser.add_argument("--limit", type=int, default=10, help="questions")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s each way")
    parser.add_argument("--delay", type=float, default=20.0, help="round trip in ms")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--client", choices=("cache", "text"), help=argparse.SUPPRESS)
    parser.add_argument("--held", default="0", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
