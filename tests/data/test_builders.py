"""Building data lists from folders and files of the forms that people have."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np
import pytest
from dicom_pictures import write_picture
from filelock import FileLock
from PIL import Image

from lorkd_monai.data import (
    TaskDataset,
    combine,
    fetch_medmnist,
    fetch_mednist,
    from_class_folders,
    from_medmnist,
    from_segmentation_folders,
    load_data_list,
    make_phantoms,
)
from lorkd_monai.errors import LoRKDError

SPLITS = ("training", "validation", "test")


def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5), value % 256, dtype=np.uint8)).save(path)


def nifti(path, shape=(6, 5, 4), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, dtype=np.uint8), np.eye(4)), path)


def class_folders(root, tasks=("one", "two"), patients=10, each=2):
    for task in tasks:
        for name in ("healthy", "ill"):
            for patient in range(patients):
                for number in range(each):
                    png(root / task / name / f"P{patient:02d}_{number}.png")
    (root / "one" / "healthy" / "notes.txt").write_text("no image")
    return root


def files_of(data, split):
    return [item["image"] for item in data.split(split)]


def test_class_folders(tmp_path):
    source = class_folders(tmp_path / "source")
    file = from_class_folders(source, tmp_path / "out", facts={"one": {"modality": "US"}})
    data = load_data_list(file, "classification", 2, needs=SPLITS)
    assert list(data.tasks) == ["one", "two"] and data.tasks["one"].labels == {0: "healthy", 1: "ill"}
    assert data.tasks["one"].modality == "US" and data.tasks["two"].modality is None
    assert data.counts()["one"] == {"training": 28, "validation": 4, "test": 8}
    for split, count in (("training", 14), ("validation", 2), ("test", 4)):  # classes keep their shares
        for label in (0, 1):
            assert sum(i["label"] == label and i["task"] == "two" for i in data.split(split)) == count
    stored = json.loads(file.read_text())
    assert stored["training"][0]["image"].startswith("../source/one/")
    assert {"kind": "classification", "spatial_dims": 2}.items() <= stored.items()


def test_the_seed_decides_the_split(tmp_path):
    source = class_folders(tmp_path / "source")
    files = [from_class_folders(source, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    first, again, other = (load_data_list(file, "classification", 2) for file in files)
    tests = [[image.split("source")[1] for image in files_of(data, "test")] for data in (first, again, other)]
    assert tests[0] == tests[1] != tests[2]


@pytest.mark.parametrize("by", ["regex", "csv"])
def test_no_patient_stands_in_two_splits(tmp_path, by):
    source = class_folders(tmp_path / "source")
    if by == "csv":
        lines = [f"{p.name},{p.name[:3]}" for p in sorted(source.rglob("*.png"))]
        (tmp_path / "patients.csv").write_text("image,patient\n" + "\n".join(lines) + "\n")
        patients = {"patients_csv": tmp_path / "patients.csv"}
    else:
        patients = {"patient_regex": r"^(P\d+)_"}
    file = from_class_folders(source, tmp_path / "out", **patients)
    data = load_data_list(file, "classification", 2, needs=SPLITS)
    where = {}
    for split in SPLITS:
        for image in files_of(data, split):
            where.setdefault(image.rsplit("/", 1)[1][:3], set()).add(split)
    assert len(where) == 10 and all(len(splits) == 1 for splits in where.values())
    assert sum(len(files_of(data, split)) for split in SPLITS) == 80
    assert [sum(splits == {s} for splits in where.values()) for s in SPLITS] == [7, 1, 2]


def test_paths_tell_images_of_one_name_apart(tmp_path):
    source = tmp_path / "source"
    lines = []
    for name in ("healthy", "ill"):
        for number in range(10):
            png(source / "one" / name / f"{number}.png")
            lines.append(f"source/one/{name}/{number}.png,{name}{number // 2}")
    (tmp_path / "patients.csv").write_text("image,patient\n" + "\n".join(lines))
    file = from_class_folders(source, tmp_path / "out", patients_csv=tmp_path / "patients.csv")
    data = load_data_list(file, "classification", 2)
    assert [len(data.split(split)) for split in SPLITS] == [12, 4, 4]  # 3, 1 and 1 patients of each class
    (tmp_path / "names.csv").write_text("image,patient\n" + "\n".join(line.split("/")[-1] for line in lines))
    with pytest.raises(LoRKDError, match="names two patients for 0.png"):
        from_class_folders(source, tmp_path / "out2", patients_csv=tmp_path / "names.csv")


def test_splits_that_are_there_are_kept(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            for number in range(3):
                png(tmp_path / "task" / split / name / f"{split}{number}.png")
    data = load_data_list(from_class_folders([tmp_path / "task"], tmp_path / "out"), "classification", 2)
    for split, word in zip(SPLITS, ("train", "val", "test"), strict=True):
        assert len(data.split(split)) == 6 and all(f"/{word}/" in image for image in files_of(data, split))
    with pytest.raises(LoRKDError, match="patient 0 is in test and training and validation"):
        from_class_folders([tmp_path / "task"], tmp_path / "out2", patient_regex=r"(\d)\.png")


def test_tasks_as_a_command_line_names_them(tmp_path):
    source = class_folders(tmp_path / "source")
    mapping = f"{{first: {source / 'one'}, second: {source / 'two'}}}"
    data = load_data_list(from_class_folders(mapping, tmp_path / "out"), "classification", 2)
    assert list(data.tasks) == ["first", "second"]
    with pytest.raises(LoRKDError, match="expected tasks as"):
        from_class_folders("{first: [1, 2]}", tmp_path / "out2")


def test_3d_class_folders_with_volumes_and_series(tmp_path):
    for name in ("a", "b"):
        for number in range(5):
            nifti(tmp_path / "task" / name / f"{number}.nii.gz")
    data = load_data_list(from_class_folders({"vessel": tmp_path / "task"}, tmp_path / "out", 3), "classification", 3)
    assert len(data.training) + len(data.validation) + len(data.test) == 10


@pytest.mark.parametrize("dims", [2, 3])
def test_dicom_files_are_listed_whatever_they_are_called(tmp_path, dims):
    rng, expected = np.random.default_rng(0), set()
    for name in ("a", "b"):
        for number, ending in enumerate((".dcm", ".DCM", ".ima", "", ".dicom")):
            folder = tmp_path / "task" / name / f"patient{number}"
            for depth in range(2):
                pixels = rng.integers(0, 4096, (9, 8)).astype(np.uint16)
                place = {"ImagePositionPatient": [0, 0, depth], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
                uids = {"SeriesInstanceUID": f"1.2.{number}", "InstanceNumber": depth, "PixelSpacing": [1, 1]}
                path = write_picture(folder / f"1.2.{depth}{ending}", pixels, BitsStored=12, **place, **uids)
                expected.add(str(path if dims == 2 else folder))
        write_picture(folder / "DICOMDIR", pixels)
    data = load_data_list(from_class_folders([tmp_path / "task"], tmp_path / "out", dims), "classification", dims)
    listed = [item["image"] for split in SPLITS for item in data.split(split)]
    assert sorted(map(os.path.realpath, listed)) == sorted(map(os.path.realpath, expected))


def medmnist_file(path, classes=3, **more):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(6) % classes)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays, **more)
    return path


def test_medmnist_files(tmp_path):
    first = medmnist_file(tmp_path / "files" / "breastmnist.npz")
    second = medmnist_file(tmp_path / "files" / "b.npz", class_names=np.array(["x", "y", "z"]))
    facts = {"breastmnist": {"labels": {"0": "malignant", "1": "normal", "2": "benign"}}}
    data = load_data_list(from_medmnist([first, second], tmp_path / "out", facts=facts), "classification", 2)
    assert list(data.tasks["breastmnist"].labels.values()) == ["malignant", "normal", "benign"]
    assert list(data.tasks["b"].labels.values()) == ["x", "y", "z"]
    assert data.counts()["b"] == {"training": 6, "validation": 6, "test": 6}
    plain = load_data_list(from_medmnist(str(first), tmp_path / "out2"), "classification", 2)
    assert plain.tasks["breastmnist"].labels == {0: "class 0", 1: "class 1", 2: "class 2"}


def test_medmnist_arrays_that_are_left_out_are_told(tmp_path, caplog):
    file = medmnist_file(tmp_path / "a.npz", extra_images=np.zeros((2, 28, 28)))
    with caplog.at_level("INFO", "lorkd_monai.data"):
        from_medmnist(file, tmp_path / "out")
    assert f"skipped 1: arrays of other names than MedMNIST's ({file}: extra_images)" in caplog.text
    assert "| a | class 2 | 2 | 2 | 2 |\n| all | | 6 | 6 | 6 |" in caplog.text


def test_fetching_medmnist(tmp_path):
    source = medmnist_file(tmp_path / "server" / "breastmnist.npz")
    url = source.parent.as_uri()
    md5 = {"breastmnist": hashlib.md5(source.read_bytes()).hexdigest()}
    file = fetch_medmnist("breastmnist", tmp_path / "out", base_url=url, md5=md5)
    assert len(load_data_list(file, "classification", 2).training) == 6
    with pytest.raises(LoRKDError, match="cannot fetch pathmnist from file"):
        fetch_medmnist(["pathmnist"], tmp_path / "out2", base_url=url)
    with pytest.raises(LoRKDError, match="cannot fetch breastmnist"):
        fetch_medmnist("breastmnist", tmp_path / "out3", base_url=url, md5={"breastmnist": "0" * 32})
    with pytest.raises(LoRKDError, match="expected names of MedMNIST sets"):
        fetch_medmnist("../breastmnist", tmp_path / "out4", base_url=url)


@pytest.fixture
def server():
    """A function that serves a folder on this machine and returns its address."""
    running = []

    def serve(folder):
        handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
        running.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def test_fetching_mednist(tmp_path, monkeypatch, server):
    pytest.importorskip("requests")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    from monai.apps import MedNISTDataset

    for name in ("AbdomenCT", "Hand"):
        for number in range(10):
            path = tmp_path / "MedNIST" / name / f"{number:06d}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64), number, dtype=np.uint8)).save(path)
    with tarfile.open(tmp_path / "MedNIST.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "MedNIST", "MedNIST")
    monkeypatch.setattr(MedNISTDataset, "resource", f"{server(tmp_path)}/MedNIST.tar.gz")
    monkeypatch.setattr(MedNISTDataset, "md5", hashlib.md5((tmp_path / "MedNIST.tar.gz").read_bytes()).hexdigest())
    data = load_data_list(fetch_mednist(tmp_path / "out"), "classification", 2)
    assert data.tasks["mednist"].labels == {0: "AbdomenCT", 1: "Hand"}
    assert data.counts()["mednist"] == {"training": 14, "validation": 2, "test": 4}
    monkeypatch.setattr(MedNISTDataset, "resource", f"{server(tmp_path)}/gone.tar.gz")
    with pytest.raises(LoRKDError, match="cannot fetch MedNIST"):
        fetch_mednist(tmp_path / "out2")


def decathlon(root, name="Task09_Spleen", cases=10, **more):
    folder = root / name
    rows = []
    for number in range(cases):
        for part in ("images", "labels"):
            nifti(folder / f"{part}Tr" / f"spleen_{number}.nii.gz")
        rows.append({"image": f"./imagesTr/spleen_{number}.nii.gz", "label": f"./labelsTr/spleen_{number}.nii.gz"})
    content = {
        "name": "Spleen",
        "labels": {"0": "background", "1": "spleen"},
        "modality": {"0": "CT"},
        "training": rows,
        "test": ["./imagesTs/spleen_99.nii.gz"],
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def nnunet(root, name="Dataset004_Head", channels=2, test_cases=3, **more):
    folder = root / name
    for part, cases in (("Tr", 10), ("Ts", test_cases)):
        for number in range(cases):
            nifti(folder / f"labels{part}" / f"head_{part}{number}.nii.gz")
            for channel in range(channels):
                nifti(folder / f"images{part}" / f"head_{part}{number}_{channel:04d}.nii.gz")
    content = {
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "channel_names": {str(i): f"MRI T{i + 1}" for i in range(channels)},
        "file_ending": ".nii.gz",
        "numTraining": 10,
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_decathlon_and_nnunet_together(tmp_path):
    sources = [decathlon(tmp_path), nnunet(tmp_path)]
    data = load_data_list(from_segmentation_folders(sources, tmp_path / "out"), "segmentation", 3)
    assert data.num_classes == {"spleen": 2, "head": 3}
    spleen, head = data.tasks.values()
    assert (spleen.modality, spleen.channels, head.modality, head.channels) == ("CT", 1, "MR", 2)
    assert head.labels == {0: "background", 1: "anterior", 2: "posterior"}
    counts = data.counts()
    assert counts["spleen"] == {"training": 7, "validation": 1, "test": 2}
    assert counts["head"]["test"] == 3 and sum(counts["head"].values()) == 13
    image = next(item["image"] for item in data.training if item["task"] == "head")
    assert len(image) == 2 and image[0].endswith("_0000.nii.gz") and image[1].endswith("_0001.nii.gz")


def test_nnunet_version_1_and_2d(tmp_path):
    old = nnunet(tmp_path, "Task500_Old", channels=1, channel_names={}, labels={"0": "background", "1": "organ"})
    content = json.loads((old / "dataset.json").read_text())
    del content["channel_names"], content["file_ending"]
    content["modality"] = {"0": "CT"}
    (old / "dataset.json").write_text(json.dumps(content))
    data = load_data_list(from_segmentation_folders(str(old), tmp_path / "out"), "segmentation", 3)
    assert data.num_classes == {"old": 2} and isinstance(data.training[0]["image"], str)
    flat = tmp_path / "Dataset007_Cells"
    for number in range(10):
        png(flat / "imagesTr" / f"c_{number}_0000.png")
        png(flat / "labelsTr" / f"c_{number}.png")
    more = {"labels": {"background": 0, "cell": 1}, "channel_names": {"0": "microscopy"}, "file_ending": ".png"}
    (flat / "dataset.json").write_text(json.dumps(more))
    data = load_data_list(from_segmentation_folders({"cells": flat}, tmp_path / "out2", 2), "segmentation", 2)
    assert data.counts()["cells"] == {"training": 7, "validation": 1, "test": 2}


def test_segmentation_folders_by_patient(tmp_path):
    source = decathlon(tmp_path, cases=20)
    file = from_segmentation_folders(source, tmp_path / "out", patient_regex=r"(\d)\.nii")  # 0 and 10 are one patient
    data = load_data_list(file, "segmentation", 3, needs=SPLITS)
    digits = [{image[-len("0.nii.gz")] for image in files_of(data, split)} for split in SPLITS]
    assert sum(map(len, digits)) == len(set.union(*digits)) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "labels that are regions"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "'ignore' label"),
        ({"labels": {"background": 0, "a": "b"}}, "name: number"),
        ({"labels": {"background": 0, "a": 2}}, '"labels" must name ids'),
        ({"labels": None}, "must be an object with 'labels'"),
        ({"channel_names": {"0": "CT"}}, r"cases have \[2\] channel files, dataset.json names 1"),
    ],
)
def test_nnunet_forms_that_are_refused(tmp_path, changes, message):
    with pytest.raises(LoRKDError, match=message):
        from_segmentation_folders(nnunet(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_folders_of_another_form_are_refused(tmp_path):
    with pytest.raises(LoRKDError, match="a folder of the Decathlon or of nnU-Net has a dataset.json"):
        from_segmentation_folders(tmp_path, tmp_path / "out")
    with pytest.raises(LoRKDError, match="there is nothing"):
        from_segmentation_folders(tmp_path / "nowhere", tmp_path / "out")
    folder = nnunet(tmp_path)
    next((folder / "imagesTr").glob("*Tr3_0000*")).unlink()
    next((folder / "imagesTr").glob("*Tr3_0001*")).unlink()
    with pytest.raises(LoRKDError, match=r"head_Tr3\.nii\.gz has no image"):
        from_segmentation_folders(folder, tmp_path / "out")
    bad = decathlon(tmp_path, training=[{"image": "./imagesTr/gone.nii.gz", "label": "./labelsTr/spleen_1.nii.gz"}])
    with pytest.raises(LoRKDError, match="missing image .*gone"):
        from_segmentation_folders(bad, tmp_path / "out")


def test_channel_files_by_their_numbers(tmp_path):
    folder = nnunet(tmp_path, channels=3)
    image = load_data_list(from_segmentation_folders(folder, tmp_path / "out"), "segmentation", 3).training[0]["image"]
    assert [path[-11:] for path in image] == ["0000.nii.gz", "0001.nii.gz", "0002.nii.gz"]
    gone = folder / "imagesTr" / "head_Tr4_0001.nii.gz"
    gone.rename(folder / "imagesTr" / "head_Tr4_0003.nii.gz")  # as many files as before
    with pytest.raises(LoRKDError, match=rf"{gone} is missing: the case has the channels 0000, 0002, 0003, .* names 3"):
        from_segmentation_folders(folder, tmp_path / "out2")
    shutil.copy(folder / "imagesTr" / "head_Tr4_0003.nii.gz", gone)
    with pytest.raises(
        LoRKDError, match=r"head_Tr4_0003\.nii\.gz: cases have \[4\] channel files, dataset.json names 3"
    ):
        from_segmentation_folders(folder, tmp_path / "out2")
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT"}}))
    with pytest.raises(LoRKDError, match="cases have [[]3] channel files, dataset.json names 1"):
        from_segmentation_folders(folder, tmp_path / "out2")


def test_what_segmentation_folders_leave_out_is_told(tmp_path, caplog):
    head = nnunet(tmp_path, test_cases=0, numTraining=12)
    nifti(head / "imagesTr" / "alone_0000.nii.gz")
    nifti(head / "imagesTr" / "unnumbered.nii.gz")
    nifti(head / "imagesTs" / "t1_0000.nii.gz")
    nifti(head / "labelsTr" / "._head_Tr1.nii.gz")
    (head / "labelsTr" / "notes.txt").write_text("no mask")
    spleen = decathlon(tmp_path)
    nifti(spleen / "imagesTr" / "more.nii.gz")
    from_segmentation_folders([head, spleen], tmp_path / "out")
    for line in (
        f"skipped 1: images of imagesTr without a mask ({head / 'imagesTr' / 'alone'})",
        "skipped 1: files of imagesTr without a channel number and .nii.gz, as in case_0000.nii.gz (",
        f"skipped 1: images of imagesTs without a mask ({head / 'imagesTs' / 't1'})",
        f"skipped 1: hidden files and folders ({head / 'labelsTr' / '._head_Tr1.nii.gz'})",
        f"skipped 1: files of labelsTr whose names do not end in .nii.gz ({head / 'labelsTr' / 'notes.txt'})",
        "skipped 1: test images without masks: nothing can be measured on them (",
        f"skipped 1: files that dataset.json does not list ({spleen / 'imagesTr' / 'more.nii.gz'})",
        "task 'head': dataset.json says numTraining 12, and there are 10.",
    ):
        assert line in caplog.text


def test_segmentation_suffixes_in_large_letters_and_masks_of_null(tmp_path):
    folder = nnunet(tmp_path, channels=1)
    for path in [*folder.glob("*Tr/*"), *folder.glob("*Ts/*")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    data = load_data_list(from_segmentation_folders(folder, tmp_path / "out"), "segmentation", 3)
    assert sum(data.counts()["head"].values()) == 13
    folder = decathlon(tmp_path)
    content = json.loads((folder / "dataset.json").read_text())
    for item in content["training"][:4]:
        item["label"] = None
    (folder / "dataset.json").write_text(json.dumps(content))
    data = load_data_list(from_segmentation_folders(folder, tmp_path / "out2", fractions=(1, 0, 0)), "segmentation", 3)
    assert data.unlabelled == 4 and len(data.training) == 10


def test_combining_lists(tmp_path):
    make_phantoms(tmp_path / "a", "classification", 2, num_images=10, image_size=16)
    other = from_class_folders(class_folders(tmp_path / "source"), tmp_path / "b")
    data = load_data_list(combine([tmp_path / "a", other], tmp_path / "c", "classification", 2), "classification", 2)
    assert list(data.tasks) == ["ct", "ultrasound", "mr", "cells", "one", "two"]
    assert len(data.training) == 4 * 6 + 2 * 28
    with pytest.raises(LoRKDError, match="two of the lists have a task 'one'"):
        combine([other, other], tmp_path / "d", "classification", 2)
    with pytest.raises(LoRKDError, match="nowhere.json can't be read as JSON.*expected a data list"):
        combine([tmp_path / "nowhere.json"], tmp_path / "d", "classification", 2)


def test_licence_and_authors_stay_with_their_tasks(tmp_path):
    for name, licence in (("a", "CC0-1.0"), ("b", None)):
        png(tmp_path / f"{name}.png")
        item = {"image": f"../{name}.png", "label": 0, "task": name}
        content = {"tasks": {name: {"labels": {"0": "x", "1": "y"}}}, "training": [item]}
        (tmp_path / f"list_{name}").mkdir()
        own = {} if licence is None else {"licence": licence, "authors": ["A. Lee"]}
        (tmp_path / f"list_{name}" / "dataset.json").write_text(json.dumps({**content, **own}))
    lists = [tmp_path / "list_a", tmp_path / "list_b"]
    data = load_data_list(combine(lists, tmp_path / "both", "classification", 2), "classification", 2)
    assert (data.licence, data.authors) == (None, None)
    assert (data.tasks["a"].licence, data.tasks["a"].authors) == ("CC0-1.0", ["A. Lee"])
    assert (data.tasks["b"].licence, data.tasks["b"].authors) == (None, None)


def test_lists_are_not_overwritten_unless_told_to(tmp_path):
    source = class_folders(tmp_path / "source")
    file = from_class_folders(source, tmp_path / "out")
    before = file.read_text()
    with pytest.raises(LoRKDError, match="already exists"):
        from_class_folders(source, tmp_path / "out", seed=5)
    assert file.read_text() == before
    from_class_folders(source, tmp_path / "out", seed=5, overwrite=True)
    assert file.read_text() != before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset.json"]


def test_wrong_class_folders_are_refused(tmp_path):
    source = class_folders(tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(LoRKDError, match="found images of 0"):
        from_class_folders(source, out, spatial_dims=3)
    with pytest.raises(LoRKDError, match="found images of 0"):
        from_class_folders([source], out)
    with pytest.raises(LoRKDError, match="cannot be a folder's name"):
        from_class_folders({"a/b": source / "one"}, out)
    with pytest.raises(LoRKDError, match="two tasks would be named"):
        from_class_folders([source / "one", source / "one"], out)
    with pytest.raises(LoRKDError, match="add up to 1"):
        from_class_folders(source, out, fractions=(0.5, 0.2, 0.2))
    with pytest.raises(LoRKDError, match="not both"):
        from_class_folders(source, out, patient_regex="x", patients_csv="y")
    with pytest.raises(LoRKDError, match="no regular expression"):
        from_class_folders(source, out, patient_regex="(")
    with pytest.raises(LoRKDError, match="finds nothing in the file name"):
        from_class_folders(source, out, patient_regex="Q")
    with pytest.raises(LoRKDError, match="cannot read the patients"):
        from_class_folders(source, out, patients_csv=tmp_path / "gone.csv")
    (tmp_path / "bad.csv").write_text("file,name\na,b\n")
    with pytest.raises(LoRKDError, match="must have the columns"):
        from_class_folders(source, out, patients_csv=tmp_path / "bad.csv")
    with pytest.raises(LoRKDError, match="facts of an unknown task 'three'"):
        from_class_folders(source, out, facts={"three": {}})
    (source / "one" / "train").mkdir()
    with pytest.raises(LoRKDError, match="holds split folders"):
        from_class_folders(source, out)
    with pytest.raises(LoRKDError, match="no npz file of plain arrays"):
        from_medmnist(str(source / "one" / "ill" / "P00_0.png"), out)
    assert not out.exists() or not list(out.iterdir())


def lists_images(file, dims=2):
    data = load_data_list(file, "classification", dims)
    return {split: files_of(data, split) for split in SPLITS}, data


def test_images_below_classes_belong_to_patients(tmp_path, caplog):
    for name in ("ill", "well"):
        for patient in range(6):
            for number in range(3):
                png(tmp_path / "lungs" / name / f"P{patient}" / "left" / f"{number}.png")
    with caplog.at_level("INFO", "lorkd_monai.data"):
        images, data = lists_images(from_class_folders([tmp_path / "lungs"], tmp_path / "out"))
    assert data.tasks["lungs"].labels == {0: "ill", 1: "well"} and sum(map(len, images.values())) == 36
    patients = [{path.split("/")[-3] for path in images[split]} for split in SPLITS]
    assert sum(map(len, patients)) == 6  # each in one split only, both classes together
    assert "36 images are in sub-folders" in caplog.text and "each of the 6 (P0, P1, P2, …)" in caplog.text
    by_name = from_class_folders([tmp_path / "lungs"], tmp_path / "out2", patient_regex=r"^(\d)")
    assert len({path[-5] for path in lists_images(by_name)[0]["training"]}) == 1


def test_sub_folders_beside_images_and_around_all_images(tmp_path):
    for number in range(8):
        png(tmp_path / "one" / "a" / f"{number}.png")
        png(tmp_path / "one" / "b" / f"{number}.png")
        png(tmp_path / "one" / "b" / "P7" / f"{number}.png")
    for source in (tmp_path / "one", [tmp_path / "one"]):  # images beside the sub-folder: "a" and "b" are classes
        images, data = lists_images(from_class_folders(source, tmp_path / "out", overwrite=True))
        assert list(data.tasks) == ["one"] and sum(map(len, images.values())) == 24
    for number in range(10):
        for name in ("COVID", "Normal"):
            png(tmp_path / "radiographs" / name / "images" / f"{number}.png")
            png(tmp_path / "radiographs" / name / "masks" / f"{number}.png")
    images, data = lists_images(from_class_folders(tmp_path / "radiographs", tmp_path / "out", overwrite=True))
    assert data.tasks["radiographs"].labels == {0: "COVID", 1: "Normal"}
    assert data.counts()["radiographs"] == {"training": 14, "validation": 2, "test": 4}
    assert not any("masks" in path for split in SPLITS for path in images[split])


def test_splits_in_the_classes(tmp_path):
    for name in ("a", "b"):
        for split in ("train", "val", "test"):
            png(tmp_path / "one" / name / split / f"{name}.png")
    for source in (tmp_path / "one", [tmp_path / "one"]):
        images, data = lists_images(from_class_folders(source, tmp_path / "out", overwrite=True))
        assert list(data.tasks) == ["one"] and [len(images[split]) for split in SPLITS] == [2, 2, 2]
        assert all("/val/" in path for path in images["validation"])


@pytest.mark.parametrize(
    "names",
    [
        [f"{c}/{p}/{i}.png" for c in ("malignant", "benign") for p in ("P01", "P02", "P03") for i in range(6)],
        [f"{c}/{p}/{i}.png" for c in ("lesion", "nevus") for p in ("007", "1.2.840.1") for i in range(2)],
        [f"{c}/{p}/{i}.png" for c in ("benign", "malignant") for p in ("anna", "ben") for i in range(2)],
    ],
)
def test_trees_that_can_be_tasks_or_classes_are_refused(tmp_path, names):
    for name in names:
        png(tmp_path / "a" / name)
    outer, inner = sorted({name.split("/")[0] for name in names}), sorted({name.split("/")[1] for name in names})
    with pytest.raises(LoRKDError, match=f"a can be read in two ways: {', '.join(outer)} may be tasks") as caught:
        from_class_folders(tmp_path / "a", tmp_path / "out")
    assert f"give '[{tmp_path / 'a'}]'" in str(caught.value) and f"{outer[0]}: {tmp_path / 'a' / outer[0]}" in str(
        caught.value
    )
    tasks = {name: tmp_path / "a" / name for name in outer}
    data = load_data_list(from_class_folders(tasks, tmp_path / "out", fractions=(1, 0, 0)), "classification", 2)
    assert list(data.tasks) == outer and list(data.tasks[outer[0]].labels.values()) == inner


def test_tasks_given_as_one_task_are_refused(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "one" / "healthy" / "notes.txt").unlink()
    with pytest.raises(LoRKDError, match="sub-folders healthy, ill of one, two, which may be tasks"):
        from_class_folders([source], tmp_path / "out")
    data = load_data_list(from_class_folders([source], tmp_path / "out", patient_regex=r"^(P\d+)"), "classification", 2)
    assert data.tasks["source"].labels == {0: "one", 1: "two"}


def test_what_is_left_out_is_told(tmp_path, caplog):
    root = tmp_path / "breast"
    for name in ("benign", "malignant", "_normal", ".cache"):
        for number in range(6):
            png(root / name / f"{number}.png")
    png(root / "benign" / "._1.png")
    png(root / "malignant" / ".thumbs" / "1.png")
    (root / "empty").mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (root / "benign" / name).write_text("no image")
    (root / "benign" / "void.png").touch()
    (root / "benign" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "malignant" / "notes").write_text("no image")
    (root / "malignant" / "loop").symlink_to(root / "malignant")
    nifti(root / "malignant" / "v.nii.gz")
    (root / "readme.md").write_text("no image")
    with caplog.at_level("INFO", "lorkd_monai.data"):
        data = load_data_list(from_class_folders([root], tmp_path / "out", fractions=(1, 0, 0)), "classification", 2)
    assert data.counts()["breast"]["training"] == 12
    for line in (
        f"skipped 2: folders whose names begin with '_' or '.'; rename those that are classes ({root / '.cache'}, ",
        f"skipped 2: hidden files and folders ({root / 'benign' / '._1.png'}, {root / 'malignant' / '.thumbs'})",
        f"skipped 1: class folders without an image ({root / 'empty'})",
        f"skipped 4: files with the suffix .txt ({root / 'benign' / 'a.txt'}, ",
        "c.txt, …)",
        f"skipped 1: empty files ({root / 'benign' / 'void.png'})",
        f"skipped 1: files that cannot be read ({root / 'benign' / 'gone.png'})",
        f"skipped 1: files without a suffix that are no pictures ({root / 'malignant' / 'notes'})",
        f"skipped 1: links to folders that were read already ({root / 'malignant' / 'loop'})",
        f"skipped 1: 3D images; --spatial_dims 3 takes those ({root / 'malignant' / 'v.nii.gz'})",
        f"skipped 1: files outside the class folders ({root / 'readme.md'})",
        "| breast | benign | 6 | 0 | 0 |",
        "| breast | malignant | 6 | 0 | 0 |",
        "the list has no test images: experts are written without metrics",
    ):
        assert line in caplog.text


def test_suffixes_in_any_case_and_none(tmp_path, caplog):
    for name in ("a", "b"):
        for number, suffix in enumerate((".PNG", ".JPG", ".Jpeg", ".Tif", ".TIFF", ".BMP", "")):
            kind = suffix.lower().removeprefix(".").replace("jpg", "jpeg").replace("tiff", "tif") or "png"
            path = tmp_path / "one" / name / f"{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 5), number, dtype=np.uint8)).save(path, kind.replace("tif", "tiff"))
    images, data = lists_images(from_class_folders([tmp_path / "one"], tmp_path / "out", fractions=(1, 0, 0)))
    assert len(images["training"]) == 14 and data.tasks["one"].channels == 1
    assert len(TaskDataset(data, "training", 1, 8, progress=False)) == 14
    for name in ("a", "b"):
        for suffix in (".NII.GZ", ".NII"):
            nifti(tmp_path / "v" / name / f"1{suffix.lower()}")
            (tmp_path / "v" / name / f"1{suffix.lower()}").rename(tmp_path / "v" / name / f"1{suffix}")
    nifti(tmp_path / "v" / "a" / "2.nii")
    (tmp_path / "v" / "a" / "2.nii").rename(tmp_path / "v" / "a" / "2.Nii")
    images, data = lists_images(from_class_folders([tmp_path / "v"], tmp_path / "out3", 3, fractions=(1, 0, 0)), 3)
    assert len(images["training"]) == 4 and "NIfTI's reader does not open; rename them" in caplog.text
    assert len(TaskDataset(data, "training", 1, 8, progress=False)) == 4


@pytest.mark.parametrize("twins", [("Benign", "benign"), ("ill", "ill "), ("\u00e9paule", "e\u0301paule")])
def test_class_folders_that_differ_by_case_are_refused(tmp_path, twins):
    for name in (*twins, "other"):
        png(tmp_path / "one" / "train" / name / "1.png")
    if len({path.name for path in (tmp_path / "one" / "train").iterdir()}) < 3:
        pytest.skip("this file system takes the two names for one")
    with pytest.raises(LoRKDError, match="differ by case or blanks only"):
        from_class_folders([tmp_path / "one"], tmp_path / "out")


def test_classes_without_training_images_are_named(tmp_path, caplog):
    for split, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            png(tmp_path / "one" / split / name / f"{split}.png")
    _, data = lists_images(from_class_folders([tmp_path / "one"], tmp_path / "out"))
    assert data.num_classes == {"one": 3} and "task 'one': no training image of the class c" in caplog.text
    shutil.rmtree(tmp_path / "one" / "train")
    with pytest.raises(LoRKDError, match="task 'one' has no image in training"):
        from_class_folders([tmp_path / "one"], tmp_path / "out2")


@pytest.mark.parametrize("build", [from_class_folders, from_segmentation_folders, from_medmnist])
def test_two_commands_do_not_make_a_list_in_one_folder(tmp_path, build):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".in_use.lock"),  # as another process has it
        pytest.raises(LoRKDError, match="out is in use: another process works in it"),
    ):
        build(tmp_path, tmp_path / "out")


def test_a_list_that_fails_leaves_no_folder(tmp_path):
    source = class_folders(tmp_path / "source")
    with pytest.raises(LoRKDError, match="facts of an unknown task 'three'"):
        from_class_folders(source, tmp_path / "out", facts={"three": {}})
    assert not (tmp_path / "out").exists()


def test_a_list_beside_its_classes(tmp_path, caplog):
    source = class_folders(tmp_path / "source", tasks=("one",)) / "one"
    from_class_folders([source], source)
    assert "outside the class folders" not in caplog.text
    assert sorted(os.listdir(source)) == ["dataset.json", "healthy", "ill"]
