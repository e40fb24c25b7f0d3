"""The first routing.yaml of an exported application, from each task's modality and body part."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

import yaml

from lorkd_monai.apps.expert_folders import ExpertFolder

__all__ = ["dicom_modalities", "routing_text"]

# Codes of DICOM (PS3.3 C.7.3.1.1.1), and what data lists call them.
_NAMES = {
    "CT": "ct, computed tomography",
    "MR": "mr, mri, magnetic resonance",
    "US": "us, ultrasound",
    "CR DX": "xray, x ray, radiograph, radiography",
    "CR": "cr",
    "DX": "dx",
    "MG": "mg, mammography, mammogram",
    "PT": "pt, pet",
    "NM": "nm",
    "XA": "xa, angiography",
    "ES": "es, endoscopy",
    "OP": "op, fundus, fundus photography",
    "OPT": "opt, oct, optical coherence tomography",
    "SM": "sm, histopathology, pathology",
    "GM": "gm, microscopy",
    "XC": "xc, photography",
    "DMS": "dms, dermoscopy, dermatoscopy",
}
_CODES = {name: codes.split() for codes, names in _NAMES.items() for name in names.split(", ")}

_HEAD = """\
# Which expert reads which DICOM series. A series goes to the experts of the ONE rule that it matches. If it matches
# no rule, or several, the application stops and says so.
#
# A rule's match names DICOM tags and, for each tag, one or more texts. A series matches if it has every tag of the
# rule, and each tag fits one of its texts (in any case; * stands for any characters). An empty match matches nothing.
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
    """Return the DICOM codes of a data list's modality; none if it is unknown."""
    words = " ".join(str(text or "").replace("-", " ").replace("_", " ").split()).casefold()
    return list(_CODES.get(words, []))


def _match(expert: ExpertFolder) -> dict[str, list[str]]:
    match: dict[str, list[str]] = {}
    modalities = dicom_modalities(expert.input.get("modality"))
    if modalities:
        match["Modality"] = modalities
        body_part = " ".join(str(expert.metadata.get("body_part") or "").split())
        # The text of a data list is no pattern.
        if body_part:
            match["BodyPartExamined"] = [glob.escape(body_part.upper())]
    return match


def routing_text(experts: Sequence[ExpertFolder]) -> str:
    """Return routing.yaml with one rule for each expert; its match is empty if the modality is unknown.

    Experts of the same modality and body part get rules that match the same series: a person decides between them.
    """
    rules: list[dict[str, Any]] = [{"experts": [expert.name], "match": _match(expert)} for expert in experts]
    return _HEAD + yaml.safe_dump({"rules": rules}, sort_keys=False, allow_unicode=True, default_flow_style=None)
