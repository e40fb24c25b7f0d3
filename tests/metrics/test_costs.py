"""What a network costs, counted by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorkd_monai.metrics.costs import measure


class Keeps(nn.Module):
    """Keeps a tensor with a history between calls, as DynUNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return self.norm(self.kept)


def test_costs_by_hand() -> None:
    network = Keeps().train()
    network(torch.rand(2, 1, 8, 8))
    costs = measure(network, (1, 1, 8, 6), repeats=2)
    assert costs["parameters"] == 2 * 9 + 2 + 4 and costs["macs"] == 8 * 6 * 2 * 9
    # Floats of 4 bytes but the count of batches, of 8: scale, shift, mean and variance of each channel.
    assert costs["weights_mib"] == round((4 * (2 * 9 + 2 + 4 * 2) + 8) / 2**20, 3)
    assert costs["activations_mib"] == round(4 * 2 * (2 * 8 * 6) / 2**20, 3)
    assert costs["latency_ms"] > 0 and network.training and network.kept.requires_grad
