"""The operators of the application: route, run the experts, write their answers."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.deploy.core import Fragment, Operator, OperatorSpec
from monai.deploy.operators import DICOMSegmentationWriterOperator, DICOMTextSRWriterOperator
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from monai.deploy.operators.dicom_utils import ModelInfo
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from .dicom import volume
from .dicom_rules import RoutingError, Rule
from .jobs import Job, jobs_of_files, jobs_of_series
from .shared_weights import Expert, ExpertError, ExpertPool

__all__ = ["Answer", "ExpertOperator", "RouteOperator", "WriteOperator"]

NOTE = "Research only; not for clinical use."
_log = logging.getLogger("lorkd")


@dataclass
class Answer:
    """One expert's answer to one job: a mask (DICOM: slices × rows × columns), or probabilities for each image."""

    job: Job
    expert: Expert
    mask: np.ndarray | None = None
    affine: np.ndarray | None = None
    probabilities: list[list[float]] | None = None


class RouteOperator(Operator):
    """Make the list of jobs from the loaded studies and the image files of the folder.

    Named input: ``studies``, a list of DICOMStudy. Named output: ``jobs``.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, folder: Path, rules: list[Rule], experts: list[str], **kwargs: Any
    ):
        self.folder, self.rules, self.experts = folder, rules, experts
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("studies")
        spec.output("jobs")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        jobs = jobs_of_series(op_input.receive("studies"), self.rules)
        jobs += jobs_of_files(self.folder, self.rules, self.experts)
        if not jobs:
            raise RoutingError(f"there is no DICOM file, NIfTI file or picture in {self.folder}")
        for job in jobs:
            _log.info("%s goes to %s", job.name, " + ".join(job.experts))
        op_output.emit(jobs, "jobs")


class ExpertOperator(Operator):
    """Run the experts, all jobs of one expert together. Named input: ``jobs``; named output: ``answers``."""

    def __init__(self, fragment: Fragment, *args: Any, pool: ExpertPool, **kwargs: Any):
        self.pool = pool
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("jobs")
        spec.output("answers")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        jobs, answers = op_input.receive("jobs"), []
        for name in sorted({name for job in jobs for name in job.experts}):
            with self.pool.use(name) as (expert, network):
                for job in (job for job in jobs if name in job.experts):
                    try:
                        answers.append(_answer(job, expert, network))
                    except ExpertError as error:
                        raise ExpertError(f"{job.name}, read by {name}: {error}") from error
        _log.info("%d experts in %.1f MiB", len(self.pool.experts), self.pool.bytes() / 2**20)
        op_output.emit(answers, "answers")


def _answer(job: Job, expert: Expert, network: torch.nn.Module) -> Answer:
    if isinstance(job.source, Path):
        image = expert.load(job.source)
        # A mask has the spatial axes only, even if the file has a channel axis.
        result = expert.predict(network, image)
        if not expert.is_segmentation:
            return Answer(job, expert, probabilities=[result.tolist()])
        return Answer(job, expert, mask=result.numpy().astype(np.uint8), affine=image.affine.numpy())
    instances = [item.get_native_sop_instance() for item in job.source.get_sop_instances()]
    if expert.spatial_dims == 3:
        image, order = volume(instances)
        # The writer pairs frames and instances by their order.
        job.source._sop_instances = [job.source.get_sop_instances()[i] for i in order]
        result = expert.predict(network, image)
        if not expert.is_segmentation:
            return Answer(job, expert, probabilities=[result.tolist()])
        return Answer(job, expert, mask=result.numpy().astype(np.uint8).transpose(2, 1, 0))
    results = [expert.predict(network, expert.load_dicom(instance.filename)) for instance in instances]
    if not expert.is_segmentation:
        return Answer(job, expert, probabilities=[result.tolist() for result in results])
    return Answer(job, expert, mask=torch.stack(results).numpy().astype(np.uint8))


class WriteOperator(Operator):
    """Write each answer below ``output``: masks as DICOM SEG, NIfTI or PNG, classes as JSON and DICOM SR.

    Named input: ``answers``.
    """

    def __init__(self, fragment: Fragment, *args: Any, output: Path, **kwargs: Any):
        # Not "fragment": the operators of the SDK have an attribute of that name.
        self.owner, self.output = fragment, output
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("answers")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        answers = op_input.receive("answers")
        for answer in answers:
            if (self.output / answer.job.name).exists():
                raise RoutingError(
                    f"{self.output / answer.job.name} exists already, from another run: give an output folder (-o) "
                    "without it"
                )
        for number, answer in enumerate(answers):
            folder = self.output / answer.job.name
            folder.mkdir(parents=True, exist_ok=True)
            from_dicom = not isinstance(answer.job.source, Path)
            if answer.mask is not None and from_dicom:
                self._write_segmentation(answer, folder, number)
            elif answer.mask is not None:
                _write_mask(answer, folder)
            else:
                text = json.dumps(report(answer), indent=2, ensure_ascii=False)
                _write_text(folder / f"{answer.expert.name}.json", text + "\n")
                if from_dicom:
                    self._write_report(answer, folder, number)

    def _model(self, expert: Expert) -> ModelInfo:
        return ModelInfo("lorkd-monai", expert.name[:64], str(expert.metadata["version"])[:64], "")

    def _write_segmentation(self, answer: Answer, folder: Path, number: int) -> None:
        expert = answer.expert
        segments = [
            SegmentDescription(
                segment_label=text[:64],
                segmented_property_category=codes.SCT.AnatomicalStructure,
                # The bundle has only a name for the class, so the code is our own.
                segmented_property_type=Code(str(index), "99LORKD", text[:64]),
                algorithm_name=expert.name[:64],
                algorithm_version=str(expert.metadata["version"])[:64],
            )
            for index, text in sorted(expert.classes.items())
            if index > 0
        ]
        writer = DICOMSegmentationWriterOperator(
            self.owner, segment_descriptions=segments, output_folder=folder, model_info=self._model(expert),
            custom_tags={"SeriesDescription": f"{expert.name}. {NOTE}"[:64]}, name=f"segmentation_{number}",
        )  # fmt: skip
        writer.create_dicom_seg(answer.mask, answer.job.source, folder)

    def _write_report(self, answer: Answer, folder: Path, number: int) -> None:
        found, title = report(answer), f"{answer.expert.name}. {NOTE}"[:64]
        lines = [f"{found['expert']} {found['version']}. {NOTE}"]
        for image in found["images"]:
            listed = ", ".join(f"{name} {value:.3f}" for name, value in image["probabilities"].items())
            lines.append(f"{image['image']}: {image['class']} ({listed})")
        writer = DICOMTextSRWriterOperator(
            self.owner, output_folder=folder, model_info=self._model(answer.expert),
            custom_tags={"SeriesDescription": title, "SpecificCharacterSet": "ISO_IR 192"}, name=f"report_{number}",
        )  # fmt: skip
        writer.write("\n".join(lines), answer.job.source, folder)


def report(answer: Answer) -> dict[str, Any]:
    """A classification as JSON data: what was read, by which expert, why, and the probability of each class."""
    job, expert = answer.job, answer.expert
    if isinstance(job.source, Path):
        images = [job.source.name]
    elif len(answer.probabilities or []) == 1 and expert.spatial_dims == 3:
        images = [job.name]
    else:
        images = [str(item.get_native_sop_instance().SOPInstanceUID) for item in job.source.get_sop_instances()]
    found = []
    for image, values in zip(images, answer.probabilities or [], strict=True):
        best = int(np.argmax(values))
        named = {expert.classes[i]: round(float(value), 6) for i, value in enumerate(values)}
        found.append({"image": image, "class": expert.classes[best], "class_index": best, "probabilities": named})
    return {
        "expert": expert.name, "version": str(expert.metadata["version"]), "chosen_by": job.reason,
        "tags": dict(job.tags), "images": found, "note": NOTE,
    }  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_mask(answer: Answer, folder: Path) -> None:
    suffix = ".nii.gz" if answer.expert.spatial_dims == 3 else ".png"
    path, temporary = folder / f"{answer.expert.name}{suffix}", folder / f".part{suffix}"
    if suffix == ".png":
        Image.fromarray(answer.mask).save(temporary)
    else:
        nibabel.save(nibabel.Nifti1Image(answer.mask, answer.affine), temporary)
    os.replace(temporary, path)
