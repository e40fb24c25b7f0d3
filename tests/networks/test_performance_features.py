"""Gradient checkpointing, mixed precision, compilation, several processes, and serving at a plain network's price."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from monai.networks.nets import ResNet, UNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet, LowRankLayer, route
from lorkd_monai.networks.eks import costs
from lorkd_monai.networks.eks.strategies import eks_strategy
from tests.networks.reference import assert_close

TASKS = {"a": 2, "b": 3, "c": 3}


class Checkpointed(nn.Module):
    """Two convolutions that are computed again in the backward pass, and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def body(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        x = x * 1.0
        y = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(torch.tanh(y).mean((2, 3)))


def made(backbone: nn.Module, **options) -> LoRKDNet:
    net = LoRKDNet(backbone, TASKS, rank=2, **options)
    for name, parameter in net.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return net


def small(reentrant: bool | None = None) -> LoRKDNet:
    torch.manual_seed(0)
    return made(Checkpointed(reentrant)).double()


def narrow_resnet() -> nn.Module:
    return ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3)


def finite_sum(y: torch.Tensor) -> torch.Tensor:
    return y.masked_fill(y.isinf(), 0).square().sum()


def gradients(net: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters()}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for (name, grad), expected in zip(gradients(one).items(), gradients(other).values(), strict=True):
        assert (grad is None) == (expected is None), name
        if grad is not None:
            assert_close(grad, expected, what=name)


# ---------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    plain, net = small(), small(reentrant)
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    for network in (plain, net):
        finite_sum(network(x, [2, 0, 1, 0, 2])).backward()
    assert_same_gradients(net, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_two_calls_before_one_backward_pass(reentrant):
    plain, net = small(), small(reentrant)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    for network in (plain, net):
        one, two, three = network(x, [2, 0, 0, 1]), network(x, [0, 1, 2, 2]), network(x, "b")
        (finite_sum(one) + 2 * finite_sum(three) + 3 * finite_sum(two)).backward()
    assert_same_gradients(net, plain)


def test_checkpointing_with_backward_in_another_thread():
    import threading

    plain, net = small(), small(False)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    finite_sum(plain(x, [2, 0, 1])).backward()
    loss = finite_sum(net(x, [2, 0, 1]))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same_gradients(net, plain)


def test_checkpointing_of_features_alone():
    plain, net = small(), small(False)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for network in (plain, net):
        network(x, [1, 0, 1], return_features=True)[1].square().sum().backward()
    assert_same_gradients(net, plain)


def test_checkpointing_leaves_nothing_behind():
    from lorkd_monai.networks.routing import recompute

    net = small(False)
    finite_sum(net(torch.randn(3, 2, 6, 6, dtype=torch.float64), [2, 0, 1])).backward()
    assert recompute._CURRENT == {}


def test_checkpointing_of_a_single_layer_is_refused_outside_of_its_routing():
    layer = LowRankLayer(nn.Linear(3, 3), [1, 1])
    x = torch.randn(2, 3, requires_grad=True)
    with route([0, 1]):
        y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(LoRKDError, match="called without a routing"):
        y.sum().backward()


# ---------------------------------------------------------------------- mixed precision


LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@LOW_PRECISION
@pytest.mark.parametrize("strategy", [*costs.STRATEGIES, "auto"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 5)], ids=["conv", "linear"])
def test_autocast(layer, strategy, dtype):
    wrapped = LowRankLayer(copy.deepcopy(layer), [2, 2, 2])
    for b in wrapped.lora_B:
        nn.init.normal_(b, std=0.1)
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    task = [0, 2, 2, 1]
    with route(task):
        exact = wrapped(x)
        with torch.autocast("cpu", dtype), eks_strategy(strategy):
            y = wrapped(x)
    assert y.dtype == dtype
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    expected = torch.autograd.grad(exact.square().sum(), [x, *wrapped.parameters()])
    found = torch.autograd.grad(y.float().square().sum(), [x, *wrapped.parameters()])
    for grad, want in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32  # master weights keep their precision
        assert (grad - want).abs().max() < 0.05 * want.abs().max()


