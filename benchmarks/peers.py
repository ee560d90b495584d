"""avp and c2c side by side: a document that only the sharer has read, and a question about it for the receiver.

Both answer the same rows with the same models, data type and threads, one row after the other and in changing order,
so that load on the machine hits both alike. avp (a package that hands over caches too) runs in an environment of its
own, which is made on the first run; where that fails, c2c is measured alone, and the table says so. An interrupted run
goes on from its journal.

    c2c pull qwen2.5-coder-0.5b qwen2.5-coder-1.5b smollm2-135m
    python benchmarks/peers.py --data-dir DATA                       # all rows; the table and the result file
    python benchmarks/peers.py --data-dir DATA --limit 3 --models smollm2-135m --journal try.jsonl --json
    python benchmarks/peers.py --data-dir DATA --table-only          # the table of what the journal holds

DATA/squad/grouped_test.jsonl holds ``question``, ``context`` and ``answer`` per line; without --data-dir there are no
SQuAD rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from c2c.connection import connect
from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.sources import load_rows
from c2c.evaluation.metrics import contains
from c2c.hub_aliases import cache_dir, local_path
from c2c.prompting import RenderOptions
from c2c.systems import System, make_system
from c2c.utils import json_line, versions, write_json, write_text
from peers_table import ALONE, AVP, OURS, TEXT, TOGETHER, Record, page, summarise

HERE = Path(__file__).parent
WORKER = HERE / "peers_avp.py"
REQUIREMENTS = ("avp[hf]==0.6.2", "transformers==5.24.0")
DONE = "requirements.txt"  # in avp's environment, once it is complete
MODELS = ("qwen2.5-coder-0.5b", "smollm2-135m", "qwen2.5-coder-1.5b:qwen2.5-coder-0.5b")
KINDS = ("facts", "relay", "halves", "squad")
POOL, CHUNK = 200, 2  # rows that distractors come from; rows per pair before the next pair's turn
Case = tuple[str, str, int, int]  # pair, kind, documents, row


class PeerError(RuntimeError):
    """avp can't be measured here, or a journal is another run's."""


# -- rows ------------------------------------------------------------------------------------------------------------


def load_kinds(limit: int, data_dir: str | None, seed: int) -> dict[str, list[Row]]:
    """Load the rows of each kind, test split, and behind the first ``limit`` those that only lend their documents."""
    found = {}
    for kind in KINDS:
        place: dict[str, Any] = {"synthetic": f"{kind}_test"}
        if kind == "squad":
            if data_dir is None:
                continue
            place = {"path": "squad/grouped_test.jsonl"}
        source = DataSource(**place, kind="private_question", limit=max(POOL, limit))
        found[kind] = load_rows([source], data_dir or ".", seed)[0]
    return found


def documents(rows: Sequence[Row], index: int, count: int) -> list[str]:
    """Return the row's document among ``count - 1`` of other rows that do not answer its question, in its place."""
    row, true = rows[index], passage(rows[index])
    found: list[str] = []
    for other in (*rows[index + 1 :], *rows[:index]):
        text = passage(other)
        if len(found) < count - 1 and text not in (true, *found) and not _answers(text, row):
            found.append(text)
    found.insert(index % count, true)
    return found


def passage(row: Row) -> str:
    """Return the text that the sharer reads."""
    return str(row.sharer_messages[-1]["content"]) if row.sharer_messages else ""


def _answers(text: str, row: Row) -> bool:
    """Whether a text could answer a question: it holds the answer, a name of the question's, or else its words."""
    words = re.findall(r"\w+", row.question)
    names = [word for word in words[1:] if word[0].isupper()] or [word for word in words if len(word) > 3]
    theirs = set(re.findall(r"\w+", text.lower()))
    return bool(contains(text, row.references)) or any(name.lower() in theirs for name in names)


# -- systems ---------------------------------------------------------------------------------------------------------

Answer = Callable[[Row, list[str]], Record]


