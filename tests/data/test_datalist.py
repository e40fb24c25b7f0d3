"""Reading data lists: what is understood, and that every problem is named in one message."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from lorkd_monai.data import load_data_list
from lorkd_monai.data.datalist import counts_table
from lorkd_monai.errors import LoRKDError

LABELS = {"0": "healthy", "1": "ill"}


@pytest.fixture
def folder(tmp_path):
    """A folder with images a.png … f.png, masks m.png, and two npz files."""
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (9, 7), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.eye(9, 7, dtype=np.uint8)).save(tmp_path / "m.png")
    write_npz(tmp_path / "good.npz")
    return tmp_path


def write_npz(path, **changes):
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((4, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]], dtype=np.uint8)
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def good():
    return {
        "name": "test",
        "tasks": {"one": {"labels": LABELS, "modality": "US"}, "two": {"labels": LABELS, "npz": "good.npz"}},
        "training": [{"image": f"{n}.png", "label": i % 2, "task": "one"} for i, n in enumerate("abc")],
        "validation": [{"image": "d.png", "label": 0, "task": "one"}],
        "test": [{"image": "e.png", "label": 1, "task": "one"}],
    }


def write(folder, content):
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def refused(folder, content, *messages, kind="classification", dims=2, **more):
    with pytest.raises(LoRKDError) as caught:
        load_data_list(write(folder, content), kind, dims, **more)
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def test_reads_paths_and_arrays(folder):
    data = load_data_list(write(folder, good()), "classification", 2)
    assert data.name == "test" and data.num_classes == {"one": 2, "two": 2}
    assert [task.index for task in data.tasks.values()] == [0, 1]
    assert data.tasks["one"].labels == {0: "healthy", 1: "ill"} and data.tasks["one"].modality == "US"
    assert data.counts() == {
        "one": {"training": 3, "validation": 1, "test": 1},
        "two": {"training": 4, "validation": 4, "test": 4},
    }
    assert data.training[0] == {"image": str(folder.resolve() / "a.png"), "label": 0, "task": "one"}
    assert isinstance(data.training[3]["image"], np.ndarray) and data.training[4]["label"] == 1
    assert data.split("test") is data.test
    assert load_data_list(folder / "dataset.json", "classification", 2).counts() == data.counts()


def test_class_ids_are_ordered_as_numbers(folder):
    content = good()
    content["tasks"]["one"]["labels"] = {str(i): f"class {i}" for i in reversed(range(12))}
    data = load_data_list(write(folder, content), "classification", 2)
    assert list(data.tasks["one"].labels) == list(range(12))


@pytest.mark.parametrize(
    ("kind", "dims", "tasks"),
    [("classification", 2, 5), ("segmentation", 2, 4), ("classification", 3, 4), ("segmentation", 3, 3)],
)
def test_shared_lists_load(shared, kind, dims, tasks):
    data = load_data_list(shared / "data" / f"{dims}d_{kind}", kind, dims, needs=("training", "validation"))
    assert len(data.tasks) == tasks and data.training and data.validation
    if (kind, dims) == ("segmentation", 3):
        assert data.tasks["abdomen_ct"].spacing == (3.0, 3.0, 3.0)
        assert data.tasks["spinal_cord"].spacing == (1.0, 1.0, 1.0)


def test_no_such_file(tmp_path):
    with pytest.raises(LoRKDError, match="no data list at .*nowhere.*dataset.json"):
        load_data_list(tmp_path / "nowhere", "classification", 2)


def test_broken_json(folder):
    refused(folder, '{"tasks": {', "can't be read as JSON", "line 1")
    refused(folder, "[]", "must hold a JSON object, got a list; expected a data list")
    refused(folder, '{"tasks": {"a": {}, "a": {}}}', "'a' is twice")


def test_empty_lists(folder):
    refused(folder, {}, '"tasks" must be an object')
    refused(folder, {"tasks": {"one": {"labels": LABELS}}}, "the list is empty")
    content = good()
    content["training"] = []
    refused(folder, content, "task 'one' has no image in training")
    content = good()
    content["tasks"] = {"one": content["tasks"]["one"]}
    content["validation"] = []
    load_data_list(write(folder, content), "classification", 2)
    refused(folder, content, "task 'one' has no image in validation", needs=("training", "validation"))


def test_every_problem_stands_in_one_message(folder):
    content = good()
    content["training"] += [
        {"image": "missing.png", "label": 0, "task": "one"},
        {"image": "f.png", "label": 2, "task": "one"},
        {"image": "f.png", "label": 0, "task": "three"},
        {"image": "f.png", "label": "ill", "task": "one"},
        {"image": "f.png", "task": "one"},
        {"image": "f.png", "label": 0, "task": "two"},
    ]
    content["test"].append({"image": "./a.png", "label": 0, "task": "one"})
    message = refused(
        folder,
        content,
        "training[3]: missing image missing.png",
        "training[4]: label 2 is outside the classes 0 to 1",
        "training[5]: unknown task 'three'; the list has one, two",
        "training[6]: the label must be a class id, or null for none, got 'ill'",
        "training[7] must have 'image', 'label' and 'task'",
        "training[8]: task 'two' names an npz file",
        "the same image is in training and test",
    )
    assert "has 7 problems" in message


def test_long_messages_are_cut(folder):
    content = good()
    content["training"] = [{"image": f"{i}.png", "label": 0, "task": "one"} for i in range(500)]
    message = refused(folder, content, "missing image 0.png", "and 48")
    assert len(message.splitlines()) == 22


def test_the_same_file_by_another_name_is_found(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "link.png").symlink_to(folder / "a.png")
    content = good()
    content["test"].append({"image": "sub/../sub/link.png", "label": 0, "task": "one"})
    refused(folder, content, "the same image is in training and test")


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "a.b", "", "$x", "@x", "a#b", "%x", "brüst", "a b", "_x", "-x", "x" * 65, "a\n"]
)
def test_task_names_that_cannot_be_folders(folder, name):
    content = good()
    content["tasks"][name] = {"labels": LABELS}
    refused(folder, content, "cannot be a folder's name")


def test_task_names_that_differ_by_case_only(folder):
    content = good()
    content["tasks"]["One"] = {"labels": LABELS}
    refused(folder, content, "differ by case only")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "must be an object"),
        ({}, '"labels" must name ids'),
        ({"labels": {"0": "a"}}, '"labels" must name ids'),
        ({"labels": {"1": "a", "2": "b"}}, '"labels" must name ids'),
        ({"labels": {"background": 0, "spleen": 1}}, '"labels" must name ids'),
        ({"labels": {"0": "a", "1": "a"}}, "same name"),
        ({"labels": {"0": "a", "1": 3}}, "printable text"),
        ({"labels": LABELS, "modality": 3}, "'modality' must be text"),
        ({"labels": LABELS, "channels": 0}, "'channels' must be"),
        ({"labels": LABELS, "intensity": {"range": [3, 2]}}, '"intensity" must be'),
        ({"labels": LABELS, "intensity": {"percentiles": [0, 101]}}, '"intensity" must be'),
        ({"labels": LABELS, "spacing": [1, 0, 1]}, "'spacing' must be"),
        ({"labels": LABELS, "vista3d_class": "3"}, "vista3d_class must map"),
        ({"labels": LABELS, "npz": 3}, "the npz file must be the path"),
        ({"labels": LABELS, "npz": "gone.npz"}, "missing npz file gone.npz"),
        ({"labels": LABELS, "npz": "a.png"}, "no npz file of plain arrays"),
    ],
)
def test_wrong_tasks(folder, entry, message):
    content = good()
    content["tasks"]["two"] = entry
    refused(folder, content, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, "the array train_labels is missing"),
        ({"train_images": None, "train_labels": None}, "the array train_images is missing"),
        ({"test_images": None}, "the array test_images is missing"),
        ({"val_labels": np.array([0, 1, 2, 0])}, "val_labels holds 2, outside the classes 0 to 1"),
        ({"val_labels": np.zeros((4, 14), dtype=int)}, "expected one class id per image"),
        ({"val_labels": np.zeros(3, dtype=int)}, "expected one class id per image"),
        ({"val_labels": np.zeros(4)}, "whole-number labels"),
        ({"train_images": np.zeros((4, 8))}, "train_images must be N×H×W"),
        ({"train_images": np.array([None] * 4)}, "no npz file of plain arrays"),
    ],
)
def test_wrong_npz(folder, changes, message):
    write_npz(folder / "good.npz", **changes)
    refused(folder, good(), "task 'two'", message)


def test_truncated_npz(folder):
    (folder / "good.npz").write_bytes((folder / "good.npz").read_bytes()[:400])
    refused(folder, good(), "no npz file of plain arrays")


def test_kinds_do_not_mix(folder):
    refused(folder, good(), "is this a classification list?", "npz files hold classes", kind="segmentation")
    refused(folder, {**good(), "kind": "classification"}, "made for kind 'classification'", kind="segmentation")
    content = good()
    del content["tasks"]["two"]
    refused(folder, content, "is a 2D image, the list is read as 3D", dims=3)
    with pytest.raises(LoRKDError, match="expected kind"):
        load_data_list(folder, "detection", 2)


def test_a_corrupt_first_image_is_named(folder):
    (folder / "a.png").write_text("no image")
    refused(folder, good(), "cannot read", "a.png")


def test_masks_are_checked_on_demand(folder):
    content = {
        "tasks": {"one": {"labels": LABELS}},
        "training": [{"image": "a.png", "label": "m.png", "task": "one"}],
    }
    load_data_list(write(folder, content), "segmentation", 2, check_labels=True)
    Image.fromarray(np.eye(9, 7, dtype=np.uint8) * 255).save(folder / "m.png")
    load_data_list(folder, "segmentation", 2)
    refused(folder, content, "m.png: the mask holds 255", "class ids", kind="segmentation", check_labels=True)


def test_facts_are_measured(folder):
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(folder / "a.png")
    data = load_data_list(write(folder, good()), "classification", 2)
    assert (data.tasks["one"].channels, data.tasks["two"].channels) == (3, 1)
    assert data.tasks["one"].intensity is None
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(folder / "a.png")
    data = load_data_list(folder, "classification", 2)
    assert data.tasks["one"].intensity == {"range": [0, 65535]}


def test_spacing_is_the_median_unless_given(tmp_path):
    rows = []
    for number, spacing in enumerate([(1, 1, 3), (1, 2, 5), (2, 1, 4)]):
        image = nibabel.Nifti1Image(np.zeros((4, 5, 6), dtype=np.uint8), np.diag([*spacing, 1]))
        nibabel.save(image, tmp_path / f"{number}.nii.gz")
        rows.append({"image": f"{number}.nii.gz", "label": f"{number}.nii.gz", "task": "one"})
    content = {"tasks": {"one": {"labels": LABELS}}, "training": rows}
    assert load_data_list(write(tmp_path, content), "segmentation", 3).tasks["one"].spacing == (1, 1, 4)
    content["tasks"]["one"]["spacing"] = [2, 2, 2]
    assert load_data_list(write(tmp_path, content), "segmentation", 3).tasks["one"].spacing == (2, 2, 2)


def test_licence_and_authors(folder):
    content = {"$schema": "dataset.schema.json", **good(), "licence": "CC-BY-4.0", "authors": ["A. Lee", "B. Ono"]}
    content["tasks"]["two"] |= {"licence": "CC0-1.0", "authors": "C. Diaz"}
    data = load_data_list(write(folder, content), "classification", 2)
    assert (data.licence, data.authors) == ("CC-BY-4.0", ["A. Lee", "B. Ono"])
    assert (data.tasks["one"].licence, data.tasks["one"].authors) == ("CC-BY-4.0", ["A. Lee", "B. Ono"])
    assert (data.tasks["two"].licence, data.tasks["two"].authors) == ("CC0-1.0", ["C. Diaz"])
    data = load_data_list(write(folder, good()), "classification", 2)
    assert data.licence is data.authors is data.tasks["one"].licence is data.tasks["one"].authors is None
    data = load_data_list(write(folder, {**good(), "license": "MIT"}), "classification", 2)
    assert data.licence == data.tasks["two"].licence == "MIT"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("licence", 4, "'licence' must be text, got 4"),
        ("licence", " ", "'licence' must be text"),
        ("license", ["MIT"], "'licence' must be text, got ['MIT']"),
        ("authors", {"A. Lee": 1}, "'authors' must be a list of names"),
        ("authors", [], "'authors' must be a list of names"),
        ("authors", ["A. Lee", 3], "'authors' must be a list of names"),
    ],
)
def test_wrong_licence_and_authors(folder, key, value, message):
    refused(folder, {**good(), key: value}, f"the list: {message}")
    content = good()
    content["tasks"]["two"][key] = value
    refused(folder, content, f"task 'two': {message}")


@pytest.mark.parametrize("missing", [None, -1])
def test_images_without_labels(folder, missing, caplog):
    content = good()
    content["training"].append({"image": "f.png", "label": missing, "task": "one"})
    content["validation"][0]["label"] = missing
    write_npz(
        folder / "good.npz",
        train_labels=np.array([0, -1, -1, 1], dtype=np.int8),
        test_labels=np.array([[0], [-1], [0], [1]]),
    )
    data = load_data_list(write(folder, content), "classification", 2)
    assert [item["label"] for item in data.training] == [0, 1, 0, None, 0, None, None, 1] and data.unlabelled == 3
    assert data.counts()["one"] == {"training": 4, "validation": 0, "test": 1}
    assert [item["label"] for item in data.test if item["task"] == "two"] == [0, 0, 1]
    assert "left out 1 validation image without a label (validation[0])" in caplog.text
    assert "left out 1 test image without a label (task 'two': good.npz)" in caplog.text
    assert "task 'one' has no validation images" in caplog.text
    assert "| one | (no label) | 1 | 0 | 0 |\n| two | healthy | 1 | 2 | 2 |" in counts_table(data)


@pytest.mark.parametrize("label", [-2, True, "", -1.0, [None]])
def test_what_is_no_missing_label(folder, label):
    content = good()
    content["training"][0]["label"] = label
    refused(folder, content, "training[0]: ")


def test_masks_that_are_missing(folder, caplog):
    rows = [{"image": f"{n}.png", "label": m, "task": "one"} for n, m in zip("abc", ("m.png", None, -1), strict=True)]
    content = {"tasks": {"one": {"labels": LABELS}}, "training": rows, "test": [{**rows[1], "image": "d.png"}]}
    data = load_data_list(write(folder, content), "segmentation", 2, check_labels=True)
    assert [item["label"] is None for item in data.training] == [False, True, True] and data.test == []
    assert "left out 1 test image" in caplog.text
    assert "| one |  | 1 | 0 | 0 |\n| one | (no label) | 2 | 0 | 0 |\n| all | | 3 | 0 | 0 |" in counts_table(data)
