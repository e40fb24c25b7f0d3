"""Expert packs: one shared file, one small file a task, and nothing that fits where it does not belong."""

import copy

import pytest
import safetensors.torch
import torch

from lorkd_monai.checkpoints.packs import fingerprint, load_expert, load_pack, save_expert, save_pack
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from tests.small_networks import SMALL_RESNET

BACKBONE = {**SMALL_RESNET, "n_input_channels": 1}


def decomposition(seed=0, tasks=None, **options):
    torch.manual_seed(seed)
    net = LoRKDNet(BACKBONE, tasks or {"breast": 2, "xray": 3}, rank=2, **options).eval()
    for layer in net.expert_layers.values():
        for b in layer.lora_B:
            torch.nn.init.normal_(b, std=0.1)
    return net


@pytest.mark.parametrize("norm", ["shared", "task"])
def test_a_pack_gives_the_same_network_again(tmp_path, norm):
    net = decomposition(norm=norm)
    files = save_pack(net, tmp_path)
    assert [f.name for f in files] == ["shared.safetensors", "expert_breast.safetensors", "expert_xray.safetensors"]
    again = load_pack(tmp_path)
    assert again.spec() == net.spec()
    x = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x, [1, 0, 1]), net(x, [1, 0, 1]))


def test_a_part_of_the_experts_in_another_order(tmp_path):
    net = decomposition(tasks={"a": 2, "b": 3, "c": 4})
    save_pack(net, tmp_path)
    some = load_pack(tmp_path, tasks=["c", "a"])
    assert some.num_classes == {"c": 4, "a": 2}
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(some(x, "c"), net(x, "c"))


def test_an_expert_moves_into_a_running_network(tmp_path):
    net = decomposition(tasks={"a": 2, "b": 3})
    save_pack(net, tmp_path)
    small = load_pack(tmp_path, tasks=["a"])
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        before = small(x, "a")
        assert load_expert(small, tmp_path / "expert_b.safetensors") == "b"
        assert torch.equal(small(x, "a")[:, :2], before)
        assert torch.equal(small(x, "b"), net(x, "b"))


def test_the_fingerprint_knows_the_shared_weights_only():
    net = decomposition()
    mark = fingerprint(net)
    net.add_task("new", 5)
    with torch.no_grad():
        net.expert_layers["layer1.0.conv1"].lora_B[0].add_(1)
    assert fingerprint(net) == mark
    with torch.no_grad():
        net.expert_layers["layer1.0.conv1"].layer.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(net) != mark


def test_an_expert_of_another_backbone_is_refused(tmp_path):
    save_pack(decomposition(0), tmp_path / "one")
    other = decomposition(1)
    save_pack(other, tmp_path / "other")
    (tmp_path / "one" / "expert_breast.safetensors").replace(tmp_path / "other" / "expert_breast.safetensors")
    with pytest.raises(LoRKDError, match="expert of task 'breast' belongs to other shared weights"):
        load_pack(tmp_path / "other")
    with pytest.raises(LoRKDError, match="belongs to other shared weights"):
        load_expert(other, tmp_path / "other" / "expert_breast.safetensors")
    with pytest.raises(LoRKDError, match="belongs to other shared weights"):
        save_expert(other, "xray", tmp_path / "one")


@pytest.mark.parametrize("name", ["shared.safetensors", "expert_xray.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, name):
    save_pack(decomposition(), tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoRKDError, match=f"{name} is not a complete file"):
        load_pack(tmp_path)


def test_an_expert_under_another_name_is_refused(tmp_path):
    save_pack(decomposition(tasks={"breast": 2, "xray": 2}), tmp_path)
    (tmp_path / "expert_breast.safetensors").replace(tmp_path / "expert_xray.safetensors")
    with pytest.raises(LoRKDError, match="expert_xray.safetensors holds the expert of task 'breast', not 'xray'"):
        load_pack(tmp_path)


def test_a_running_network_is_unchanged_by_what_is_refused(tmp_path):
    net = decomposition()
    save_pack(net, tmp_path)
    save_pack(decomposition(tasks={"breast": 2, "xray": 4, "new": 2}), tmp_path / "other")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    cut = tmp_path / "expert_breast.safetensors"
    cut.write_bytes(cut.read_bytes()[:-50])
    for file, message in (
        (cut, "is not a complete file of an expert pack"),
        (tmp_path / "shared.safetensors", "holds the shared weights of a pack, no expert"),
        (tmp_path / "other" / "expert_new.safetensors", "belongs to other shared weights"),
        (tmp_path / "no.safetensors", "is not a complete file of an expert pack"),
    ):
        with pytest.raises(LoRKDError, match=message):
            load_expert(net, file)
    twin = copy.deepcopy(net)
    twin.remove_task("xray")
    twin.add_task("xray", 4)
    save_pack(twin, tmp_path / "wider")
    with pytest.raises(LoRKDError, match="expert of task 'xray' does not fit: .* is \\(4"):
        load_expert(net, tmp_path / "wider" / "expert_xray.safetensors")
    after = net.state_dict()
    assert net.tasks == ["breast", "xray"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_changed_shared_weights_are_refused(tmp_path):
    save_pack(decomposition(), tmp_path)
    file = tmp_path / "shared.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    tensors["backbone.bn1.weight"] += 0.5
    safetensors.torch.save_file(tensors, file, metadata=header)
    with pytest.raises(LoRKDError, match="does not have the weights that its fingerprint names"):
        load_pack(tmp_path)


def test_bad_folders_and_names(tmp_path):
    with pytest.raises(LoRKDError, match="is not a complete file of an expert pack"):
        load_pack(tmp_path)
    with pytest.raises(LoRKDError, match="can't name a file"):
        save_pack(decomposition(tasks={"../x": 2}), tmp_path)
    assert not list(tmp_path.iterdir())
    save_pack(decomposition(), tmp_path)
    with pytest.raises(LoRKDError, match="is not a complete file"):
        load_pack(tmp_path, tasks=["spleen"])
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "expert_breast.safetensors")
    with pytest.raises(LoRKDError, match="is not a file of an expert pack"):
        load_pack(tmp_path)
