"""The metric of nested experts at every rank, against rank and parameters."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lorkd_monai.bundle.configs import default_inferer
from lorkd_monai.bundle.export import work_of_info
from lorkd_monai.checks import default_device
from lorkd_monai.data import DataList, TaskDataset, load_data_list
from lorkd_monai.engines.evaluation import evaluate_tasks
from lorkd_monai.engines.trained_tasks import as_trained
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.tasks import score_of

__all__ = ["plot_rank_curve", "rank_curve", "write_rank_curve"]

Curve = dict[str, list[dict[str, Any]]]


class _AtRank(nn.Module):
    """A decomposition whose experts are cut to lower ranks."""

    def __init__(self, network: LoRKDNet, ranks: Mapping[str, int]) -> None:
        super().__init__()
        self.network, self.ranks = network, dict(ranks)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.network(x, task, rank=self.ranks)


def rank_curve(
    network: LoRKDNet,
    data: DataList,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    device: torch.device | str = "cpu",
) -> Curve:
    """Score each task with its expert cut to each rank, from 1 to the rank of the expert.

    Args:
        network: a decomposition with nested experts.
        data: its data list.
        tasks: which tasks; None: all that have images in the split.
        split: which images: ``"training"``, ``"validation"`` or ``"test"``.
        device: where to run.

    Returns:
        ``{task: [{"rank", "parameters" (of the expert's factors), "value", "low", "high", "n"}, …]}``: balanced
        accuracy or Dice, with its bootstrap interval.

    Raises:
        LoRKDError: the experts are not nested, a task is unknown or has no images, or the data list has other tasks.
    """
    if not network.nested:
        raise LoRKDError(
            "this decomposition was not trained with nested experts, so they can't be cut: train with --nested True"
        )
    work = work_of_info(network.info)
    chosen = network.tasks if tasks is None else [network.tasks[network.task_index(t)] for t in tasks]
    own = as_trained(data, network.info, "the decomposition", chosen)
    items = [item for item in data.split(split) if item["task"] in chosen]
    lacking = [t for t in tasks or () if t not in {item["task"] for item in items}]
    if lacking or not items:
        raise LoRKDError(f"the data list {data.name!r} has no {split} images of {lacking or chosen}")
    own = dataclasses.replace(own, training=[], validation=[], test=items)
    dataset = TaskDataset(own, "test", work.in_channels, list(work.image_size))
    batch_size = 1 if data.kind == "segmentation" else 64
    inferer = ConfigParser(default_inferer(work.kind, work.image_size)).get_parsed_content()
    ranks, curve = network.spec()["rank"], dict[str, Any]()
    for rank in range(1, max(ranks[t] for t in chosen) + 1):
        due = [t for t in chosen if rank <= ranks[t]]
        part = Subset(dataset, [i for i, item in enumerate(items) if item["task"] in due])
        cut = _AtRank(network.eval(), dict.fromkeys(due, rank))
        figures = evaluate_tasks(cut, DataLoader(part, batch_size), own, device, inferer)
        for task in due:
            if task in figures:
                index = network.task_index(task)
                factors = [f for layer in network.expert_layers.values() for f in layer.factors(index, rank)]
                point = {"rank": rank, "parameters": sum(f.numel() for f in factors)}
                curve.setdefault(task, []).append({**point, **figures[task][score_of(work.kind)]})
    return {task: curve[task] for task in chosen if task in curve}


def plot_rank_curve(curve: Curve, score: str, path: str | os.PathLike) -> None:
    """Draw a curve as PNG: score against rank, and score against the parameters of the expert.

    Raises:
        LoRKDError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise LoRKDError("drawing needs matplotlib: pip install 'lorkd-monai[plot]'") from e
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for task, points in curve.items():
        values = [p["value"] for p in points]
        for axes, key in ((left, "rank"), (right, "parameters")):
            at = [p[key] for p in points]
            (line,) = axes.plot(at, values, marker="o", markersize=4, label=task)
            if all("low" in p for p in points):
                low, high = ([p[k] for p in points] for k in ("low", "high"))
                axes.fill_between(at, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    left.set(xlabel="rank of the expert", ylabel=score.replace("_", " "))
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="parameters of the expert's factors")
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def write_rank_curve(
    network: LoRKDNet,
    dataset_dir: str | os.PathLike,
    output: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    split: str = "test",
) -> str:
    """Measure a curve and write ``rank_curve.json`` and ``rank_curve.png``.

    Args:
        network, tasks, split: see :func:`rank_curve`.
        dataset_dir: data list of the decomposition.
        output: folder for the files; it is made if needed.

    Returns:
        The curve as a Markdown table.
    """
    work = work_of_info(network.info)
    data = load_data_list(dataset_dir, work.kind, work.spatial_dims, needs=(split,))
    score = score_of(work.kind)
    curve = rank_curve(network, data, tasks, split, default_device())
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "rank_curve.json") as temporary:
        temporary.write_text(json.dumps({"score": score, "split": split, "tasks": curve}, indent=2) + "\n")
    plot_rank_curve(curve, score, folder / "rank_curve.png")
    lines = [f"| task | rank | parameters | {score} | 95 % interval | images |", "|" + "---|" * 6]
    for task, points in curve.items():
        for p in points:
            interval = f"{p['low']:.3f}–{p['high']:.3f}" if "low" in p else ""
            lines.append(f"| {task} | {p['rank']} | {p['parameters']} | {p['value']:.3f} | {interval} | {p['n']} |")
    return "\n".join(lines)
