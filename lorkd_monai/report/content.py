"""The content of a report, read from the files of a study or of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Content", "Curve", "Matrix", "Point", "Segmentation", "Table"]


@dataclass(frozen=True)
class Table:
    """A table of text; ``note`` says what its columns mean."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One row of a dot plot: a value with its interval; ``group`` gives its colour."""

    label: str
    value: float
    low: float | None
    high: float | None
    group: str
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A line over epochs, or over what ``across`` says."""

    label: str
    epochs: list[float]
    values: list[float]
    across: str = "epoch"


@dataclass(frozen=True)
class Matrix:
    """A matrix with names; ``low`` and ``high`` are the ends of its colours."""

    title: str
    rows: list[str]
    columns: list[str]
    values: np.ndarray
    low: float
    high: float
    diverging: bool = False
    counts: np.ndarray | None = None


@dataclass(frozen=True)
class Segmentation:
    """A test image with the contours of its label and of the prediction."""

    title: str
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


@dataclass
class Content:
    """All that one report shows. A part that the folder does not have is empty, and gets no section."""

    title: str
    intro: str = ""
    summary: list[tuple[str, list[str]]] = field(default_factory=list)
    score: str = "score"
    unit: str = "images"
    facts: list[tuple[str, str]] = field(default_factory=list)
    tasks: Table | None = None
    comparison: dict[str, list[Point]] = field(default_factory=dict)
    by_task: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    comparison_tables: dict[str, Table] = field(default_factory=dict)
    differences: dict[str, list[Point]] = field(default_factory=dict)
    against_size: dict[str, list[tuple[str, str, float, float]]] = field(default_factory=dict)
    validation: dict[str, list[Curve]] = field(default_factory=dict)
    losses: dict[str, list[Curve]] = field(default_factory=dict)
    conflicts: list[Matrix] = field(default_factory=list)
    conflict_layers: list[Curve] = field(default_factory=list)
    changes: list[Matrix] = field(default_factory=list)
    spectra: dict[str, list[Curve]] = field(default_factory=dict)
    confusions: list[Matrix] = field(default_factory=list)
    segmentations: dict[str, list[Segmentation]] = field(default_factory=dict)
    costs: Table | None = None
    provenance: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    transfer: dict[str, list[Point]] = field(default_factory=dict)
    transfer_table: Table | None = None
