"""Tables of peers.py: from the records of a journal to the result, and to a page in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

from c2c.evaluation.statistics import mcnemar

OURS, TEXT, ALONE = "c2c", "text", "receiver"
TOGETHER = "c2c, in one"  # all documents read as one text, as avp reads them
AVP = {"avp, 20 steps": (20, False), "avp, 0 steps": (0, False), "avp, one by one": (20, True)}  # steps, chained
Record = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return for each pair, kind and number of documents the systems' results, and where c2c is behind avp.

    The kind ``all`` has the rows of all kinds together.
    """
    blocks: dict[tuple[str, str, int], dict[str, dict[Any, Record]]] = {}
    for kind in (None, "all"):
        for record in sorted(records, key=lambda record: record["row"]):
            place = (record["pair"], kind or record["kind"], record["documents"])
            row = (record["kind"], record["row"])
            blocks.setdefault(place, {}).setdefault(record["system"], {})[row] = record
    pairs = list(dict.fromkeys(record["pair"] for record in records))
    return [
        {
            "pair": pair,
            "kind": kind,
            "documents": count,
            "systems": {name: _system(list(part.values())) for name, part in systems.items()},
            "behind": behind(systems),
        }
        for (pair, kind, count), systems in sorted(blocks.items(), key=lambda block: pairs.index(block[0][0]))
    ]


def _system(records: Sequence[Record]) -> dict[str, Any]:
    answered = [record for record in records if "error" not in record]
    right = sum(int(record["right"]) for record in records)
    share = binomtest(right, len(records)).proportion_ci(method="wilson")
    result: dict[str, Any] = {
        "n": len(records),
        "right": round(100 * right / len(records), 1),
        "right_ci95": [round(100 * share.low, 1), round(100 * share.high, 1)],
        "errors": len(records) - len(answered),
        "empty": sum(not record["text"].strip() for record in answered),
    }
    for name in ("read", "first", "total", "bytes"):
        values = [record[name] for record in answered]
        result[name] = round(median(values), 4) if values else None
        result[f"{name}_ci95"] = interval(values)
    methods = {record["method"] for record in records if "method" in record}
    return result | ({"method": "/".join(sorted(methods))} if methods else {})


