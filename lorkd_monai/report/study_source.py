"""A study's folder as the content of a report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.report.content import Content, Curve, Matrix, Point, Segmentation, Table
from lorkd_monai.report.transfer_source import add_transfer, held_out_folders, point_of
from lorkd_monai.study.files import RunFile, read_runs
from lorkd_monai.study.statistics import Difference, Summary, compare, summarise
from lorkd_monai.study.tables import difference_pairs, score_cells

__all__ = ["confusion_matrix", "content_of_study", "is_study", "spectrum_content"]

_INTRO = (
    "A foundation model (the teacher) knows several tasks. A decomposition makes one small network for each of them: "
    "shared weights, and for each task an expert of few further weights, trained with the labels and with the "
    "teacher. Is that better than the teacher, than one small network for all tasks (mtl), and than one trained for "
    "each task alone (stl)? All networks but the teacher have one size and one budget, where a method's description "
    "names no other; kd says that the teacher took part in their training too. Everything below is measured on test "
    "images, which chose nothing."
)
_RANKS = ("best", "median", "worst")


def content_of_study(folder: str | os.PathLike, resamples: int = 2000) -> Content:
    """Read the finished runs of a study.

    Raises:
        LoRKDError: there are none, or a file can't be read.
    """
    if not read_runs(folder) and held_out_folders(folder):
        content = Content("Does decomposition pay on unseen tasks?")
        add_transfer(content, folder, resamples)
        return content
    rows = summarise(folder, resamples)
    first = rows[0].runs[0]
    score = first["score"].replace("_", " ")
    content = Content(f"Does decomposition pay? {first['data']['name']}", score=score, unit=rows[0].unit)
    best = _best_lorkd(rows)
    differences = compare(folder, difference_pairs(rows), resamples)
    content.intro = _INTRO
    content.summary = _findings(rows, differences, best, score)
    content.facts = _facts(rows, best)
    content.tasks = _tasks(rows)
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        content.comparison[setting] = [point_of(row, row.method) for row in own]
        content.by_task[setting] = {task: _task_points(own, task) for task in own[0].tasks}
        content.comparison_tables[setting] = _table(own)
        content.against_size[setting] = [
            (row.method, row.runs[0]["family"], float(row.runs[0]["cost"]["parameters"]), row.mean) for row in own
        ]
    for (setting, _), row in best.items():
        content.differences.setdefault(setting, []).extend(
            Point(f"{d.first} − {d.second}{_seeds_of(d, row)}", d.value, d.low, d.high, "difference")
            for d in _beside(rows, row, differences)
        )
    shown = next(iter(best.values()), None)  # summaries begin with the setting "full"
    _curves(content, rows, shown)
    _conflicts(content, rows, shown)
    if shown is not None and "spectra" in shown.runs[0]:
        content.changes, content.spectra = spectrum_content(shown.runs[0]["spectra"])
    _pictures(content, folder, rows, shown)
    add_transfer(content, folder, resamples)
    content.costs = _costs(rows)
    content.provenance = _provenance(rows)
    return content


def _budget(row: Summary) -> str:
    """What a method may spend, and how its epoch is chosen: only methods of one budget are compared."""
    settings = row.runs[0]["settings"]
    draws = settings["images_per_epoch"]
    chosen = "the last taken" if settings["selection"] == "last" else "the best by the validation images taken"
    return f"{settings['epochs']} epochs{'' if draws is None else f' of {draws} images'}, {chosen}"


def _best_lorkd(rows: Sequence[Summary]) -> dict[tuple[str, str], Summary]:
    """The decomposition with the best validation score, by setting and budget; the budget of most methods first.

    No test metric chooses, and only those with the most seeds take part: one seed is not compared with the mean of
    several.
    """
    groups: dict[tuple[str, str], list[Summary]] = {}
    for row in rows:
        if row.runs[0]["family"] != "teacher":
            groups.setdefault((row.setting, _budget(row)), []).append(row)
    settings = list(dict.fromkeys(row.setting for row in rows))
    best = {}
    for key in sorted(groups, key=lambda key: (settings.index(key[0]), -len(groups[key]))):
        experts = [row for row in groups[key] if row.runs[0]["family"] == "lorkd"]
        if experts:
            best[key] = max(experts, key=lambda row: (len(row.seeds), _validation(row)))
    return best


def _validation(row: Summary) -> float:
    values = [fit["validation"] for run in row.runs for fit in run["fits"].values() if fit["validation"] is not None]
    return float(np.mean(values)) if values else float("-inf")


def _beside(rows: Sequence[Summary], row: Summary, differences: Sequence[Difference]) -> list[Difference]:
    """The differences between a decomposition and other methods of its budget, and the teachers, who have their own."""
    peers = {
        other.method
        for other in rows
        if other.setting == row.setting
        and (other.runs[0]["family"] == "teacher" or (other is not row and _budget(other) == _budget(row)))
    }
    return [d for d in differences if (d.setting, d.first) == (row.setting, row.method) and d.second in peers]


def _seeds_of(d: Difference, row: Summary) -> str:
    """A remark where a difference is based on fewer seeds than the decomposition has."""
    return "" if len(d.seeds) == len(row.seeds) else f", {len(d.seeds)} of {len(row.seeds)} seeds"


def _findings(
    rows: Sequence[Summary],
    differences: Sequence[Difference],
    best: Mapping[tuple[str, str], Summary],
    score: str,
) -> list[tuple[str, list[str]]]:
    lines = []
    for (setting, budget), row in best.items():
        found = []
        for d in _beside(rows, row, differences):
            word = "above" if d.low > 0 else "below" if d.high < 0 else "no significant difference from"
            found.append(f"{word} {d.second}: {d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f}){_seeds_of(d, row)}")
        seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
        lines.append(
            (
                f"Setting {setting}, {budget}, {seeds}: of the decompositions with most seeds {row.method} has the "
                f"best validation score. On the test images it has a mean {score} over tasks of {row.mean:.3f} (95 % "
                f"interval {row.low:.3f} to {row.high:.3f}).",
                found,
            )
        )
    return lines


def _name_of(config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k} {v}" for k, v in config.items() if k != "_target_")
    return f"{config.get('_target_', '?')} ({options})"


def _facts(rows: Sequence[Summary], best: Mapping[tuple[str, str], Summary]) -> list[tuple[str, str]]:
    run = (next(iter(best.values()), rows[0])).runs[0]
    settings = run["settings"]
    common = ("image_size", "epochs", "images_per_epoch", "batch_size", "learning_rate", "ema", "selection")
    bundle = settings.get("teacher_bundle")
    facts = [
        ("Foundation model", f"the bundle {Path(bundle).name}" if bundle else _name_of(settings["teacher_backbone"])),
        ("Student", _name_of(settings["backbone"])),
        ("Budget and selection", ", ".join(f"{k.replace('_', ' ')} {settings[k]}" for k in common)),
    ]
    if not bundle:
        own = f"{settings['teacher_members']} network(s), {settings['teacher_epochs']} epochs"
        facts.append(("Foundation model's budget", own))
    for setting, told in {row.setting: row.runs[0].get("imbalance") for row in rows}.items():
        if told:
            few = f"{', '.join(told['small_tasks'])} keep {told['kept_images']} training images each, or all they have"
            facts.append((f"Setting {setting}", few))
    if "ranks" in run:
        ranks = ", ".join(f"{task} {rank}" for task, rank in run["ranks"].items())
        said = f"{run['method']}: ranks {ranks}; layout {settings['layout']}, norms {settings['norm']}"
        facts.append(("Experts", said))
    return facts


def _tasks(rows: Sequence[Summary]) -> Table:
    data = rows[0].runs[0]["data"]
    labelled = {row.setting: row.runs[0]["labelled_images"] for row in rows if row.runs[0]["family"] != "teacher"}
    lines = []
    for name, task in data["tasks"].items():
        images = data["images"][name]
        counts = [images["training"], *(own[name] for own in labelled.values()), images["validation"], images["test"]]
        title = name if task["scored"] else f"{name} (no score)"
        lines.append([title, ", ".join(task["labels"].values()), task["modality"] or "", *map(str, counts)])
    with_labels = [f"with labels, {setting}" for setting in labelled]
    return Table(["task", "classes", "modality", "training images", *with_labels, "validation", "test"], lines)


def _task_points(rows: Sequence[Summary], task: str) -> list[Point]:
    points = []
    for row in rows:
        if task in row.tasks:
            found = [run["figures"][task][run["score"]]["value"] for run in row.runs]
            seeds = tuple(found) if len(found) > 1 else ()
            value, interval = row.tasks[task][0], row.task_intervals[task]
            points.append(Point(row.method, value, *interval, row.runs[0]["family"], seeds))
    return points


def _table(rows: Sequence[Summary]) -> Table:
    header, lines = score_cells(rows)
    for row, line in zip(rows, lines, strict=True):
        line.insert(1, row.runs[0]["about"])
    note = "Mean over the scored tasks on the test images; ± is the sample standard deviation over seeds."
    return Table([header[0], "what it is", *header[1:]], lines, note)


def _curves(content: Content, rows: Sequence[Summary], shown: Summary | None) -> None:
    """Validation scores of each task over the epochs, averaged over seeds, and the loss terms of one decomposition."""
    setting = rows[0].setting if shown is None else shown.setting
    names = ["stl", "mtl", "stl_kd", "mtl_kd", "stl_kd_init", "mtl_kd_init", *([shown.method] if shown else [])]
    for row in rows:
        if row.setting != setting or row.method not in names:
            continue
        for task in row.tasks:
            found = [
                {r["epoch"]: r[task] for r in curves["validation"] if r.get(task) is not None}
                for run in row.runs
                for part, curves in run["curves"].items()
                if part in ("all tasks", task)
            ]
            epochs = sorted(set.intersection(*map(set, found))) if found else []
            if epochs:
                values = [float(np.mean([one[e] for one in found])) for e in epochs]
                content.validation.setdefault(task, []).append(Curve(row.method, epochs, values))
    if shown is not None:
        rows_of = shown.runs[0]["curves"].get("all tasks", {}).get("training", [])
        terms = list(dict.fromkeys(key for r in rows_of for key in r if key != "epoch"))
        for title, keys in (
            ("terms", [t for t in terms if not t.startswith("task/")]),
            ("task loss of each task", [t for t in terms if t.startswith("task/")]),
        ):
            lines = [
                Curve(
                    k.removeprefix("task/"), [r["epoch"] for r in rows_of if k in r], [r[k] for r in rows_of if k in r]
                )
                for k in keys
            ]
            if lines:
                content.losses[f"{shown.method}, {shown.setting}: {title}"] = lines


def _conflicts(content: Content, rows: Sequence[Summary], shown: Summary | None) -> None:
    names = ["mtl", "mtl_kd", *([shown.method] if shown else [])]
    setting = rows[0].setting if shown is None else shown.setting
    for name in names:
        row = next((r for r in rows if (r.setting, r.method) == (setting, name)), None)
        found = [run["gradient_conflict"] for run in row.runs if "gradient_conflict" in run] if row else []
        if not found:
            continue
        cosines = np.mean([one["cosines"] for one in found], axis=0)
        tasks = found[0]["tasks"]
        content.conflicts.append(Matrix(name, tasks, tasks, cosines, -1.0, 1.0, diverging=True))
        layers = list(found[0]["by_layer"])
        means = [float(np.mean([one["by_layer"][layer] for one in found])) for layer in layers]
        content.conflict_layers.append(Curve(name, list(range(1, len(layers) + 1)), means, "layer, from the input"))


def spectrum_content(spectra: Mapping[str, Any]) -> tuple[list[Matrix], dict[str, list[Curve]]]:
    """How large each expert's ΔW is in each layer, how many directions hold it, and its singular values."""
    tasks = list(spectra)
    layers = list(spectra[tasks[0]])
    size = np.array([[spectra[t][layer]["relative_size"] for t in tasks] for layer in layers])
    directions = np.array([[_directions(spectra[t][layer]["values"]) for t in tasks] for layer in layers], dtype=float)
    matrices = [
        Matrix("size of ΔW beside W0", layers, tasks, size, 0.0, float(size.max()) or 1.0),
        Matrix("directions that hold 90 % of ΔW", layers, tasks, directions, 0.0, float(directions.max()) or 1.0),
    ]
    curves = {}
    for task in tasks:
        lines = []
        for place in np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int)):
            values = [v for v in spectra[task][layers[place]]["values"] if v > 0]
            if values:
                lines.append(Curve(layers[place], list(range(1, len(values) + 1)), values, "number"))
        if lines:
            curves[task] = lines
    return matrices, curves


