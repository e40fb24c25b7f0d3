"""Writing a data list: never half of one, and never over another unless told to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lorkd_monai.data.datalist import counts_table, load_data_list
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file

_log = logging.getLogger(__name__)

__all__ = ["refuse_existing", "write_data_list"]


def refuse_existing(folder: Path, overwrite: bool) -> Path:
    """Return the path of the folder's ``dataset.json``; raise a `LoRKDError` if it exists and must not be replaced."""
    file = folder / "dataset.json"
    if folder.exists() and not folder.is_dir():
        raise LoRKDError(f"expected a folder to write the data list into, and {folder} is a file.")
    if file.exists() and not overwrite:
        raise LoRKDError(
            f"{file} already exists. Choose another folder, or allow it to be replaced: overwrite=True (--overwrite)."
        )
    return file


def write_data_list(
    folder: Path, content: dict[str, Any], overwrite: bool = False, check: tuple[str, int] | None = None
) -> Path:
    """Write ``content`` as the folder's ``dataset.json``, all of it or nothing, and return its path.

    What a list holds that was checked is logged as a table.

    Args:
        folder: is made if need be.
        content: what to write.
        overwrite: replace a list that is there.
        check: kind and spatial_dims for `load_data_list`, which must accept the list before it gets its name.

    Raises:
        LoRKDError: where one is there already and ``overwrite`` is False, or the check finds problems.
    """
    file = refuse_existing(folder, overwrite)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if check is not None:
                _log.info("%s", counts_table(load_data_list(temporary, *check)))
    except LoRKDError as error:
        if new:
            folder.rmdir()
        raise LoRKDError(str(error).replace(str(temporary), str(file))) from error
    return file
