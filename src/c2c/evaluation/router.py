"""Router: each question goes to the receiver or the sharer, by a rule fitted on dev items.

The rule never sees the right answers of the items that it is reported on. An open stand-in for learned routers such as
RouteLLM (Ong et al. 2024, arXiv:2406.18665), which the published evaluation uses at an even split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from c2c.data.formats import Row
from c2c.language_model import LanguageModel

Values = NDArray[np.float64]
_STRENGTHS = 10.0 ** np.arange(-2, 6)


def route(better: Values, dev_features: Values, features: Values, share: float) -> tuple[list[str], dict[str, Any]]:
    """Send each question to the sharer or the receiver.

    A ridge regression on the questions' features predicts by how much the sharer is better; its strength is chosen by
    leave-one-out error on dev. The ``share`` of the questions with the highest prediction goes to the sharer. A
    threshold from dev would send another share, since the fitted values spread more than the predicted ones.

    Args:
        better: ``[dev items]``, score of the sharer - score of the receiver.
        dev_features: ``[dev items, features]``, see :func:`embed`.
        features: ``[items, features]``, of the items in question.
        share: of the questions, for the sharer.

    Returns:
        ``sharer`` or ``receiver`` for each item; and facts about the rule.
    """
    rule = make_pipeline(StandardScaler(), RidgeCV(alphas=_STRENGTHS)).fit(dev_features, better)
    predicted = rule.predict(features)
    threshold = float(np.quantile(predicted, 1 - share)) if share > 0 else np.inf
    chosen = ["sharer" if value >= threshold else "receiver" for value in predicted]
    sent = round(chosen.count("sharer") / len(chosen), 4)
    return chosen, {"share_asked": share, "share_routed": sent, "ridge": float(rule[-1].alpha_)}


@torch.no_grad()
def embed(model: LanguageModel, rows: Sequence[Row]) -> Values:
    """Return the mean input embedding of each question, ``[items, hidden]``, float64."""
    table = model.model.get_input_embeddings().weight
    means = []
    for row in rows:
        ids = model.tokenizer.encode(row.messages[-1]["content"], add_special_tokens=False)
        means.append(table[torch.tensor(ids, device=table.device)].float().mean(0).cpu())
    embeddings: Values = torch.stack(means).double().numpy()
    return embeddings
