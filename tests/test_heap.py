"""The C library is told what to do with freed memory; each test in a process of its own, which it is told for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from c2c import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE_PAGES = _SETTING.read_text() if _SETTING.exists() else "[never]"

TOOLS = """
import ctypes, os
from c2c import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def taken(size, count):
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    return blocks

def rss():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def left(size, count, freed_before=0):
    "Share of freed blocks that the process still has; every other block stays, so that holes do not join."
    if freed_before:  # from here on glibc by itself takes blocks of this size from its heap
        libc.free(taken(freed_before, 1)[0])
    blocks = taken(size, 2 * count)
    before = rss()
    for block in blocks[::2]:
        libc.free(block)
    return 1 - (before - rss()) / (size * count)
"""


def run(code: str) -> list[str]:
    # without what a training run in an earlier test has asked for
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", TOOLS + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def test_mapped_blocks_go_back_when_they_are_freed():
    code = "print(left(200_000, 500, freed_before=8_000_000))"
    assert float(run(code)[0]) > 0.9  # what glibc does by itself
    told, share = run("print(heap.map_blocks(), left(200_000, 500, freed_before=8_000_000))")
    assert told == "True"
    assert float(share) < 0.1


def test_holes_between_smaller_blocks_are_handed_back():
    code = "heap.map_blocks(); kept = left(60_000, 1000); before = rss()\nprint(kept, heap.hand_back(), before - rss())"
    kept, handed, less = run(code)
    assert float(kept) > 0.9
    assert handed == "True"
    assert int(less) > 60_000 * 1000 / 2


def test_memory_that_a_step_frees_serves_the_next():
    code = """
import resource, torch
heap.keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(1024, 1024) for _ in range(50)]
    del gradients
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(50 * 4 * 1024**2 // resource.getpagesize())
"""
    *faults, pages = map(int, run(code))
    assert faults[0] > pages / 2
    assert faults[-1] < pages / 100


@pytest.mark.skipif("[never]" in LARGE_PAGES, reason="this system gives no large pages")
def test_large_tensors_lie_on_large_pages():
    code = """
import torch
tensors = [torch.ones(1024, 1024) for _ in range(50)]
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
    kilobytes = int(run("heap.ask_for_large_pages()" + code)[0])
    assert kilobytes > 50 * 4 * 1024 / 4  # of a block that begins within a page its two ends have small ones
    if "[madvise]" in LARGE_PAGES:
        assert int(run(code)[0]) < kilobytes / 4


def test_the_environment_has_the_last_word_on_large_pages(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    heap.ask_for_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
