"""A tiny decomposition with its data, for the tests of the engines."""

from __future__ import annotations

import torch
from monai.data import DataLoader
from torch import nn

from lorkd_monai.engines import DecompositionTrainer
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet

TASKS = {"a": 2, "b": 3}


class Items(torch.utils.data.Dataset):
    """Sixteen images of two tasks."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 1, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % 2), "task": torch.tensor(index // 2 % 2)}


def network(norm: nn.Module | None = None) -> LoRKDNet:
    """A network without norms unless one is given: a batch is then the mean of its parts."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, stride=2), norm or nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)]
    return LoRKDNet(nn.Sequential(*layers), TASKS, rank=1).double()


class Teacher(nn.Module):
    """Logits that depend on the image; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[torch.Tensor] = []

    def has_logits(self, task: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(task), dtype=torch.bool)

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        self.asked.append(x.clone())
        logits = x.flatten(1)[:, :3] * 5
        return logits.masked_fill((task == 0)[:, None] & (torch.arange(3) == 2), float("-inf"))


def trainer(net: LoRKDNet, batch_size: int = 8, epochs: int = 1, lr: float = 0.1, items=None, **options):
    """A trainer over `Items` in order, in float64."""
    items = items or Items()
    items.images = items.images.double()
    loader = DataLoader(items, batch_size=batch_size)
    options.setdefault("teacher", Teacher())
    options.setdefault(
        "loss_function", LoRKDLoss("ce", 1.0 if options["teacher"] is not None else 0.0, 2.0, tasks=TASKS)
    )
    parameters = [*net.parameters(), *options["loss_function"].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    return DecompositionTrainer("cpu", epochs, loader, net, optimizer, **options)
