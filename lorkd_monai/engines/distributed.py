"""What several processes that train one network share beyond what DistributedDataParallel does."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from torch import nn

__all__ = ["average_gradients", "share_buffers"]


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
        torch.distributed.broadcast(buffer, 0)
