"""A teacher whose answers are kept: what it gives back, what makes it ask again, broken files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.teacher import Teacher

CLASSES = {"a": 2, "b": 3, "c": 2}


def teacher(channels=None, seed=0, **options) -> Teacher:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    channels = channels or {"a": [0, 1], "b": [2, 3, (0, 4)], "c": None}
    return Teacher(network, channels, CLASSES, **options)


def images(count=6):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


TASK = torch.tensor([0, 1, 2, 1, 0, 2])


@pytest.mark.parametrize("features", [False, True])
def test_gives_what_the_teacher_gives(tmp_path, features):
    plain = teacher()
    cached = CachedTeacher(plain, tmp_path / "cache")
    expected = plain(images(), TASK, return_features=features)
    for _ in range(2):
        given = cached(images(), TASK, return_features=features)
        for one, other in zip(given if features else [given], expected if features else [expected], strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert (cached.asked, cached.answered_from_disk) == (12, 6)
    again = CachedTeacher(teacher(), tmp_path / "cache")  # another run
    again.teacher.network = None  # never needed
    out = again(images().flip(0), TASK.flip(0), return_features=features)
    out = (out[0] if features else out).flip(0)
    assert torch.equal(out.nan_to_num(7.0), (expected[0] if features else expected).nan_to_num(7.0))
    assert torch.equal(cached.has_logits(TASK), plain.has_logits(TASK))
    assert cached.activation == "softmax" and cached.num_classes == CLASSES and not cached.train().training


@pytest.mark.parametrize(
    "change",
    [
        lambda t, x: (teacher(seed=1), x),
        lambda t, x: (teacher({"a": [1, 0], "b": [2, 3, 4]}), x),
        lambda t, x: (t, x + 1e-7),
        lambda t, x: (t, x.double()),
        lambda t, x: (t, x.transpose(2, 3)),
    ],
    ids=["weights", "channels", "image", "dtype", "transforms"],
)
def test_another_teacher_or_image_is_asked_anew(tmp_path, change):
    CachedTeacher(teacher(), tmp_path)(images(), TASK)
    changed, x = change(teacher(), images())
    cached = CachedTeacher(changed.to(x.dtype), tmp_path)
    given = cached(x, TASK)
    assert cached.answered_from_disk == 0
    assert torch.equal(given.nan_to_num(7.0), changed(x, TASK).nan_to_num(7.0))


def test_only_missing_images_are_asked(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path)
    cached(images()[:4], TASK[:4])
    asked = []
    cached.teacher.network.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    cached(images(), TASK)
    assert asked == [2]


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_broken_files_count_as_none(tmp_path, content):
    CachedTeacher(teacher(), tmp_path)(images(), TASK)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 6 and not list(tmp_path.rglob(".*"))
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:-8])
    cached = CachedTeacher(teacher(), tmp_path)
    given = cached(images(), TASK)
    assert cached.answered_from_disk == 4
    assert torch.equal(given.nan_to_num(7.0), teacher()(images(), TASK).nan_to_num(7.0))
    assert CachedTeacher(teacher(), tmp_path)(images(), TASK).shape == given.shape


def test_one_task_for_all_and_memory_limit(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path, memory=0)
    for _ in range(2):
        assert torch.equal(cached(images(), 1), teacher()(images(), 1))
    assert cached.answered_from_disk == 6


def test_refused(tmp_path):
    for views in (0, True, 1.5):
        with pytest.raises(LoRKDError, match="views must be a whole number of at least 1"):
            CachedTeacher(teacher(), tmp_path, views)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRKDError, match="is a file"):
        CachedTeacher(teacher(), tmp_path / "file")
    with pytest.raises(LoRKDError, match="task has 2 entries for a batch of 6"):
        CachedTeacher(teacher(), tmp_path)(images(), [0, 1])
    with pytest.raises(LoRKDError, match="the teacher serves tasks 0 to 2"):
        CachedTeacher(teacher(), tmp_path)(images(), 3)


def test_the_number_of_a_task_is_not_its_name(tmp_path):
    """One image may belong to two tasks, and another list may number them the other way round."""
    network = teacher().network
    first = Teacher(network, {"a": [0, 1], "b": [2, 3]}, {"a": 2, "b": 2})
    other = Teacher(network, {"a": [0, 1], "b": [2, 3]}, {"b": 2, "a": 2})
    CachedTeacher(first, tmp_path)(images(1), 0)
    cached = CachedTeacher(other, tmp_path)
    assert torch.equal(cached(images(1), 0), other(images(1), 0))
    assert torch.equal(cached(images(1), 1), first(images(1), 0))
    assert (cached.asked, cached.answered_from_disk) == (2, 1)
