"""Experts of several runs in one folder: each keeps a name of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorkd_monai.bundle import check_bundle, export_experts, network_info
from lorkd_monai.bundle.writer import expert_folder
from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet


def decomposition(dims: int, *tasks: str) -> LoRKDNet:
    config = {"_target_": "UNet", "spatial_dims": dims, "in_channels": 1, "out_channels": 2, "channels": [4, 8],
              "strides": [2]}  # fmt: skip
    specs = {name: TaskSpec(name, i, {0: "background", 1: "lesion"}) for i, name in enumerate(tasks)}
    data = DataList("a", Path(), "segmentation", dims, specs)
    return LoRKDNet(config, data.num_classes, rank=1, info=network_info(data, 1, 16))


def dims_in(folder: Path) -> dict[str, int]:
    """Name of each expert in a folder, and the dimensions of its images."""
    found = {}
    for expert in sorted(folder.iterdir()):
        described = json.loads((expert / "configs" / "metadata.json").read_text())["network_data_format"]
        found[expert.name] = len(described["inputs"]["image"]["spatial_shape"])
    return found


@pytest.mark.parametrize("first", [2, 3])
def test_two_and_three_dimensions_of_one_task(tmp_path, first):
    second = 5 - first
    nets = {dims: decomposition(dims, "liver") for dims in (first, second)}
    export_experts(nets[first], tmp_path, formats=["pt"])
    (other,) = export_experts(nets[second], tmp_path, formats=["pt"])
    expected = {"liver_segmentation": first, f"liver_{second}d_segmentation": second}
    assert dims_in(tmp_path) == expected
    assert check_bundle(other, thorough=False) == []
    # Each is still itself: not replaced unasked, and then only by its own kind.
    for net in nets.values():
        with pytest.raises(LoRKDError, match="already holds the experts liver_"):
            export_experts(net, tmp_path, formats=["pt"])
    for dims in (second, first):
        before = {name: (tmp_path / name / "models" / "model.pt").stat().st_ino for name in expected}
        export_experts(nets[dims], tmp_path, formats=["pt"], overwrite=True)
        after = {name: (tmp_path / name / "models" / "model.pt").stat().st_ino for name in expected}
        assert dims_in(tmp_path) == expected
        assert [name for name in expected if before[name] != after[name]] == [
            name for name in expected if expected[name] == dims
        ]


def test_a_task_that_is_called_like_the_longer_name(tmp_path):
    export_experts(decomposition(3, "liver"), tmp_path, formats=["pt"])
    export_experts(decomposition(2, "liver"), tmp_path, formats=["pt"])
    export_experts(decomposition(2, "liver_2d"), tmp_path, formats=["pt"], overwrite=True)
    assert dims_in(tmp_path) == {"liver_2d_2d_segmentation": 2, "liver_2d_segmentation": 2, "liver_segmentation": 3}
    assert expert_folder(tmp_path, "liver_2d", "segmentation", 3).name == "liver_2d_3d_segmentation"
    (tmp_path / "liver_2d_2d_segmentation").rename(tmp_path / "liver_2d_3d_segmentation")
    with pytest.raises(LoRKDError, match="already holds other experts of the names liver_2d_segmentation and"):
        expert_folder(tmp_path, "liver_2d", "segmentation", 3)


def test_two_tasks_of_one_run_never_share_a_folder(tmp_path):
    export_experts(decomposition(3, "liver"), tmp_path, formats=["pt"])
    with pytest.raises(LoRKDError, match="two of the tasks liver, liver_2d would have one folder"):
        export_experts(decomposition(2, "liver", "liver_2d"), tmp_path, formats=["pt"], overwrite=True)
    assert dims_in(tmp_path) == {"liver_segmentation": 3}


@pytest.mark.parametrize("text", ["{", "{}", '{"network_data_format": 3}', '{"task": "mine"}'])
def test_what_is_no_known_expert_keeps_its_name(tmp_path, text):
    (tmp_path / "liver_segmentation" / "configs").mkdir(parents=True)
    (tmp_path / "liver_segmentation" / "configs" / "metadata.json").write_text(text)
    with pytest.raises(LoRKDError, match="already holds the experts liver_segmentation"):
        export_experts(decomposition(2, "liver"), tmp_path, formats=["pt"])
