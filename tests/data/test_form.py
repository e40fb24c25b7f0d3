"""The form of a data list: its schema is up to date, and says what `load_data_list` says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.resources import files

import pytest

from lorkd_monai.data import make_phantoms
from lorkd_monai.data.form import ITEM_KEYS, LIST_KEYS, TASK_KEYS, faults

jsonschema = pytest.importorskip("jsonschema")

LABELS = {"0": "a", "1": "b"}
GOOD_TASK_VALUES = {
    "labels": [LABELS, {str(n): f"class {n}" for n in range(12)}],
    "modality": ["CT", "", None],
    "body_part": ["liver", None],
    "note": ["wiring only", None],
    "intensity": [{"range": [-160, 240.5]}, {"percentiles": [0, 100]}, None],
    "spacing": [[1, 1], [0.5, 1, 2.5], None],
    "channels": [1, 4],
    "score": [True, False],
    "vista3d_class": [3, {"1": 3, "12": 5}, {}, None],
    "licence": ["MIT", None],
    "license": ["MIT"],
    "authors": ["A. Lee", ["A. Lee", "B. Ono"], None],
}
BAD_TASK_VALUES = {
    "labels": [None, [], "a", {}, {"0": "a"}, {"1": "a", "2": "b"}, {"a": 0, "b": 1}, {"0": "a", "01": "b"},
               {"0": "a", "1": 3}, {"0": "a", "1": " "}],
    "modality": [3, ["CT"]],
    "body_part": [{}],
    "note": [False],
    "intensity": [{}, [0, 1], {"range": [0]}, {"range": [0, 1, 2]}, {"range": [0, "1"]}, {"percentiles": [0, 101]},
                  {"window": [0, 1]}, {"range": [0, 1], "percentiles": [0, 1]}, 5],
    "spacing": [1, [1], [1, 1, 1, 1], [1, 0, 1], [1, "1"], [1, True]],
    "channels": [0, -1, 1.5, "3", True, None],
    "score": [0, "no", None],
    "vista3d_class": [0, -3, "3", {"a": 3}, {"1": 0}, {"1": "3"}, {"²": 3}, True],
    "licence": [4, " ", ["MIT"]],
    "license": [4, ""],
    "authors": [[], ["A", 3], {"A": 1}, " "],
}  # fmt: skip
# What a schema cannot say; `faults` alone refuses it.
ONLY_IN_WORDS = {
    "labels": [{"0": "a", "1": "a"}, {"0": "a", "1": "b", "3": "c"}, {"0": "a", "1": "b\n"}],
    "intensity": [{"range": [3, 2]}, {"range": [0, 0]}, {"percentiles": [99, 1]}],
    "channels": [1.0],
    "spacing": [[1, float("nan")]],
}


@pytest.fixture(scope="module")
def schema():
    return json.loads((files("lorkd_monai") / "data" / "dataset.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def accepts(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema).is_valid


def listed(key="labels", value=LABELS):
    return {"tasks": {"one": {"labels": LABELS, key: value}}, "training": [{"image": "a", "label": 0, "task": "one"}]}


def cases(values):
    return [(key, value) for key, several in values.items() for value in several]


def test_the_schema_and_the_docs_are_up_to_date(repository):
    program = [sys.executable, str(repository / "scripts" / "data_list_docs.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_key_of_a_task_has_examples():
    assert set(GOOD_TASK_VALUES) == set(BAD_TASK_VALUES) == {name for name, key in TASK_KEYS.items() if key.rules}


@pytest.mark.parametrize(("key", "value"), cases(GOOD_TASK_VALUES))
def test_good_values(accepts, key, value):
    assert faults({"labels": LABELS, key: value}, TASK_KEYS) == []
    assert accepts(listed(key, value))


@pytest.mark.parametrize(("key", "value"), cases(BAD_TASK_VALUES))
def test_bad_values(accepts, key, value):
    (line,) = faults({"labels": LABELS, key: value}, TASK_KEYS)
    assert key.replace("license", "licence") in line and line.endswith(f", got {value!r}")
    assert not accepts(listed(key, value))


@pytest.mark.parametrize(("key", "value"), cases(ONLY_IN_WORDS))
def test_what_a_schema_cannot_say(key, value):
    assert len(faults({"labels": LABELS, key: value}, TASK_KEYS)) == 1


def test_keys_that_are_needed_or_unknown(accepts):
    assert len(faults({}, TASK_KEYS)) == 1 and faults({"$schema": "x", "reference": 1}, LIST_KEYS) == []
    assert accepts({**listed("own key", 1), "$schema": "dataset.schema.json", "numTraining": 1})
    assert not accepts({"tasks": {"one": {}}}) and not accepts({}) and not accepts({"tasks": {}})


def test_every_problem_of_a_task_is_told():
    lines = faults({"labels": LABELS, "channels": 0, "score": 1, "vista3d_class": "3"}, TASK_KEYS)
    assert len(lines) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "detection"}, {"spatial_dims": 4}, {"authors": []}, {"training": {}}, {"test": [{"image": "a"}]},
        {"training": [{"image": 3, "label": 0, "task": "one"}]}, {"training": [{"image": [], "label": 0, "task": "o"}]},
        {"training": [{"image": "a", "label": 0.5, "task": "one"}]}, {"tasks": {"a/b": {"labels": LABELS}}},
        {"training": [{"image": "a", "label": -2, "task": "one"}]}, {"tasks": {"a" * 65: {"labels": LABELS}}},
    ],
)  # fmt: skip
def test_lists_that_the_schema_refuses(accepts, change):
    assert accepts(listed()) and not accepts({**copy.deepcopy(listed()), **change})


@pytest.mark.parametrize("image", ["a.png", ["t1.nii", "t2.nii"]])
@pytest.mark.parametrize("label", [0, 11, -1, None, "mask.nii.gz"])
def test_items_that_the_schema_accepts(accepts, image, label):
    assert accepts({**listed(), "validation": [{"image": image, "label": label, "task": "one"}]})
    assert set(ITEM_KEYS) == {"image", "label", "task"}


def test_the_schema_accepts_real_lists(schema, shared):
    lists = sorted((shared / "data").glob("*/dataset.json")) + sorted((shared / "data").glob("*/study.json"))
    assert len(lists) >= 7
    for file in lists:
        jsonschema.validate(json.loads(file.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_the_schema_accepts_what_is_written(schema, tmp_path, kind):
    file = make_phantoms(tmp_path, kind, 2, num_images=10, image_size=16)
    jsonschema.validate(json.loads(file.read_text(encoding="utf-8")), schema)
