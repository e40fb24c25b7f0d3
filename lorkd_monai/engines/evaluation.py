"""Figures of a network on every task of a data set, and the table that shows them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorkd_monai.checkpoints.weights import load_weights, read_decomposition_spec
from lorkd_monai.data import DataList, TaskDataset
from lorkd_monai.data.identity import split_digests, task_identity
from lorkd_monai.data.loaders import test_loader
from lorkd_monai.engines.trained_tasks import as_trained, other_images
from lorkd_monai.engines.trainer import TaskEvaluator, show_volumes
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file
from lorkd_monai.metrics import case_scores, classification_figures, segmentation_figures
from lorkd_monai.metrics.bootstrap import Clusters
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.tasks import score_of
from lorkd_monai.teachers.find import find_teacher, knows_tasks
from lorkd_monai.transforms import default_intensity

_log = logging.getLogger(__name__)

__all__ = [
    "collect_predictions",
    "evaluate_tasks",
    "figure_text",
    "figures_of",
    "figures_of_predictions",
    "figures_table",
    "report_figures",
    "write_figures",
]

Figures = dict[str, dict[str, dict[str, float]]]
Predictions = dict[str, dict[str, Tensor]]


def evaluate_tasks(
    network: nn.Module,
    loader: DataLoader,
    data: DataList,
    device: torch.device | str = "cpu",
    inferer: Inferer | None = None,
    resamples: int = 1000,
) -> Figures:
    """Figures with bootstrap intervals for each task that has images in ``loader``.

    Classification: see `classification_figures`. Segmentation: Dice, normalised surface Dice (tolerance 1 mm, or one
    pixel in 2D) and 95 % Hausdorff distance, on the preprocessed images, see `segmentation_figures`.

    Args:
        network: takes (image, task). It is back on its device afterwards, and in its mode.
        loader: batches as `TaskDataset` gives them.
        data: the data list, for the tasks and their classes.
        device: where to run.
        inferer: such as sliding windows; None: one pass.
        resamples: bootstrap resamples.

    Returns:
        ``{task: {figure: {"value", "low", "high", "n"}}}``.

    Raises:
        LoRKDError: there are no images.
    """
    return figures_of_predictions(collect_predictions(network, loader, data, device, inferer), data, resamples)


def collect_predictions(
    network: nn.Module,
    loader: DataLoader,
    data: DataList,
    device: torch.device | str = "cpu",
    inferer: Inferer | None = None,
) -> Predictions:
    """What a network says of each image, for each task that has images in ``loader``, in their order.

    Args:
        network, loader, data, device, inferer: see `evaluate_tasks`.

    Returns:
        Classification: ``{task: {"probability": N × C, "label": N}}``. Segmentation: ``{task: {score: N × C - 1}}``,
        see `case_scores`.

    Raises:
        LoRKDError: there are no images.
    """
    if not len(loader):
        raise LoRKDError("there is nothing to evaluate: the split has no images")
    names = list(data.tasks)
    kept: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    before = next((tensor.device for tensor in network.parameters()), device)
    evaluator = TaskEvaluator(device, loader, network.to(device), inferer=inferer)
    evaluator.add_event_handler("ITERATION_COMPLETED", lambda engine: _keep(engine.state.output, data, names, kept))
    try:
        evaluator.run()
    finally:
        network.to(before)
    return {
        name: {key: torch.stack([case[key] for case in cases]) for key in cases[0]}
        for name, cases in kept.items()
        if cases
    }


def figures_of_predictions(
    predictions: Predictions,
    data: DataList,
    resamples: int = 1000,
    clusters: Mapping[str, Clusters] | None = None,
) -> Figures:
    """The figures of what `collect_predictions` gave; see `evaluate_tasks`.

    With ``clusters`` (task -> the patients of its images) the intervals resample patients.
    """
    figures = {}
    for name, kept in predictions.items():
        own = (clusters or {}).get(name)
        if data.kind == "classification":
            figures[name] = classification_figures(kept["probability"], kept["label"], resamples, clusters=own)
        else:
            classes = [text for index, text in sorted(data.tasks[name].labels.items()) if index]
            figures[name] = segmentation_figures(kept, classes, resamples, clusters=own)
    return figures


def _keep(output: Mapping[str, Tensor], data: DataList, names: Sequence[str], kept: dict[str, list]) -> None:
    for row, index in enumerate(output["task"].reshape(-1).tolist()):
        name = names[index]
        classes = data.tasks[name].num_classes
        logits, label = output["pred"][row, :classes].float(), output["label"][row]
        if data.kind == "classification":
            kept[name].append({"probability": logits.softmax(0).cpu(), "label": label.cpu()})
        else:
            spacing = output["spacing"][row].tolist() if "spacing" in output and data.spatial_dims == 3 else None
            kept[name].append(case_scores(logits.argmax(0).cpu(), label[0].cpu(), classes, spacing))


def write_figures(path: str | os.PathLike, figures: Mapping) -> Path:
    """Write figures as JSON, all at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return path


