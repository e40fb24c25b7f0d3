"""Write a MONAI Label app that serves expert bundles."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lorkd_monai.apps.expert_folders import copy_expert, read_experts
from lorkd_monai.bundle.writer import bundle_folder
from lorkd_monai.errors import LoRKDError

__all__ = ["write_label_app"]


def write_label_app(folder: str | Path, experts: Sequence[str | Path], overwrite: bool = False) -> Path:
    """Write an app folder for ``monailabel start_server --app FOLDER --studies IMAGES``.

    It holds copies of the experts, so training one further in MONAI Label does not change the original bundle. It
    needs MONAI Label but not this package.

    Args:
        folder: the app to write.
        experts: folders of expert bundles, or folders that hold some.
        overwrite: replace ``folder``; experts trained further in it are lost.

    Raises:
        LoRKDError: no expert, a folder that is not an expert bundle, two experts or two classes of one name, or
            ``folder`` exists.

    Example::

        write_label_app("app", ["output/experts"])
    """
    found = read_experts(experts)
    for expert in found:
        names = list(expert.classes.values())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise LoRKDError(
                f"{expert.name} has several classes named {', '.join(map(repr, twice))}; MONAI Label finds classes by "
                "their names: give each its own name in the data list and export again"
            )
    main = resources.files("lorkd_monai.apps.label").joinpath("server_app.py").read_text(encoding="utf-8")
    with bundle_folder(folder, overwrite, mark="main.py") as temporary:
        (temporary / "main.py").write_text(main, encoding="utf-8")
        for expert in found:
            copy_expert(expert, temporary / "model")
    return Path(folder).absolute()
