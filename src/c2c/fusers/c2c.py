"""The published fuser, parameter for parameter (Cache-to-Cache, ICLR 2026, section 3.3; ``C2CProjector``).

Per receiver layer, and separately for keys and values: concatenate the sharer's and the receiver's channels, run a
residual MLP, then a feature branch (what to add) and a weight branch (how much, per head and token). A scalar gate
per layer decides whether anything is added. Keys are read as they lie in the cache, rotated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import Entries, Fuser, FuserConfig, number, size
from c2c.kv_cache import KeyValue

KINDS = ("key", "value")
_PUBLISHED_STEPS = 1929
UniformSource = Callable[[tuple[int, ...]], Tensor]


@strict
class C2CFuserConfig(FuserConfig):
    """Configuration of the published fuser.

    Attributes:
        hidden_dim: width of the residual stream.
        intermediate_dim: inner width of its blocks.
        num_layers: 3 or more; the feature branch has ``num_layers - 2`` blocks.
        dropout: inside the blocks, in training.
        zero_init: start the feature branch at zero.
        initial_temperature: of the training gate.
        final_temperature: after ``anneal_steps``.
        anneal_steps: optimizer steps of the schedule; None for the length of the training.
        gate_temperature: present value of the schedule.
    """

    model_type = "c2c_fuser_c2c"
    hidden_dim: int = size(1024)
    intermediate_dim: int = size(1024)
    num_layers: int = size(3, low=3)
    dropout: float = 0.1
    zero_init: bool = False
    initial_temperature: float = number(1.0, 1e-6)
    final_temperature: float = number(0.001, 1e-6)
    anneal_steps: int | None = number(None, 0, whole=True)
    gate_temperature: float = number(1.0, 1e-6)


class ResidualBlock(nn.Module):
    """``x + Dropout(W2 GELU(W1 RMSNorm(x)))``, without biases."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape; under autocast the norm stays in the type of its weight."""
        normed = self.norm(x.to(self.norm.weight.dtype))
        out: Tensor = self.w2(nn.functional.gelu(self.w1(normed)))
        return x + nn.functional.dropout(out, self.dropout, self.training)


class Projector(nn.Module):
    """Projector of one receiver layer. Parameter names are those of the published ``projector_*.pt``."""

    def __init__(self, config: C2CFuserConfig) -> None:
        super().__init__()
        sharer, receiver = config.geometries
        width = config.hidden_dim

        def blocks(count: int, inner: int) -> nn.Module:
            chain = (ResidualBlock(width, inner, config.dropout) for _ in range(count))
            return nn.Sequential(OrderedDict(blocks=nn.Sequential(*chain)))  # as the published state dict names it

        for kind in KINDS:
            self.register_parameter(f"{kind}_gate_logit", nn.Parameter(torch.zeros(())))
        for kind in KINDS:
            self.add_module(f"{kind}_in", nn.Linear(sharer.width + receiver.width, width))
            self.add_module(f"{kind}_mlp1", blocks(1, config.intermediate_dim))
            self.add_module(f"{kind}_scalar_mlp2", blocks(1, width))
            self.add_module(f"{kind}_scalar_head", nn.Linear(width, receiver.kv_heads))
            self.add_module(f"{kind}_proj_mlp2", blocks(config.num_layers - 2, config.intermediate_dim))
            self.add_module(f"{kind}_proj_out", nn.Linear(width, receiver.width))
            if config.zero_init:
                for parameter in self.get_submodule(f"{kind}_proj_out").parameters():
                    nn.init.zeros_(parameter)

    def fuse(self, kind: str, sharer: Tensor, receiver: Tensor, gate: Tensor) -> Tensor:
        """Return ``receiver + gate * weight * projection``; all ``[batch, kv_heads, tokens, head_dim]``."""
        batch, heads, tokens, dim = receiver.shape

        def run(name: str, x: Tensor) -> Tensor:
            out: Tensor = self.get_submodule(f"{kind}_{name}")(x)
            return out

        # to [batch, tokens, kv_heads * head_dim], head 0 first
        x = torch.cat([side.transpose(1, 2).flatten(2) for side in (sharer, receiver)], dim=-1)
        hidden = run("mlp1", run("in", x.to(self.get_parameter(f"{kind}_in.weight").dtype)))
        feature = run("proj_out", run("proj_mlp2", hidden)).view(batch, tokens, heads, dim).transpose(1, 2)
        scalar = run("scalar_head", run("scalar_mlp2", hidden))
        return receiver + gate * torch.sigmoid(scalar).permute(0, 2, 1).unsqueeze(-1) * feature


