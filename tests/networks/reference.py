"""The independent slow reference that every layer is compared with, and the tolerances: one table, never loosened."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},  # relative to the largest entry, see assert_close
}


def reference(layer, x, task, lora_a, lora_b, scales, **kwargs) -> Tensor:
    """Each sample by itself through the wrapped layer with the weight W0 + scale · (B A)."""
    rows = []
    for b, t in enumerate(task):
        weight = layer.weight + scales[t] * (lora_b[t] @ lora_a[t]).reshape(layer.weight.shape)
        rows.append(functional_call(layer, {"weight": weight}, (x[b : b + 1],), kwargs))
    return torch.cat(rows)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None, what: str = "") -> None:
    """Equal within the tolerance of ``dtype``, relative to the largest entry; -inf must meet -inf."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    tolerance = TOLERANCE[dtype or expected.dtype]
    infinite = expected.isinf()
    assert torch.equal(got.isinf(), infinite), f"{what}: -inf stands elsewhere"
    got, expected = got.detach().masked_fill(infinite, 0).double(), expected.detach().masked_fill(infinite, 0).double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    difference = float((got - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance["atol"] + tolerance["rtol"] * scale, f"{what}: differs by {difference}"
