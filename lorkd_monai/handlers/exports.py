"""Write bundles when a training ends: one for each expert, or one for the teacher."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from lorkd_monai.bundle.export import expert_folders, export_experts
from lorkd_monai.bundle.facts import resolved_facts, write_facts
from lorkd_monai.bundle.writer import check_formats, refuse_foreign, write_teacher_bundle
from lorkd_monai.checkpoints.weights import load_weights
from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet, TaskChannels

__all__ = ["ExpertExport", "TeacherExport"]

_log = logging.getLogger(__name__)


class ExpertExport:
    """Write one MONAI bundle for each task when training ends, from the best weights.

    Existing experts are refused before training starts. The experts of an export that was killed are written again.

    Args:
        network: the decomposed network.
        weights: file of the best weights, loaded before the export; None: export the network as it is.
        folder: where the bundles go.
        figures: called with the network; returns the metrics of each task.
        parent: facts about the decomposition for the bundles' README; a value may be a function without arguments,
            which is called at the export. They are also written beside ``weights``, for later exports.
        overwrite: replace existing experts.
        formats: file formats of the weights, see `write_expert_bundle`.
        tasks: which tasks; None: all.

    Raises:
        LoRKDError: an unknown format, or one whose package is not installed; at the start of training, if experts exist
            and ``overwrite`` is not set.
    """

    def __init__(
        self,
        network: LoRKDNet,
        weights: str | os.PathLike | None,
        folder: str | os.PathLike,
        figures: Callable[[LoRKDNet], Mapping[str, Mapping[str, Any]]] | None = None,
        parent: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        formats: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.network, self.weights, self.folder = network, weights, Path(folder)
        self.figures, self.parent, self.overwrite = figures, dict(parent or {}), overwrite
        self.tasks = network.tasks if tasks is None else list(tasks)
        self.formats = check_formats(formats)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after its `RunCheckpoint`."""
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.COMPLETED, self.export)

    def check(self, engine: Engine) -> None:
        """Refuse existing experts, before any time is spent."""
        if self._unfinished.exists():
            return
        expert_folders(self.folder, self.tasks, self.network.info, self.overwrite)

    def export(self, engine: Engine) -> None:
        """Write the bundles, in the first of several processes."""
        if idist.get_rank() != 0:
            return
        if self.weights is not None:
            self.network.load_state_dict(load_weights(self.weights))
        self.network.eval()
        figures = {} if self.figures is None else self.figures(self.network)
        parent = resolved_facts(self.parent)
        if parent and self.weights is not None:
            write_facts(self.weights, parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        overwrite = self.overwrite or self._unfinished.exists()
        self._unfinished.touch()
        written = export_experts(self.network, self.folder, self.tasks, figures, parent, overwrite, self.formats)
        self._unfinished.unlink()
        _log.info("%d expert bundles in %s", len(written), self.folder)

    @property
    def _unfinished(self) -> Path:
        """A file that exists while the bundles are written; found later, it says that an export was killed."""
        return self.folder / ".unfinished"


class TeacherExport:
    """Write the trained teacher as an ordinary MONAI bundle when training ends, from its best weights.

    Args:
        network: the teacher in training, made by `TaskChannels.build`.
        weights: file of the best weights.
        folder: the bundle's folder.
        data: the data list.
        in_channels: channels of the network's input.
        image_size: size of its images, in voxels.
        figures: called with the network; returns the metrics of each task.
        overwrite: replace an existing bundle.

    Raises:
        LoRKDError: at the start of training, if a task has no labelled image, if the bundle exists and ``overwrite`` is
            not set, or if the folder holds something else.
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
        """Refuse an existing bundle, and a task without labels, before any time is spent."""
        labelled = {item["task"] for item in self.data.training if item["label"] is not None}
        missing = [task for task in self.data.tasks if task not in labelled]
        if missing:
            raise LoRKDError(
                f"task {missing[0]!r} of the data list {self.data.name!r} has no training image with a label, and a "
                "teacher learns from labels alone: label some of its images, or name a teacher that knows the task "
                "with --teacher_bundle"
            )
        if self.folder.exists() and not self.overwrite:
            raise LoRKDError(
                f"{self.folder} exists already: it is this output folder's teacher. Run `training` with it, give "
                "another --output_dir, or say --overwrite True to replace it"
            )
        refuse_foreign(self.folder)

    def export(self, engine: Engine) -> None:
        """Write the bundle, in the first of several processes."""
        if idist.get_rank() != 0:
            return
        self.network.load_state_dict(load_weights(self.weights))
        self.network.eval()
        figures = {} if self.figures is None else self.figures(self.network)
        figures = {task: own for task, own in figures.items() if self.data.tasks[task].score}
        write_teacher_bundle(
            self.folder,
            network=self.network.network.cpu(),
            network_config=self.network.config,  # type: ignore[arg-type]  # it was made from one
            work=self.data.work(self.in_channels, self.image_size),
            metrics={f"{task} {name}": entry for task, own in figures.items() for name, entry in own.items()},
            overwrite=self.overwrite,
        )
        _log.info("wrote the teacher %s", self.folder)
