"""Expert bundles: writing, checking, measuring and sharing them."""

from lorkd_monai.bundle.check.checker import Problem, check_bundle, check_origin
from lorkd_monai.bundle.export import export_experts, network_info
from lorkd_monai.bundle.formats import measure
from lorkd_monai.bundle.overrides import check_overrides
from lorkd_monai.bundle.pack import load_expert, pack_bundle, push_bundle
from lorkd_monai.bundle.writer import expert_name, write_expert_bundle, write_teacher_bundle
from lorkd_monai.serving.task_inference import TaskInference

__all__ = [
    "Problem",
    "TaskInference",
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