def interval(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of a median, by a bootstrap over rows; None without any."""
    if len(set(values)) < 2:  # which the bootstrap refuses
        return [round(values[0], 4)] * 2 if values else None
    draw = bootstrap((np.asarray(values),), np.median, n_resamples=2000, method="percentile", rng=0)
    return [round(float(draw.confidence_interval.low), 4), round(float(draw.confidence_interval.high), 4)]


def behind(systems: dict[str, dict[Any, Record]]) -> list[str]:
    """Return in which columns c2c is behind a setting of avp's, over the rows that both have answered."""
    found, mine = [], systems.get(OURS, {})
    for name in AVP:
        theirs = systems.get(name, {})
        rows = [row for row in theirs if row in mine and "error" not in theirs[row]]
        if not rows:
            continue
        here, there = ([part[row] for row in rows] for part in (mine, theirs))
        pairs = [(one["right"], other["right"]) for one, other in zip(here, there, strict=True)]
        only = pairs.count((1, 0)), pairs.count((0, 1))
        if only[0] < only[1]:
            p = mcnemar(*only)
            found.append(f"{name}: right answers {_right(here)} against {_right(there)} of {len(rows)} (p = {p:.2g})")
        for key, unit in (("first", "s to the first token"), ("total", "s in all"), ("bytes", "bytes")):
            one, other = (median(record[key] for record in part) for part in (here, there))
            form = _size if key == "bytes" else "{:.2f}".format
            if other < one:
                found.append(f"{name}: {form(one)} {unit} against {form(other)}")
    return found


def _right(records: Sequence[Record]) -> int:
    return sum(int(record["right"]) for record in records)


HEAD = """<!-- Made by benchmarks/peers.py; change that, not this. -->

# c2c and avp, side by side

A document that only the sharer has read; the receiver is asked about it. Same rows, models, data type, threads and
machine, one row after the other in one run; greedy, {new_tokens} tokens, {dtype}, {threads} thread(s). No fuser was
trained for these pairs. *text*: the receiver reads the document itself. With 4 documents, three are other rows' and do
not answer the question.
"""
REMARKS = """
- avp: `think(document, steps=...)` by the sharer and `generate(question, context=..., do_sample=False)` by the
  receiver, as its README has it; 20 steps are its default and documented setting. Documents are worded as for *text*.
- Nothing of avp was patched. Its `generate` writes question and answer into the context that it is given, so that a
  second question on the same context would see both; each context is used once here.
- *in one*: the sharer reads all documents as one text, so that another choice of them is read anew; *c2c* reads each
  apart.
- *one by one*: avp can't put contexts together that were read apart. `think(..., context=...)` reads a document behind
  those before it; another order or another choice of documents is read anew. c2c reads each document once.
- Across models avp hands over one hidden state. Its projection of the pair is made before, and not counted.
- c2c: `c2c.connect` with its defaults. Seconds to read are those of one reading of each document, also where its
  handoff was taken again. Bytes are of whole handoffs, with the entries of what stands before each document.
- What thinks is slow on a CPU and was asked fewer rows (n in each cell); *behind* compares the rows that both answered.
- Seconds are for comparing within a row of the table: other jobs may have run on the machine.
"""


def page(result: dict[str, Any]) -> str:
    """Return the page of a result, in Markdown."""
    lines = [HEAD.format(**result["settings"])]
    if result["avp"].get("missing"):
        lines.append(f"**avp was not measured**: {result['avp']['missing']}\n")
    blocks = result["blocks"]
    names = [n for n in (ALONE, TEXT, OURS, TOGETHER, *AVP) if any(n in block["systems"] for block in blocks)]
    lines.append("## Right answers\n\nIn percent: the reference stands in the answer; 95 % intervals (Wilson).\n")
    lines += _table(blocks, names, _share)
    lines.append(
        "\n## Seconds to the first token\n\nOnce the document is read; medians with 95 % intervals (bootstrap).\n"
    )
    lines += _table(blocks, names, lambda part: _seconds(part, "first"))
    lines.append("\n## Seconds in all\n\nReading, question and answer; medians.\n")
    lines += _table(blocks, names, lambda part: _seconds(part, "total"))
    lines.append("\n## Bytes handed over\n")
    lines += _table(blocks, names[1:], lambda part: "–" if part["bytes"] is None else _size(part["bytes"]))
    lines.append("\n## Where c2c is behind avp\n")
    found = [f"- {_name(block)}: {'; '.join(block['behind'])}" for block in blocks if block["behind"]]
    lines += found or ["- in none of these rows" if not result["avp"].get("missing") else "- not known: avp is missing"]
    lines.append("\n## How it was measured\n" + REMARKS)
    facts = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    theirs = ", ".join(f"{name} {version}" for name, version in result["avp"].get("versions", {}).items())
    return "\n".join([*lines, f"c2c's side: {facts}. avp's side: {theirs or '–'}. Machine: {result['machine']}.", ""])


def _table(blocks: Sequence[dict[str, Any]], names: Sequence[str], cell: Callable[[Any], str]) -> list[str]:
    rows = [["models", "rows", "documents", *names], ["---", "---", *["--:"] * (1 + len(names))]]
    for block in blocks:
        mine = [cell(block["systems"][name]) if name in block["systems"] else "" for name in names]
        rows.append([_models(block["pair"]), block["kind"], str(block["documents"]), *mine])
    return [f"| {' | '.join(row)} |" for row in rows]


def _models(pair: str) -> str:
    sharer, _, receiver = pair.rpartition(":")
    return f"{receiver} ← {sharer}" if sharer else receiver


def _name(block: dict[str, Any]) -> str:
    return f"{_models(block['pair'])}, {block['kind']}, {block['documents']} document(s)"


def _share(part: dict[str, Any]) -> str:
    low, high = part["right_ci95"]
    return f"{part['right']:.0f} [{low:.0f}, {high:.0f}] n {part['n']}"


def _seconds(part: dict[str, Any], key: str) -> str:
    if part[key] is None:
        return "–"
    low, high = part[f"{key}_ci95"]
    return f"{part[key]:.2f} [{low:.2f}, {high:.2f}]"


def _size(count: float) -> str:
    return f"{count:,.0f}" if count < 10_000 else f"{count / 1e6:.2f} MB"
