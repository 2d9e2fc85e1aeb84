"""Fixtures that several tests share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch is loaded, here and in the processes that tests start: threads that wait for each other give
# their core to the tests beside them instead of turning on it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from helpers import CPU_BACKENDS, make_case, run
from kept import kept_folder


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU, by name."""
    return request.param


def pytest_collection_finish(session: pytest.Session) -> None:
    """Workers of xdist share out the compilation of the CPU kernels, in place of each doing all of it."""
    worker, count = (os.environ.get(f"PYTEST_XDIST_{name}", "") for name in ("WORKER", "WORKER_COUNT"))
    wanted = any("backend" in getattr(item, "fixturenames", ()) for item in session.items)
    if not worker or not wanted or sys.platform == "win32":
        return
    import fcntl

    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    first = int(worker.removeprefix("gw")) * len(dtypes) // int(count)
    for dtype in dtypes[first:] + dtypes[:first]:
        # What is wrong with a kernel the tests tell better.
        with (kept_folder() / f"{dtype}.lock").open("w") as lock, contextlib.suppress(Exception):
            fcntl.flock(lock, fcntl.LOCK_EX)
            run(make_case(1, 1, 1, 1, dtype=dtype), backend="cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty starts as NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "torch.empty is not poisoned"
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def device_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers share a GPU: what PyTorch keeps for a worker's next test others may need for a large one."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as those of tests only get slower on more, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders of noisy images."""
    from training_helpers import make_images

    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate's state belongs to the process; precision may change between tests."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
