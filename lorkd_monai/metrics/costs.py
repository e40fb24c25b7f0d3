"""What a network costs: parameters, multiply-accumulates, memory and latency."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorkd_monai.networks.surgery.replace import detached

__all__ = ["measure"]


def measure(network: nn.Module, image_shape: Sequence[int], repeats: int = 5) -> dict[str, float]:
    """Measure what one forward pass of ``network`` costs on this CPU.

    Args:
        image_shape: one input, 1×C×H×W[×D].
        repeats: passes timed after two warm-ups; the result is the median.

    Returns:
        ``parameters`` and ``macs`` (multiply-accumulates of convolutions and matrix products; counts),
        ``weights_mib`` (parameters and buffers) and ``activations_mib`` (all layers' outputs, in MiB), and
        ``latency_ms`` (with the current number of threads).

    Example::

        >>> measure(nn.Conv2d(1, 2, 3, padding=1, bias=False), (1, 1, 8, 8))["macs"]
        1152
    """
    module = copy.deepcopy(network, detached(network)).cpu().eval()
    image, outputs = torch.rand(tuple(image_shape)), []

    def note(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.numel() * output.element_size())

    handles = [layer.register_forward_hook(note) for layer in module.modules() if not list(layer.children())]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    for handle in handles:
        handle.remove()
    times = []
    with torch.no_grad():
        module(image)
        for _ in range(max(1, repeats)):
            start = time.perf_counter()
            module(image)
            times.append(time.perf_counter() - start)
    stored = [*module.parameters(), *module.buffers()]
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "macs": counter.get_total_flops() // 2,
        "weights_mib": round(sum(item.numel() * item.element_size() for item in stored) / 2**20, 3),
        "activations_mib": round(sum(outputs) / 2**20, 3),
        "latency_ms": round(1000 * median(times), 3),
    }
