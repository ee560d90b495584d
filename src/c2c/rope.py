"""Rotary position embedding, taken off cached keys and put back (Su et al., 2021, arXiv:2104.09864).

A key in a cache is ``R(p) k``, with ``p`` its position. Two models rotate with different bases, so a fuser that reads
rotated keys would have to learn both rotations at every position; it reads ``k`` instead.

How a model rotates is found out from its keys, layer by layer, and not assumed: a token alone attends only to itself,
so that its keys differ between positions by their rotation and by nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from c2c.errors import CacheError

Layout = Literal["halves", "neighbours", "single"]


@dataclass(frozen=True)
class Rotary:
    """Rotate keys with the cosines and sines of their positions, each ``[batch, tokens, pairs]`` in float32.

    Attributes:
        cos: one angle for each pair of channels; scaled where the model scales its rotation (YaRN).
        sin: the same.
        interleaved: pairs are neighbours (GLM, Cohere); else channel ``i`` goes with ``i + pairs`` (Llama, Qwen).
        last: the last channels of a head are rotated, where these are more than ``2 * pairs``; else the first.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    last: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape ``[..., batch, kv_heads, tokens, head_dim]``."""
        return self._turn(x, self.cos, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        """Invert :meth:`apply`, also where the model scales its rotation."""
        scale = self.cos[..., :1].square() + self.sin[..., :1].square()
        return self._turn(x, self.cos / scale, -self.sin / scale)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)
        width = 2 * cos.shape[-1]
        if self.last:
            rest, part = x[..., :-width], x[..., -width:]
        else:
            part, rest = x[..., :width], x[..., width:]
        one, two = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, dim=-1)
        turned = (one * cos - two * sin, two * cos + one * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return torch.cat([rest, joined] if self.last else [joined, rest], dim=-1)


@dataclass(frozen=True)
class MixedRotary:
    """Rotate many layers, ``[layers, batch, kv_heads, tokens, head_dim]``, each in its own way."""

    layers: Sequence[Rotary]

    def apply(self, x: Tensor) -> Tensor:
        """See :meth:`Rotary.apply`."""
        return torch.stack([layer.apply(part) for layer, part in zip(self.layers, x, strict=True)])

    def undo(self, x: Tensor) -> Tensor:
        """See :meth:`Rotary.undo`."""
        return torch.stack([layer.undo(part) for layer, part in zip(self.layers, x, strict=True)])


def where(mask: Tensor, ours: list[Rotary], theirs: list[Rotary]) -> list[Rotary]:
    """Choose between two tables of each layer by token, ``[batch, tokens]``; layers that share one share the choice."""
    chosen: dict[tuple[int, int], Rotary] = {}
    for one, other in zip(ours, theirs, strict=True):
        cos, sin = (torch.where(mask.unsqueeze(-1), *pair) for pair in ((one.cos, other.cos), (one.sin, other.sin)))
        chosen.setdefault((id(one), id(other)), replace(one, cos=cos, sin=sin))
    return [chosen[id(one), id(other)] for one, other in zip(ours, theirs, strict=True)]


def stack(tables: Sequence[Rotary]) -> Rotary | MixedRotary:
    """Join the tables of many layers to one that rotates them all at once."""
    first = tables[0]
    if all(table is first for table in tables):
        return Rotary(first.cos.unsqueeze(0), first.sin.unsqueeze(0), first.interleaved, first.last)
    if len({(table.cos.shape[-1], table.interleaved, table.last) for table in tables}) > 1:
        return MixedRotary(tables)
    cos, sin = torch.stack([t.cos for t in tables]), torch.stack([t.sin for t in tables])
    return Rotary(cos, sin, first.interleaved, first.last)


@dataclass(frozen=True)
class Convention:
    """Name how the keys of one layer are rotated.

    Attributes:
        module: name of the rotary embedding in the model's decoder.
        layer_type: what the embedding is told, where it has tables for several types of layers.
        layout: how the embedding's output repeats the angle of a pair: in halves, in neighbours, or not at all.
        interleaved: see :class:`Rotary`.
        backwards: rotated in the other direction.
        last: see :class:`Rotary`.
    """

    module: str
    layer_type: str | None
    layout: Layout
    interleaved: bool
    backwards: bool
    last: bool

    def table(self, model: PreTrainedModel, positions: Tensor) -> Rotary:
        """Compute cosines and sines at ``positions``, ``[batch, tokens]``, with the model's own embedding."""
        cos, sin = _embed(model.get_decoder().get_submodule(self.module), positions, self.layer_type)
        if self.layout == "halves":
            cos, sin = (x[..., : x.shape[-1] // 2] for x in (cos, sin))
        elif self.layout == "neighbours":
            cos, sin = cos[..., ::2], sin[..., ::2]
        return Rotary(cos, -sin if self.backwards else sin, self.interleaved, self.last)


# One entry per KV layer; None for a layer whose keys are not rotated.
Scheme = list[Convention | None]


def tables(model: PreTrainedModel, positions: Tensor, scheme: Scheme) -> list[Rotary] | None:
    """Compute the rotary tables of every KV layer at ``positions`` (``[batch, tokens]``).

    Layers that rotate alike share one table. None for a model that rotates nothing.
    """
    made = {convention: convention.table(model, positions) for convention in scheme if convention is not None}
    if not made:
        return None
    first = next(iter(made.values()))  # layers without rotation are rotated by nothing, in the shape of the others
    still = Rotary(torch.ones_like(first.cos), torch.zeros_like(first.sin), first.interleaved, first.last)
    return [still if convention is None else made[convention] for convention in scheme]


def find_scheme(model: PreTrainedModel, keys: Sequence[Tensor], positions: Tensor, name: str) -> Scheme:
    """Find out how every KV layer rotates its keys.

    Args:
        model: the model.
        keys: per KV layer the keys of one token at several positions, ``[positions, kv_heads, 1, head_dim]``, each
            alone in its row.
        positions: ``[positions, 1]``, of which the first is 0.
        name: of the model, for the error.

    Raises:
        CacheError: layers rotate in none of the known ways.
    """
    candidates = [(convention, convention.table(model, positions)) for convention in _candidates(model, positions)]
    scheme: Scheme = []
    unknown = []
    for index, layer in enumerate(keys):
        found, limit = layer.float().cpu(), 0.005 if layer.dtype == torch.float32 else 0.05
        errors = [(_spread(found, found), None), *((_spread(_undone(t, found), found), c) for c, t in candidates)]
        least, convention = min(errors, key=lambda pair: pair[0])
        if least > limit and _same_norms(found, limit):  # else positions are learned: these change norms
            unknown.append(index)
        scheme.append(convention if least <= limit else None)
    if unknown:
        raise CacheError(
            f"{name}: the rotary embedding of layers {unknown} can't be taken off their keys: neither halves nor "
            "neighbouring channels, turned by the model's own table, explain them. Use the 'c2c' fuser, which reads "
            "keys as they are."
        )
    return scheme


def _candidates(model: PreTrainedModel, positions: Tensor) -> Iterator[Convention]:
    """List the conventions that the model's rotary embeddings allow, the usual ones first."""
    config = model.config.get_text_config(decoder=True)
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    for name, module in _embeddings(model):
        told = types if "layer_type" in inspect.signature(module.forward).parameters else [None]
        for layer_type in told:
            try:
                cos, _ = _embed(module, positions, layer_type)
            except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
                continue  # of an image encoder, or without a table for this type
            for interleaved, backwards, last in product((False, True), repeat=3):
                yield Convention(name, layer_type, _layout(cos), interleaved, backwards, last)


def _embeddings(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the rotary embeddings of a model by name, without those that repeat another's frequencies."""
    found: dict[tuple[Any, ...], tuple[str, nn.Module]] = {}
    for name, module in model.get_decoder().named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            buffers = {key: tuple(b.flatten()[:4].tolist()) for key, b in module.named_buffers() if not b.is_meta}
            found.setdefault((type(module), tuple(buffers.items())), (name, module))
    return list(found.values())


def _embed(module: Any, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    probe = torch.empty(0, dtype=torch.float32, device=positions.device)
    out = module(probe, positions) if layer_type is None else module(probe, positions, layer_type)
    return (out.real, out.imag) if isinstance(out, Tensor) else out


def _layout(cos: Tensor) -> Layout:
    width = cos.shape[-1]
    if width % 2 == 0 and torch.equal(cos[..., : width // 2], cos[..., width // 2 :]):
        return "halves"
    return "neighbours" if width % 2 == 0 and torch.equal(cos[..., ::2], cos[..., 1::2]) else "single"


def _undone(table: Rotary, keys: Tensor) -> Tensor:
    """Take a rotation off; NaN where the keys have too few channels for it."""
    if 2 * table.cos.shape[-1] > keys.shape[-1]:
        return torch.full_like(keys, float("nan"))
    return Rotary(table.cos.float().cpu(), table.sin.float().cpu(), table.interleaved, table.last).undo(keys)


def _spread(bare: Tensor, keys: Tensor) -> float:
    """Measure how much ``bare`` keys differ between positions, from 0 to 1: the mean over channels of relative errors.

    Relative to the size of each channel, since biases make some channels a hundred times as large as others.
    """
    size = keys.square().mean(dim=0).sqrt() + 1e-12
    error = ((bare[1:] - bare[:1]).square().mean(dim=0).sqrt() / size).clamp(max=1)
    return float(error.nan_to_num(1.0).mean())


def _same_norms(keys: Tensor, limit: float) -> bool:
    norms = keys.norm(dim=-1)
    return torch.allclose(norms, norms[:1].expand_as(norms), rtol=limit)


# -- frequencies that depend on the length: dynamic NTK and LongRoPE --------------------------------------------------
#
# These models choose their frequencies anew in every forward pass, by the largest position in it. A prompt that is read
# in parts would be rotated with other frequencies than the same prompt read at once, and one that follows a long prompt
# with what that left behind (dynamic NTK only ever grows). Here all parts are rotated as the whole prompt is.

_found: WeakKeyDictionary[PreTrainedModel, list[nn.Module]] = WeakKeyDictionary()


def switch_length(model: PreTrainedModel) -> int | None:
    """Return the number of tokens from which on the frequencies change; None where they never do."""
    lengths = [length for module in _rotary_modules(model) for length in _lengths(module)]
    return min(lengths) if lengths else None


def reading_steps(model: PreTrainedModel, positions: Tensor, following: int) -> list[slice]:
    """Split columns into those that decoding rotates alike: it reads what follows a prompt token by token.

    Args:
        model: the model.
        positions: of all columns, ``[batch, tokens]``; the rows change at the same columns.
        following: how many of the last columns follow the prompt.
    """
    count, switch = positions.shape[1], switch_length(model)
    if switch is None or int(positions.max()) < switch:
        return [slice(0, count)]
    beyond = [column for column in range(count - following, count) if int(positions[:, column].max()) >= switch]
    grows = any("dynamic" in str(getattr(module, "rope_type", "")) for module in _rotary_modules(model))
    starts = [0, *(beyond if grows else beyond[:1])]
    return [slice(start, stop) for start, stop in pairwise([*starts, count]) if start < stop]


@contextmanager
def prompt_length(model: PreTrainedModel, length: int | None) -> Iterator[None]:
    """Rotate as in one forward pass over ``length`` tokens, however few of them are read; None changes nothing."""
    modules = _rotary_modules(model) if length else []
    handles = []
    for module in modules:
        _reset(module)
        handles.append(module.register_forward_pre_hook(_add_last_position(int(length or 0) - 1), with_kwargs=True))
        handles.append(module.register_forward_hook(_drop_last_position))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the rotary embeddings whose frequencies depend on the length."""
    if model not in _found:
        _found[model] = [module for module in model.modules() if list(_lengths(module))]
    return _found[model]


def _lengths(module: Any) -> Iterator[int]:
    """Yield the lengths at which a rotary embedding changes; nothing for other modules."""
    kinds = getattr(module, "rope_type", None)
    for name, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if not isinstance(kind, str):
            continue
        if "dynamic" in kind:
            yield int(module.original_max_seq_len)
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            yield int((parameters[name] if name else parameters)["original_max_position_embeddings"])


def _reset(module: Any) -> None:
    """Forget what a longer prompt left behind."""
    start = torch.zeros(1, 1, dtype=torch.long, device=module.inv_freq.device) if hasattr(module, "inv_freq") else None
    kinds = module.rope_type
    if start is not None:
        module(torch.empty(0, device=start.device), start)
    elif isinstance(kinds, dict):
        for name in kinds:
            device = getattr(module, f"{name}_inv_freq").device
            module(torch.empty(0, device=device), torch.zeros(1, 1, dtype=torch.long, device=device), name)


def _add_last_position(last: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions = torch.cat([positions, torch.full_like(positions[..., :1], last)], dim=-1)
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    return hook


def _drop_last_position(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
