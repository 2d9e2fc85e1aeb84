"""What mixers learn from a frozen encoder: its output, and those of the attentions that they replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Watch, WithTeacher, relative_error, twin
from .encoders import Encoder, Grid, grid_of
from .mixers import VisionMixers
from .mounting import mount

LOSSES = ("features", "output")


class Distiller(WithTeacher):
    """A frozen model as the teacher, and its twin with mixers; both hold the same frozen tensors.

    A loss for any training loop: parameters that learn are those of `mixers`.

    Args:
        teacher: what `mount` takes, on its device; it is frozen and otherwise left as it is.
        weights: of the losses: "features", the outputs of the attentions, and "output", that of the encoder.
        options: of `mount`.

    Raises:
        TypeError, ValueError: it cannot be mounted, or there is no such loss.
    """

    # Both are held past nn.Module's registration: the student's tensors are all of them already.
    teacher: nn.Module
    mixers: VisionMixers

    def __init__(
        self, teacher: nn.Module, weights: Mapping[str, float] | None = None, **options: Any
    ) -> None:
        super().__init__(teacher)
        self.weights = {"features": 1.0, "output": 1.0} if weights is None else dict(weights)
        if not self.weights or not set(self.weights) <= set(LOSSES):
            raise ValueError(f"weights: expected some of {', '.join(LOSSES)}, got {self.weights}")
        encoder = Encoder(teacher)
        teacher.requires_grad_(False).eval()
        self.student = twin(teacher)
        student = Encoder(self.student).module
        mixers = mount(self.student, **options)
        # What learns is float32, whatever the frozen weights are; autocast sees to the rest.
        mixers.float().requires_grad_(True).train()
        self.__dict__["mixers"] = mixers
        names = [name for name, _ in mixers.layers()]
        self._watched = Watch(encoder.module, ["", *names]), Watch(student, ["", *names])
        self._prefix = encoder.prefix_tokens
        self._kept: Tensor | None = None
        student.register_forward_pre_hook(self._note_padding(encoder), with_kwargs=True)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Losses by name, and their weighted sum as `loss`; each a float32 scalar.

        Args:
            args, kwargs: of the model.
        """
        teachers, students = self._watched
        with torch.no_grad(), teachers.watching() as taught:
            self.teacher(*args, **kwargs)
        with students.watching() as learnt:
            self.student(*args, **kwargs)
        outputs = zip(_tokens(learnt.pop("")), _tokens(taught.pop("")), strict=True)
        losses = {
            "features": self._error((_first(learnt.pop(it)), _first(taught.pop(it))) for it in list(taught)),
            "output": self._error(outputs),
        }
        total = torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()
        return {**losses, "loss": total}

    def _error(self, pairs: Any) -> Tensor:
        """Mean over pairs of tokens (B, N, C); padding does not count."""
        errors = [relative_error(given, expected, self._kept) for given, expected in pairs]
        return torch.stack(errors).mean()

    def _note_padding(self, encoder: Encoder) -> Any:
        arguments, patches = encoder.arguments, encoder.patches

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(arguments, args, strict=False)), **kwargs}
            self._kept = _kept(given, grid_of(given, patches))

        return hook


def _kept(given: Mapping[str, Any], grid: Grid | None) -> Tensor | None:
    """(B, N), where a token is none of padding; None where there is no padding."""
    if not isinstance(grid, list):
        return None
    pixels: Tensor = given["pixel_values"]
    counts = torch.tensor([height * width for height, width in grid], device=pixels.device)
    return torch.arange(pixels.shape[1], device=pixels.device) < counts[:, None]


def _first(output: Any) -> Tensor:
    """What an attention puts out, without its maps."""
    return output[0] if isinstance(output, tuple) else output


def _tokens(output: Any) -> list[Tensor]:
    """What an encoder puts out: tokens, or the maps of a backbone."""
    maps = getattr(output, "feature_maps", None)
    if maps is not None:
        return [it.flatten(2).transpose(1, 2) if it.ndim == 4 else it for it in maps]
    return [output[0]]
