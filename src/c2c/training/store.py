"""The frozen-prefill store: each prompt's caches, computed once and reused across epochs, seeds and fusers.

Both models are frozen, so the prefill of a prompt never changes. An entry's key is a hash of the models' identities
and the token ids that they read, so a stale entry cannot be found. One file per prompt, written whole or not at all: a
killed run loses at most the prompts under way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.errors import PromptError
from c2c.language_model import LanguageModel
from c2c.prefill import prefill
from c2c.tokens import left_pad
from c2c.utils import save_atomically

Layers = dict[int, kv_cache.KeyValue]


@dataclass(frozen=True)
class PromptCache:
    """One model's cache of one prompt.

    Attributes:
        layers: keys and values of the layers kept, each ``[1, kv_heads, tokens, head_dim]``, bfloat16.
    """

    layers: Layers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def first(self, tokens: int) -> PromptCache:
        """The cache of the first tokens, as views."""
        return PromptCache({i: (k[:, :, :tokens], v[:, :, :tokens]) for i, (k, v) in self.layers.items()})


class PrefillStore:
    """Prompt caches of one model, in memory or on disk, within a budget.

    Args:
        model: the frozen model.
        layers: the layers to keep.
        folder: where to keep them; None for memory.
        budget: at most so many bytes; what does not fit is computed again when it is asked for.
        batch: prompts per prefill.
        writers: how many processes fill the same folder; each gets an equal part of what is left of the budget.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        *,
        folder: Path | None = None,
        budget: int = 8 * 10**9,
        batch: int = 4,
        writers: int = 1,
    ) -> None:
        self.model, self.kept, self.batch = model, sorted(set(layers)), batch
        self._memory: dict[str, PromptCache] = {}
        identity = model.identity.to_dict()
        for informative in ("name", "revision"):  # the same model under another path is the same model
            identity.pop(informative)
        identity["dtype"] = str(model.dtype)
        self._identity = json.dumps(identity, sort_keys=True)
        self.folder = folder / _digest(self._identity)[:16] if folder is not None else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.used = self._bytes_on_disk()
        self.budget = self.used + max(0, budget - self.used) // writers
        self.computed = 0

    def key(self, ids: Sequence[int]) -> str:
        """What an entry is found by: model and tokens."""
        return _digest(self._identity + json.dumps(list(ids)))

    def __contains__(self, ids: Sequence[int]) -> bool:
        return self._holds(self.key(ids))

    def get(self, prompts: Sequence[Sequence[int]]) -> list[PromptCache]:
        """The caches of these prompts, computed where they are missing."""
        found: dict[int, PromptCache] = {}
        for index, ids in enumerate(prompts):
            entry = self._read(self.key(ids))
            if entry is not None:
                found[index] = entry
        missing = [index for index in range(len(prompts)) if index not in found]
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            for index, entry in zip(part, self._compute([prompts[i] for i in part]), strict=True):
                self._write(self.key(prompts[index]), entry)
                found[index] = entry
        return [found[index] for index in range(len(prompts))]

    def fill(self, prompts: Sequence[Sequence[int]], compute_all: bool = False) -> Iterator[int]:
        """Compute what is missing; yields the number of prompts done, for a progress bar.

        Prompts of similar length are prefilled together, so that little of the work goes into padding.

        Args:
            prompts: token ids.
            compute_all: run the model on every batch with a missing prompt *anywhere*, that is on all of them: a model
                that is spread over several processes has to be run by all of them equally often.

        Raises:
            PromptError: with ``compute_all``, where the budget does not hold everything.
        """
        order = sorted(prompts, key=len)
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            if compute_all:
                self._keep_all(part)
            elif missing := [ids for ids in part if ids not in self]:
                self.get(missing)
            yield len(part)

    def put(self, prompts: Sequence[Sequence[int]], cache: Cache, first: Sequence[int]) -> None:
        """Take over entries that were computed elsewhere, such as by ``generate``, so that nothing is read twice.

        Args:
            prompts: token ids, one row of the cache each; one that the cache does not hold to its end is left out.
            cache: of the model, all layers.
            first: column of each prompt's first token.
        """
        length = kv_cache.length(cache)
        for row, (ids, start) in enumerate(zip(prompts, first, strict=True)):
            end = start + len(ids)
            if end > length or ids in self:
                continue
            pairs = {index: kv_cache.layer(cache, index) for index in self.kept}
            layers = {
                index: (_keep(keys[:, :, :end], row, start), _keep(values[:, :, :end], row, start))
                for index, (keys, values) in pairs.items()
            }
            self._write(self.key(ids), PromptCache(layers))

    def _keep_all(self, prompts: Sequence[Sequence[int]]) -> None:
        for ids, entry in zip(prompts, self._compute(prompts), strict=True):
            if ids not in self:
                self._write(self.key(ids), entry)
            if ids not in self:
                raise PromptError(
                    f"the store's budget of {self.budget / 1e9:.2f} GB does not hold all prompts, and a sharded model "
                    "can't be run again by one process: raise store_budget_gb."
                )

    def _compute(self, prompts: Sequence[Sequence[int]]) -> list[PromptCache]:
        self.computed += len(prompts)
        tokens = left_pad(prompts, 0)
        cache = prefill(self.model.model, tokens.to(self.model.device), tokens.length)  # past the model's own stored ones
        entries = []
        for row, ids in enumerate(prompts):
            first = tokens.length - len(ids)
            layers = {}
            for index in self.kept:
                keys, values = kv_cache.layer(cache, index)
                layers[index] = (_keep(keys, row, first), _keep(values, row, first))
            entries.append(PromptCache(layers))
        return entries

    def _read(self, key: str) -> PromptCache | None:
        path = self._path(key)
        if path is None or not path.exists():
            return self._memory.get(key)
        with safe_open(path, framework="pt") as file:
            if not self._complete(file.keys()):
                return None
            return PromptCache({i: (file.get_tensor(f"{i}.key"), file.get_tensor(f"{i}.value")) for i in self.kept})

    def _holds(self, key: str) -> bool:
        path = self._path(key)
        if path is None or not path.exists():
            return key in self._memory
        with safe_open(path, framework="pt") as file:
            return self._complete(file.keys())

    def _complete(self, names: Sequence[str]) -> bool:
        """Whether a file has all the layers kept; another layer map may have written it."""
        return {f"{index}.key" for index in self.kept} <= set(names)

    def _write(self, key: str, entry: PromptCache) -> None:
        if self.used + entry.nbytes > self.budget:
            return
        self.used += entry.nbytes
        path = self._path(key)
        if path is None:
            self._memory[key] = entry
            return
        tensors = {f"{i}.key": keys for i, (keys, _) in entry.layers.items()}
        tensors |= {f"{i}.value": values for i, (_, values) in entry.layers.items()}
        save_atomically(path.parent, lambda folder: save_file(tensors, Path(folder) / path.name))

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"

    def _bytes_on_disk(self) -> int:
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors")) if self.folder is not None else 0


def stack(entries: Sequence[PromptCache], total_layers: int, dtype: torch.dtype, device: torch.device) -> DynamicCache:
    """Join prompt caches to one left-padded batch; layers that are not kept are empty."""
    width = max(next(iter(entry.layers.values()))[0].shape[2] for entry in entries)
    kept = entries[0].layers.keys()
    nothing = torch.empty(len(entries), 0, width, 0, device=device)

    def join(layer: int, side: int) -> Tensor:
        rows = [entry.layers[layer][side] for entry in entries]
        first = rows[0]
        out = torch.zeros(len(rows), first.shape[1], width, first.shape[3], dtype=dtype, device=device)
        for row, tensor in enumerate(rows):
            out[row, :, width - tensor.shape[2] :] = tensor[0].to(device)
        return out

    return kv_cache.from_layers(
        (join(layer, 0), join(layer, 1)) if layer in kept else (nothing, nothing) for layer in range(total_layers)
    )


def _keep(x: Tensor, row: int, first: int) -> Tensor:
    return x[row : row + 1, :, first:].to(device="cpu", dtype=torch.bfloat16).contiguous()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
