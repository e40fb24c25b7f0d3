"""Multi-task data: lists, data sets, samplers, synthetic phantoms, and builders of lists."""

from lorkd_monai.data.builders import combine, fetch_medmnist, fetch_mednist, from_class_folders, from_medmnist
from lorkd_monai.data.datalist import DataList, load_data_list, measure_spacing
from lorkd_monai.data.datasets import TaskDataset
from lorkd_monai.data.decathlon import from_segmentation_folders
from lorkd_monai.data.identity import data_identity
from lorkd_monai.data.phantoms import make_phantoms
from lorkd_monai.data.samplers import Draw, TaskBatchSampler, TaskSampler, draws_per_task
from lorkd_monai.tasks import TaskSpec

__all__ = [
    "DataList",
    "Draw",
    "TaskBatchSampler",
    "TaskDataset",
    "TaskSampler",
    "TaskSpec",
    "combine",
    "data_identity",
    "draws_per_task",
    "fetch_mednist",
    "fetch_medmnist",
    "from_class_folders",
    "from_medmnist",
    "from_segmentation_folders",
    "load_data_list",
    "make_phantoms",
    "measure_spacing",
]
