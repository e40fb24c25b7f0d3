"""A report's content as sections with pictures, in the order in which a reader wants them."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorkd_monai.report import figures
from lorkd_monai.report.content import Content, Table

__all__ = ["Picture", "Section", "Sections"]


@dataclass(frozen=True)
class Picture:
    """A picture: its file, its alternative text, its bytes for the HTML page."""

    file: str
    text: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page. ``small`` pictures are shown side by side where there is room."""

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    small: bool = False


class Sections:
    """Draws the pictures of a content, and puts them into sections.

    Attributes:
        files: the pictures as PNG, by the names under which the sections speak of them.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._sections: list[Section] = []

    def _picture(self, name: str, text: str, png: bytes) -> Picture:
        # Names of tasks and methods come from files: only harmless letters get into a file's name.
        stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60] or "figure"
        file, number = f"{stem}.png", 1
        while file in self.files:
            number += 1
            file = f"{stem}_{number}.png"
        self.files[file] = png
        return Picture(file, text, "data:image/png;base64," + base64.b64encode(png).decode())

    def _add(
        self,
        title: str,
        text: str = "",
        drawn: Sequence[tuple[str, str, bytes]] = (),
        tables: Sequence[Table | None] = (),
        points: Sequence[str] = (),
        small: bool = True,
    ) -> None:
        """Add a section that has something to show; ``drawn`` has name, alternative text and PNG of each picture."""
        pictures = tuple(self._picture(*one) for one in drawn)
        shown = tuple(table for table in tables if table is not None)
        if pictures or shown or points:
            self._sections.append(Section(title, text, pictures, shown, tuple(points), small))

    def of(self, content: Content) -> list[Section]:
        """The sections that have something to show."""
        self._sections = []
        score, draw = content.score, figures
        self._add("What was decomposed", tables=[_facts(content.facts), content.tasks])
        for setting in content.comparison:
            self._comparison(content, setting)
        self._add(
            "Accuracy against parameters",
            "Each number is a method; parameters are those of everything that was trained for all tasks together.",
            [
                (f"size {setting}", "score against parameters", draw.scatter(points, f"mean {score}"))
                for setting, points in content.against_size.items()
            ],
        )
        self._add(
            "Learning curves",
            "Scores on the validation images, which choose the epoch; averaged over seeds.",
            [
                (f"validation {task}", f"validation score of {task}", draw.curves(lines, f"{task}: {score}"))
                for task, lines in content.validation.items()
            ],
        )
        by_epoch = all(line.across == "epoch" for lines in content.losses.values() for line in lines)
        self._add(
            "Loss, term by term",
            "Means over the epoch's batches." if by_epoch else "Of each batch.",
            [(f"loss {title}", f"loss: {title}", draw.curves(lines, title)) for title, lines in content.losses.items()],
        )
        conflicts = [
            (f"conflict {m.title}", f"cosines between gradients, {m.title}", draw.heat_map(m))
            for m in content.conflicts
        ]
        if content.conflict_layers:
            png = draw.curves(content.conflict_layers, "mean cosine over pairs of tasks")
            conflicts.append(("conflict by layer", "mean cosine by layer", png))
        self._add(
            "Do the tasks' gradients conflict?",
            "Cosines between the tasks' gradients on the weights that they share, at the end of the training. Below 0, "
            "a step for one task undoes part of a step for the other; around 0, the tasks hardly interact. mtl has no "
            "experts; with experts, a task also has weights of its own.",
            conflicts,
        )
        self._add(
            "What each expert adds",
            "Each expert changes the shared weights W0 of a layer by a ΔW of low rank. Its size is its Frobenius norm "
            "divided by that of W0; its directions are the largest singular values that hold 90 % of the squared norm. "
            "A curve that falls early says that a smaller rank would do.",
            [(f"change {m.title}", m.title, draw.heat_map(m)) for m in content.changes]
            + [
                (
                    f"spectrum {task}",
                    f"singular values of the expert of {task}",
                    draw.curves(lines, f"{task}: singular value of ΔW", logarithmic=True),
                )
                for task, lines in content.spectra.items()
            ],
        )
        self._add(
            "Transfer to a task that none has seen",
            "Each task in turn was held out: teacher and decomposition were trained on the others, then a student from "
            "scratch, the nearest expert and the teacher on the held-out task alone, with a part of its images.",
            [
                (f"transfer {task}", f"transfer to {task}", draw.dots(points, f"{task}: {score}", width=4))
                for task, points in content.transfer.items()
            ],
            [content.transfer_table],
        )
        self._add(
            "Confusion matrices",
            "Numbers of test images: each row is what they are, each column what they were called.",
            [(f"confusion {m.title}", f"confusion matrix, {m.title}", draw.confusion(m)) for m in content.confusions],
        )
        self._add(
            "Segmentations",
            "Test images with the contours of the label (orange, solid) and of the prediction (blue, dashed).",
            [
                (f"example {task} {e.title}", f"{task}, {e.title}", draw.segmentation(e, task))
                for task, examples in content.segmentations.items()
                for e in examples
            ],
        )
        self._add("What it costs", tables=[content.costs])
        self._add("How it was made", tables=[_facts(content.provenance)], points=content.missing)
        return self._sections

    def _comparison(self, content: Content, setting: str) -> None:
        score, name = content.score, f"comparison {setting}"
        axis = f"mean {score} over tasks"
        drawn = [(name, f"{axis} of each method", figures.dots(content.comparison[setting], axis))]
        if content.differences.get(setting):
            png = figures.dots(content.differences[setting], f"difference in mean {score}", zero=True)
            drawn.append((f"differences {setting}", "differences with their intervals", png))
        title = f"Comparison: {setting}" if setting else "Comparison"
        self._add(
            title,
            f"Dots are means, lines 95 % bootstrap intervals over the test {content.unit}, ticks single seeds. "
            "Differences are paired: both methods have the same resamples. Where a line does not cross 0, the "
            "difference is significant.",
            drawn,
            [content.comparison_tables.get(setting)],
            small=False,
        )
        tasks = content.by_task.get(setting, {})
        if len(tasks) > 1:
            self._add(
                f"{title}, task by task",
                drawn=[
                    (f"{name} {task}", f"{score} of {task}", figures.dots(points, f"{task}: {score}", width=4))
                    for task, points in tasks.items()
                ],
            )


def _facts(pairs: Sequence[tuple[str, str]]) -> Table | None:
    return Table(["", ""], [list(pair) for pair in pairs]) if pairs else None
