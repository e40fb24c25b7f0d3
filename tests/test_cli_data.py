"""`lorkd data …` and `lorkd phantoms` as a user types them."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from lorkd_monai.cli import commands as cli
from lorkd_monai.data import load_data_list
from lorkd_monai.errors import LoRKDError


@pytest.fixture
def lorkd(monkeypatch, capsys):
    """Run one command and give what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorkd", *map(str, arguments)])
        hook = sys.excepthook
        try:
            cli.main()
        finally:
            sys.excepthook = hook
        return capsys.readouterr().out

    return run


def decathlon(folder, name, modality, count=8):
    """A folder in the Decathlon's form with a mask for each image."""
    root = folder / name
    items = []
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        for part, values in (("imagesTr", np.full((6, 5, 4), i)), ("labelsTr", np.eye(6, 5)[..., None].repeat(4, 2))):
            nib.save(nib.Nifti1Image(values.astype(np.uint8), np.eye(4)), root / part / f"{i}.nii.gz")
        items.append({"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"})
    labels = {"0": "background", "1": "organ"}
    (root / "dataset.json").write_text(
        json.dumps({"name": name, "modality": {"0": modality}, "labels": labels, "training": items})
    )
    return root


def class_folder(root):
    for name in ("healthy", "ill"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((6, 5), 10 * i, dtype=np.uint8)).save(root / name / f"P{i}_a.png")
    return root


def test_segmentation(lorkd, tmp_path):
    one, other = decathlon(tmp_path, "Task09_Spleen", "CT"), decathlon(tmp_path, "Task04_Hippocampus", "MRI")
    facts = "{'spleen': {'spacing': [1, 1, 2], 'intensity': {'range': [-100, 200]}}}"
    out = lorkd("data", "segmentation", f"[{one},{other}]", tmp_path / "list", "--fractions", "[0.5,0.25,0.25]",
                "--facts", facts)  # fmt: skip
    assert str(tmp_path / "list" / "dataset.json") in out
    data = load_data_list(tmp_path / "list", "segmentation", 3, needs=("training", "validation", "test"))
    assert list(data.tasks) == ["spleen", "hippocampus"]
    assert data.tasks["spleen"].spacing == (1.0, 1.0, 2.0)
    assert data.tasks["spleen"].intensity == {"range": [-100, 200]}
    assert data.tasks["hippocampus"].modality == "MR"
    assert data.counts()["spleen"] == {"training": 4, "validation": 2, "test": 2}


def test_segmentation_with_names_of_one_s_own(lorkd, tmp_path):
    one = decathlon(tmp_path, "Task09_Spleen", "CT")
    lorkd("data", "segmentation", f"{{milz: {one}}}", tmp_path / "list")
    assert list(load_data_list(tmp_path / "list", "segmentation", 3).tasks) == ["milz"]


def test_folders_by_patient(lorkd, tmp_path):
    lorkd("data", "folders", f"{{breast: {class_folder(tmp_path / 'us')}}}", tmp_path / "list",
          "--patient_regex", r"^(P\d+)_")  # fmt: skip
    data = load_data_list(tmp_path / "list", "classification", 2)
    assert data.tasks["breast"].labels == {0: "healthy", 1: "ill"}
    patients = [{i["image"].rsplit("/", 1)[1].split("_")[0] for i in data.split(s)} for s in ("training", "test")]
    assert not patients[0] & patients[1]


def test_what_was_taken_and_left_out_is_printed(lorkd, tmp_path):
    source = class_folder(tmp_path / "breast")
    (source / "ill" / "notes.txt").write_text("no image")
    out = lorkd("data", "folders", source, tmp_path / "list").splitlines()
    assert out[0] == f"skipped 1: files with the suffix .txt ({source / 'ill' / 'notes.txt'})"
    assert out[1:-1] == [
        "| task | class | training | validation | test |",
        "|---|---|---|---|---|",
        "| breast | healthy | 7 | 1 | 2 |",
        "| breast | ill | 7 | 1 | 2 |",
        "| all | | 14 | 2 | 4 |",
    ]
    assert out[-1] == str(tmp_path / "list" / "dataset.json")
    out = lorkd("data", "segmentation", decathlon(tmp_path, "Task09_Spleen", "CT"), tmp_path / "other",
                "--fractions", "[0.75,0.25,0]")  # fmt: skip
    assert "the list has no test images: experts are written without metrics\n" in out
    assert "| spleen |  | 6 | 2 | 0 |\n| all | | 6 | 2 | 0 |" in out


def test_medmnist_and_combine(lorkd, tmp_path):
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((4, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]])
    np.savez(tmp_path / "chest.npz", **arrays)
    lorkd("data", "medmnist", tmp_path / "chest.npz", tmp_path / "first")
    lorkd("data", "folders", f"{{breast: {class_folder(tmp_path / 'us')}}}", tmp_path / "second")
    lorkd("data", "combine", f"[{tmp_path / 'first'},{tmp_path / 'second'}]", tmp_path / "both",
          "--kind", "classification", "--spatial_dims", "2")  # fmt: skip
    data = load_data_list(tmp_path / "both", "classification", 2)
    assert list(data.tasks) == ["chest", "breast"]
    with pytest.raises(LoRKDError, match="overwrite"):
        lorkd("data", "medmnist", tmp_path / "chest.npz", tmp_path / "first")
    lorkd("data", "medmnist", tmp_path / "chest.npz", tmp_path / "first", "--overwrite")


def test_phantoms(lorkd, tmp_path):
    lorkd("phantoms", tmp_path / "p", "--kind", "segmentation", "--spatial_dims", "3", "--num_images", "10")
    assert list(load_data_list(tmp_path / "p", "segmentation", 3).tasks) == ["ct", "ultrasound", "mr"]


def test_what_is_missing_is_named(lorkd, tmp_path):
    with pytest.raises(LoRKDError, match="there is nothing"):
        lorkd("data", "segmentation", tmp_path / "nowhere", tmp_path / "list")
    with pytest.raises(LoRKDError, match="folder of the Decathlon or of nnU-Net"):
        lorkd("data", "segmentation", class_folder(tmp_path / "us"), tmp_path / "list")


@pytest.mark.parametrize("note", ["wiring only", "one scan: for wiring, never for a score", "Wiring only, small"])
def test_notes_that_take_the_score_away(note, lorkd, tmp_path):
    lorkd("phantoms", tmp_path / "p", "--num_images", "10")
    file = tmp_path / "p" / "dataset.json"
    content = json.loads(file.read_text())
    content["tasks"]["ct"]["note"] = note
    content["tasks"]["mr"]["note"] = "scored as others"
    content["tasks"]["cells"]["score"] = False
    file.write_text(json.dumps(content))
    assert load_data_list(file, "classification", 2).scored == ["ultrasound", "mr"]
    content["tasks"]["ct"]["score"] = True
    file.write_text(json.dumps(content))
    assert load_data_list(file, "classification", 2).scored == ["ct", "ultrasound", "mr"]
    content["tasks"]["ct"]["score"] = "no"
    file.write_text(json.dumps(content))
    with pytest.raises(LoRKDError, match="'score' must be true or false, got 'no'"):
        load_data_list(file, "classification", 2)
