"""Training with a teacher that runs once for each view of an image."""

from __future__ import annotations

import torch
from torch import nn

from lorkd_monai.data import TaskSampler
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.teacher import Teacher
from lorkd_monai.transforms import BatchAugment, fixed_view
from tests.engines.tiny_run import TASKS, Items, network, trainer


def teacher(folder, views):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).double()
    return CachedTeacher(Teacher(net, {"a": [0, 1], "b": [0, 1, 2]}, TASKS), folder, views)


def test_teacher_runs_once_for_each_view(tmp_path):
    for views in (1, 2):
        cached = teacher(tmp_path / str(views), views)
        trainer(network(), epochs=4, teacher=cached, augment=BatchAugment(2, seed=0, probability=1.0)).run()
        assert cached.asked == 4 * 16 and cached.answered_from_disk == (4 - views) * 16


def test_same_training_whether_answers_are_there_or_not(tmp_path):
    weights = []
    for _ in range(2):
        net = network()
        trainer(net, epochs=2, teacher=teacher(tmp_path, 2), augment=BatchAugment(2, seed=0)).run()
        weights.append(net.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_views_change_with_the_epoch_and_not_with_the_batch():
    augment, x = BatchAugment(2, seed=0, probability=1.0), Items().images
    assert fixed_view(augment, x, None, 0)[0] is x
    mask = (x > 0.5).long()
    one, one_mask = fixed_view(augment, x, mask, 1)
    other, _ = fixed_view(augment, x, mask, 2)
    assert not torch.equal(one, other) and not torch.equal(one, x)
    order = torch.randperm(len(x))
    again, again_mask = fixed_view(augment, x[order], mask[order], 1)
    assert torch.equal(again, one[order]) and torch.equal(again_mask, one_mask[order])


def test_sampler_repeats_its_seeds():
    sampler = TaskSampler([0, 0, 1, 1, 1], "natural", seed=4)
    sampler.views = 2
    seen = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        seen.append(dict(sampler))
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]
    assert len(set(seen[0].values())) == 5
