"""On a GPU: repeatability, NaN containment, bounds, streams, and problems of more than 2^31 elements."""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
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
    VARIANTS,
    Propagate,
    as_weights,
    device_given_back,  # noqa: F401
    differing,
    draw,
    eager_errors,
    faults,
    forced,
    line_scan,
    needs_device,
    run_variant,
    suited,
    truth,
)
from gspn2.backends import DIRECTIONS
from helpers import Case, eager_weights, run
from matrix_form import scan_axis

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("device_given_back")]


def results(case: Case, propagate: Propagate = gspn2.propagate) -> dict[str, Tensor]:
    return run(case, propagate, backend=BACKEND)


# Repeatability

REPEATS = 1000 if ON_GPU else 3
REPEATED = {
    "few planes": ("planes", (1, 4, 160, 256), 1, None),
    "clusters of pairs": ("planes", (2, 40, 384, 512), 1, None),
    "many planes": ("planes", (8, 32, 64, 64), 1, None),
    "per channel": ("planes", (4, 8, 96, 128), 8, 40),
    "small": ("planes", (32, 4, 14, 14), 1, None),
    "channels": ("channel_innermost", (2, 64, 40, 48), 1, None),
    "few channels": ("channel_innermost", (16, 2, 56, 56), 1, 20),
    "odd": ("strided", (2, 6, 37, 41), 2, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", REPEATED)
def test_repeats_to_the_bit(name: str, variant: str, dtype: torch.dtype) -> None:
    """Forward and backward, half of the time beside other work that disturbs the order in which blocks run.

    Compared on the device, so that calls follow each other without a pause.
    """
    layout, (batch, channels, height, width), groups, chunk = REPEATED[name]
    if variant == "generic":  # slow, and the same for every size
        height, width = min(height, 24), min(width, 40)
    case = draw(batch, channels, height, width, groups, chunk=chunk, precision="16 bits").to(dtype)
    case, propagate = suited(variant, ALL_LAYOUTS[layout](case))
    with forced(variant) as ran:
        first = results(case, propagate)
        if variant not in ran.values():
            pytest.skip(f"{variant} takes neither pass")
        disturbance = Disturbance()
        different = differing(first, first).long()
        for count in range(REPEATS - 1):
            if count % 4 == 1:
                disturbance.start()
            different += differing(results(case, propagate), first)
    assert different.item() == 0


class Disturbance:
    """Copies of half a wave of blocks and more on a stream of their own, for some tens of microseconds."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if ON_GPU else None
        self.source, self.target = torch.zeros(2, 2**24, device=DEVICE)
        if ON_GPU:
            # The other stream waits for nobody: this memory may be scratch of calls that are still to run.
            torch.cuda.synchronize()

    def start(self) -> None:
        with torch.cuda.stream(self.stream):
            self.target.copy_(self.source)


@pytest.mark.skipif(not ON_GPU, reason="streams are the GPU's")
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_streams_at_once(variant: str) -> None:
    """Two problems in flight together get the results that each gets alone: no scratch memory is shared."""
    ran_any = False
    for layout, sizes in (
        ("planes", ((1, 8, 200, 256), (2, 8, 128, 200))),
        ("channel_innermost", ((1, 64, 64, 64), (2, 32, 64, 96))),
        ("planes", ((4, 8, 14, 14), (4, 8, 14, 16))),
    ):
        cases = [ALL_LAYOUTS[layout](draw(*size, precision="16 bits").to(torch.bfloat16)) for size in sizes]
        propagate = suited(variant, cases[0])[1]
        cases = [suited(variant, case)[0] for case in cases]
        with forced(variant) as ran:
            alone = [results(case, propagate) for case in cases]
            if variant not in ran.values():
                continue
            ran_any = True
            streams = [torch.cuda.Stream(), torch.cuda.Stream()]
            torch.cuda.synchronize()
            different = []
            for _ in range(100):
                for case, stream, expected in zip(cases, streams, alone, strict=True):
                    with torch.cuda.stream(stream):
                        different.append(differing(results(case, propagate), expected))
            torch.cuda.synchronize()
        assert not torch.stack(different).any()
    assert ran_any, f"{variant} takes none of these"


@pytest.mark.parametrize("layout", ["planes", "channel_innermost"])
def test_nothing_that_came_in_is_changed(layout: str) -> None:
    case = ALL_LAYOUTS[layout](draw(2, 8, 40, 72, 2, precision="16 bits").to(torch.bfloat16))
    before = case.map(torch.clone)
    for variant in VARIANTS:
        run_variant(variant, case)
        now, then = case.tensors() | {"dy": case.dy}, before.tensors() | {"dy": before.dy}
        assert not differing(now, then), variant


@pytest.mark.parametrize("layout", ["planes", "channel_innermost"])
def test_empty_batch(layout: str) -> None:
    case = draw(1, 8, 16, 24).map(lambda tensor: tensor[:0])
    if layout == "channel_innermost":
        case = ALL_LAYOUTS["channels_last"](case)
    for name, tensor in results(case).items():
        given = case.x if name == "y" else getattr(case, name[1:])
        assert tensor.shape == given.shape, name
        assert tensor.dtype == given.dtype, name


# Where NaN may go


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", ["x", "logits", "lam", "gate", "dy"])
@pytest.mark.parametrize("layout", ["planes", "channel_innermost", "strided"])
def test_nan_goes_where_the_recurrence_carries_it(layout: str, name: str, chunk: int | None) -> None:
    """y and every gradient are NaN exactly where the reference has NaN.

    Gradients of the taps are not compared on lines where the state restarts, whose taps are not read.
    """
    wrong = []
    for directions in (*((direction,) for direction in DIRECTIONS), DIRECTIONS):
        case = draw(2, 8, 40, 48, 2, directions, chunk, precision="16 bits").to(torch.bfloat16)
        tensor = getattr(case, name)
        tensor[(1, *(size // 2 for size in tensor.shape[1:-2]), 21, 18)] = torch.nan
        expected = {key: t.isnan() for key, t in truth(case).items()}
        assert expected["y"].any() or name == "dy"
        laid = ALL_LAYOUTS[layout](case)
        for variant in VARIANTS:
            found = run_variant(variant, laid)
            for key, t in (found or {}).items():
                stray = t.isnan() != expected[key]
                if key == "dlogits":
                    stray = stray & continued(case)
                if stray.any():
                    wrong.append(f"{variant}, {directions}: {key} at {stray.nonzero()[:3].tolist()}")
    assert not wrong, "\n".join(wrong)


def continued(case: Case) -> Tensor:
    """(D, 1, 1, H, W): the lines of each direction on which the state goes on from the line before."""
    masks = []
    for direction in case.directions:
        axis, first = scan_axis(direction)
        lines = torch.arange(case.x.shape[axis], device=DEVICE)
        goes_on = lines % (case.chunk or len(lines)) != 0
        goes_on = goes_on if first == 0 else goes_on.flip(0)
        goes_on = goes_on[:, None] if axis == -2 else goes_on[None, :]
        masks.append(goes_on.expand(case.x.shape[-2:]))
    return torch.stack(masks)[:, None, None]


@pytest.mark.parametrize("operator", ["propagate", "line_scan"])
@pytest.mark.parametrize("layout", ["planes", "channel_innermost", "strided"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_taps_of_missing_neighbours_may_be_nan(direction: str, layout: str, operator: str) -> None:
    """They change no bit of any result."""
    propagate = gspn2.propagate if operator == "propagate" else line_scan
    case = draw(2, 8, 33, 64, 2, (direction,), precision="16 bits").to(torch.bfloat16)
    case = case if operator == "propagate" else as_weights(case)
    missing = eager_weights(torch.ones_like(case.logits[:, 0]), direction).unsqueeze(1) == 0
    bordered = replace(case, logits=case.logits.masked_fill(missing, torch.nan))
    for variant in VARIANTS:
        expected = run_variant(variant, ALL_LAYOUTS[layout](case), propagate)
        if expected is not None:
            found = run_variant(variant, ALL_LAYOUTS[layout](bordered), propagate)
            assert not differing(found, expected), variant


# Bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["planes", "channel_innermost"])
def test_row_stochastic_taps_never_amplify(layout: str, dtype: torch.dtype) -> None:
    """From the first line alone, max |h| <= max |u_0| on every line, and the last line is reached."""
    for direction in DIRECTIONS:
        axis, first = scan_axis(direction)
        case = draw(2, 8, 128, 160, 1, (direction,), lam=False, gate=False, precision="16 bits").to(dtype)
        start = torch.zeros_like(case.x)
        start.select(axis, first).copy_(case.x.select(axis, first))
        laid = ALL_LAYOUTS[layout](replace(case, x=start))
        for variant in VARIANTS:
            found = run_variant(variant, laid)
            if found is not None:
                h = found["y"].double()
                assert h.abs().max() <= (1 + 64 * torch.finfo(dtype).eps) * start.double().abs().max(), (
                    variant
                )
                assert h.select(axis, -1 - first).any(), f"{variant}: the signal does not reach the last line"


# More than 2^31 elements

SEGMENT = 64
PATCH = 3 * SEGMENT


@dataclass(frozen=True)
class Large:
    """A square image; x, lam, gate and the taps of two directions have more than 2^31 elements each on a GPU.

    In bfloat16 that is 65 to 75 GB with the results.
    """

    channels: int
    groups: int
    side: int


LARGE = {
    # Long lines, which only the general kernel takes; and many channels, for all kernels.
    "a large image": Large(8, 4, 16448) if ON_GPU else Large(4, 2, 320),
    "many channels": Large(2176, 544, 1024) if ON_GPU else Large(16, 4, 256),
}


def large(size: Large, layout: str, directions: tuple[str, str]) -> Case:
    d = len(directions)
    shapes = {
        "x": (size.channels,),
        "logits": (d, size.groups, 3),
        "lam": (d, size.channels),
        "gate": (d, size.channels),
        "dy": (size.channels,),
    }
    places = (size.side, size.side)
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    tensors = {}
    if layout == "planes":
        for name, shape in shapes.items():
            tensors[name] = torch.empty((1, *shape, *places), device=DEVICE, dtype=torch.bfloat16).normal_()
    else:
        packed = torch.empty((1, *places, sum(counts)), device=DEVICE, dtype=torch.bfloat16).normal_()
        for (name, shape), view in zip(shapes.items(), packed.split(counts, dim=3), strict=True):
            tensors[name] = view.unflatten(3, shape).movedim((1, 2), (-2, -1))
    return Case(**tensors, directions=directions, chunk=SEGMENT)


@pytest.mark.parametrize(
    ("layout", "directions"), [("planes", ("down", "left")), ("channel_innermost", ("up", "right"))]
)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.large
def test_more_than_2_to_the_31_elements(name: str, layout: str, directions: tuple[str, str]) -> None:
    """With restarts every 64 lines a patch depends on nothing more than 64 places away: patches are checked.

    In the corners of the image and in its middle, of the first and the last channels; and all that is written
    must be finite everywhere.
    """
    size = LARGE[name]
    with large_memory():
        case = large(size, layout, directions)
        assert not ON_GPU or min(tensor.numel() for tensor in case.tensors().values()) > 2**31
        checks = [patch_of(case, size, patch) for patch in patches(size)]
        wrong = []
        for variant in VARIANTS:
            found = run_variant(variant, case)
            if found is None:
                continue
            for (where, exact, yardstick), patch in zip(checks, patches(size), strict=True):
                part = {name: tensor[where[name]] for name, tensor in found.items()}
                wrong += [f"{variant}, {patch}: {f}" for f in faults(part, exact, yardstick, case)]
            # A NaN that was not overwritten, in steps: isfinite of all at once would not fit.
            finite = [rows.isfinite().all() for t in found.values() for rows in t.split(64, dim=-2)]
            if not torch.stack(finite).all():
                wrong.append(f"{variant}: an element was not written")
            del found
    assert not wrong, "\n".join(wrong)


def patches(size: Large) -> list[tuple[int, int, int]]:
    """First group, row and column of each."""
    last, middle = size.side - PATCH, size.side // SEGMENT // 2 * SEGMENT
    corners = ((0, 0), (0, last), (last, 0), (last, last), (middle, last), (middle, middle))
    groups = (0, size.groups - 2)
    return [(groups[number % 2], *corner) for number, corner in enumerate(corners)]


def patch_of(
    case: Case, size: Large, patch: tuple[int, int, int]
) -> tuple[dict[str, tuple[Any, ...]], dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Where the inside of a patch is in each result, what belongs there, and eager PyTorch's errors.

    A patch has two groups of channels.
    """
    group, top, left = patch
    each = size.channels // size.groups
    channels, groups = slice(group * each, (group + 2) * each), slice(group, group + 2)
    around = (slice(top, top + PATCH), slice(left, left + PATCH))
    part = Case(
        x=case.x[:, channels, *around].contiguous(),
        logits=case.logits[:, :, groups, :, *around].contiguous(),
        lam=case.lam[:, :, channels, *around].contiguous(),
        gate=case.gate[:, :, channels, *around].contiguous(),
        dy=case.dy[:, channels, *around].contiguous(),
        directions=case.directions,
        chunk=case.chunk,
    )
    expected = truth(part)
    rows, columns = inside(size, top), inside(size, left)
    within = (
        slice(top + rows.start, top + rows.stop),
        slice(left + columns.start, left + columns.stop),
    )
    where: dict[str, tuple[Any, ...]] = {name: (slice(None), channels, *within) for name in ("y", "dx")}
    where |= {name: (slice(None), slice(None), channels, *within) for name in ("dlam", "dgate")}
    where["dlogits"] = (slice(None), slice(None), groups, slice(None), *within)
    exact = {name: tensor[..., rows, columns].clone() for name, tensor in expected.items()}
    return where, exact, eager_errors(part, expected)


@contextmanager
def large_memory() -> Iterator[None]:
    """One process at a time, and only once the others have left enough memory."""
    with (Path(tempfile.gettempdir()) / "gspn2-large-test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patience = time.monotonic() + 60
        while ON_GPU and torch.cuda.mem_get_info()[0] < 100 * 2**30:
            if time.monotonic() > patience:
                pytest.skip("needs 100 GiB of free device memory")
            time.sleep(0.2)
        try:
            yield
        finally:
            if ON_GPU:
                torch.cuda.empty_cache()


def inside(size: Large, start: int) -> slice:
    """The part of a patch of three segments that no border of the patch reaches, unless it is the image's."""
    return slice(0 if start == 0 else SEGMENT, PATCH if start + PATCH == size.side else 2 * SEGMENT)
