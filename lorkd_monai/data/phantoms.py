"""Synthetic images of several tasks that look like different modalities, for demos and tests without data.

Simple shapes with each modality's own texture: CT-like ellipsoids in Hounsfield units, ultrasound-like speckle,
an MR-like bias field, and, in 2D, coloured cells. A small network learns them in a few epochs. They say nothing
about how well anything works on patients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.data.writing import new_folder, write_data_list
from lorkd_monai.errors import LoRKDError
from lorkd_monai.tasks import check_kind
from lorkd_monai.transforms.preprocessing import CT_WINDOW

__all__ = ["make_phantoms"]

Scene = Callable[[np.random.Generator, tuple[int, ...], int], tuple[np.ndarray, np.ndarray]]


def make_phantoms(
    folder: str | Path,
    kind: str,
    spatial_dims: int,
    num_images: int = 100,
    image_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write phantoms and their data list, and return the path of its ``dataset.json``.

    Tasks are ``ct``, ``ultrasound``, ``mr``, and ``cells`` in 2D (colours). 60 % of a task's images train, 15 %
    validate, 25 % test. Files are PNG (2D), NIfTI (3D), and for some classification tasks one ``.npz``, so that all
    ways of reading are used. The same arguments give the same images.

    Args:
        folder: where to write; it is made if need be.
        kind: ``"classification"`` or ``"segmentation"``.
        spatial_dims: 2 or 3.
        num_images: images of each task, at least 10.
        image_size: pixels or voxels of the longest side; None for 64 (2D) or 24 (3D).
        seed: any whole number of at least 0.
        overwrite: replace an existing data list.

    Raises:
        LoRKDError: for an argument that does not fit, or a folder that holds a data list.

    Example::

        make_phantoms("phantoms", "segmentation", 2, num_images=20)
    """
    check_kind(kind, spatial_dims)
    size = image_size or (64 if spatial_dims == 2 else 24)
    whole = all(type(number) is int for number in (num_images, size, seed))
    if not whole or num_images < 10 or size < 16 or seed < 0:
        raise LoRKDError(
            "expected whole numbers, num_images >= 10, image_size >= 16 and seed >= 0, "
            f"got {num_images!r}, {image_size!r} and {seed!r}."
        )
    folder = Path(folder)
    with new_folder(folder, overwrite):
        tasks: dict[str, Any] = {}
        rows: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
        for number, (name, modality, scene, classes, structures) in enumerate(_TASKS):
            if name == "cells" and spatial_dims == 3:
                continue
            names = classes if kind == "classification" else structures
            tasks[name] = {"modality": modality, "labels": {str(i): label for i, label in enumerate(names)}}
            rng = np.random.default_rng([seed, number])
            shape = _shape(name, size, spatial_dims)
            samples = []
            for i in range(num_images):
                label = i % len(classes) if kind == "classification" else len(classes) - 1 - i % 2 * (name == "cells")
                samples.append((*scene(rng, shape, label), label))
            splits = _splits(num_images)
            if kind == "classification" and name in ("ultrasound", "mr"):
                tasks[name]["npz"] = f"{name}.npz"
                _write_npz(folder, name, samples, splits)
                continue
            for (image, mask, label), (i, split) in zip(samples, enumerate(splits), strict=True):
                target: Any = label if kind == "classification" else mask
                rows[split].append(_write_item(folder, name, i, image, target, spatial_dims))
        content = {"name": f"{spatial_dims}D {kind} phantoms", "tasks": tasks, **rows}
        return write_data_list(folder, content)


def _splits(count: int) -> list[str]:
    training, validation = round(0.6 * count), round(0.15 * count)
    return ["training"] * training + ["validation"] * validation + ["test"] * (count - training - validation)


