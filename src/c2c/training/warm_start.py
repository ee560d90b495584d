"""Where a memory fuser starts: ridge regression onto the receiver's own entries of the passages.

If the receiver had read a passage itself, it would hold entries of its own for each token of it. The affine map of the
memory fuser is fitted to predict these from the sharer's, token by token; both models' tokens are matched by
characters. It is the baseline that training must beat, and usable at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2c import kv_cache
from c2c.alignment import SpanAligner
from c2c.errors import PromptError
from c2c.fusers import MemoryFuser
from c2c.fusers.base import Entries
from c2c.fusers.linear import channels
from c2c.language_model import LanguageModel
from c2c.prompting import Encoded, RenderOptions, encode, render, text_tokens
from c2c.tokens import left_pad
from c2c.training.objective import Objective
from c2c.training.private import PrivateExample
from c2c.training.ridge import NormalEquations
from c2c.utils import OnProgress


@torch.no_grad()
def warm_start(
    fuser: MemoryFuser,
    training: Objective,
    examples: Sequence[PrivateExample],
    *,
    ridge: float = 1e-2,
    progress: OnProgress | None = None,
) -> int:
    """Set the affine map of a memory fuser; its nonlinear part stays at zero.

    Args:
        fuser: the fuser.
        training: the pair with its stores.
        examples: each passage among them is read once.
        ridge: penalty, see :meth:`~c2c.training.ridge.NormalEquations.solve`.
        progress: called with (stage, done, total).

    Returns:
        The number of token pairs that it was fitted to.

    Raises:
        FuserError: too few tokens to fit to.
    """
    passages = {tuple(example.sharer_ids): example for example in examples}
    sums = NormalEquations()
    squares: Tensor | None = None
    for done, example in enumerate(passages.values(), 1):
        x, y = observe(fuser, training, example)
        sums.add(x, y)
        new = x.double().square().sum(1, keepdim=True)
        squares = new if squares is None else squares + new
        if progress is not None:
            progress("warm start", done, len(passages))
    found = sums.solve(ridge)
    assert squares is not None
    scale = (squares / sums.pairs - found.mean.square()).clamp_min(1e-8).sqrt()
    fuser.mean.copy_(found.mean)
    fuser.scale.copy_(scale)
    fuser.weight.copy_(found.weight * scale.transpose(1, 2))
    fuser.bias.copy_(found.bias)
    return sums.pairs


def observe(fuser: MemoryFuser, training: Objective, example: PrivateExample) -> tuple[Tensor, Tensor]:
    """The sharer's and the receiver's entries of one passage, ``[layers, tokens, channels]`` each.

    Raises:
        PromptError: the passage is not found in both prompts.
    """
    messages = example.row.sharer_messages
    assert messages is not None
    sharer, receiver = training.model.sharers[0], training.model.receiver
    theirs, ours = (encode(m.tokenizer, render(m.tokenizer, messages, RenderOptions())) for m in (sharer, receiver))
    pairs = text_pairs(theirs, ours)
    [entry] = training.sharer_store.get([example.sharer_ids])
    layers = [entry.layers[layer] for layer in fuser.config.source_layers]
    own = receiver.prefill(left_pad([ours.ids], 0))
    return (
        channels(_entries(sharer, layers, fuser.config.source_layers, [theirs_at for theirs_at, _ in pairs])),
        channels(_entries(receiver, kv_cache.layers(own), range(len(layers)), [ours_at for _, ours_at in pairs])),
    )


def text_pairs(theirs: Encoded, ours: Encoded) -> list[tuple[int, int]]:
    """For each of the sharer's text tokens, the receiver's token that covers its last character."""
    owners = text_tokens(theirs)
    found = [
        (column, target)
        for column, target in enumerate(SpanAligner().pairs(theirs, ours))
        if target is not None and owners[column] is not None
    ]
    if not found:
        raise PromptError(f"no text of {theirs.rendered.text!r} was found in {ours.rendered.text!r}.")
    return found


def _entries(
    model: LanguageModel, layers: Sequence[kv_cache.KeyValue], indices: Sequence[int], columns: Sequence[int]
) -> Entries:
    """Entries at some columns of a prompt of one row, of layers with these indices."""
    tables = model.rotary(torch.tensor([list(columns)], device=model.device))
    return Entries(
        [keys[:, :, columns].to(model.device).float() for keys, _ in layers],
        [values[:, :, columns].to(model.device).float() for _, values in layers],
        None if tables is None else [tables[index] for index in indices],
    )
