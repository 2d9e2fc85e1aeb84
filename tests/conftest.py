"""Fixtures that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch is loaded, here and in the processes that tests start: threads that wait for each other give
# their core to the tests beside them instead of turning on it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from helpers import CPU_BACKENDS


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU, by name."""
    return request.param


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
