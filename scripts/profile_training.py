"""Where the wall time of a training run goes.

    python scripts/profile_training.py BUNDLE --dataset_dir DATA --output_dir OUT [--max_epochs 2] [--key value …]

runs `training` of a bundle by its own train.yaml with these overrides (`pretraining` first, or --transfer_weight 0),
without the export at the end, and prints the share of each part. Parts do not overlap: what one part calls counts for
that part alone.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fire
import torch
from monai.bundle import ConfigParser
from torch.utils.data.dataloader import _BaseDataLoaderIter

STEP = ("teacher", "forward", "loss", "backward", "optimizer")


class Clock:
    """Adds up the time of nested parts, each without what it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str):
        self._tick()
        self._open.append(name)
        try:
            yield
        finally:
            self._tick()
            self._open.pop()

    def watch(self, owner: object, method: str, name: str) -> None:
        """Count the calls of a method as part ``name``."""
        own: Callable = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            with self.part(name):
                return own(*args, **kwargs)

        setattr(owner, method, timed)


def main(bundle: str, max_epochs: int = 2, **overrides: object) -> None:
    """Run and print."""
    parser = ConfigParser()
    parser.read_config(Path(bundle) / "configs" / "train.yaml")
    parser.update({"bundle_root": str(bundle), "max_epochs": max_epochs, **overrides})
    clock = Clock()
    with clock.part("start: data list, images, networks"):
        parser["train#handlers"] = [h for h in parser["train#handlers"] if h != "%train#export"]
        parser.parse()
        parser.get_parsed_content("initialize")
        trainer = parser.get_parsed_content("train#trainer")
        evaluator = parser.get_parsed_content("validate#evaluator")
    clock.watch(_BaseDataLoaderIter, "__next__", "data: items and batches")
    clock.watch(trainer, "augment", "data: augmentation")
    clock.watch(evaluator, "run", "validation")
    if trainer.teacher is not None:
        clock.watch(trainer.teacher, "forward", "teacher")
    training = trainer.network.forward

    def forward(*args: object, **kwargs: object) -> object:
        if not trainer.network.training:
            return training(*args, **kwargs)
        with clock.part("forward"):
            return training(*args, **kwargs)

    trainer.network.forward = forward
    clock.watch(trainer.objective, "forward", "loss")
    clock.watch(torch.Tensor, "backward", "backward")
    clock.watch(trainer.optimizer, "step", "optimizer")
    with clock.part("all else: engine, handlers, checkpoints"):
        trainer.run()
    total = sum(clock.seconds.values())
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:42s} {seconds:8.1f} s {100 * seconds / total:5.1f} %")
    step = sum(clock.seconds[name] for name in STEP)
    loop = total - clock.seconds["validation"] - clock.seconds["start: data list, images, networks"]
    print(f"{'forward, backward, optimizer':42s} {step:8.1f} s {100 * step / total:5.1f} % of all, "
          f"{100 * step / loop:.1f} % of the training epochs")  # fmt: skip


if __name__ == "__main__":
    fire.Fire(main)
