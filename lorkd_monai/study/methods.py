"""The methods that a study compares, and the settings (all labels, few labels) that it compares them in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.settings import StudySettings

__all__ = [
    "MAIN_METHODS",
    "METHODS",
    "QUICK_METHODS",
    "Method",
    "kept_images_of",
    "label_share_of",
    "methods_named",
    "teacher_setting_of",
]

FAMILIES = ("teacher", "stl", "mtl", "separate", "peft", "kf", "lorkd")
_FIXED = ("image_size", "in_channels", "teacher_backbone", "teacher_bundle", "resamples")


@dataclass(frozen=True)
class Method:
    """One way to get a network for each task.

    Attributes:
        name: of its files, and in tables.
        family: ``"teacher"``: the foundation model. ``"stl"``: a student for each task. ``"mtl"``: one student with a
            head for each task. ``"separate"``: a student that all tasks train for the first half of the budget, then a
            full copy of it for each task. ``"peft"``: the same, with an adapter of PEFT on the frozen student in place
            of the copy. ``"kf"``: a common network, and a small one for each task, whose answers are added.
            ``"lorkd"``: one student with low-rank experts.
        distilled: whether the teacher takes part.
        about: what it is, in one sentence.
        changes: settings that differ from the study's.
    """

    name: str
    family: str
    distilled: bool
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, common: StudySettings) -> StudySettings:
        """The settings of its runs.

        Raises:
            LoRKDError: it changes what all runs must share, or what is no setting, or to a value that does not fit.
        """
        fixed = [name for name in _FIXED if name in self.changes]
        if fixed:
            raise LoRKDError(f"method {self.name!r} changes {fixed[0]}, which all runs of a study share")
        try:
            return common.changed(self.changes)
        except LoRKDError as error:
            raise LoRKDError(f"method {self.name!r}: {error}") from error


_ALL = [
    Method("teacher", "teacher", False, "the foundation model: a larger network, all tasks in one output"),
    Method("stl", "stl", False, "single-task learning: a student for each task, from scratch"),
    Method("mtl", "mtl", False, "multi-task learning: one student, a head for each task"),
    Method("mtl_norms", "mtl", False, "multi-task learning with norms for each task", {"norm": "task"}),
    Method("stl_kd", "stl", True, "a student for each task, distilled"),
    Method("mtl_kd", "mtl", True, "one student with heads, distilled"),
    Method("mtl_kd_norms", "mtl", True, "one student with heads and norms for each task, distilled", {"norm": "task"}),
    Method("separate_kd", "separate", True, "one distilled student, then a full copy of it for each task"),
    Method(
        "peft_lora", "peft", True, "mtl_kd_init for half of the epochs, then a LoRA adapter of PEFT for each task",
        {"init": "teacher"},
    ),
    Method(
        "peft_lora_norms", "peft", True, "as peft_lora, with norms that each task trains",
        {"init": "teacher", "norm": "task"},
    ),
    Method("kf", "kf", True, "knowledge factorization: a common network and a small one for each task, distilled"),
    Method("kf_init", "kf", True, "as kf, started from the teacher's weights", {"init": "teacher"}),
    Method("lorkd", "lorkd", True, "low-rank experts of rank 4 on a shared student"),
    Method("lorkd_r8", "lorkd", True, "low-rank experts of rank 8", {"rank": 8}),
    Method("lorkd_conv", "lorkd", True, "low-rank experts of layout conv, rank 4", {"layout": "conv"}),
    Method("lorkd_norms", "lorkd", True, "low-rank experts and norms for each task", {"norm": "task"}),
    Method("lorkd_r8_norms", "lorkd", True, "experts of rank 8 and norms for each task", {"rank": 8, "norm": "task"}),
    Method("lorkd_alone", "lorkd", False, "low-rank experts without a teacher"),
    Method("lorkd_alone_norms", "lorkd", False, "experts and norms for each task, no teacher", {"norm": "task"}),
    Method("lorkd_imbalanced", "lorkd", True, "ranks by the size of the task", {"rank": "imbalanced"}),
    Method("lorkd_t2", "lorkd", True, "temperature 2", {"temperature": 2.0}),
    Method("lorkd_decay", "lorkd", True, "ten times the weight decay on the factors", {"expert_weight_decay": 0.1}),
    Method("lorkd_warmup", "lorkd", True, "factors start after four epochs", {"expert_warmup": 4}),
    Method("lorkd_balanced", "lorkd", True, "each task drawn as often", {"sampling": "balanced"}),
    Method("lorkd_no_ema", "lorkd", True, "no average of the weights", {"ema": 0.0}),
    Method("lorkd_init", "lorkd", True, "started from a selection of the teacher's weights", {"init": "teacher"}),
    Method(
        "lorkd_init_norms", "lorkd", True, "experts and norms for each task, started from the teacher's weights",
        {"init": "teacher", "norm": "task"},
    ),
    Method("stl_kd_init", "stl", True, "as stl_kd, started from the teacher's weights", {"init": "teacher"}),
    Method("mtl_kd_init", "mtl", True, "as mtl_kd, started from the teacher's weights", {"init": "teacher"}),
    Method(
        "mtl_kd_init_norms", "mtl", True, "as mtl_kd_norms, started from the teacher's weights",
        {"init": "teacher", "norm": "task"},
    ),
]  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
MAIN_METHODS = (
    "teacher", "stl", "mtl", "stl_kd_init", "mtl_kd_init", "mtl_kd_init_norms", "lorkd_init", "lorkd_init_norms",
)  # fmt: skip
QUICK_METHODS = ("teacher", "stl", "mtl", "stl_kd", "mtl_kd", "lorkd", "lorkd_init_norms")

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_FEW = re.compile(r"few([1-9][0-9]?)")
_IMBALANCE = re.compile(r"imbalance([1-9][0-9]*)?")
_KEPT = 50


def label_share_of(setting: str) -> float:
    """Part of the training images whose labels the students have: 1 for ``"full"``, 0.1 for ``"few10"``.

    Raises:
        LoRKDError: another name.
    """
    found = _FEW.fullmatch(setting) if isinstance(setting, str) else None
    if setting != "full" and found is None and kept_images_of(setting) is None:
        raise LoRKDError(
            "a setting is 'full' or 'few' with the per cent of labels, such as 'few10', or 'imbalance', which may have "
            f"the images that small tasks keep, such as 'imbalance30', got {setting!r}"
        )
    return 1.0 if found is None else int(found[1]) / 100


def kept_images_of(setting: str) -> int | None:
    """Training images that each small task keeps: 50 for ``"imbalance"``, 30 for ``"imbalance30"``; else None."""
    found = _IMBALANCE.fullmatch(setting) if isinstance(setting, str) else None
    return None if found is None else int(found[1] or _KEPT)


def teacher_setting_of(setting: str) -> str:
    """The setting whose teacher teaches in this one: itself where images are missing, else ``"full"``."""
    return "full" if kept_images_of(setting) is None else setting


def methods_named(names: Sequence[str], variants: Mapping[str, Mapping[str, Any]] | None = None) -> list[Method]:
    """Methods by name, among them own variants.

    Args:
        names: names of `METHODS` or of ``variants``.
        variants: name -> ``{"base": name of a method, setting: value, …}``.

    Raises:
        LoRKDError: an unknown method, or a name that can't be a file's.
    """
    known = dict(METHODS)
    for name, changes in (variants or {}).items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in METHODS:
            raise LoRKDError(f"a variant's name is made of a-z, 0-9 and _, and is not taken yet, got {name!r}")
        base = known.get(str(changes.get("base"))) if isinstance(changes, Mapping) else None
        if base is None:
            raise LoRKDError(f"variant {name!r}: expected {{'base': one of {', '.join(known)}, …}}, got {changes!r}")
        own = {k: v for k, v in changes.items() if k not in ("base", "distilled")}
        said = ", ".join(f"{k} {v}" for k, v in changes.items() if k != "base")
        known[name] = dataclasses.replace(
            base,
            name=name,
            about=f"{base.name} with {said}",
            distilled=bool(changes.get("distilled", base.distilled)),
            changes={**base.changes, **own},
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LoRKDError(f"unknown method {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
