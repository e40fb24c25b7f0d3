"""The settings of the training bundles and of a study, each described once: what it is, and what its value must be.

`check_values` refuses bad values. scripts/make_bundles.py and scripts/settings_docs.py write the tables of the
documentation from the same descriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorkd_monai.checks import is_real, is_whole
from lorkd_monai.errors import LoRKDError

__all__ = ["BUNDLE_SETTINGS", "STUDY_SETTINGS", "Setting", "check_values"]

Rule = tuple[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class Setting:
    """One setting: one sentence on what it is, and its rule in words and as a function.

    A setting without a rule is a path, a pattern or a config, which its reader checks.
    """

    text: str
    rule: Rule | None = None


def check_values(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Check values by the rules of their settings; a name that is not among the settings is not looked at.

    Raises:
        LoRKDError: one message with every value that breaks its rule, or a batch too small for its tasks.

    Example::

        >>> check_values({"rotate": 10, "ema": 0.98}, BUNDLE_SETTINGS)
    """
    rules = {name: settings[name].rule for name in values if name in settings}
    problems = [
        f"{name} must be {rule[0]}, got {values[name]!r}"
        for name, rule in rules.items()
        if rule is not None and not rule[1](values[name])
    ]
    size, few = values.get("batch_size"), values.get("tasks_per_batch")
    if not problems and size is not None and few is not None and few > size:
        problems.append(f"tasks_per_batch must be at most batch_size ({size}), got {few}")
    if problems:
        raise LoRKDError("; ".join(problems))


def _whole(least: int) -> Rule:
    return f"a whole number of at least {least}", lambda v: is_whole(v, least)


def _choice(*values: str) -> Rule:
    return f"one of {', '.join(map(repr, values))}", lambda v: v in values


def _or_none(rule: Rule) -> Rule:
    words, holds = rule
    return f"{words}, or None (null in a file)", lambda v: v is None or holds(v)


