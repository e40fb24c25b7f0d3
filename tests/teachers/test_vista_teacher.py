"""VISTA3D, small and random, as a teacher; and encoders that have features only."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import VISTA3D, SegResNetDS2, resnet10
from monai.networks.nets.vista3d import ClassMappingClassify, PointMappingSAM
from torch import nn

from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.bundle import StudentImages, load_teacher
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.features import FeatureTeacher
from lorkd_monai.teachers.vista import ClassPrompted, vista_prompts, vista_teacher

NAMES = {0: "background", 1: "liver", 3: "spleen", 5: "right kidney", 14: "left kidney"}
TASKS = {
    "spleen": {0: "background", 1: "Spleen"},
    "kidneys": {0: "background", 1: "left_kidney", 2: "right kidney"},
    "other": {0: "background", 1: "bone"},
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    encoder = SegResNetDS2(
        in_channels=1, blocks_down=(1, 1), norm="instance", out_channels=8, init_filters=8, dsdepth=1
    )
    heads = {
        "class_head": ClassMappingClassify(n_classes=16, feature_size=8, use_mlp=True),
        "point_head": PointMappingSAM(feature_size=8, n_classes=16, last_supported=14),
    }
    return VISTA3D(image_encoder=encoder, **heads).eval()


def test_equals_the_prompted_network(network):
    x = torch.rand(2, 1, 16, 16, 16)
    teacher = vista_teacher(network, TASKS, NAMES)
    y = teacher(x, [1, 0])
    assert teacher.activation == "sigmoid" and y.shape == (2, 3, 16, 16, 16)
    with torch.no_grad():
        left, right, spleen = network(x[:1], class_vector=torch.tensor([[14], [5], [3]]))[:, 0]
        spleen = network(x[1:], class_vector=torch.tensor([[3]]))[0, 0]
    torch.testing.assert_close(y[0, 1], left, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[0, 2], right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1, 1], spleen, rtol=1e-4, atol=1e-5)
    assert (y[:, 0] == -torch.inf).all() and (y[1, 2] == -torch.inf).all()
    assert teacher.has_logits([0, 1, 2]).tolist() == [True, True, False]
    assert teacher(x, 2).isnan().all()


def test_prompts_of_the_data_list():
    spec = SimpleNamespace(labels=TASKS["other"], vista3d_class={1: 7})
    assert vista_prompts({"spleen": TASKS["spleen"], "other": spec}, NAMES) == {"spleen": [None, 3], "other": [None, 7]}
    assert vista_prompts({"other": spec}) == {"other": [None, 7]}
    with pytest.raises(LoRKDError, match="names are not known, and the data list gives no prompts for spleen"):
        vista_prompts({"spleen": TASKS["spleen"], "other": spec})
    two = SimpleNamespace(labels=TASKS["kidneys"], vista3d_class={1: 7})
    with pytest.raises(LoRKDError, match="a prompt for each class but the background; right kidney lack one"):
        vista_prompts({"kidneys": two})
    wrong = SimpleNamespace(labels=TASKS["other"], vista3d_class={1: 7, 4: 2})
    with pytest.raises(LoRKDError, match="it has no class 4"):
        vista_prompts({"other": wrong})


def test_refused(network):
    with pytest.raises(LoRKDError, match="expected a VISTA3D network, got a Linear"):
        ClassPrompted(nn.Linear(1, 1), [1])
    for classes in ([], [0], [1, 1], [99], ["liver"]):
        with pytest.raises(LoRKDError, match=r"class prompts must be different numbers in 1..\d+"):
            ClassPrompted(network, classes)


def write_bundle(folder, config, network, outputs, **more):
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    metadata = {"network_data_format": {"inputs": {"image": {"num_channels": 1}}, "outputs": {"pred": outputs}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": config, **more}))
    save_weights(folder / "models" / "model.pt", network.state_dict())
    return folder


def test_from_a_bundle(network, tmp_path):
    config = {
        "_target_": "VISTA3D",
        "image_encoder": {
            "_target_": "SegResNetDS2", "in_channels": 1, "blocks_down": [1, 1], "norm": "instance", "out_channels": 8,
            "init_filters": 8, "dsdepth": 1,
        },
        "class_head": {
            "_target_": "monai.networks.nets.vista3d.ClassMappingClassify", "n_classes": 16, "feature_size": 8,
            "use_mlp": True,
        },
        "point_head": {
            "_target_": "monai.networks.nets.vista3d.PointMappingSAM", "feature_size": 8, "n_classes": 16,
            "last_supported": 14,
        },
    }  # fmt: skip
    scale = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -100, "a_max": 100, "b_min": 0, "b_max": 1}
    outputs = {"channel_def": {str(k): v for k, v in NAMES.items()}}
    more = {"preprocessing": {"_target_": "Compose", "transforms": [scale]}}
    folder = write_bundle(tmp_path / "vista", config, network, outputs, **more)
    student = StudentImages(dict.fromkeys(TASKS, (0.0, 200.0)))
    teacher = load_teacher(folder, TASKS, student)
    x = torch.rand(1, 1, 16, 16, 16)
    expected = vista_teacher(network, TASKS, NAMES)(x + 0.5, 0)  # (200 x + 100) / 200
    torch.testing.assert_close(teacher(x, 0), expected, rtol=1e-4, atol=1e-5)
    short = load_teacher(folder, TASKS, ranges=student.ranges)
    torch.testing.assert_close(short(x, 0), expected, rtol=1e-4, atol=1e-5)
    same = load_teacher(folder, TASKS, student, "same")
    torch.testing.assert_close(same(x, 0), vista_teacher(network, TASKS, NAMES)(x, 0), rtol=1e-4, atol=1e-5)


def test_encoder_without_classes(tmp_path):
    config = {
        "_target_": "monai.networks.nets.resnet10", "spatial_dims": 2, "n_input_channels": 1, "feed_forward": False,
        "widen_factor": 0.125,
    }  # fmt: skip
    arguments = {k: v for k, v in config.items() if k != "_target_"}
    encoder = resnet10(**arguments).eval()
    folder = write_bundle(tmp_path / "encoder", config, encoder, {"type": "feature"})
    teacher = load_teacher(folder, {"a": {0: "x", 1: "y"}, "b": {0: "x", 1: "y", 2: "z"}})
    assert isinstance(teacher, FeatureTeacher) and not teacher.has_logits([0, 1]).any()
    x = torch.rand(3, 1, 32, 32)
    expected = encoder(x)
    for _ in range(2):
        for one in (teacher, CachedTeacher(teacher, tmp_path / "cache")):
            logits, features = one(x, torch.tensor([0, 1, 1]), return_features=True)
            assert logits is None
            torch.testing.assert_close(features, expected)
    with pytest.raises(LoRKDError, match="has features only, no classes"):
        teacher(x, 0)


def test_an_encoder_whose_metadata_does_not_say_so(tmp_path):
    config = {
        "_target_": "monai.networks.nets.resnet10", "spatial_dims": 2, "n_input_channels": 1, "feed_forward": False,
        "widen_factor": 0.125,
    }  # fmt: skip
    encoder = resnet10(**{k: v for k, v in config.items() if k != "_target_"}).eval()
    folder = write_bundle(tmp_path / "encoder", config, encoder, {"type": "image"})
    with pytest.raises(LoRKDError):
        load_teacher(folder, {"a": {0: "x", 1: "y"}})
    assert isinstance(load_teacher(folder, {"a": {0: "x", 1: "y"}}, features_only=True), FeatureTeacher)


def test_features_are_pooled():
    x = torch.rand(2, 1, 8, 8)
    maps = FeatureTeacher(nn.Conv2d(1, 5, 3), {"a": 2})
    torch.testing.assert_close(maps.features_of(x), maps.network(x).mean((2, 3)))
    tokens = FeatureTeacher(nn.Sequential(nn.Flatten(2), nn.Linear(64, 6)), {"a": 2}, tokens=True, in_channels=1)
    assert tokens.features_of(x).shape == (2, 6)
    with pytest.raises(LoRKDError, match="expected features of 2 images"):
        FeatureTeacher(nn.Flatten(0), {"a": 2}, in_channels=1).features_of(x)
