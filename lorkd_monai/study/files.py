"""The files of a study: one JSON for each run, with the predictions beside it. Each appears in full or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file, read_json

__all__ = ["FORMAT", "RunFile", "read_runs", "write_json"]

FORMAT = 1
_PART = re.compile(r"[a-z0-9][a-z0-9_]*")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data, all at once."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunFile:
    """Where a run of a method, in a setting, with a seed, keeps what it found.

    Args:
        folder: of the study.
        setting: such as ``"full"``.
        method: its name.
        seed: a whole number.

    Raises:
        LoRKDError: a name that could lead elsewhere.
    """

    def __init__(self, folder: str | os.PathLike, setting: str, method: str, seed: int) -> None:
        for part in (setting, method):
            if not _PART.fullmatch(part):
                raise LoRKDError(f"names of settings and methods are made of a-z, 0-9 and _, got {part!r}")
        self.setting, self.method, self.seed = setting, method, int(seed)
        self.json = Path(folder) / "runs" / setting / method / f"seed{self.seed}.json"

    @property
    def arrays(self) -> Path:
        """The predictions."""
        return self.json.with_suffix(".npz")

    @property
    def weights(self) -> Path:
        """The weights, where they are kept."""
        return self.json.with_suffix(".pt")

    @property
    def done(self) -> bool:
        """Whether the run is finished: its JSON is written last."""
        return self.json.is_file() and self.arrays.is_file()

    def write(self, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write both files, the JSON last."""
        self.arrays.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.arrays) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        write_json(self.json, {"format": FORMAT, **content})

    def read(self) -> dict[str, Any]:
        """The JSON.

        Raises:
            LoRKDError: it is missing, broken, or of another form or run than its place says.
        """
        content = read_json(self.json)
        told = (content.get("format"), content.get("setting"), content.get("method"), content.get("seed"))
        expected = (FORMAT, self.setting, self.method, self.seed)
        if told != expected:
            raise LoRKDError(f"{self.json} says that it is {told}, expected (format, setting, method, seed) {expected}")
        return content

    def read_arrays(self) -> dict[str, np.ndarray]:
        """The predictions by name.

        Raises:
            LoRKDError: they are missing or broken.
        """
        try:
            with np.load(self.arrays, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise LoRKDError(f"{self.arrays} can't be read: {error}. Delete it and run the study again") from error


def read_runs(folder: str | os.PathLike) -> list[RunFile]:
    """The finished runs of a study, in the order of their names."""
    found = []
    for path in sorted(Path(folder).glob("runs/*/*/seed*.json")):
        number = path.stem.removeprefix("seed")
        if number.isdigit() and _PART.fullmatch(path.parent.name) and _PART.fullmatch(path.parent.parent.name):
            run = RunFile(folder, path.parent.parent.name, path.parent.name, int(number))
            if run.done:
                found.append(run)
    return found
