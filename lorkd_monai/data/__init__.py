"""Multi-task data: lists, data sets, samplers, synthetic phantoms, and builders of lists."""

from .datalist import DataList, TaskSpec, load_data_list, measure_spacing
from .datasets import TaskDataset
from .phantoms import make_phantoms
from .samplers import Draw, TaskBatchSampler, TaskSampler, draws_per_task

__all__ = [
    "DataList",
    "Draw",
    "TaskBatchSampler",
    "TaskDataset",
    "TaskSampler",
    "TaskSpec",
    "draws_per_task",
    "load_data_list",
    "make_phantoms",
    "measure_spacing",
]
