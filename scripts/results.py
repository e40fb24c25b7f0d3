"""Results of studies that are kept with the project, and the tables and pictures made from them.

    python scripts/results.py collect STUDY_FOLDER NAME    takes a study's finished runs into docs/results/NAME
    python scripts/results.py write                        writes the tables and pictures of docs/ and README.md
    python scripts/results.py check                        ends with exit code 1 where a table is not up to date

A folder docs/results/NAME holds ``plan.json``, which is written before the test images are looked at (see
docs/study_protocol.md), and the runs in the form that `lorkd study` writes, without weights. ``plan.json`` has

    title       of the study
    experts     name of the method that the conclusions are about
    rivals      names of the methods that it is compared with; intervals are corrected for their number
    labels      method -> what tables call it; other methods of the folder are left out
    medmnist    optional: task -> its column in docs/results/medmnist_v2.csv

A page asks for a table with ``<!-- results: NAME KIND SETTING -->``; what stands between that line and
``<!-- end of results -->`` is replaced. The kinds are the functions of ``TABLES``.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.metrics.bootstrap import figures
from lorkd_monai.metrics.classification import area_under_roc
from lorkd_monai.study.files import RunFile, read_runs
from lorkd_monai.study.statistics import Difference, Summary, compare, summarise
from lorkd_monai.study.tables import difference_table, main_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
RESAMPLES = 4000  # ten in each tail of the corrected intervals of ten comparisons
_MARK = re.compile(r"(<!-- results: ([\w-]+) (\w+)(?: (\w+))? -->\n).*?(<!-- end of results -->)", re.DOTALL)


# --- taking a study in


def collect(study: Path, name: str) -> int:
    """Copy the finished runs of a study that the plan names, without weights, in as few bytes as keep every answer.

    Returns:
        How many runs there are now.

    Raises:
        LoRKDError: there is no plan.
    """
    folder, plan = RESULTS / name, _plan(name)
    runs = [run for run in read_runs(study) if run.method in plan["labels"]]
    for run in runs:
        content = run.read()
        content["command"] = _without_folders(content["command"])
        RunFile(folder, run.setting, run.method, run.seed).write(content, _small(run.read_arrays()))
    return len(runs)


def _without_folders(command: str) -> str:
    """The command line with the last part of each path: where the folders are says nothing to others."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in shlex.split(command))