def _shape(name: str, size: int, dims: int) -> tuple[int, ...]:
    """Images of different tasks differ in shape, as real ones do."""
    shorter = max(16, size * 3 // 4)
    if dims == 2:
        return (shorter, size) if name == "ultrasound" else (size, size)
    return (size, size, shorter) if name == "ct" else (size, shorter, size)


def _ellipsoid(shape: tuple[int, ...], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return the voxels inside an ellipsoid; ``centre`` and ``radii`` are in -1..1 along each axis."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) < 1


def _near(rng: np.random.Generator, dims: int, spread: float, first: float = 0.0) -> np.ndarray:
    centre = rng.uniform(-spread, spread, dims)
    centre[0] += first
    return centre


def _ct(rng: np.random.Generator, shape: tuple[int, ...], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a body in air with one organ (label 0) or two on both sides (label 1), in Hounsfield units."""
    dims = len(shape)
    image = np.full(shape, -1000.0)
    image[_ellipsoid(shape, np.zeros(dims), rng.uniform(0.8, 0.95, dims))] = 20.0
    mask = np.zeros(shape, dtype=np.uint8)
    for side in (-0.4, 0.4)[: label + 1]:
        mask[_ellipsoid(shape, _near(rng, dims, 0.08, side), rng.uniform(0.2, 0.3, dims))] = 1
    image[mask == 1] = 160.0
    bone = _ellipsoid(shape, np.array([0.0, 0.65, 0.0])[:dims], np.full(dims, 0.15))
    image[bone], mask[bone] = 700.0, 2
    return image + rng.normal(0, 20, shape), mask


def _ultrasound(rng: np.random.Generator, shape: tuple[int, ...], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Return speckled tissue with (label 1) or without (label 0) a dark cyst, grey values 0..255."""
    dims = len(shape)
    tissue = np.full(shape, rng.uniform(70, 90))
    mask = np.zeros(shape, dtype=np.uint8)
    if label:
        mask[_ellipsoid(shape, _near(rng, dims, 0.4), rng.uniform(0.25, 0.4, dims))] = 1
    tissue[mask == 1] = 8.0
    return tissue * rng.rayleigh(1.0, shape), mask


def _mr(rng: np.random.Generator, shape: tuple[int, ...], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a head under a smooth bias field with (label 1) or without (label 0) a bright lesion, 0..255."""
    dims = len(shape)
    image = np.zeros(shape)
    image[_ellipsoid(shape, np.zeros(dims), rng.uniform(0.8, 0.95, dims))] = 90.0
    mask = np.zeros(shape, dtype=np.uint8)
    if label:
        mask[_ellipsoid(shape, _near(rng, dims, 0.35), rng.uniform(0.18, 0.3, dims))] = 1
    image[mask == 1] = 190.0
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    bias = 1 + sum(slope * x for slope, x in zip(rng.uniform(-0.2, 0.2, dims), axes, strict=True))
    return image * bias + np.abs(rng.normal(0, 6, shape)), mask


def _cells(rng: np.random.Generator, shape: tuple[int, ...], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a stained cell, H×W×3: red without a nucleus (0), white with a large one (1), or a platelet (2)."""
    image = np.empty((*shape, 3))
    image[:] = (225, 205, 200)
    centre = _near(rng, 2, 0.25)
    radius = rng.uniform(0.5, 0.6) if label < 2 else rng.uniform(0.15, 0.22)
    cell = _ellipsoid(shape, centre, np.array([radius, radius * rng.uniform(0.9, 1.1)]))
    image[cell] = ((205, 110, 105), (190, 170, 215), (130, 80, 160))[label]
    mask = np.zeros(shape, dtype=np.uint8)
    if label == 1:
        mask[_ellipsoid(shape, centre + rng.uniform(-0.1, 0.1, 2), rng.uniform(0.25, 0.35, 2))] = 1
    elif label == 2:
        mask[cell] = 1
    image[mask == 1] = (95, 50, 145)
    return image + rng.normal(0, 6, image.shape), mask


_TASKS: tuple[tuple[str, str, Scene, tuple[str, ...], tuple[str, ...]], ...] = (
    ("ct", "CT", _ct, ("one organ", "two organs"), ("background", "organ", "bone")),
    ("ultrasound", "US", _ultrasound, ("no cyst", "cyst"), ("background", "cyst")),
    ("mr", "MR", _mr, ("healthy", "lesion"), ("background", "lesion")),
    ("cells", "SM", _cells, ("red cell", "white cell", "platelet"), ("background", "nucleus")),
)


def _grey_values(image: np.ndarray) -> np.ndarray:
    if image.min() < -500:  # Hounsfield units, shown through a window as viewers do
        low, high = CT_WINDOW
        image = 255 * (image - low) / (high - low)
    return image.round().clip(0, 255).astype(np.uint8)


def _write_npz(folder: Path, name: str, samples: list[tuple], splits: list[str]) -> None:
    arrays: dict[str, Any] = {}
    for split, key in (("training", "train"), ("validation", "val"), ("test", "test")):
        chosen = [sample for sample, s in zip(samples, splits, strict=True) if s == split]
        arrays[f"{key}_images"] = np.stack([_grey_values(image) for image, _, _ in chosen])
        arrays[f"{key}_labels"] = np.array([[label] for _, _, label in chosen], dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **arrays)


def _write_item(folder: Path, name: str, number: int, image: np.ndarray, target: Any, dims: int) -> dict[str, Any]:
    import nibabel
    from PIL import Image

    def write(part: str, array: np.ndarray) -> str:
        path = f"{name}/{part}/{name}_{number:04d}{'.png' if dims == 2 else '.nii.gz'}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if dims == 2:
            Image.fromarray(array).save(folder / path)
        else:
            spacing = (1.5, 1.5, 3.0) if name == "mr" else (2.0, 2.0, 2.0)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), folder / path)
        return path

    pixels = _grey_values(image) if dims == 2 or name != "ct" else image.round().astype(np.int16)
    label = target if isinstance(target, int) else write("labels", target)
    return {"image": write("images", pixels), "label": label, "task": name}
