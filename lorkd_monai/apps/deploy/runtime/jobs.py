"""The jobs of an input folder: each series or file, and the experts that read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dicom import check_uid, tags_of
from .dicom_rules import RoutingError, Rule, choose, no_rule

__all__ = ["Job", "jobs_of_files", "jobs_of_series"]

_SUFFIXES = (".nii", ".nii.gz", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass
class Job:
    """One series (``source`` is the SDK's) or one image file, the experts for it, and the reason for them."""

    name: str
    source: Any
    experts: tuple[str, ...]
    reason: str
    tags: Mapping[str, str] = field(default_factory=dict)


def jobs_of_series(studies: Sequence[Any], rules: Sequence[Rule]) -> list[Job]:
    """Return a job for each series that matches one rule; ``studies`` are the SDK's `DICOMStudy`.

    A series that matches no rule (such as a localizer) is left out if another series of its study matches one.

    Raises:
        RoutingError: no series of a study matches a rule, or a series matches several rules.
    """
    jobs = []
    for study in studies:
        found, seen = [], []
        for series in study.get_all_series():
            instances = [item.get_native_sop_instance() for item in series.get_sop_instances()]
            if not any("Rows" in instance for instance in instances):
                continue
            uid = check_uid(series.get_series_instance_uid())
            tags = tags_of(instances[0])
            rule = choose(rules, tags, f"series {uid}")
            seen.append((f"series {uid}", tags))
            if rule is not None:
                found.append(Job(uid, series, rule.experts, str(rule), tags))
        if not found:
            raise no_rule(rules, seen or [(f"study {study.get_study_instance_uid()} (it holds no image)", {})])
        jobs += found
    return jobs


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]


def jobs_of_files(folder: Path, rules: Sequence[Rule], experts: Sequence[str]) -> list[Job]:
    """Return a job for each NIfTI, PNG, JPEG, BMP or TIFF file below ``folder``.

    A file in a folder named after an expert goes to that expert. Any other file needs its DICOM tags in a JSON file
    beside it, as dcm2niix writes them: ``scan.json`` for ``scan.nii.gz``.

    Raises:
        RoutingError: a file has neither, its tags match no rule or several, or two files would give one result.
    """
    jobs = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(_SUFFIXES)):
        name = "_".join((*path.relative_to(folder).parts[:-1], _stem(path)))
        beside = path.with_name(f"{_stem(path)}.json")
        if path.parent != folder and path.parent.name in experts:
            jobs.append(Job(name, path, (path.parent.name,), f"the folder {path.parent.name}"))
            continue
        if not beside.is_file():
            raise RoutingError(
                f"{path} has no DICOM tags: put it into a folder named after its expert ({', '.join(experts)}), or "
                f'write its tags beside it, into {beside.name}, such as {{"Modality": "CT"}}'
            )
        try:
            tags = json.loads(beside.read_text(encoding="utf-8"))
            tags = {str(key): str(value) for key, value in tags.items() if isinstance(value, (str, int, float))}
        except (ValueError, AttributeError) as error:
            raise RoutingError(f"{beside} cannot be read as the tags of {path.name}: {error}") from error
        rule = choose(rules, tags, str(path))
        if rule is None:
            raise no_rule(rules, [(str(path), tags)])
        jobs.append(Job(name, path, rule.experts, str(rule), tags))
    names = [job.name for job in jobs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise RoutingError(f"several files would give results of one name: {', '.join(sorted(twice))}; rename them")
    return jobs
