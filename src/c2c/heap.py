"""How memory is asked for and given back. Only glibc and Linux can be told; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_BLOCK = 2**16  # bytes


def map_blocks() -> bool:
    """Have every block of 64 KiB or more mapped by itself, for the rest of the process: for a server.

    Such a block goes back to the system when it is freed. glibc begins so as well (at 128 KiB), but raises the size to
    that of the largest block it has seen freed: from then on caches of all lengths are cut from a heap, where they
    leave holes between small things that stay, and the server grows although it holds no more than before.

    Returns:
        Whether the library was told.
    """
    return bool(_call("mallopt", _MMAP_THRESHOLD, _BLOCK))


def keep_freed_memory() -> bool:
    """Have what is freed kept for the next step, for the rest of the process: for training.

    Every step frees its gradients and activations and asks for as much again: with the published fuser more than 2 GB,
    which the system hands out page by page. That costs time, most where memory is short; the peak grows a little.

    Returns:
        Whether the library was told.
    """
    never, most = -1, 2**25  # the most that every glibc accepts
    return bool(_call("mallopt", _TRIM_THRESHOLD, never)) and bool(_call("mallopt", _MMAP_THRESHOLD, most))


def ask_for_large_pages() -> None:
    """Have torch ask for pages of 2 MiB for tensors of that size or more, unless the environment says otherwise.

    For training on a CPU, where gigabytes of weights and gradients then leave fewer holes. To be called before the
    first such tensor is made, since torch looks once (``THP_MEM_ALLOC_ENABLE``).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def hand_back() -> bool:
    """Return the holes between smaller blocks to the system.

    Returns:
        Whether anything was handed back.
    """
    return bool(_call("malloc_trim", 0))


def _call(name: str, *given: int) -> Any:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    return function(*given) if function is not None else None
