"""What all runs of a study have in common: the networks, the budget, the augmentation, the rule of selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorkd_monai.checks import is_real, is_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.transfer import POSITIONS
from lorkd_monai.networks.eks.strategies import LAYOUTS

__all__ = ["StudySettings", "default_settings"]


@dataclass(frozen=True)
class StudySettings:
    """The budget and everything else that is the same for all methods, unless a method's own change says otherwise.

    An epoch is ``images_per_epoch`` draws over all tasks together (`TaskSampler`), in the full and in the few-labels
    setting alike; a method that trains a network for each task gives it that task's part of the draws.

    Attributes:
        backbone: MONAI config of every student's network.
        teacher_backbone: MONAI config of the foundation model's network.
        image_size: size of the images, of the patches for 3D segmentation.
        in_channels: channels of the network's input.
        epochs: of each student.
        images_per_epoch: draws of one epoch; None: as many as there are training images.
        batch_size, learning_rate, weight_decay: of the AdamW optimiser, with a cosine schedule.
        tasks_per_batch: of networks that are trained on several tasks, the teacher among them: batches of so many
            tasks, see `TaskBatchSampler`; None: all tasks mixed.
        single_batch_size: of networks that are trained on one task alone: smaller, so that they make about as many
            steps from their part of the draws. With ``tasks_per_batch`` they have as many images of their task in a
            batch as the others have, see `images_of_one_task`.
        rotate, flip_axes, noise: see `BatchAugment`.
        sampling, sampling_temperature: see `TaskSampler`.
        ema: share of the running average of the weights that is kept in each step; 0: no averaging. Validation and
            selection then look at the averaged weights.
        selection: ``"best"``: the epoch with the highest mean score on the validation images; ``"last"``.
        val_interval: epochs between two looks at the validation images.
        temperature, transfer_weight: of the transfer from the teacher.
        transfer_positions: ``"equal"`` or ``"by_class"``, see `transfer_loss`; for segmentation.
        label_share: part of each task's draws that has labels, where most images have none.
        rank: of the experts, one for all or one for each task; ``"imbalanced"``: by the size of the task.
        alpha, layout, norm: see `LoRKDNet`.
        expert_weight_decay: of the low-rank factors; None: as all weights.
        expert_learning_rate: of the low-rank factors, as a multiple of the learning rate.
        expert_warmup: epochs in which the shared weights and heads train alone.
        init: ``"random"``, or ``"teacher"``: an even selection of the teacher's weights, where layers have one name.
        teacher_selection: as ``selection``, of the teachers.
        teacher_epochs: of each teacher.
        teacher_ema: as ``ema``, of the teachers.
        teacher_members: networks of one teacher; their logits are averaged.
        teacher_images_per_epoch: as ``images_per_epoch``, of the teachers.
        teacher_bundle: folder of a MONAI bundle that is the foundation model, in place of one that the study trains.
        resamples: bootstrap resamples of the intervals.
        amp: mixed precision.
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
        problems = []
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                problems.append(f"{name} must be {rule}, got {value!r}")
        if not problems and (self.tasks_per_batch or 1) > self.batch_size:
            problems.append(
                f"tasks_per_batch must be at most batch_size ({self.batch_size}), got {self.tasks_per_batch}"
            )
        if problems:
            raise LoRKDError("; ".join(problems))

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


def _whole(least: int) -> tuple[str, Callable[[object], bool]]:
    return f"a whole number of at least {least}", lambda v: is_whole(v, least)


def _choice(*values: str) -> tuple[str, Callable[[object], bool]]:
    return f"one of {', '.join(map(repr, values))}", lambda v: v in values


