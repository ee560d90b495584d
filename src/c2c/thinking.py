"""Thinking steps: a model's last hidden state goes back in as its next input, and no token is chosen in between.

Each step adds an entry to the cache that belongs to no token. The state after the final norm is of another size and
direction than an input embedding; how it is realigned is a choice:

==========  ===========================================================================================================
``none``    as it is (Coconut, arXiv:2412.06769, whose models were trained for it)
``norm``    scaled to the mean norm of the input embeddings (LatentMAS, arXiv:2511.20639, without its matrix)
``ridge``   mapped by ``(W_out^T W_out + 1e-5 I)^-1 W_out^T W_in``, then scaled (LatentMAS; avp 0.6.2 where the head is
            not tied). Where ``W_out`` is ``W_in`` the matrix is the identity, and this is ``norm``.
``soft``    the input embeddings of all tokens, weighted by the probabilities of the next one (avp where it is tied)
``filler``  a control without thought: the embedding of the prompt's last token, again and again
==========  ===========================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.errors import CacheError, PromptError
from c2c.prefill import last_output
from c2c.tokens import TokenBatch

Realignment = Literal["none", "norm", "ridge", "soft", "filler"]
REALIGNMENTS: tuple[Realignment, ...] = get_args(Realignment)
_LAMBDA = 1e-5
_ROWS = 8192  # of an embedding table that are converted to float32 at a time
_PROBE = [1, 2, 3]  # ids, which every vocabulary has


@dataclass(frozen=True)
class _Embeddings:
    """Hold what realignment needs of a model's input and output embeddings.

    Attributes:
        version: of the weights that the rest was computed from.
        scale: what the embedding layer multiplies its table by.
        norm: mean norm of what the layer makes of a token.
    """

    version: tuple[Any, ...]
    scale: float
    norm: float


_embeddings: WeakKeyDictionary[PreTrainedModel, _Embeddings] = WeakKeyDictionary()
_matrices: WeakKeyDictionary[PreTrainedModel, tuple[_Embeddings, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def think(
    model: PreTrainedModel, batch: TokenBatch, cache: Cache, steps: int, realign: Realignment
) -> tuple[int, Cache]:
    """Read the rest of a prompt of one row, then take thinking steps.

    Args:
        model: the model.
        batch: the prompt, ``[1, tokens]``, without padding.
        cache: its first columns, at most all but the last; grows to ``tokens + steps``.
        steps: how many, at least one.
        realign: how states become inputs, see the module.

    Returns:
        The likeliest token after the last step, and the cache.

    Raises:
        PromptError: several rows, no step, or an unknown realignment.
        CacheError: the model can't be given embeddings in place of tokens.
    """
    if batch.rows != 1 or batch.padded or steps < 1 or realign not in REALIGNMENTS:
        raise PromptError(
            f"{steps} thinking steps with the realignment {realign!r} for {batch.rows} rows; expected one row without "
            f"padding, at least one step, and one of {', '.join(REALIGNMENTS)}."
        )
    check_embeddings(model)
    start, position = kv_cache.length(cache), batch.positions[:, -1:]
    scores = realign == "soft"  # of the vocabulary, in place of the hidden state
    read = {"input_ids": batch.ids[:, start:]}
    last = last_output(model, cache, batch.positions[:, start:], logits=scores, **read)
    filler = model.get_input_embeddings()(batch.ids[:, -1:])
    for _ in range(steps):
        position = position + 1
        embedding = filler if realign == "filler" else realigned(model, last, realign).unsqueeze(1).to(filler)
        last = last_output(model, cache, position, logits=scores, inputs_embeds=embedding)
    logits = last if scores else model.get_output_embeddings()(last)
    return int(logits.argmax(-1)), cache


@torch.no_grad()
def realigned(model: PreTrainedModel, last: Tensor, realign: Realignment) -> Tensor:
    """Map states after the final norm to the space of input embeddings.

    Args:
        model: the model.
        last: hidden states, ``[batch, hidden]``; for ``soft`` logits, ``[batch, vocab]``.
        realign: ``none``, ``norm``, ``ridge`` or ``soft``.

    Returns:
        What the decoder takes as ``inputs_embeds``, ``[batch, hidden]``, float32 except for ``none``.
    """
    if realign == "none":
        return last
    known, table = check_embeddings(model), _table(model)
    made: Tensor
    if realign == "soft":
        weights = last.float().softmax(-1).to(table.dtype)[:, : len(table)]
        made = (weights @ table).float() * known.scale
        return made
    state = last.float()
    if realign == "ridge":
        state = state @ _ridge(model, known)
    made = state * (known.norm / state.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    return made


def ridge(outputs: Tensor, inputs: Tensor, scale: float = 1.0) -> Tensor:
    """Fit the matrix that maps the space of output embeddings to that of input embeddings.

    Args:
        outputs: weight of the language-model head, ``[vocab, hidden]``.
        inputs: table of input embeddings, the same shape; may be the same tensor.
        scale: what the model multiplies ``inputs`` by.

    Returns:
        ``(W_out^T W_out + 1e-5 I)^-1 W_out^T W_in``, ``[hidden, hidden]``, float32; solved in float64.
    """
    tied = outputs.data_ptr() == inputs.data_ptr()
    gram = torch.zeros(outputs.shape[1], outputs.shape[1], dtype=torch.float64, device=outputs.device)
    cross = gram if tied else gram.clone()
    for theirs, ours in zip(outputs.split(_ROWS), inputs.split(_ROWS), strict=True):
        gram += (theirs.float().T @ theirs.float()).double()
        if not tied:
            cross += (theirs.float().T @ ours.float()).double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + _LAMBDA * identity, cross * scale)
    return solved.float()


@torch.no_grad()
def check_embeddings(model: PreTrainedModel) -> _Embeddings:
    """Find out how a model embeds tokens, once for its weights.

    Raises:
        CacheError: it computes something else from embeddings than from the tokens that they belong to, as models with
            embeddings for every layer do, or its embeddings are not a table times a number.
    """
    table, head = _table(model), model.get_output_embeddings()
    version = (table.data_ptr(), table._version, head.weight.data_ptr(), head.weight._version)
    known = _embeddings.get(model)
    if known is None or known.version != version:
        _check_forward(model)
        norms = torch.cat([part.float().norm(dim=-1) for part in table.split(_ROWS)])
        scale = _scale(model, table)
        known = _embeddings[model] = _Embeddings(version, scale, float(norms.mean()) * scale)
    return known


def _table(model: PreTrainedModel) -> Tensor:
    """Return the weight of the input embeddings, ``[vocab, hidden]``."""
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    table: Tensor | None = getattr(layer, "weight", None)
    if table is None or getattr(head, "weight", None) is None or table.shape[1] != head.weight.shape[1]:
        raise CacheError(
            f"{type(model).__name__} takes no thinking steps: its input and output embeddings are not two tables of "
            "one width. Leave think out."
        )
    return table


def _scale(model: PreTrainedModel, table: Tensor) -> float:
    """Return what the embedding layer multiplies its table by."""
    ids = torch.tensor(_PROBE, device=table.device)
    made, rows = model.get_input_embeddings()(ids).double(), table[ids].double()
    scale = float((made * rows).sum() / (rows * rows).sum())
    if not bool(torch.dist(made, rows * scale) <= 0.01 * made.norm()):
        raise CacheError(
            f"{type(model).__name__} takes no thinking steps: what it embeds tokens to is not a row of a table times "
            "a number. Leave think out."
        )
    return scale


def _check_forward(model: PreTrainedModel) -> None:
    """Compare a prompt of embeddings with the same prompt of tokens; then read one that belongs to no token."""
    if getattr(model.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None):
        raise CacheError(
            f"{type(model).__name__} takes no thinking steps: it looks up an embedding for every layer by the token's "
            "id, and a thought has none. Leave think out."
        )
    layer: Any = model.get_input_embeddings()
    ids = torch.tensor([_PROBE], device=layer.weight.device)
    positions = torch.arange(len(_PROBE), device=ids.device).unsqueeze(0)
    mixed = layer(ids).mean(1, keepdim=True).expand(-1, len(_PROBE), -1)
    inputs = ({"input_ids": ids}, {"inputs_embeds": layer(ids)}, {"inputs_embeds": mixed})
    try:
        read, given, _ = (
            last_output(model, kv_cache.empty_cache(model.config), positions, **one).float() for one in inputs
        )
    except Exception as error:  # whatever a model raises that takes no embeddings
        raise CacheError(
            f"{type(model).__name__} takes no thinking steps: it can't be given embeddings in place of tokens "
            f"({type(error).__name__}: {error}). Leave think out."
        ) from error
    if not bool(torch.dist(read, given) <= 0.01 * read.norm()):
        raise CacheError(
            f"{type(model).__name__} takes no thinking steps: it computes something else from embeddings than from the "
            "tokens that they belong to. Leave think out."
        )


def _ridge(model: PreTrainedModel, known: _Embeddings) -> Tensor:
    """Return the matrix of a model, fitted once for its weights."""
    found = _matrices.get(model)
    if found is None or found[0] is not known:
        head: Any = model.get_output_embeddings()
        rows = min(len(head.weight), len(_table(model)))  # one may be padded
        outputs, inputs = head.weight[:rows], _table(model)[:rows]
        found = _matrices[model] = known, ridge(outputs, inputs, known.scale)
    return found[1]
