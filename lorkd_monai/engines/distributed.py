"""What several processes that train one network share beyond what DistributedDataParallel does."""

from __future__ import annotations

import gc

import ignite.distributed as idist
import torch

# Loaded here, before any process group exists: its modules keep the group that they find as a default argument, so that
# loading it later (DistributedDataParallel does) would keep the group's threads alive to the end of the process.
import torch._dynamo
import torch.distributed as dist
from ignite.engine import Engine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["average_gradients", "leave_processes", "share_buffers"]


def average_gradients(engine: Engine, module: nn.Module) -> None:
    """Average the gradients of a module outside the network over all processes, as those of the network are.

    Each process calls this in each step, also where its own batch gave the module no gradient.
    """
    for parameter in module.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = idist.all_reduce(gradient) / idist.get_world_size()


def share_buffers(engine: Engine, network: nn.Module) -> None:
    """Give every process the buffers of the first: statistics of batch norms differ after a step by their batches."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)


def leave_processes() -> None:
    """Take this process out of its group at the end of a run; without a group, do nothing.

    ``destroy_process_group`` alone leaves the group to every `DistributedDataParallel` that is still referenced, and
    with it gloo's threads. They then meet the interpreter's end, where now and then the process aborts ("terminate
    called without an active exception"), which torchrun takes for a failure of the whole run. Networks wrapped by
    `DistributedDataParallel` can't be trained after this call.
    """
    if not dist.is_initialized():
        return
    for network in [found for found in gc.get_objects() if type(found) is DistributedDataParallel]:
        network.process_group = network.reducer = network.logger = None  # type: ignore[assignment]
    dist.destroy_process_group()
