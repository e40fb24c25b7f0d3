"""Handlers for MONAI's engines: checkpoints, averaged weights, a score for each task, export of bundles."""

from lorkd_monai.handlers.exports import ExpertExport, TeacherExport
from lorkd_monai.handlers.progress import TerminalProgress
from lorkd_monai.handlers.run_checkpoint import RunCheckpoint
from lorkd_monai.handlers.task_metric import TaskMetric
from lorkd_monai.handlers.weight_average import WeightAverage

__all__ = ["ExpertExport", "RunCheckpoint", "TaskMetric", "TeacherExport", "TerminalProgress", "WeightAverage"]
