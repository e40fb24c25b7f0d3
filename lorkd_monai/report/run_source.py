"""The output folder of a training bundle as the content of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.engines.evaluation import figure_text
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.describe import describe_tasks
from lorkd_monai.files import read_json
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.report.content import Content, Curve, Point, Table
from lorkd_monai.report.study_source import spectrum_content
from lorkd_monai.study.diagnostics import spectra
from lorkd_monai.study.measures import cost_of
from lorkd_monai.tasks import image_sides

__all__ = ["content_of_run"]

_COMPARED = {"experts": "lorkd", "teacher": "teacher"}
_SCORES = ("balanced_accuracy", "dice")


def content_of_run(folder: str | os.PathLike) -> Content:
    """Read what `training` and `evaluating` left in their output folder.

    Raises:
        LoRKDError: there is no trained decomposition in it, or a file can't be read.
    """
    folder = Path(folder)
    weights = folder / "training" / "model.pt"
    if not weights.is_file():
        raise LoRKDError(
            f"nothing to report in {folder}: expected the folder of `lorkd study` (study.json), or the output folder "
            "of a `training` run (training/model.pt)"
        )
    content = Content(f"Decomposition in {folder.resolve().name}")
    network = load_decomposition(weights).eval()
    described = describe_tasks(network)
    content.facts = [
        ("Kind", f"{described['kind']}, {described['spatial_dims']}D"),
        ("Backbone", described["backbone"]),
        ("Experts", f"layout {described['layout']}, norms {described['norm']}, alpha {described['alpha']:g}"),
        ("Shared parameters", f"{described['shared_parameters']:,}"),
    ]
    header = ["task", "classes", "modality", "rank", "parameters of the expert", "parameters once fused"]
    content.tasks = Table(
        header,
        [
            [
                name,
                ", ".join(task["classes"]) or str(task["num_classes"]),
                task["modality"] or "",
                str(task["rank"]),
                f"{task['expert_parameters']:,}",
                f"{task['fused_parameters']:,}",
            ]
            for name, task in described["tasks"].items()
        ],
    )
    _figures(content, folder)
    for part, title in (("training", "decomposition"), ("pretraining", "teacher")):
        _events(content, folder / part, title, network.tasks)
    if network.expert_layers:
        content.changes, content.spectra = spectrum_content(spectra(network))
    content.costs = _costs(network)
    content.missing.append(
        "Gradients of the tasks, confusion matrices and example segmentations are in the report of `lorkd study`."
    )
    return content


def _figures(content: Content, folder: Path) -> None:
    """The metrics on the test images: of experts and teacher after `evaluating`, of the experts alone before."""
    both, alone = folder / "figures.json", folder / "training" / "figures.json"
    if both.is_file():
        columns = read_json(both)
    elif alone.is_file():
        columns = {"experts": read_json(alone)}
        content.missing.append("The teacher's metrics are missing: run `evaluating` with the same --output_dir.")
    else:
        content.missing.append("There are no metrics on test images: run `evaluating` with the same --output_dir.")
        return
    columns = {name: column for name, column in columns.items() if name in _COMPARED}
    found = [key for column in columns.values() for task in column.values() for key in task]
    score = next((key for key in _SCORES if key in found), None)
    if score is None:
        return
    content.score = score.replace("_", " ")
    tasks = list(dict.fromkeys(task for column in columns.values() for task in column if score in column[task]))
    content.by_task[""] = {
        task: [_point(name, column[task][score]) for name, column in columns.items() if score in column.get(task, {})]
        for task in tasks
    }
    means = {
        name: [column[task][score]["value"] for task in tasks if score in column.get(task, {})]
        for name, column in columns.items()
    }
    content.comparison[""] = [
        Point(name, sum(values) / len(values), None, None, _COMPARED[name]) for name, values in means.items() if values
    ]
    others = [key for key in dict.fromkeys(found) if " " not in key and key != "majority_rate"]
    rows = []
    for task in tasks:
        for name, column in columns.items():
            cells = [figure_text(column.get(task, {}).get(key)) for key in others]
            rows.append([task, name, *cells])
    content.comparison_tables[""] = Table(
        ["task", "network", *(key.replace("_", " ") for key in others)], rows, "With 95 % bootstrap intervals."
    )


def _point(name: str, figure: Mapping[str, float]) -> Point:
    return Point(name, figure["value"], figure.get("low"), figure.get("high"), _COMPARED[name])


def _events(content: Content, folder: Path, title: str, tasks: list[str]) -> None:
    """Curves from the TensorBoard files of a run."""
    if not any(folder.glob("events.out.tfevents.*")):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    lines: dict[str, Curve] = {}
    for tag in reader.Tags()["scalars"]:
        values = {event.step: event.value for event in reader.Scalars(tag)}  # a resumed run wrote some steps twice
        lines[tag] = Curve(tag, list(values), list(values.values()))
    for task in tasks:
        if task in lines:
            curve = lines.pop(task)
            content.validation.setdefault(task, []).append(Curve(title, curve.epochs, curve.values))
    groups: dict[str, list[Curve]] = {}
    for tag, curve in lines.items():
        part = "task loss of each task" if tag.startswith("task/") else "terms"
        name = tag.removeprefix("task/")
        if tag in ("total", "task", "transfer", "feature_transfer") or tag.startswith("task/"):
            groups.setdefault(part, []).append(Curve(name, curve.epochs, curve.values, across="iteration"))
    for part, curves in groups.items():
        content.losses[f"{title}: {part}"] = curves


def _costs(network: LoRKDNet) -> Table | None:
    info: dict[str, Any] = network.info
    if not {"image_size", "in_channels", "spatial_dims"} <= info.keys():
        return None
    shape = image_sides(info["image_size"], info["spatial_dims"])
    cost = cost_of(network, network.tasks, (info["in_channels"], *shape))
    header = ["task", "parameters", "million multiply-adds", "one image, ms"]
    rows = [
        [name, f"{one['parameters']:,}", f"{one['multiply_adds'] / 1e6:.1f}", f"{1000 * one['latency_s']:.1f}"]
        for name, one in cost["plain"].items()
    ]
    note = (
        f"Of the plain network of each task; all tasks together in training: {cost['parameters']:,} parameters. The "
        "time is the median of 20 passes on this machine's CPU, taken now."
    )
    return Table(header, rows, note)
