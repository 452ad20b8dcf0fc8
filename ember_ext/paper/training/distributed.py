"""One run on several processes, as `torchrun` starts them.

Each process trains on its share of every batch and gradients are averaged. Without dropout, whose
masks each process draws for itself, the result is that of one process up to rounding. Process 0
evaluates, reports and writes; the others only train.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """Which of the processes this one is; alone by default."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """The processes of the process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, reports and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as a module whose backward pass averages gradients over all processes."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes of one value each."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value

    def largest(self, value: int, device: torch.device) -> int:
        """The largest over all processes of one number each."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """An error of one process becomes one of all, and none waits for a process that is gone.

        Every process must enter this, and none may talk to the others inside.

        Args:
            kinds: the exceptions that are passed on, made of a message alone.

        Raises:
            Exception: of these kinds: this process's own, else that of the first process with one.
        """
        failure: Exception | None = None
        try:
            yield
        except kinds as error:
            failure = error
        if self.count > 1:
            failures: list[Exception | None] = [None] * self.count
            own = None if failure is None else type(failure)(str(failure))
            dist.all_gather_object(failures, own)
            failure = failure or next((other for other in failures if other), None)
        if failure is not None:
            raise failure

    def from_leader(self, text: str) -> str:
        """The text that process 0 gave."""
        if self.count == 1:
            return text
        shared = [text]
        dist.broadcast_object_list(shared)
        return shared[0]


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch's says that another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


def join(device: str) -> tuple[Processes, str]:
    """Meet the processes that `torchrun` started, if it did.

    Args:
        device: "cpu" or a CUDA device; each of several processes gets a GPU of its own.

    Returns:
        The processes, and this one's device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A run that goes on has saved the device of one of its processes.
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Processes.current(), device


def leave() -> None:
    """Part from the other processes, once this one's model is gone."""
    if dist.is_available() and dist.is_initialized():
        # A model in a reference cycle would keep the group's threads alive up to the end of the
        # interpreter, which aborts when it finds them running.
        gc.collect()
        dist.destroy_process_group()
