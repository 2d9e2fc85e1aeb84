"""What a report is made of, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cost import Cost
from .cost import as_json as cost_as_json
from .maps import PropagationMap


@dataclass(frozen=True)
class Trained:
    """A model after training, and how it got there.

    Args:
        key: "gspn" or "attention": its name in the results and its colour.
        label: what people call it.
        description: depth, widths and so on, in a few words.
        parameters: how many there are.
        seconds: wall time of its training, tests of each epoch included.
        epochs: for each epoch a dict with "epoch" (from 1), "train_loss", "test_loss", "test_top1" (percent).
        accuracy: percent of the test images right at the end.
        confusion: counts of true class (row) against predicted class (column).
        probabilities: (N, classes) on the test images.
    """

    key: str
    label: str
    description: str
    parameters: int
    seconds: float
    epochs: list[dict[str, float]]
    accuracy: float
    confusion: list[list[int]]
    probabilities: Tensor


@dataclass(frozen=True)
class LayerMaps:
    """Propagation maps of one mixer on one test image.

    Args:
        title: which mixer.
        text: what it does: grid, channels, chunk.
        directions: of its scans.
        names: for each map what the chosen pixel is.
        maps: one for each pixel.
    """

    title: str
    text: str
    directions: Sequence[str]
    names: list[str]
    maps: list[PropagationMap]


@dataclass(frozen=True)
class Material:
    """Everything a report is made of.

    Args:
        gspn, attention: the two trained models.
        images: the test images (N, H, W), as they are before enlarging for the models.
        labels: their classes (N,).
        map_image: index of the test image under the maps.
        map_input: that image (h, w) as the model gets it.
        layers: propagation maps, early layer first.
        cost: the measurement.
        recipe: both models' training in a few words.
        gate: percent of test accuracy the run had to reach, or None.
        about: machine, versions and so on, as pairs for the footer.
    """

    gspn: Trained
    attention: Trained
    images: Tensor
    labels: Tensor
    map_image: int
    map_input: Tensor
    layers: list[LayerMaps]
    cost: Cost
    recipe: str
    gate: float | None
    about: dict[str, str]


def results(material: Material) -> dict[str, Any]:
    """All numbers behind the report, as plain types."""
    return {
        "models": {one.key: _trained_as_json(one) for one in (material.gspn, material.attention)},
        "gate": {
            "required_percent": material.gate,
            "reached": material.gate is None or material.gspn.accuracy >= material.gate,
        },
        "test_labels": material.labels.tolist(),
        "maps": {
            "test_image": material.map_image,
            "layers": [_layer_as_json(layer) for layer in material.layers],
        },
        "cost": cost_as_json(material.cost),
        "recipe": material.recipe,
        "about": material.about,
    }


def _trained_as_json(one: Trained) -> dict[str, Any]:
    return {
        "label": one.label,
        "description": one.description,
        "parameters": one.parameters,
        "train_seconds": one.seconds,
        "test_top1": one.accuracy,
        "epochs": one.epochs,
        "confusion": one.confusion,
        "probabilities": _rounded(one.probabilities),
    }


def _layer_as_json(layer: LayerMaps) -> dict[str, Any]:
    maps = [
        {
            "name": name,
            "pixel": list(one.pixel),
            "coverage": one.coverage,
            "mean_distance": one.mean_distance,
            "sent": {direction: _rounded(map_) for direction, map_ in one.sent.items()},
            "received": _rounded(one.received),
        }
        for name, one in zip(layer.names, layer.maps, strict=True)
    ]
    return {"title": layer.title, "directions": list(layer.directions), "maps": maps}


def _rounded(tensor: Tensor) -> Any:
    """Nested lists of five decimals: a tenth of the file, and more than a picture shows."""
    if tensor.ndim == 1:
        return [round(value, 5) for value in tensor.tolist()]
    return [_rounded(part) for part in tensor]