@LOW_PRECISION
def test_autocast_training_step_of_a_network(dtype):
    net = made(narrow_resnet())
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before = [p.clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    with torch.autocast("cpu", dtype):
        y = net(torch.rand(4, 1, 32, 32), [0, 2, 1, 0])
        loss = nn.functional.cross_entropy(y.float(), torch.zeros(4, dtype=torch.long))
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert torch.isfinite(loss)
    assert all(p.isfinite().all() for p in net.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_weights_in_bfloat16():
    net = made(Checkpointed()).bfloat16()
    finite_sum(net(torch.rand(3, 2, 6, 6).bfloat16(), [0, 2, 1])).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in net.parameters() if p.grad is not None)


# ---------------------------------------------------------------------- compilation


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_network_gives_the_same(backend):
    torch._dynamo.reset()
    net = small()
    other = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for task in ([2, 0, 1, 0], [1, 1, 0, 2], "b"):
        y, expected = compiled(x, task), other(x, task)
        assert_close(y, expected)
        for network, loss in ((net, finite_sum(y)), (other, finite_sum(expected))):
            network.zero_grad(set_to_none=True)
            loss.backward()
        assert_same_gradients(net, other)


# ---------------------------------------------------------------------- several processes


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _train(rank: int, port: int, tasks: list[list[int]], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    net = small()
    parallel = DistributedDataParallel(net, find_unused_parameters=True)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        optimiser.zero_grad()
        finite_sum(parallel(torch.randn(2, 2, 6, 6, dtype=torch.float64), tasks[rank])).backward()
        optimiser.step()
    torch.save([p.detach() for p in net.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_different_tasks_equal_one(tmp_path):
    tasks = [[0, 1], [1, 1]]  # task 0 in one process alone, task 2 in none
    mp.spawn(_train, (_port(), tasks, str(tmp_path)), nprocs=2)
    net = small()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        for rank in range(2):
            torch.manual_seed(10 * step + rank)
            (finite_sum(net(torch.randn(2, 2, 6, 6, dtype=torch.float64), tasks[rank])) / 2).backward()
        optimiser.step()
    for rank in range(2):
        trained = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for own, expected in zip(trained, net.parameters(), strict=True):
            assert_close(own, expected)


# ---------------------------------------------------------------------- serving one task


def served(net: LoRKDNet, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x, "b")


def extracted(net: LoRKDNet, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.extract("b")(x)


def step(net: LoRKDNet, x: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    net(x, ["b"] * len(x)).square().mean().backward()  # in evaluation mode, so that nothing else invalidates the view
    optimiser.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_step_renews_the_served_network(kind, options):
    net = made(Checkpointed()).eval()
    x = torch.rand(2, 2, 6, 6)
    first = served(net, x)
    step(net, x, kind(net.parameters(), lr=0.1, **options))
    assert torch.equal(served(net, x), extracted(net, x))
    assert not torch.equal(served(net, x), first)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_step_that_follows_an_answer_renews_it(options):
    """Gradients, an answer, and only then the step: a fused one leaves no trace in the weights."""
    net = made(Checkpointed()).eval()
    x = torch.rand(2, 2, 6, 6)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, **options)
    net(x, ["a", "b"]).nan_to_num(neginf=0).square().mean().backward()
    first = served(net, x)
    optimiser.step()
    assert torch.equal(served(net, x), extracted(net, x))
    assert not torch.equal(served(net, x), first)
    optimiser.zero_grad()
    assert torch.equal(served(net, x), extracted(net, x))


def test_validation_between_steps_copies_no_network(monkeypatch):
    """After a step of training the parameters hold gradients: each answer fuses, and builds no network of its own."""
    net = made(Checkpointed())
    x = torch.rand(2, 2, 6, 6)
    net(x, ["a", "b"]).nan_to_num(neginf=0).square().mean().backward()
    net.eval()
    expected = extracted(net, x)
    monkeypatch.setattr(type(net), "_plain", None)  # any use is an error
    assert all(torch.equal(served(net, x), expected) for _ in range(2))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.load_state_dict({**net.state_dict(), **small().float().state_dict()}),
        lambda net: net.load_expert_state_dict("b", {k: v + 1 for k, v in net.expert_state_dict("b").items()}),
        lambda net: net.double().float() if net.mul_(2) else None,
        lambda net: net.remove_task("a"),
        lambda net: setattr(net.backbone.head.tasks[1], "bias", nn.Parameter(torch.ones(3))),
    ],
    ids=["load_state_dict", "load_expert_state_dict", "to", "remove_task", "replaced"],
)
def test_changed_weights_renew_the_served_network(change):
    net = made(Checkpointed()).eval()

    def double() -> bool:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(2)
        return True

    net.mul_ = lambda _: double()
    x = torch.rand(2, 2, 6, 6)
    served(net, x)
    change(net)
    assert torch.equal(served(net, x), extracted(net, x))


def test_served_network_is_made_once():
    net = made(UNet(2, 1, 3, (4, 8), (2,))).eval()
    x = torch.rand(1, 1, 16, 16)
    served(net, x)
    kept = net._view.network(1)
    served(net, x)
    assert net._view.network(1) is kept
    step(net, x, torch.optim.SGD([p for n, p in net.named_parameters() if ".lora_A.0" in n], lr=1.0))
    served(net, x)
