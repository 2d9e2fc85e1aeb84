"""One mixer sub-layer against attention and linear attention, with and without its projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gspn2

from ..nn import Mixer
from .case import Absent, Case, Contender, Part, Pass
from .check import Wrong, refuse_if_far
from .measure import Work

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
LINEAR = {
    # Name: module, function, whether it takes a decay for each token and head.
    "linear attention (fla)": ("fla.ops.linear_attn", "chunk_linear_attn", False),
    "state-space scan (fla)": ("fla.ops.simple_gla", "chunk_simple_gla", True),
}
MOST_SCORES = {"cuda": 2**34, "cpu": 2**28}
"""Bytes that the score matrix of the math backend may have."""
MOST_FLOPS = {"cuda": 6e15, "cpu": 4e11}
"""Attention that needs more is left out: at best ten seconds a call."""
TRAINED_FLOPS = {"cuda": 1e14, "cpu": 5e10}
"""Backward is measured up to here."""
LONG_FLOPS = 1e15
"""Attention that needs more is run once, and only by the fastest backends."""
FASTEST = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Within sub-layers and blocks, on a GPU: PyTorch asks flash first, and cuDNN is faster on an H200."""
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative distance of a result from another way to it in the same dtype."""
GRADIENT_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The same of gradients; those of weights are sums over all tokens of what was rounded in every layer."""
REFERENCED_TOKENS = 65536
"""Gradients of ours are compared with the reference's, which takes line by line, up to so many tokens."""
QUERIES = 32
"""Attention is checked on so many of them."""
REFUSALS = ("Please upgrade Triton",)
"""What flash-linear-attention says of versions of Triton with which it would be wrong."""
PROXY = 8
"""Channels for each proxy channel, as in the SDXL models of the paper."""


@dataclass(frozen=True)
class Layer:
    """A place where a model mixes tokens.

    Args:
        name: in the table.
        batch: images.
        dim: channels of a token.
        heads: of attention.
        grid: tokens as rows and columns.
        block: measure a whole block, too.
        first, extra: as for `Case`.
        seconds: that it takes, about.
        linear: measure it beside linear attention, too.
    """

    name: str
    batch: int
    dim: int
    heads: int
    grid: tuple[int, int]
    block: bool = False
    first: bool = False
    extra: bool = False
    seconds: float = 4.0
    linear: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def flops(self) -> int:
        """Of softmax attention, forward: scores and weighted sums."""
        return 4 * self.batch * self.tokens**2 * self.dim

    def bytes(self, itemsize: int) -> int:
        """Of q, k, v and the output."""
        return 4 * self.batch * self.tokens * self.dim * itemsize


def _vit(pixels: int, **how: Any) -> Layer:
    side = pixels // 16
    return Layer(f"ViT-B, {pixels} pixels", 1, 768, 12, (side, side), **how)


