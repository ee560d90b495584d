"""Systems made of other systems' answers, with a rule that was fitted on dev: a router, and abstention.

Neither looks at the right answers of the items that it is reported on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from c2c.data.formats import Row
from c2c.evaluation.journal import Record
from c2c.language_model import LanguageModel

Values = NDArray[np.float64]
# System to its records, the same items in the same order.
Answered = Mapping[str, Sequence[Record]]
_RIDGES = 10.0 ** np.arange(-2, 6)


@dataclass(frozen=True)
class Derived:
    """A derived system's answers.

    Attributes:
        records: one per item, as of other systems; ``used`` says whose answer was taken.
        facts: the rule and what it did, for the result.
    """

    records: list[Record]
    facts: dict[str, Any]


# -- routing ---------------------------------------------------------------------------------------------------------


def route(
    model: LanguageModel, dev: Answered, dev_rows: Sequence[Row], items: Answered, rows: Sequence[Row], share: float
) -> Derived:
    """Send each question to the sharer or the receiver, by its words alone, before either has run.

    A ridge regression on the mean input embedding of the question predicts by how much the sharer is better (its
    strength is chosen by leave-one-out error on dev); ``share`` of the questions, those with the highest prediction, go
    to the sharer. Which these are is told by the predictions of all questions asked, and by no answer: a threshold from
    dev would send another share of them, since what was fitted lies further apart than what is predicted. An open
    stand-in for learned routers such as RouteLLM (Ong et al., 2024), which the published evaluation uses at an even
    split.

    Args:
        model: whose embeddings and tokenizer are used: the receiver.
        dev: answers of ``receiver`` and ``sharer`` on the dev items.
        dev_rows: the dev items.
        items: their answers on the items in question.
        rows: the items in question.
        share: of the questions that may go to the sharer.
    """
    better = _right(dev["sharer"]) - _right(dev["receiver"])
    known, asked = _embed(model, dev_rows), _embed(model, rows)
    middle, spread = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - middle) / spread, (asked - middle) / spread
    ridge = min(_RIDGES, key=lambda strength: _left_out_error(known, better, strength))
    weights = _solve(known, better - better.mean(), ridge)
    predicted = asked @ weights
    threshold = float(np.quantile(predicted, 1 - share)) if share > 0 else np.inf
    chosen = [("sharer" if use else "receiver") for use in predicted >= threshold]
    sent = chosen.count("sharer") / max(1, len(chosen))
    return Derived(_taken(items, chosen), {"share_asked": share, "share_routed": round(sent, 4), "ridge": float(ridge)})


@torch.no_grad()
def _embed(model: LanguageModel, rows: Sequence[Row]) -> Values:
    """Mean input embedding of each question, ``[items, hidden]``."""
    table = model.model.get_input_embeddings().weight
    means = []
    for row in rows:
        ids = model.tokenizer.encode(row.messages[-1]["content"], add_special_tokens=False)
        means.append(table[torch.tensor(ids, device=table.device)].float().mean(0).cpu())
    return torch.stack(means).double().numpy()


def _solve(x: Values, y: Values, ridge: float) -> Values:
    """Ridge weights; in the dual, since there are fewer items than dimensions."""
    weights: Values = x.T @ np.linalg.inv(x @ x.T + ridge * np.eye(len(x))) @ y
    return weights


def _left_out_error(x: Values, y: Values, ridge: float) -> float:
    """Squared error when each item is predicted from the others, in closed form."""
    kernel = x @ x.T
    hat = kernel @ np.linalg.inv(kernel + ridge * np.eye(len(x)))
    centred = y - y.mean()
    return float((((centred - hat @ centred) / (1 - np.diag(hat) + 1e-9)) ** 2).mean())


# -- abstention ------------------------------------------------------------------------------------------------------


def abstain(dev: Answered, items: Answered) -> Derived:
    """Use the fused cache only where it is surer of its answer than the receiver alone, by a margin chosen on dev.

    Sure is the log-probability of the best option among the options.

    Args:
        dev: answers of ``receiver`` and ``matched`` on dev items, with their scores.
        items: their answers on the items in question.

    Returns:
        The answers; the facts hold the margin and the whole curve over the items: for each margin the share of items
        answered from the fused cache, the accuracy, and the share of right answers of the receiver that were spoiled.
    """
    margin = _best_margin(dev)
    surer = _surer(items)
    use = surer >= margin
    facts = {
        "margin": round(margin, 4) if np.isfinite(margin) else None,
        "share_fused": round(float(use.mean()), 4),
        "curve": _curve(items, surer),
    }
    return Derived(_taken(items, ["matched" if fused else "receiver" for fused in use]), facts)


def _best_margin(dev: Answered) -> float:
    """The margin with the highest accuracy on dev; of equal ones the lowest, which abstains least."""
    surer, fused, alone = _surer(dev), _right(dev["matched"]), _right(dev["receiver"])
    margins = [-np.inf, *np.unique(surer), np.inf]
    return float(max(margins, key=lambda margin: (np.where(surer >= margin, fused, alone).mean(), -margin)))


def _curve(items: Answered, surer: Values, points: int = 20) -> list[dict[str, float]]:
    fused, alone = _right(items["matched"]), _right(items["receiver"])
    order = np.argsort(-surer, kind="stable")
    curve = []
    for count in np.unique(np.linspace(0, len(surer), points + 1).round().astype(int)):
        use = np.zeros(len(surer), dtype=bool)
        use[order[:count]] = True
        right = np.where(use, fused, alone)
        numbers = {
            "share_fused": use.mean(),
            "accuracy": 100 * right.mean(),
            "spoiled": 100 * (alone * (1 - right)).mean(),
        }
        curve.append({name: round(float(value), 3) for name, value in numbers.items()})
    return curve


def _surer(items: Answered) -> Values:
    """How much surer matched is than the receiver, in nats."""
    best = {name: np.array([max(record["scores"]) for record in items[name]]) for name in ("matched", "receiver")}
    difference: Values = best["matched"] - best["receiver"]
    return difference


def _right(records: Sequence[Record]) -> Values:
    return np.array([float(record["chosen"] == record["answer"]) for record in records])


def _taken(items: Answered, chosen: Sequence[str]) -> list[Record]:
    """The records of the chosen system, item by item."""
    return [dict(items[name][index]) | {"used": name} for index, name in enumerate(chosen)]
