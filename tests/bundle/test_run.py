"""Every kind of expert runs with stock MONAI's commands, from any working directory, without this package."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_pictures import write_picture
from monai.bundle import ConfigParser
from PIL import Image

from lorkd_monai.bundle.formats import build_network
from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import ItemLoader, describe_image


def write_series(folder: Path, ending: str, series: list[str]) -> None:
    """Write DICOM series of ten slices each into one folder."""
    for uid in series:
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 1000, (12, 9)).astype(np.int16)
            place = {"ImagePositionPatient": [0, 0, 2 * i], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
            uids = {"SeriesInstanceUID": f"1.2.9.{uid}", "StudyInstanceUID": "1.2.9", "InstanceNumber": i + 1}
            write_picture(folder / f"{uid}-{i}{ending}", pixels, PixelSpacing=[1, 1], Modality="CT", **place, **uids)


KINDS = ("2d_classification", "3d_classification", "2d_segmentation", "3d_segmentation")

# Runs `python -m monai.bundle` where importing this package fails, as it does on a machine that has only MONAI.
WITHOUT_US = """
import sys, runpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorkd_monai":
            raise ImportError("lorkd_monai is not installed here")
sys.meta_path.insert(0, Refuse())
sys.argv = ["monai.bundle", *sys.argv[1:]]
runpy.run_module("monai.bundle", run_name="__main__")
"""


def monai_bundle(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_US, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def run_here(config_files: list[Path], **overrides: Any) -> None:
    """The same as the command, in this process: a second saved for each of many runs."""
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow([str(path) for path in config_files], logging_file=False, workflow_type=None, **overrides)
    workflow.initialize()
    workflow.run()


def prepared(case: Any, image: Path) -> torch.Tensor:
    steps = {"_target_": "Compose", "transforms": case.arguments["preprocessing"]}
    transform = ConfigParser({"steps": json.loads(json.dumps(steps))}).get_parsed_content("steps")
    return transform({"image": str(image)})["image"]


@pytest.mark.parametrize("case", ["2d_classification", "3d_classification"], indirect=True)
def test_classification_writes_probabilities(case, tmp_path, write_images, monkeypatch):
    images = write_images(tmp_path / "images", case.arguments["spatial_dims"])
    monkeypatch.chdir(tmp_path)
    config = case.folder / "configs" / "inference.json"
    run_here([config], bundle_root=str(case.folder), dataset_dir=str(tmp_path / "images"), output_dir="out")
    rows = list(csv.reader((tmp_path / "out" / "predictions.csv").open()))
    assert rows[0] == ["file", "benign", "malignant", "other", "class"]
    assert [row[0] for row in rows[1:]] == [str(path) for path in images]
    for row, path in zip(rows[1:], images, strict=True):
        with torch.no_grad():
            expected = case.network(prepared(case, path)[None].as_tensor()).softmax(1)[0]
        assert np.allclose([float(value) for value in row[1:4]], expected, atol=1e-5)
        assert int(float(row[4])) == int(expected.argmax())


@pytest.mark.parametrize("case", ["2d_segmentation", "3d_segmentation"], indirect=True)
def test_segmentation_keeps_the_geometry(case, tmp_path, write_images, monkeypatch):
    images = write_images(tmp_path / "images", case.arguments["spatial_dims"], count=1)
    monkeypatch.chdir(tmp_path)
    config = case.folder / "configs" / "inference.json"
    run_here([config], bundle_root=str(case.folder), dataset_dir=str(images[0]), output_dir="out")
    (written,) = (tmp_path / "out").iterdir()
    if written.suffix == ".png":
        mask = np.asarray(Image.open(written))
        assert mask.shape == np.asarray(Image.open(images[0])).shape
    else:
        volume, given = nib.load(written), nib.load(images[0])
        assert np.allclose(volume.affine, given.affine, atol=1e-4)
        assert volume.shape == given.shape
        mask = np.asarray(volume.dataobj)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


SAME_NAMES = [
    # images -> their outputs
    (["a/ct.nii.gz", "b/ct.nii.gz"], ["a_ct_seg.nii.gz", "b_ct_seg.nii.gz"]),
    (["ct.nii", "ct.nii.gz", "mr.nii.gz"], ["ct.nii.gz_seg.nii.gz", "ct.nii_seg.nii.gz", "mr_seg.nii.gz"]),
    (["a/x/ct.nii", "b/x/ct.nii", "b/x/ct.nii.gz"],
     ["a_x_ct_seg.nii.gz", "b_x_ct.nii.gz_seg.nii.gz", "b_x_ct.nii_seg.nii.gz"]),
    (["v1.2.nii.gz", "1.2.840.nii", "1.2.841.nii"], ["1.2.840_seg.nii.gz", "1.2.841_seg.nii.gz", "v1.2_seg.nii.gz"]),
    (["a/p.png", "a/p.jpg", "a/q.png"], ["p.jpg_seg.png", "p.png_seg.png", "q_seg.png"]),
    (["a/p.png", "b/p.PNG"], ["a_p_seg.png", "b_p_seg.png"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), SAME_NAMES)
def test_images_of_one_name_give_one_output_each(names, expected, make_case, tmp_path, monkeypatch):
    dims = 3 if ".nii" in names[0] else 2
    case = make_case(f"{dims}d_segmentation")
    for shade, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if dims == 3:
            nib.save(nib.Nifti1Image(np.full((9, 8, 7 + shade), shade, np.int16), np.eye(4)), tmp_path / name)
        else:
            Image.fromarray(np.full((20 + shade, 24), 50 * shade, np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    config = case.folder / "configs" / "inference.json"
    run_here([config], bundle_root=str(case.folder), images=names, output_dir="out")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(expected)
    # Each of its own image: their sizes differ.
    assert len({nib.load(p).shape if dims == 3 else Image.open(p).size for p in Path("out").iterdir()}) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_run_wrote_is_replaced_only_when_asked(kind, make_case, write_images, tmp_path, monkeypatch):
    case, dims = make_case(kind), int(kind[0])
    for folder in "ab":
        write_images(tmp_path / folder, dims, count=1)
    monkeypatch.chdir(tmp_path)
    config = [case.folder / "configs" / "inference.json"]
    places = {"bundle_root": str(case.folder), "output_dir": "out"}
    run_here(config, dataset_dir="a", **places)
    (first,) = Path("out").iterdir()
    before = first.read_bytes()
    with pytest.raises(SystemExit, match=f"error: '?.*{first.name}' is there already.*--overwrite true"):
        run_here(config, dataset_dir="b", **places)
    assert [path.read_bytes() for path in Path("out").iterdir()] == [before]
    run_here(config, dataset_dir="b", overwrite=True, **places)
    assert [path.name for path in Path("out").iterdir()] == [first.name]


@pytest.mark.parametrize("kind", ["2d_classification", "2d_segmentation"])
def test_an_image_that_is_given_twice_is_refused_before_anything_is_written(kind, make_case, write_images, tmp_path):
    case = make_case(kind)
    (path,) = write_images(tmp_path / "images", 2, count=1)
    with pytest.raises(SystemExit, match="error: .*image 0.*twice: expected each image once"):
        run_here(
            [case.folder / "configs" / "inference.json"],
            bundle_root=str(case.folder), images=[str(path), str(path)], output_dir=str(tmp_path / "out"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_predictions_tell_images_apart_whatever_they_are_called(make_case, tmp_path):
    case = make_case("2d_classification")
    names = ["a/p.png", "b/p.png", "b/p.jpg", "x,y.png", 'say "x".png', "é b.png"]
    for shade, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24), 40 * shade, np.uint8)).save(tmp_path / "images" / name)
    paths = [str(tmp_path / "images" / name) for name in names]
    run_here(
        [case.folder / "configs" / "inference.json"],
        bundle_root=str(case.folder), images=paths, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    rows = list(csv.reader((tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8")))
    assert [row[0] for row in rows[1:]] == paths
    assert {len(row) for row in rows} == {5}


def test_command_line_without_this_package(make_case, tmp_path, write_images):
    case = make_case("2d_classification")
    folder = shutil.copytree(case.folder, tmp_path / "elsewhere" / case.folder.name)
    write_images(tmp_path / "images", 2, count=1)
    done = monai_bundle(
        "run", "--bundle_root", folder, "--config_file", folder / "configs" / "inference.json",
        "--dataset_dir", tmp_path / "images", "--output_dir", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "predictions.csv").is_file()


def test_no_images_is_one_message(make_case, tmp_path):
    case = make_case("2d_classification")
    with pytest.raises(SystemExit, match="no image in .*nothing.*expected --dataset_dir"):
        run_here(
            [case.folder / "configs" / "inference.json"],
            bundle_root=str(case.folder),
            dataset_dir=str(tmp_path / "nothing"),
        )


def test_a_damaged_image_is_one_message_and_its_run_can_be_repeated(make_case, tmp_path, write_images):
    case = make_case("2d_classification")
    (path,) = write_images(tmp_path / "images", 2, count=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    command = [
        "run", "--bundle_root", case.folder, "--config_file", case.folder / "configs" / "inference.json",
        "--dataset_dir", tmp_path / "images", "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    done = monai_bundle(*command, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    assert len(errors) == 1 and errors[0].startswith(f"error: cannot read {path}: "), done.stderr
    path.write_bytes(whole)
    assert monai_bundle(*command, cwd=tmp_path).returncode == 0
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 2


def test_pictures_without_a_suffix_are_taken_and_what_is_left_out_is_told(make_case, tmp_path, write_images, caplog):
    case = make_case("2d_classification")
    (path,) = write_images(tmp_path / "images", 2, count=1)
    shutil.copy(path, tmp_path / "images" / "scan")
    (tmp_path / "images" / "notes").write_text("no picture")
    (tmp_path / "images" / "list.txt").write_text("no picture")
    run_here(
        [case.folder / "configs" / "inference.json"],
        bundle_root=str(case.folder), dataset_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 3
    assert [r.getMessage() for r in caplog.records if "left out" in r.getMessage()] == [
        f"left out 2 of {tmp_path / 'images'}, no images as expected here: list.txt, notes"
    ]


def test_a_wrong_bundle_root_is_one_message(make_case, tmp_path):
    case = make_case("2d_classification")
    with pytest.raises(SystemExit, match="no weights at .*expected --bundle_root"):
        run_here([case.folder / "configs" / "inference.json"], bundle_root=str(tmp_path))


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_training_and_evaluating_go_on_from_the_expert(case, tmp_path, write_images, write_masks):
    dims, kind = case.arguments["spatial_dims"], case.arguments["kind"]
    images = write_images(tmp_path / "data" / "images", dims, count=3)
    labels = [str(path) for path in write_masks(images, tmp_path / "data" / "labels")]
    labels = labels if kind == "segmentation" else [0, 1, 2]
    items = [{"image": str(image), "label": label} for image, label in zip(images, labels, strict=True)]
    other = [{"image": "missing.png", "label": 0, "task": "another"}]
    data_list = {"training": items + other, "validation": items, "test": items}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(data_list))
    configs, root = case.folder / "configs", str(case.folder)
    places = {"dataset_dir": str(tmp_path / "data"), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path / "eval")}
    run_here([configs / "train.json"], bundle_root=root, max_epochs=1, learning_rate=0.01, **places)
    trained = torch.load(tmp_path / "model.pt", weights_only=True)
    before = case.network.state_dict()
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[key], before[key]) for key in before)
    run_here([configs / "train.json", configs / "evaluate.json"], bundle_root=root, **places)
    written = (tmp_path / "eval" / "metrics.csv").read_text()
    assert ("val_mean_dice" if kind == "segmentation" else "val_balanced_accuracy") in written


def test_a_network_with_deep_supervision_trains_on(make_case, tmp_path, write_images, write_masks):
    case = make_case("2d_segmentation")
    layers = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}
    shape = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "deep_supervision": True, "deep_supr_num": 1}
    config = {"_target_": "DynUNet", **shape, **layers}
    folder = case.write(
        tmp_path / "a_segmentation", network=build_network(config), network_config=config, formats=("pt",)
    )
    images = write_images(tmp_path / "data" / "images", 2)
    masks = write_masks(images, tmp_path / "data" / "labels")
    items = [{"image": str(image), "label": str(mask)} for image, mask in zip(images, masks, strict=True)]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"training": items, "validation": items}))
    places = {"bundle_root": str(folder), "dataset_dir": str(tmp_path / "data"), "ckpt_dir": str(tmp_path)}
    run_here([folder / "configs" / "train.json"], max_epochs=1, **places)
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["2d_classification"], indirect=True)
def test_two_processes_train_one_expert(case, tmp_path, write_images):
    images = write_images(tmp_path / "data", 2, count=4)
    items = [{"image": str(path), "label": i % 3} for i, path in enumerate(images)]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"training": items, "validation": items}))
    configs = case.folder / "configs"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "monai.bundle",
    ]
    command += ["run", "training", "--bundle_root", str(case.folder), "--dataset_dir", str(tmp_path / "data")]
    command += ["--config_file", f"['{configs / 'train.json'}','{configs / 'multi_gpu_train.json'}']"]
    command += ["--ckpt_dir", str(tmp_path), "--max_epochs", "1", "--batch_size", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    trained = torch.load(tmp_path / "model.pt", weights_only=True)
    assert trained.keys() == case.network.state_dict().keys()


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_monai_load_builds_the_network_from_another_folder(case, tmp_path, monkeypatch):
    import monai.bundle

    monkeypatch.chdir(tmp_path)
    for workflow_type in ("inference", "train"):
        network = monai.bundle.load(
            case.folder.name, bundle_dir=str(case.folder.parent), workflow_type=workflow_type, source="github"
        )
        for key, value in case.network.state_dict().items():
            assert torch.equal(network.state_dict()[key].cpu(), value)


def test_dicom_series_are_found_by_content_and_several_in_one_folder_are_refused(make_case, tmp_path):
    case = make_case("3d_segmentation")
    for folder, ending in (("a/1.2.1", ".DCM"), ("a/1.2.2", ""), ("a/1.2.3", ".ima")):
        write_series(tmp_path / folder, ending, [folder[-1]])
    places = {"bundle_root": str(case.folder), "output_dir": str(tmp_path / "out")}
    config = [case.folder / "configs" / "inference.json"]
    run_here(config, dataset_dir=str(tmp_path / "a"), **places)
    names = ["1.2.1_seg.nii.gz", "1.2.2_seg.nii.gz", "1.2.3_seg.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    write_series(tmp_path / "b" / "mixed", ".dcm", ["8", "9"])
    with pytest.raises(SystemExit, match="error: .*mixed' holds 2 DICOM series, expected one; .* 10 files from .*8-0"):
        run_here(config, dataset_dir=str(tmp_path / "b"), **places)
    (tmp_path / "a" / "1.2.1" / "volume.nii").touch()
    with pytest.raises(SystemExit, match="error: .*1.2.1' holds DICOM slices and the volume 'volume.nii'; keep one"):
        run_here(config, dataset_dir=str(tmp_path / "a"), **places, overwrite=True)
    assert len(list((tmp_path / "out").iterdir())) == 3
    with pytest.raises(LoRKDError, match="mixed' holds 2 DICOM series"):
        describe_image(str(tmp_path / "b" / "mixed"))
    with pytest.raises(LoRKDError, match="mixed' holds 2 DICOM series"):
        ItemLoader(case.arguments["preprocessing"], 3)({"image": str(tmp_path / "b" / "mixed")})


@pytest.mark.parametrize("case", ["2d_classification"], indirect=True)
@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ("train", {"batchsize": 3}, "error: nothing in this bundle reads --batchsize (did you mean --batch_size?)"),
        (
            "inference",
            {"output_di": "x"},
            "error: nothing in this bundle reads --output_di (did you mean --output_dir?)",
        ),
        ("inference", {"output_dir": 2026}, "error: --output_dir: expected a path, got 2026; write ./NAME"),
        ("inference", {"dataset_dir": 7}, "error: --dataset_dir: expected a path, got 7"),
        ("inference", {"dataset_dir": ("a", "b")}, "error: --dataset_dir: expected a path, got ('a', 'b')"),
    ],
)
def test_keys_that_nothing_reads_and_paths_that_are_none(case, config, arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the run replaces
    monkeypatch.setattr(sys, "argv", ["/monai/bundle/__main__.py", "run", *(f"--{key}=…" for key in arguments)])
    with pytest.raises((SystemExit, RuntimeError)) as ended:
        run_here([case.folder / "configs" / f"{config}.json"], bundle_root=str(case.folder), **arguments)
    error = ended.value
    while not isinstance(error, SystemExit):
        error = error.__cause__ or error.__context__
    assert str(error).startswith(words)


@pytest.mark.parametrize("case", ["2d_classification"], indirect=True)
def test_keys_of_monai_and_of_other_arguments(case, tmp_path, write_images, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    write_images(tmp_path / "images", 2, count=1)
    typed = ["run", "--bundle_root", "x", "--meta_file", "x", "--folder=x", "--dataset_dir=@folder", "--images#0", "y"]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", *typed])
    run_here(
        [case.folder / "configs" / "inference.json"], bundle_root=str(case.folder), folder=str(tmp_path / "images"),
        dataset_dir="@folder", output_dir=str(tmp_path / "out"), meta_file=str(case.folder / "configs/metadata.json"),
    )  # fmt: skip
    assert (tmp_path / "out" / "predictions.csv").is_file()


@pytest.mark.parametrize("kind", ["2d_classification", "2d_segmentation"])
def test_an_expert_takes_dicom_pictures_beside_others(kind, make_case, write_images, tmp_path):
    case = make_case(kind)
    (png,) = write_images(tmp_path / "images", 2, count=1)
    grey = np.asarray(Image.open(png))
    write_picture(tmp_path / "images" / "1.2.840.1", grey)
    write_picture(tmp_path / "images" / "1.2.840.2", 255 - grey, "MONOCHROME1")
    run_here(
        [case.folder / "configs" / "inference.json"],
        bundle_root=str(case.folder), dataset_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    if kind.endswith("classification"):
        rows = list(csv.reader((tmp_path / "out" / "predictions.csv").open()))
        answers = [np.array(row[1:], float) for row in rows[1:]]
    else:
        names = ["1.2.840.1_seg.png", "1.2.840.2_seg.png", "image 0_seg.png"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
        answers = [np.asarray(Image.open(tmp_path / "out" / name)) for name in names]
    assert len(answers) == 3
    for answer in answers[:2]:  # the same picture three times
        np.testing.assert_allclose(answer, answers[2], atol=1e-4)
    metadata = json.loads((case.folder / "configs" / "metadata.json").read_text())
    assert "pydicom" in metadata["required_packages_version"]
