"""Making a data list and writing it: completely or not at all, and over another one only if asked to."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorkd_monai.checks import as_path
from lorkd_monai.data.datalist import counts_table, load_data_list
from lorkd_monai.data.form import SPLITS
from lorkd_monai.data.splitting import Row
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file
from lorkd_monai.locks import claimed
from lorkd_monai.tasks import check_kind

_log = logging.getLogger(__name__)

__all__ = ["NewList", "Skipped", "new_folder", "new_list", "relative_path", "write_data_list"]


class Skipped:
    """What a builder of lists left out: paths by the reason."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, reason: str, path: str | Path) -> None:
        """Note one file or folder."""
        self.paths.setdefault(reason, []).append(str(path))

    def tell(self) -> None:
        """Log one line for each reason, with a count and examples; once."""
        for reason, paths in self.paths.items():
            more = ", …" if len(paths) > 3 else ""
            _log.warning("skipped %d: %s (%s%s)", len(paths), reason, ", ".join(paths[:3]), more)
        self.paths.clear()


@dataclass
class NewList:
    """A data list that is being made: its tasks as in the file, its images, and what was left out."""

    folder: Path
    kind: str
    spatial_dims: int
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)

    def write(self, facts: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the list, with paths relative to its folder, and return the path of its ``dataset.json``.

        Args:
            facts: more about a task, as ``{task: {"modality": "US"}}``.

        Raises:
            LoRKDError: for facts of an unknown task, or what `load_data_list` refuses.
        """
        self.skipped.tell()
        given = {} if facts is None else facts
        if not (isinstance(given, Mapping) and all(isinstance(more, Mapping) for more in given.values())):
            raise LoRKDError(f'facts: expected {{task: {{"modality": "US", …}}}}, got {facts!r}')
        for name, more in given.items():
            if name not in self.tasks:
                raise LoRKDError(f"facts of an unknown task {name!r}; the tasks are {', '.join(self.tasks)}.")
            self.tasks[name].update(more)
        content: dict[str, Any] = {
            "name": self.folder.resolve().name, "kind": self.kind, "spatial_dims": self.spatial_dims,
            "tasks": self.tasks, **{split: [] for split in SPLITS},
        }  # fmt: skip
        for row in self.rows:
            paths = {key: relative_path(getattr(row, key), self.folder) for key in ("image", "label")}
            content[str(row.split)].append({**paths, "task": row.task})
        return write_data_list(self.folder, content, (self.kind, self.spatial_dims))


@contextmanager
def new_list(output: str | os.PathLike, kind: str, spatial_dims: int, overwrite: bool) -> Iterator[NewList]:
    """Give an empty list to fill and write, in a `new_folder`; what was left out is logged in any case.

    Raises:
        LoRKDError: for an unknown kind or spatial_dims, no path, or as `new_folder`.
    """
    check_kind(kind, spatial_dims)
    folder = as_path(output, "output")
    with new_folder(folder, overwrite):
        new = NewList(folder, kind, spatial_dims)
        try:
            yield new
        finally:
            new.skipped.tell()


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Keep other processes out of the folder that a data list is made in; it is made where it is missing.

    Where the block raises and the folder was made for it, the folder is deleted again unless something is in it.

    Raises:
        LoRKDError: another process makes a list there; a list is there and ``overwrite`` is False; it is a file.
    """
    _refuse_existing(folder, overwrite)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with claimed(folder, "Wait until it has ended, or name another folder."):
            _refuse_existing(folder, overwrite)  # another process may have ended just now
            yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # it holds something, such as files that were fetched
                folder.rmdir()
        raise


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LoRKDError(f"expected a folder to write the data list into, and {folder} is a file.")
    file = folder / "dataset.json"
    if file.exists() and not overwrite:
        raise LoRKDError(
            f"{file} already exists. Choose another folder, or allow it to be replaced: overwrite=True (--overwrite)."
        )


def write_data_list(folder: Path, content: dict[str, Any], check: tuple[str, int] | None = None) -> Path:
    """Write ``content`` as the ``dataset.json`` of a `new_folder`, all of it or nothing, and return its path.

    Args:
        folder: where to write.
        content: what to write.
        check: kind and spatial_dims for `load_data_list`, which must accept the list before it gets its name. Its
            counts are then logged as a table.

    Raises:
        LoRKDError: the check finds problems.
    """
    file = folder / "dataset.json"
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if check is not None:
            try:
                _log.info("%s", counts_table(load_data_list(temporary, *check)))
            except LoRKDError as error:
                raise LoRKDError(str(error).replace(str(temporary), str(file))) from error
    return file


def relative_path(value: Any, folder: Path) -> Any:
    """Return a path, or a list of them, as it is written in a list in ``folder``; class ids stay as they are."""
    if isinstance(value, list):
        return [relative_path(part, folder) for part in value]
    if not isinstance(value, str):
        return value
    try:
        return Path(os.path.relpath(value, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return value