def ours(receiver: str, sharer: str, options: argparse.Namespace) -> dict[str, Answer]:
    """Return c2c's systems: the best method that ``c2c.connect`` finds, and the receiver by itself.

    A document is read once in a run (among others in another way than alone), and its handoff taken again wherever it
    stands; the seconds of that one reading count for each question.
    """
    connection = connect(receiver, sharer, dtype=options.dtype)
    method = connection.chosen("private")
    copies, handoffs = method is not None and method.fuser is not None, dict[Any, tuple[Any, float]]()
    keeps_tokens = method is not None and method.fuser is not None and method.fuser.keeps_tokens

    def read(text: str, several: bool) -> tuple[Any, float]:
        how = {"among": True} if several and keeps_tokens else {}
        if (text, several) not in handoffs:
            began = time.perf_counter()
            handoff = connection.read(text, **how)
            handoffs[text, several] = handoff, time.perf_counter() - began
        return handoffs[text, several]

    def generate(system: System, row: Row, given: Any = None) -> Record:
        result = system.generate(row.messages, given, max_new_tokens=options.new_tokens, do_sample=False)
        wrote = result.message.seconds_total if result.message else 0.0
        found = {"text": result.text, "read": wrote, "first": result.seconds_to_first_token - wrote}
        texts = [] if given is None else [result.message.text] if result.message else given
        size = sum(len(part.encode()) if isinstance(part, str) else part.nbytes for part in texts)
        named = {"method": result.report.method} if system is connection else {}
        return found | {"total": result.seconds_total, "bytes": size} | named

    def hand_over(row: Row, texts: list[str]) -> Record:
        if not copies:
            return generate(connection, row, texts)
        given, seconds = zip(*(read(text, len(texts) > 1) for text in texts), strict=True)
        found = generate(connection, row, list(given))
        return found | {"read": sum(seconds), "total": found["total"] + sum(seconds)}

    systems = {name: make_system(title, connection.model) for name, title in ((ALONE, "receiver"), (TEXT, "reader"))}
    return {
        ALONE: lambda row, texts: generate(systems[ALONE], row),
        TEXT: lambda row, texts: generate(systems[TEXT], row, texts),
        OURS: hand_over,
        TOGETHER: lambda row, texts: hand_over(row, ["\n\n".join(texts)]),
    }


