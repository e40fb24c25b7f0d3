"""A report's content as sections with drawn figures, in the order in which a reader wants them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from lorkd_monai.report import figures
from lorkd_monai.report.content import Content, Table

__all__ = ["Picture", "Section", "Sections"]


@dataclass(frozen=True)
class Picture:
    """A figure: its file, its alternative text, its bytes for the HTML page."""

    file: str
    text: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page. ``small`` pictures stand side by side where there is room."""

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    small: bool = False


class Sections:
    """Draws the figures of a content, and puts them into sections.

    Attributes:
        files: the pictures as PNG, by the names under which the sections speak of them.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def _drawn(self, name: str, text: str, png: bytes) -> Picture:
        # Names of tasks and methods come from files: only harmless letters get into a file's name.
        stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60] or "figure"
        file, number = f"{stem}.png", 1
        while file in self.files:
            number += 1
            file = f"{stem}_{number}.png"
        self.files[file] = png
        return Picture(file, text, "data:image/png;base64," + base64.b64encode(png).decode())

    def of(self, content: Content) -> list[Section]:
        """The sections that have something to show."""
        parts = [
            self._decomposed(content),
            *self._comparison(content),
            self._size(content),
            *self._curves(content),
            self._conflict(content),
            self._spectra(content),
            self._transfer(content),
            self._pictures(content),
            Section("What it costs", tables=(content.costs,)) if content.costs else None,
            self._provenance(content),
        ]
        return [part for part in parts if part is not None]

    def _decomposed(self, content: Content) -> Section | None:
        tables = [Table(["", ""], [[key, value] for key, value in content.facts])] if content.facts else []
        tables += [content.tasks] if content.tasks else []
        return Section("What was decomposed", tables=tuple(tables)) if tables else None

    def _comparison(self, content: Content) -> list[Section]:
        sections = []
        for setting, points in content.comparison.items():
            name = f"comparison {setting}"
            axis = f"mean {content.score} over tasks"
            pictures = [self._drawn(name, f"{axis} of each method", figures.dots(points, axis))]
            if content.differences.get(setting):
                png = figures.dots(content.differences[setting], f"difference in mean {content.score}", zero=True)
                pictures.append(self._drawn(f"differences {setting}", "differences with their intervals", png))
            text = (
                f"Dots are means, lines 95 % bootstrap intervals over the test {content.unit}, ticks single seeds. "
                "Differences are paired: both methods have the same resamples. Where a line does not cross 0, the "
                "difference is significant."
            )
            table = content.comparison_tables.get(setting)
            title = f"Comparison: {setting}" if setting else "Comparison"
            sections.append(Section(title, text, tuple(pictures), (table,) if table else ()))
            tasks = content.by_task.get(setting, {})
            if len(tasks) > 1:
                small = tuple(
                    self._drawn(
                        f"{name} {task}",
                        f"{content.score} of {task}",
                        figures.dots(own, f"{task}: {content.score}", width=4),
                    )
                    for task, own in tasks.items()
                )
                sections.append(Section(f"{title}, task by task", pictures=small, small=True))
        return sections

    def _size(self, content: Content) -> Section | None:
        pictures = tuple(
            self._drawn(f"size {setting}", "score against parameters", figures.scatter(points, f"mean {content.score}"))
            for setting, points in content.against_size.items()
        )
        text = "Each number is a method; parameters are those of everything that was trained for all tasks together."
        return Section("Accuracy against parameters", text, pictures, small=True) if pictures else None

    def _curves(self, content: Content) -> list[Section]:
        sections = []
        if content.validation:
            pictures = tuple(
                self._drawn(
                    f"validation {task}",
                    f"validation score of {task}",
                    figures.curves(lines, f"{task}: {content.score}"),
                )
                for task, lines in content.validation.items()
            )
            text = "Scores on the validation images, which choose the epoch; averaged over seeds."
            sections.append(Section("Learning curves", text, pictures, small=True))
        if content.losses:
            pictures = tuple(
                self._drawn(f"loss {title}", f"loss: {title}", figures.curves(lines, title))
                for title, lines in content.losses.items()
            )
            by_epoch = all(line.across == "epoch" for lines in content.losses.values() for line in lines)
            text = "Means over the epoch's batches." if by_epoch else "Of each batch."
            sections.append(Section("Loss, term by term", text, pictures, small=True))
        return sections

    def _conflict(self, content: Content) -> Section | None:
        if not content.conflicts:
            return None
        pictures = [
            self._drawn(f"conflict {m.title}", f"cosines between gradients, {m.title}", figures.heat_map(m))
            for m in content.conflicts
        ]
        if content.conflict_layers:
            png = figures.curves(content.conflict_layers, "mean cosine over pairs of tasks")
            pictures.append(self._drawn("conflict by layer", "mean cosine by layer", png))
        text = (
            "Cosines between the tasks' gradients on the weights that they share, at the end of the training. Below 0, "
            "a step for one task undoes one for the other; around 0, they leave each other alone. mtl has no experts; "
            "with experts, a task has weights of its own beside the shared ones."
        )
        return Section("Do the tasks pull at each other?", text, tuple(pictures), small=True)

    def _spectra(self, content: Content) -> Section | None:
        pictures = [self._drawn(f"change {m.title}", m.title, figures.heat_map(m)) for m in content.changes]
        pictures += [
            self._drawn(
                f"spectrum {task}", f"singular values of the expert of {task}",
                figures.curves(lines, f"{task}: singular value of ΔW", logarithmic=True),
            )
            for task, lines in content.spectra.items()
        ]  # fmt: skip
        text = (
            "Each expert changes the shared weights W0 of a layer by a ΔW of low rank. Its size is the Frobenius norm "
            "beside that of W0; its directions are the largest singular values that hold 90 % of the squared norm. A "
            "curve that falls early says that a smaller rank would do."
        )
        return Section("What each expert adds", text, tuple(pictures), small=True) if pictures else None

    def _transfer(self, content: Content) -> Section | None:
        if not content.transfer:
            return None
        pictures = tuple(
            self._drawn(
                f"transfer {task}",
                f"transfer to {task}",
                figures.dots(points, f"{task}: {content.score}", width=4),
            )
            for task, points in content.transfer.items()
        )
        text = (
            "Each task in turn was held out: teacher and decomposition were trained on the others, then a student from "
            "scratch, the nearest expert and the teacher on the held-out task alone, with a part of its images."
        )
        tables = (content.transfer_table,) if content.transfer_table else ()
        return Section("Transfer to a task that none has seen", text, pictures, tables, small=True)

    def _pictures(self, content: Content) -> Section | None:
        if content.confusions:
            pictures = tuple(
                self._drawn(f"confusion {m.title}", f"confusion matrix, {m.title}", figures.confusion(m))
                for m in content.confusions
            )
            text = "Numbers of test images: each row is what they are, each column what they were called."
            return Section("Confusion matrices", text, pictures, small=True)
        if content.segmentations:
            pictures = tuple(
                self._drawn(f"example {task} {e.title}", f"{task}, {e.title}", figures.segmentation(e, task))
                for task, examples in content.segmentations.items()
                for e in examples
            )
            text = "Test images with the contours of the label (orange, solid) and of the prediction (blue, dashed)."
            return Section("Segmentations", text, pictures, small=True)
        return None

    def _provenance(self, content: Content) -> Section | None:
        if not (content.provenance or content.missing):
            return None
        rows = [[key, value] for key, value in content.provenance]
        return Section(
            "How it was made", tables=(Table(["", ""], rows),) if rows else (), points=tuple(content.missing)
        )
