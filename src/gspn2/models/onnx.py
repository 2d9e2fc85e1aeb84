"""Export to ONNX: propagation as the standard operator Scan, for images of any size.

Writing needs the extra `gspn2[onnx]`, reading any runtime. Each direction becomes one Scan over its lines,
with the previous line as state; everything else is translated by PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..functional import DIRECTIONS

OPSET = 18
EXAMPLE = (96, 160)


def export_program(
    model: nn.Module, size: tuple[int, int, int] = (3, 224, 224), *, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """A model for inference as a graph of `torch.export`; propagation stays one operator, `gspn2::propagate`.

    Args:
        model: (N, C, H, W) to a tensor, of the device and dtype of its parameters; it is left as it was.
        size: (C, H, W) of the images.
        dynamic: leave N, H and W open; otherwise N alone.
    """
    channels, height, width = size
    if dynamic:
        # Equal sizes would be taken for one and the same, and a size of 1, at the end of a model that shrinks
        # small images, for what it always is.
        height, width = EXAMPLE
    like = next((it for it in model.parameters() if it.is_floating_point()), torch.empty(0))
    example = like.new_zeros(2, channels, height, width)
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic:
        shape |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # Each by itself: a model that learns may have frozen parts.
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=(shape,), strict=False)
    finally:
        for module in learning:
            module.training = True


def export_onnx(
    program: torch.export.ExportedProgram,
    path: str | Path,
    names: tuple[str, str] = ("images", "logits"),
) -> None:
    """Write an exported float32 program as one ONNX file of standard operators.

    Args:
        program: from `export_program`.
        path: of the file; weights of more than 2 GB go into a file beside it.
        names: of input and output.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnx.inliner
    import onnxscript  # noqa: F401 - a plain ModuleNotFoundError where it is missing

    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=[names[0]],
        output_names=[names[1]],
        custom_translation_table={torch.ops.gspn2.propagate.default: _translate},
        verbose=False,
    )
    assert made is not None, "a program was given, so a program comes back"
    # Functions are a way to say it; runtimes that know none of them still know their operators.
    proto = onnx.inliner.inline_local_functions(made.model_proto)
    _forget_origins(proto)
    _forget_origins(proto.graph)
    large = proto.ByteSize() >= 2**31
    path = Path(path)
    # Whole or not at all: a full disk leaves the file that was there.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        onnx.save_model(
            proto, str(draft), "protobuf", save_as_external_data=large, location=f"{path.name}.data"
        )
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _forget_origins(part: Any) -> None:
    """Remove notes on where in somebody's files each node came from, in subgraphs as well."""
    del part.metadata_props[:]
    for field in ("node", "value_info", "initializer", "input", "output"):
        for inner in getattr(part, field, ()):
            if hasattr(inner, "metadata_props"):
                del inner.metadata_props[:]
            for attribute in getattr(inner, "attribute", ()):
                if attribute.HasField("g"):
                    _forget_origins(attribute.g)


def _translate(
    x: Any,
    taps: Any,
    lam: Any,
    gate: Any,
    directions: Sequence[int],
    chunk: int,
    normalize: bool,
    backend: str | None = None,
) -> Any:
    """`gspn2::propagate` as nodes: x (B, C, H, W), taps (B, D, G, 3, H, W), lam and gate (B, D, C, H, W)."""
    total = None
    for d, direction in enumerate(directions):
        hidden = _direction(
            x, _pick(taps, d), None if lam is None else _pick(lam, d), DIRECTIONS[direction], chunk, normalize
        )
        term = hidden if gate is None else _op().Mul(hidden, _pick(gate, d))
        total = term if total is None else _op().Add(total, term)
    return total


def _op() -> Any:
    from onnxscript import opset18

    return opset18


def _numbers(*values: int) -> Any:
    return _op().Constant(value_ints=list(values))


def _pick(tensor: Any, d: int) -> Any:
    """tensor[:, d]"""
    return _op().Gather(tensor, _op().Constant(value_int=d), axis=1)


def _direction(x: Any, taps: Any, lam: Any, direction: str, chunk: int, normalize: bool) -> Any:
    """The state h (B, C, H, W) of one direction; taps (B, G, 3, H, W)."""
    op = _op()
    vertical, backward = direction in ("down", "up"), direction in ("up", "left")
    u = x if lam is None else op.Mul(x, lam)
    # Lines first: (L, B, G, C/G, P) and (L, B, G, 1, 3, P); the places of a line stay in image order.
    group_count = op.Shape(taps, start=1, end=2)
    places = op.Shape(x, start=3, end=4) if vertical else op.Shape(x, start=2, end=3)
    order = [2, 0, 1, 3] if vertical else [3, 0, 1, 2]
    u = op.Transpose(u, perm=order)
    head = op.Shape(u, start=0, end=2)
    u = op.Reshape(u, op.Concat(head, group_count, _numbers(-1), places, axis=0))
    w = op.Transpose(taps, perm=[3, 0, 1, 2, 4] if vertical else [4, 0, 1, 2, 3])
    w = _weights(w, places) if normalize else _masked(w, places, 0.0)
    w = op.Unsqueeze(w, _numbers(3))
    lines = op.Squeeze(op.Shape(u, start=0, end=1), _numbers(0))
    number = op.Range(op.Constant(value_int=0), lines, op.Constant(value_int=1))
    restart = op.Equal(
        op.Mod(number, op.Constant(value_int=chunk)) if chunk else number, op.Constant(value_int=0)
    )
    from .onnx_scan import scan_lines

    # Restarts count lines as they are met.
    h = scan_lines(u, w, restart, reads=[int(backward), int(backward), 0], writes=[int(backward)])
    rows = op.Reshape(h, op.Concat(head, _numbers(-1), places, axis=0))
    return op.Transpose(rows, perm=[1, 2, 0, 3] if vertical else [1, 2, 3, 0])


def _exists(places: Any) -> Any:
    """(3, P): does place j have the neighbour j - 1, j, j + 1?"""
    op = _op()
    j = op.Range(op.Constant(value_int=0), op.Squeeze(places, _numbers(0)), op.Constant(value_int=1))
    first = op.Greater(j, op.Constant(value_int=0))
    centre = op.GreaterOrEqual(j, op.Constant(value_int=0))
    last = op.Less(j, op.Sub(places, _numbers(1)))
    axis = _numbers(0)
    return op.Concat(op.Unsqueeze(first, axis), op.Unsqueeze(centre, axis), op.Unsqueeze(last, axis), axis=0)


def _masked(w: Any, places: Any, value: float) -> Any:
    return _op().Where(_exists(places), w, _op().CastLike(_op().Constant(value_float=value), w))


def _weights(logits: Any, places: Any) -> Any:
    """Row-stochastic weights, as `backends.reference.tap_weights` makes them."""
    op = _op()
    log_sigmoid = op.Neg(op.Softplus(op.Neg(logits)))
    return op.Softmax(_masked(log_sigmoid, places, float("-inf")), axis=-2)
