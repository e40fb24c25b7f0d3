"""Run the decomposed network on the images of one task, as the task's expert bundle does."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from lorkd_monai.bundle.configs import inference_config, pipeline_of
from lorkd_monai.bundle.export import network_info, work_of_info
from lorkd_monai.bundle.inert import inert_text
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.transforms.gate import refusal

__all__ = ["TaskInference"]

_PARTS = ("preprocessing", "dataset", "dataloader", "inferer", "postprocessing", "handlers", "evaluator")


class TaskInference:
    """Runs a decomposition on images of one task, with the configs of the task's expert bundle.

    The answers are those of that bundle: mask files for segmentation, ``predictions.csv`` for classification.
    Without a task there is nothing to run: ``backbone`` and ``metadata`` then give an untrained network, so that
    MONAI's tools can inspect a training bundle that has neither weights nor images.

    Attributes: ``network`` (the decomposed network, switched to the task), ``evaluator``, ``dataset``,
    ``dataloader``, ``inferer``, ``preprocessing``, ``postprocessing``, ``handlers``.

    Args:
        checkpoint: file of a decomposition, as ``training`` writes it.
        task: name of the task.
        dataset_dir: an image, or a folder of images.
        output_dir: where the answers go.
        device: where to run.
        backbone: config of the network to show if ``task`` is None.
        metadata: content of the training bundle's metadata.json, for that network.
        overwrite: replace answers of another run.

    Raises:
        LoRKDError: no checkpoint, no task or an unknown one.

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
        backbone: Mapping[str, Any] | functools.partial | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.checkpoint, self.task, self.dataset_dir = checkpoint, task, dataset_dir
        if task is None and backbone is not None and metadata is not None:
            self.network = _untrained(backbone, metadata)
            (served,) = self.network.tasks
        else:
            self.network, served = _trained(checkpoint, task)
        self.network.switch_to(served)
        work = work_of_info(self.network.info).only(served)
        self.kind, self.output_dir, self.classes = work.kind, Path(output_dir), list(work.task.labels.values())
        config = inference_config(work, pipeline_of(work), {})
        config.update(
            dataset_dir=str(dataset_dir),
            output_dir=str(output_dir),
            overwrite=overwrite,
            class_names=[inert_text(name) for name in self.classes],
            device=torch.device(device),
            network=self.network.to(device).eval(),
            handlers=config["handlers"][1:],  # without the one that loads an expert's weights
        )
        for key in ("network_def", "run", "bundle_root", "ckpt_path"):
            del config[key]
        self.parser = ConfigParser(config)

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            return self.parser.get_parsed_content(name)
        raise AttributeError(name)

    def run(self) -> None:
        """Write the answers.

        Raises:
            LoRKDError: no task, no image, or an answer's file that another image or run writes too.
        """
        if self.task is None:
            _trained(self.checkpoint, None)
        if not self.parser.get_parsed_content("images"):
            raise LoRKDError(
                f"no image in {str(self.dataset_dir)!r}: expected --dataset_dir to be an image or a folder of images "
                f"({' '.join(self.parser.get_parsed_content('suffixes'))})"
            )
        problem = self.parser.get_parsed_content("problem")
        if problem:
            raise LoRKDError(problem)
        if self.kind == "classification":
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with (self.output_dir / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(["file", *self.classes, "class"])
        try:
            self.evaluator.run()
        except RuntimeError as error:  # MONAI wraps a transform's error
            words = refusal(error)
            if words is None:
                raise
            raise LoRKDError(words) from error


def _trained(checkpoint: str | os.PathLike, task: str | None) -> tuple[LoRKDNet, str]:
    if not Path(checkpoint).is_file():
        raise LoRKDError(
            f"no trained weights at {checkpoint}: run `training` with the same --output_dir first, or name a "
            "file with --checkpoint"
        )
    network = load_decomposition(checkpoint)
    if not isinstance(task, str) or task not in network.tasks:
        raise LoRKDError(
            f"which task are the images of? Expected --task with one of {', '.join(network.tasks)}, got {task!r}"
        )
    return network, task


def _untrained(backbone: Mapping[str, Any] | functools.partial, metadata: Mapping[str, Any]) -> LoRKDNet:
    """A decomposition with one task, with the channels, classes and size in a training bundle's metadata."""
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    size = list(image["spatial_shape"])
    task = TaskSpec("example", 0, {int(i): str(name) for i, name in pred["channel_def"].items()})
    data = DataList("example", Path(), pred["format"], len(size), {task.name: task})
    return LoRKDNet(backbone, data.num_classes, info=network_info(data, image["num_channels"], size))
