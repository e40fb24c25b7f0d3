"""The Deploy application with the real SDK: DICOM in, SEG and SR out, NIfTI in and out, unclear studies refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from app_cases import EXPERTS, clean_environ, tool_environment, write_picture, write_volume

from lorkd_monai.apps import write_deploy_app

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
BRAIN = {"Modality": "MR", "BodyPartExamined": "BRAIN", "SeriesDescription": "t1 axial"}


class Deploy:
    """The environment, the application, and images."""

    def __init__(self, python: Path, app: Path, images: Path) -> None:
        self.python, self.app, self.images = python, app, images

    def script(self, *arguments: Any) -> subprocess.CompletedProcess[str]:
        command = " ".join(["ulimit -s 32768;", "exec", '"$@"'])
        return subprocess.run(
            ["bash", "-c", command, "run", str(self.python), *map(str, arguments)],
            capture_output=True, text=True, check=False, env=clean_environ(), cwd=self.images, timeout=300,
        )  # fmt: skip

    def run(self, source: Path, output: Path) -> subprocess.CompletedProcess[str]:
        return self.script(self.app / "app.py", "-i", source, "-o", output)

    def dicom(self, folder: Path, *series: dict) -> Path:
        """Write DICOM series of images (``image`` may be a path here)."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = [{**item, "image": str(item["image"])} for item in series]
        (folder.parent / "spec.json").write_text(json.dumps(spec))
        done = self.script(HERE / "dicom_files.py", folder, folder.parent / "spec.json")
        assert done.returncode == 0, done.stderr
        return folder


@pytest.fixture(scope="module")
def deploy(repository: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    folder = tmp_path_factory.mktemp("deploy")
    app = write_deploy_app(folder / "app", [experts])
    images = folder / "images"
    write_volume(images / "volume.nii.gz")
    write_picture(images / "grey.png")
    return Deploy(tool_environment(repository, "deploy") / "bin" / "python", app, images)


_READ_SEG = """
import json, sys
from pathlib import Path
import highdicom, numpy, pydicom
path, = [p for p in Path(sys.argv[1]).rglob("*.dcm") if pydicom.dcmread(p).Modality == "SEG"]
seg = highdicom.seg.segread(path)
volume = seg.get_volume(combine_segments=True).to_patient_orientation("LPH")
numpy.savez(sys.argv[2], mask=volume.array, affine=volume.affine)
print(json.dumps([seg.get_segment_description(n).SegmentLabel for n in seg.segment_numbers]))
"""


def _on_axes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A mask and its affine in LPS mm, axes turned towards left, posterior, head."""
    image = nib.load(path)
    turned = nib.as_closest_canonical(image)
    mask, affine = np.asarray(turned.dataobj)[::-1, ::-1], turned.affine.copy()
    for axis in (0, 1):
        affine[:3, 3] += affine[:3, axis] * (mask.shape[axis] - 1)
        affine[:3, axis] *= -1
    return mask, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def test_dicom_and_nifti_give_the_same_voxels_and_every_series_its_expert(deploy: Deploy, tmp_path: Path) -> None:
    volume, grey = deploy.images / "volume.nii.gz", deploy.images / "grey.png"
    source = deploy.dicom(
        tmp_path / "dicom",
        {"folder": "a", "image": volume, "tags": BRAIN},
        {"folder": "b", "image": volume, "tags": {"Modality": "CT", "BodyPartExamined": "CHEST"}, "study": "two"},
        {"folder": "c", "image": grey, "tags": {"Modality": "DX", "BodyPartExamined": "CHEST"}, "study": "three"},
        # No rule is for it, and it is passed over: its study has a series with one.
        {"folder": "d", "image": volume, "tags": {"Modality": "MR", "SeriesDescription": "localizer"}},
    )
    done = deploy.run(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    # Two 3D networks of one architecture, a head more: hardly more memory than the largest of them.
    assert len(list((tmp_path / "out").iterdir())) == 3

    (tmp_path / "read.py").write_text(_READ_SEG)
    read = deploy.script(tmp_path / "read.py", tmp_path / "out", tmp_path / "seg.npz")
    assert read.returncode == 0, read.stderr[-3000:]
    assert json.loads(read.stdout) == EXPERTS["tumor"][5][1:]
    seg = np.load(tmp_path / "seg.npz")

    files = tmp_path / "nifti"
    files.mkdir()
    (files / "scan.nii.gz").write_bytes(volume.read_bytes())
    (files / "scan.json").write_text(json.dumps(BRAIN))
    (files / "vessel_segmentation").mkdir()
    (files / "vessel_segmentation" / "other.nii.gz").write_bytes(volume.read_bytes())
    done = deploy.run(files, tmp_path / "out2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out2" / "vessel_segmentation_other" / "vessel_segmentation.nii.gz").is_file()
    mask, affine = _on_axes(tmp_path / "out2" / "scan" / "tumor_segmentation.nii.gz")
    assert len(np.unique(mask)) == 3
    np.testing.assert_array_equal(seg["mask"], mask)
    np.testing.assert_allclose(seg["affine"], affine, atol=1e-4)

    reports = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")}
    assert set(reports) == {"nodule_classification", "lung_classification"}
    for name, report in reports.items():
        (image,) = report["images"]
        assert list(image["probabilities"]) == EXPERTS[name.split("_")[0]][5]
        assert abs(sum(image["probabilities"].values()) - 1) < 1e-4 and image["class"] in image["probabilities"]
    # A structured report and no SEG stands beside each.
    assert all(len(list(path.parent.glob("*.dcm"))) == 1 for path in (tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("tags", "rules", "message"),
    [
        ({"Modality": "PT", "BodyPartExamined": "BRAIN"}, None, "no rule of routing.yaml matches any of"),
        (BRAIN, "- {experts: [tumor_segmentation], match: {Modality: [MR]}}\n"
                "- {experts: [vessel_segmentation], match: {BodyPartExamined: [BRAIN]}}", "matches 2 rules"),
    ],
)  # fmt: skip
def test_a_study_that_no_rule_or_several_match_is_refused(
    deploy: Deploy, tmp_path: Path, tags: dict, rules: str | None, message: str
) -> None:
    source = deploy.dicom(tmp_path / "dicom", {"folder": "a", "image": deploy.images / "volume.nii.gz", "tags": tags})
    written = (deploy.app / "routing.yaml").read_text()
    try:
        if rules:
            (deploy.app / "routing.yaml").write_text(f"rules:\n{rules}\n")
        done = deploy.run(source, tmp_path / "out")
    finally:
        (deploy.app / "routing.yaml").write_text(written)
    assert done.returncode == 1 and "error: " in done.stderr and message in done.stderr
    assert tags["Modality"] in done.stderr
    assert not list(tmp_path.glob("out/*"))
