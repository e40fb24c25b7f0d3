"""The learning rate by epoch."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["cosine_schedule"]


def cosine_schedule(optimizer: Optimizer, max_epochs: int, warmup: int = 1) -> LambdaLR:
    """Learning rate by epoch: a linear warm-up, then a half cosine towards 0 at ``max_epochs``."""

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, max_epochs - warmup)))

    return LambdaLR(optimizer, factor)
