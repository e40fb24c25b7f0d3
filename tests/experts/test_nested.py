"""Nested experts: cut to any lower rank, in every layer and layout, and trained to be."""

import pytest
import torch
from torch import nn

from lorkd_monai.checkpoints.packs import load_expert, load_pack, save_pack
from lorkd_monai.checkpoints.weights import load_decomposition, save_weights
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.nested import exchange_expert
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet, LowRankLayer, route
from lorkd_monai.networks.routing.table import Routing
from lorkd_monai.networks.spec import cut_rank, draw_ranks
from tests.small_networks import SMALL_RESNET

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 5, 5, 5)),
    "conv3d_anisotropic": (lambda: nn.Conv3d(2, 4, (1, 3, 3)), (2, 4, 5, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
}
BACKBONE = {**SMALL_RESNET, "n_input_channels": 1}


def with_experts(module):
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def decomposition(rank=4, nested=True, **options):
    torch.manual_seed(0)
    return with_experts(LoRKDNet(BACKBONE, {"a": 2, "b": 3, "c": 2}, rank=rank, nested=nested, **options))


@pytest.mark.parametrize("layout", ["lorkd", "conv"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_cut_layer_is_the_sum_of_its_first_components(kind, layout):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = with_experts(LowRankLayer(make().double(), [4, 3, 5], [0.5, 2.0, 1.0], layout))
    x = torch.rand(6, *shape, dtype=torch.float64)
    tasks, ranks = [2, 0, 1, 0, 2, 1], {0: 2, 1: 1, 2: 5}
    with route(Routing(tasks, 6, ranks)):
        y = layer(x)
    blocks = layer.lora_A[0].shape[0] // 4
    for row, task in enumerate(tasks):
        a, b = layer.lora_A[task], layer.lora_B[task]
        delta = sum(b[:, j * blocks : (j + 1) * blocks] @ a[j * blocks : (j + 1) * blocks] for j in range(ranks[task]))
        plain = layer.plain(task, {}, ranks[task])
        assert type(plain) is type(layer.layer)
        expected = layer.layer.weight + layer.scales[task] * delta.view(layer.layer.weight.shape)
        torch.testing.assert_close(plain.weight, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[row : row + 1], plain(x[row : row + 1]), rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    rows = ranks[0] * blocks
    assert layer.lora_A[0].grad[:rows].abs().min() > 0
    assert not layer.lora_A[0].grad[rows:].any()
    assert not layer.lora_B[0].grad[:, rows:].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "conv"}, {"rank": {"a": 1, "b": 4, "c": 6}}, {"rank_pattern": {"layer3*": 2, "layer1*": 0.5}},
     {"norm": "task"}],
    ids=["lorkd", "conv", "ranks", "pattern", "norms"],
)  # fmt: skip
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_an_extracted_cut_expert_equals_the_routed_one(k, options):
    net = decomposition(**options).double().eval()
    x, task = torch.rand(5, 1, 32, 32, dtype=torch.float64), torch.tensor([2, 0, 1, 1, 0])
    with torch.no_grad():
        mixed = net(x, task, rank=k)
        for row, t in enumerate(task.tolist()):
            name = net.tasks[t]
            own = net.extract(name, rank=k)(x[row : row + 1])
            classes = net.num_classes[name]
            torch.testing.assert_close(mixed[row : row + 1, :classes], own, rtol=1e-10, atol=1e-12)
            one = net(x[row : row + 1], name, rank={name: k})[:, :classes]
            torch.testing.assert_close(one, own, rtol=1e-10, atol=1e-12)
            if k >= net.spec()["rank"][name]:
                assert torch.equal(own, net.extract(name)(x[row : row + 1]))


def test_the_rank_of_a_layer_follows_the_pattern():
    net = decomposition(rank_pattern={"layer3*": 2, "layer1*": 0.5})
    for name, layer in net.expert_layers.items():
        factor = 2 if name.startswith("layer3") else 0.5 if name.startswith("layer1") else 1
        columns = layer.factors(0, 3)[1].shape[1] // layer.layer.weight.shape[2]
        assert columns == max(1, round(3 * factor))


def test_only_training_draws_ranks():
    net = decomposition()
    x, task = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    seen = []
    layer = next(iter(net.expert_layers.values()))
    routing = layer.routing
    layer.routing = lambda x: (seen.append(routing(x).ranks), routing(x))[1]
    net.train()
    for _ in range(40):
        net(x, task)
    drawn = [ranks for ranks in seen if ranks is not None]  # finding out how the network folds its batch cuts nothing
    assert len(drawn) == 40
    assert {ranks[t] for ranks in drawn for t in range(3)} == {1, 2, 3, 4}
    seen.clear()
    net.eval()
    whole = decomposition(nested=False).eval()
    whole.load_state_dict(net.state_dict())
    assert torch.equal(net(x, task), whole(x, task))
    assert set(seen) == {None}


def test_draws_are_even_and_follow_the_seed():
    torch.manual_seed(3)
    drawn = [draw_ranks([1, 4]) for _ in range(4000)]
    assert {ranks[0] for ranks in drawn} == {1}
    counts = [sum(ranks[1] == k for ranks in drawn) for k in (1, 2, 3, 4)]
    assert sum(counts) == 4000
    assert all(abs(count - 1000) < 120 for count in counts)
    torch.manual_seed(3)
    assert [draw_ranks([1, 4]) for _ in range(4000)] == drawn


def test_training_orders_the_components():
    """A target of full rank: after nested training each further component helps, and the first alone beats a cut of
    plain training."""
    errors = {}
    for nested in (True, False):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        with torch.no_grad():
            backbone[1].weight.copy_(torch.eye(8))
        net = LoRKDNet(backbone, {"a": 8}, rank=4, head="1", scale=1.0, nested=nested)
        net.requires_grad_(False)
        layer = net.expert_layers["0"]
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        net.backbone[1].load_state_dict({"tasks.0.weight": torch.eye(8)})
        u, _, v = torch.linalg.svd(torch.randn(8, 8))
        target = layer.layer.weight + u[:, :4] @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ v[:4]
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
        for _ in range(600):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            (net(x, 0) - x @ target.T).square().mean().backward()
            optimizer.step()
        net.eval()
        a, b = layer.lora_A[0], layer.lora_B[0]
        errors[nested] = [
            float((layer.layer.weight + b[:, :k] @ a[:k] - target).square().sum().detach()) for k in (1, 2, 3, 4)
        ]
    one, two, three, four = errors[True]
    assert one > two > three > four
    assert one < 7  # the best of rank 1 has 4 + 1 + 0.25
    assert errors[False][0] > 2 * one
    assert errors[False][3] < 0.1


def test_cutting_what_was_not_trained_for_it_is_refused(tmp_path):
    net = decomposition(nested=False).eval()
    with pytest.raises(LoRKDError, match="task 'b' can't be cut from rank 4 to 2: .* trained with nested=True"):
        net.extract("b", rank=2)
    with pytest.raises(LoRKDError, match="task 'a' can't be cut"):
        net(torch.rand(1, 1, 32, 32), "b", rank=3)
    with pytest.raises(LoRKDError, match="task 'a' can't be cut"):
        save_pack(net, tmp_path, rank=2)
    assert not list(tmp_path.iterdir())
    assert cut_rank(net, "a", 7) == 4
    for rank in (0, 1.5, True, "2"):
        with pytest.raises(LoRKDError, match="rank must be a whole number of at least 1"):
            net.extract("a", rank=rank)
    with pytest.raises(LoRKDError, match="nested must be True or False"):
        decomposition(nested="yes")
    with pytest.raises(LoRKDError, match="unknown task 'z'"):
        net(torch.rand(1, 1, 32, 32), "a", rank={"z": 1})


@pytest.mark.parametrize("options", [{}, {"rank": {"a": 1, "b": 4, "c": 6}}, {"rank_pattern": {"layer3*": 2}},
                                     {"scale": 2.0, "layout": "conv"}])  # fmt: skip
def test_packs_of_a_lower_rank(tmp_path, options):
    net = decomposition(**options).eval()
    whole = save_pack(net, tmp_path / "whole")
    cut = save_pack(net, tmp_path / "cut", rank=2)
    sizes = [sum(f.stat().st_size for f in files[1:]) for files in (whole, cut)]
    assert sizes[1] < 0.75 * sizes[0]
    again = load_pack(tmp_path / "cut")
    assert again.nested
    assert again.spec()["rank"] == {t: min(2, r) for t, r in net.spec()["rank"].items()}
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        for task in net.tasks:
            torch.testing.assert_close(again(x, task), net(x, task, rank=2), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again(x, task, rank=1), net(x, task, rank=1), rtol=1e-5, atol=1e-5)
    other = load_pack(tmp_path / "whole", tasks=["a"])
    assert load_expert(other, tmp_path / "cut" / "expert_b.safetensors") == "b"
    with torch.no_grad():
        torch.testing.assert_close(other(x, "b"), net(x, "b", rank=2), rtol=1e-5, atol=1e-5)


def test_an_expert_of_another_rank_takes_a_place_in_a_running_network(tmp_path):
    net = decomposition(rank_pattern={"layer3*": 2}).eval()
    save_pack(net, tmp_path, rank={"b": 1})
    running = decomposition(rank_pattern={"layer3*": 2}).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        before = running(x, "a"), running(x, "b")
        assert load_expert(running, tmp_path / "expert_b.safetensors") == "b"
        assert running.spec()["rank"] == {"a": 4, "b": 1, "c": 4}
        assert torch.equal(running(x, "a"), before[0])
        torch.testing.assert_close(running(x, "b"), net(x, "b", rank=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(running(x, [0, 1])[1:], running(x, "b")[1:], rtol=1e-5, atol=1e-5)
        state = net.expert_state_dict("c")
        with pytest.raises(LoRKDError, match="expert of task 'b' does not fit: .*lora_A is .*, expected"):
            exchange_expert(running, "b", state, 3)
        assert running.spec()["rank"]["b"] == 1
        save_pack(net, tmp_path / "whole")
        load_expert(running, tmp_path / "whole" / "expert_b.safetensors")
        assert torch.equal(running(x, "b"), before[1])


def test_checkpoints_know_nested_experts(tmp_path):
    net = decomposition()
    assert net.spec()["nested"] is True
    assert "nested" not in decomposition(nested=False).spec()
    save_weights(tmp_path / "net.pt", net.state_dict())
    assert load_decomposition(tmp_path / "net.pt").nested
    with pytest.raises(LoRKDError, match="nested: checkpoint None, this network True"):
        net.load_state_dict(decomposition(nested=False).state_dict())


def test_a_step_trains_nested_experts_of_its_tasks_only():
    net = decomposition().train()
    loss = LoRKDLoss("ce", transfer_weight=0, tasks=net.num_classes)
    loss(net(torch.rand(2, 1, 32, 32), [0, 0]), torch.tensor([0, 1]), torch.tensor([0, 0])).backward()
    assert any(p.grad is not None and p.grad.any() for p in net.expert_tensors(0).values())
    for index in (1, 2):
        grads = [t.grad for t in net.expert_tensors(index).values() if isinstance(t, nn.Parameter)]
        assert all(g is None or not g.any() for g in grads)
