"""`keep_hidden`: states that forward leaves for backward: the operator, and the kernels by the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gspn2
from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.memory import Memory
from cuda_emulator.problems import BF16, FP16, Small, truth
from gspn2.backends import DIRECTIONS, Problem, reference
from gspn2.backends.cuda import plan, states_sum
from gspn2.backends.cuda.geometry import Case as Call
from gspn2.backends.cuda.geometry import Device, Plan, View
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import pixels_backward, planes_backward, planes_backward_pieces
from gspn2.backends.keeping import empty_states, states_of
from gspn2.ops import keeping
from helpers import INPUTS, Case, assert_close, assert_same_bits, make_case, max_error, relative_l2, run
from test_vectors import VECTORS, load

ALL = [DIRECTIONS.index(name) for name in DIRECTIONS]


def propagate(*inputs: Tensor, **options: Any) -> Tensor:
    return gspn2.propagate(*inputs, **options, keep_hidden=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Keeps states on the CPU, too, where nobody reads them; the shapes of those that reach backward."""
    shapes: list[tuple[int, ...]] = []
    original = reference.propagate_backward

    def backward(*arguments: Any) -> Any:
        if arguments[7] is not None:
            shapes.append(tuple(arguments[7].shape))
        return original(*arguments)

    monkeypatch.setattr(keeping, "_pays", lambda *_: True)
    monkeypatch.setattr(reference, "propagate_backward", backward)
    torch._dynamo.reset()
    return shapes


# The operator


