"""The table of backends: which runs, why the others do not, and that nothing slow happens silently."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gspn2
from gspn2 import backends
from gspn2.backends import BACKENDS, DIRECTIONS, Problem
from helpers import CPU_BACKENDS, make_case, reason_against

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_native_backend_takes_every_cpu_problem(
    chunk: int | None, groups: int, dtype: torch.dtype
) -> None:
    """Without this, a kernel that declined everything would leave the other tests green and empty."""
    case = make_case(2, 4, 5, 6, groups, chunk=chunk, dtype=dtype)
    assert reason_against("cpu", case) is None
    assert "cpu" in CPU_BACKENDS


def test_the_reference_takes_everything_and_comes_last() -> None:
    assert list(BACKENDS)[-1] == "reference"
    problem = Problem(DIRECTIONS, None, True, 1, 1, 1, 2, 2, torch.float64, "meta")
    assert BACKENDS["reference"].why_not(problem) is None


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_its_functions_and_gives_reasons(name: str) -> None:
    backend = BACKENDS[name]
    problem = Problem(DIRECTIONS, None, True, 1, 1, 1, 2, 2, torch.float32, "cpu")
    for device in ("cpu", "cuda", "mps", "meta"):
        reason = backend.why_not(replace(problem, device=device))
        assert reason is None or (isinstance(reason, str) and reason)
        if reason is None:
            assert callable(backend.propagate)
            assert callable(backend.propagate_keeping)
            assert callable(backend.propagate_backward)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a backend that declines everything with a sentence, and the reference."""
    declining = SimpleNamespace(why_not=lambda problem: f"takes no {problem.dtype} on weekdays")
    monkeypatch.setattr(backends, "BACKENDS", {"picky": declining, "reference": BACKENDS["reference"]})
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("picky")
def test_a_backend_asked_for_raises_with_its_reason() -> None:
    case = make_case(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"backend='picky'.*takes no torch.float32 on weekdays"):
        gspn2.propagate(**case.tensors(), backend="picky")


@pytest.mark.usefixtures("picky")
def test_the_slow_path_is_announced_once_with_the_reasons() -> None:
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="slow reference.*picky: takes no torch.float32 on weekdays"):
        gspn2.propagate(**case.tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gspn2.propagate(**case.tensors())
        gspn2.propagate(**make_case(dtype=torch.float32, height=9).tensors())


@pytest.mark.usefixtures("picky")
def test_asking_for_the_reference_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gspn2.propagate(**make_case().tensors(), backend="reference")


@pytest.mark.usefixtures("picky")
def test_reasons_by_backend() -> None:
    problem = Problem(DIRECTIONS, None, True, 1, 1, 1, 2, 2, torch.float32, "cpu")
    assert backends.why_not(problem) == {"picky": "takes no torch.float32 on weekdays", "reference": None}


def test_backends_are_tried_in_order(backend: str) -> None:
    """The automatic choice is the first in the table that takes the problem, to the bit."""
    case = make_case(dtype=torch.float32)
    if backend == CPU_BACKENDS[0]:
        chosen = gspn2.propagate(**case.tensors())
        assert torch.equal(chosen, gspn2.propagate(**case.tensors(), backend=backend))
    problem = Problem.of(case.x, case.logits, case.directions, None, normalize=True)
    assert backends.select(problem, backend) is BACKENDS[backend]
    assert backends.select(problem) is BACKENDS[CPU_BACKENDS[0]]


def test_kernels_run_where_no_folder_can_be_written_to() -> None:
    """Numba refuses to cache a function that it finds no folder for, as it does one without a file."""
    from gspn2.backends.cpu.jit import cached_jit

    names: dict[str, Any] = {}
    exec("def successor(x):\n    return x + 1", names)
    with pytest.warns(UserWarning, match="compiled in every process.*NUMBA_CACHE_DIR"):
        compiled = cached_jit(names["successor"])
    assert compiled(1) == 2
