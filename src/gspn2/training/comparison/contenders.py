"""The models that are compared, all of about as many parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models.blocks import Stem
from ..rng import seeded
from ..state import count_parameters

PARAMETERS = 1_321_000
"""As many as the ConvNet has, whose expansion is fixed; the others' is chosen."""
DIM, PLACE = 128, 4
"""Channels, and pixels from a place to the next, of all."""
TOLERANCE = 0.025
"""Of each contender around `PARAMETERS`: no two of them are further apart than 5%."""


@dataclass(frozen=True)
class Contender:
    """A model of the comparison.

    Args:
        name: as the command line and file names have it.
        label: for people.
        kind: "gspn2", "vit" or "convnet".
        changes: arguments of the GSPN-2 backbone that differ from `GSPN2`; an ablation changes one thing.
        question: what an ablation asks; empty for the three that are compared.
    """

    name: str
    label: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    question: str = ""


# A place every 4 x 4 pixels, as the ViT has a token, by the same stem; every scan runs over the whole map.
GSPN2: dict[str, Any] = {
    "depths": (6,),
    "dims": (DIM,),
    "stem_stride": PLACE,
    "proxy_dim": 8,
    "chunk": 0,
    "operands_from": "input",
}
# Pooled as the others are.
VIT: dict[str, Any] = {
    "patch_size": PLACE,
    "embed_dim": DIM,
    "depth": 6,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
}
# ConvNeXt's blocks on the same grid (its paper calls that isotropic): the last one sees 27 places around.
CONVNET: dict[str, Any] = {"dim": DIM, "depth": 9}

MAIN = ("gspn2", "vit", "convnet")
CONTENDERS = {
    it.name: it
    for it in (
        Contender("gspn2", "GSPN-2", "gspn2"),
        Contender("vit", "ViT", "vit"),
        Contender("convnet", "ConvNet (ConvNeXt, isotropic)", "convnet"),
        Contender(
            "gspn2-one-axis", "down and up only", "gspn2", {"directions": ("down", "up")}, "directions"
        ),
        Contender("gspn2-local", "chunks of 4 lines", "gspn2", {"chunk": 4}, "reach"),
        # A state that restarts on every line is lam * x: the same layers, and nothing is passed on.
        Contender("gspn2-still", "no propagation", "gspn2", {"chunk": 1}, "reach"),
        # As many blocks as the ConvNet has.
        Contender("gspn2-deep", "9 narrower blocks", "gspn2", {"depths": (9,)}, "depth"),
        # As scans of all blocks began before they took turns; and the other half alone.
        Contender("gspn2-diagonal", "begin diagonal", "gspn2", {"initial_taps": "diagonal"}, "initial taps"),
        Contender("gspn2-straight", "begin straight", "gspn2", {"initial_taps": "straight"}, "initial taps"),
        Contender("gspn2-per-channel", "taps for each channel", "gspn2", {"groups": 8}, "taps"),
        Contender("gspn2-proxy-2", "2 proxy channels", "gspn2", {"proxy_dim": 2}, "proxy"),
        Contender("gspn2-proxy-4", "4 proxy channels", "gspn2", {"proxy_dim": 4}, "proxy"),
        Contender("gspn2-proxy-16", "16 proxy channels", "gspn2", {"proxy_dim": 16}, "proxy"),
        Contender(
            "gspn2-from-proxy", "gates and taps from the proxy", "gspn2", {"operands_from": "proxy"}, "gates"
        ),
    )
}


class ConvNet(nn.Module):
    """ConvNeXt blocks at one resolution: (B, 1, H, W) -> (B, classes)."""

    def __init__(self, dim: int, depth: int, classes: int) -> None:
        from timm.layers import NormMlpClassifierHead
        from timm.models.convnext import ConvNeXtBlock

        super().__init__()
        self.stem = Stem(1, dim, PLACE)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, ls_init_value=None) for _ in range(depth)])
        self.head = NormMlpClassifierHead(dim, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class Dense(nn.Module):
    """A logit for every pixel, out of a model's last features: (B, 1, H, W) -> (B, 1, H, W).

    Args:
        model: has places of 4 x 4 pixels, as (B, C, H / 4, W / 4) or as tokens.
        dim: C.
    """

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model = model
        self.norm = nn.LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, PLACE * PLACE)

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)  # type: ignore[operator]
        if features.ndim == 4:
            features = features.permute(0, 2, 3, 1)
        else:
            features = features.unflatten(1, (x.shape[2] // PLACE, x.shape[3] // PLACE))
        logits: Tensor = self.to_pixels(self.norm(features))
        return nn.functional.pixel_shuffle(logits.permute(0, 3, 1, 2), PLACE)


def build(contender: Contender, size: int, seed: int, classes: int = 0) -> nn.Module:
    """A fresh model for grey images of `size` x `size` pixels.

    Args:
        contender: which.
        size: pixels; the ViT's position embedding has a place for each token of this size, and is
            interpolated at any other.
        seed: of its weights.
        classes: of the task; 0 for an answer for every pixel (see `Dense`).

    Raises:
        ValueError: it cannot be given about `PARAMETERS` parameters at this size.
    """
    with seeded(seed):
        model = _MAKERS[contender.kind](contender, size, classes)
        if not classes:
            model = Dense(model, DIM)
    count = count_parameters(model)
    if abs(count / PARAMETERS - 1) > TOLERANCE:
        raise ValueError(
            f"{contender.name} at {size}: expected {PARAMETERS:,} parameters within {TOLERANCE:.1%}, "
            f"got {count:,}"
        )
    return model


def _gspn2(contender: Contender, size: int, classes: int) -> nn.Module:
    arguments = GSPN2 | contender.changes | {"num_classes": classes}
    return _with_equal_parameters(lambda ratio: _create("test_gspn2", mlp_ratio=ratio, **arguments))


def _vit(contender: Contender, size: int, classes: int) -> nn.Module:
    arguments = VIT | {"img_size": size, "dynamic_img_size": True, "num_classes": classes}

    from timm.layers import build_sincos2d_pos_embed

    def make(ratio: float) -> nn.Module:
        model = _create("vit_tiny_patch16_224", mlp_ratio=ratio, **arguments)
        # Instead of one linear map of patches, which takes a ViT far longer to learn (arXiv 2106.14881).
        model.patch_embed.proj = Stem(1, DIM, PLACE)  # type: ignore[union-attr]
        # Sines and cosines to start from: small random ones take long to say where anything is (2205.01580).
        places = [size // PLACE] * 2
        model.pos_embed.data.copy_(build_sincos2d_pos_embed(places, DIM)[None])  # type: ignore[operator]
        return model

    return _with_equal_parameters(make)


def _convnet(contender: Contender, size: int, classes: int) -> nn.Module:
    return ConvNet(classes=classes, **CONVNET)


_MAKERS: dict[str, Callable[[Contender, int, int], nn.Module]] = {
    "gspn2": _gspn2,
    "vit": _vit,
    "convnet": _convnet,
}


def _create(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, in_chans=1, **arguments)


def _with_equal_parameters(make: Callable[[float], nn.Module]) -> nn.Module:
    """The model whose FFN is as wide as brings it nearest to `PARAMETERS`.

    The FFN is what every block has, whatever else is in it, so what an ablation saves elsewhere goes there.
    """
    state = torch.get_rng_state()
    low, high = (count_parameters(make(ratio)) for ratio in (2.0, 4.0))
    # Weights must not depend on how many models were made to find the width.
    torch.set_rng_state(state)
    ratio = 2.0 + 2.0 * (PARAMETERS - low) / (high - low)
    return make(max(1, round(32 * ratio)) / 32)
