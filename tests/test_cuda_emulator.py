"""The emulator of CUDA kernels: right kernels run right in any order, and wrong ones are found."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from cuda_emulator import KernelError, compiler, run_plan
from cuda_emulator.build import HERE, KERNELS
from gspn2.backends.cuda.geometry import Device, Kernel, Launch, Plan
from gspn2.backends.problem import Problem

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs g++ 12, on Linux")

SEEDS = range(6)
DEFINES = (("STORAGE", 0), ("NORMALIZE", 1), ("HAS_LAM", 0), ("HAS_GATE", 0))


def launch(
    function: str,
    x: Tensor,
    size: int,
    knobs: tuple[int, ...] = (0,),
    seed: int = 0,
    block: int = 64,
    grid: int = 1,
    shared: int = 0,
    cluster: int = 1,
    scratch: tuple[int, ...] = (),
    device: Device | None = None,
) -> Tensor:
    """Runs a kernel of fixtures.cu on the row x; returns the row y of `size` values."""
    problem = Problem(("down",), None, True, 1, 1, 1, 1, len(x), torch.float32, "cuda")
    kernel = Kernel(str(HERE / "fixtures.cu"), function, DEFINES)
    plan = Plan("fixtures", (Launch(kernel, grid, block, shared, cluster, knobs),), scratch)
    y = torch.full((size,), torch.nan)
    run_plan(plan, problem, {"x": x.view(1, 1, 1, -1), "y": y.view(1, 1, 1, -1)}, seed, device)
    return y


def numbers(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives(seed: int) -> None:
    x = numbers(64)
    y = launch("collectives", x, 64 * 12, seed=seed).view(64, 12)
    v, lane = x.view(2, 32), torch.arange(32)
    expected = {
        0: v[:, torch.full((32,), 5)],
        1: v[:, lane // 8 * 8 + (lane + 3) % 8],
        2: v[:, torch.where(lane < 2, lane, lane - 2)],
        3: v[:, torch.where(lane % 16 < 14, lane + 2, lane)],
        4: v[:, lane ^ 17],
        5: torch.full((2, 32), 11.0),
        6: torch.tensor([0.0, 1.0])[:, None].expand(2, 32),
        7: torch.ones(2, 32),
        8: v[:, torch.where(lane < 16, lane ^ 1, lane ^ 2)],
        9: torch.tensor([496.0, 1520.0])[:, None].expand(2, 32),
        10: torch.tensor([0.0, -32.0])[:, None].expand(2, 32),
        11: torch.full((2, 32), 13.0),
    }
    for column, values in expected.items():
        assert torch.equal(y[:, column], values.flatten()), column


@pytest.mark.parametrize("seed", SEEDS)
def test_block_barrier(seed: int) -> None:
    x = numbers(256)
    assert torch.equal(launch("reverse", x, 256, seed=seed, block=256, shared=1024), x.flip(0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [64, 70, 333])
def test_asynchronous_copies(seed: int, size: int) -> None:
    x = numbers(size)
    padded = torch.cat((x, torch.zeros(-size % 64)))
    expected = padded.view(-1, 64).flip(1).flatten()[:size]
    assert torch.equal(launch("staged", x, size, seed=seed, shared=768), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_ring_of_bulk_copies(seed: int) -> None:
    x = numbers(448)
    expected = x.view(-1, 64).flip(1).flatten()
    assert torch.equal(launch("ring", x, 448, seed=seed, shared=128 + 1024), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster(seed: int) -> None:
    x = numbers(256)
    y = launch("neighbours", x, 256, (0, 4), seed, block=32, grid=8, shared=128, cluster=4)
    assert torch.equal(y, x.view(2, 4, 32).roll(-1, 1).flatten())


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_stores(seed: int) -> None:
    """Values that go to and fro between blocks, counted by mbarriers."""
    x = numbers(128)
    y = launch("relay", x, 128, (0, 2), seed, block=32, grid=4, shared=512, cluster=2)
    assert torch.equal(y, x.view(2, 2, 32).flip(1).flatten())


def test_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    ties = (torch.arange(0, 2**31, 2**31 // 20000 // 4096 * 4096) + 4096).to(torch.int32)
    small = torch.linspace(-(2**-13), 2**-13, 5001)
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 3.4e38, torch.inf, -torch.inf, torch.nan])
    x = torch.cat((bits.view(torch.float32), ties.view(torch.float32), small, edges))
    bfloat16, float16, pairs = launch("roundings", x, 3 * len(x), block=128).view(3, -1)
    for found, dtype in ((bfloat16, torch.bfloat16), (float16, torch.float16), (pairs, torch.float16)):
        assert torch.equal(found.nan_to_num(nan=1.5), x.to(dtype).float().nan_to_num(nan=1.5)), dtype


def test_every_instruction_is_emulated() -> None:
    """emulate.h has each function of ptx.cuh."""
    wrappers, emulated = (
        set(re.findall(rf"^{prefix}.*?(\w+)\(", path.read_text(), re.MULTILINE))
        for prefix, path in (("__device__", KERNELS / "ptx.cuh"), ("EMULATED", HERE / "emulate.h"))
    )
    assert "bulk_copy" in wrappers
    assert wrappers <= emulated


# What must be found -----------------------------------------------------------------------------------------


FOUND = (
    "no barrier is between|a block of another cluster|an asynchronous copy may still"
    "|more than the 1 arrivals|deadlock"
)


@pytest.mark.parametrize(
    ("function", "wrong", "size", "shared"),
    [
        pytest.param("reverse", 1, 256, 1024, id="no barrier"),
        pytest.param("staged", 1, 333, 768, id="no copy_wait"),
        pytest.param("staged", 2, 333, 768, id="no barrier after copy_wait"),
        pytest.param("staged", 3, 333, 768, id="stage overwritten while it is read"),
        pytest.param("ring", 2, 448, 1152, id="no wait for an empty stage"),
        pytest.param("ring", 4, 448, 1152, id="no wait for a full stage"),
        pytest.param("ring", 5, 448, 1152, id="source of a bulk_store overwritten"),
        pytest.param("warp_exchange", 1, 64, 256, id="no __syncwarp before reading"),
        pytest.param("warp_exchange", 2, 64, 256, id="no __syncwarp before writing"),
        pytest.param("global_exchange", 1, 64, 0, id="no barrier for global memory"),
        pytest.param("global_exchange", 2, 64, 0, id="blocks that exchange"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_races(function: str, wrong: int, size: int, shared: int, seed: int) -> None:
    """An error in every order of threads."""
    x = numbers(size)
    block = 256 if function == "reverse" else 64
    grid = 2 if function == "global_exchange" and wrong != 1 else 1
    if grid == 1 or wrong == 1:
        right = launch(function, x, size, (0,), seed, block=block, shared=shared)
        assert not right.isnan().any()
    with pytest.raises(KernelError, match=FOUND):
        launch(function, x, size, (wrong,), seed, block, grid, shared)


@pytest.mark.parametrize(
    ("function", "wrong", "options", "sentence"),
    [
        ("collectives", 1, {}, "lanes 00000080 of a warp collective's mask|leaves while lanes"),
        ("collectives", 2, {}, "leaves out the lane that calls it"),
        ("reverse", 2, {"block": 256, "shared": 1024}, r"deadlock(.|\n)*255 of 256(.|\n)*fixtures.cu"),
        ("reverse", 3, {"block": 256, "shared": 1024}, r"deadlock(.|\n)*id 1: 192 of 224"),
        ("reverse", 4, {"block": 256, "shared": 1024}, "lanes of a warp come to in different branches"),
        ("ring", 1, {"shared": 1152}, "without mbarrier_init_fence"),
        ("ring", 3, {"shared": 1152}, r"deadlock(.|\n)*missing: 0 arrivals, 256 bytes"),
        ("ring", 6, {"shared": 1152}, "no thread of the block has called bulk_store_fence"),
        ("ring", 7, {"shared": 1152}, "bulk_store of it may still read"),
        (
            "relay",
            0,
            {"block": 32, "grid": 4, "shared": 512, "cluster": 4},
            "which block|an asynchronous copy",
        ),
        (
            "relay",
            1,
            {"block": 32, "grid": 4, "shared": 512, "cluster": 2},
            "an asynchronous copy|no barrier",
        ),
        ("relay", 2, {"block": 32, "grid": 4, "shared": 512, "cluster": 2}, "deadlock"),
        ("neighbours", 0, {"block": 512}, "launch bound"),
        ("neighbours", 0, {"block": 32, "shared": 300000}, "300000 bytes of shared memory"),
    ],
)
def test_errors(function: str, wrong: int, options: dict[str, int], sentence: str) -> None:
    size = 448
    knobs = (wrong, options.get("cluster", 1))
    for seed in SEEDS:
        try:
            launch(function, numbers(size), 12 * 64, knobs, seed, **options)
        except KernelError as error:
            with pytest.raises(KernelError, match=sentence):
                raise error
            return
    pytest.fail("nothing was found")


@pytest.mark.parametrize(
    ("function", "wrong", "sentence"),
    [
        ("neighbours", 1, "which may not have started|which has not started"),
        ("neighbours", 2, "may end while block|which has ended"),
        ("relay", 3, "which may not have started|as the block has not started"),
        ("relay", 4, "may end while block|ends while a|which has ended|no mbarrier there"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_memory_of_blocks_that_may_not_be_there(function: str, wrong: int, sentence: str, seed: int) -> None:
    """An error in every order, also where all blocks happen to be there."""
    with pytest.raises(KernelError, match=sentence):
        launch(function, numbers(64), 64, (wrong, 2), seed, block=32, grid=2, shared=512, cluster=2)


def test_older_devices() -> None:
    old = Device(capability=(8, 9))
    assert torch.equal(launch("staged", numbers(64), 64, shared=768, device=old), numbers(64).flip(0))
    with pytest.raises(KernelError, match="mbarrier_init_fence: the device is older than sm_90"):
        launch("ring", numbers(448), 448, shared=1152, device=old)
    with pytest.raises(KernelError, match="a grid of 2 blocks in clusters of 2"):
        launch("neighbours", numbers(64), 64, (0, 2), block=32, grid=2, shared=128, cluster=2, device=old)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (1, "byte 560 of the 400 bytes of shared memory"),
        (2, "touches bytes 400 to 404 of 400 bytes of shared memory"),
        (3, "touches byte -"),
        (4, r"__ldg byte 1760 of \[x\], which is no element"),
        (5, "__stcs touches 4 bytes outside"),
        (6, r"writes byte 1760 of \[y\], which is no output's element.*fixtures.cu"),
        (7, "touches byte"),
        (8, "misaligned access .*fixtures.cu"),
        (9, "load_stream of .* not aligned to 16"),
        (10, "copy_async from .* not aligned to 8"),
        (11, "__stcs byte 0 of .x., which is no output's"),
        (12, r"writes byte 4 of \[x\], which is no output's"),
        (13, "division by zero"),
        (17, "__trap"),
        (18, "barrier 1 of 24 threads: whole warps"),
    ],
)
def test_strays(wrong: int, sentence: str) -> None:
    with pytest.raises(KernelError, match=sentence):
        launch("strays", numbers(440), 440, (wrong, 400, 0), block=32, shared=400)


@pytest.mark.parametrize(("wrong", "byte"), [(1, 52), (2, 256)])
def test_scratch_memory_is_written_before_it_is_read(wrong: int, byte: int) -> None:
    x = numbers(64)
    assert torch.equal(launch("scratch_exchange", x, 64, scratch=(512,)), x.flip(0))
    with pytest.raises(KernelError, match=rf"byte {byte} of \[scratch 0\], which nobody has written"):
        launch("scratch_exchange", x, 64, (wrong,), scratch=(512,))


def test_scratch_memory_ends_where_the_plan_says() -> None:
    """To the byte, though there is room behind it."""
    with pytest.raises(KernelError, match=r"byte 252 of \[scratch 0\], which the plan has not asked for"):
        launch("scratch_exchange", numbers(64), 64, scratch=(252,))


def test_memory_starts_as_nan() -> None:
    y = launch("strays", numbers(8), 8, (16, 400), block=32, shared=400)
    assert y.isnan().all()


def relay_race(wrong: int, seed: int = 0) -> Tensor:
    """Sums of blocks over flags in scratch memory, and what they should be."""
    x, y = numbers(192), torch.full((64,), torch.nan)
    problem = Problem(("down",), None, True, 1, 1, 1, 1, 192, torch.float32, "cuda")
    launches = (
        Launch(Kernel("planes_backward_start.cu", "planes_backward_start", DEFINES), 1, 256, 0, 1, (3,)),
        Launch(Kernel(str(HERE / "fixtures.cu"), "relay_race", DEFINES), 3, 64, 0, 1, (wrong,)),
    )
    plan = Plan("fixtures", launches, (256, 12))
    run_plan(plan, problem, {"x": x.view(1, 1, 1, -1), "y": y.view(1, 1, 1, -1)}, seed)
    return y - x.view(3, 64).sum(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_flags_between_blocks(seed: int) -> None:
    assert relay_race(0, seed).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "which a block of another cluster wrote"),
        (2, "wait_flag for 2: at 1, and all earlier clusters have ended"),
        (3, "which block 1, thread 0 wrote|which a block of another cluster wrote"),
        (4, "which a block of another cluster wrote"),
    ],
)
def test_flags_that_order_too_little(wrong: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        relay_race(wrong)
