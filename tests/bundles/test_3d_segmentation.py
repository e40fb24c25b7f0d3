"""The 3D segmentation bundle from end to end, and the geometry of what its experts write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from kinds import arguments, run_expert, run_kind
from monai.bundle import ConfigParser
from monai.data import decollate_batch
from scipy import ndimage

from lorkd_monai.bundle import check_bundle
from lorkd_monai.bundle.configs import default_inferer
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms
from lorkd_monai.transforms import preprocessing

TASKS = ["ct", "ultrasound", "mr"]
WINDOWS = {"ct": {"range": [-100.0, 155.5]}, "mr": {"percentiles": [2.0, 98.0]}}
SPACING = [1.25, 1.0, 1.5]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3D phantoms; the task `ct` has a window and a spacing of its own, `mr` percentiles, `ultrasound` no score."""
    folder = tmp_path_factory.mktemp("volumes")
    file = make_phantoms(folder, "segmentation", 3, num_images=10, image_size=16)
    content = json.loads(file.read_text())
    for task, intensity in WINDOWS.items():
        content["tasks"][task]["intensity"] = intensity
    content["tasks"]["ct"]["spacing"] = SPACING
    content["tasks"]["ultrasound"]["note"] = "two of one kind: for wiring, never for a score"
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(launch, volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a pretraining and a training."""
    output = tmp_path_factory.mktemp("trained_3d_segmentation") / "output"
    run_kind(launch, "3d_segmentation", "pretraining", volumes, output)
    run_kind(launch, "3d_segmentation", "training", volumes, output, rank="{ct: 1, ultrasound: 2, mr: 3}")
    return output


def expert_of(trained: Path, task: str) -> Path:
    return trained / "experts" / f"{task}_segmentation"


def test_what_a_run_leaves(trained):
    assert sorted(path.name for path in (trained / "experts").iterdir()) == sorted(f"{t}_segmentation" for t in TASKS)
    for task in TASKS:
        assert check_bundle(expert_of(trained, task)) == []
    assert load_decomposition(trained / "training" / "model.pt").spec()["rank"] == {"ct": 1, "ultrasound": 2, "mr": 3}


def test_a_task_for_wiring_is_measured_and_not_scored(launch, volumes, trained, tmp_path):
    output = Path(shutil.copytree(trained, tmp_path / "output"))
    done = run_kind(launch, "3d_segmentation", "evaluating", volumes, output, rank="{ct: 1, ultrasound: 2, mr: 3}")
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["ct", "mr", "mean of tasks", "ultrasound (no score: wiring only)"]
    figures = json.loads((output / "figures.json").read_text())["experts"]
    assert list(figures) == TASKS
    assert set(figures["ct"]) >= {"dice", "nsd", "hd95"}
    for task in TASKS:
        metadata = json.loads((expert_of(trained, task) / "configs" / "metadata.json").read_text())
        assert bool(metadata["eval_metrics"]) == (task != "ultrasound")


def test_window_and_spacing_of_the_list_are_the_expert_s(volumes, trained):
    spec = load_data_list(volumes, "segmentation", 3).tasks
    for task in TASKS:
        steps = json.loads((expert_of(trained, task) / "configs" / "inference.json").read_text())["preprocessing"]
        assert steps["transforms"] == preprocessing(spec[task], "segmentation", 3, 1, [16, 16, 8])
        by_name = {step["_target_"]: step for step in steps["transforms"]}
        assert by_name["Spacingd"]["pixdim"] == (SPACING if task == "ct" else list(spec[task].spacing))
        if task == "ct":
            scaling = by_name["ScaleIntensityRanged"]
            assert [scaling["a_min"], scaling["a_max"]] == WINDOWS["ct"]["range"]
        elif task == "mr":
            scaling = by_name["ScaleIntensityRangePercentilesd"]
            assert [scaling["lower"], scaling["upper"]] == WINDOWS["mr"]["percentiles"]


def oblique(volumes: Path, task: str, path: Path) -> nib.Nifti1Image:
    """A test image turned by 20° and 10° about two axes and resampled to voxels of 0.8 × 1.1 × 2.3 mm."""
    item = next(i for i in load_data_list(volumes, "segmentation", 3).test if i["task"] == task)
    source = nib.load(item["image"])
    a, b = np.deg2rad([20, 10])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    # The third axis runs the other way round and the first two are exchanged: nothing of it is RAS.
    axes = turn[:, [1, 0, 2]] * [0.8, 1.1, -2.3]
    shape = np.array([24, 18, 9])
    centre = source.affine[:3, :3] @ ((np.array(source.shape) - 1) / 2) + source.affine[:3, 3]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, centre - axes @ ((shape - 1) / 2)
    to_source = np.linalg.inv(source.affine) @ affine
    data = source.get_fdata()
    values = ndimage.affine_transform(
        data, to_source[:3, :3], to_source[:3, 3], tuple(shape), order=1, mode="constant", cval=data.min()
    )
    image = nib.Nifti1Image(values.astype(np.float32), affine)
    nib.save(image, path)
    return image


@pytest.mark.parametrize("task", ["ct", "mr"])
def test_oblique_anisotropic_image(task, launch, volumes, trained, tmp_path):
    (tmp_path / "images").mkdir()
    image = oblique(volumes, task, tmp_path / "images" / "turned.nii.gz")
    run_expert(launch, expert_of(trained, task), tmp_path / "images", tmp_path / "out", tmp_path)
    mask = nib.load(tmp_path / "out" / "turned_seg.nii.gz")
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)

    # The decomposed network itself, and the way back by the stock inverse of its own preprocessing.
    network = load_decomposition(trained / "training" / "model.pt").eval()
    spec = load_data_list(volumes, "segmentation", 3).tasks[task]
    parser = ConfigParser(
        {
            "forward": {"_target_": "Compose", "transforms": preprocessing(spec, "segmentation", 3, 1, [16, 16, 8])},
            "inferer": default_inferer("segmentation", (16, 16, 8)),
            "back": {"_target_": "Invertd", "keys": "pred", "transform": "@forward", "orig_keys": "image",
                     "nearest_interp": False, "to_tensor": True},
        }
    )  # fmt: skip
    item = parser.get_parsed_content("forward")({"image": str(tmp_path / "images" / "turned.nii.gz")})
    assert np.allclose(item["image"].pixdim, spec.spacing, atol=1e-3)
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(item["image"][None], network, torch.tensor([TASKS.index(task)]))
    item["pred"] = decollate_batch(logits[:, : spec.num_classes])[0]
    expected = parser.get_parsed_content("back")(item)["pred"].argmax(0)
    found = torch.from_numpy(np.asarray(mask.dataobj))
    assert tuple(expected.shape) == found.shape
    assert (found == expected).float().mean() > 0.999
    assert len(found.unique()) > 1


@pytest.mark.parametrize("task", TASKS)
def test_expert_and_inference_config_give_one_answer(task, launch, volumes, trained, tmp_path):
    image = next(i["image"] for i in load_data_list(volumes, "segmentation", 3).test if i["task"] == task)
    run_expert(launch, expert_of(trained, task), Path(image), tmp_path / "expert", tmp_path)
    run_kind(
        launch, "3d_segmentation", "run", Path(image), trained, config="inference.yaml", task=task,
        predictions_dir=tmp_path / "decomposed",
    )  # fmt: skip
    (one,), (other,) = ([nib.load(f) for f in (tmp_path / d).iterdir()] for d in ("expert", "decomposed"))
    assert (np.asarray(one.dataobj) != np.asarray(other.dataobj)).mean() < 0.001
    np.testing.assert_array_equal(one.affine, other.affine)


def test_inference_config_says_which_tasks_there_are(launch, volumes, trained):
    done = launch("monai.bundle", *arguments("3d_segmentation", "run", volumes, trained, config="inference.yaml"))
    assert done.code == 1
    assert "one of ct, ultrasound, mr" in done.message


FORMATS = ["nii", "nii.gz", "nrrd", "mha", "dicom"]


@pytest.fixture(scope="module")
def in_formats(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One `mr` test image, of whole numbers, in each format, with voxels of 1.5 × 0.75 × 2 mm."""
    itk = pytest.importorskip("itk")
    folder = tmp_path_factory.mktemp("formats")
    item = next(i for i in load_data_list(volumes, "segmentation", 3).test if i["task"] == "mr")
    values = nib.load(item["image"]).get_fdata().round().astype(np.int16)
    affine = np.diag([1.5, 0.75, 2.0, 1.0])
    affine[:3, 3] = [-10, 20, 5]
    paths = {"nii": folder / "a.nii", "nii.gz": folder / "b.nii.gz"}
    for path in paths.values():
        nib.save(nib.Nifti1Image(values, affine), path)
    image = itk.image_view_from_array(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing([1.5, 0.75, 2.0])
    image.SetOrigin([10, -20, 5])  # LPS
    image.SetDirection(itk.matrix_from_array(np.diag([-1.0, -1.0, 1.0])))
    for ending in ("nrrd", "mha"):
        paths[ending] = folder / f"c.{ending}"
        itk.imwrite(image, str(paths[ending]))
    paths["dicom"] = folder / "series"
    _write_series(values, affine, paths["dicom"])
    return paths


def _write_series(values: np.ndarray, affine: np.ndarray, folder: Path) -> None:
    """A CT-like DICOM series of axial slices, a file for each, by pydicom."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    to_lps = np.diag([-1.0, -1.0, 1.0])
    directions = to_lps @ affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    for k in range(values.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = pydicom.dataset.FileDataset(str(folder / f"{k}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.Modality, slice_.PatientID, slice_.SeriesNumber, slice_.InstanceNumber = "CT", "phantom", 1, k + 1
        slice_.ImagePositionPatient = list(map(float, to_lps @ (affine[:3, :3] @ [0, 0, k] + affine[:3, 3])))
        slice_.ImageOrientationPatient = [*map(float, directions[:, 0]), *map(float, directions[:, 1])]
        slice_.PixelSpacing, slice_.SliceThickness = [0.75, 1.5], 2.0  # rows are 0.75 mm apart, columns 1.5 mm
        slice_.Rows, slice_.Columns = values.shape[1], values.shape[0]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 1
        slice_.RescaleIntercept, slice_.RescaleSlope = 0, 1
        slice_.PixelData = np.ascontiguousarray(values[:, :, k].T).astype("<i2").tobytes()
        slice_.save_as(folder / f"{k}.dcm", enforce_file_format=True)


@pytest.mark.parametrize("name", FORMATS)
def test_format_in_the_data_list(name, in_formats, volumes, tmp_path):
    content = json.loads((volumes / "dataset.json").read_text())
    reference, path = str(in_formats["nii"]), str(in_formats[name])
    values = nib.load(reference)
    nib.save(nib.Nifti1Image((values.get_fdata() > 100).astype(np.uint8), values.affine), tmp_path / "mask.nii.gz")
    entry = {**content["tasks"]["mr"], "labels": {"0": "background", "1": "bright"}}
    items = {}
    for key, image in (("reference", reference), ("format", path)):
        folder = tmp_path / key
        folder.mkdir()
        rows = [{"image": image, "label": str(tmp_path / "mask.nii.gz"), "task": "mr"}]
        (folder / "dataset.json").write_text(json.dumps({"name": "x", "tasks": {"mr": entry}, "training": rows}))
        data = load_data_list(folder, "segmentation", 3)
        assert np.allclose(data.tasks["mr"].spacing, [1.5, 0.75, 2.0], atol=1e-3)
        items[key] = TaskDataset(data, "training", 1, [16, 16, 8], progress=False)[0]
    torch.testing.assert_close(items["format"]["image"], items["reference"]["image"], atol=1e-4, rtol=0)
    assert torch.equal(items["format"]["label"], items["reference"]["label"])


@pytest.mark.parametrize("name", FORMATS[1:])
def test_format_through_an_expert(name, launch, in_formats, trained, tmp_path):
    masks = []
    for key in ("nii", name):
        image, output = in_formats[key], tmp_path / f"out_{key}"
        run_expert(launch, expert_of(trained, "mr"), image, output, tmp_path)
        (file,) = output.iterdir()
        masks.append(nib.load(file))
    affines = [mask.affine for mask in masks]
    one, other = (np.asarray(nib.as_closest_canonical(mask).dataobj) for mask in masks)
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    assert (one != other).mean() < 0.001
    if name != "dicom":  # a reader of series may turn the axes; what it says of them is checked by the canonical form
        np.testing.assert_allclose(*affines, atol=1e-4)
    np.testing.assert_allclose(*(nib.as_closest_canonical(mask).affine for mask in masks), atol=1e-4)
