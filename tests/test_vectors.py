"""Exact test vectors: float64 to 1e-12, and the storage dtypes on inputs rounded to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import LAYOUTS, Case, assert_close, relative_l2, run, truth

pytestmark = pytest.mark.usefixtures("poisoned")

VECTORS = sorted((Path(__file__).parent / "vectors").glob("*.npz"))

# Relative L2 error of y; every gradient may have twice that.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def load(path: Path) -> tuple[Case, dict[str, Tensor]]:
    """The problem of a file, and its y, dx, dlogits, dlam and dgate."""
    with np.load(path) as stored:
        tensors = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "meta"}
        meta = json.loads(str(stored["meta"]))
    inputs = {name: tensors.pop(name) for name in ("x", "logits", "lam", "gate", "dy")}
    return Case(**inputs, directions=tuple(meta["directions"]), chunk=meta["chunk"]), tensors


def test_there_are_vectors() -> None:
    assert len(VECTORS) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_float64(path: Path, layout: str, backend: str) -> None:
    """max |error| / max(1, max |expected|) at most 1e-12, for y and every gradient."""
    case, expected = load(path)
    assert_close(run(LAYOUTS[layout](case), backend=backend), expected, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_rounded(path: Path, dtype: torch.dtype, layout: str, backend: str) -> None:
    case = load(path)[0].to(dtype)
    expected = truth(case)
    found = run(LAYOUTS[layout](case), backend=backend)
    for name, tensor in found.items():
        assert tensor.dtype == dtype, name
        allowed = TOLERANCE[dtype] * (1 if name == "y" else 2)
        assert relative_l2(tensor, expected[name]) <= allowed, name
