"""Memory and switching time of a Deploy application that holds many experts; the figures of docs/deploy.md.

    python scripts/deploy_memory.py [--experts 8]

Writes experts with random weights (one architecture, another number of classes each), then measures in a process of
its own for each: all of them in the application's pool, and all of them as networks side by side. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lorkd_monai.apps.deploy.runtime.shared_weights import ExpertPool
from lorkd_monai.bundle import load_expert, write_expert_bundle
from lorkd_monai.bundle.formats import build_network
from lorkd_monai.tasks import TaskSpec, Work


def write(folder: Path, number: int, classes: int) -> None:
    """One 3D segmentation expert, a UNet of 4.8 million parameters with random weights."""
    config = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": classes, "num_res_units": 2}
    config.update(channels=[16, 32, 64, 128, 256], strides=[2, 2, 2, 2])
    task = TaskSpec(f"task{number}", 0, {i: f"class {i}" for i in range(classes)}, modality="CT")
    torch.manual_seed(number)
    write_expert_bundle(
        folder / f"task{number}_segmentation", network=build_network(config), network_config=config,
        work=Work("segmentation", 3, 1, (32, 32, 32), {task.name: task}), formats=["pt"], check=False,
    )  # fmt: skip


def own_memory() -> float:
    """MiB of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def measure(folder: Path, how: str) -> str:
    before, times, kept = own_memory(), [], []
    pool = ExpertPool(folder, device="cpu")
    if how == "pool":
        for turn in range(4):
            for name in pool.experts:
                started = time.perf_counter()
                with pool.use(name):
                    times += [time.perf_counter() - started] * (turn > 0)
        more = f", {1000 * statistics.median(times):.1f} ms to switch, {pool.bytes() / 2**20:.1f} MiB of tensors"
    else:
        kept = [load_expert(path) for path in sorted(folder.iterdir())]
        more = f", {sum(p.numel() for n in kept for p in n.parameters()) * 4 / 2**20:.1f} MiB of parameters"
    return f"{how}: {own_memory() - before:.1f} MiB of own memory{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(measure(Path(given.measure[0]), given.measure[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(given.experts):
            write(Path(temporary), number, 2 + number % 3)
        print(f"{given.experts} experts, torch {torch.__version__}, one thread of {os.cpu_count()} cores", flush=True)
        for how in ("pool", "networks"):
            subprocess.run([sys.executable, __file__, "--measure", temporary, how], check=True)


if __name__ == "__main__":
    main()
