"""The held-out tasks of a study as the content of a report."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lorkd_monai.report.content import Content, Point, Table
from lorkd_monai.study.files import read_runs
from lorkd_monai.study.statistics import Summary, summarise

__all__ = ["add_transfer", "held_out_folders", "point_of"]


def held_out_folders(folder: str | os.PathLike) -> list[Path]:
    """The studies of held-out tasks that have finished runs."""
    return [place for place in sorted(Path(folder).glob("unseen_*")) if read_runs(place)]


def add_transfer(content: Content, folder: str | os.PathLike, resamples: int) -> None:
    """Put what was found on held-out tasks into a report's content; nothing where there is none.

    Raises:
        LoRKDError: a file that can't be read.
    """
    means: dict[tuple[str, str], list[float]] = {}
    for place in held_out_folders(folder):
        rows = sorted(summarise(place, resamples), key=lambda row: (row.method, _share(row)))
        (name,) = rows[0].runs[0]["data"]["tasks"]
        nearest = dict.fromkeys(run["nearest"] for row in rows for run in row.runs if "nearest" in run)
        title = f"{name} (nearest: {', '.join(nearest)})" if nearest else name
        content.transfer[title] = [point_of(row, f"{row.method}, {_share(row)} %") for row in rows]
        content.score = rows[0].runs[0]["score"].replace("_", " ")
        for row in rows:
            means.setdefault((row.method, row.setting), []).append(row.mean)
    if not means:
        return
    settings = list(dict.fromkeys(setting for _, setting in sorted(means, key=lambda k: (k[1] == "full", k[1]))))
    methods = list(dict.fromkeys(method for method, _ in means))
    cells = {key: f"{np.mean(values):.3f} ({len(values)} tasks)" for key, values in means.items()}
    content.transfer_table = Table(
        ["start", *settings],
        [[method, *(cells.get((method, setting), "") for setting in settings)] for method in methods],
        f"Mean {content.score} on the test images over the held-out tasks.",
    )


def _share(row: Summary) -> int:
    return 100 if row.setting == "full" else int(row.setting.removeprefix("few"))


def point_of(row: Summary, label: str) -> Point:
    """A method's mean over tasks, with its interval and a dot for each of several seeds."""
    seeds = tuple(run["mean"] for run in row.runs) if len(row.runs) > 1 else ()
    return Point(label, row.mean, row.low, row.high, row.runs[0]["family"], seeds)
