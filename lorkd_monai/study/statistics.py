"""The results of a study: means over tasks and seeds, and paired bootstrap intervals between methods.

All numbers come from the files of finished runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics.bootstrap import CHUNK, Clusters, weight_chunks
from lorkd_monai.metrics.classification import balanced_accuracy
from lorkd_monai.study.files import RunFile, read_runs
from lorkd_monai.study.methods import teacher_setting_of
from lorkd_monai.study.patients import clusters_of

__all__ = ["Difference", "Summary", "compare", "other_means", "scores_under", "summarise"]


@dataclass(frozen=True)
class Summary:
    """One method in one setting over its seeds.

    ``mean`` and ``sd`` are of the mean over the scored tasks (sd: sample standard deviation over seeds, None for one
    seed); ``tasks`` holds ``(mean, sd)`` of each task, ``low`` and ``high`` the bootstrap interval of ``mean``,
    ``task_intervals`` that of each task's mean.
    """

    setting: str
    method: str
    seeds: tuple[int, ...]
    mean: float
    sd: float | None
    low: float
    high: float
    tasks: dict[str, tuple[float, float | None]]
    task_intervals: dict[str, tuple[float, float]]
    runs: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)

    @property
    def unit(self) -> str:
        """What the bootstrap draws: ``"patients"`` where the runs know whose the test images are, else ``"images"``."""
        return "patients" if "patients" in self.runs[0] else "images"


@dataclass(frozen=True)
class Difference:
    """``first`` minus ``second`` on the same test images: the value, and the central 95 % of the resamples.

    ``low`` and ``high`` are corrected where `compare` was told of several comparisons; those in ``tasks`` never are.
    """

    setting: str
    first: str
    second: str
    seeds: tuple[int, ...]
    value: float
    low: float
    high: float
    tasks: dict[str, tuple[float, float, float]]


def scores_under(arrays: Mapping[str, np.ndarray], kind: str, weights: Tensor, task: int) -> Tensor:
    """The score of one task in one run, for each row of ``weights`` (R × N: how often each test image counts).

    Balanced accuracy, or the mean over images of the mean Dice over classes (images without a value are left out).

    Raises:
        LoRKDError: the run has other test images than the weights are made for.
    """
    if kind == "classification":
        label = torch.as_tensor(arrays[f"{task}_label"]).long()
        count, probability = len(label), torch.as_tensor(arrays[f"{task}_probability"])
    else:
        dice = torch.as_tensor(arrays[f"{task}_dice"]).double().nanmean(1)
        count, known = len(dice), ~dice.isnan()
    if count != weights.shape[1]:
        raise LoRKDError(f"runs of one study differ in their test images: {count} and {weights.shape[1]}")
    if kind == "classification":
        return balanced_accuracy(probability.argmax(1), label, probability.shape[1], weights)
    kept = weights[:, known]
    return kept @ dice[known] / kept.sum(1)


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _interval(values: Tensor, comparisons: int = 1) -> tuple[float, float]:
    values = values[values.isfinite()]
    if not len(values):
        return float("nan"), float("nan")
    tail = 0.025 / comparisons
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


class _Study:
    """The finished runs of a folder, and their scores under the same resamples of the test images."""

    def __init__(self, folder: str | os.PathLike, resamples: int) -> None:
        self.resamples = resamples
        self.runs: dict[tuple[str, str], dict[int, tuple[RunFile, dict[str, Any]]]] = {}
        teachers: dict[tuple[str, str], dict[int, tuple[RunFile, dict[str, Any]]]] = {}
        for run in read_runs(folder):
            content = run.read()
            place = self.runs.setdefault((run.setting, run.method), {})
            place[run.seed] = (run, content)
            if content["family"] == "teacher":
                teachers[run.setting, run.method] = place
        if not self.runs:
            raise LoRKDError(f"no finished runs in {folder}: expected the folder of `lorkd study`")
        # One teacher sees all labels: it is compared with the students of each setting that it teaches in.
        for setting in {setting for setting, _ in self.runs}:
            for (taught, method), place in teachers.items():
                if taught == teacher_setting_of(setting):
                    self.runs.setdefault((setting, method), place)
        self._scores: dict[Path, dict[str, Tensor]] = {}
        self._weights: dict[int, Tensor] = {}
        self._labels: dict[int, np.ndarray | None] = {}
        self._patients: dict[str, list[int]] | None = None

    def scores(self, run: RunFile, content: Mapping[str, Any]) -> dict[str, Tensor]:
        """Task -> the score as it is (first), then under each resample."""
        if run.json not in self._scores:
            arrays, data, patients = run.read_arrays(), content["data"], content.get("patients", {})
            if self._patients is None:
                self._patients = patients
            if patients != self._patients:
                raise LoRKDError(f"{run.json} tells other patients of the test images than the other runs")
            clusters, found = clusters_of(patients), {}
            for number, (name, task) in enumerate(data["tasks"].items()):
                count = len(arrays.get(f"{number}_label", arrays.get(f"{number}_dice", ())))
                if not (task["scored"] and count):
                    continue
                labels = arrays.get(f"{number}_label")
                if labels is not None and not np.array_equal(self._labels.setdefault(number, labels), labels):
                    raise LoRKDError(
                        f"{run.json} was measured on other test images, or in another order, than the other runs"
                    )
                rows = self._rows(number, count, clusters.get(name))
                scores = torch.cat([scores_under(arrays, data["kind"], some, number) for some in rows])
                if scores[0].isfinite():
                    found[name] = scores
            if not found:
                raise LoRKDError(f"{run.json} has no score of any task")
            self._scores[run.json] = found
        return self._scores[run.json]

    def _rows(self, number: int, count: int, clusters: Clusters | None) -> Iterable[Tensor]:
        """Weights of each image once, then of the resamples; those of many images are drawn again for each run."""
        if number in self._weights:
            return [self._weights[number]]
        # Tasks with patients of their own, or with images of nobody known, are resampled by themselves.
        drawn = weight_chunks(count, self.resamples, number if clusters is None else clusters.group, clusters)
        rows = itertools.chain([torch.ones(1, count, dtype=torch.float64)], drawn)
        if count * self.resamples > CHUNK:
            return rows
        self._weights[number] = torch.cat(list(rows))
        return [self._weights[number]]

    def mean_scores(self, setting: str, method: str, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Task -> scores (as it is, then resampled), averaged over seeds."""
        found = [self.scores(*self.runs[setting, method][seed]) for seed in seeds]
        common = [task for task in found[0] if all(task in one for one in found)]
        return {task: torch.stack([one[task] for one in found]).mean(0) for task in common}


