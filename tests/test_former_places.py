"""Names that README and docs gave before the package was arranged anew; they go with version 0.2."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("networks.packs", "checkpoints.packs", "load_pack"),
        ("networks.pool", "serving.pool", "ExpertPool"),
        ("networks.functional", "networks.eks.strategies", "eks_strategy"),
        ("networks.checkpoint", "checkpoints.weights", "load_decomposition"),
        ("networks.teacher", "teachers.teacher", "Teacher"),
    ],
)
def test_a_former_place_hands_the_names_on_and_says_so(old, new, name):
    sys.modules.pop(f"lorkd_monai.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"has moved to lorkd_monai.{new}"):
        former = importlib.import_module(f"lorkd_monai.{old}")
    here = importlib.import_module(f"lorkd_monai.{new}")
    assert getattr(former, name) is getattr(here, name)
    assert former.__all__ == here.__all__
