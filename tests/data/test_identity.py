"""What a data list is: equal for another copy, different for other classes, splits or preparation; stamps of files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

from lorkd_monai.data import data_identity, load_data_list, make_phantoms
from lorkd_monai.data.datalist import DataList
from lorkd_monai.data.identity import differences, digest_of, file_stamps, split_digests
from lorkd_monai.tasks import TaskSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=10, image_size=16)
    return folder


def changed(folder, data, **fields):
    task = next(iter(data.tasks.values()))
    return dataclasses.replace(data, tasks={**data.tasks, task.name: dataclasses.replace(task, **fields)})


def test_another_copy_is_the_same_data(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    one, other = (load_data_list(place, "classification", 2) for place in (folder, copy))
    assert differences(data_identity(one), data_identity(other)) == []
    assert digest_of(one) == digest_of(other)
    assert json.loads(json.dumps(data_identity(one))) == data_identity(one)


def test_what_differs_is_told(folder):
    data = load_data_list(folder, "classification", 2)
    before, name = data_identity(data), next(iter(data.tasks))

    def told(other):
        return differences(before, data_identity(other))

    classes = list(data.tasks[name].labels.values())
    (line,) = told(changed(folder, data, labels=dict(enumerate(classes[::-1]))))
    assert line == f"task {name!r}: classes was {classes!r}, now {classes[::-1]!r}"
    assert told(changed(folder, data, intensity={"range": [0, 255]})) == []  # what it is anyway
    assert "intensity: range was" in told(changed(folder, data, intensity={"range": [0, 7]}))[0]
    assert "spacing was None, now [1.0, 1.0]" in told(changed(folder, data, spacing=(1.0, 1.0)))[0]
    assert "channels was" in told(changed(folder, data, channels=7))[0]
    assert told(dataclasses.replace(data, tasks=dict(reversed(data.tasks.items()))))[0].startswith("tasks was")
    (line,) = told(dataclasses.replace(data, training=data.training[::-1]))
    assert line.startswith("digest of the training images and labels was")
    assert len(told(dataclasses.replace(data, training=data.training[1:], test=[data.training[0], *data.test]))) == 2


def test_labels_that_are_missing_and_arrays_count():
    tasks = {"a": TaskSpec("a", 0, {0: "x", 1: "y"})}

    def digest(**item):
        item = {"image": np.zeros((2, 2)), "label": 0, "task": "a", **item}
        return split_digests(DataList("d", ".", "classification", 2, tasks, [item]))["training"]

    found = [digest(), digest(label=1), digest(label=None), digest(image=np.ones((2, 2))), digest(image="a.png"),
             digest(image=["a.png", "b.png"])]  # fmt: skip
    assert len(set(found)) == len(found)
    assert digest() == digest()


def test_what_was_not_written_down_counts_as_the_same():
    assert differences({"seed": 0}, {"seed": 0, "data": {"tasks": ["a"]}}) == []
    assert differences({"seed": 0}, {"seed": 0, "ema": 0.5}) == ["ema was None, now 0.5"]
    assert differences({"size": (1, 2)}, {"size": [1, 2]}) == []


IMAGES = {
    "one file": (["a.nii.gz"], "a.nii.gz", "a.nii.gz"),
    "channel files": (["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "b.nii.gz"], "b.nii.gz"),
    "folder of slices": (["s/0.dcm", "s/1"], "s", "s/1"),
    "folders below": (["s/t/0.dcm"], "s", "s/t/0.dcm"),
    "mhd": (["a.mhd", "other name.raw"], "a.mhd", "other name.raw"),
    "mhd of many files": (["b.mhd", "x001.raw", "x002.raw"], "b.mhd", "x002.raw"),
    "nhdr": (["a.nhdr", "a.raw.gz"], "a.nhdr", "a.raw.gz"),
    "hdr": (["c[1].hdr", "c[1].img"], "c[1].hdr", "c[1].img"),
    "img": (["c.img.gz", "c.hdr.gz"], "c.img.gz", "c.hdr.gz"),
}
HEADERS = {
    "a.mhd": "NDims = 3\nElementDataFile = other name.raw\n",
    "b.mhd": "ElementDataFile = x%03d.raw 1 2 1\n",
    "a.nhdr": "NRRD0004\ndata file: ./a.raw.gz\n",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_file_of_an_image_is_stamped(kind, tmp_path):
    files, image, one = IMAGES[kind]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(HEADERS.get(name, "before"))
    (tmp_path / "unrelated").mkdir()
    image = [str(tmp_path / name) for name in image] if isinstance(image, list) else str(tmp_path / image)
    before = file_stamps([image, 3, None, np.zeros(2)])
    assert len(before) == len(files)
    assert file_stamps([image]) == before
    path = tmp_path / one
    stamp = path.stat()
    time.sleep(0.02)
    path.write_text("after!")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time, as an archive gives it
    assert file_stamps([image]) != before


def test_a_file_more_in_a_folder_is_noticed(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.dcm").touch()
    before = file_stamps(str(tmp_path / "s"))
    (tmp_path / "s" / "1.dcm").touch()
    assert len(file_stamps(str(tmp_path / "s"))) == 2 and file_stamps(str(tmp_path / "s")) != before
