"""A trained model in the forms that others read: timm's folder, torch.export, ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import EXPORTED, CheckpointInfo, replacing, write_json, write_safetensors
from .errors import UserError

FORMATS = ("timm", "torch", "onnx")
PROGRAM, ONNX, CARD, CONFIG = "model.pt2", "model.onnx", "README.md", "config.json"
TOLERANCE = 1e-4


def export(
    model: nn.Module, info: CheckpointInfo, out: str | Path, formats: Sequence[str] = ("timm",)
) -> dict[str, Path]:
    """Write a trained model for use without this package's training.

    Args:
        model: as `load_checkpoint` returned it, on the CPU.
        info: likewise.
        out: folder, made where it is missing; files of the same names are replaced.
        formats: "timm" (`model.safetensors`, `config.json` and a model card, for
            `timm.create_model("local-dir:OUT", pretrained=True)`), "torch" (`model.pt2`, for
            `torch.export.load`), "onnx" (`model.onnx`).

    Returns:
        The main file of each format.

    Raises:
        UserError: an unknown format, a folder that cannot be written, a model that PyTorch cannot export.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"format: expected some of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    out = Path(out)
    written: dict[str, Path] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if "timm" in formats:
            written["timm"] = _write_timm(model, info, out)
        if {"torch", "onnx"} & set(formats):
            written |= _write_programs(model, info, out, formats)
    except OSError as error:
        raise UserError(f"out: cannot write to {out}: {error}") from error
    return written


def _write_timm(model: nn.Module, info: CheckpointInfo, out: Path) -> Path:
    write_json(out / CONFIG, timm_config(model, info))
    write_safetensors(out / EXPORTED, model.state_dict(), {"format": "pt"})
    with replacing(out / CARD) as temporary:
        temporary.write_text(model_card(model, info), encoding="utf-8")
    return out / EXPORTED


def timm_config(model: nn.Module, info: CheckpointInfo) -> dict[str, Any]:
    """What timm reads from `config.json`: architecture, arguments, preprocessing, classes."""
    preprocess = info.preprocess
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    arguments = dict(info.config.model_args)
    if cfg.get("fixed_input_size"):
        arguments.setdefault("img_size", preprocess.image_size)
    return {
        "architecture": cfg.get("architecture") or info.config.model.split(".")[0],
        "num_classes": len(info.class_names),
        "num_features": getattr(model, "num_features", None),
        "label_names": list(info.class_names),
        "model_args": {"num_classes": len(info.class_names), "in_chans": preprocess.in_chans, **arguments},
        "pretrained_cfg": {
            "tag": "gspn2",
            "custom_load": False,
            "num_classes": len(info.class_names),
            "input_size": (preprocess.in_chans, *preprocess.image_size),
            "fixed_input_size": bool(cfg.get("fixed_input_size", False)),
            "pool_size": None,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": "center",
            "mean": preprocess.mean,
            "std": preprocess.std,
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
    }


def _write_programs(
    model: nn.Module, info: CheckpointInfo, out: Path, formats: Iterable[str]
) -> dict[str, Path]:
    from ..models.onnx import export_onnx, export_program

    size = (info.preprocess.in_chans, *info.preprocess.image_size)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    dynamic = not cfg.get("fixed_input_size", False)
    try:
        program = export_program(model, size, dynamic=dynamic)
        fixed = "torch" in formats and dynamic and not _takes(program, size)
        kept = export_program(model, size, dynamic=False) if fixed else program
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{info.config.model}: torch.export cannot take it: {reason}") from error
    written: dict[str, Path] = {}
    if "torch" in formats:
        with replacing(out / PROGRAM) as temporary:
            # The writer wants the ending that the file will have.
            named = temporary.with_suffix(".pt2")
            try:
                torch.export.save(kept, named)
                named.replace(temporary)
            finally:
                named.unlink(missing_ok=True)
        written["torch"] = out / PROGRAM
    if "onnx" in formats:
        export_onnx(program, out / ONNX)
        written["onnx"] = out / ONNX
    return written


def _takes(program: torch.export.ExportedProgram, size: tuple[int, ...]) -> bool:
    """Does a program for all sizes take this one?

    Not where a model shrinks an image to a single row or column: programs set sizes of 1 apart.
    """
    try:
        program.module()(torch.zeros(1, *size))
    except (AssertionError, RuntimeError):
        return False
    return True


def check_onnx(
    path: str | Path, model: nn.Module, info: CheckpointInfo
) -> list[tuple[tuple[int, ...], float]]:
    """Run an ONNX file in onnxruntime beside the model, on random images of several sizes.

    Returns:
        Shape of each input, and the largest difference of logits, relative to the largest logit.

    Raises:
        UserError: they differ by more than 1e-4.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    chans, (height, width) = info.preprocess.in_chans, info.preprocess.image_size
    sizes = [(1, chans, height, width), (3, chans, height, width)]
    if not isinstance(given.shape[2], int):
        sizes += [(2, chans, height + 32, width), (1, chans, height, 2 * width + 5)]
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[tuple[int, ...], float]] = []
    for shape in sizes:
        images = torch.randn(shape, generator=generator)
        try:
            difference = _difference(model, session, given.name, images)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: onnxruntime cannot run it for images {shape}: {reason}") from error
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: differs from the model by {difference:.1e} for images {shape}")
        found.append((shape, difference))
    return found


@torch.no_grad()
def _difference(model: nn.Module, session: Any, name: str, images: Tensor) -> float:
    expected = model.eval()(images)
    got = torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _tested(info: CheckpointInfo) -> str:
    """The test of these very weights; what a run goes on from tells that of its best epoch."""
    if info.kind != "weights" or not info.metrics:
        return "No test of these weights was kept; `gspn2 eval` makes one."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in info.metrics.items())
    return f"| test of the epoch that was kept | |\n|---|---:|\n{rows}"


def model_card(model: nn.Module, info: CheckpointInfo) -> str:
    """A model card in Markdown: what it is, how it was trained and tested, how to load it."""
    config, preprocess = info.config, info.preprocess
    height, width = preprocess.image_size
    parameters = sum(p.numel() for p in model.parameters())
    names = ", ".join(info.class_names[:20]) + (", ..." if len(info.class_names) > 20 else "")
    settings = "\n".join(
        f"| {name} | `{value}` |"
        for name, value in config.to_json().items()
        if name not in ("out", "device", "data")
    )
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, gspn2]
---

# {config.model}, {len(info.class_names)} classes

An image classifier of {parameters:,} parameters for images of {height} x {width},
trained with gspn2: {info.epoch} epochs, {info.step} steps. These are its {info.weights} weights.

Classes: {names}

```python
import timm
import torch

import gspn2.models  # registers GSPN-2 with timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: of PIL, mode {"L" if preprocess.in_chans == 1 else "RGB"}
```

{_tested(info)}

| setting | value |
|---|---|
{settings}
"""
