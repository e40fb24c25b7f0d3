"""Experts with batch-norm statistics of their own images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorkd_monai.bundle.configs import default_inferer
from lorkd_monai.bundle.export import expert_folders, export_experts, work_of_info
from lorkd_monai.bundle.facts import read_facts
from lorkd_monai.bundle.writer import check_formats
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.checks import check_whole, default_device
from lorkd_monai.data import DataList, TaskDataset, load_data_list
from lorkd_monai.engines.evaluation import Figures, evaluate_tasks, figures_table
from lorkd_monai.engines.trained_tasks import as_trained
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.norm_statistics import reestimate_norms
from lorkd_monai.tasks import Work, score_of

__all__ = ["renorm_experts"]


class _OneTask(nn.Module):
    """An expert with the signature of a decomposition."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, task: object) -> Tensor:
        return self.network(x)


def renorm_experts(
    checkpoint: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    output: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    formats: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> tuple[list[Path], str]:
    """Write expert bundles whose batch-norm statistics are re-estimated on the training images of their task.

    Norms that all tasks share hold the statistics of mixed batches. Some experts are better with their own statistics,
    others are not: both are measured on the test images, and the bundles state the metrics of the weights they hold.
    3D segmentation uses random patches, as in training.

    Args:
        checkpoint: file of a decomposition.
        dataset_dir: its data list.
        output: where the bundles go.
        tasks: which tasks; None: all.
        batch_size: images in a batch of the estimation.
        overwrite: replace existing bundles.
        formats: file formats of the weights, see `write_expert_bundle`.
        device: where to run; None: the first GPU if there is one, else the CPU.

    Returns:
        The bundles' folders, and a Markdown table of the metrics before and after; empty without test images.

    Raises:
        LoRKDError: the network has no batch norm that keeps statistics, a task is unknown, bundles exist, or the data
            list has other tasks.
    """
    check_whole("batch_size", batch_size)
    device = torch.device(device or default_device())
    network = load_decomposition(checkpoint).eval()
    work = work_of_info(network.info)
    chosen = [network.tasks[network.task_index(t)] for t in tasks] if tasks is not None else network.tasks
    expert_folders(output, chosen, network.info, overwrite)
    formats = check_formats(formats)
    data = load_data_list(dataset_dir, work.kind, work.spatial_dims)
    differing = [t for t in chosen if t not in data.tasks or data.tasks[t].num_classes != network.num_classes[t]]
    if differing:
        raise LoRKDError(
            f"the data list {dataset_dir} has no task {differing[0]!r} with {network.num_classes[differing[0]]} "
            f"classes, which the decomposition has; its tasks are {', '.join(data.tasks)}"
        )
    data = as_trained(data, network.info, str(checkpoint), chosen)
    size = list(work.image_size)
    patch = size if (work.kind, work.spatial_dims) == ("segmentation", 3) else None
    experts: dict[str, nn.Module] = {}
    before: Figures = {}
    after: Figures = {}
    for name in chosen:
        own = data.only(name)
        expert = experts[name] = network.extract(name).to(device).eval()
        if own.test:
            before |= _measure(expert, own, work, device)
        items = TaskDataset(own, "training", work.in_channels, size, patch_size=patch)
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(items, min(batch_size, len(items)), shuffle=True, drop_last=True, generator=order)
        reestimate_norms(expert, (batch["image"].to(device) for batch in loader))
        if own.test:
            after |= _measure(expert, own, work, device)
        expert.cpu()
    facts = {**read_facts(checkpoint), "norms": "batch-norm statistics re-estimated on the task's own images"}
    written = export_experts(network, output, chosen, after, facts, overwrite, formats, networks=experts)
    score = score_of(work.kind)
    columns = {f"{score} before": before, "after": after}
    return written, figures_table(columns, score, data.scored) if after else ""


def _measure(expert: nn.Module, data: DataList, work: Work, device: torch.device) -> Figures:
    loader = DataLoader(TaskDataset(data, "test", work.in_channels, list(work.image_size)), batch_size=1)
    inferer = ConfigParser(default_inferer(work.kind, work.image_size)).get_parsed_content()
    return evaluate_tasks(_OneTask(expert), loader, data, device, inferer)
