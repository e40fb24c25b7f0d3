"""A study's results as Markdown tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorkd_monai.study.statistics import Difference, Summary, compare, other_means, summarise

__all__ = ["difference_pairs", "difference_table", "folds_table", "main_table", "score_cells", "study_tables"]


def _with_sd(mean: float, sd: float | None) -> str:
    return f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def _mean_of(row: Summary, *keys: str) -> float:
    values = []
    for run in row.runs:
        value: object = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    return sum(values) / len(values)


def _one_expert(row: Summary, key: str) -> float:
    """The mean over tasks of a cost of the plain network that serves one task, of the first seed."""
    plain = row.runs[0]["cost"]["plain"].values()
    return sum(one[key] for one in plain) / len(plain)


def score_cells(rows: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of scores: method, seeds, mean over tasks with its interval, each task."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    others = other_means(rows)
    header = ["method", "seeds", "mean of tasks (± sd over seeds)", "95 % interval", *tasks]
    lines = [
        [row.method, str(len(row.seeds)), _with_sd(row.mean, row.sd), f"{row.low:.3f}–{row.high:.3f}"]
        + [_with_sd(*row.tasks[task]) if task in row.tasks else "" for task in tasks]
        + [f"{values[i]:.3f}" for values in others.values()]
        for i, row in enumerate(rows)
    ]
    return [*header, *(f"mean {name}" for name in others)], lines


def main_table(rows: Sequence[Summary]) -> str:
    """The scores and what each method costs: a row for each method of one setting."""
    header, lines = score_cells(rows)
    costs = [
        [
            f"{_one_expert(row, 'parameters'):,.0f}",
            f"{_mean_of(row, 'cost', 'parameters'):,.0f}",
            f"{_one_expert(row, 'multiply_adds') / 1e6:.1f}",
            f"{_mean_of(row, 'time', 'training_cpu_s') / 60:.1f}",
        ]
        for row in rows
    ]
    header += ["parameters for one task", "of all tasks", "M multiply-adds", "training, CPU min"]
    return _markdown(header, [line + cost for line, cost in zip(lines, costs, strict=True)])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def difference_pairs(rows: Sequence[Summary]) -> list[tuple[str, str]]:
    """Each decomposition with each method that is none."""
    families = {row.method: row.runs[0]["family"] for row in rows}
    experts = [method for method, family in families.items() if family == "lorkd"]
    return [(first, second) for first in experts for second in families if second not in experts]


def difference_table(rows: Sequence[Difference]) -> str:
    """Differences with their intervals; significant ones (the interval does not contain 0) are bold."""
    lines = []
    for row in rows:
        value = f"**{row.value:+.3f}**" if row.low > 0 or row.high < 0 else f"{row.value:+.3f}"
        interval = f"{row.low:+.3f} to {row.high:+.3f}"
        lines.append([row.setting, f"{row.first} − {row.second}", str(len(row.seeds)), value, interval])
    return _markdown(["setting", "methods", "seeds", "difference", "95 % interval"], lines)


def study_tables(folder: str | os.PathLike, resamples: int = 2000) -> str:
    """All tables of a study, read from the files of its finished runs.

    Raises:
        LoRKDError: there are none.
    """
    rows = summarise(folder, resamples)
    score = rows[0].runs[0]["score"].replace("_", " ")
    parts = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        said = f"Mean {score} on the test images; intervals: bootstrap over {own[0].unit}."
        parts.append(f"### {setting}\n\n{said}\n\n{main_table(own)}")
    differences = compare(folder, difference_pairs(rows), resamples)
    if differences:
        parts.append(f"### Differences\n\n{difference_table(differences)}")
    return "\n\n".join(parts) + "\n"


def folds_table(folders: Sequence[str | os.PathLike], resamples: int = 2000) -> str:
    """Each method's mean over the folds of a cross-validation, the best of each setting first, and each fold.

    Only methods that all of the folds have are comparable: the others are left out.

    Raises:
        LoRKDError: a folder has no finished runs.
    """
    found = [{(row.setting, row.method): row.mean for row in summarise(folder, resamples)} for folder in folders]
    common = [key for key in found[0] if all(key in one for one in found)]
    rows = [(*key, [one[key] for one in found]) for key in common]
    rows.sort(key=lambda row: (row[0] != "full", row[0], -np.mean(row[2])))
    lines = []
    for setting, method, values in rows:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        lines.append([setting, method, _with_sd(float(np.mean(values)), sd), *(f"{value:.3f}" for value in values)])
    names = [Path(folder).name for folder in folders]
    return _markdown(["setting", "method", "mean of folds (± sd over folds)", *names], lines)