class C2CFuser(Fuser):
    """The published fuser for all receiver layers.

    In ``train()`` mode gates are Gumbel-sigmoid with a fresh draw per head and position; in ``eval()`` they are hard.
    """

    config_class = C2CFuserConfig
    config: C2CFuserConfig
    family: ClassVar[str] = "c2c"

    def __init__(self, config: C2CFuserConfig) -> None:
        super().__init__(config)
        if not 0 <= config.dropout < 1:
            raise FuserError(f"dropout is {config.dropout}; expected a share from 0 to below 1.")
        self.temperature = config.gate_temperature
        self._anneal_steps = _PUBLISHED_STEPS if config.anneal_steps is None else config.anneal_steps
        self.uniform: UniformSource | None = None
        self.layers = nn.ModuleList([Projector(config) for _ in config.fused_layers])
        self.post_init()

    def on_train_begin(self, steps: int) -> None:
        """Anneal the gates over the whole training, unless the config has a number of steps."""
        self._anneal_steps = steps if self.config.anneal_steps is None else self.config.anneal_steps

    def on_step(self, step: int) -> None:
        """Move the temperature schedule to an optimizer step."""
        c = self.config
        self.temperature = annealed_temperature(step, c.initial_temperature, c.final_temperature, self._anneal_steps)
        self.config.gate_temperature = self.temperature

    def forward(self, sharer: Entries, receiver: Entries) -> list[KeyValue]:
        """See :meth:`Fuser.forward`."""
        projectors: Iterable[Any] = self.layers
        fused = []
        for index, layer in enumerate(projectors):
            pairs = zip(KINDS, sharer.layer(index), receiver.layer(index), strict=True)
            keys, values = (
                layer.fuse(kind, theirs, ours, self._gate(layer.get_parameter(f"{kind}_gate_logit"), ours))
                for kind, theirs, ours in pairs
            )
            fused.append((keys, values))
        return fused

    def gates(self) -> Tensor:
        """Return 0 or 1 for every layer, ``[layers, 2]``."""
        logits = (layer.get_parameter(f"{kind}_gate_logit") for layer in self.layers for kind in KINDS)
        return hard_gate(torch.stack(tuple(logits)).detach().view(-1, 2))

    def _gate(self, logit: Tensor, receiver: Tensor) -> Tensor:
        if not self.training:
            return hard_gate(logit)
        shape = (*receiver.shape[:3], 1)
        uniform = self.uniform(shape) if self.uniform else torch.rand(shape, device=logit.device, dtype=logit.dtype)
        return gumbel_gate(logit, uniform, self.temperature)


def gumbel_gate(logit: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Compute the published training gate, ``sigmoid((logit + g) / T)`` with a single Gumbel draw ``g``.

    One draw and not the difference of two, so at logit 0 it is open in 63 % of the draws; kept, because published
    fusers were trained so. ``uniform`` are numbers from [0, 1), of the shape wanted; ``logit`` is a scalar.
    """
    noise = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    return torch.sigmoid((logit + noise) / temperature)


def hard_gate(logit: Tensor) -> Tensor:
    """Compute the published inference gate: 1 if the logit is above 0, else 0 (0 itself is closed). Float32."""
    return (logit > 0).float()


def annealed_temperature(step: int, initial: float, final: float, anneal_steps: int) -> float:
    """Compute the published schedule: geometric from ``initial`` to ``final`` over ``anneal_steps`` optimizer steps."""
    progress = min(step / anneal_steps, 1.0) if anneal_steps > 0 else 1.0
    return float(initial * (final / initial) ** progress)
