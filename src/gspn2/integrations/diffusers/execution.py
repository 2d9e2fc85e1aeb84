"""Running a UNet in less memory: one image at a time, and feed-forwards in runs of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


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
    replaced: list[tuple[nn.Module, Any]] = []

    def replace(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = make(module.forward)

    replace(unet, _one_by_one)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            replace(module.ff, lambda forward: _in_runs(forward, tokens))
    try:
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.__dict__["forward"]
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
        assert output is not None
        return output

    return runs