LAYERS = [
    _vit(256),
    _vit(512),
    _vit(1024, first=True, linear=True),
    _vit(2048),
    _vit(4096, first=True, linear=True),
    _vit(8192, seconds=15.0),
    _vit(16384, extra=True, seconds=60.0, linear=True),
    Layer(
        "SigLIP2-B, 1024 pixels, batch 32",
        32,
        768,
        12,
        (64, 64),
        block=True,
        first=True,
        seconds=6.0,
        linear=True,
    ),
    Layer("SigLIP2-B, 2048 pixels, batch 32", 32, 768, 12, (128, 128), block=True, seconds=25.0),
    Layer("SDXL 1K, level 1", 2, 640, 10, (64, 64)),
    Layer("SDXL 1K, level 2", 2, 1280, 20, (32, 32)),
    Layer("SDXL 4K, level 1", 1, 640, 10, (256, 256), first=True, seconds=5.0, linear=True),
    Layer("SDXL 4K, level 2", 1, 1280, 20, (128, 128)),
    Layer("SDXL 16K, level 1", 1, 640, 10, (1024, 1024), extra=True, seconds=60.0),
    Layer("SDXL 16K, level 2", 1, 1280, 20, (512, 512), seconds=30.0),
]
SMALL = [
    Layer("ViT-B, 256 pixels", 1, 768, 12, (16, 16)),
    Layer("ViT-B, 512 pixels", 1, 768, 12, (32, 32), first=True),
    Layer("ViT-B, 1024 pixels", 1, 768, 12, (64, 64)),
    Layer("SDXL 1K, level 1", 1, 640, 10, (64, 64), extra=True),
    Layer("ViT-B, 512 pixels, block", 1, 768, 12, (32, 32), block=True, extra=True),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Every layer; and once more beside linear attention, whose kernels take minutes to choose from."""
    for layer in SMALL if device.type == "cpu" else LAYERS:
        yield Case(
            "attention",
            layer.name,
            _facts(layer),
            lambda device, layer=layer: contenders(layer, device),  # type: ignore[misc]
            first=layer.first,
            extra=layer.extra,
            rounds=1 if layer.flops > LONG_FLOPS else 5,
            seconds=layer.seconds,
        )
    beside = [] if device.type == "cpu" else [layer for layer in LAYERS if layer.linear]
    for layer in beside:
        yield Case(
            "attention",
            f"{layer.name}, linear",
            _facts(layer),
            lambda device, layer=layer: linear_contenders(layer, device),  # type: ignore[misc]
            extra=True,
            rounds=5,
            # The first one waits for the choice, if there is one.
            seconds=150.0 if layer == beside[0] and find_spec("fla") else 5.0,
        )


def _facts(layer: Layer) -> dict[str, Any]:
    return {
        "batch": layer.batch,
        "tokens": layer.tokens,
        "grid": list(layer.grid),
        "dim": layer.dim,
        "heads": layer.heads,
        "proxy": layer.dim // PROXY,
    }


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def contenders(layer: Layer, device: torch.device) -> list[Contender]:
    """Scans, mixers, attention by every backend; blocks where the layer asks for them."""
    found = [
        Contender(name, lambda backend=backend: _sdpa(layer, device, backend))  # type: ignore[misc]
        for name, backend in SDPA.items()
    ]
    found.append(Contender("GSPN-2, scan", lambda: _scan(layer, device)))
    found += [
        Contender("attention, sub-layer", lambda: _module(Sublayer(layer, True), layer, device, layer.flops)),
        Contender("GSPN-2, sub-layer", lambda: _module(Sublayer(layer, False), layer, device)),
    ]
    if layer.block:
        found += [
            Contender("attention, block", lambda: _module(Block(layer, True), layer, device, layer.flops)),
            Contender("GSPN-2, block", lambda: _module(Block(layer, False), layer, device)),
        ]
    return found


def linear_contenders(layer: Layer, device: torch.device) -> list[Contender]:
    """The scan, and what else takes time proportional to the number of tokens."""
    found = [Contender("GSPN-2, scan", lambda: _scan(layer, device))]
    found += [
        Contender(name, lambda which=which: _linear(layer, device, *which))  # type: ignore[misc]
        for name, which in LINEAR.items()
    ]
    return found


class Sublayer(nn.Module):
    """What mixes tokens, with its projections: a mixer, or multi-head attention; (B, N, dim) to the same."""

    def __init__(self, layer: Layer, attention: bool) -> None:
        super().__init__()
        self.layer = layer
        if attention:
            self.qkv = nn.Linear(layer.dim, 3 * layer.dim)
            self.out = nn.Linear(layer.dim, layer.dim)
        else:
            self.mixer = Mixer(layer.dim, layer.dim // PROXY)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention:
            image = x.unflatten(1, self.layer.grid).permute(0, 3, 1, 2)
            return self.mixer(image).permute(0, 2, 3, 1).flatten(1, 2)
        with sdpa_kernel(PREFERRED, set_priority=True) if x.is_cuda else nullcontext():
            y = F.scaled_dot_product_attention(*self._heads(x))
        return self.out(y.transpose(1, 2).flatten(2))

    def exact(self, x: Tensor) -> Tensor:
        """Attention of the first tokens by its definition: (B, QUERIES at most, dim)."""
        q, k, v = self._heads(x)
        y = _softmax_attention(q[:, :, :QUERIES], k, v).to(x.dtype)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """q, k and v: (3, B, heads, N, channels of a head)."""
        return self.qkv(x).unflatten(-1, (3, self.layer.heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """A transformer's block: norm and sub-layer, norm and a feed-forward network four times as wide."""

    def __init__(self, layer: Layer, attention: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(layer.dim) for _ in range(2))
        self.mix = Sublayer(layer, attention)
        self.ffn = nn.Sequential(
            nn.Linear(layer.dim, 4 * layer.dim), nn.GELU(), nn.Linear(4 * layer.dim, layer.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))

    def exact(self, x: Tensor) -> Tensor:
        """As `Sublayer.exact`."""
        x = x[:, :QUERIES] + self.mix.exact(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is defined, in float32."""
    scores = q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ v.float()


def _scan(layer: Layer, device: torch.device) -> dict[str, Pass]:
    """The operator alone, on the operands that a mixer of this width makes."""
    dtype = dtype_on(device)
    mixer = Mixer(layer.dim, layer.dim // PROXY).to(device, dtype)
    image = torch.randn(layer.batch, *layer.grid, layer.dim, device=device, dtype=dtype).permute(0, 3, 1, 2)
    with torch.no_grad():
        operands = [None if it is None else it.detach() for it in mixer.operands(image)]
    dy = torch.randn_like(operands[0])  # type: ignore[arg-type]
    leaves = [None if it is None else it.requires_grad_() for it in operands]

    def forward(backend: str | None = None) -> Tensor:
        return gspn2.propagate(*leaves, backend=backend)  # type: ignore[arg-type]

    moved = sum(it.nbytes for it in operands if it is not None) + dy.nbytes
    flops = 40 * dy.numel()
    inputs = [it for it in leaves if it is not None]
    check = lambda: _against_reference(forward)  # noqa: E731
    return _passes(layer, device, forward, inputs, dy, moved, flops, check, referenced=True)


def _module(
    module: Sublayer | Block, layer: Layer, device: torch.device, attention_flops: int = 0
) -> dict[str, Pass]:
    """A layer with parameters, on tokens (B, N, dim)."""
    dtype = dtype_on(device)
    _refuse_if_too_long(attention_flops, device)
    if attention_flops > LONG_FLOPS:
        raise Absent("its attention alone stands for it at this size")
    module = module.to(device, dtype)
    x, dy = (torch.randn(layer.batch, layer.tokens, layer.dim, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def forward(backend: str | None = None) -> Tensor:
        for it in module.modules():
            if isinstance(it, Mixer):
                it.backend = backend
        return module(x)

    weights = list(module.parameters())
    flops = attention_flops + 2 * layer.batch * layer.tokens * sum(w.numel() for w in weights if w.ndim > 1)
    moved = 2 * dy.nbytes + sum(w.nbytes for w in weights)

    def check() -> dict[str, float]:
        if not attention_flops:
            return _against_reference(forward)
        with torch.no_grad():
            found = forward()
            truth = module.exact(x[:1])
        if not found.isfinite().all():
            raise Wrong("the result is not finite")
        return {"y": refuse_if_far("y", found[:1, :QUERIES], truth.double(), AGREEMENT[dtype])}

    ours = not attention_flops
    return _passes(
        layer, device, forward, [x, *weights], dy, moved, flops, check, attention_flops, referenced=ours
    )


def _sdpa(layer: Layer, device: torch.device, backend: SDPBackend) -> dict[str, Pass]:
    if device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        raise Absent("a CUDA kernel")
    _refuse_if_too_long(layer.flops, device)
    if layer.flops > LONG_FLOPS and backend not in FASTEST:
        raise Absent("flash and cuDNN stand for attention at this size")
    scores = layer.batch * layer.heads * layer.tokens**2 * dtype_on(device).itemsize
    if backend == SDPBackend.MATH and scores > MOST_SCORES.get(device.type, 0):
        raise Absent(f"its score matrix would take {scores / 2**30:.0f} GiB")
    q, k, v, dy = _heads(layer, device, 4)
    inputs = [it.requires_grad_() for it in (q, k, v)]

    def forward(_: str | None = None) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v)

    def check() -> dict[str, float]:
        try:
            with torch.no_grad():
                truth = _softmax_attention(q[:, :, :QUERIES], k, v)
                found = forward()[:, :, :QUERIES]
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Absent("this backend does not take the problem here") from error
            raise
        return {"y": refuse_if_far("y", found, truth.double(), AGREEMENT[q.dtype])}

    moved = layer.bytes(q.element_size())
    return _passes(layer, device, forward, inputs, dy, moved, layer.flops, check, layer.flops)


def _linear(layer: Layer, device: torch.device, module: str, function: str, decays: bool) -> dict[str, Pass]:
    """Causal linear attention of flash-linear-attention: tokens in reading order, (B, N, heads, channels)."""
    if device.type == "cpu":
        raise Absent("a Triton kernel")
    if find_spec("fla") is None:
        raise Absent('flash-linear-attention is not installed: pip install "gspn2[fla]"')
    operator: Any = getattr(import_module(module), function)
    q, k, v, dy = (it.transpose(1, 2).contiguous() for it in _heads(layer, device, 4))
    inputs = [it.detach().requires_grad_() for it in (q, k, v)]
    decay = -torch.rand(q.shape[:3], device=device) if decays else None

    def forward(_: str | None = None) -> Tensor:
        options = {"g": decay} if decays else {"normalize": False}
        return operator(*inputs, **options)[0]

    def unless_refused(check: Callable[[], dict[str, float]]) -> dict[str, float]:
        try:
            return check()
        except RuntimeError as error:
            if any(words in str(error) for words in REFUSALS):
                raise Absent(str(error).splitlines()[0]) from error
            raise

    flops = 4 * layer.batch * layer.tokens * layer.dim * (layer.dim // layer.heads)
    moved = layer.bytes(q.element_size())
    check = lambda: _causal(forward, inputs, decay)  # noqa: E731
    passes = _passes(layer, device, forward, inputs, dy, moved, flops, check)
    return {
        name: replace(it, check=lambda it=it: unless_refused(it.check))  # type: ignore[misc]
        for name, it in passes.items()
    }


def _causal(forward: Callable[[], Tensor], inputs: list[Tensor], decay: Tensor | None) -> dict[str, float]:
    """The first tokens of causal linear attention, by its definition."""
    q, k, v = (it[:, :QUERIES].detach().double().transpose(1, 2) for it in inputs)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).tril()
    if decay is not None:
        passed = decay[:, :QUERIES].double().cumsum(1).transpose(1, 2)
        weights = weights * (passed.unsqueeze(-1) - passed.unsqueeze(-2)).tril().exp()
    with torch.no_grad():
        found = forward()[:, :QUERIES].transpose(1, 2)
    return {"y": refuse_if_far("y", found, weights @ v, AGREEMENT[found.dtype])}


def _heads(layer: Layer, device: torch.device, count: int) -> list[Tensor]:
    """Random tensors (B, heads, N, channels of a head)."""
    size = (layer.batch, layer.heads, layer.tokens, layer.dim // layer.heads)
    return [torch.randn(size, device=device, dtype=dtype_on(device)) for _ in range(count)]


def _passes(
    layer: Layer,
    device: torch.device,
    forward: Callable[..., Tensor],
    inputs: list[Tensor],
    dy: Tensor,
    moved: int,
    flops: int,
    check: Callable[[], dict[str, float]],
    attention_flops: int = 0,
    referenced: bool = False,
) -> dict[str, Pass]:
    """Forward, and where it does not take too long forward and backward together.

    Args:
        layer, device: of the case.
        forward: of a backend of the operator, or None for the package's choice.
        inputs, dy: what gradients are asked of, and the one that comes in.
        moved, flops: of forward.
        check: of forward.
        attention_flops: those of them that are attention's.
        referenced: are there the same gradients by the plain reference?
    """

    def infer(_: int) -> Tensor:
        with torch.no_grad():
            return forward()

    def train(_: int) -> Any:
        return torch.autograd.grad(forward(), inputs, dy)

    long = 2 * attention_flops > TRAINED_FLOPS.get(device.type, torch.inf) / 10
    found = {"forward": Pass(Work(infer, graph=not long), check, moved, flops)}
    if 3 * attention_flops < TRAINED_FLOPS.get(device.type, torch.inf):
        by_reference = referenced and layer.tokens <= REFERENCED_TOKENS
        truth = (lambda: torch.autograd.grad(forward("reference"), inputs, dy)) if by_reference else None
        check_train = lambda: _right_gradients(train(0), truth)  # noqa: E731
        found["train"] = Pass(Work(train, graph=False), check_train, 3 * moved, 3 * flops)
    return found


def _against_reference(forward: Callable[..., Tensor]) -> dict[str, float]:
    """With the package's choice of backend, against its plain reference in the same dtype."""
    with torch.no_grad():
        found, truth = forward(), forward("reference")
    return {"y": refuse_if_far("y", found, truth.double(), AGREEMENT[found.dtype])}


def _right_gradients(
    found: tuple[Tensor, ...], by_reference: Callable[[], tuple[Tensor, ...]] | None
) -> dict[str, float]:
    """Finite, and where there is a reference near to it: the largest distance of any."""
    if not all(gradient.isfinite().all() for gradient in found):
        raise Wrong("a gradient is not finite")
    if by_reference is None:
        return {}
    errors = [
        refuse_if_far(f"gradient {i}", it, truth.double(), GRADIENT_AGREEMENT[it.dtype])
        for i, (it, truth) in enumerate(zip(found, by_reference(), strict=True))
    ]
    return {"gradients": max(errors)}


def _refuse_if_too_long(flops: int, device: torch.device) -> None:
    if flops > MOST_FLOPS.get(device.type, torch.inf):
        raise Absent(f"{flops / 1e12:.0f} TFLOP a call take too long here")


PART = Part(
    "attention",
    "Beside attention",
    "What mixes the tokens of one layer: the four-direction scan on the operands of a mixer with an "
    f"{PROXY}th of the channels as proxy, and scaled dot-product attention on q, k, v by every backend of "
    "PyTorch; then both as sub-layers with their projections, and as whole blocks, on a GPU with cuDNN's "
    "attention where it takes the problem, as the fastest one there. Forward is inference, "
    "train forward and backward. Linear attention scans tokens once, in reading order.",
    cases,
)
