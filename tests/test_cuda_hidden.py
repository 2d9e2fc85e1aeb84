"""On a GPU: `keep_hidden` against a float64 reference and eager PyTorch, in every layout that has a path."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gspn2
from cuda_helpers import (
    ALL_LAYOUTS,
    BACKEND,
    DEVICE,
    ON_GPU,
    PRECISIONS,
    assert_accurate,
    device_given_back,  # noqa: F401
    differing,
    draw,
    errors,
    needs_device,
    poisoned,
    truth,
)
from gspn2.backends import DIRECTIONS
from helpers import DIRECTION_SUBSETS, Case, run
from test_vectors import TOLERANCE, VECTORS, load

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("device_given_back")]


def keeping(*inputs: Tensor, **options: Any) -> Tensor:
    return gspn2.propagate(*inputs, **options, keep_hidden=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vectors(dtype: torch.dtype) -> None:
    for path in VECTORS:
        case = load(path)[0].to(dtype).map(lambda tensor: tensor.to(DEVICE))
        expected = truth(case)
        for layout in ("planes", "channel_innermost"):
            with poisoned():
                found = run(ALL_LAYOUTS[layout](case), keeping, backend=BACKEND)
            for name, (error, _) in errors(found, expected).items():
                # In 16 bits states are rounded before y, dlogits and dgate are made from them.
                allowed = (
                    TOLERANCE[dtype] * (1 if name == "y" else 2) * (1 if dtype == torch.float32 else 1.5)
                )
                assert error <= allowed, (path.stem, layout, name)


@pytest.mark.parametrize("chunk", [None, 1, 17])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_variant_and_layout(precision: str, groups: int, chunk: int | None) -> None:
    case = draw(2, 8, 40, 72, groups, chunk=chunk, precision=precision)
    assert_accurate(case, precision, tuple(ALL_LAYOUTS), keeping)


@pytest.mark.parametrize("directions", DIRECTION_SUBSETS, ids="+".join)
def test_directions(directions: tuple[str, ...]) -> None:
    """Also one with a gate, where y is no state."""
    case = draw(1, 16, 24, 32, directions=directions, precision="16 bits")
    assert_accurate(case, "16 bits", ("planes", "records"), keeping)


@pytest.mark.parametrize(("lam", "gate"), [(True, False), (False, True), (False, False)])
def test_what_may_be_missing(lam: bool, gate: bool) -> None:
    case = draw(1, 16, 48, 64, precision="16 bits", lam=lam, gate=gate)
    assert_accurate(case, "16 bits", ("planes", "records"), keeping)


@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 1), (2, 3, 1, 33), (1, 5, 65, 2), (1, 8, 300, 520), (2, 32, 257, 260)]
)
def test_sizes(shape: tuple[int, int, int, int]) -> None:
    case = draw(*shape, precision="16 bits")
    assert_accurate(case, "16 bits", ("planes", "records"), keeping, dtypes=(torch.bfloat16,))


def large(layout: str) -> Case:
    """One whose backward pass reads the states."""
    case = draw(1, 16, 264, 272, precision="16 bits").to(torch.bfloat16)
    return ALL_LAYOUTS[layout](case)


@pytest.mark.parametrize("layout", ["planes", "records"])
def test_repeats_bit_by_bit(layout: str) -> None:
    case = large(layout)
    with poisoned():
        first = run(case, keeping, backend=BACKEND)
        for _ in range(3):
            assert not differing(run(case, keeping, backend=BACKEND), first)


@pytest.mark.parametrize("layout", ["planes", "records"])
def test_compiled_and_through_the_dispatcher(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = large(layout)
    expected = run(case, keeping, backend=BACKEND)
    compiled: Callable[..., Tensor] = torch.compile(keeping, fullgraph=True, backend="aot_eager")
    assert not differing(run(case, compiled, backend=BACKEND), expected)
    monkeypatch.setattr("gspn2.ops.keeping.plain", lambda *_: False)
    assert not differing(run(case, keeping, backend=BACKEND), expected)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs")
def test_cuda_graph() -> None:
    case = large("planes")
    expected = run(case, keeping)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}

    def step() -> tuple[Tensor, ...]:
        y = keeping(**leaves, directions=DIRECTIONS)
        return (y.detach(), *torch.autograd.grad(y, tuple(leaves.values()), case.dy))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert not differing(dict(zip(expected, captured, strict=True)), expected)


@pytest.mark.skipif(not ON_GPU, reason="memory of a GPU")
def test_memory_is_held_until_backward() -> None:
    """D times that of x, and only where a gradient will be asked for."""
    case = large("planes")
    leaf = replace(case, x=case.x.requires_grad_())

    def held(**options: Any) -> int:
        gc.collect()  # what other tests left would go in between
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = keeping(**leaf.tensors(), **options)
        after = torch.cuda.memory_allocated()
        del y
        return after - before

    size = case.x.numel() * case.x.itemsize
    assert 5 * size <= held() < 6 * size
    with torch.no_grad():
        assert held() < 2 * size
