"""What the tests on a GPU share: problems made there, kernels forced, memory poisoned, and whole comparisons.

`GSPN2_TEST_DEVICE=cpu` runs the same tests with the CPU backend, to try the tests themselves without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor

import gspn2
from gspn2.backends import DIRECTIONS
from gspn2.backends.cuda import plan
from gspn2.backends.cuda.geometry import Case as Call
from gspn2.backends.cuda.geometry import Plan
from gspn2.backends.cuda.variants.strips import Layout
from helpers import LAYOUTS, Case, channel_innermost, eager_propagate, eager_scan, run

DEVICE = os.environ.get("GSPN2_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
BACKEND = "cuda" if ON_GPU else "cpu"
VARIANTS = plan.VARIANTS if ON_GPU else ("the only one",)

needs_device = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device")

# 16-bit problems hold numbers that are exact in both types, so that one truth serves both.
PRECISIONS = {"float32": (torch.float32,), "16 bits": (torch.bfloat16, torch.float16)}

Propagate = Callable[..., Tensor]


def one_of(precision: str, number: int) -> tuple[torch.dtype, ...]:
    """One dtype of a precision, another for the next number: each is a kernel to compile."""
    dtypes = PRECISIONS[precision]
    return (dtypes[number % len(dtypes)],)


# Problems


def draw(
    batch: int,
    channels: int,
    height: int,
    width: int,
    groups: int = 1,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
    *,
    precision: str = "float32",
    seed: int = 0,
    lam: bool = True,
    gate: bool = True,
) -> Case:
    """A random problem as `helpers.make_case`, made on the device, of numbers that `precision` can store."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, device=DEVICE)
        return values if precision == "float32" else values.bfloat16().half()

    places, d = (height, width), len(directions)
    return Case(
        x=normal(batch, channels, *places),
        logits=normal(batch, d, groups, 3, *places, scale=2.0),
        lam=normal(batch, d, channels, *places) if lam else None,
        gate=normal(batch, d, channels, *places) if gate else None,
        dy=normal(batch, channels, *places),
        directions=tuple(directions),
        chunk=chunk,
    )


def as_weights(case: Case) -> Case:
    """The problem for `line_scan`: signed weights whose magnitudes sum to less than 1, and no gate."""
    weights = (case.logits.float().tanh() / 3).bfloat16().to(case.x.dtype)
    return replace(case, logits=weights, gate=None)


def line_scan(
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None = None,
    *,
    directions: Sequence[str],
    chunk: int | None,
    **options: Any,
) -> Tensor:
    """`gspn2.line_scan` with the arguments of `propagate`."""
    (direction,) = directions
    lam = None if lam is None else lam[:, 0]
    return gspn2.line_scan(x, lam, logits[:, 0], direction=direction, chunk=chunk, **options)


def eager_line_scan(
    x: Tensor, logits: Tensor, lam: Tensor | None = None, *, directions: Sequence[str], chunk: int | None
) -> Tensor:
    """The yardstick of `line_scan`."""
    w = logits[:, 0].repeat_interleave(x.shape[1] // logits.shape[2], dim=1)
    return eager_scan(x if lam is None else lam[:, 0] * x, w, directions[0], chunk)


def suited(variant: str | None, case: Case) -> tuple[Case, Propagate]:
    """The problem and its operator; for a variant that scans one direction, weights as given, one like it."""
    if variant not in ("strips", "strips_vertical", "strips_column"):
        return case, gspn2.propagate
    direction = "down" if variant == "strips_vertical" else "right"
    lam = None if case.lam is None else case.lam[:, :1]
    return as_weights(replace(case, logits=case.logits[:, :1], lam=lam, directions=(direction,))), line_scan


# Layouts beyond those of `helpers`


def misaligned(case: Case) -> Case:
    """Planes that start one element after an aligned address."""
    return case.map(lambda t: t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t))


def cropped(case: Case) -> Case:
    """Windows of larger planes, with NaN around: rows start at no aligned address."""

    def crop(tensor: Tensor) -> Tensor:
        height, width = tensor.shape[-2:]
        field = tensor.new_full((*tensor.shape[:-2], height + 3, width + 5), torch.nan)
        window = field[..., 2 : 2 + height, 3 : 3 + width]
        return window.copy_(tensor)

    return case.map(crop)


