"""Parameters, gradients and optimizer state spread over the processes (FSDP2, `fully_shard`).

Every process keeps its rows of each parameter, as DTensors, and has the whole of a unit (a block, or a stage)
only while that unit computes. Checkpoints hold whole tensors under the names that they always have: one
written by any number of processes, sharded or not, is read by any other number, and by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import World
from .errors import UserError

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_UNITS = {False: ("blocks", "stages"), True: ("stages", "blocks")}
"""Containers whose members are gathered one at a time, by whether the model gets compiled, best first.

Compiled, a stage of GSPN-2 reaches into its blocks, past the hooks that would gather them.
"""


def shard(model: nn.Module, device: torch.device, world: World, compiled: bool = False) -> None:
    """Spread the parameters of a model, which is alike in all processes, over them; in place.

    Args:
        model: on `device`; parameters that require no gradient are spread, too.
        compiled: will `compile_shares` take the model?

    Raises:
        UserError: a model that `fully_shard` does not take, such as one with scalar parameters.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    try:
        for unit in units(model, compiled):
            fully_shard(unit, mesh=mesh)
        # The root gives its parameters back, too: state dicts and optimizer always see the shares.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"shard: {type(model).__name__} cannot be sharded: {error}") from error


def compile_shares(model: nn.Module) -> nn.Module:
    """`torch.compile` of a sharded model: unit by unit, since a graph ends where weights are gathered.

    Stages have a function in common but not their sizes. Left alone, the compiler would try one graph for all
    of them, with sizes unknown, and give up after a few.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def units(model: nn.Module, compiled: bool = False) -> list[nn.Module]:
    """The modules that are gathered one at a time; what is outside of all of them goes with the model."""
    for name in _UNITS[compiled]:
        found = [
            unit
            for path, container in model.named_modules()
            if path.rpartition(".")[2] == name and isinstance(container, nn.Sequential | nn.ModuleList)
            for unit in container
        ]
        if found:
            return found
    return []


def gathered(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors of shares; every process has to call it with the same names in the same order.

    Args:
        keep: in this process; the others take part and get nothing. What was gathered is on the CPU: no
            device need have room for everything at once.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = full.cpu()
    return kept


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that all processes hold, cut as `like`; all of it if that is whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    here = tensor.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def shares_of(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """`share_of` each, by name; names that `like` does not have stay as they are."""
    return {name: share_of(tensor, like.get(name, tensor)) for name, tensor in tensors.items()}


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All parameters in every process for a while, so that each may run the model as often as it likes.

    Sharded, a forward pass waits for all processes; they have different numbers of images to test.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@torch.no_grad()
def update_average(ema: ModelEmaV3, model: nn.Module, step: int) -> None:
    """`ema.update` of shares: each process averages its own, together with buffers, which are whole."""
    weight = 1 - ema.get_decay(step)
    pairs = list(zip(_here(ema.module), _here(model), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], weight=weight)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)


def _here(model: nn.Module) -> list[Tensor]:
    values = model.state_dict().values()
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]


def same_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, as DDP does before each pass."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
