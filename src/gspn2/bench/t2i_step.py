"""One step of a UNet three ways around the same weights: with attention, with mixers, with neither."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .case import Absent, Pass
from .check import Wrong, refuse_if_far
from .measure import Work, in_turn
from .results import Row
from .t2i_sdxl import SCALE, Shape, conditions, dtype_on, latents

ATTENTION, MIXERS, CUT = "attention", "GSPN-2", "no self-attention"
STEP, GRAPH = "step", "step, CUDA graph"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PROBED_TOKENS = 128 * 128
"""The backends of attention are compared on so many tokens at most; the faster one is used at every level."""
MOST_GRAPHED = 2048
"""Pixels of a side up to which the step is measured as a CUDA graph, too: beyond, the host is far ahead."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""How PyTorch says that a backend does not take a problem."""
WARM_TOKENS = 4096
CHECKED = 256
"""Rows that a mixer is checked on at most, and one column more: the reference goes line by line."""
TOKENS = 65536
"""A feed-forward takes so many tokens at a time, as `gspn2 generate` does it."""
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class NoAttention(nn.Module):
    """Stands in for a self-attention and takes no time.

    Its output is its input: adding a tensor of that size then costs what it costs behind a mixer, and less
    than PyTorch takes to add a single zero to all of it.
    """

    def forward(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        return hidden_states


class Networks:
    """UNets around the same weights.

    Args:
        shape: of the pipeline.
        device: where they are made.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._stack = ExitStack()

    @cached_property
    def weights(self) -> Any:
        """The UNet that the others share their weights with; itself it is not run."""
        from ..integrations.diffusers.untrained import make_unet

        return make_unet(self._shape.unet, self._device, dtype_on(self._device))

    @cached_property
    def attention(self) -> Any:
        """The UNet as it is."""
        return self._frugal(self.twin())

    @cached_property
    def mounted(self) -> Any:
        """Mixers in the place of self-attention."""
        return self._frugal(self.with_mixers())

    @cached_property
    def cut(self) -> Any:
        """No self-attention."""
        unet = self.twin()
        for name in [name for name, _ in self_attentions(unet)]:
            unet.set_submodule(name, NoAttention())
        return self._frugal(unet)

    def with_mixers(self, shared: bool = True) -> Any:
        """Another UNet around the same weights or copies, with mixers that put out more than zeros."""
        from ..integrations.diffusers import mount

        unet = self.twin() if shared else copy.deepcopy(self.weights)
        mount(unet, zero_output=False)
        return unet

    def twin(self) -> Any:
        """Another UNet around the same weights."""
        from ..integrations.diffusers.distillation import twin

        return twin(self.weights)

    def _frugal(self, unet: Any) -> Any:
        """As `gspn2 generate` runs it, for as long as it lives: entering takes the host more than a step."""
        from ..integrations.diffusers.execution import frugal

        self._stack.enter_context(frugal(unet, tokens=TOKENS))
        return unet


@lru_cache(maxsize=1)
def networks(shape: Shape, device: torch.device) -> Networks:
    """The UNets of the shape and device that were asked for last: making them takes long."""
    return Networks(shape, device)


class Step:
    """A step of a UNet for a picture of some size.

    Args:
        shape: of the pipeline.
        height, width: of the picture in pixels.
        device: to measure on; "meta" to find the kernels that will be needed.
    """

    def __init__(self, shape: Shape, height: int, width: int, device: torch.device) -> None:
        self.shape, self.height, self.width, self.device = shape, height, width, device

    @property
    def nets(self) -> Networks:
        return networks(self.shape, self.device)

    @cached_property
    def levels(self) -> dict[int, tuple[int, tuple[int, int], str]]:
        """For each width of tokens: self-attentions, rows and columns of their tokens, name of the first."""
        found: dict[int, tuple[int, tuple[int, int], str]] = {}
        channels = list(self.shape.unet["block_out_channels"])
        for name, module in self_attentions(self.nets.weights):
            dim = module.query_dim
            places = SCALE * 2 ** channels.index(dim)
            grid = (self.height // places, self.width // places)
            count, _, first = found.get(dim, (0, grid, name))
            found[dim] = (count + 1, grid, first)
        return found

    @cached_property
    def backend(self) -> str:
        """The faster one of `BACKENDS` for the widest level; "default" where there is none to choose."""
        if self.device.type != "cuda":
            return "default"
        dim, (_, grid, name) = min(self.levels.items())
        tokens = min(grid[0] * grid[1], PROBED_TOKENS)
        layer = self.nets.attention.get_submodule(name)
        x = torch.randn(1, tokens, dim, device=self.device, dtype=self.nets.weights.dtype)
        works: dict[str, Work] = {}
        for backend, kind in BACKENDS.items():

            def call(_: int, kind: SDPBackend = kind) -> Tensor:
                with torch.no_grad(), sdpa_kernel([kind]):
                    return layer(x)

            try:
                call(0)
            except RuntimeError as error:
                if not any(told in str(error) for told in NO_KERNEL):
                    raise
                continue
            works[backend] = Work(call)
        times = {backend: it["ms"] for backend, it in in_turn(works, self.device, 5).items()}
        return min(times, key=times.__getitem__) if times else "default"

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Within it attention prefers `backend`, cross-attention, too."""
        if self.backend == "default":
            yield
            return
        rest = [kind for name, kind in BACKENDS.items() if name != self.backend]
        order = [BACKENDS[self.backend], *rest, SDPBackend.EFFICIENT_ATTENTION]
        with sdpa_kernel(order, set_priority=True):
            yield

    def runner(self, unet: Any) -> Callable[[], Tensor]:
        """A call of a step."""
        given = conditions(unet, self.shape.base)
        noise = latents(unet, self.height, self.width)

        def call() -> Tensor:
            with torch.no_grad(), self.chosen():
                return unet(noise, **given)[0]

        return call

    def passes(self, unet: Any, check: Callable[[], dict[str, float]] = dict) -> dict[str, Pass]:
        """The step of one of the UNets, launched from the host, and as a CUDA graph if it is small.

        Args:
            unet: one of `attention`, `mounted`, `cut`.
            check: what is to be right beside its output.
        """
        call = self.runner(unet)
        if self.device.type == "meta":
            return {STEP: Pass(Work(lambda _: call()), check, 0, 0)}
        weights = sum(it.nbytes for it in unet.parameters())
        with FlopCounterMode(display=False) as counter:
            output, facts = measured_peak(call, weights, self.device)

        def checked() -> dict[str, float]:
            if not output.isfinite().all():
                raise Wrong("the prediction is not finite")
            return check()

        facts |= {} if self.backend == "default" else {"sdpa": self.backend}
        moved, flops = weights + 2 * output.nbytes, counter.get_total_flops()
        # The call above was the warm-up: one of these may take many seconds.
        for module in unet.modules():
            if hasattr(module, "fixed"):
                module.fixed = True  # a mixer: its weights do not change any more
        found = {STEP: Pass(Work(lambda _: call(), graph=False, warm=False), checked, moved, flops, facts)}
        if self.device.type == "cuda" and max(self.height, self.width) <= MOST_GRAPHED:
            found[GRAPH] = Pass(Work(lambda _: call()), checked, moved, flops, facts)
        return found

    def layer_passes(self) -> dict[str, Pass]:
        """One self-attention of each level with its projections, where all of them would take minutes."""
        if self.device.type == "meta":
            raise Absent("nothing to compile")
        found = {}
        for dim, (_, grid, name) in self.levels.items():
            layer, tokens = self.nets.attention.get_submodule(name), grid[0] * grid[1]
            x = torch.randn(1, tokens, dim, device=self.device, dtype=self.nets.weights.dtype)

            def call(x: Tensor, layer: Any = layer) -> Tensor:
                with torch.no_grad(), self.chosen():
                    output = layer(x)
                if not output.isfinite().all():
                    raise Wrong("the output is not finite")
                return output

            # Loads the kernels; a call of the full size may take many seconds.
            call(x[:, :WARM_TOKENS])
            work = Work(lambda _, call=call, x=x: call(x), graph=False, warm=False)  # type: ignore[misc]
            flops = 2 * tokens * (4 * dim**2 + 2 * tokens * dim)
            found[layer_pass(dim)] = Pass(work, dict, 2 * x.nbytes, flops)
        return found

    def check_mixers(self) -> dict[str, float]:
        """A mixer of each level against the plain reference, and the way back from mixers.

        Raises:
            Wrong: a mixer is off, or a UNet whose mixers were unmounted is not what it was.
        """
        from ..integrations.diffusers import mixers_of
        from ..integrations.diffusers.mixers import GRID

        errors = {}
        layers = dict(mixers_of(self.nets.mounted).layers())
        for dim, (_, full, name) in self.levels.items():
            grid = (min(full[0], CHECKED), min(full[1], CHECKED + 1))
            x = torch.randn(1, grid[0] * grid[1], dim, device=self.device, dtype=self.nets.weights.dtype)
            mixer = layers[name].tokens.mixer
            found = []
            for backend in (None, "reference"):
                mixer.backend = backend
                with torch.no_grad():
                    found.append(layers[name](x, **{GRID: grid}))
            mixer.backend = None
            what = f"mixer of {dim} channels"
            errors[what] = refuse_if_far(what, found[0], found[1].double(), AGREEMENT[x.dtype])
        self._check_the_way_back()
        return errors

    def _check_the_way_back(self) -> None:
        from ..integrations.diffusers import mount, unmount

        side = SCALE * 2 ** len(self.shape.unet["block_out_channels"])
        small = Step(self.shape, 2 * side, 3 * side, self.device)
        unet = self.nets.twin()
        call = small.runner(unet)
        before = call()
        mount(unet, zero_output=False)
        between = call()
        unmount(unet)
        if torch.equal(before, between) or not torch.equal(before, call()):
            raise Wrong("mixers that were unmounted have left something behind, or changed nothing")


def self_attentions(unet: Any) -> Iterator[tuple[str, Any]]:
    """Names and modules."""
    return ((name, module) for name, module in unet.named_modules() if name.endswith(".attn1"))


def measured_peak(call: Callable[[], Any], own: int, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """What a call returns, and on a GPU the most memory that it needs.

    Args:
        call: run once.
        own: bytes of its weights; other models are in memory, too.
        device: where.
    """
    if device.type != "cuda":
        return call(), {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return output, {"peak_bytes": torch.cuda.max_memory_allocated() - before + own}


def layer_pass(dim: int) -> str:
    return f"layer of {dim} channels"


def composed(name: str, which: str, ms: float, how: str, **facts: Any) -> Row:
    """A row for a time that was put together from measured ones."""
    nothing = {"bytes": 0, "flops": 0, "gb_per_s": 0.0, "share": 0.0, "tflop_per_s": 0.0, "floor_ms": 0.0}
    spread = {"ms": ms, "quartiles": [ms, ms], "range": [ms, ms], "runs": 0, "launches": 0}
    told = {"method": "composed", "note": f"composed: {how}"}
    return {"name": name, "pass": which, **spread, **nothing, "over_floor": None, **told, **facts}


def with_layers(rows: Sequence[Row], levels: dict[int, int]) -> list[Row]:
    """The step with attention, from the one without and a layer of each level.

    Args:
        rows: of the case.
        levels: number of self-attentions by channels.
    """
    timed = {(it["name"], it["pass"]): it["ms"] for it in rows if "ms" in it}
    parts = [(CUT, STEP), *((ATTENTION, layer_pass(dim)) for dim in levels)]
    if (ATTENTION, STEP) in timed or not all(part in timed for part in parts):
        return []
    layers = {dim: timed[ATTENTION, layer_pass(dim)] for dim in levels}
    ms = timed[CUT, STEP] + sum(count * layers[dim] for dim, count in levels.items())
    told = " + ".join(f"{count} x {layers[dim]:.1f} ms" for dim, count in levels.items())
    return [composed(ATTENTION, STEP, ms, f"{timed[CUT, STEP]:.1f} ms without self-attention + {told}")]