def aligned_crop(case: Case) -> Case:
    """Windows of larger planes whose rows all start at aligned addresses."""

    def crop(tensor: Tensor) -> Tensor:
        height, width = tensor.shape[-2:]
        field = tensor.new_full((*tensor.shape[:-2], height + 1, -(-width // 64) * 64 + 64), torch.nan)
        return field[..., :height, :width].copy_(tensor)

    return case.map(crop)


def transposed(case: Case) -> Case:
    """Planes stored column by column."""
    return case.map(lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1))


def channels_last(case: Case) -> Case:
    """Every tensor on its own, all that is not a place innermost."""
    return case.map(lambda t: t.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1)))


def packed_odd(case: Case) -> Case:
    """Channel-innermost views into a packed tensor whose pixels are an odd number of elements apart."""
    tensors = (*case.tensors().values(), case.dy)
    spare = 1 + sum(t.shape[1:-2].numel() for t in tensors) % 2
    batch, _, height, width = case.x.shape
    before = case.x.new_full((batch, spare, height, width), torch.nan)
    packed = channel_innermost(replace(case, x=torch.cat((before, case.x), 1)))
    return replace(packed, x=packed.x[:, spare:])


def loose(case: Case) -> Case:
    """Planes in which axes of one element have strides that mean nothing."""

    def loosen(t: Tensor) -> Tensor:
        strides = [step if size > 1 else 7919 for size, step in zip(t.shape, t.stride(), strict=True)]
        return t.as_strided(t.shape, strides)

    return case.map(Tensor.contiguous).map(loosen)


def records(case: Case) -> Case:
    """As `gspn2.nn.Mixer` has them: x channels innermost; lam, gate and logits views of one packed tensor."""
    named = {name: t for name in ("lam", "gate", "logits") if (t := getattr(case, name)) is not None}
    flat = {name: t.movedim((-2, -1), (1, 2)).flatten(3) for name, t in named.items()}
    packed = torch.cat(list(flat.values()), dim=3)
    parts = packed.split([t.shape[3] for t in flat.values()], dim=3)
    views = {
        name: part.unflatten(3, named[name].shape[1:-2]).movedim((1, 2), (-2, -1))
        for name, part in zip(flat, parts, strict=True)
    }
    return replace(channels_last(case), **views)


MAIN_LAYOUTS = (*LAYOUTS, "records")
ALL_LAYOUTS: dict[str, Callable[[Case], Case]] = LAYOUTS | {
    layout.__name__: layout
    for layout in (misaligned, cropped, aligned_crop, transposed, channels_last, packed_odd, loose, records)
}


# Kernels and memory


@pytest.fixture
def device_given_back() -> Iterator[None]:
    """After an illegal access a process can do nothing more: it ends, and pytest-xdist begins another."""
    yield
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"the device is lost: {error}", returncode=3)


def any_strips(case: Call) -> Layout | None:
    """Strips of planes of any size: the last planes cut as on a small GPU, where there are enough."""
    from gspn2.backends.cuda.variants import strips

    small = replace(case, device=replace(case.device, multiprocessors=14))
    cut = (layout for layout in strips.layouts(small) if layout.cut)
    return next(cut, None) or next(strips.layouts(case), None)


@contextmanager
def able(variant: str | None) -> Iterator[None]:
    """A variant for large images takes whatever it can run, whether others are faster or not."""
    from gspn2.backends.cuda.variants import planes_tiles, strips, strips_column, strips_vertical, tiles

    with pytest.MonkeyPatch.context() as patch:
        if variant == "tiles":
            patch.setattr(tiles, "slower", lambda case: None)
        if variant == "planes_tiles":
            patch.setattr(planes_tiles, "why_not", planes_tiles.cannot)
        if variant == "strips":
            patch.setattr(strips, "best_layout", any_strips)
        if variant == "strips_vertical":
            layouts = strips_vertical.layouts
            patch.setattr(strips_vertical, "best_layout", lambda case: next(layouts(case), None))
        if variant == "strips_column":
            patch.setattr(strips_column, "slower", lambda case: False)
        yield


class Declined(Exception):
    """The variant does not take this pass of the case."""