_OPTIONAL_WHOLE = ("a whole number of at least 1, or None", lambda v: v is None or is_whole(v))
_AVERAGE = ("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1)
_POSITIVE = ("a number above 0", lambda v: is_real(v) and v > 0)
_NOT_NEGATIVE = ("a number of at least 0", lambda v: is_real(v) and v >= 0)

_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            "epochs",
            "batch_size",
            "single_batch_size",
            "val_interval",
            "teacher_epochs",
            "teacher_members",
            "in_channels",
            "resamples",
        ),
        _whole(1),
    ),
    "expert_warmup": _whole(0),
    **dict.fromkeys(("images_per_epoch", "teacher_images_per_epoch", "tasks_per_batch"), _OPTIONAL_WHOLE),
    **dict.fromkeys(("ema", "teacher_ema"), _AVERAGE),
    **dict.fromkeys(("learning_rate", "temperature", "alpha", "expert_learning_rate"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "rotate", "noise", "transfer_weight"), _NOT_NEGATIVE),
    "sampling_temperature": ("a number of at least 1", lambda v: is_real(v) and v >= 1),
    "expert_weight_decay": ("a number of at least 0, or None", lambda v: v is None or (is_real(v) and v >= 0)),
    "teacher_bundle": ("a path, or None", lambda v: v is None or (isinstance(v, str) and v != "")),
    "label_share": ("a number above 0 and at most 1", lambda v: is_real(v) and 0 < v <= 1),
    **dict.fromkeys(("selection", "teacher_selection"), _choice("best", "last")),
    "sampling": _choice("natural", "balanced", "temperature"),
    "layout": _choice(*LAYOUTS),
    "norm": _choice("shared", "task"),
    "init": _choice("random", "teacher"),
    "transfer_positions": _choice(*POSITIONS),
    "rank": (
        "a whole number of at least 1, 'imbalanced', or one number for each task",
        lambda v: v == "imbalanced" or isinstance(v, Mapping) or is_whole(v),
    ),
    "amp": ("True or False", lambda v: isinstance(v, bool)),
    "flip_axes": (
        "axes of the image, such as (0, 1)",
        lambda v: isinstance(v, tuple) and all(type(n) is int and 0 <= n <= 2 for n in v),
    ),
    **dict.fromkeys(
        ("backbone", "teacher_backbone"),
        (
            "the MONAI config of a network, such as {_target_: UNet, spatial_dims: 2, …}",
            lambda v: isinstance(v, Mapping) and isinstance(v.get("_target_"), str),
        ),
    ),
    "image_size": (
        "a whole number of at least 1, or one for each axis",
        lambda v: all(map(is_whole, v if isinstance(v, tuple) else (v,))),
    ),
}


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
    if (kind, spatial_dims) == ("classification", 2):
        stem = {"conv1_t_stride": 1, "no_max_pool": False}
        return StudySettings(
            _resnet(2, 3, 16, 1, **stem), _resnet(2, 3, 32, 2, **stem), 32, 3, images_per_epoch=4096, ema=0.98
        )
    if (kind, spatial_dims) == ("classification", 3):
        stem = {"conv1_t_stride": 2, "no_max_pool": True}
        return StudySettings(
            _resnet(3, 1, 16, 1, **stem), _resnet(3, 1, 32, 2, **stem), 28, 1, images_per_epoch=2048, batch_size=32,
            single_batch_size=8, ema=0.98,
        )  # fmt: skip
    if (kind, spatial_dims) == ("segmentation", 2):
        return StudySettings(
            _unet(2, 3, 16, "instance"), _unet(2, 3, 32, "instance"), 128, 3, epochs=40, teacher_epochs=100,
            batch_size=16, single_batch_size=4, images_per_epoch=160, val_interval=4, selection="last", ema=0.98,
            teacher_ema=0.99, teacher_selection="last", temperature=1.0,
        )  # fmt: skip
    if (kind, spatial_dims) == ("segmentation", 3):
        return StudySettings(
            _unet(3, 1, 16, "instance"), _unet(3, 1, 32, "instance"), (48, 48, 32), 1, epochs=30, teacher_epochs=60,
            batch_size=4, single_batch_size=2, images_per_epoch=96, val_interval=10, selection="last", ema=0.98,
            teacher_ema=0.99, teacher_selection="last", temperature=1.0,
        )  # fmt: skip
    raise LoRKDError(
        f"expected kind 'classification' or 'segmentation' and spatial_dims 2 or 3, got {kind!r} and {spatial_dims!r}"
    )