def figures_table(columns: Mapping[str, Figures], score: str, scored: Sequence[str] | None = None) -> str:
    """A Markdown table of one score: a row for each task and their mean, a column for each network.

    Tasks that are not in ``scored`` (None: all are) stand below the mean, which leaves them out.
    """
    found = list(dict.fromkeys(task for figures in columns.values() for task in figures))
    tasks = [task for task in found if scored is None or task in scored]
    lines = ["| task | n | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]

    def row(task: str, remark: str = "") -> str:
        count = next((f[task][score]["n"] for f in columns.values() if score in f.get(task, {})), 0)
        cells = [figure_text(figures.get(task, {}).get(score)) for figures in columns.values()]
        return f"| {task}{remark} | {count} | " + " | ".join(cells) + " |"

    lines += [row(task) for task in tasks]
    means = [[f[t][score]["value"] for t in tasks if score in f.get(t, {})] for f in columns.values()]
    lines.append("| mean of tasks | | " + " | ".join(f"{sum(m) / len(m):.3f}" if m else "" for m in means) + " |")
    lines += [row(task, " (no score: wiring only)") for task in found if task not in tasks]
    return "\n".join(lines)


def figure_text(entry: Mapping[str, float] | None) -> str:
    """A figure with its interval, where it has one, as tables show it."""
    if entry is None:
        return ""
    interval = f" ({entry['low']:.3f}–{entry['high']:.3f})" if "low" in entry else ""
    return f"{entry['value']:.3f}{interval}"


def figures_of(
    loader: DataLoader,
    data: DataList,
    device: torch.device | str,
    path: str | os.PathLike,
    inferer: Inferer | None = None,
) -> Any:
    """A function of a network that measures it on ``loader``, writes the figures to ``path`` and returns them.

    Without images there are no figures and no file: `load_data_list` told so before the run.
    """

    def measure(network: nn.Module) -> Figures:
        if not len(loader):
            _log.warning("%s has no test images: no figures are measured.", data.name)
            return {}
        figures = evaluate_tasks(network, loader, data, device, inferer)
        write_figures(path, figures)
        return figures

    return measure


def report_figures(
    network: LoRKDNet,
    weights: str | os.PathLike,
    loader: DataLoader,
    data: DataList,
    device: torch.device | str,
    path: str | os.PathLike,
    teacher_bundle: str | os.PathLike | None,
    inferer: Inferer | None = None,
    teacher_intensity: str | Mapping[str, Any] = "auto",
) -> Mapping[str, Figures]:
    """Measure the experts, and the teacher beside them where there is one; print a table and write it as JSON.

    Args:
        network: the decomposed network.
        weights: file of its weights.
        loader: the images to measure on.
        data: the data list.
        device: where to run.
        path: JSON file to write: ``{"experts": …, "teacher": …, "data": …}``, the last with what they were measured on.
        teacher_bundle: folder of the teacher; left out where it does not exist or does not know all tasks measured.
        inferer: such as sliding windows.
        teacher_intensity: what the teacher wants of the images, see `find_teacher`.

    Raises:
        LoRKDError: there are no test images, no weights yet, or they belong to another decomposition or were trained
            on tasks that the list describes in another way, see `as_trained`.
    """
    if not len(loader):
        raise LoRKDError(
            f"the data list {data.name!r} has no test images with labels to measure on: give it some in 'test', or "
            "name a list that has them with --dataset_dir"
        )
    if not Path(weights).exists():
        run_id = "adding" if Path(weights).parent.name == "adding" else "training"
        raise LoRKDError(f"no trained weights at {weights}: run `{run_id}` with the same --output_dir first")
    state = load_weights(weights)
    network.load_state_dict(state)
    info = read_decomposition_spec(state, str(weights)).get("info") or {}
    trained = as_trained(data, info, str(weights))
    loader = _prepared_as(trained, data, loader)
    figures: dict[str, Any] = {"experts": evaluate_tasks(network.eval(), loader, trained, device, inferer)}
    if teacher_bundle is not None and Path(teacher_bundle).is_dir():
        teacher = find_teacher(teacher_bundle, trained, intensity=teacher_intensity, split="test", from_files=True)
        if teacher is not None and knows_tasks(teacher, trained, "test"):
            if teacher.intensity is not None and teacher.intensity.from_files:
                show_volumes(loader, teacher.intensity)
            figures["teacher"] = evaluate_tasks(teacher, loader, trained, device, inferer)
    images: Any = loader.dataset
    digests = split_digests(data)
    tasks = {name: task_identity(task, data.spatial_dims) for name, task in trained.tasks.items()}
    write_figures(path, {**figures, "data": {"name": data.name, "tasks": tasks, "images": digests}})
    if other_images(digests, info, "test"):
        print("These are other test images, or other labels, than those of the list of the training.\n")
    score = score_of(data.kind)
    print(f"{score} on {len(images)} images, with 95 % bootstrap intervals\n")
    print(figures_table(figures, score, data.scored))
    print(f"\nAll figures: {path}")
    return figures


def _prepared_as(trained: DataList, data: DataList, loader: DataLoader) -> DataLoader:
    """The loader of images that are prepared as a decomposition learned them, where the list says otherwise."""

    def preparation(tasks: DataList) -> dict[str, Any]:
        return {
            name: (default_intensity(task, data.spatial_dims), task.spacing and tuple(task.spacing))
            for name, task in tasks.tasks.items()
        }

    if preparation(trained) == preparation(data):
        return loader
    images: Any = loader.dataset
    return test_loader(TaskDataset(trained, "test", images.in_channels, images.image_size), loader.batch_size)  # type: ignore[arg-type]
