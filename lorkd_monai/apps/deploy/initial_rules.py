"""The routing.yaml that an exported application starts with, from what the data list said of each task."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

import yaml

from lorkd_monai.apps.expert_folders import ExpertFolder

__all__ = ["dicom_modalities", "routing_text"]

# What people write in data lists -> the codes of DICOM (PS3.3 C.7.3.1.1.1).
_MODALITIES = {
    "ct": ["CT"],
    "computed tomography": ["CT"],
    "mr": ["MR"],
    "mri": ["MR"],
    "magnetic resonance": ["MR"],
    "us": ["US"],
    "ultrasound": ["US"],
    "xray": ["CR", "DX"],
    "x ray": ["CR", "DX"],
    "radiograph": ["CR", "DX"],
    "radiography": ["CR", "DX"],
    "cr": ["CR"],
    "dx": ["DX"],
    "mg": ["MG"],
    "mammography": ["MG"],
    "mammogram": ["MG"],
    "pt": ["PT"],
    "pet": ["PT"],
    "nm": ["NM"],
    "xa": ["XA"],
    "angiography": ["XA"],
    "es": ["ES"],
    "endoscopy": ["ES"],
    "op": ["OP"],
    "fundus": ["OP"],
    "fundus photography": ["OP"],
    "opt": ["OPT"],
    "oct": ["OPT"],
    "optical coherence tomography": ["OPT"],
    "sm": ["SM"],
    "histopathology": ["SM"],
    "pathology": ["SM"],
    "gm": ["GM"],
    "microscopy": ["GM"],
    "xc": ["XC"],
    "photography": ["XC"],
    "dermoscopy": ["DMS"],
    "dermatoscopy": ["DMS"],
    "dms": ["DMS"],
}

_HEAD = """\
# Which expert reads which DICOM series. A series goes to the experts of the ONE rule that it matches; where it
# matches none, or several, the application stops and says so.
#
# A rule's match names DICOM tags and for each of them one or more texts, of which one must fit (in any case;
# * stands for any characters). All tags of a rule must fit, and be there. A rule with an empty match is for nothing.
# The tags: Modality, BodyPartExamined, SeriesDescription, StudyDescription, ProtocolName.
#
# To run several experts on the same series, name them in one rule:
#
#   - experts: [spleen_segmentation, liver_segmentation]
#     match:
#       Modality: [CT]
#       BodyPartExamined: [ABDOMEN]
#       SeriesDescription: ["*portal*"]
#
# These rules were written from each task's modality and body part in its data list. Check them against the tags of
# your own scanners before you rely on them.
"""


def dicom_modalities(text: str | None) -> list[str]:
    """Return the DICOM codes that a data list's modality stands for; none where it is unknown."""
    words = " ".join(str(text or "").replace("-", " ").replace("_", " ").split()).casefold()
    return list(_MODALITIES.get(words, []))


def _match(expert: ExpertFolder) -> dict[str, list[str]]:
    match: dict[str, list[str]] = {}
    modalities = dicom_modalities(expert.input.get("modality"))
    if modalities:
        match["Modality"] = modalities
        body_part = " ".join(str(expert.metadata.get("body_part") or "").split())
        # Text of the data list is a text here too, never a pattern.
        if body_part:
            match["BodyPartExamined"] = [glob.escape(body_part.upper())]
    return match


def routing_text(experts: Sequence[ExpertFolder]) -> str:
    """Return routing.yaml with one rule for each expert; empty where its modality is unknown.

    Experts of the same modality and body part get rules that match the same series: which one, or both, a person says.
    """
    rules: list[dict[str, Any]] = [{"experts": [expert.name], "match": _match(expert)} for expert in experts]
    return _HEAD + yaml.safe_dump({"rules": rules}, sort_keys=False, allow_unicode=True, default_flow_style=None)
