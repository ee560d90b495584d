"""The prefill store: the KV caches of prompts, computed once and reused across epochs, seeds and fusers.

Both models are frozen, so the prefill of a prompt never changes. An entry's key is a hash of the model's identity and
the token ids, so a stale entry cannot be found. One file per prompt, written whole or not at all: a killed run loses at
most the prompts under way. What is stored is as confidential as the prompts: only its owner can read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.errors import CacheError
from c2c.language_model import LanguageModel
from c2c.rope import switch_length
from c2c.tokens import left_pad
from c2c.utils import save_atomically

_RECORDS = 16  # prompts at a time


@dataclass(frozen=True)
class PromptCache:
    """One model's cache of one prompt.

    Attributes:
        layers: keys and values of the stored layers, each ``[1, kv_heads, tokens, head_dim]``, bfloat16.
    """

    layers: dict[int, kv_cache.KeyValue]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def first(self, tokens: int) -> PromptCache:
        """Return the cache of the first tokens, as views."""
        return PromptCache({i: (k[:, :, :tokens], v[:, :, :tokens]) for i, (k, v) in self.layers.items()})


class PrefillStore:
    """Prompt caches of one model, in memory or on disk, within a budget.

    Args:
        model: the frozen model.
        layers: the layers to keep.
        folder: folder of the files; None for memory.
        budget: at most so many bytes; what does not fit is computed again at each use.
        batch: prompts per prefill.
        writers: how many processes fill the same folder; each gets an equal part of the rest of the budget.

    Attributes:
        computed: prompts that were prefilled.
        used: bytes stored.
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
        self._seen = model.identity
        identity = self._seen.to_dict()
        for informative in ("name", "revision", "variant"):  # the same model under another path is the same model
            if identity["weights"] is not None or informative != "name":
                identity.pop(informative)
        identity["dtype"] = str(model.dtype)
        self._identity = json.dumps(identity, sort_keys=True)
        self.folder = None if folder is None else folder / _digest(self._identity)[:16]
        if folder is not None and self.folder is not None:
            for path in (folder, self.folder):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.used = sum(p.stat().st_size for p in self.folder.glob("*.safetensors")) if self.folder else 0
        self.budget = self.used + max(0, budget - self.used) // writers
        self.computed = 0

    def key(self, ids: Sequence[int], length: int | None = None) -> str:
        """Hash model and tokens, and the length of the whole prompt where their keys are rotated by it."""
        rotated = f" of {length}" if length not in (None, len(ids)) and self.depends(length) else ""
        return _digest(self._identity + json.dumps(list(ids)) + rotated)

    def depends(self, length: int | None) -> bool:
        """Whether the keys of a prompt of so many tokens are rotated otherwise than those of shorter ones."""
        switch = switch_length(self.model.model)
        return switch is not None and length is not None and length > switch

    def __contains__(self, ids: Sequence[int]) -> bool:
        return self._has(self.key(ids))

    def _has(self, key: str) -> bool:
        path = self._path(key)
        if path is None or not path.exists():
            return key in self._memory
        with safe_open(path, framework="pt") as file:
            return self._complete(file.keys())

    def get(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> list[PromptCache]:
        """Return the caches of these prompts; missing ones are computed, equal ones once.

        Args:
            prompts: token ids.
            lengths: tokens of the whole prompts, where these are only their beginnings.

        Raises:
            CacheError: the model is not what it was when the store was made.
        """
        if self.model.identity != self._seen:
            raise CacheError(
                f"the {self.model.role} {self.model.name} was changed since its prefills were stored: other weights or "
                "another adapter. Make a new store for it."
            )
        wholes = list(map(len, prompts)) if lengths is None else list(lengths)
        keys = [self.key(ids, length) for ids, length in zip(prompts, wholes, strict=True)]
        found: dict[str, PromptCache | None] = {key: self._read(key) for key in dict.fromkeys(keys)}
        asked = zip(keys, prompts, wholes, strict=True)
        missing = list({key: (ids, length) for key, ids, length in asked if found[key] is None}.items())
        for start in range(0, len(missing), self.batch):
            part = dict(missing[start : start + self.batch])
            found |= zip(part, self._compute(*map(list, zip(*part.values(), strict=True))), strict=True)
        return [entry for entry in map(found.get, keys) if entry is not None]

    def fill(self, prompts: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the missing prompts, short ones first (so that little goes into padding), within the budget.

        ``progress`` is called with the tokens done and those to do, which the time left can be estimated from.
        """
        unique = {self.key(ids): ids for ids in prompts if ids not in self}
        order = sorted(unique.values(), key=len)
        done, total = 0, sum(map(len, order))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            self.get(part)
            done += sum(map(len, part))
            if progress is not None:
                progress(done, total)
            if part[-1] not in self:  # nor would the longer ones that follow fit
                return

    def put(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        first: Sequence[int],
        lengths: Sequence[int | None] | None = None,
    ) -> list[PromptCache]:
        """Store one row of ``cache`` for each prompt, as far as they fit, and return them.

        ``first`` are the columns of the prompts' first tokens; the cache covers each prompt to its end. ``lengths`` are
        those of :meth:`get`.
        """
        entries = []
        rows = zip(prompts, first, lengths or [None] * len(prompts), strict=True)
        for row, (ids, start, length) in enumerate(rows):
            entries.append(self._extract(cache, row, start, start + len(ids)))
            if not self._has(key := self.key(ids, length)):
                self._write(key, entries[-1])
        return entries

    def _compute(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[PromptCache]:
        if self.model.released:
            raise CacheError(
                f"the weights of the {self.model.role} {self.model.name} were released after its prefills were stored, "
                "and this prompt is not among them. Load the model again."
            )
        self.computed += len(prompts)
        tokens = replace(left_pad(prompts, 0), whole=tuple(lengths) if self.depends(max(lengths)) else ())
        cache = self.model.compute(tokens, tokens.length)
        return self.put(prompts, cache, [tokens.length - len(ids) for ids in prompts], lengths)

    def _extract(self, cache: Cache, row: int, start: int, stop: int) -> PromptCache:
        """Copy the stored layers of one row's columns to the host, in bfloat16."""

        def copy(x: Tensor) -> Tensor:
            return x[row : row + 1, :, start:stop].to(device="cpu", dtype=torch.bfloat16).contiguous()

        pairs = {index: kv_cache.layer(cache, index) for index in self.kept}
        return PromptCache({index: (copy(keys), copy(values)) for index, (keys, values) in pairs.items()})

    def _read(self, key: str) -> PromptCache | None:
        path = self._path(key)
        if path is None or not path.exists():
            return self._memory.get(key)
        with safe_open(path, framework="pt") as file:
            if not self._complete(file.keys()):
                return None
            return PromptCache({i: (file.get_tensor(f"{i}.key"), file.get_tensor(f"{i}.value")) for i in self.kept})

    def _complete(self, names: Sequence[str]) -> bool:
        """Whether a file has all stored layers; it may have been written for another layer map."""
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
        save_atomically(path.parent, lambda folder: save_file(tensors, Path(folder) / path.name), private=True)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"


class PromptRecords:
    """Slow results about one model's prompts, such as drafts, in a JSON file ``name`` beside its prefills.

    In memory where the store has no folder. The store's key tells models and prompts apart.
    """

    def __init__(self, store: PrefillStore, name: str) -> None:
        self._store = store
        self._path = None if store.folder is None else Path(store.folder) / f"{name}.json"
        self._records: dict[str, Any] = self._read()

    def get(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[Any],
        compute: Callable[[list[int]], Sequence[Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """Return the result of each prompt; missing ones are computed, short prompts first, and stored.

        Args:
            prompts: token ids.
            settings: what each result depends on besides; JSON.
            compute: makes the results of some prompts, given by index.
            progress: called with (done, total).
        """
        parts = zip(map(self._store.key, prompts), settings, strict=True)
        keys = [_digest(json.dumps(part)) for part in parts]
        missing = {key: index for index, key in enumerate(keys) if key not in self._records}
        order = sorted(missing.values(), key=lambda index: len(prompts[index]))  # little padding
        for start in range(0, len(order), _RECORDS):
            part = order[start : start + _RECORDS]
            self._add({keys[index]: result for index, result in zip(part, compute(part), strict=True)})
            if progress is not None:
                progress(start + len(part), len(order))
        return [self._records[key] for key in keys]

    def _add(self, records: dict[str, Any]) -> None:
        self._records = self._read() | self._records | records  # other processes may have written meanwhile
        if self._path is not None:
            path, text = self._path, json.dumps(self._records)
            save_atomically(path.parent, lambda folder: (Path(folder) / path.name).write_text(text), private=True)

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        read: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return read


def stack(entries: Sequence[PromptCache], total_layers: int, dtype: torch.dtype, device: torch.device) -> DynamicCache:
    """Join prompt caches to one left-padded batch; layers that are not stored are empty."""
    width = max(next(iter(entry.layers.values()))[0].shape[2] for entry in entries)
    kept = entries[0].layers.keys()
    nothing = torch.empty(len(entries), 0, width, 0, device=device)

    def join(layer: int, side: int) -> Tensor:
        rows = [entry.layers[layer][side] for entry in entries]
        padded = [nn.functional.pad(row, (0, 0, width - row.shape[2], 0)) for row in rows]
        return torch.cat(padded).to(device=device, dtype=dtype)

    return kv_cache.from_layers(
        (join(layer, 0), join(layer, 1)) if layer in kept else (nothing, nothing) for layer in range(total_layers)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
