"""Peak memory of 3D segmentation training on the CPU: patches of 96³, batch 2, MONAI's UNet, three tasks, a teacher.

    python scripts/memory_3d.py [--patch 96] [--iterations 2] [--no-teacher]

Prints the seconds of each iteration and the peak resident memory of this process in GiB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lorkd_monai.engines import DecompositionTrainer
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.teachers.teacher import Teacher
from lorkd_monai.transforms import BatchAugment

TASKS = {"hippocampus": 3, "spinal_cord": 2, "abdomen_ct": 4}
UNET = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "channels": [16, 32, 64, 128, 256],
    "strides": [2, 2, 2, 2], "num_res_units": 2, "norm": "instance",
}  # fmt: skip


class Noise(torch.utils.data.Dataset):
    """Volumes of noise with masks, of all tasks in turn."""

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shape, task = (1, self.side, self.side, self.side), index % len(TASKS)
        label = torch.randint(list(TASKS.values())[task], shape)
        return {"image": torch.rand(shape), "label": label, "task": torch.tensor(task)}


def main() -> None:
    """Train for a few iterations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--no-teacher", action="store_true")
    options = parser.parse_args()
    network = LoRKDNet(UNET, TASKS, rank=4)
    teacher = None
    if not options.no_teacher:
        first, channels = 0, {}
        for task, count in TASKS.items():
            channels[task] = list(range(first, first := first + count))
        teacher = Teacher(TaskChannels.build(UNET, TASKS).network, channels, TASKS)
    started = time.monotonic()
    trainer = DecompositionTrainer(
        "cpu",
        1,
        torch.utils.data.DataLoader(Noise(2 * options.iterations, options.patch), batch_size=2),
        network,
        torch.optim.AdamW(network.parameters()),
        LoRKDLoss("dice_ce", 0.0 if teacher is None else 1.0, tasks=TASKS),
        teacher=teacher,
        augment=BatchAugment(3, 10.0, seed=0),
    )
    trainer.run()
    seconds = (time.monotonic() - started) / options.iterations
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
    print(f"{seconds:.1f} s per iteration, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