@contextmanager
def forced(variant: str | None, strictly: bool = False) -> Iterator[dict[str, str]]:
    """Every pass that `variant` takes runs on it, others as usual; None forces nothing.

    Yields which variant ran "forward" and "backward", filled in as they run. Strictly, a pass that it does
    not take raises `Declined`.
    """
    ran: dict[str, str] = {}
    if not ON_GPU:
        yield dict.fromkeys(("forward", "backward"), VARIANTS[0])
        return
    from gspn2.backends.cuda import launch  # here, because it needs CUDA's bindings

    def choose(case: Call) -> Plan:
        takes = variant is not None and plan.variants()[variant].why_not(case) is None
        if strictly and not takes:
            raise Declined
        chosen = plan.choose(case, variant if takes else None)
        ran["backward" if case.backward else "forward"] = chosen.variant
        return chosen

    with pytest.MonkeyPatch.context() as patch, able(variant):
        patch.setattr(launch, "choose", choose)
        patch.setattr(launch, "_ready", {})  # calls planned before, by other choices
        yield ran


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty starts as NaN, so that an element nobody wrote shows."""
    deterministic = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def run_variant(
    variant: str | None, case: Case, propagate: Propagate = gspn2.propagate
) -> dict[str, Tensor] | None:
    """y and the gradients by this variant in poisoned memory; None when it takes neither pass."""
    with forced(variant) as ran, poisoned():
        try:
            found = run(case, propagate, backend=BACKEND)
        except Exception as error:
            raise AssertionError(f"{variant}: {type(error).__name__}: {error}") from error
    return found if variant is None or variant in ran.values() else None


# Comparisons


def truth(case: Case, propagate: Propagate = gspn2.propagate) -> dict[str, Tensor]:
    """The reference in float64, on the device."""
    return run(case.to(torch.float64), propagate, backend="reference")


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By name the relative L2 error, and the largest error relative to the largest value.

    Computed on the device and fetched at once.
    """
    measures = []
    for name, exact in expected.items():
        if exact.numel() == 0:
            measures += [exact.new_zeros(())] * 2
            continue
        wrong = found[name].double() - exact
        size, top = torch.linalg.vector_norm(exact), exact.abs().amax()
        measures += [torch.linalg.vector_norm(wrong) / torch.where(size > 0, size, 1)]
        measures += [wrong.abs().amax() / torch.where(top > 0, top, 1)]
    values = iter(torch.stack(measures).tolist())
    return dict(zip(expected, zip(values, values, strict=True), strict=True))


def faults(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    eager: dict[str, tuple[float, float]],
    like: Case,
) -> list[str]:
    """What is wrong with results: names, shapes, types, errors of more than twice those of eager PyTorch.

    Never below the dtype's epsilon, twice the error that rounding the exact result could make; the largest
    error of float32, where sums round too, never below a few. Where eager PyTorch overflows, as float16 does
    in the derivative of a quotient, its error counts as epsilon.
    """
    if found.keys() != expected.keys():
        return [f"results {sorted(found)} instead of {sorted(expected)}"]
    wrong = [
        f"{name}: {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape or tensor.dtype != like.x.dtype
    ]
    if wrong:
        return wrong
    epsilon = torch.finfo(like.x.dtype).eps
    least = {"L2": epsilon, "largest": epsilon * (8 if like.x.dtype == torch.float32 else 1)}
    for name, measured in errors(found, expected).items():
        for measure, error, yardstick in zip(least, measured, eager[name], strict=True):
            allowed = 2 * yardstick if isfinite(yardstick) else 2 * epsilon
            if not error <= max(allowed, least[measure]):  # true for NaN
                wrong.append(f"{name}: {measure} error {error:.3g}, eager PyTorch {yardstick:.3g}")
    return wrong


def eager_errors(
    case: Case, expected: dict[str, Tensor], eager: Propagate = eager_propagate
) -> dict[str, tuple[float, float]]:
    """The yardstick: `errors` of the same maths by eager PyTorch in the dtype of the case."""
    return errors(run(case, eager), expected)


def assert_accurate(
    case: Case,
    precision: str,
    layouts: Sequence[str] = MAIN_LAYOUTS,
    propagate: Propagate = gspn2.propagate,
    eager: Propagate = eager_propagate,
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    """Every variant that takes the problem, layout and dtype, against the truth and eager PyTorch.

    `dtypes` are those of `precision`, unless given.
    """
    expected = truth(case, propagate)
    wrong: list[str] = []
    for dtype in dtypes or PRECISIONS[precision]:
        posed = case.to(dtype)
        yardstick = eager_errors(posed, expected, eager)
        for layout in layouts:
            laid = ALL_LAYOUTS[layout](posed)
            for variant in VARIANTS:
                found = run_variant(variant, laid, propagate)
                if found is not None:
                    where = f"{variant}, {layout}, {dtype}"
                    wrong += [f"{where}: {fault}" for fault in faults(found, expected, yardstick, posed)]
    assert not wrong, "\n".join(wrong)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    """On the device, does any bit of any tensor differ?"""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [
            (tensor.view(whole[tensor.itemsize]) != expected[name].view(whole[tensor.itemsize])).any()
            for name, tensor in found.items()
        ]
    ).any()
