"""Running networks of diffusers in less memory and time, for as long as a context lasts.

Less memory: one image at a time, and feed-forwards in runs of tokens (`frugal`). Less time: norms and gated
units as single kernels on channels_last images (`fused`), and small UNets as CUDA graphs (`graphed`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .fused import geglu, group_norm
from .mixers import AttentionMixer


@contextlib.contextmanager
def frugal(unet: UNet2DConditionModel, *, tokens: int = 65536) -> Iterator[None]:
    """Within the context the UNet takes a batch image by image, and feed-forwards at most `tokens` at once.

    The results are those of the whole batch: nothing in a UNet looks at two images. Classifier-free guidance,
    a batch of two, then needs the memory of one. The hidden layer of a feed-forward is the largest tensor of
    a UNet (16K: more than 2^31 elements); in runs it never exists as a whole. Unlike diffusers' own chunks, a
    run may be of any length, as any aspect ratio needs.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    with replacing() as replace:
        replace(unet, _one_by_one(unet.forward))
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                replace(module.ff, _in_runs(module.ff.forward, tokens))
        yield


@contextlib.contextmanager
def fused(network: nn.Module) -> Iterator[None]:
    """Within the context norms, with the SiLU after them, and gated units are single kernels on a GPU.

    They hand on channels_last images, and are best with weights in that format. Results agree with PyTorch's
    but for rounding, which happens less often.
    """
    with replacing() as replace:
        after: dict[nn.GroupNorm, bool] = {}
        for module in network.modules():
            if isinstance(module, ResnetBlock2D) and norms_before_silu(module):
                after |= dict.fromkeys(norms_before_silu(module), True)
                replace(module.nonlinearity, _silu_of_vectors)
            elif isinstance(module, nn.GroupNorm):
                after.setdefault(module, False)
            elif isinstance(module, GEGLU):
                replace(module, _geglu(module))
        for norm, silu in after.items():
            replace(norm, _group_norm(norm, silu))
        yield


def norms_before_silu(block: ResnetBlock2D) -> tuple[nn.GroupNorm, ...]:
    """The norms of a residual block that its SiLU follows at once; none if it is built in another way."""
    norms = (block.norm1, block.norm2)
    plain = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
    return norms if plain and all(isinstance(norm, nn.GroupNorm) for norm in norms) else ()


def _silu_of_vectors(x: Tensor) -> Tensor:
    """The SiLU of a residual block whose norms have done it for images; the time embedding is left."""
    return x if x.ndim == 4 else F.silu(x)


def _group_norm(norm: nn.GroupNorm, silu: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    return forward


def _geglu(unit: GEGLU) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(unit.proj(hidden_states))

    return forward


@contextlib.contextmanager
def graphed(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the context the UNet runs as a CUDA graph, one for each set of shapes.

    A small UNet has two thousand launches that take the host longer than the GPU. The first call with a set
    of shapes runs as it is, the second is captured (a ValueError on another device than CUDA). Weights of
    mixers must not change meanwhile. Inside of `frugal` it is the call for a single image.
    """
    mixers = [module for module in unet.modules() if isinstance(module, AttentionMixer)]
    with replacing() as replace:
        replace(unet, _Graphs(unet.forward, unet.device))
        for mixer in mixers:
            mixer.fixed = True
        try:
            yield
        finally:
            for mixer in mixers:
                mixer.fixed = False


class _Graphs:
    """A forward that is captured when shapes come for the second time."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._known: dict[Any, _Graph | None] = {}

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf.to(self._device) for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (str(structure), others, tuple((t.shape, t.stride(), t.dtype) for t in tensors))
        if key not in self._known:
            self._known[key] = None
            return self._forward(*args, return_dict=return_dict, **kwargs)
        graph = self._known[key]
        if graph is None:

            def call(inputs: list[Tensor]) -> Tensor:
                given = iter(inputs)
                filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                again_args, again_kwargs = tree_unflatten(filled, structure)
                return self._forward(*again_args, return_dict=False, **again_kwargs)[0]

            graph = self._known[key] = _Graph(call, tensors)
        sample = graph(tensors)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


class _Graph:
    """A captured call with inputs of its own."""

    def __init__(self, call: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> None:
        if not all(tensor.is_cuda for tensor in tensors):
            raise ValueError(f"unet: expected on a CUDA device, for its graphs, got {tensors[0].device}")
        self._inputs = [tensor.clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = call(self._inputs)

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[nn.Module, Callable[..., Any]], None]]:
    """A function that replaces the forward of a module, until the context ends."""
    replaced: list[tuple[nn.Module, Any]] = []

    def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
        replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    try:
        yield replace
    finally:
        for module, before in reversed(replaced):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _one_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A UNet's forward, image by image."""

    def split(sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        batch = sample.shape[0]
        if batch == 1:
            return forward(sample, *args, return_dict=return_dict, **kwargs)
        outputs = []
        for i in range(batch):
            part_args, part_kwargs = _image(args, i, batch), _image(kwargs, i, batch)
            outputs.append(forward(sample[i : i + 1], *part_args, return_dict=False, **part_kwargs)[0])
        joined = torch.cat(outputs)
        return UNet2DConditionOutput(sample=joined) if return_dict else (joined,)

    return split


def _image(value: Any, i: int, batch: int) -> Any:
    """What of an argument belongs to image i: tensors with a batch are cut, in whatever they lie."""
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _image(each, i, batch) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_image(each, i, batch) for each in value)
    return value


def _in_runs(forward: Callable[..., Tensor], tokens: int) -> Callable[..., Tensor]:
    """A feed-forward (B, N, C) -> (B, N, C'), in runs of tokens."""

    def runs(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.shape[1] <= tokens:
            return forward(hidden_states, *args, **kwargs)
        output: Tensor | None = None
        for start in range(0, hidden_states.shape[1], tokens):
            run = forward(hidden_states[:, start : start + tokens], *args, **kwargs)
            if output is None:
                output = run.new_empty(*hidden_states.shape[:-1], run.shape[-1])
            output[:, start : start + tokens] = run
            # Without data only memory counts: no run takes more than the second, with the first beside it.
            if run.is_meta and start:
                break
        assert output is not None
        return output

    return runs
