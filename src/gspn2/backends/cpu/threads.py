"""Threads for kernels that release the GIL.

Where PyTorch brings GNU OpenMP, shares of work run on its threads: between two operators they spin for a
while in wait of the next, and other threads beside them would have to share their cores. Elsewhere, and in a
forked child, where OpenMP must not be used again, they run on a pool of this module. Numba's own threads are
no choice: its portable layer may not be used from several Python threads at once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_local = threading.local()

# Scratch a thread keeps between calls; fresh memory costs a page fault for every 4 KiB.
KEPT_SCRATCH_BYTES = 64 * 1024 * 1024
# Shares of work for each thread, so that a thread the system held up does not hold up the others.
SHARES_A_THREAD = 4

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _open_mp() -> Any:
    """GOMP_parallel(body, data, threads, flags) of the library PyTorch has loaded, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, none, or Windows
        return None
    parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_parallel = _open_mp()


def thread_count() -> int:
    """Threads to use: those PyTorch would use for an operator of its own."""
    return torch.get_num_threads()


def run_tasks(work: Callable[[int, int, int], None], tasks: int, threads: int, scratch_bytes: int) -> None:
    """Call work(scratch, first, last) for shares of range(tasks), on up to `threads` threads, and wait.

    `scratch` is the address of `scratch_bytes` bytes that nobody else uses during the call. The first
    exception any share raised is raised again.
    """
    threads = min(threads, tasks)
    if threads == 0:
        return
    # Threads start on a cache line of their own, two in case the processor fetches in pairs.
    stride = -(-scratch_bytes // 128) * 128
    memory = _scratch(threads * stride + 128)
    start = -(-memory.data_ptr() // 128) * 128
    if threads == 1:
        work(start, 0, tasks)
        return
    shares = min(tasks, SHARES_A_THREAD * threads)
    bounds = [tasks * share // shares for share in range(shares + 1)]
    remaining, slots = iter(range(shares)), iter(range(threads))
    hand_out = threading.Lock()
    errors: list[BaseException] = []

    def take_shares(_: object = None) -> None:
        try:
            with hand_out:
                slot = next(slots, None)
            while slot is not None and not errors:
                with hand_out:
                    share = next(remaining, None)
                if share is None:
                    return
                work(start + slot * stride, bounds[share], bounds[share + 1])
        except BaseException as error:  # nothing may be raised through OpenMP, not even Ctrl-C
            errors.append(error)

    if _parallel is not None:
        _parallel(_Body(take_shares), None, threads, 0)
        take_shares()  # what a region of fewer threads than asked for has left
    else:
        helpers = [_executor().submit(take_shares) for _ in range(threads - 1)]
        take_shares()
        for helper in helpers:
            _wait(helper, errors)
    if errors:
        raise errors[0]


def _wait(helper: Future[None], errors: list[BaseException]) -> None:
    """Until it has ended, even if Ctrl-C comes meanwhile: it may be writing where memory would be freed."""
    # One still queued behind another caller's work has nothing left to do here.
    while not helper.cancel() and not helper.done():
        try:
            helper.result()
        except BaseException as error:
            errors.append(error)


def _scratch(size: int) -> torch.Tensor:
    """Uninitialized memory of the calling thread's own, valid until its next call."""
    kept: torch.Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
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
    """In a forked child no thread of either pool lives, and the lock may have been held."""
    global _pool, _lock, _parallel
    _lock = threading.Lock()
    _pool = None
    _parallel = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
