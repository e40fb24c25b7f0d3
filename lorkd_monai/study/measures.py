"""What the networks of a study cost, and what that was measured on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite
import monai
import numpy as np
import torch
from torch import nn

from lorkd_monai import __version__
from lorkd_monai.metrics.costs import measure
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.study.factorization import FactorNet
from lorkd_monai.study.models import OneEach
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["command", "cost_of", "hardware", "peak_memory", "plain_networks", "versions"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def plain_networks(network: nn.Module, tasks: list[str]) -> dict[str, nn.Module]:
    """The plain network that serves each task: what would be deployed."""
    if isinstance(network, (LoRKDNet, FactorNet)):
        return {name: network.extract(name) for name in tasks}
    if isinstance(network, OneEach):
        return {name: one.extract(0) for name, one in zip(tasks, network.networks, strict=True)}
    plain = network.network if isinstance(network, (TaskChannels, Teacher)) else network
    return dict.fromkeys(tasks, plain)


def cost_of(network: nn.Module, tasks: list[str], shape: tuple[int, ...], repeats: int = 20) -> dict[str, Any]:
    """Parameters of all that was trained; of each task's plain network its parameters, multiply-adds and latency.

    See `lorkd_monai.metrics.costs.measure`: the latency is that of one image, on the CPU.

    Args:
        network: as trained.
        tasks: names of the tasks.
        shape: C×H×W[×D] of an image.
        repeats: of the timing.
    """
    known: dict[int, dict[str, float]] = {}
    rows = {}
    for name, plain in plain_networks(network, tasks).items():
        if id(plain) not in known:
            costs = measure(plain, (1, *shape), repeats)
            known[id(plain)] = {
                "parameters": costs["parameters"],
                "multiply_adds": costs["macs"],
                "latency_s": costs["latency_ms"] / 1000,
            }
        rows[name] = known[id(plain)]
    return {"parameters": sum(p.numel() for p in network.parameters()), "plain": rows}


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[dict[str, int | None]]:
    """Fill a dict with the peak memory in bytes: of the GPU, and of this process where the system reports it."""
    found: dict[str, int | None] = {"process": None, "gpu": None}
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text("5")  # Linux: start the high-water mark anew
        told = True
    except OSError:
        told = False
    yield found
    if cuda:
        found["gpu"] = torch.cuda.max_memory_allocated(device)
    if told and _STATUS.is_file():
        line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")), "")
        found["process"] = int(line.split()[1]) * 1024 if line else None


def versions() -> dict[str, str]:
    """Versions of the packages that the metrics depend on."""
    return {
        "lorkd-monai": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "pytorch-ignite": ignite.__version__,
        "numpy": np.__version__,
    }


def hardware(device: torch.device | str) -> dict[str, Any]:
    """The processor, the threads in use, and the GPU."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        line = next((line for line in info.read_text().splitlines() if line.startswith("model name")), None)
        model = model if line is None else line.split(":", 1)[1].strip()
    result: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
    return result


def command() -> str:
    """The command line of this process, without the folder of its program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
