"""Students that start from a selection of a larger network's weights."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn

from lorkd_monai.engines import start_from_teacher
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.weight_selection import select_weights
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.teacher import Teacher

CLASSES = {"a": 2, "b": 3}


def resnet(width: int, classes: int = 5, dims: int = 2) -> ResNet:
    widths = [width * n for n in (1, 2, 4, 8)]
    return ResNet("basic", [1, 1, 1, 1], widths, spatial_dims=dims, n_input_channels=1, num_classes=classes)


def teacher_of(network: nn.Module) -> Teacher:
    return Teacher(network, {"a": [0, 1], "b": [2, 3, 4]}, CLASSES)


def test_an_even_selection_of_channels_is_taken():
    student, teacher = LoRKDNet(resnet(3), CLASSES, rank=1), resnet(5)
    heads = {k: v.clone() for k, v in student.state_dict().items() if ".tasks." in k}
    taken = select_weights(student, teacher)
    plain = student.extract("a")
    assert taken == sum(t.ndim > 0 for n, t in plain.state_dict().items() if not n.startswith("fc"))
    assert torch.equal(plain.conv1.weight, teacher.conv1.weight[[0, 2, 4]])
    rows, columns = torch.linspace(0, 9, 6).round().long(), torch.tensor([0, 2, 4])
    assert torch.equal(plain.layer2[0].conv1.weight, teacher.layer2[0].conv1.weight[rows][:, columns])
    assert torch.equal(plain.layer2[0].bn1.running_var, teacher.layer2[0].bn1.running_var[rows])
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in heads.items())


def test_norms_of_tasks_all_start_alike():
    student, teacher = LoRKDNet(resnet(3), CLASSES, rank=1, norm="task"), resnet(5)
    teacher.bn1.running_mean.normal_()
    select_weights(student, teacher)
    for task in CLASSES:
        assert torch.equal(student.extract(task).bn1.running_mean, teacher.bn1.running_mean[[0, 2, 4]])


def test_a_teacher_of_the_same_size_is_taken_whole():
    student, teacher = LoRKDNet(resnet(4), CLASSES, rank=1), resnet(4).eval()
    select_weights(student, teacher)
    seen = []
    for network in (student.extract("a").eval(), teacher):
        network.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        network(torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*seen)


def test_a_smaller_teacher_is_refused():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(LoRKDError, match="no layer of the student .* take a smaller network of the teacher's kind"):
        select_weights(LoRKDNet(plain, CLASSES), nn.Sequential(nn.Conv2d(1, 4, 3)))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("init", ["auto", "teacher"])
def test_start_from_teacher(init, cached, caplog, tmp_path):
    caplog.set_level("INFO")
    student, teacher = LoRKDNet(resnet(2), CLASSES, rank=1), teacher_of(resnet(4))
    teacher = CachedTeacher(teacher, tmp_path) if cached else teacher
    start_from_teacher(student, teacher, init)
    assert torch.equal(student.extract("a").conv1.weight, teacher.network.conv1.weight[[0, 3]])
    assert "starts from a selection of the teacher's weights" in caplog.text


def test_start_at_random_where_told_or_where_nothing_fits(caplog):
    caplog.set_level("INFO")
    student = LoRKDNet(resnet(2), CLASSES, rank=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    start_from_teacher(student, teacher_of(resnet(4)), "random")
    start_from_teacher(student, None, "auto")
    assert caplog.text == ""
    view = TaskChannels.build({"_target_": "DenseNet121", "spatial_dims": 2, "in_channels": 1}, CLASSES)
    start_from_teacher(student, teacher_of(view.network), "auto")
    assert "starts at random" in caplog.text
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())
    with pytest.raises(LoRKDError, match="init is 'teacher', and there is none"):
        start_from_teacher(student, None, "teacher")