def _small(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Half precision and small whole numbers; the class with the highest probability stays the same for each image."""
    kept = {}
    for key, value in arrays.items():
        if key.endswith("_label"):
            kept[key] = value.astype(np.int16)
        elif key.endswith("_probability"):
            half = value.astype(np.float16)
            wrong = half.argmax(1) != value.argmax(1)
            half[wrong, value[wrong].argmax(1)] = np.nextafter(half[wrong].max(1), np.float16(2))
            kept[key] = half
        elif key.endswith(("_dice", "_nsd")):
            kept[key] = value.astype(np.float32)
    return kept


# --- tables


@cache
def _plan(name: str) -> dict[str, Any]:
    plan = read_json(RESULTS / name / "plan.json")
    missing = [key for key in ("title", "experts", "rivals", "labels") if key not in plan]
    if missing:
        raise LoRKDError(f"{RESULTS / name / 'plan.json'} lacks {missing[0]!r}")
    return plan


@cache
def _rows(name: str) -> list[Summary]:
    """The methods of the plan in its order, by their labels."""
    labels = list(_plan(name)["labels"])
    rows = [row for row in summarise(RESULTS / name, RESAMPLES) if row.method in labels]
    return sorted(rows, key=lambda row: labels.index(row.method))


@cache
def _differences(name: str) -> list[Difference]:
    plan = _plan(name)
    pairs = [(plan["experts"], rival) for rival in plan["rivals"]]
    return compare(RESULTS / name, pairs, RESAMPLES, comparisons=len(pairs))


def _named(name: str, row: Summary) -> Summary:
    return dataclasses.replace(row, method=_plan(name)["labels"][row.method])


def summary(name: str, setting: str) -> str:
    """Mean of the tasks, its interval, and what a method costs."""
    rows = [dataclasses.replace(_named(name, row), tasks={}) for row in _rows(name) if row.setting == setting]
    return main_table(rows)


def tasks(name: str, setting: str) -> str:
    """Each task's score: the mean over seeds."""
    rows = [row for row in _rows(name) if row.setting == setting]
    names = list(rows[0].tasks)
    lines = ["| method | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        values = [(row.tasks[task][0], max(other.tasks[task][0] for other in rows)) for task in names]
        best = [f"**{value:.3f}**" if value == highest else f"{value:.3f}" for value, highest in values]
        lines.append(f"| {_plan(name)['labels'][row.method]} | " + " | ".join(best) + " |")
    return "\n".join(lines)


def differences(name: str, setting: str) -> str:
    """The experts against each rival, with intervals that are corrected for the number of rivals."""
    labels = _plan(name)["labels"]
    rows = [
        dataclasses.replace(row, first=labels[row.first], second=labels[row.second])
        for row in _differences(name)
        if row.setting == setting
    ]
    return difference_table(rows)


def medmnist(name: str, setting: str) -> str:
    """Beside MedMNIST's published table: AUC/ACC as MedMNIST defines them, ours with 95 % intervals of both."""
    plan = _plan(name)
    columns = plan["medmnist"]
    lines = ["| network | parameters | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 2)]
    with open(RESULTS / "medmnist_v2.csv", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            cells = [row[column] for column in columns.values()]
            if all(cells):
                lines.append(f"| {row['method']} | {row['parameters']} | " + " | ".join(cells) + " |")
    for row in _rows(name):
        if row.setting == setting:
            cells = [_ours(name, row, task) for task in columns]
            size = np.mean([one["parameters"] for one in row.runs[0]["cost"]["plain"].values()]) / 1e6
            lines.append(
                f"| {plan['labels'][row.method]} ({len(row.seeds)} seeds) | {size:.2f}M | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


def _ours(name: str, row: Summary, task: str) -> str:
    number = list(row.runs[0]["data"]["tasks"]).index(task)
    own = "full" if row.runs[0]["family"] == "teacher" else row.setting
    runs = [RunFile(RESULTS / name, own, row.method, seed).read_arrays() for seed in row.seeds]
    label = torch.as_tensor(runs[0][f"{number}_label"]).long()
    answers = [torch.as_tensor(run[f"{number}_probability"]).double() for run in runs]

    def mean(measure: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weights: torch.stack([measure(one, label, weights) for one in answers]).mean(0)

    found = figures({"auc": mean(_auc), "acc": mean(_acc)}, len(label), 2000, seed=number)
    (auc, auc_range), (acc, acc_range) = (
        (f"{one['value']:.3f}".lstrip("0"), f"{one['low']:.3f}–{one['high']:.3f}".replace("0.", "."))
        for one in (found["auc"], found["acc"])
    )
    return f"{auc}/{acc} ({auc_range} / {acc_range})"


def _auc(probability: torch.Tensor, label: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """MedMNIST: of the second class where there are two, else the mean over classes of one against the rest."""
    classes = [1] if probability.shape[1] == 2 else range(probability.shape[1])
    return torch.stack([area_under_roc(probability[:, c], label == c, weights) for c in classes]).mean(0)


def _acc(probability: torch.Tensor, label: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    right = (probability.argmax(1) == label).double()
    return weights @ right / weights.sum(1)


TABLES: dict[str, Callable[[str, str], str]] = {
    "summary": summary, "tasks": tasks, "differences": differences, "medmnist": medmnist,
}  # fmt: skip


# --- pictures


def pictures(name: str) -> dict[Path, bytes]:
    """Differences from the rivals, and the score against the parameters of all tasks together, of each setting."""
    from lorkd_monai.report.content import Point
    from lorkd_monai.report.figures import dots, scatter

    plan, found = _plan(name), {}
    for setting in dict.fromkeys(row.setting for row in _rows(name)):
        points = [
            Point("against " + plan["labels"][d.second], d.value, d.low, d.high, "difference")
            for d in _differences(name)
            if d.setting == setting
        ]
        score = _rows(name)[0].runs[0]["score"].replace("_", " ")
        if points:
            found[RESULTS / name / f"rivals_{setting}.png"] = dots(points, f"{score}, difference", zero=True)
        rows = [row for row in _rows(name) if row.setting == setting]
        sizes = [
            (plan["labels"][row.method], row.runs[0]["family"], row.runs[0]["cost"]["parameters"], row.mean)
            for row in rows
        ]
        found[RESULTS / name / f"parameters_{setting}.png"] = scatter(sizes, f"mean {score}")
    return found


# --- pages


def pages() -> list[Path]:
    """The pages that may ask for tables."""
    return [ROOT / "README.md", ROOT / "docs" / "results.md", *sorted(RESULTS.glob("*.md"))]


def filled(page: str) -> str:
    """A page with its tables.

    Raises:
        LoRKDError: it asks for a table that is not known.
    """

    def table(match: re.Match[str]) -> str:
        start, name, kind, setting, end = match.groups()
        if kind not in TABLES:
            raise LoRKDError(f"there is no table {kind!r}; there are {', '.join(TABLES)}")
        return f"{start}\n{TABLES[kind](name, setting or 'full')}\n\n{end}"

    return _MARK.sub(table, page)


def main(words: Sequence[str]) -> None:
    """Do what the command line says."""
    if len(words) == 3 and words[0] == "collect":
        print(f"{collect(Path(words[1]), words[2])} runs in {RESULTS / words[2]}")
    elif list(words) == ["write"]:
        for page in pages():
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        for plan in sorted(RESULTS.glob("*/plan.json")):
            if read_runs(plan.parent):
                for path, picture in pictures(plan.parent.name).items():
                    path.write_bytes(picture)
    elif list(words) == ["check"]:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            if filled(text) != text:
                sys.exit(f"{page} is not up to date; run python scripts/results.py write")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LoRKDError as error:
        sys.exit(f"error: {error}")
