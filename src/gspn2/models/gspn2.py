"""GSPN-2: hierarchical backbones that mix globally by 2D line-scan propagation, at linear cost.

GSPN-2, arXiv 2512.07884, after GSPN, arXiv 2501.12381. The papers print parameters, MACs and ingredients but
no depths and widths; `docs/models.md` says which of them are our choice, and why.

Tensors are (B, C, H, W) in channels_last memory from the stem on; nothing copies to change the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import NormMlpClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..functional import DIRECTIONS
from ..nn import Mixer
from ..nn.mixer import INITIAL_TAPS, INITIAL_TURNS
from .blocks import GSPN2Stage, GSPNModule, Stem

__all__ = ["GSPN2"]


class GSPN2(nn.Module):
    """GSPN-2 backbone and classifier: (B, in_chans, H, W) of any H, W -> (B, num_classes).

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling of the head ("avg", "max", ...; "" for none).
        depths, dims: blocks and channels of every stage; there are as many stages as entries.
        stem_stride: by how much the stem shrinks height and width: 4, or 1 or 2 for small images.
        proxy_dim: propagated channels of a mixer, for all stages or each.
        chunk: lines between restarts of a scan, for all stages or each; 0 scans the whole map (None would
            not survive `timm.create_model`, which drops it).
        operands_from: taps, lam and gate made from the "input" of the mixer or from its "proxy".
        groups: tap groups of a mixer.
        directions: scan directions of a mixer.
        initial_taps: where fresh scans run (`gspn2.nn.Mixer`), or several such that the blocks take in turns.
        backend: implementation of the operator; None chooses.
        keep_hidden: keep the states of all scans for backward (`gspn2.propagate`): faster, for more memory.
        expand_ratio: inner channels of the GSPN module over `dims`.
        mlp_ratio: hidden channels of the FFN over `dims`.
        kernel_size: of the GSPN module's depthwise convolution.
        ls_init_value: initial layer scale; None for no layer scale.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0.
        device, dtype: where and as what the parameters are made.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: Sequence[int] = (64, 128, 384, 512),
        stem_stride: int = 4,
        proxy_dim: int | Sequence[int] = 2,
        chunk: int | Sequence[int] = (8, 8, 0, 0),
        operands_from: str = "input",
        groups: int = 1,
        directions: Sequence[str] = DIRECTIONS,
        initial_taps: str | Sequence[str] = INITIAL_TURNS,
        backend: str | None = None,
        keep_hidden: bool = False,
        expand_ratio: float = 1.5,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dims):
            raise ValueError(f"depths, dims: expected one entry a stage in both, got {depths} and {dims}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        proxy_dims = _per_stage("proxy_dim", proxy_dim, len(depths))
        chunks = _per_stage("chunk", chunk, len(depths))
        taps = (initial_taps,) if isinstance(initial_taps, str) else tuple(initial_taps)
        if not taps:
            raise ValueError(f"initial_taps: expected one of {', '.join(INITIAL_TAPS)} or several, got none")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: expected a probability in [0, 1), got {drop_path_rate}")
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stem = Stem(in_chans, dims[0], stem_stride)
        stages = []
        self.feature_info = []
        for i, dim in enumerate(dims):
            mixer = {
                "proxy_dim": proxy_dims[i],
                "chunk": chunks[i] or None,
                "operands_from": operands_from,
                "groups": groups,
                "directions": directions,
                "backend": backend,
                "keep_hidden": keep_hidden,
            }
            stages.append(
                GSPN2Stage(
                    dims[max(i - 1, 0)],
                    dim,
                    downsample=i > 0,
                    drop_path=rates[i].tolist(),
                    initial_taps=[taps[n % len(taps)] for n in range(sum(depths[:i]), sum(depths[: i + 1]))],
                    ratio=expand_ratio,
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    layer_scale=ls_init_value,
                    mixer=mixer,
                )
            )
            self.feature_info.append(
                {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)
        self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal weights and zero biases, but for the mixers, which know better.

        needs_reset: give everything else its initial value, too: for a model that was made on "meta" and has
        got memory since.

        What leads to a mixer keeps its input's size. With the usual 0.02 the inner channels would come to a
        small part of a unit: taps, lam and gate would be constants, and SiLU linear.
        """
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        in_mixer = {part for mixer in mixers for part in mixer.modules()}
        for module in [*mixers, *(it for it in self.modules() if it not in in_mixer)]:
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and callable(reset):
                reset()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in in_mixer:
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GSPNModule):
                trunc_normal_(module.fc1.weight, std=module.fc1.in_features**-0.5)
                trunc_normal_(module.conv.weight, std=1 / module.conv.kernel_size[0])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Direction weights: matrices in shape, scales by nature."""
        return {name for name, _ in self.named_parameters() if name.endswith(".mixer.merge")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into stem and blocks, as timm's layer decay wants them."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` (0: none), and another pooling if given."""
        self._reset_head(num_classes, global_pool)

    def _reset_head(self, num_classes: int, global_pool: str | None) -> None:
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(device=like.device, dtype=like.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features at the end of stages: the last n (int), those listed, or all (None).

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages.
            norm: accepted as everywhere in timm; the norm belongs to the head here, so features have none.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return only the list.

        Returns:
            The list of (B, C, H, W), or (final features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        stages = self._stages()
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices=...)` does not need; returns the stages kept by index."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = nn.Sequential(*self._stages()[: last + 1])
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
            # A classifier that is asked for afterwards is one of what is left.
            self.head.in_features = self.head.num_features = self.num_features
        if prune_head or shortened:
            self._reset_head(0, "")
            self.head.norm = nn.Identity()
        return take

    def _stages(self) -> list[GSPN2Stage]:
        return cast(list[GSPN2Stage], list(self.stages))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> last feature map (B, num_features, H / 32, W / 32), rounded up."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, LayerNorm, dropout and, unless `pre_logits`, the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _per_stage(name: str, value: Any, stages: int) -> list[Any]:
    if isinstance(value, int):
        return [value] * stages
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != stages:
        raise ValueError(f"{name}: expected one value, or one for each of {stages} stages, got {value!r}")
    return list(value)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2512.07884",
        "paper_name": "GSPN-2",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "gspn2_tiny.untrained": _cfg(notes=("train with drop_path_rate=0.2",)),
        "gspn2_small.untrained": _cfg(notes=("train with drop_path_rate=0.4",)),
        "gspn2_base.untrained": _cfg(notes=("train with drop_path_rate=0.5",)),
        "test_gspn2.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_gspn2(variant: str, pretrained: bool, **kwargs: Any) -> GSPN2:
    stages = tuple(range(len(kwargs["depths"])))
    return build_model_with_cfg(
        GSPN2,
        variant,
        pretrained,
        feature_cfg={"out_indices": stages, "flatten_sequential": True},
        **kwargs,
    )


@register_model
def gspn2_tiny(pretrained: bool = False, **kwargs: Any) -> GSPN2:
    """GSPN-2-T: 24 M parameters, 4.2 G MACs at 224."""
    sizes = {"depths": (2, 2, 9, 2), "dims": (64, 128, 384, 512)}
    return _create_gspn2("gspn2_tiny", pretrained, **{**sizes, **kwargs})


@register_model
def gspn2_small(pretrained: bool = False, **kwargs: Any) -> GSPN2:
    """GSPN-2-S: 50 M parameters, 9.2 G MACs at 224."""
    sizes = {"depths": (2, 2, 14, 2), "dims": (80, 160, 480, 640)}
    return _create_gspn2("gspn2_small", pretrained, **{**sizes, **kwargs})


@register_model
def gspn2_base(pretrained: bool = False, **kwargs: Any) -> GSPN2:
    """GSPN-2-B: 89 M parameters, 14.2 G MACs at 224."""
    sizes = {"depths": (2, 2, 15, 2), "dims": (96, 192, 576, 1024)}
    return _create_gspn2("gspn2_base", pretrained, **{**sizes, **kwargs})


@register_model
def test_gspn2(pretrained: bool = False, **kwargs: Any) -> GSPN2:  # noqa: PT028
    """A very small model for tests."""
    sizes = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "chunk": (4, 4, 0, 0)}
    return _create_gspn2("test_gspn2", pretrained, **{**sizes, **kwargs})
