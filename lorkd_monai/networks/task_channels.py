"""One plain network with the classes of all tasks side by side in its output, seen task by task."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.surgery.outputs import map_classes
from lorkd_monai.networks.surgery.replace import build_backbone, class_argument

__all__ = ["TaskChannels"]


class TaskChannels(nn.Module):
    """Show a network of many tasks' classes as a network that takes a task, as :class:`LoRKDNet` does.

    The foundation model of `pretraining` is such a network: plain, with as many output channels as all tasks together
    have classes, those of the first task first.

    Args:
        network: the network; its output has sum(num_classes) channels.
        num_classes: channels of each task by name, in the order of the output.

    Example::

        >>> net = TaskChannels(monai.networks.nets.resnet18(spatial_dims=2, num_classes=8), {"breast": 2, "xray": 6})
        >>> y = net(x, torch.tensor([0, 1]))    # 2 × 6, the first row filled up with -inf
        >>> y.shape, y.isinf().sum(1)
        (torch.Size([2, 6]), tensor([4, 0]))
    """

    _index: Tensor
    _own: Tensor

    def __init__(self, network: nn.Module, num_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.network = network
        self.config: dict | None = None
        self.num_classes = dict(num_classes)
        counts = list(num_classes.values())
        index = torch.zeros(len(counts), max(counts), dtype=torch.long)
        for task, count in enumerate(counts):
            index[task, :count] = sum(counts[:task]) + torch.arange(count)
        own = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        self.register_buffer("_index", index, persistent=False)
        self.register_buffer("_own", own, persistent=False)

    @classmethod
    def build(cls, network: nn.Module | Mapping | functools.partial, num_classes: Mapping[str, int]) -> TaskChannels:
        """Build from a MONAI config, whose number of output channels is set to that of all tasks together.

        The complete configuration is then in ``config``.

        Raises:
            LoRKDError: the configuration does not build a network or has no argument for its output channels.
        """
        total = sum(num_classes.values())
        if isinstance(network, functools.partial):
            network = {"_target_": f"{network.func.__module__}.{network.func.__qualname__}", **network.keywords}
        if not isinstance(network, nn.Module):
            argument = class_argument(network)
            if argument is None:
                raise LoRKDError(f"{network['_target_']} has no argument for its number of output channels")
            network = {**network, argument: total}
        built, config = build_backbone(network, total)
        view = cls(built, num_classes)
        view.config = config
        return view

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """B × C_max × …, each sample's own task's channels, -inf past them."""
        task = task.reshape(-1).expand(x.shape[0])
        rows = torch.arange(x.shape[0], device=x.device)[:, None]

        def select(y: Tensor, dim: int) -> Tensor:
            chosen = y.movedim(dim, 1)[rows, self._index[task]]
            past = ~self._own[task].view(*self._own[task].shape, *[1] * (chosen.ndim - 2))
            return chosen.masked_fill(past, float("-inf")).movedim(1, dim)

        return map_classes(select, self.network(x), sum(self.num_classes.values()))
