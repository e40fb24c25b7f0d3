"""Taking the rows of tasks out of a batch and putting them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["join_segments", "segment_of_rows", "take_rows", "take_segment"]


def segment_of_rows(segments: Iterable[tuple[int, int]], rounds: int = 1, size: int = 1) -> list[int]:
    """Which segment (first row, end, in a round) each row is in, or each group of ``size`` rows."""
    return [p for p, (start, stop) in enumerate(segments) for _ in range(start, stop, size)] * rounds


def take_rows(x: Tensor, order: Sequence[int]) -> Tensor:
    """Rows of ``x`` in the given order."""
    return x.index_select(0, torch.tensor(order, device=x.device))


def take_segment(x: Tensor, start: int, stop: int, rounds: int) -> Tensor:
    """Rows ``start:stop`` of each round of ``x``."""
    if rounds == 1:
        return x[start:stop]
    return x.unflatten(0, (rounds, -1))[:, start:stop].flatten(0, 1)


def join_segments(parts: Sequence[Tensor], rounds: int) -> Tensor:
    """Undo :func:`take_segment` for all segments, in their order."""
    if rounds == 1:
        return torch.cat(list(parts))
    return torch.cat([part.unflatten(0, (rounds, -1)) for part in parts], 1).flatten(0, 1)
