"""What the checks of a bundle share: the faults that they find, and the files that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BundleFiles", "Problem"]


@dataclass(frozen=True)
class Problem:
    """One fault of a bundle: a short ``code``, the ``file`` it is in, what is wrong, and what to do."""

    code: str
    file: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}; {self.fix} [{self.code}]"


@dataclass
class BundleFiles:
    """A bundle's folder with what was read of it; a file that cannot be read is absent from ``json``."""

    folder: Path
    name: str
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        return self.json.get("configs/metadata.json", {})

    @property
    def inference(self) -> dict[str, Any]:
        return self.json.get("configs/inference.json", {})

    def tensor(self, side: str, name: str) -> Mapping[str, Any]:
        item = self.metadata.get("network_data_format", {})
        for key in (side, name):
            item = item.get(key, {}) if isinstance(item, Mapping) else {}
        return item if isinstance(item, Mapping) else {}

    @property
    def readable(self) -> bool:
        """True where the network can be built and its input is known."""
        inputs = self.tensor("inputs", "image")
        shape, channels = inputs.get("spatial_shape"), inputs.get("num_channels")
        known = isinstance(shape, list) and shape and all(isinstance(n, int) and n > 0 for n in (*shape, channels))
        return bool(self.inference.get("network_def")) and bool(known)
