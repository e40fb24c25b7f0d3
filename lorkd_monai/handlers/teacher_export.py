"""Writes the teacher's bundle when it has been trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from lorkd_monai.bundle.writer import refuse_foreign, write_teacher_bundle
from lorkd_monai.checkpoints.weights import load_weights
from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import TaskChannels

__all__ = ["TeacherExport"]

_log = logging.getLogger(__name__)


class TeacherExport:
    """Write the trained teacher as an ordinary MONAI bundle, from its best weights.

    Args:
        network: the teacher as it is trained, made by `TaskChannels.build`.
        weights: file of the best weights.
        folder: the bundle's folder.
        data: the data list.
        in_channels: channels of the network's input.
        image_size: size of its images, in voxels.
        figures: called with the network; gives the measured figures of each task.
        overwrite: replace a bundle that exists.

    Raises:
        LoRKDError: at the start of training, where a task has no labelled image, the bundle exists and ``overwrite`` is
            not set, or what stands there is none.
    """

    def __init__(
        self,
        network: TaskChannels,
        weights: str | os.PathLike,
        folder: str | os.PathLike,
        data: DataList,
        in_channels: int,
        image_size: int,
        figures: Callable[[TaskChannels], Mapping[str, Mapping[str, Any]]] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.network, self.weights, self.folder = network, weights, Path(folder)
        self.data, self.in_channels, self.image_size = data, in_channels, image_size
        self.figures, self.overwrite = figures, overwrite

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after its `RunCheckpoint`."""
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.COMPLETED, self.export)

    def check(self, engine: Engine) -> None:
        """Refuse a bundle that exists, and a task that nothing can be learnt of, before any time is spent."""
        labelled = {item["task"] for item in self.data.training if item["label"] is not None}
        missing = [task for task in self.data.tasks if task not in labelled]
        if missing:
            raise LoRKDError(
                f"task {missing[0]!r} of the data list {self.data.name!r} has no training image with a label, and a "
                "teacher learns from labels alone: give it some, or name a teacher that knows the task with "
                "--teacher_bundle"
            )
        if self.folder.exists() and not self.overwrite:
            raise LoRKDError(
                f"{self.folder} exists already: it is this output folder's teacher. Run `training` with it, give "
                "another --output_dir, or say --overwrite True to replace it"
            )
        refuse_foreign(self.folder)

    def export(self, engine: Engine) -> None:
        """Write the bundle."""
        if idist.get_rank() != 0:
            return
        self.network.load_state_dict(load_weights(self.weights))
        self.network.eval()
        figures = {} if self.figures is None else self.figures(self.network)
        figures = {task: own for task, own in figures.items() if self.data.tasks[task].score}
        write_teacher_bundle(
            self.folder,
            network=self.network.network.cpu(),
            network_config=self.network.config,
            tasks=list(self.data.tasks.values()),
            kind=self.data.kind,
            spatial_dims=self.data.spatial_dims,
            in_channels=self.in_channels,
            image_size=self.image_size,
            metrics={f"{task} {name}": entry for task, own in figures.items() for name, entry in own.items()},
            overwrite=self.overwrite,
        )
        _log.info("wrote the teacher %s", self.folder)