def test_changes_nothing_on_the_cpu(backend: str) -> None:
    case = make_case(2, 4, 5, 6, groups=2, chunk=3)
    assert_same_bits(run(case, propagate, backend=backend), run(case, backend=backend))


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool, backend: str) -> None:
    case = make_case(2, 2, 3, 4, groups=2, lam=optional, gate=optional)
    inputs = [None if t is None else t.requires_grad_() for t in (case.x, case.logits, case.lam, case.gate)]
    torch.library.opcheck(torch.ops.gspn2.propagate_keeping, (*inputs, ALL, 2, True, backend))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fakes_predict_shapes_and_strides(format: torch.memory_format, backend: str) -> None:
    case = make_case(2, 4, 5, 6, dtype=torch.bfloat16)
    inputs = (case.x.contiguous(memory_format=format), case.logits, case.lam, case.gate)
    real = torch.ops.gspn2.propagate_keeping(*inputs, ALL, 0, True, backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        fake = torch.ops.gspn2.propagate_keeping(*fakes, ALL, 0, True, backend)
    for mine, predicted in zip(real, fake, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (
            predicted.shape,
            predicted.stride(),
            predicted.dtype,
        )
    assert real[1].stride(2 if format == torch.channels_last else 4) == 1


@pytest.mark.parametrize("path", VECTORS[::3], ids=lambda path: path.stem)
def test_states_and_gradients_of_the_vectors(path: Any, kept: list[tuple[int, ...]], backend: str) -> None:
    case, expected = load(path)
    assert_close(run(case, propagate, backend=backend), expected, 1e-12)
    _, h = torch.ops.gspn2.propagate_keeping(
        *(case.x, case.logits, case.lam, case.gate),
        *([DIRECTIONS.index(name) for name in case.directions], case.chunk or 0, True, backend),
    )
    assert max_error((h if case.gate is None else h * case.gate).sum(1), expected["y"]) <= 1e-12
    assert kept == [tuple(h.shape)] * (backend == "reference")


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_is_handed_the_states(compiled: bool, kept: list[tuple[int, ...]]) -> None:
    case = make_case(2, 4, 5, 6, groups=2, chunk=3)
    function = torch.compile(propagate, fullgraph=True, backend="aot_eager") if compiled else propagate
    options = {"directions": DIRECTIONS, "chunk": 3, "backend": "reference"}
    found = run(case, lambda directions, chunk, **inputs: function(*inputs.values(), **options))
    assert_same_bits(found, run(case, backend="reference"))
    assert kept == [(2, 4, 4, 5, 6)]


def test_states_are_kept_for_gradients_only(kept: list[tuple[int, ...]], monkeypatch: Any) -> None:
    calls: list[object] = []
    original = reference.propagate_keeping
    monkeypatch.setattr(reference, "propagate_keeping", lambda *inputs: calls.append(0) or original(*inputs))
    case = make_case()
    inputs = (case.x, case.logits, case.lam, case.gate)
    propagate(*inputs, backend="reference")
    torch.func.vmap(lambda gate: propagate(*inputs[:3], gate, backend="reference"))(case.gate[None])
    with torch.no_grad():
        propagate(case.x.requires_grad_(), *inputs[1:], backend="reference")
    assert not calls
    propagate(*inputs, backend="reference")
    assert len(calls) == 1


def test_under_torch_func(kept: list[tuple[int, ...]]) -> None:
    case = make_case(3, 2, 3, 4, chunk=2)

    def alone(*inputs: Tensor) -> Tensor:
        return propagate(*(tensor.unsqueeze(0) for tensor in inputs), chunk=2, backend="reference")[0]

    def loss(dy: Tensor, *inputs: Tensor) -> Tensor:
        return (alone(*inputs) * dy).sum()

    inputs = tuple(case.tensors().values())
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(1, 2, 3, 4)))(case.dy, *inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.func.vmap(alone)(*leaves).backward(case.dy)
    assert kept == [(3, 4, 2, 3, 4)] * 2
    expected = run(case, backend="reference")
    for name, gradient, leaf in zip(INPUTS, per_sample, leaves, strict=True):
        assert max_error(gradient, expected[f"d{name}"]) <= 1e-12
        assert max_error(leaf.grad, expected[f"d{name}"]) <= 1e-12


def test_double_backward_is_refused(kept: list[tuple[int, ...]]) -> None:
    case = make_case(1, 2, 3, 4)
    x = case.x.requires_grad_()
    (gradient,) = torch.autograd.grad(propagate(x, case.logits).square().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="second"):
        gradient.square().sum().backward()


def test_layers_and_backbones_hand_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def spy(*inputs: Tensor, keep_hidden: bool, **options: Any) -> Tensor:
        asked.append(keep_hidden)
        return inputs[0]

    monkeypatch.setattr("gspn2.nn.mixer.propagate", spy)
    gspn2.nn.Mixer(8, 2, keep_hidden=True)(torch.zeros(1, 8, 3, 3))
    gspn2.nn.TokenMixer(8, 2, keep_hidden=True)(torch.zeros(1, 9, 8), (3, 3))
    gspn2.nn.Mixer(8, 2)(torch.zeros(1, 8, 3, 3))
    assert asked == [True, True, False]


# The planner


def test_what_the_option_is_for_is_not_planned_without_need() -> None:
    """With states at hand there is no walk forward and no memory for states."""
    for layout, directions, channels, groups in (
        ("planes", DIRECTIONS, 16, 16),
        ("channels", DIRECTIONS, 64, 1),
        ("planes", ("left",), 16, 1),
    ):
        problem = Problem(directions, None, True, 2, channels, groups, 512, 512, BF16, "cuda")
        case = imagined(problem, layout, Device(), backward=True, keep_hidden=True)
        chosen = plan.choose(case)
        hidden = {dict(launch.kernel.defines).get("HAS_HIDDEN") for launch in chosen.launches}
        assert hidden <= {1, None}
        assert 1 in hidden
        without = plan.choose(replace(case, views={n: v for n, v in case.views.items() if n != "y"}))
        assert sum(chosen.scratch) < sum(without.scratch)


def test_scans_are_planned_with_the_alignment_of_their_own_tensors() -> None:
    problem = Problem(DIRECTIONS, None, True, 1, 3, 1, 5, 6, BF16, "cuda")
    case = imagined(problem, "planes", Device())
    states = View.of(torch.empty(1, 4, 3, 5, 6, dtype=BF16, device="meta"))
    found = states_sum.scans(case, states)
    assert [scan.problem.directions for scan in found] == [(name,) for name in DIRECTIONS]
    assert [scan.views["y"].alignment for scan in found] == [128, 4, 8, 4]  # 180 bytes each
    assert all("gate" not in scan.views for scan in found)


# Kernels

emulated = pytest.mark.skipif(
    compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux"
)

TOLERANCE = {torch.float32: (3e-6, 3e-6), BF16: (2.5e-3, 1.02 * 2**-8), FP16: (4e-4, 1.02 * 2**-11)}
"""Relative in L2, and at most, of one rounding."""


def cut(case: Call, vertical: tuple[int, bool], horizontal: tuple[int, int, int]) -> Plan:
    """Planes: blocks of a line and whether clusters sum over channels; blocks, bytes of a piece, tiles."""
    choice: dict[str, Any] = {}
    for name in case.problem.directions:
        if name in ("down", "up"):
            cuts = planes_backward.cuts(case, name)
            choice[name] = next(it for it in cuts if (it.strips, it.together > 1) == vertical)
        else:
            (walk,) = planes_backward.walks(case, name)
            pieces = planes_backward_pieces.pieces(case, walk)
            choice[name] = (next(it for it in pieces if (it.strips, it.piece, it.buffers) == horizontal),)
    return planes_backward.plan(case, choice)


def split(case: Call) -> Plan:
    """Pixels: a line over several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels_backward, "SHORTEST_SPLIT", 16)
        tiling = pixels_backward.tiling_of(case)
    assert tiling is not None
    assert tiling.splits > 1
    return pixels_backward.plan(case, tiling)


PACKED = "channel_innermost"
KERNELS: dict[str, tuple[Small, Callable[[Call], Plan]]] = {
    "planes, shared taps": (
        Small(66, 136, channels=3, chunk=20, directions=("down", "right"), dtype=BF16),
        lambda case: cut(case, (2, True), (2, 64, 2)),
    ),
    "planes, taps of their own": (
        Small(17, 40, channels=2, groups=2, directions=("left", "up"), lam=False),
        lambda case: cut(case, (1, False), (1, 32, 1)),
    ),
    "pixels, shared taps": (
        Small(33, 21, channels=16, groups=2, chunk=13, layout=PACKED, dtype=BF16),
        plan.variants()["pixels"].plan,
    ),
    "pixels, taps of their own": (
        Small(33, 40, channels=4, groups=4, directions=("up", "down"), layout="channels_last"),
        split,
    ),
    "generic": (
        Small(9, 12, channels=6, groups=2, chunk=5, layout="transposed", dtype=FP16),
        plan.variants()["generic"].plan,
    ),
}


@emulated
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.usefixtures("threads")
def test_backward_from_kept_states(name: str) -> None:
    """The reference's gradients, but for a state that was rounded once in those of taps and gate."""
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    small, make = KERNELS[name]
    case = small.case()
    problem = small.problem(case)
    wide = case.to(torch.float64)
    exact = states_of(
        reference.propagate, wide.x, wide.logits, wide.lam, replace(problem, dtype=wide.x.dtype)
    )
    h = empty_states(case.x, len(small.directions)).copy_(exact)
    call, tensors = case_of(
        Inputs(case.x, case.logits, case.lam, case.gate, case.dy, small.needs, h), problem, small.device
    )
    planned = make(call)
    assert 1 in {dict(launch.kernel.defines).get("HAS_HIDDEN") for launch in planned.launches}
    found = []
    for seed in (0, 7):
        run_plan(planned, problem, tensors, seed, small.device)
        found.append({n: tensor.clone() for n, tensor in tensors.items()})
    l2, largest = TOLERANCE[small.dtype]
    for key, right in truth(case, problem).items():
        if key == "y":
            continue
        roundings = 2 if key in ("dtaps", "dgate") else 1
        assert max_error(found[0][key], right) <= roundings * largest, key
        assert relative_l2(found[0][key], right) <= roundings * l2, key
        assert all(torch.equal(a[key], b[key]) for a, b in pairwise(found)), f"{key}: order of threads"


@emulated
@pytest.mark.parametrize(
    ("shape", "dtype", "last", "gate"),
    [
        ((2, 3, 5, 8), BF16, False, True),
        ((1, 12, 9, 11), torch.float32, True, False),
        ((2, 3, 40, 33), FP16, False, True),
    ],
)
def test_sum_of_states(shape: tuple[int, ...], dtype: torch.dtype, last: bool, gate: bool) -> None:
    """y from states, in vectors along either axis and element by element."""
    case: Case = make_case(*shape, dtype=dtype, gate=gate)
    x = case.x.contiguous(memory_format=torch.channels_last) if last else case.x
    h = empty_states(x, 4).copy_(torch.randn(shape[0], 4, *shape[1:]))
    tensors = {"x": h, "y": torch.empty_like(x).fill_(torch.nan)}
    if case.gate is not None:
        tensors["gate"] = case.gate
    problem = replace(Problem.of(x, case.logits, DIRECTIONS, None, True), device="cuda")
    views = {name: View.of(tensor) for name, tensor in Memory(tensors, outputs=set()).tensors.items()}
    run_plan(states_sum.plan(Call(problem, Device(), views)), problem, tensors)
    exact = (h.double() if case.gate is None else h.double() * case.gate.double()).sum(1)
    assert max_error(tensors["y"], exact) <= TOLERANCE[dtype][1]
