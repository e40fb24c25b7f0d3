"""What switching between experts costs beside loading a checkpoint anew: sizes, times, as a table.

    python scripts/switch_times.py [--repeats 5] [--tasks 8] [--rank 4]

Networks are MONAI's, with random weights: neither sizes nor times depend on what the weights are.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fire
import torch
from monai.bundle import ConfigParser

from lorkd_monai.checkpoints.packs import load_expert, save_pack
from lorkd_monai.checkpoints.weights import load_weights, save_weights
from lorkd_monai.networks import LoRKDNet

NETWORKS = {
    "ResNet-18, 2D": {"_target_": "monai.networks.nets.resnet18", "spatial_dims": 2, "n_input_channels": 3},
    "DenseNet-121, 2D": {"_target_": "DenseNet121", "spatial_dims": 2, "in_channels": 3},
    "UNet, 3D": {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "channels": [16, 32, 64, 128, 256],
        "strides": [2, 2, 2, 2], "num_res_units": 2,
    },
    "SegResNet, 3D": {"_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "init_filters": 16},
}  # fmt: skip


def _median(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _measure(name: str, config: dict, tasks: int, rank: int, repeats: int, folder: Path) -> list[str]:
    net = LoRKDNet(config, {f"task{i}": 2 for i in range(tasks)}, rank=rank).eval().requires_grad_(False)
    plain_file = folder / "plain.safetensors"
    plain = net.extract(0)
    save_weights(plain_file, plain.state_dict())
    files = save_pack(net, folder / "pack")
    number = [0]

    def anew() -> None:
        network = ConfigParser(net.backbone_config("task0")).get_parsed_content()
        network.load_state_dict(load_weights(plain_file))

    def into() -> None:
        plain.load_state_dict(load_weights(plain_file))

    def switch() -> None:
        number[0] = (number[0] + 1) % tasks
        net.switch_to(number[0])
        net._view.network(number[0])  # what the first call after a switch builds

    expert = _median(lambda: load_expert(net, files[1]), repeats)
    row = [plain_file.stat().st_size, files[0].stat().st_size, files[1].stat().st_size]
    all_plain, all_pack = tasks * row[0], sum(f.stat().st_size for f in files)
    times = [_median(anew, repeats), _median(into, repeats), _median(switch, repeats), expert]
    cells = [*(f"{size / 1e6:.1f}" for size in (*row, all_plain, all_pack)), *(f"{t:.1f}" for t in times)]
    return [name, *cells]


def main(repeats: int = 5, tasks: int = 8, rank: int = 4) -> None:
    """Measure and print a Markdown table.

    Args:
        repeats: how often each time is measured; the median counts.
        tasks: experts of each decomposition.
        rank: of each expert.
    """
    header = [
        "network", "one plain network, MB", "shared weights, MB", "one expert, MB", f"{tasks} plain networks, MB",
        f"pack of {tasks}, MB", "build and load, ms", "load into a built one, ms", "switch, ms",
        "replace an expert from its file, ms",
    ]  # fmt: skip
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, rank {rank}\n")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, config in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(_measure(name, config, tasks, rank, repeats, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