def summarise(folder: str | os.PathLike, resamples: int = 2000) -> list[Summary]:
    """Every method of a study in every setting, the best mean of a setting first.

    The interval resamples the test images of each task, or their patients where the runs know them, and averages over
    seeds: it says how much the mean depends on the choice of test images; ``sd`` says how much it depends on the seed
    (weights, draws, and in settings of few labels which images have them).

    Raises:
        LoRKDError: there are no finished runs, or a file that can't be read.
    """
    study = _Study(folder, resamples)
    rows = []
    for (setting, method), place in study.runs.items():
        seeds = tuple(sorted(place))
        by_task = study.mean_scores(setting, method, seeds)
        means = [float(np.mean([s[0] for s in study.scores(*place[seed]).values()])) for seed in seeds]
        tasks = {}
        for task in by_task:
            values = [float(study.scores(*place[seed])[task][0]) for seed in seeds]
            tasks[task] = (float(np.mean(values)), _sd(values))
        low, high = _interval(torch.stack(list(by_task.values())).mean(0)[1:])
        rows.append(
            Summary(
                setting, method, seeds, float(np.mean(means)), _sd(means), low, high, tasks,
                {task: _interval(scores[1:]) for task, scores in by_task.items()},
                tuple(place[seed][1] for seed in seeds),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.setting != "full", row.setting, -row.mean))


def other_means(rows: Sequence[Summary]) -> dict[str, list[float]]:
    """Means over tasks and seeds of ``auroc`` or ``nsd`` where all rows have it; a value for each row."""
    found = {}
    for name in ("auroc", "nsd"):
        values = [
            [run["figures"][task].get(name, {}).get("value") for run in row.runs for task in row.tasks] for row in rows
        ]
        known = [[v for v in own if v is not None] for own in values]
        if known and all(known):
            found[name] = [float(np.mean(own)) for own in known]
    return found


def compare(
    folder: str | os.PathLike,
    pairs: Sequence[tuple[str, str]] | Callable[[str, str], bool],
    resamples: int = 2000,
    comparisons: int = 1,
) -> list[Difference]:
    """Differences between methods, paired by test image (or patient) and averaged over the seeds that both have.

    Args:
        folder: of the study.
        pairs: (first, second) method names, in every setting that has both; or which of all pairs to take.
        resamples: of the test images or patients.
        comparisons: how many differences a conclusion rests on: intervals of level 1 - 0.05 / comparisons (Bonferroni),
            so that chance alone makes any of them significant in at most 5 % of studies.

    Raises:
        LoRKDError: there are no finished runs, a file that can't be read, or too few resamples for such an interval.
    """
    check_whole("comparisons", comparisons)
    if comparisons > 1 and resamples < 400 * comparisons:  # ten resamples in each tail
        raise LoRKDError(f"{comparisons} comparisons need at least {400 * comparisons} resamples, got {resamples}")
    study = _Study(folder, resamples)
    rows = []
    for setting in sorted({setting for setting, _ in study.runs}, key=lambda s: (s != "full", s)):
        methods = [method for own, method in study.runs if own == setting]
        chosen = pairs
        if callable(pairs):
            chosen = [(a, b) for a in methods for b in methods if a != b and pairs(a, b)]
        for first, second in chosen:
            if first not in methods or second not in methods:
                continue
            seeds = sorted(study.runs[setting, first].keys() & study.runs[setting, second].keys())
            if seeds:
                rows.append(_difference(study, setting, first, second, seeds, comparisons))
    return rows


def _difference(
    study: _Study, setting: str, first: str, second: str, seeds: Sequence[int], comparisons: int
) -> Difference:
    a, b = (study.mean_scores(setting, method, seeds) for method in (first, second))
    by_task = {task: a[task] - b[task] for task in a if task in b}
    mean = torch.stack(list(by_task.values())).mean(0)
    low, high = _interval(mean[1:], comparisons)
    return Difference(
        setting, first, second, tuple(seeds), float(mean[0]), low, high,
        {task: (float(d[0]), *_interval(d[1:])) for task, d in by_task.items()},
    )  # fmt: skip