class Peer:
    """avp in a process of its own, with one pair of models.

    Args:
        python: of its environment.
        receiver: alias of a model.
        sharer: the same.
        dtype: of both.

    Raises:
        PeerError: it does not start.
    """

    def __init__(self, python: Path, receiver: str, sharer: str, dtype: str) -> None:
        pipe, maps = subprocess.PIPE, {"AVP_CACHE_DIR": str(python.parents[1] / "maps")}
        command = [str(python), "-W", "ignore", str(WORKER)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | maps)
        folders = {"sharer": str(local_path(sharer)), "receiver": str(local_path(receiver))}
        self.versions = self.ask(folders | {"dtype": dtype, "threads": torch.get_num_threads()})["versions"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its reply."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            _, errors = self.process.communicate()
            raise PeerError(f"avp's process has ended: {errors[-800:].strip()}")
        return json.loads(line)

    def systems(self, new_tokens: int) -> dict[str, Answer]:
        """Return its ways of answering."""

        def answer(steps: int, chained: bool, row: Row, texts: list[str]) -> Record:
            parts = [[text] for text in texts] if chained else [texts]
            asked = {"question": row.messages[-1]["content"], "new_tokens": new_tokens, "steps": steps}
            return self.ask(asked | {"thoughts": [_thought(part) for part in parts]})

        def system(steps: int, chained: bool) -> Answer:
            return lambda row, texts: answer(steps, chained, row, texts)

        return {name: system(*setting) for name, setting in AVP.items()}

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def _thought(texts: Sequence[str]) -> str:
    """Word documents as a receiver that reads them as text has them."""
    options = RenderOptions()
    return (options.instruction + "".join(options.passage.replace("{passage}", text) for text in texts)).strip()


def environment(folder: Path) -> Path:
    """Make avp's environment, or take the one that is there; return its Python.

    It gets the torch that c2c runs on, so that both compute with the same kernels.

    Raises:
        PeerError: it can't be made.
    """
    python, uv = folder / "bin" / "python", shutil.which("uv")
    wanted = [*REQUIREMENTS, f"torch=={torch.__version__.partition('+')[0]}"]
    done = folder / DONE
    if done.is_file() and done.read_text().split() == wanted:
        return python
    make = (
        [uv, "venv", "-q", "--clear", "--python", sys.executable] if uv else [sys.executable, "-m", "venv", "--clear"]
    )
    install = [uv, "pip", "install", "-q", "--python"] if uv else []
    install = [*install, str(python)] if uv else [str(python), "-m", "pip", "install", "-q"]
    for command in ([*make, str(folder)], [*install, *wanted]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise PeerError(f"{' '.join(wanted)} can't be installed: {ran.stderr.strip()[-400:]}")
    done.write_text("\n".join(wanted))
    return python


# -- run -------------------------------------------------------------------------------------------------------------


class Journal:
    """Records on disk, a line each behind a line with the settings.

    Args:
        path: the file; made where it is not there.
        settings: that the answers depend on.

    Raises:
        PeerError: the file is of a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.records = path, list[Record]()
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # a cut line is dropped
        if lines and json.loads(lines[0]) != settings:
            raise PeerError(
                f"{path} is of a run with {lines[0]}, and this one has {json.dumps(settings)}: give another --journal."
            )
        self.records = [json.loads(line) for line in lines[1:]]
        write_text(path, "".join(line + "\n" for line in (lines or [json.dumps(settings)])))
        self.done = {self._key(record) for record in self.records}

    def add(self, record: Record) -> None:
        """Append a record."""
        self.records.append(record)
        self.done.add(self._key(record))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(record) + "\n")

    @staticmethod
    def _key(record: Record) -> tuple[Any, ...]:
        return (record["pair"], record["kind"], record["documents"], record["row"], record["system"])


def plan(pairs: Sequence[str], kinds: Sequence[str], limit: int) -> Iterator[tuple[str, list[Case]]]:
    """Return what is asked: a few rows of everything with each pair, then the next few, so that a cut run is even."""
    for start in range(0, limit, CHUNK):
        rows = range(start, min(start + CHUNK, limit))
        for pair in pairs:
            yield pair, [(pair, kind, count, row) for row in rows for kind in kinds for count in (1, 4)]


def systems_for(case: Case, names: Sequence[str], thinking_rows: int) -> list[str]:
    """Return which systems answer a case, each first in its turn.

    The receiver alone has the same prompt however many documents there are, and some take several only. What thinks
    is slow, and answers the first rows only.
    """
    _, _, count, row = case

    def answers(name: str) -> bool:
        steps, several = AVP.get(name, (0, name == TOGETHER))
        return (row < thinking_rows or not steps) and not (several and count == 1) and not (name == ALONE and count > 1)

    used = [name for name in names if answers(name)]
    return [*used[row % len(used) :], *used[: row % len(used)]]


def run(arguments: argparse.Namespace, journal: Journal, python: Path | None, console: Console) -> None:
    """Answer all rows that the journal does not hold."""
    rows = load_kinds(arguments.limit, arguments.data_dir, arguments.seed)
    names = [ALONE, TEXT, OURS, TOGETHER, *(AVP if python else ())]
    steps = [
        (pair, [(case, name) for case in cases for name in systems_for(case, names, arguments.thinking_rows)])
        for pair, cases in plan(arguments.models, list(rows), arguments.limit)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("answers", total=sum(len(part) for _, part in steps))
        for pair, part in steps:
            left = [(case, name) for case, name in part if (*case, name) not in journal.done]
            progress.update(bar, description=pair, advance=len(part) - len(left))
            if left:
                for record in _answers_of(pair, left, rows, python, arguments):
                    journal.add(record)
                    progress.advance(bar)


def _answers_of(
    pair: str, left: Sequence[tuple[Case, str]], rows: dict[str, list[Row]], python: Path | None, options: Any
) -> Iterator[Record]:
    sharer, _, receiver = pair.rpartition(":")
    systems = ours(receiver, sharer or receiver, options)
    peer = Peer(python, receiver, sharer or receiver, options.dtype) if python else None
    try:
        systems |= peer.systems(options.new_tokens) if peer else {}
        _warm_up(systems, rows)
        for case, name in left:
            _, kind, count, index = case
            row = rows[kind][index]
            found = systems[name](row, documents(rows[kind], index, count))
            facts = {"pair": pair, "kind": kind, "documents": count, "row": index, "system": name}
            right = contains(found.get("text", ""), row.references)
            yield facts | found | {"reference": row.references[0], "right": right}
    finally:
        if peer:
            peer.close()


def _warm_up(systems: dict[str, Answer], rows: dict[str, list[Row]]) -> None:
    row = next(iter(rows.values()))[-1]
    for answer in systems.values():
        answer(row, ["Nothing of note happened on that day."])


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    console = Console(stderr=True)
    keys = ("dtype", "new_tokens", "seed", "threads")
    settings = {key: getattr(arguments, key) for key in keys}
    avp: dict[str, Any] = {"requirements": list(REQUIREMENTS)}
    try:
        journal = Journal(arguments.journal, settings)
        python, facts = peer_python(arguments)
        avp |= facts
        if "missing" in avp:
            console.print(f"avp is not measured: {avp['missing']}", markup=False)
        if not arguments.table_only:
            run(arguments, journal, python, console)
    except PeerError as error:
        sys.exit(f"peers.py: {error}")
    if any(record["system"] in AVP for record in journal.records):
        avp.pop("missing", None)
    result = {
        "settings": settings,
        "versions": versions(),
        "avp": avp,
        "machine": platform.processor() or platform.machine(),
        "blocks": summarise([record for record in journal.records if record["pair"] in arguments.models]),
    }
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.table:
        write_text(arguments.table, page(result))
    if arguments.json:
        print(json.dumps(result))
    else:
        console.print(Markdown(page(result)))


def peer_python(arguments: argparse.Namespace) -> tuple[Path | None, dict[str, Any]]:
    """Return the Python of avp's environment with its versions, or None and why avp is ``missing``."""
    if arguments.without_avp:
        return None, {"missing": "--without-avp was given"}
    folder = arguments.environment
    if arguments.table_only and not (folder / DONE).is_file():
        return None, {"missing": "no answers of avp's are in the journal"}
    try:
        python = environment(folder)
        return python, {"versions": _installed(python)}
    except (PeerError, OSError) as error:
        return None, {"missing": str(error)}


def _installed(python: Path) -> dict[str, str]:
    names = ("avp", "torch", "transformers")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="aliases; SHARER:RECEIVER for two models (%(default)s)")
    add("--limit", type=int, default=60, help="rows of each kind (%(default)s)")
    add("--data-dir", help="folder with squad/grouped_test.jsonl")
    add("--thinking-rows", type=int, default=60, help="rows on which avp thinks, which is slow on CPUs (%(default)s)")
    add("--dtype", default="bfloat16", help="of all models (%(default)s)")
    add("--new-tokens", type=int, default=24, help="per answer, at most (%(default)s)")
    add("--threads", type=int, default=1, help="of both sides (%(default)s)")
    add("--seed", type=int, default=0, help="of the rows (%(default)s)")
    add("--journal", type=Path, default=Path("runs/peers.jsonl"), help="answers so far (%(default)s)")
    add("--environment", type=Path, default=cache_dir() / "peers" / "avp", help="avp's, made where it is missing")
    add("--without-avp", action="store_true", help="c2c alone")
    add("--table-only", action="store_true", help="answer nothing; the table of what the journal holds")
    add("--output", type=Path, help="also write the result as JSON to this file")
    add("--table", type=Path, help="also write the table in Markdown to this file")
    add("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
