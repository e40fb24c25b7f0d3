"""Read, check and copy expert bundles for the apps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorkd_monai.checks import is_bundle_name
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json

__all__ = ["ExpertFolder", "copy_expert", "read_experts"]

_NEEDED = ("configs/metadata.json", "configs/inference.json", "models/model.pt")
# What a server needs to run an expert and to train it further; other formats of the weights would only take space.
_COPIED = ("configs", "docs", "LICENSE", "models/model.pt", "large_files.yml")


@dataclass(frozen=True)
class ExpertFolder:
    """One expert bundle: its folder and its metadata."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, ``<task>_<kind>``."""
        return self.folder.name

    @property
    def input(self) -> dict[str, Any]:
        """The description of the network's input."""
        return self.metadata["network_data_format"]["inputs"]["image"]

    @property
    def classes(self) -> dict[int, str]:
        """Class index -> class name, as in the data list."""
        channels = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        return {int(i): str(text).strip() for i, text in sorted(channels.items(), key=lambda item: int(item[0]))}


def _read(path: str | Path) -> ExpertFolder:
    folder = Path(path).resolve()
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise LoRKDError(
            f"expected the folder of an expert bundle, but {path} has no {', '.join(missing)}; experts are written by "
            "a `training` run or by `lorkd export`"
        )
    if not is_bundle_name(folder.name):
        raise LoRKDError(
            f"the folder of an expert bundle must be named <task>_classification or <task>_segmentation, of letters, "
            f"digits, '_' and '-', got {folder.name!r}; rename it"
        )
    try:
        expert = ExpertFolder(folder, read_json(folder / "configs" / "metadata.json"))
        if len(expert.input["spatial_shape"]) not in (2, 3) or not expert.classes:
            raise ValueError("it has no spatial shape or no class")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoRKDError(
            f"{folder / 'configs' / 'metadata.json'} does not describe an expert with an input 'image' and an output "
            f"'pred' ({error!r}); look at it with `lorkd check {path}`"
        ) from error
    return expert


def read_experts(paths: Sequence[str | Path]) -> list[ExpertFolder]:
    """Read the bundles of ``paths``, in order; a folder of bundles gives all of them.

    Raises:
        LoRKDError: no path, a folder that is not an expert bundle, or two experts of one name.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    if not paths:
        raise LoRKDError("expected at least one expert bundle, got none; name the folders after --experts")
    folders: list[Path] = []
    for path in map(Path, paths):
        inner = (
            [] if (path / "configs").exists() else sorted(p.parent.parent for p in path.glob("*/configs/metadata.json"))
        )
        folders += inner or [path]
    experts = [_read(folder) for folder in folders]
    seen: dict[str, Path] = {}
    for expert in experts:
        if expert.name in seen:
            raise LoRKDError(
                f"two experts are named {expert.name!r}: {seen[expert.name]} and {expert.folder}; leave one out, or "
                "rename its folder"
            )
        seen[expert.name] = expert.folder
    return experts


def copy_expert(expert: ExpertFolder, parent: Path) -> Path:
    """Copy the files that a server needs of a bundle into ``parent/NAME``, without links and results."""
    target = parent / expert.name
    for name in _COPIED:
        for source in [expert.folder / name, *sorted((expert.folder / name).rglob("*"))]:
            if source.is_file() and not source.is_symlink() and not source.name.startswith("."):
                copy = target / source.relative_to(expert.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
    return target
