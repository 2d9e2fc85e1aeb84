"""Comparing what mixers put out with what the self-attentions that they replace do."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """Other modules around the same tensors."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class WithTeacher(nn.Module):
    """What learns from a frozen teacher, held beside its own modules: no weight is to be there twice.

    The teacher goes along to other devices and dtypes. A twin shares most of its tensors, but neither those
    of layers that were replaced nor, once moved, its buffers: they would be left behind.

    Raises:
        TypeError: the teacher is no module.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: expected a model, got {type(teacher).__name__}")
        self.__dict__["teacher"] = teacher

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if recurse:
            self.__dict__["teacher"]._apply(fn)
        return super()._apply(fn, recurse)


def relative_error(given: Tensor, expected: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean square over that of the expected, so that layers of any scale count alike; mean over pictures.

    By picture, not by batch: the loss must not depend on how processes share a batch.

    Args:
        given, expected: (B, N, C).
        kept: (B, N), False where a token does not count; None where all do.
    """
    expected = expected.float()
    difference = given.float() - expected
    if kept is not None:
        # Not by a product with 0: padding may be anything, infinite, too.
        expected, difference = (it.masked_fill(~kept[..., None], 0) for it in (expected, difference))
    error = difference.square().mean(dim=(1, 2))
    return (error / expected.square().mean(dim=(1, 2)).clamp_min(1e-8)).mean()


class Watch:
    """Outputs of some layers of a model, kept while asked for.

    Args:
        model: hooks are added to it.
        names: of the layers.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.outputs: dict[str, Any] = {}
        self._on = False
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._on:
                self.outputs[name] = output

        return hook

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """Keep outputs of the layers; not when the backward pass runs them again."""
        self._on = True
        self.outputs = {}
        try:
            yield self.outputs
        finally:
            self._on = False
