"""The GSPN-2 mixer: compact channel proxy, one projection for all scan parameters, learned merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import DIRECTIONS, propagate
from ..ops import fused
from ..ops.packed import propagate_packed
from .layers import Pointwise, is_plain, pointwise

OPERANDS_FROM = ("proxy", "input")

# The directions whose scans begin straight; the others begin along diagonals.
_STRAIGHT = {
    "straight": ("down", "up", "right", "left"),
    "diagonal": (),
    "vertical": ("down", "up"),
    "horizontal": ("right", "left"),
}
INITIAL_TAPS = tuple(_STRAIGHT)
"""Where the scans of a fresh mixer run."""
INITIAL_TURNS = ("vertical", "horizontal")
"""The same for the mixers of a stack, in turns: two of them reach along rows, columns and diagonals."""

# For each direction the tap that a fresh diagonal mixer favors, so that the four scans run down-right,
# up-left, up-right and down-left and every corner reaches the opposite one (see `Mixer.reset_parameters`).
_FAVORED_TAP = {"down": 0, "up": 2, "right": 2, "left": 0}
_FAVORED_LOGIT, _OTHER_LOGIT = 0.0, -3.5
# So far below 0 a normalized sigmoid is nearly a softmax, which answers to small changes.
_EQUAL_LOGIT = -2.0
_OPERAND_SPREAD = 0.2

# From so many proxy channels on, if they come in vectors of 16 bytes (of 16 bits each), a pixel of the packed
# tensor does, too: kernels then read whole vectors of every operand. With fewer the padding would cost more.
_FEWEST_PADDED, _VECTOR = 16, 8

# Up to so many proxy channels a matrix product back from them does nothing but write.
_MOST_SUMMED = 4


class Operands(NamedTuple):
    """Arguments of `gspn2.propagate` in order: D directions, C proxy channels, G tap groups."""

    x: Tensor  # (B, C, H, W)
    logits: Tensor  # (B, D, G, 3, H, W)
    lam: Tensor | None  # (B, D, C, H, W)
    gate: Tensor  # (B, D, C, H, W)


class Mixer(nn.Module):
    """Global mixing of an image at linear cost: (B, dim, H, W) -> (B, dim, H, W).

    ::

        p                 = to_proxy(x)                            compact channel proxy, (B, proxy_dim, H, W)
        lam, gate, logits = to_operands(p)  or  to_operands(x)
        h_d               = scan of lam_d * p in direction d       the recurrence of `gspn2.propagate`
        y                 = sum over directions d of  merge_d / L_d * gate_d * h_d
        output            = from_proxy(y)

    L_d counts the lines that a scan runs over: H for "down" and "up", W for "right" and "left", at most
    `chunk`. (GSPN-2, arXiv 2512.07884: compact proxy, channel-shared taps, gate; merge_d / L_d is ours.)

    **Why 1 / L.** Taps are row-stochastic, so a state is bounded by the sum of all inputs before it, and that
    grows with the size of the image. Divided by L the scan is an average: max |h| / L <= max |lam p|, at any
    size. A model meets the same amplitudes at 224 and at 1024, and a deep stack does not blow up on a large
    image. It is attention's normalization over tokens, and it costs nothing: it is folded, like `merge`, into
    the rows of the projection that makes the gate.

    **Memory.** One projection writes one (B, H, W, P) tensor, P = D (proxy_dim [lam] + proxy_dim [gate] + 3
    groups), and `propagate` reads views of it; with operands_from="input" the proxy is in that tensor, too.
    From 16 proxy channels on P is rounded up to a multiple of 8 if proxy_dim is one; the rest is never read.
    With a channels_last input nothing is copied for its layout, forward or backward, and the output is
    channels_last. A compiled model hands that tensor over as a whole. Projections that are not what they were
    made as (an adapter in their place, hooks of a library that moves or casts weights) are called one by one,
    and what they put out is scaled instead of their weights.

    Args:
        dim: channels of input and output.
        proxy_dim: channels that are propagated.
        groups: tap groups G, a divisor of proxy_dim: 1 shares the taps between all proxy channels (GSPN-2),
            proxy_dim gives each its own (GSPN-1).
        directions: scans to run, out of "down", "up", "right", "left".
        chunk: lines between restarts of the state (the local variant); None scans the whole image.
        operands_from: make lam, gate and logits from the "proxy" or from the "input".
        lam: learn an input scale; otherwise it is 1.
        gate: learn an output gate from the data; otherwise it is the learned weight of the direction alone.
        bias: biases in the projections to and from the proxy. The operands' projection always has one: it
            holds the resting values of taps, lam and gate.
        gain: size of a fresh output projection: how much of the average's amplitude the mixer puts out. The
            default suits a residual stream of many mixers; next to a norm it may be 1.
        initial_taps: where the scans of a fresh mixer run: "straight", "diagonal", or "vertical" or
            "horizontal", where those of rows or those of columns alone run straight (`reset_parameters`).
        backend, keep_hidden: as for `gspn2.propagate`; kept states are (B, D, proxy_dim, H, W).

    Raises:
        ValueError, TypeError: an argument is out of its range, or the input is no (B, dim, H, W).
    """

    def __init__(
        self,
        dim: int,
        proxy_dim: int,
        *,
        groups: int = 1,
        directions: Sequence[str] = DIRECTIONS,
        chunk: int | None = None,
        operands_from: str = "proxy",
        lam: bool = True,
        gate: bool = True,
        bias: bool = True,
        gain: float = 0.2,
        initial_taps: str = "diagonal",
        backend: str | None = None,
        keep_hidden: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(dim, proxy_dim, groups, directions, chunk, operands_from)
        _check_switches(lam=lam, gate=gate, bias=bias, keep_hidden=keep_hidden)
        if initial_taps not in INITIAL_TAPS:
            raise ValueError(f"initial_taps: expected one of {', '.join(INITIAL_TAPS)}, got {initial_taps!r}")
        self.dim = dim
        self.proxy_dim = proxy_dim
        self.groups = groups
        self.directions = tuple(directions)
        self.chunk = chunk
        self.operands_from = operands_from
        self.gain = gain
        self.initial_taps = initial_taps
        self.backend = backend
        self.keep_hidden = keep_hidden
        scans = len(self.directions)
        per_channel = scans * proxy_dim
        # Channels of the packed tensor: (lam, gate, logits).
        self.sizes = (per_channel * lam, per_channel * gate, scans * groups * 3)
        aligned = proxy_dim % _VECTOR == 0 and proxy_dim >= _FEWEST_PADDED
        # Channels of the packed tensor after these, which hold nothing.
        self.padding = -sum(self.sizes) % _VECTOR if aligned else 0
        self.to_proxy = Pointwise(dim, proxy_dim, bias=bias)
        self.to_operands = Pointwise(proxy_dim if operands_from == "proxy" else dim, sum(self.sizes))
        self.merge = nn.Parameter(torch.empty(scans, proxy_dim))
        self.from_proxy = Pointwise(proxy_dim, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize: a gentle average over the image, along rows and columns or along diagonals.

        lam and gate rest at 1 and `merge` at 1 / D; their data-dependent parts, and that of the logits,
        have a standard deviation of 0.2 for a unit-variance source. The output projection adds `gain` = 0.2
        of the average's amplitude to a residual stream: growth over 100 layers stays below an order of
        magnitude at any image size, and the gradients of the first and of the last layer are of one size.

        "straight" begins with three equal taps: what a place sends spreads as a bell that is as wide as the
        root of the distance, around its own row or column. On the way to the opposite corner the weight is
        3^-L, which is nothing. "diagonal" favors one diagonal neighbor (weight 0.9), a different diagonal for
        each of the four directions; odd tap groups favor the mirrored one. There the weight along a row falls
        as 20^-L. Gradients come back the way that states went, so what a fresh mixer does not reach it hardly
        learns to. "vertical" has down and up straight, right and left diagonal, "horizontal" the other way
        round: a stack of mixers that take turns (`INITIAL_TURNS`) has all ways, each of them in every other
        mixer.
        """
        nn.init.normal_(self.to_proxy.weight, std=self.to_proxy.in_features**-0.5)
        nn.init.normal_(self.from_proxy.weight, std=self.gain * self.from_proxy.in_features**-0.5)
        for projection in (self.to_proxy, self.from_proxy):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.constant_(self.merge, 1.0 / len(self.directions))
        source = self.to_operands.in_features
        nn.init.normal_(self.to_operands.weight, std=_OPERAND_SPREAD * source**-0.5)
        with torch.no_grad():
            ones = torch.ones(self.sizes[0] + self.sizes[1])
            self.to_operands.bias.copy_(torch.cat([ones, self._resting_logits().flatten()]))

    def _resting_logits(self) -> Tensor:
        """Those of a fresh mixer's taps, (D, groups, 3)."""
        logits = torch.full((len(self.directions), self.groups, 3), _OTHER_LOGIT)
        for d, direction in enumerate(self.directions):
            if direction in _STRAIGHT[self.initial_taps]:
                logits[d] = _EQUAL_LOGIT
                continue
            favored = _FAVORED_TAP[direction]
            logits[d, ::2, favored] = _FAVORED_LOGIT
            logits[d, 1::2, 2 - favored] = _FAVORED_LOGIT
        return logits

    def operands(self, x: Tensor) -> Operands:
        """What the mixer propagates for the input x (B, dim, H, W): views into one packed tensor.

        Public so that a model's own taps can be looked at; `gspn2.propagate(*mixer.operands(x))`, with the
        mixer's directions and chunk, is what `forward` projects back.
        """
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        merge = self._merge(x.shape[2], x.shape[3])
        proxy, lam, gate, logits = self._projected(x, merge)
        return Operands(
            x=proxy,
            logits=logits.unflatten(-1, (len(self.directions), self.groups, 3)).permute(0, 3, 4, 5, 1, 2),
            lam=self._per_channel(lam) if self.sizes[0] else None,
            gate=self._per_channel(gate) if self.sizes[1] else self._constant_gate(merge, logits),
        )

    def _projected(self, x: Tensor, merge: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The proxy (B, proxy_dim, H, W); lam, gate and logits (B, H, W, channels), as `sizes` has them."""
        if not is_plain(self.to_proxy, self.to_operands):
            proxy = self.to_proxy(x)
            made = self.to_operands(proxy if self.operands_from == "proxy" else x)
            lam, gate, logits = made.permute(0, 2, 3, 1).split(self.sizes, dim=-1)
            return proxy, lam, gate * merge.flatten().to(gate.dtype) if self.sizes[1] else gate, logits
        weight, bias = self._operand_rows(merge)
        if self.operands_from == "proxy":
            proxy = self.to_proxy(x)
            packed = pointwise(proxy, weight, bias).permute(0, 2, 3, 1)
            lam, gate, logits, _ = packed.split((*self.sizes, self.padding), dim=-1)
            return proxy, lam, gate, logits
        sizes = (self.proxy_dim, *self.sizes, self.padding)
        pixels, lam, gate, logits, _ = self._packed(x, weight, bias).split(sizes, dim=-1)
        return pixels.permute(0, 3, 1, 2), lam, gate, logits

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixed(x)
        compiled = torch.compiler.is_dynamo_compiling() and y.is_cuda
        summed = compiled and self.proxy_dim <= _MOST_SUMMED and is_plain(self.from_proxy)
        return self._sums(y) if summed else self.from_proxy(y)

    def mixed(self, x: Tensor) -> Tensor:
        """The proxies after propagation: (B, dim, H, W) -> (B, proxy_dim, H, W)."""
        if self._packs(x):
            rows = self._operand_rows(self._merge(x.shape[2], x.shape[3]))
            return propagate_packed(
                self._packed(x, *rows, aligned=x.is_cuda),
                self.proxy_dim,
                self.groups,
                self.directions,
                self.chunk,
                self.sizes[0] > 0,
                self.backend,
            )
        return propagate(
            *self.operands(x),
            directions=self.directions,
            chunk=self.chunk,
            backend=self.backend,
            keep_hidden=self.keep_hidden,
        )

    def _packs(self, x: Tensor) -> bool:
        """Is this compiled or fused, and all in one tensor? Then the operator takes it as one argument."""
        few = self.proxy_dim + sum(self.sizes) <= fused.MOST_OUTPUTS
        return (
            # Of torch.compile alone: exported programs keep to the operator that their readers know.
            # (is_exporting is True in everything that PyTorch 2.11 compiles.)
            (torch.compiler.is_dynamo_compiling() or (few and fused.at_work(x)))
            and self.operands_from == "input"
            and self.sizes[1] > 0
            and not self.padding
            and not self.keep_hidden
            and is_plain(self.to_proxy, self.to_operands)
        )

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor, aligned: bool = False) -> Tensor:
        """(B, H, W, P): the proxy, lam, gate and logits made from x, given the operands' rows.

        aligned: multiply with rows of zeros up to a multiple of 8, and drop what they make. Matrix products
        with rows of odd sizes take longer than that and a copy.
        """
        proxy_bias = self.to_proxy.bias if self.to_proxy.bias is not None else bias.new_zeros(self.proxy_dim)
        weight, bias = torch.cat([self.to_proxy.weight, weight]), torch.cat([proxy_bias, bias])
        rows = weight.shape[0]
        if rows <= fused.MOST_OUTPUTS and fused.at_work(x):
            return fused.narrow_linear(x.permute(0, 2, 3, 1), weight, bias)
        if aligned and rows % _VECTOR:
            missing = -rows % _VECTOR
            weight, bias = F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing))
            packed = pointwise(x, weight, bias).permute(0, 2, 3, 1)[..., :rows]
            return packed.contiguous()
        return pointwise(x, weight, bias).permute(0, 2, 3, 1)

    def _sums(self, y: Tensor) -> Tensor:
        """`from_proxy` from few channels, as sums that a compiler puts into the pass after them."""
        pixels, weight = y.permute(0, 2, 3, 1), self.from_proxy.weight
        result = pixels[..., :1] * weight[:, 0]
        for c in range(1, self.proxy_dim):
            result = result + pixels[..., c : c + 1] * weight[:, c]
        if self.from_proxy.bias is not None:
            result = result + self.from_proxy.bias
        return result.to(y.dtype).permute(0, 3, 1, 2)

    def _merge(self, height: int, width: int) -> Tensor:
        """merge_d / L_d, (D, proxy_dim)."""
        rows, columns = height, width
        if self.chunk is not None:
            rows, columns = min(rows, self.chunk), min(columns, self.chunk)
        # One operation in place of four counts where launches are the limit. Graphs are for all sizes.
        if not torch.compiler.is_compiling() and rows == columns:
            return self.merge * (1 / rows)
        # Filled in place: no copy to the device and no graph per size. A buffer of ones and zeros would come
        # without its values out of a model that was made on "meta".
        scale = self.merge.new_full((len(self.directions), 1), 1 / rows)
        for d, direction in enumerate(self.directions):
            if direction in ("right", "left"):
                scale[d].fill_(1 / columns)
        return self.merge * scale

    def _operand_rows(self, merge: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (P, source) and bias (P,) of the operands' projection, the gate's rows scaled by `merge`."""
        weight: Tensor = self.to_operands.weight
        bias: Tensor = self.to_operands.bias
        if self.sizes[1]:
            scale = F.pad(merge.flatten(), (self.sizes[0], self.sizes[2]), value=1.0)
            weight, bias = weight * scale[:, None], bias * scale
        if self.padding:
            weight, bias = F.pad(weight, (0, 0, 0, self.padding)), F.pad(bias, (0, self.padding))
        return weight, bias

    def _per_channel(self, pixels: Tensor) -> Tensor:
        """(B, H, W, D C) -> (B, D, C, H, W), a view."""
        return pixels.unflatten(-1, (len(self.directions), self.proxy_dim)).permute(0, 3, 4, 1, 2)

    def _constant_gate(self, merge: Tensor, logits: Tensor) -> Tensor:
        """The merge weights (D, C) as a gate (B, D, C, H, W), a view; of the size and dtype of the logits."""
        batch, height, width, _ = logits.shape
        return merge.to(logits.dtype)[None, :, :, None, None].expand(batch, -1, -1, height, width)

    def extra_repr(self) -> str:
        text = f"{self.dim}, proxy_dim={self.proxy_dim}, groups={self.groups}"
        if self.operands_from != "proxy":
            text += f", operands_from={self.operands_from!r}"
        if self.directions != DIRECTIONS:
            text += f", directions={self.directions}"
        return text if self.chunk is None else f"{text}, chunk={self.chunk}"


def _check_arguments(
    dim: int,
    proxy_dim: int,
    groups: int,
    directions: Sequence[str],
    chunk: int | None,
    operands_from: str,
) -> None:
    for name, value in (("dim", dim), ("proxy_dim", proxy_dim), ("groups", groups), ("chunk", chunk)):
        if value is None and name == "chunk":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if proxy_dim % groups:
        raise ValueError(f"groups: expected a divisor of proxy_dim = {proxy_dim}, got {groups}")
    # Their order is that of weights: a set has none.
    if isinstance(directions, str) or not isinstance(directions, Sequence):
        raise TypeError(f"directions: expected a sequence of names, got {directions!r}")
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(
            f"directions: expected some of {', '.join(DIRECTIONS)}, none twice, got {directions}"
        )
    if operands_from not in OPERANDS_FROM:
        raise ValueError(f"operands_from: expected one of {', '.join(OPERANDS_FROM)}, got {operands_from!r}")


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
