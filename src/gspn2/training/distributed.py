"""One process or many: the same code, told apart by what `torchrun` puts into the environment."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import TrainingFailed, UserError


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Args:
        rank: of this process; 0 writes files and reports.
        size: how many processes there are.
        local_rank: of this process on its machine: the number of its device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Does this process write and report?"""
        return self.rank == 0

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes, so that all of them decide alike."""
        if self.size == 1:
            return values
        agreed = torch.tensor(values, dtype=torch.int64)
        with _needing_others():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return tuple(agreed.tolist())

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        values = values.cpu()
        if self.size > 1:
            values = values.clone()
            with _needing_others():
                dist.all_reduce(values)
        return values

    def gather(self, names: list[str]) -> list[str]:
        """What all processes hold, sorted, nothing twice."""
        if self.size == 1:
            return sorted(set(names))
        gathered: list[list[str]] = [[] for _ in range(self.size)]
        with _needing_others():
            dist.all_gather_object(gathered, names)
        return sorted({name for part in gathered for name in part})

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)


@contextlib.contextmanager
def _needing_others() -> Iterator[None]:
    """A lost connection as one line: the process that ended has said why, and a traceback would hide it."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingFailed(f"another process of this run has ended, and said why: {reason}") from error


def replicated(
    model: nn.Module, device: torch.device, group: dist.ProcessGroup | None = None
) -> DistributedDataParallel:
    """The model with gradients averaged over the processes; `benchmarks/scaling.py` measures just this.

    Args:
        group: processes that share the work; None for all.
    """
    devices = [device.index or 0] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, process_group=group, gradient_as_bucket_view=True
    )


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK); one process without it.

    A process group that the caller has made is used as it is, and left; it must be able to reduce on the CPU.

    Raises:
        UserError: the environment describes a world that cannot be joined.
    """
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    # Counters and decisions travel by gloo, whatever carries the gradients: that waits for no device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    world = World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield world
        with contextlib.suppress(RuntimeError):  # another process failed, and says so itself
            world.wait()  # nobody leaves while another is still talking to it
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they may hold a model that holds the group
        raise
    finally:
        _destroy()


def _destroy() -> None:
    """Destroy the process group, and with it gloo's threads, here and now.

    A thread of gloo needs the GIL to let go of a tensor that Python has seen. Destroyed from here, the group
    waits for its threads without the GIL; a DDP module that outlived this would destroy it with the GIL held:
    a deadlock where a thread was slow, and an abort where the process has come to its end.
    """
    gc.collect()
    dist.destroy_process_group()
