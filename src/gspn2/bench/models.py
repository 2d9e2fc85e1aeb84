"""Whole backbones beside timm's: inference and training, eager and compiled, images per second and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Absent, Case, Contender, Part, Pass
from .check import Wrong, refuse_if_far
from .measure import Work

SIZES = {
    "T": (
        "gspn2_tiny",
        "deit_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "mambaout_tiny",
    ),
    "S": ("gspn2_small", "swin_small_patch4_window7_224", "convnext_small", "mambaout_small"),
    "B": (
        "gspn2_base",
        "deit_base_patch16_224",
        "swin_base_patch4_window7_224",
        "convnext_base",
        "mambaout_base",
    ),
}
RESOLUTIONS = {224: 128, 512: 32, 1024: 8, 2048: 2}
"""Pixels, and images at a time; half of that for training, at least one."""
PROXIES = (2, 4, 8, 16, 32)
FIXED_GRID = ("deit", "swin")
"""Families that are told the size of the images when they are made."""
SMALL = ("gspn2_tiny", "deit_small_patch16_224", "convnext_tiny")
MICRO_BATCH = 2
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative distance of logits, one model computed in two ways; bfloat16 is rounded in every layer."""


@dataclass(frozen=True)
class Setting:
    """One way to run a model: side of the images, their number, training or not, compiled or not.

    graphs: compiled forward and backward are replayed as CUDA graphs, so that the host is left out
    (`gspn2 train --compile --graphs`). Compiled inference always is.
    blocks: only the blocks are compiled, those of a stage once, and not what is around them: of a large model
    minutes become seconds.
    one_graph: the step before it in a list, and the optimizer's, replayed as one CUDA graph: the GPU's time,
    on a host however slow.
    """

    side: int
    batch: int
    train: bool
    compiled: bool = False
    graphs: bool = False
    blocks: bool = False
    one_graph: bool = False

    @property
    def which(self) -> str:
        how = ", blocks compiled" if self.blocks else ", compiled" if self.compiled else ""
        how += ", CUDA graphs" if self.graphs else ", one CUDA graph" if self.one_graph else ""
        return f"{'train' if self.train else 'inference'}{how}"


TARGETS = {
    Setting(224, 256, False, compiled=True): ("gspn2_tiny", "convnext_tiny"),
    Setting(224, 256, True, compiled=True): ("gspn2_tiny", "convnext_tiny"),
    Setting(512, 32, False, compiled=True): ("gspn2_tiny", "deit_small_patch16_224", "convnext_tiny"),
    Setting(1024, 8, False, compiled=True): ("gspn2_tiny", "deit_small_patch16_224", "convnext_tiny"),
    Setting(2048, 2, False, compiled=True): ("gspn2_tiny", "deit_small_patch16_224", "convnext_tiny"),
}
"""What the smallest model was made fast against: ConvNeXt at 224 and in memory, a ViT at high resolution."""
FIRST = (224, 1024)
"""Pixels at which compiled inference is measured first."""