def _directions(values: Sequence[float]) -> int:
    """The fewest singular values that hold 90 % of the sum of their squares."""
    energy = np.cumsum(np.square(values))
    return 0 if not len(energy) or energy[-1] == 0 else int(np.searchsorted(energy / energy[-1], 0.9) + 1)


def confusion_matrix(probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Numbers of images: C × C, rows are what they are, columns what they were called."""
    classes = probability.shape[1]
    called = probability.argmax(1)
    return np.bincount(label.astype(int) * classes + called, minlength=classes * classes).reshape(classes, classes)


def _pictures(content: Content, folder: str | os.PathLike, rows: Sequence[Summary], shown: Summary | None) -> None:
    """Confusion matrices or segmentations of the decomposition and the foundation model, of the first seed."""
    pairs = [(shown.setting, shown)] if shown else []
    teacher = next((row for row in rows if row.runs[0]["family"] == "teacher"), None)
    pairs += [("full", teacher)] if teacher else []
    for setting, row in pairs:
        run = RunFile(folder, setting, row.method, row.seeds[0])
        arrays = run.read_arrays()
        for number, (name, task) in enumerate(row.runs[0]["data"]["tasks"].items()):
            labels = list(task["labels"].values())
            if f"{number}_probability" in arrays:
                counts = confusion_matrix(arrays[f"{number}_probability"], arrays[f"{number}_label"])
                share = counts / counts.sum(1, keepdims=True).clip(1)
                content.confusions.append(Matrix(f"{name}: {row.method}", labels, labels, share, 0, 1, counts=counts))
            for rank in _RANKS:
                key = f"{number}_{rank}_"
                if f"{key}image" in arrays:
                    title = f"{row.method}, {rank}: Dice {float(arrays[f'{key}dice']):.2f}"
                    content.segmentations.setdefault(name, []).append(
                        Segmentation(title, arrays[f"{key}image"], arrays[f"{key}label"], arrays[f"{key}prediction"])
                    )


def _costs(rows: Sequence[Summary]) -> Table:
    header = ["setting", "method", "parameters that serve one task", "parameters of all tasks", "million multiply-adds",
              "one image, ms", "training, s", "training, CPU s", "peak memory, MB"]  # fmt: skip
    lines = []
    for row in rows:
        plain = list(row.runs[0]["cost"]["plain"].values())
        memory = [run["memory"]["gpu"] or run["memory"]["process"] for run in row.runs]
        lines.append(
            [
                row.setting,
                row.method,
                f"{np.mean([p['parameters'] for p in plain]):,.0f}",
                f"{row.runs[0]['cost']['parameters']:,}",
                f"{np.mean([p['multiply_adds'] for p in plain]) / 1e6:.1f}",
                f"{1000 * np.median([p['latency_s'] for r in row.runs for p in r['cost']['plain'].values()]):.1f}",
                f"{np.mean([run['time']['training_s'] for run in row.runs]):.0f}",
                f"{np.mean([run['time']['training_cpu_s'] for run in row.runs]):.0f}",
                "" if None in memory else f"{np.mean(memory) / 1e6:.0f}",
            ]
        )
    note = (
        "Other work on the machine may have affected the times. A distilled run's time includes the teacher's passes "
        "only where no earlier run had made them. Memory is that of the process, images included."
    )
    return Table(header, lines, note)


def _provenance(rows: Sequence[Summary]) -> list[tuple[str, str]]:
    runs = [run for row in rows for run in row.runs]
    unique = {
        "command": dict.fromkeys(run["command"] for run in runs),
        "versions": dict.fromkeys(", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs),
        "hardware": dict.fromkeys(json.dumps(run["hardware"], ensure_ascii=False) for run in runs),
    }
    facts = [(key, value) for key, values in unique.items() for value in values]
    count = len({(run["setting"], run["method"], run["seed"]) for run in runs})
    return [*facts, ("runs", f"{count}, the last finished {max(run['finished'] for run in runs)}")]


def is_study(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of a study."""
    return (Path(folder) / "study.json").is_file() or bool(held_out_folders(folder))
