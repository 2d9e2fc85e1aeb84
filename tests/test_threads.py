"""The same bits on every run and every number of threads, beside other threads and in forked processes."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gspn2
from gspn2.backends.cpu import threads as cpu_threads
from helpers import LAYOUTS, Case, assert_same_bits, make_case, run, truth

PATIENCE = 60  # seconds until a hang is called one

fork_only = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available(),
    reason="this system cannot fork, or has a GPU, where PyTorch refuses autograd in a forked child",
)


def big(backend: str, seed: int = 0) -> Case:
    """Large enough for a kernel to share out between threads; the reference, which is slow, gets less."""
    size = 24 if backend == "reference" else 96
    return make_case(2, 4, size, size + 3, groups=2, chunk=17, dtype=torch.float32, seed=seed)


# Repeatability


def thread_counts(backend: str) -> tuple[int, ...]:
    """Numbers of threads between which not a bit may change.

    A kernel owes that; the reference inherits from torch.softmax that the count decides which elements go
    through vector instructions and which through scalar ones.
    """
    return (2, 2, 2) if backend == "reference" else (1, 2, 3, 8, 2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_on_every_run(dtype: torch.dtype, layout: str, backend: str) -> None:
    """Forward and backward, also when the number of threads changes: no sum depends on who came first."""
    assert_repeats(LAYOUTS[layout](big(backend).to(dtype)), backend)


@pytest.mark.parametrize("shape", [(1, 1, 200, 3), (1, 1, 3, 200), (16, 1, 9, 9), (1, 32, 9, 9)])
@pytest.mark.usefixtures("threads")
def test_the_same_bits_however_work_is_shared_out(shape: tuple[int, ...], backend: str) -> None:
    """Few and many planes, long and short lines: the ways a kernel may split a problem."""
    assert_repeats(make_case(*shape, dtype=torch.float32), backend)


def assert_repeats(case: Case, backend: str) -> None:
    first, *others = thread_counts(backend)
    torch.set_num_threads(first)
    expected = run(case, backend=backend)
    for count in others:
        torch.set_num_threads(count)
        assert_same_bits(run(case, backend=backend), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("threads")
def test_adding_directions_does_not_warn_of_what_is_not_finite() -> None:
    """Infinities are the caller's business, as they are to PyTorch's own operations."""
    torch.set_num_threads(4)
    case = make_case(1, 1, 9, 9, dtype=torch.float32)
    case.x[0, 0, 4, 4] = torch.inf
    assert_same_bits({"y": run(case)["y"].isnan()}, {"y": truth(case)["y"].isnan()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("threads")
def test_inference_mode_reaches_every_thread(dtype: torch.dtype, backend: str) -> None:
    """The caller's own is no other thread's: few planes, whose directions are added by several."""
    torch.set_num_threads(4)
    case = make_case(1, 2, 20, 23, dtype=dtype)
    expected = run(case, backend=backend)["y"]
    with torch.inference_mode():
        found = gspn2.propagate(**case.tensors(), backend=backend)
    assert found.is_inference()
    assert torch.equal(found, expected)


# Python threads


@pytest.mark.usefixtures("threads")
def test_python_threads_do_not_disturb_each_other(backend: str) -> None:
    """Eight threads, each forward and backward on its own data several times, while the others run."""
    torch.set_num_threads(2)
    cases = [big(backend, seed) for seed in range(8)]
    expected = [run(case, backend=backend) for case in cases]
    start = threading.Barrier(8)
    failures: list[BaseException] = []
    finished: list[int] = []

    def work(index: int) -> None:
        try:
            start.wait(PATIENCE)
            for _ in range(3):
                assert_same_bits(run(cases[index], backend=backend), expected[index])
            finished.append(index)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert not failures, failures
    assert sorted(finished) == list(range(8)), "threads still running: a deadlock"


def test_an_interrupt_waits_for_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a helper still writes: it is raised when nobody uses the caller's memory any more."""
    done: list[int] = []

    class Helper(Future):
        """Is interrupted as soon as it is waited for, and only then does its work."""

        def cancel(self) -> bool:
            return False

        def result(self, timeout: float | None = None) -> None:
            if not done:
                done.append(0)
                raise KeyboardInterrupt
            done.append(1)
            self.set_result(None)

    monkeypatch.setattr(cpu_threads, "_parallel", None)
    monkeypatch.setattr(cpu_threads, "_executor", lambda: SimpleNamespace(submit=lambda _: Helper()))
    with pytest.raises(KeyboardInterrupt):
        cpu_threads.run_tasks(lambda *_: None, tasks=2, threads=2, scratch_bytes=0)
    assert done == [0, 1]


