"""What all runs of a study have in common: the networks, the budget, the augmentation, the rule of selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorkd_monai.errors import LoRKDError
from lorkd_monai.settings import STUDY_SETTINGS, check_values
from lorkd_monai.tasks import check_kind

__all__ = ["QUICK", "StudySettings", "default_settings"]


@dataclass(frozen=True)
class StudySettings:
    """The budget and everything else that is the same for all methods, unless a method's own change says otherwise.

    An epoch is ``images_per_epoch`` draws over all tasks together (`TaskSampler`), in the full and in the few-labels
    setting alike; a method that trains a network for each task gives it that task's part of the draws.

    Attributes: see `lorkd_monai.settings.STUDY_SETTINGS`, or the table in docs/study.md.
    """

    backbone: Mapping[str, Any]
    teacher_backbone: Mapping[str, Any]
    image_size: int | tuple[int, ...]
    in_channels: int
    epochs: int = 12
    images_per_epoch: int | None = None
    batch_size: int = 64
    single_batch_size: int = 16
    tasks_per_batch: int | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    rotate: float = 10.0
    flip_axes: tuple[int, ...] = ()
    noise: float = 0.0
    sampling: str = "temperature"
    sampling_temperature: float = 2.0
    ema: float = 0.0
    selection: str = "best"
    val_interval: int = 1
    temperature: float = 4.0
    transfer_weight: float = 1.0
    transfer_positions: str = "by_class"
    label_share: float = 0.5
    rank: int | str | Mapping[str, int] = 4
    alpha: float = 16.0
    layout: str = "lorkd"
    norm: str = "shared"
    expert_weight_decay: float | None = None
    expert_learning_rate: float = 1.0
    expert_warmup: int = 0
    init: str = "random"
    teacher_selection: str = "best"
    teacher_epochs: int = 30
    teacher_ema: float = 0.995
    teacher_members: int = 1
    teacher_images_per_epoch: int | None = None
    teacher_bundle: str | None = None
    resamples: int = 1000
    amp: bool = False

    def __post_init__(self) -> None:
        check_values(vars(self), STUDY_SETTINGS)

    def changed(self, changes: Mapping[str, Any]) -> StudySettings:
        """A copy with other values.

        Raises:
            LoRKDError: an unknown name, or a value that does not fit.
        """
        names = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - names)
        if unknown:
            raise LoRKDError(f"unknown setting {unknown[0]!r}; a study's settings are {', '.join(sorted(names))}")
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return dataclasses.replace(self, **tuples)

    @property
    def images_of_one_task(self) -> int:
        """The batch size of networks that are trained on one task alone."""
        return self.single_batch_size if self.tasks_per_batch is None else self.batch_size // self.tasks_per_batch

    def as_data(self) -> dict[str, Any]:
        """The settings as plain JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


QUICK: Mapping[tuple[str, int], Mapping[str, Any]] = {
    ("classification", 2): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 256},
    ("classification", 3): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 384},
    ("segmentation", 2): {"epochs": 6, "teacher_epochs": 12, "images_per_epoch": 64, "image_size": 64},
    ("segmentation", 3): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 24, "image_size": (32, 32, 32)},
}
"""Changes for a short budget, for a quick trial."""


def _resnet(dims: int, channels: int, width: int, blocks: int, **stem: Any) -> dict[str, Any]:
    return {
        "_target_": "ResNet",
        "block": "basic",
        "layers": [blocks] * 4,
        "block_inplanes": [width * n for n in (1, 2, 4, 8)],
        "spatial_dims": dims,
        "n_input_channels": channels,
        "conv1_t_size": 3,
        **stem,
    }


def _unet(dims: int, channels: int, width: int, norm: str) -> dict[str, Any]:
    return {
        "_target_": "UNet",
        "spatial_dims": dims,
        "in_channels": channels,
        "channels": [width * n for n in (1, 2, 4, 8)],
        "strides": [2, 2, 2],
        "num_res_units": 2,
        "norm": norm,
    }


def default_settings(kind: str, spatial_dims: int) -> StudySettings:
    """The settings of a study of one kind: the bundles' students, and teachers that are larger and train longer.

    Raises:
        LoRKDError: another kind than classification or segmentation, or dimensions other than 2 or 3.
    """
    check_kind(kind, spatial_dims)
    if kind == "classification" and spatial_dims == 2:
        stem = {"conv1_t_stride": 1, "no_max_pool": False}
        return StudySettings(
            _resnet(2, 3, 16, 1, **stem), _resnet(2, 3, 32, 2, **stem), 32, 3, images_per_epoch=4096, ema=0.98
        )
    if kind == "classification":
        stem = {"conv1_t_stride": 2, "no_max_pool": True}
        return StudySettings(
            _resnet(3, 1, 16, 1, **stem), _resnet(3, 1, 32, 2, **stem), 28, 1, images_per_epoch=2048, batch_size=32,
            single_batch_size=8, ema=0.98,
        )  # fmt: skip
    masks = {"selection": "last", "ema": 0.98, "teacher_ema": 0.99, "teacher_selection": "last", "temperature": 1.0}
    if spatial_dims == 2:
        return StudySettings(
            _unet(2, 3, 16, "instance"), _unet(2, 3, 32, "instance"), 128, 3, epochs=40, teacher_epochs=100,
            batch_size=16, single_batch_size=4, images_per_epoch=160, val_interval=4, **masks,
        )  # fmt: skip
    return StudySettings(
        _unet(3, 1, 16, "instance"), _unet(3, 1, 32, "instance"), (48, 48, 32), 1, epochs=30, teacher_epochs=60,
        batch_size=4, single_batch_size=2, images_per_epoch=96, val_interval=10, **masks,
    )  # fmt: skip