_COUNT = _whole(1)
_POSITIVE: Rule = ("a number above 0", lambda v: is_real(v) and v > 0)
_NOT_NEGATIVE: Rule = ("a number of at least 0", lambda v: is_real(v) and v >= 0)
_AVERAGE: Rule = ("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1)
_SWITCH: Rule = ("True or False", lambda v: isinstance(v, bool))
_NETWORK: Rule = (
    "the MONAI config of a network, such as {_target_: UNet, spatial_dims: 2, …}",
    lambda v: isinstance(v, Mapping) and isinstance(v.get("_target_"), str),
)

_COMMON: Mapping[str, Setting] = {
    "image_size": Setting(
        "size of the network's input in pixels or voxels, one number or one for each axis: classification resizes "
        "images to it, 2D segmentation fits and pads them, 3D segmentation cuts patches and slides a window",
        (
            "a whole number of at least 1, or a list of one for each axis",
            lambda v: is_whole(v) or (isinstance(v, (list, tuple)) and len(v) in (2, 3) and all(map(is_whole, v))),
        ),
    ),
    "in_channels": Setting(
        "channels of the network's input; grey images are repeated, colours made grey, to fit", _COUNT
    ),
    "batch_size": Setting("images of a step (of each process)", _COUNT),
    "sampling": Setting(
        "`natural`: each image once an epoch; `balanced`: each task as often; `temperature`: between the two",
        _choice("natural", "balanced", "temperature"),
    ),
    "sampling_temperature": Setting(
        "1 is `natural`; the larger, the more balanced", ("a number of at least 1", lambda v: is_real(v) and v >= 1)
    ),
    "tasks_per_batch": Setting(
        "batches of so many tasks, with as many images of each; null: all tasks mixed", _or_none(_COUNT)
    ),
    "flip_axes": Setting(
        "axes along which images are mirrored at random, from 0; only where left and right do not matter",
        (
            "a list of axes of the image, such as [0, 1], or []",
            lambda v: isinstance(v, (list, tuple)) and all(is_whole(n, 0) and n <= 2 for n in v),
        ),
    ),
    "rotate": Setting("largest random rotation, in degrees", _NOT_NEGATIVE),
    "alpha": Setting("experts are scaled by alpha / rank", _POSITIVE),
    "layout": Setting("`lorkd` (the papers') or `conv` (a k×k convolution and a 1×1 one)", _choice("lorkd", "conv")),
    "norm": Setting(
        "`shared`, or `task`: each task has norms of its own, which need several images of each task in a batch",
        _choice("shared", "task"),
    ),
    "learning_rate": Setting("highest learning rate of AdamW; it falls to 0 along a cosine", _POSITIVE),
    "weight_decay": Setting("weight decay of AdamW", _NOT_NEGATIVE),
    "ema": Setting(
        "running average of the weights, which is validated and kept: share that is kept in each step; 0: none",
        _AVERAGE,
    ),
    "temperature": Setting("T of the transfer: the larger, the softer the teacher's answers", _POSITIVE),
    "transfer_weight": Setting(
        "weight of the transfer beside the task loss; 0 trains without a teacher", _NOT_NEGATIVE
    ),
    "transfer_positions": Setting(
        "positions in the transfer of a segmentation: `by_class` (classes weigh alike) or `equal`",
        _choice("equal", "by_class"),
    ),
    "amp": Setting("mixed precision: float16 on GPUs, bfloat16 on the CPU", _SWITCH),
    "val_interval": Setting("epochs between two validations", _COUNT),
}

BUNDLE_SETTINGS: Mapping[str, Setting] = {
    **_COMMON,
    "bundle_root": Setting("folder of this bundle"),
    "dataset_dir": Setting("folder with the data list `dataset.json`, or the file itself"),
    "output_dir": Setting("everything that a run writes"),
    "teacher_bundle": Setting("folder of a MONAI bundle whose network knows the tasks; `pretraining` writes one here"),
    "teacher_intensity": Setting(
        "for the teacher: `auto` (its bundle says), `same`, `zscore`, `{range: [a, b], to: [c, d]}`",
        (
            "'auto', 'same', 'zscore' or {'range': [a_min, a_max], 'to': [b_min, b_max]}",
            lambda v: v in ("auto", "same", "zscore") or isinstance(v, Mapping),
        ),
    ),
    "overwrite": Setting("replace a teacher or experts that exist", _SWITCH),
    "device": Setting("where to run"),
    "cache_dir": Setting("folder for preprocessed volumes that do not fit into memory, and for a faster next start"),
    "rank": Setting(
        "rank of every expert, or one for each task: `\"{'spleen': 4, 'spinal_cord': 12}\"`; 0: no experts",
        (  # None is for the run id `adding`: the rank of the experts that there are
            "a whole number of at least 0, or {task: rank}",
            lambda v: v is None or is_whole(v, 0) or isinstance(v, Mapping),
        ),
    ),
    "rank_pattern": Setting(
        "factor of the rank by layer: `\"{'*submodule*': 2}\"` doubles it in the layers that match"
    ),
    "nested": Setting(
        "train experts that can be cut to any lower rank (`lorkd rank-curve`, `lorkd export --rank`)", _SWITCH
    ),
    "include": Setting(
        "patterns of the layers that get experts; null: all convolutions and linear layers but depthwise ones"
    ),
    "exclude": Setting("patterns of layers that stay shared"),
    "seed": Setting("seed of everything random", _whole(0)),
    "max_epochs": Setting("epochs of `training`", _COUNT),
    "init": Setting(
        "where the shared network starts: `auto`, `teacher` (a selection of its weights) or `random`",
        _choice("auto", "teacher", "random"),
    ),
    "cache_teacher": Setting(
        "keep the teacher's answers on disk: `True` without augmentation, n with n fixed views per image",
        (
            "True, False, or the number of fixed views of each image",
            lambda v: isinstance(v, bool) or is_whole(v, 0),
        ),
    ),
    "accumulation_steps": Setting("batches whose gradients are summed before a step", _COUNT),
    "pretrain_epochs": Setting("epochs of `pretraining`", _COUNT),
    "formats": Setting(
        "files of the experts' weights, of `['pt', 'safetensors', 'ts', 'onnx']`; null: all that can be written"
    ),
    "backbone": Setting("MONAI config of the network; any of its values: `--backbone#… VALUE`"),
    "teacher_backbone": Setting("the same for the teacher that `pretraining` trains"),
}
"""The top-level keys of a training bundle's ``configs/train.yaml``."""

STUDY_SETTINGS: Mapping[str, Setting] = {
    **_COMMON,
    "backbone": Setting("MONAI config of every student's network", _NETWORK),
    "teacher_backbone": Setting("MONAI config of the foundation model's network", _NETWORK),
    "epochs": Setting("epochs of each student", _COUNT),
    "images_per_epoch": Setting(
        "draws of one epoch, over all tasks together; null: as many as there are training images", _or_none(_COUNT)
    ),
    "single_batch_size": Setting(
        "batch size of networks that are trained on one task alone: smaller, so that they make about as many steps "
        "from their part of the draws; with `tasks_per_batch`, as many images of a task as the others have in a batch",
        _COUNT,
    ),
    "noise": Setting("standard deviation of the Gaussian noise that is added to images", _NOT_NEGATIVE),
    "selection": Setting(
        "`best`: the epoch with the highest mean score on the validation images; `last`", _choice("best", "last")
    ),
    "label_share": Setting(
        "part of each task's draws that has labels, where most images have none",
        ("a number above 0 and at most 1", lambda v: is_real(v) and 0 < v <= 1),
    ),
    "rank": Setting(
        "rank of the experts, one for all or one for each task; `imbalanced`: by the size of the task",
        (
            "a whole number of at least 1, 'imbalanced', or {task: rank}",
            lambda v: v == "imbalanced" or isinstance(v, Mapping) or is_whole(v),
        ),
    ),
    "expert_weight_decay": Setting(
        "weight decay of the low-rank factors; null: `weight_decay`", _or_none(_NOT_NEGATIVE)
    ),
    "expert_learning_rate": Setting(
        "learning rate of the low-rank factors, in multiples of `learning_rate`", _POSITIVE
    ),
    "expert_warmup": Setting("epochs in which the shared weights and heads train alone", _whole(0)),
    "init": Setting(
        "`random`, or `teacher`: a selection of the teacher's weights, where layers have the same names",
        _choice("random", "teacher"),
    ),
    "teacher_selection": Setting("as `selection`, of the teachers", _choice("best", "last")),
    "teacher_epochs": Setting("epochs of each teacher", _COUNT),
    "teacher_ema": Setting("as `ema`, of the teachers", _AVERAGE),
    "teacher_members": Setting("networks of one teacher; their logits are averaged", _COUNT),
    "teacher_images_per_epoch": Setting("as `images_per_epoch`, of the teachers", _or_none(_COUNT)),
    "teacher_bundle": Setting(
        "folder of a MONAI bundle that is the foundation model, in place of one that the study trains",
        _or_none(("a path", lambda v: isinstance(v, str) and v != "")),
    ),
    "resamples": Setting("bootstrap resamples of the intervals", _COUNT),
}
"""The settings of all runs of a study, `lorkd_monai.study.StudySettings`; each is an option of ``lorkd study``."""
