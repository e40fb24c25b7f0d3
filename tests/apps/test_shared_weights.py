"""The experts of an application in the memory of one, and images from DICOM data sets."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from app_cases import write_expert, write_volume
from dicom_pictures import write_picture
from PIL import Image

from lorkd_monai.apps.deploy.runtime.dicom_rules import RoutingError, Rule
from lorkd_monai.apps.deploy.runtime.jobs import jobs_of_files
from lorkd_monai.apps.deploy.runtime.shared_weights import ExpertError, ExpertPool
from lorkd_monai.bundle import load_expert


def test_switching_between_experts_gives_each_ones_own_network_bit_for_bit(experts: Path) -> None:
    pool = ExpertPool(experts, device="cpu")
    for name in [*pool.experts, *reversed(pool.experts), *pool.experts]:
        own = load_expert(experts / name)
        dims, channels = pool.experts[name].spatial_dims, 1 if pool.experts[name].spatial_dims == 3 else 3
        image = torch.rand(2, channels, *[16 if dims == 3 else 32] * dims)
        with pool.use(name) as (expert, network), torch.no_grad():
            assert expert.name == name and not network.training
            assert torch.equal(network(image), own(image))
            for key, value in own.state_dict().items():
                assert torch.equal(network.state_dict()[key], value)


def _bytes(network: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def test_experts_of_one_architecture_take_the_memory_of_one_and_of_their_heads(tmp_path: Path) -> None:
    write_expert(tmp_path, "tumor")
    write_expert(tmp_path, "vessel")
    pool = ExpertPool(tmp_path, device="cpu")
    networks = []
    for name in pool.experts:
        with pool.use(name) as (_, network):
            networks.append(network)
    tensors = {value.data_ptr() for network in networks for value in network.state_dict().values() if value.numel()}
    assert len(tensors) < sum(len(network.state_dict()) for network in networks)
    assert pool.bytes() < 1.5 * max(map(_bytes, networks))


def test_two_threads_never_see_each_others_weights(experts: Path) -> None:
    pool, image, wrong = ExpertPool(experts, device="cpu"), torch.rand(1, 1, 16, 16, 16), []
    own = {name: load_expert(experts / name)(image) for name in ("tumor_segmentation", "vessel_segmentation")}

    def work(name: str) -> None:
        for _ in range(5):
            with pool.use(name) as (_, network), torch.no_grad():
                wrong.extend([name] * (not torch.equal(network(image), own[name])))

    threads = [threading.Thread(target=work, args=(name,)) for name in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_pool_refuses(experts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="there is no expert bundle in"):
        ExpertPool(tmp_path)
    pool = ExpertPool(experts)
    with (
        pytest.raises(ExpertError, match="there is no expert 'spleen'; there are lung_classification"),
        pool.use("spleen"),
    ):
        pass
    bundle = write_expert(tmp_path, "tumor")
    torch.save({"weight": torch.zeros(1)}, bundle / "models" / "model.pt")
    with (
        pytest.raises(ExpertError, match="does not fit the network of tumor_seg"),
        ExpertPool(tmp_path).use(bundle.name),
    ):
        pass
    (bundle / "models" / "model.pt").write_bytes(b"no weights")
    with (
        pytest.raises(ExpertError, match="not a state_dict that can be read safely"),
        ExpertPool(tmp_path).use(bundle.name),
    ):
        pass


def test_a_file_finds_its_expert_by_its_folder_or_by_the_tags_beside_it(tmp_path: Path) -> None:
    rules, names = [Rule(("tumor_segmentation",), {"Modality": ("MR",)})], ["tumor_segmentation", "vessel_segmentation"]
    write_volume(tmp_path / "vessel_segmentation" / "a.nii.gz")
    path = write_volume(tmp_path / "b.nii.gz")
    with pytest.raises(RoutingError, match=r"b.nii.gz has no DICOM tags.* b.json"):
        jobs_of_files(tmp_path, rules, names)
    path.with_name("b.json").write_text("[1]")
    with pytest.raises(RoutingError, match="cannot be read as the tags"):
        jobs_of_files(tmp_path, rules, names)
    path.with_name("b.json").write_text('{"Modality": "CT"}')
    with pytest.raises(RoutingError, match="no rule"):
        jobs_of_files(tmp_path, rules, names)
    path.with_name("b.json").write_text('{"Modality": "MR"}')
    jobs = {job.name: job.experts for job in jobs_of_files(tmp_path, rules, names)}
    assert jobs == {"b": ("tumor_segmentation",), "vessel_segmentation_a": ("vessel_segmentation",)}
    write_volume(tmp_path / "b.nii")
    with pytest.raises(RoutingError, match="results of one name: b"):
        jobs_of_files(tmp_path, rules, names)


def test_a_dicom_picture_is_read_as_training_reads_it(experts: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (40, 50)).astype(np.uint16)
    path = write_picture(tmp_path / "image", values, "MONOCHROME1", BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    shown = 255 - (values / 4095 * 255).round().astype(np.uint8)
    Image.fromarray(shown).save(tmp_path / "image.png")
    with ExpertPool(experts, device="cpu").use("lung_classification") as (expert, network):
        given = expert.predict(network, expert.load_dicom(path))
        torch.testing.assert_close(
            given, expert.predict(network, expert.load(tmp_path / "image.png")), atol=1e-3, rtol=0
        )
        frames = write_picture(tmp_path / "frames", np.stack([shown] * 3), NumberOfFrames=3)
        with pytest.raises(ExpertError, match="frames holds several frames, expected one"):
            expert.load_dicom(frames)


def test_an_expert_that_reads_no_dicom_says_so(experts: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(experts / "lung_classification", tmp_path / "lung_classification")
    file = bundle / "configs" / "inference.json"
    config = json.loads(file.read_text())
    config["preprocessing"]["transforms"][0]["reader"] = {"_target_": "PILReader", "reverse_indexing": False}
    file.write_text(json.dumps(config))
    path = write_picture(tmp_path / "image", np.zeros((9, 8), np.uint8))
    expert = ExpertPool(tmp_path, device="cpu").experts["lung_classification"]
    with pytest.raises(ExpertError, match="earlier version, which reads no DICOM pictures; export it again"):
        expert.load_dicom(path)
