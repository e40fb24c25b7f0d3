"""The metadata.json of an expert bundle: what it is, what it needs, what goes in and what comes out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib import metadata as installed
from typing import Any

import lorkd_monai
from lorkd_monai.bundle.configs import Pipeline
from lorkd_monai.bundle.inert import inert_text
from lorkd_monai.errors import LoRKDError
from lorkd_monai.tasks import Work

__all__ = ["SCHEMA_URL", "VERSION", "build_metadata", "needed_packages", "strings_of"]

SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
VERSION = "0.1.0"
NO_AUTHORS = f"written by lorkd-monai {lorkd_monai.__version__}"
REFERENCES = [
    "Zhou, Y., Li, H., et al. Low-Rank Knowledge Decomposition for Medical Foundation Models. CVPR 2024. "
    "arXiv:2404.17184",
    "Li, H., et al. LoRKD: Low-Rank Knowledge Decomposition for Medical Foundation Models. arXiv:2409.19540",
]

# What stock MONAI imports only when it is used, by the name that a config calls it by.
_NEEDED_BY_WORD = {
    "PILReader": "pillow",
    "PILWriter": "pillow",
    "NibabelReader": "nibabel",
    "NibabelWriter": "nibabel",
    "ITKReader": "itk",
    "ITKWriter": "itk",
    "PydicomReader": "pydicom",
    "NrrdReader": "pynrrd",
    ".png": "pillow",
    ".nii.gz": "nibabel",
    ".nii": "nibabel",
    ".mha": "itk",
    ".nrrd": "itk",
    "KeepLargestConnectedComponentd": "scikit-image",
    "RemoveSmallObjectsd": "scikit-image",
    "FillHolesd": "scipy",
    "SwinUNETR": "einops",
    "UNETR": "einops",
    "ViT": "einops",
    "ViTAutoEnc": "einops",
}


def strings_of(item: Any) -> Iterator[str]:
    """Yield every string in a nested config: keys, values, and the items of lists."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield str(key)
            yield from strings_of(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from strings_of(value)


def needed_packages(*configs: Any, spatial_dims: int | None = None) -> list[str]:
    """Return the packages, sorted, that stock MONAI imports for these configs besides torch, numpy and itself.

    ``fire`` is the command line of ``monai.bundle``, ``pytorch-ignite`` its engines. Where an image reader is not
    named, 2D images (``spatial_dims=2``) are taken to be read with pillow and volumes with nibabel.
    """
    needed = {"fire", "pytorch-ignite"}
    if spatial_dims is not None:
        needed.add("pillow" if spatial_dims == 2 else "nibabel")
    # "suffixes" says which files are looked for.
    wanted = [
        {k: v for k, v in item.items() if k != "suffixes"} if isinstance(item, Mapping) else item for item in configs
    ]
    for word in strings_of(wanted):
        if word.startswith("$") and "pydicom" in word:
            needed.add("pydicom")
        package = _NEEDED_BY_WORD.get(word) or _NEEDED_BY_WORD.get(word.rsplit(".", 1)[-1])
        if package:
            needed.add(package)
    return sorted(needed)


def _version(package: str) -> str:
    """The installed version without its local part (2.13.0+cpu is 2.13.0)."""
    try:
        return installed.version(package).split("+")[0]
    except installed.PackageNotFoundError:
        raise LoRKDError(
            f"the expert bundle needs the package {package!r}, which is not installed here, so that its version "
            f"cannot be named; install it: pip install {package}"
        ) from None


def _figure(value: Any) -> Any:
    """A measured metric as JSON takes it: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _figure(item) for key, item in value.items()}
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)) or hasattr(value, "item"):
        number = value.item() if hasattr(value, "item") else value
        return round(number, 6) if math.isfinite(number) else None
    return inert_text(value)


def display_name(task: str, kind: str) -> str:
    """The name that a person reads: ``blood_cell`` and ``classification`` give "Blood cell classification expert"."""
    words = re.sub(r"[_-]+", " ", task).strip() or task
    return f"{words[:1].upper()}{words[1:]} {kind} expert"


def _input_channels(in_channels: int) -> dict[str, str]:
    if in_channels == 3:
        return {"0": "red", "1": "green", "2": "blue"}
    return {str(i): "image" if in_channels == 1 else f"image {i}" for i in range(in_channels)}


def _value_range(preprocessing: list[dict]) -> list[float]:
    for step in (step for step in reversed(preprocessing) if isinstance(step, Mapping)):
        if "b_min" in step and isinstance(step["b_min"], (int, float)):
            return [float(step["b_min"]), float(step["b_max"])]
        if "minv" in step:
            return [float(step["minv"]), float(step["maxv"])]
    return [0.0, 1.0]


def build_metadata(
    work: Work,
    pipeline: Pipeline,
    network_config: dict,
    metrics: Mapping[str, Any],
    parent: Mapping[str, Any],
    torchscript: str = "script",
) -> dict[str, Any]:
    """Return the content of metadata.json, valid against MONAI's schema of 2024-07-25.

    All text that comes from the data list passes `inert_text`: MONAI's parser reads this file too. ``torchscript``
    tells whoever exports the weights again whether the network scripts or has to be traced.
    """
    task, kind, spatial_dims, in_channels = work.task, work.kind, work.spatial_dims, work.in_channels
    classes = {str(i): inert_text(name) for i, name in sorted(task.labels.items())}
    readable = display_name(task.name, kind)
    modality = inert_text(task.modality) if task.modality else "unknown"
    dims = f"{spatial_dims}D"
    segmentation = kind == "segmentation"
    about = f"{modality} images" if modality != "unknown" else "images"
    shape = [int(n) for n in work.image_size]
    is_ct = modality.strip().upper() == "CT"
    packages = needed_packages(
        pipeline.preprocessing, pipeline.postprocessing, network_config, spatial_dims=spatial_dims
    )
    if spatial_dims == 3:
        packages = sorted({*packages, "itk"})  # reads what is no NIfTI, DICOM series above all
    return {
        "schema": SCHEMA_URL,
        "version": VERSION,
        "changelog": {VERSION: "extracted from its decomposition"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {package: _version(package) for package in packages},
        "supported_apps": {},
        "name": readable,
        "task": f"{dims} {kind} of {about}: {task.name}",
        **({"body_part": inert_text(task.body_part)} if task.body_part else {}),
        "description": f"A {dims} {kind} network for the one task '{task.name}', extracted as a plain MONAI network "
        "from a low-rank knowledge decomposition (LoRKD) of a foundation model."
        + ("" if metrics else " No metrics were measured when it was written."),
        "authors": inert_text(parent.get("authors") or ", ".join(task.authors or [NO_AUTHORS])),
        "copyright": inert_text(parent.get("copyright", "see LICENSE and docs/data_license.txt")),
        "data_source": inert_text(parent.get("data_source", "see docs/data_license.txt")),
        "data_type": "image files",
        "image_classes": f"{in_channels} channel(s), intensities as configs/inference.json prepares them",
        "label_classes": "one mask of class indices" if segmentation else "one class index per image",
        "pred_classes": "one channel per class, see channel_def",
        "eval_metrics": {inert_text(name): _figure(value) for name, value in metrics.items()},
        "intended_use": "Research only; not for clinical use.",
        "references": REFERENCES,
        "torchscript": torchscript,
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if is_ct else "magnitude",
                    "modality": modality,
                    "num_channels": in_channels,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": _value_range(pipeline.preprocessing),
                    "is_patch_data": segmentation,
                    "channel_def": _input_channels(in_channels),
                }
            },
            "outputs": {
                "pred": {
                    "type": "image" if segmentation else "probabilities",
                    "format": "segmentation" if segmentation else "classification",
                    "num_channels": len(classes),
                    "spatial_shape": shape if segmentation else [],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": segmentation,
                    "channel_def": classes,
                }
            },
        },
    }
