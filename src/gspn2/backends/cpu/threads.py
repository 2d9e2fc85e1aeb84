"""Threads for kernels that release the GIL.

A pool of this process's own: OpenMP's would abort after a fork, and Numba's may not be used from several
Python threads at once. The caller works too, so that one thread means no thread at all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_local = threading.local()

# Scratch a thread keeps between calls; fresh memory costs a page fault for every 4 KiB.
KEPT_SCRATCH_BYTES = 16 * 1024 * 1024
# Shares of work for each thread, so that a thread the system held up does not hold up the others.
SHARES_A_THREAD = 4


def thread_count() -> int:
    """Threads to use: those PyTorch would use for an operator of its own."""
    return torch.get_num_threads()


def run_tasks(work: Callable[[int, int], None], tasks: int, threads: int) -> None:
    """Call work(first, last) for shares of range(tasks), on up to `threads` threads, and wait.

    The first exception any share raised is raised again.
    """
    threads = min(threads, tasks)
    if threads <= 1:
        if tasks:
            work(0, tasks)
        return
    shares = min(tasks, SHARES_A_THREAD * threads)
    bounds = [tasks * share // shares for share in range(shares + 1)]
    remaining = iter(range(shares))
    hand_out = threading.Lock()

    def take_shares() -> None:
        while True:
            with hand_out:
                share = next(remaining, None)
            if share is None:
                return
            work(bounds[share], bounds[share + 1])

    helpers = [_executor().submit(take_shares) for _ in range(threads - 1)]
    try:
        take_shares()
    finally:
        # A helper still queued behind another caller's work has nothing left to do here.
        for helper in helpers:
            helper.cancel()
        errors = [helper.exception() for helper in helpers if not helper.cancelled()]
    for error in errors:
        if error is not None:
            raise error


def scratch(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory of the calling thread's own, valid until its next call."""
    size = elements * dtype.itemsize
    kept: torch.Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        _local.scratch = kept if size <= KEPT_SCRATCH_BYTES else None
    return kept


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            workers = max(1, (os.cpu_count() or 1) - 1)
            _pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="gspn2")
        return _pool


def _forget_after_fork() -> None:
    """In a forked child no thread of the pool lives, and the lock may have been held."""
    global _pool, _lock
    _lock = threading.Lock()
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
