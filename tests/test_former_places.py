"""Names that README, docs and scripts used before the package was arranged anew; they go with version 0.2."""

import importlib
import sys

import pytest

import lorkd_monai.bundle
import lorkd_monai.engines
import lorkd_monai.serving.task_inference
import lorkd_monai.workflows.adding


def test_copies_of_earlier_training_bundles_find_what_they_call():
    assert lorkd_monai.bundle.TaskInference is lorkd_monai.serving.task_inference.TaskInference
    for name in ("added_tasks", "network_with_new_tasks", "new_tasks_of", "trained_info", "what_is_added"):
        assert getattr(lorkd_monai.engines, name) is getattr(lorkd_monai.workflows.adding, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorkd_monai.engines.nothing


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("networks.packs", "checkpoints.packs", "load_pack"),
        ("networks.pool", "serving.pool", "ExpertPool"),
        ("networks.functional", "networks.eks.strategies", "eks_strategy"),
        ("networks.checkpoint", "checkpoints.weights", "load_decomposition"),
        ("networks.teacher", "teachers.teacher", "Teacher"),
        ("networks.teacher_bundle", "teachers.bundle", "load_teacher"),
        ("networks.authors", "checkpoints.released_code", "import_authors"),
    ],
)
def test_a_former_place_hands_the_names_on_and_says_so(old, new, name):
    sys.modules.pop(f"lorkd_monai.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"has moved to lorkd_monai.{new}"):
        former = importlib.import_module(f"lorkd_monai.{old}")
    here = importlib.import_module(f"lorkd_monai.{new}")
    assert getattr(former, name) is getattr(here, name)
    assert former.__all__ == here.__all__
