"""Write one MONAI Deploy application that holds many experts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lorkd_monai.apps.deploy.initial_rules import routing_text
from lorkd_monai.apps.expert_folders import copy_expert, read_experts
from lorkd_monai.bundle.writer import bundle_folder

__all__ = ["write_deploy_app"]

_MODULES = ("__init__", "dicom", "dicom_rules", "jobs", "operators", "shared_weights")
_REQUIREMENTS = """\
torch=={torch}
monai=={monai}
monai-deploy-app-sdk==4.0.0
holoscan-cu13==4.6.0
pydicom>=3,<4
highdicom
SimpleITK
nibabel
pillow
pyyaml
"""
# For `monai-deploy package`.
_MANIFEST = """\
application:
  title: LoRKD experts
  version: 0.1.0
  inputFormats: []
  outputFormats: []
resources:
  cpu: 1
  gpu: 0
  memory: 4Gi
"""


def write_deploy_app(folder: str | Path, experts: Sequence[str | Path], overwrite: bool = False) -> Path:
    """Write a folder that the MONAI Deploy App SDK runs: ``python FOLDER/app.py -i INPUT -o OUTPUT``.

    It holds copies of the experts (``models/``), the rules that choose the expert of a study (``routing.yaml``, which
    a person must check) and all its code. It does not need this package.

    Args:
        folder: the application to write.
        experts: folders of expert bundles, or folders that hold some.
        overwrite: replace ``folder``; changes made in it are lost.

    Raises:
        LoRKDError: no expert, a folder that is not an expert bundle, two experts of one name, or ``folder`` exists.

    Example::

        write_deploy_app("app", ["output/experts"])
    """
    found = read_experts(experts)
    code = resources.files("lorkd_monai.apps.deploy.runtime")
    pins = found[0].metadata
    files = {
        "app.py": code.joinpath("app.py").read_text(encoding="utf-8"),
        "app.yaml": _MANIFEST,
        "requirements.txt": _REQUIREMENTS.format(torch=pins["pytorch_version"], monai=pins["monai_version"]),
        "routing.yaml": routing_text(found),
    }
    for name in _MODULES:
        files[f"lorkd_deploy/{name}.py"] = code.joinpath(f"{name}.py").read_text(encoding="utf-8")
    with bundle_folder(folder, overwrite, mark="routing.yaml") as temporary:
        (temporary / "lorkd_deploy").mkdir()
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for expert in found:
            copy_expert(expert, temporary / "models")
    return Path(folder).absolute()
