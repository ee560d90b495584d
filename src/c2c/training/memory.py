"""Memory that a training step needs again and again."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, for the rest of the process.

    Every step frees its gradients and activations and asks for as much again: with the published fuser more than 2 GB,
    which the system hands out page by page. That costs time, most where memory is short;
    the peak grows a little. Only glibc can be told; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, -1)  # never hand back
        mallopt(mmap_threshold, 2**25)  # the most that every glibc accepts