# Forked processes


def in_fork(work: Callable[[], Any]) -> Any:
    """The result of `work()` in a forked child; fails when the child raises, dies or hangs."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            sender.send(work())
        except BaseException as failure:
            sender.send(repr(failure))
            raise

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(PATIENCE), "the forked child hangs"
        result = receiver.recv()
        process.join(PATIENCE)
        assert process.exitcode == 0, f"the forked child ended with {process.exitcode}: {result}"
        return result
    finally:
        if process.is_alive():
            process.kill()


def repeats_in_child(case: Case, expected: dict[str, torch.Tensor], backend: str) -> bool:
    """Whether a forked child finds the same bits.

    OpenMP, on which torch's own operations run, hangs in a child of a process that used its threads. So the
    reference gets one thread, as DataLoader gives it; and NumPy compares.
    """
    if backend == "reference":
        torch.set_num_threads(1)
    found = run(case, backend=backend)
    bits = {
        name: (tensor.view(torch.uint8).numpy() for tensor in (found[name], expected[name]))
        for name in expected
    }
    return all(np.array_equal(*pair) for pair in bits.values())


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("threads")
def test_forked_where_tasks_are_directions(dtype: torch.dtype) -> None:
    """One image, one group: the adjoint gives every direction to a thread and adds the results afterwards."""
    torch.set_num_threads(2)
    case = make_case(1, 4, 200, 210, dtype=dtype)
    expected = run(case, backend="cpu")
    torch.ones(1 << 20).add_(1)  # PyTorch's threads have been used: they must not be used again in a child
    assert in_fork(lambda: repeats_in_child(case, expected, "cpu")) is True


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_forked_after_the_parent_used_the_operator(backend: str) -> None:
    """The child inherits the memory of a thread pool but none of its threads; so does its own child."""
    case = big(backend)
    torch.set_num_threads(1 if backend == "reference" else 2)
    expected = run(case, backend=backend)

    def same() -> bool:
        return repeats_in_child(case, expected, backend)

    assert in_fork(same) is True
    assert in_fork(lambda: same() and in_fork(same)) is True
    assert_same_bits(run(case, backend=backend), expected)


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_forked_while_another_thread_is_in_the_kernel(backend: str) -> None:
    """A lock of the pool held at the moment of the fork must not stay locked in the child for ever."""
    case = big(backend)
    torch.set_num_threads(1 if backend == "reference" else 2)
    expected = run(case, backend=backend)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            run(case, backend=backend)

    worker = threading.Thread(target=busy, daemon=True)
    worker.start()
    try:
        for _ in range(5):
            assert in_fork(lambda: repeats_in_child(case, expected, backend)) is True
    finally:
        stop.set()
        worker.join(PATIENCE)
    assert not worker.is_alive()


class Propagated(Dataset):
    """A data set that propagates each image on its way, as an augmentation would."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return run(big(self.backend, seed=index), backend=self.backend)["y"]


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_in_forked_data_loader_workers(backend: str) -> None:
    torch.set_num_threads(1 if backend == "reference" else 2)  # see repeats_in_child
    images = Propagated(backend)
    expected = [images[index] for index in range(len(images))]
    loader = DataLoader(
        images, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    for found, mine in zip(loader, expected, strict=True):
        assert torch.equal(found, mine)