def cases(device: torch.device) -> Iterator[Case]:
    """The targets, then all of one size and resolution in a case; what is compiled for others comes last."""
    if device.type == "cpu":
        yield _case("T, 224 pixels", SMALL, [Setting(224, MICRO_BATCH, False)], first=True)
        yield _case("T, 224 pixels, training", SMALL, [Setting(224, MICRO_BATCH, True)], extra=True)
        yield _case("T, 512 pixels", SMALL, [Setting(512, 1, False)], extra=True)
        yield _proxies(Setting(224, MICRO_BATCH, False), extra=True)
        return
    for setting, names in TARGETS.items():
        yield _compiled("T", setting, names, graphs=setting.train)
    yield _proxies(Setting(224, 256, False))
    for size, names in SIZES.items():
        for side, batch in RESOLUTIONS.items():
            settings = [Setting(side, batch, False), Setting(side, max(1, batch // 2), True)]
            yield _case(f"{size}, {side} pixels", names, settings, extra=size != "T")
    yield from _others_compiled()


def _others_compiled() -> Iterator[Case]:
    """What the targets leave: every size and resolution. Whole models beside those of the targets."""
    targets = {("T", it.side, it.train): (it, names) for it, names in TARGETS.items()}
    for size, names in SIZES.items():
        for side, batch in RESOLUTIONS.items():
            for train in (False, True):
                images = max(1, batch // 2) if train else batch
                fresh = Setting(side, images, train, compiled=True, blocks=True)
                setting, measured = targets.get((size, side, train), (fresh, ()))
                rest = tuple(it for it in names if it not in measured)
                yield _compiled(size, setting, rest, extra=True)


def _compiled(
    size: str, setting: Setting, names: tuple[str, ...], extra: bool = False, graphs: bool = False
) -> Case:
    """graphs: measure it with CUDA graphs, too. Training that is no target is replayed as one."""
    which = "training" if setting.train else "inference"
    others = "" if names[0].startswith("gspn2") else ", others"
    first = setting.side in FIRST and not setting.train and not extra
    name = f"{size}, {setting.side} pixels, compiled {which}{others}"
    settings = [setting, *([replace(setting, graphs=True)] if graphs else [])]
    settings += [replace(setting, one_graph=True)] if setting.train and not graphs else []
    return _case(name, names, settings, first=first, extra=extra)


def _case(
    name: str,
    models: tuple[str, ...],
    settings: list[Setting],
    *,
    first: bool = False,
    extra: bool = False,
) -> Case:
    facts = {
        "models": list(models),
        "pixels": settings[0].side,
        "batches": {setting.which: setting.batch for setting in settings},
    }

    def contenders(device: torch.device) -> list[Contender]:
        return [Contender(it, lambda it=it: _model(it, settings, device)) for it in models]  # type: ignore[misc]

    compiled = settings[0].compiled
    # With a cache that was filled before; without one compiling takes three times as long.
    anew = sum(not it.one_graph for it in settings)
    seconds = (20.0 if settings[0].train else 10.0) * anew if compiled else 3.0
    return Case(
        "models",
        name,
        facts,
        contenders,
        first=first,
        extra=extra,
        rounds=5,
        seconds=(3.0 if compiled and extra and not settings[0].blocks else 1.0) * seconds * len(models),
        compiled=compiled,
    )


def _proxies(setting: Setting, extra: bool = False) -> Case:
    """The paper's figure: the same model with more proxy channels."""

    def contenders(device: torch.device) -> list[Contender]:
        return [
            Contender(
                f"gspn2_tiny, {proxy} proxy channels",
                lambda proxy=proxy: _model("gspn2_tiny", [setting], device, proxy_dim=proxy),  # type: ignore[misc]
            )
            for proxy in PROXIES
        ]

    facts = {"proxies": list(PROXIES), "pixels": setting.side, "batches": {setting.which: setting.batch}}
    return Case("models", "proxy channels", facts, contenders, extra=extra, rounds=5, seconds=20)


def _model(name: str, settings: list[Setting], device: torch.device, **options: Any) -> dict[str, Pass]:
    if find_spec("timm") is None:
        raise Absent("timm is not installed")
    if device.type == "meta" and not name.startswith("gspn2"):
        raise Absent("nothing to compile")
    import timm

    import gspn2.models  # noqa: F401  (registers them with timm)

    if name.startswith(FIXED_GRID):
        options["img_size"] = settings[0].side
    with torch.device(device):
        model = timm.create_model(name, pretrained=False, **options)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Pass] = {}
    for setting in settings:
        if setting.one_graph:
            found[setting.which] = _one_graph(found[replace(setting, one_graph=False).which])
        else:
            made = _train if setting.train else _infer
            found[setting.which] = made(model, setting, device)
    return found


def _one_graph(step: Pass) -> Pass:
    """The same training step; what it takes while it is captured stays with the graph, and is not told."""
    facts = {name: it for name, it in step.facts.items() if name != "peak_bytes"}
    return replace(step, work=replace(step.work, graph=True), facts=facts)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _images(setting: Setting, device: torch.device, dtype: torch.dtype) -> Tensor:
    images = torch.randn(setting.batch, 3, setting.side, setting.side, device=device, dtype=dtype)
    return images.to(memory_format=torch.channels_last)


def _infer(model: nn.Module, setting: Setting, device: torch.device) -> Pass:
    """Weights and images in the device's fast dtype."""
    fixed = copy.deepcopy(model).to(_dtype(device)).eval()
    runner = _compiler(fixed, setting)
    images = _images(setting, device, _dtype(device))

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return runner(images)

    def check() -> dict[str, float]:
        """Finite; propagation against the plain reference, compiled against eager."""
        found = call(0)
        if not found.isfinite().all():
            raise Wrong("logits are not finite")
        some = images[:2]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            truth = _reference(fixed, some) if not setting.compiled else fixed(some)
        return {} if truth is None else {"logits": _close(found[:2], truth)}

    facts = _facts(setting, call, device, lambda: [*fixed.parameters(), *fixed.buffers(), images])
    # A compiled network is replayed as a graph, as whoever serves it would: what its host does is left out.
    return Pass(Work(call, graph=setting.compiled), check, *_cost(model, setting, device), facts)


def _train(model: nn.Module, setting: Setting, device: torch.device) -> Pass:
    """Forward, loss, backward and a step of AdamW; weights in float32, mixed precision on a GPU."""
    model = model.train()
    if device.type == "meta":
        model = model.to(torch.bfloat16)  # as mixed precision has it
    if setting.graphs:
        model = copy.deepcopy(model)  # the graphs' own: they hold on to its gradients' memory
    moved, flops = _cost(model, setting, device)  # of a copy, which must not be compiled
    runner = _compiler(model, setting)
    images = _images(setting, device, torch.bfloat16 if device.type == "meta" else torch.float32)
    labels = torch.randint(0, 1000, (setting.batch,), device=device)
    optimizer: list[torch.optim.Optimizer] = []

    def call(_: int) -> Tensor:
        if not optimizer:
            on_gpu = device.type == "cuda"
            optimizer.append(torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu, capturable=on_gpu))
        if setting.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        mixed: AbstractContextManager[Any] = (
            torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        )
        with mixed:
            loss = F.cross_entropy(runner(images), labels)
        loss.backward()
        if device.type != "meta":
            optimizer[0].step()
        optimizer[0].zero_grad(set_to_none=True)
        return loss.detach()

    def check() -> dict[str, float]:
        # The first call compiles, and those after it capture the graphs.
        if not all(call(0).isfinite() for _ in range(3 if setting.graphs else 1)):
            raise Wrong("the loss is not finite")
        return {}

    facts = _facts(
        setting,
        call,
        device,
        lambda: [*model.parameters(), *model.buffers(), images, labels, *_states(optimizer)],
    )
    return Pass(Work(call, graph=False), check, 3 * moved, 3 * flops, facts)


def _compiler(model: nn.Module, setting: Setting) -> Callable[[Tensor], Tensor]:
    """What to call in the model's place; blocks are replaced in it."""
    if not setting.compiled:
        return model
    # All that is compiled from one function counts, and Swin's blocks are of eight kinds. What is beyond the
    # limit would run as it is, under the name of a compiled model.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if not setting.blocks:
        return torch.compile(model, dynamic=False, mode="reduce-overhead" if setting.graphs else None)
    for name, blocks in model.named_modules():
        for block in blocks.children() if name.split(".")[-1] == "blocks" else ():
            block.forward = torch.compile(block.forward, dynamic=False)
    return model


def _reference(model: nn.Module, images: Tensor) -> Tensor | None:
    """Logits with the operator's plain reference; None for a model that does not propagate."""
    from ..nn import Mixer

    mixers = [it for it in model.modules() if isinstance(it, Mixer)]
    if not mixers:
        return None
    before = [it.backend for it in mixers]
    try:
        for it in mixers:
            it.backend = "reference"
        return model(images)
    finally:
        for it, backend in zip(mixers, before, strict=True):
            it.backend = backend


def _close(found: Tensor, truth: Tensor) -> float:
    return refuse_if_far("logits", found, truth.double(), AGREEMENT[truth.dtype])


def _facts(
    setting: Setting, call: Callable[[int], Any], device: torch.device, own: Callable[[], list[Tensor]]
) -> dict[str, Any]:
    """Images of a call; on a GPU the most memory that it needs.

    Args:
        setting, call, device: of what is measured.
        own: what outlives a call: weights, images, states of the optimizer. Other models are in memory, too.
    """
    facts = {"images": setting.batch}
    # What graphs take while they are captured stays with them: a call takes nothing any more.
    if device.type == "cuda" and not (setting.graphs and setting.train):
        call(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        during = torch.cuda.max_memory_allocated() - before
        facts["peak_bytes"] = during + sum(it.nbytes for it in own())
    return facts


def _states(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """Tensors that optimizers keep."""
    kept = [value for it in optimizers for state in it.state.values() for value in state.values()]
    return [it for it in kept if isinstance(it, Tensor)]


def _cost(model: nn.Module, setting: Setting, device: torch.device) -> tuple[int, int]:
    """Bytes that have to move at least (weights and images), and operations, of a forward pass."""
    from ..models.flops import count_macs

    size = 2 if device.type != "cpu" else 4
    numbers = sum(it.numel() for it in model.parameters()) + setting.batch * 3 * setting.side**2
    if device.type == "meta":
        return 0, 0
    return size * numbers, 2 * setting.batch * count_macs(model, (3, setting.side, setting.side))


PART = Part(
    "models",
    "Backbones",
    "Random weights, channels_last. Inference in bfloat16 (float32 on a CPU), compiled models as CUDA "
    "graphs; training with mixed precision: forward, loss, backward and a step of AdamW, where it says so "
    "with forward and backward as CUDA graphs, or all of it as one. Models that are no targets are compiled "
    "block by block, where it says so: a whole one takes minutes. timm's models are as they come, their "
    "attention by the backend that PyTorch prefers. Images per second, and the allocator's peak.",
    cases,
)
