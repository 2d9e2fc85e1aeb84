"""GroupNorm with SiLU, and GEGLU, in the emulator; what is put into networks, and taken out again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusion_helpers as tiny
from cuda_emulator import KernelError, compiler, run_launch, run_plan
from cuda_emulator.memory import Memory
from gspn2.backends import DIRECTIONS, Problem, cuda
from gspn2.backends.cuda import driver, launch, params
from gspn2.backends.cuda.geometry import Case, Device, View
from gspn2.backends.cuda.plan import choose
from gspn2.cli.main import main
from gspn2.integrations.diffusers import execution, fused, mixers, mount, scan
from gspn2.integrations.diffusers.mixers import GRID, AttentionMixer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = Device(multiprocessors=2)
NAMES = ("x", "y", "moments", "affine", "weight", "bias")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="the emulator needs g++ 12 on Linux")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def emulate(planned: fused.Planned, written: str, **tensors: Tensor) -> Tensor:
    """Runs a launch; `written` is what it makes."""
    launch, arguments = planned
    memory = Memory(tensors, {written})
    addresses = [memory.tensors[name].data_ptr() if name in tensors else 0 for name in NAMES]
    packed = b"".join(address.to_bytes(8, "little") for address in addresses) + arguments[48:]
    run_launch(launch, packed, memory, 1, DEVICE)
    wrong = memory.wrongly_written()
    if wrong:
        raise KernelError(wrong)
    memory.copy_back()
    return tensors[written]


def nan(*size: int, like: Tensor | None = None) -> Tensor:
    return torch.full(size, torch.nan, dtype=torch.float32 if like is None else like.dtype)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "silu"),
    [
        ((1, 40, 9, 13), 4, torch.bfloat16, True),
        ((2, 24, 3, 5), 3, torch.float32, False),
        ((1, 64, 1, 1), 32, torch.float16, True),
    ],
)
def test_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool) -> None:
    """A mean a hundred times the deviation costs no digits."""
    torch.manual_seed(0)
    batch, channels = shape[:2]
    means = torch.linspace(-100, 100, channels)[:, None, None] if dtype == torch.float32 else 1.0
    x = (torch.randn(shape) + means).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    first, second, slabs = fused.norm_plan(shape, groups, 1e-5, dtype, DEVICE)
    moments = emulate(first, "moments", x=x, moments=nan(batch, slabs, channels, 2))
    parts = {"moments": moments, "weight": weight, "bias": bias}
    affine = emulate(second, "affine", x=x, affine=nan(batch, channels, 2), **parts)
    y = torch.full_like(x, torch.nan)
    emulate(fused.apply_plan(shape, silu, dtype, DEVICE), "y", x=x, y=y, affine=affine)
    right = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    right = F.silu(right) if silu else right
    torch.testing.assert_close(y.double(), right, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=2e-3)


@needs_compiler
@pytest.mark.parametrize(("tokens", "channels", "dtype"), [(7, 16, torch.bfloat16), (40, 24, torch.float32)])
def test_gated_unit(tokens: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 2 * channels).to(dtype)
    y = emulate(fused.geglu_plan(tokens, channels, dtype, DEVICE), "y", x=x, y=nan(tokens, channels, like=x))
    a, b = x.double().chunk(2, dim=-1)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.double(), a * F.gelu(b), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.sdxl_unet, tiny.sd15_unet])
def test_a_network_is_the_same_within_and_after(make: Any) -> None:
    unet = make()
    given = tiny.inputs(unet, 16, 24)
    with torch.no_grad():
        before = unet(**given).sample
        forwards = {name: module.__dict__.get("forward") for name, module in unet.named_modules()}
        with execution.fused(unet):
            assert any("forward" in module.__dict__ for module in unet.modules())
            torch.testing.assert_close(unet(**given).sample, before, atol=1e-5, rtol=1e-4)
        assert forwards == {name: module.__dict__.get("forward") for name, module in unet.named_modules()}


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 4, "groups": 2}, {"directions": ("up", "left"), "bias": False}]
)
def test_a_mixer_in_few_launches_is_the_mixer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = AttentionMixer(48, 16, **options)
    x = torch.randn(2, 6 * 9, 48)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            mixer.tokens.mixer.merge.mul_(scale)  # what was kept must not be used again
            for grid in ((6, 9), (9, 6)):
                right = mixer(x, **{GRID: grid})
                torch.testing.assert_close(mixer._inference(x, grid), right, atol=1e-6, rtol=1e-5)
        mixer._inference(x, grid)
        (kept,) = mixer._kept.values()
        mixer.fixed = True
        assert mixer._prepared(*grid) is kept[1], "what is up to date is not made again"
        mixer.fixed = False
        mixer.tokens.mixer.to_proxy.weight.mul_(1.5)
        mixer.fixed = True
        torch.testing.assert_close(mixer._inference(x, grid), mixer.tokens(x, grid), atol=1e-6, rtol=1e-5)
        mixer.fixed = False
        copied = copy.deepcopy(mixer)
        copied.tokens.mixer.to_operands.bias.add_(1.0)
        torch.testing.assert_close(copied._inference(x, grid), copied(x, **{GRID: grid}))
        with pytest.raises(ValueError, match="grid"):
            mixer._inference(x, (5, 5))
    assert not mixer._quick(x), "on a CPU, and with gradients, the mixer runs as it is"


class Recorded:
    """What was loaded, without its addresses, and with which addresses it was run."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, bytes, Any]] = []
        self.ran: list[dict[int, int]] = []

    def load(self, launch: Any, arguments: bytes, places: Any, index: int) -> SimpleNamespace:
        told = bytearray(arguments)
        for place in places:
            told[8 * place : 8 * place + 8] = bytes(8)
        self.made.append((launch, bytes(told), tuple(places)))
        run = lambda addresses, stream: self.ran.append(dict(zip(places, addresses, strict=True)))  # noqa: E731
        return SimpleNamespace(run=run)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """A driver that only writes down what it is asked, of a GPU of eight multiprocessors."""
    found = Recorded()
    monkeypatch.setattr(driver, "Loaded", found.load)
    monkeypatch.setattr(driver, "device", lambda index: Device(multiprocessors=8))
    monkeypatch.setattr(driver, "current_device", lambda: -1)
    monkeypatch.setattr(driver, "stream", lambda index: 0)
    monkeypatch.setattr(cuda, "why_not", lambda problem: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    scan._ready.cache_clear()
    yield found
    scan._ready.cache_clear()


def test_what_is_launched_at_once_is_what_propagate_launches(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernels, arguments and addresses, from a plan that was made without the tensors."""
    geometry, size = scan.Geometry(16, 2, ("up", "left"), 4, 24, 80), scan.Size(2, 6, 9)
    proxy, packed, y = aligned(2, 54, 24), aligned(2, 54, 80), aligned(2, 54, 16)
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape: y)
    monkeypatch.setattr(torch, "empty_like", lambda like: y.as_strided(like.shape, (54 * 16, 1, 9 * 16, 16)))
    assert scan.launched(proxy, packed, geometry, size) is not None
    x, logits, lam, gate = scan.views(proxy, packed, geometry, size)
    problem = Problem(geometry.directions, 4, True, 2, 16, 2, 6, 9, torch.float32, "cuda")
    launch.propagate(x, logits, lam, gate, problem)
    made, ran = recorded.made, recorded.ran
    half = len(made) // 2
    assert made[:half] == made[half:] != []
    assert ran[:half] == ran[half:]
    other = aligned(2 * 54 * 24 + 16)[16:].view(2, 54, 24)
    assert scan.launched(other, packed, geometry, size) is None, "not aligned"


@needs_compiler
def test_two_threads_a_vector_are_the_planners_kernel(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in the emulator, which finds races and stray accesses; and it is launched."""
    torch.manual_seed(0)
    device = Device(multiprocessors=8)
    geometry, size = scan.Geometry(16, 1, DIRECTIONS, None, 24, 144), scan.Size(1, 9, 9)
    proxy = aligned(1, 81, 24, dtype=torch.bfloat16).normal_()
    packed = aligned(1, 81, 144, dtype=torch.bfloat16).normal_()
    y = aligned(1, 81, 16, dtype=torch.bfloat16).fill_(torch.nan)
    x, logits, lam, gate = scan.views(proxy, packed, geometry, size)
    image = y.as_strided(x.shape, (81 * 16, 1, 9 * 16, 16))
    tensors = {"x": x, "taps": logits, "lam": lam, "gate": gate, "y": image}
    problem = Problem(DIRECTIONS, None, True, 1, 16, 1, 9, 9, torch.bfloat16, "cuda")
    case = Case(problem, device, {name: View.of(it) for name, it in tensors.items()}, False)
    monkeypatch.setattr(scan, "choose", lambda case: choose(case, "pixels"))
    assert scan.two_threads_a_vector(case) is None, "a size that has not been run"
    monkeypatch.setitem(scan.WIDTHS, (16, 9), 16)
    found = scan.two_threads_a_vector(case)
    assert found is not None
    usual = torch.full_like(image, torch.nan)
    run_plan(found, problem, tensors, device=device)
    run_plan(choose(case, "pixels"), problem, {**tensors, "y": usual}, device=device)
    assert torch.equal(image, usual)

    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape: y)
    assert scan.launched(proxy, packed, geometry, size) is y
    assert [made[0] for made in recorded.made] == list(found.launches)
    right = {params.place(name): it.data_ptr() for name, it in tensors.items()}
    assert recorded.ran == [right]


def test_an_adapter_on_a_mixer_is_seen() -> None:
    mixer = AttentionMixer(16, 8)
    parts = mixer.tokens.mixer
    assert mixers._bare(parts.to_proxy)
    handle = parts.to_proxy.register_forward_hook(lambda *_: None)
    assert not mixers._bare(parts.to_proxy)
    handle.remove()
    torch.nn.utils.parametrize.register_parametrization(parts.to_proxy, "weight", torch.nn.Identity())
    assert not mixers._bare(parts.to_proxy)


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory as the allocator of CUDA hands it out."""
    memory = torch.zeros(torch.Size(shape).numel() + 64, dtype=dtype)
    start = -memory.data_ptr() % 128 // dtype.itemsize
    return memory[start : start + torch.Size(shape).numel()].view(shape)


def test_graphs_are_told_apart_by_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by what is no tensor; a result is that of the call, whichever graph was replayed."""
    monkeypatch.setattr(execution, "_Graph", lambda call, tensors: call)
    unet = tiny.sdxl_unet()
    mounted = mount(unet, zero_output=False)
    with torch.no_grad():
        plain = {size: unet(**tiny.inputs(unet, *size, batch=1)).sample for size in ((16, 16), (16, 24))}
        with execution.graphed(unet):
            assert all(mixer.fixed for _, mixer in mounted.layers())
            graphs = unet.__dict__["forward"]._known
            for size in [*plain, *plain, *plain]:
                given = tiny.inputs(unet, *size, batch=1)
                assert torch.equal(unet(**given).sample, plain[size])
                assert torch.equal(unet(**given, return_dict=False)[0], plain[size])
            assert len(graphs) == 2
    assert "forward" not in unet.__dict__
    assert not any(mixer.fixed for _, mixer in mounted.layers())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"chunk": 4, "groups": 2}, {"directions": ("up", "left")}])
