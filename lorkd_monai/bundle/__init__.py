"""Expert bundles: writing, checking, measuring and sharing them."""

import importlib

from lorkd_monai.bundle.check.checker import Problem, check_bundle, check_origin
from lorkd_monai.bundle.export import export_experts, network_info
from lorkd_monai.bundle.overrides import check_overrides
from lorkd_monai.bundle.pack import load_expert, pack_bundle, push_bundle
from lorkd_monai.bundle.writer import expert_name, write_expert_bundle, write_teacher_bundle
from lorkd_monai.metrics.costs import measure

__all__ = [
    "Problem",
    "check_bundle",
    "check_origin",
    "check_overrides",
    "export_experts",
    "expert_name",
    "load_expert",
    "measure",
    "network_info",
    "pack_bundle",
    "push_bundle",
    "write_expert_bundle",
    "write_teacher_bundle",
]


def __getattr__(name: str) -> object:
    if name == "TaskInference":  # copies of the training bundles of an earlier version call it by this room
        return getattr(importlib.import_module("lorkd_monai.serving.task_inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
