"""The decomposed network on the images of one task, run as that task's expert bundle runs."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from lorkd_monai.bundle.configs import default_inferer, inference_config
from lorkd_monai.bundle.export import tasks_of_info
from lorkd_monai.bundle.text import inert_text
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.checkpoint import load_decomposition
from lorkd_monai.transforms import postprocessing, preprocessing

__all__ = ["TaskInference"]

_PARTS = ("preprocessing", "dataset", "dataloader", "inferer", "postprocessing", "handlers", "evaluator")


class TaskInference:
    """Everything that it takes to run a decomposition on images of one task, by the stock configs of its expert.

    The answers are those of the task's expert bundle: masks beside each other for segmentation, ``predictions.csv``
    for classification. Attributes: ``network`` (the decomposed network, switched to the task), ``evaluator``,
    ``dataset``, ``dataloader``, ``inferer``, ``preprocessing``, ``postprocessing``, ``handlers``.

    Args:
        checkpoint: file of a decomposition, as ``training`` leaves it.
        task: name of the task.
        dataset_dir: an image, or a folder of images.
        output_dir: where the answers go.
        device: where to run.

    Raises:
        LoRKDError: no checkpoint, no task or an unknown one, no image.

    Example::

        TaskInference("output/training/model.pt", "spleen", "scans", "masks").run()
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        task: str | None,
        dataset_dir: str | os.PathLike,
        output_dir: str | os.PathLike,
        device: torch.device | str = "cpu",
    ) -> None:
        if not Path(checkpoint).is_file():
            raise LoRKDError(
                f"no trained weights at {checkpoint}: run `training` with the same --output_dir first, or name a "
                "file with --checkpoint"
            )
        self.network = load_decomposition(checkpoint)
        if not isinstance(task, str) or task not in self.network.tasks:
            raise LoRKDError(
                f"which task are the images of? Expected --task with one of {', '.join(self.network.tasks)}, got "
                f"{task!r}"
            )
        self.network.switch_to(task)
        info, spec = self.network.info, tasks_of_info(self.network.info)[task]
        kind, dims, channels, size = info["kind"], info["spatial_dims"], info["in_channels"], info["image_size"]
        self.kind, self.output_dir, self.classes = kind, Path(output_dir), list(spec.labels.values())
        config = inference_config(
            kind,
            dims,
            {},
            preprocessing(spec, kind, dims, channels, size),
            postprocessing(spec, kind, dims),
            default_inferer(kind, (size,) * dims if isinstance(size, int) else tuple(size)),
        )
        config.update(
            dataset_dir=str(dataset_dir),
            output_dir=str(output_dir),
            class_names=[inert_text(name) for name in self.classes],
            device=torch.device(device),
            network=self.network.to(device).eval(),
            handlers=config["handlers"][1:],  # without the one that loads an expert's weights
        )
        for key in ("network_def", "run", "bundle_root", "ckpt_path"):
            del config[key]
        self.parser = ConfigParser(config)
        if not self.parser.get_parsed_content("images"):
            raise LoRKDError(
                f"no image in {str(dataset_dir)!r}: expected --dataset_dir to be an image or a folder of images "
                f"({' '.join(config['suffixes'])})"
            )

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            return self.parser.get_parsed_content(name)
        raise AttributeError(name)

    def run(self) -> None:
        """Write the answers."""
        if self.kind == "classification":
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with (self.output_dir / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(["file", *self.classes, "class"])
        self.evaluator.run()
