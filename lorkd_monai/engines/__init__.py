"""The decomposition trainer, its evaluator, and the metrics of a trained decomposition."""

import importlib

from lorkd_monai.bundle.facts import run_facts
from lorkd_monai.data.loaders import test_loader, train_loader
from lorkd_monai.engines.begin import begin_run, end_run
from lorkd_monai.engines.distributed import leave_processes
from lorkd_monai.engines.evaluation import evaluate_tasks, figures_of, report_figures
from lorkd_monai.engines.objective import make_objective
from lorkd_monai.engines.schedule import cosine_schedule
from lorkd_monai.engines.settings import check_settings
from lorkd_monai.engines.trainer import AutocastInferer, DecompositionTrainer, TaskEvaluator
from lorkd_monai.teachers.find import find_teacher, start_from_teacher

__all__ = [
    "AutocastInferer",
    "DecompositionTrainer",
    "TaskEvaluator",
    "begin_run",
    "check_settings",
    "cosine_schedule",
    "end_run",
    "evaluate_tasks",
    "figures_of",
    "find_teacher",
    "leave_processes",
    "make_objective",
    "report_figures",
    "run_facts",
    "start_from_teacher",
    "test_loader",
    "train_loader",
]

# Copies of the training bundles of an earlier version call these by this room.
_MOVED = {"added_tasks", "network_with_new_tasks", "new_tasks_of", "trained_info", "what_is_added"}


def __getattr__(name: str) -> object:
    if name in _MOVED:
        return getattr(importlib.import_module("lorkd_monai.workflows.adding"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
