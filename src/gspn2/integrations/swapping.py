"""What putting mixers in the place of self-attentions needs, whichever library the model comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gspn2.nn import Mixer


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a dotted name, with containers on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def zero_output(mixer: Mixer) -> None:
    """Make the output 0, whatever comes in, until training changes that."""
    nn.init.zeros_(mixer.from_proxy.weight)
    if mixer.from_proxy.bias is not None:
        nn.init.zeros_(mixer.from_proxy.bias)


def sizes(dims: Mapping[str, int], proxy_ratio: int) -> dict[str, dict[str, int]]:
    """`dim` and `proxy_dim` of each layer to swap, given its channels.

    Raises:
        TypeError: the ratio is no whole number.
        ValueError: it is less than 1.
    """
    if not isinstance(proxy_ratio, int) or isinstance(proxy_ratio, bool):
        raise TypeError(f"proxy_ratio: expected an int, got {proxy_ratio!r}")
    if proxy_ratio < 1:
        raise ValueError(f"proxy_ratio: expected at least 1, got {proxy_ratio}")
    return {name: {"dim": dim, "proxy_dim": max(1, dim // proxy_ratio)} for name, dim in dims.items()}


def check_fit(expected: Mapping[str, int], layers: Mapping[str, Mapping[str, int]], model: str) -> None:
    """Mixers have to be for the same layers with the same channels.

    Args:
        expected: channels of each self-attention of the model.
        layers: `dim` of each mixer.
        model: what kind of model it is, for the message.

    Raises:
        ValueError: they are not.
    """
    given = {name: sizes["dim"] for name, sizes in layers.items()}
    for name in [*expected, *given]:
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"mixers: expected {_channels(expected.get(name))} at {name}, got"
                f" {_channels(given.get(name))}: they were made for another {model}"
            )


def _channels(dim: int | None) -> str:
    return "no self-attention" if dim is None else f"{dim} channels"


def check_loaded(info: Mapping[str, Any], source: Any) -> None:
    """Weights have to be exactly those that a config describes.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` of diffusers or transformers tells.
        source: where they came from.

    Raises:
        ValueError: one is missing, has another shape, or belongs to no layer.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            shown = ", ".join(str(key) for key in sorted(info[kind], key=str)[:3])
            raise ValueError(
                f"{source}: expected exactly the weights that its config describes, got"
                f" {len(info[kind])} {kind.replace('_', ' ')}: {shown}"
            )


def move_into_place(source: Path, target: Path) -> None:
    """Put a finished file where the old one is, or none: whatever happens, there is the one or the other."""
    # On disk before the name is: a crash in between must not leave a name without its bytes.
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