@pytest.mark.parametrize(
    ("grid", "dim"), [((8, 8), 128), ((13, 9), 128), ((64, 64), 1280), ((128, 128), 640)]
)
def test_a_mixer_on_a_gpu_in_few_launches_is_the_mixer(
    grid: tuple[int, int], dim: int, options: dict[str, Any]
) -> None:
    mixer = AttentionMixer(dim, dim // 8, **options).cuda().bfloat16()
    x = torch.randn(1 + (dim == 128), grid[0] * grid[1], dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert mixer._quick(x)
        found, right = mixer(x, **{GRID: grid}).float(), mixer.tokens(x, grid).float()
    assert (found - right).norm() < 4e-3 * right.norm()


@pytest.mark.gpu
@needs_gpu
def test_a_network_on_a_gpu_is_the_same_fused_and_as_a_graph() -> None:
    unet = tiny.sdxl_unet().cuda().bfloat16()
    mount(unet, zero_output=False)
    given = {
        name: {key: it.cuda().bfloat16() for key, it in value.items()}
        if isinstance(value, dict)
        else value.cuda().to(value.dtype if value.ndim == 0 else torch.bfloat16)
        for name, value in tiny.inputs(unet, 16, 24, batch=1).items()
    }
    with torch.no_grad():
        before = unet(**given).sample
        with execution.fused(unet):
            fused_once = unet(**given).sample
            with execution.graphed(unet):
                calls = [unet(**given).sample for _ in range(3)]
    assert (fused_once.float() - before.float()).norm() < 0.05 * before.float().norm()
    assert all(torch.equal(it, fused_once) for it in calls)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_generate_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    pipe = tiny.sdxl_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "sdxl")
    mount(pipe.unet, zero_output=False).save_pretrained(tmp_path / "mixers")
    folders = ["--pipeline", str(tmp_path / "sdxl"), "--mixers", str(tmp_path / "mixers")]
    out = tmp_path / "a.png"
    words = ["generate", "a cat", *folders, "--device", "cuda", "--dtype", dtype, "--steps", "4"]
    assert main([*words, "--size", "256", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
