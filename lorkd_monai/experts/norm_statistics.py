"""Batch norm statistics of an expert, re-estimated on its own images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.routing.table import route

__all__ = ["reestimate_norms"]


@torch.no_grad()
def reestimate_norms(network: nn.Module, batches: Iterable, task: str | int | None = None) -> int:
    """Replace the running statistics of batch norms by the average over some batches of images.

    Norms shared by all tasks hold the statistics of the mixed training batches; an expert that serves one task does
    better with those of its own images. The statistics are the plain average over the batches (cumulative moving
    average), so give batches of one size, not too small. Nothing else changes; dropout is off.

    Args:
        network: an extracted expert (or any other network), or a `LoRKDNet` with ``norm="task"``.
        batches: images BCHW[D], or dicts with them as ``"image"``, or tuples that start with them; on the network's
            device.
        task: the task, for a `LoRKDNet`.

    Returns:
        The number of batches.

    Raises:
        LoRKDError: no batches, no norms that keep statistics, a `LoRKDNet` without a task or whose tasks share their
            norms, or statistics that are not finite. The old statistics are then kept.

    Example::

        expert = net.extract("breast")
        reestimate_norms(expert, (batch["image"] for batch in loader))
    """
    if isinstance(network, LoRKDNet):
        if task is None:
            raise LoRKDError("task is needed: whose norms are to be re-estimated?")
        if not network.norm_banks:
            raise LoRKDError(
                "the tasks of this network share their norms, so that new statistics for one would change all: "
                "decompose with norm='task', or extract the expert and re-estimate those of the extracted network"
            )
        index = network.task_index(task)
        norms: list[Any] = [bank.tasks[index] for bank in network.norm_banks.values()]
        module: nn.Module = network.backbone
    else:
        index, norms, module = None, list(network.modules()), network
    norms = [m for m in norms if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    if not norms:
        raise LoRKDError(f"{type(network).__name__} has no batch norm that keeps statistics: nothing to estimate")

    before = [(buffer, buffer.clone()) for m in norms for buffer in m.buffers(recurse=False)]
    momenta = [m.momentum for m in norms]
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    used = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        for batch in batches:
            x = _images(batch)
            with nullcontext() if index is None else route(index, batch_size=x.shape[0]):
                module(x)
            used += 1
        if not used:
            raise LoRKDError("no batches of images were given to estimate the norms on")
        if not all(buffer.isfinite().all() for buffer, _ in before):
            raise LoRKDError("the statistics of the norms are NaN or infinite: check the images")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for m, training in modes:
            m.training = training
    return used


def _images(batch: object) -> Tensor:
    if isinstance(batch, Mapping):
        batch = batch.get("image")
    elif isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise LoRKDError(f"a batch must be a tensor of images, or hold one as 'image', got {type(batch).__name__}")
    return batch.as_tensor() if hasattr(batch, "as_tensor") else batch
