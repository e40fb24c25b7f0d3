"""The settings of bundles and studies: one description, from which values are checked and the docs are written."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lorkd_monai.data.samplers import TaskSampler
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.transfer import POSITIONS
from lorkd_monai.networks.eks.strategies import LAYOUTS
from lorkd_monai.networks.spec import NORMS
from lorkd_monai.settings import BUNDLE_SETTINGS, STUDY_SETTINGS, Setting, check_values
from lorkd_monai.study import StudySettings


@pytest.mark.parametrize("script", ["settings_docs.py", "make_bundles.py"])
def test_the_tables_of_the_docs_are_up_to_date(repository, script):
    program = [sys.executable, str(repository / "scripts" / script), "--check"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_setting_of_a_study_is_described_and_has_a_rule():
    assert {field.name for field in dataclasses.fields(StudySettings)} == set(STUDY_SETTINGS)
    assert all(setting.rule is not None for setting in STUDY_SETTINGS.values())


def test_what_both_have_is_described_once():
    own = {"backbone", "teacher_backbone", "teacher_bundle", "rank", "init"}  # for a study they are something else
    for name in BUNDLE_SETTINGS.keys() & STUDY_SETTINGS.keys() - own:
        assert BUNDLE_SETTINGS[name] is STUDY_SETTINGS[name]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("image_size", (1, [4, 4], (4, 4, 8)), (0, True, 4.0, [4], [4, 0], [1, 1, 1, 1], "4", None)),
        ("tasks_per_batch", (None, 1), (0, 1.0, "2")),
        ("flip_axes", ([], (0, 2)), ([3], [-1], 0, "01", None)),
        ("rank", (0, 4, {"a": 2}, None), (-1, 1.5, "4", [4])),
        ("cache_teacher", (True, False, 0, 3), (-1, 0.5, "yes", None)),
        ("teacher_intensity", ("auto", "zscore", {"range": [0, 1]}), ("autos", 1, None)),
        ("ema", (0, 0.99), (1, -0.1, float("nan"), "0", False)),
        ("alpha", (1, 0.5), (0, -1, float("inf"))),
        ("init", ("auto", "teacher", "random"), ("Auto", None, 1)),
        ("amp", (True, False), (0, "true", None)),
    ],
)
def test_good_and_bad_values(name, good, bad):
    for value in good:
        check_values({name: value}, BUNDLE_SETTINGS)
    for value in bad:
        with pytest.raises(LoRKDError) as caught:
            check_values({name: value}, BUNDLE_SETTINGS)
        assert str(caught.value).startswith(f"{name} must be ") and str(caught.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(("name", "choices"), [("layout", LAYOUTS), ("norm", NORMS), ("transfer_positions", POSITIONS)])
def test_choices_are_those_of_what_takes_them(name, choices):
    for value in choices:
        check_values({name: value}, STUDY_SETTINGS)
    assert STUDY_SETTINGS[name].rule[0] == f"one of {', '.join(map(repr, choices))}"


def test_every_way_of_sampling_is_one_of_the_sampler():
    for value in ("natural", "balanced", "temperature"):
        check_values({"sampling": value}, STUDY_SETTINGS)
        TaskSampler([0, 1], value)
    with pytest.raises(LoRKDError, match="sampling must be one of 'natural', 'balanced', 'temperature', got 'even'"):
        check_values({"sampling": "even"}, STUDY_SETTINGS)


def test_all_problems_are_in_one_message():
    with pytest.raises(LoRKDError, match="^seed must be .*, got -1; ema must be .*, got 1; batch_size must be"):
        check_values({"seed": -1, "rotate": 0, "ema": 1, "batch_size": "8", "other": object()}, BUNDLE_SETTINGS)
    with pytest.raises(LoRKDError, match=r"^tasks_per_batch must be at most batch_size \(2\), got 3$"):
        check_values({"batch_size": 2, "tasks_per_batch": 3}, BUNDLE_SETTINGS)
    check_values({"path": 1}, {"path": Setting("without a rule")})
