"""What a data list holds and what was left out of it, in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lorkd_monai.data.checks import SPLITS

if TYPE_CHECKING:
    from lorkd_monai.data.datalist import DataList

__all__ = ["Skipped", "counts_table", "remarks"]

_log = logging.getLogger(__name__)
_EXAMPLES = 3


class Skipped:
    """What a builder of lists left out: paths by the reason."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, reason: str, path: str | Path) -> None:
        """Note one file or folder."""
        self.paths.setdefault(reason, []).append(str(path))

    def tell(self) -> None:
        """Log one line for each reason, with a count and examples."""
        for reason, paths in self.paths.items():
            more = ", …" if len(paths) > _EXAMPLES else ""
            _log.warning("skipped %d: %s (%s%s)", len(paths), reason, ", ".join(paths[:_EXAMPLES]), more)


def counts_table(data: DataList) -> str:
    """A Markdown table of the images: a row for each class of each task (segmentation: each task), a column a split.

    Images without a label have a row of their own.
    """
    lines = ["| task | class | " + " | ".join(SPLITS) + " |", "|---|---|" + "---|" * len(SPLITS)]
    for task, counts in _label_counts(data).items():
        for label, row in counts.items():
            cells = " | ".join(str(row[split]) for split in SPLITS)
            lines.append(f"| {task} | {label} | {cells} |")
    sums = " | ".join(str(len(data.split(split))) for split in SPLITS)
    return "\n".join([*lines, f"| all | | {sums} |"])


def remarks(data: DataList) -> list[str]:
    """What a user should know of a list that can be used: classes nothing can be learnt of, splits without images."""
    lines = []
    for task, counts in _label_counts(data).items():
        if data.kind == "classification":
            missing = [name for name in data.tasks[task].labels.values() if not counts[name]["training"]]
            if missing and "(no label)" not in counts:  # the teacher may show it the others
                lines.append(
                    f"task {task!r}: no training image of the class{'es' * (len(missing) > 1)} {', '.join(missing)}; "
                    "its expert cannot learn to name what it never saw"
                )
    for split, one, whole in (
        ("validation", "it does not count in the choice of the best epoch", "the weights of the last epoch are kept"),
        ("test", "its expert is written without figures", "experts are written without figures"),
    ):
        present = {item["task"] for item in data.split(split)}
        if not present:
            lines.append(f"the list has no {split} images: {whole}")
        else:
            lines += [f"task {task!r} has no {split} images: {one}" for task in data.tasks if task not in present]
    return lines


def _label_counts(data: DataList) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {class: {split: images}}}; one class of no name for segmentation, "(no label)" where there are some."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for name, task in data.tasks.items():
        classes = task.labels.values() if data.kind == "classification" else [""]
        counts[name] = {label: dict.fromkeys(SPLITS, 0) for label in classes}
    for split in SPLITS:
        for item in data.split(split):
            own, label = counts[item["task"]], item["label"]
            if label is None:
                row = own.setdefault("(no label)", dict.fromkeys(SPLITS, 0))
            else:
                row = own[data.tasks[item["task"]].labels[label] if data.kind == "classification" else ""]
            row[split] += 1
    return counts
