"""Writes one MONAI Deploy application that holds many experts."""

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
# What `monai-deploy package` takes; nothing of it names this machine.
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

    It holds copies of the experts (``models/``), the rules by which a study finds its expert (``routing.yaml``, to be
    checked by a person) and all its code: this package is not needed where it runs.

    Args:
        folder: to be made.
        experts: folders of expert bundles, or folders that hold some.
        overwrite: replace ``folder``; what a person changed in it is lost.

    Raises:
        LoRKDError: no expert, a folder that is none, two of one name, or ``folder`` exists.

    Example::

        write_deploy_app("app", ["output/experts"])
    """
    found = read_experts(experts)
    code = resources.files("lorkd_monai.apps.deploy.runtime")
    pins = found[0].metadata
    with bundle_folder(folder, overwrite, mark="routing.yaml") as temporary:
        (temporary / "lorkd_deploy").mkdir()
        for name in _MODULES:
            text = code.joinpath(f"{name}.py").read_text(encoding="utf-8")
            (temporary / "lorkd_deploy" / f"{name}.py").write_text(text, encoding="utf-8")
        (temporary / "app.py").write_text(code.joinpath("app.py").read_text(encoding="utf-8"), encoding="utf-8")
        (temporary / "app.yaml").write_text(_MANIFEST, encoding="utf-8")
        (temporary / "requirements.txt").write_text(
            _REQUIREMENTS.format(torch=pins["pytorch_version"], monai=pins["monai_version"]), encoding="utf-8"
        )
        (temporary / "routing.yaml").write_text(routing_text(found), encoding="utf-8")
        for expert in found:
            copy_expert(expert, temporary / "models")
    return Path(folder).absolute()
