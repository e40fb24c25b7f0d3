"""Promise 5: what is served after any switches is a fresh extraction's output, bit for bit."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from tests.networks.common import TASKS, made, main_outputs
from tests.networks.zoo import ZOO
from tests.small_networks import SMALL_RESNET as SMALL

LAYERS = {
    "Conv1d": (nn.Conv1d(3, 4, 3, padding=1), (3, 8)),
    "Conv2d-1x3-stride": (nn.Conv2d(3, 4, (1, 3), stride=2, padding=(0, 1), padding_mode="reflect"), (3, 8, 8)),
    "Conv2d-groups": (nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2, bias=False), (4, 8, 8)),
    "Conv3d-1x3x3": (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 6, 6)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 4, 2, stride=2), (3, 8)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (3, 6, 6)),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 4, 2, stride=2), (2, 4, 4, 4)),
    "Linear": (nn.Linear(6, 4), (6,)),
}


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            width = layer(torch.rand(1, *size)).numel()
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        return self.out(self.layer(x).flatten(1))


def weights(net: LoRKDNet) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(main_outputs(one), main_outputs(other), strict=True))


def check_switches(net: LoRKDNet, x: torch.Tensor, order: list[int]) -> None:
    """Switch in this order; compare each answer with a fresh extraction's, and the weights with what they were."""
    before = weights(net)
    with torch.no_grad():
        expected = [net.extract(t).eval()(x) for t in range(len(net.tasks))]
        shared = net(x, 0)
        for task in order:
            net.switch_to(task)
            assert same(net(x), expected[task])
        net.switch_off()
        assert same(net(x, 0), shared)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("layout", ["lorkd", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_type(name, dtype, layout):
    layer, size = LAYERS[name]
    if layer.__dict__.get("padding_mode") == "reflect" and dtype is torch.float16:
        pytest.skip("torch has no reflection in float16 on the CPU")
    net = made(OneLayer(layer, size), layout=layout, include=["layer"], head="out").to(dtype)
    assert "layer" in net.expert_layers
    check_switches(net, torch.rand(2, *size).to(dtype), [0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_in_float32_and_rounded_once(dtype):
    net = made(OneLayer(*LAYERS["Conv3d-1x3x3"]), include=["layer"], head="out").to(dtype)
    layer = net.expert_layers["layer"]
    for task in range(3):
        delta = layer.lora_B[task].float() @ layer.lora_A[task].float() * layer.scales[task]
        fused = (layer.layer.weight.float() + delta.view(layer.layer.weight.shape)).to(dtype)
        assert torch.equal(net.extract(task).layer.weight, fused)


@pytest.mark.parametrize("entry", [e for e in ZOO if not e.heavy], ids=str)
def test_networks_of_the_zoo(entry):
    torch.manual_seed(0)
    net = made(entry.build())
    x = torch.rand(1, entry.channels, *[entry.size] * entry.dims)
    check_switches(net, x, [0, 1, 2, 0])


@pytest.mark.slow
def test_ten_thousand_random_switches():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    order = torch.randint(len(TASKS), (10_000,), generator=torch.Generator().manual_seed(1)).tolist()
    check_switches(made(backbone), torch.rand(2, 1, 6, 6), order)


def test_switches_between_routed_calls_and_changes():
    net = made(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 4)))
    x = torch.rand(4, 1, 6, 6)
    with torch.no_grad():
        mixed = net(x, [0, 1, 2, 0])
        for task in (1, 0, 2):
            net.switch_to(task)
            assert same(net(x), net.extract(task)(x))
            assert torch.equal(net(x, [0, 1, 2, 0]), mixed)
        net.expert_layers["0"].lora_B[2].add_(0.1)  # training went on
        assert same(net(x), net.extract(2)(x))
        net.load_expert_state_dict(2, net.expert_state_dict(2))
        assert same(net(x), net.extract(2)(x))


def test_two_threads_serve_different_tasks_of_one_network():
    net = LoRKDNet(SMALL, {"a": 2, "b": 3}, rank=2).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ready, wrong = threading.Barrier(2), []

    def serve(task):
        ready.wait()
        with torch.no_grad():
            for _ in range(30):
                with net.serving(task) as served:
                    wrong.extend([] if torch.equal(served(x), plain[task](x)) else [task])

    with torch.no_grad():
        plain = {task: net.extract(task).eval() for task in net.tasks}
        net.switch_to("b")
        threads = [threading.Thread(target=serve, args=(task,)) for task in net.tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert net(x).shape == (2, 3)  # what switch_to said still holds outside


def test_serving_ends_with_its_block_also_after_an_error_and_inside_another():
    net, other = (LoRKDNet(SMALL, {"a": 2, "b": 3}, rank=2).eval() for _ in range(2))
    x = torch.rand(1, 3, 32, 32)
    with net.serving("a"):
        with net.serving("b"), other.serving("a"):
            assert net(x).shape == (1, 3) and other(x).shape == (1, 2)
        with pytest.raises(LoRKDError, match="unknown task 'c'"), net.serving("c"):
            pass
        with pytest.raises(ZeroDivisionError), net.serving("b"):
            raise ZeroDivisionError
        assert net(x).shape == (1, 2)
        with pytest.raises(LoRKDError, match="task is needed"):
            other(x)
    with pytest.raises(LoRKDError, match="task is needed"):
        net(x)


def test_serving_holds_for_one_asyncio_task():
    net = LoRKDNet(SMALL, {"a": 2, "b": 3}, rank=2).eval()

    async def ask(task):
        with net.serving(task):
            await asyncio.sleep(0.01)
            return net(torch.rand(1, 3, 32, 32)).shape[1]

    async def both():
        return await asyncio.gather(ask("a"), ask("b"))

    assert asyncio.run(both()) == [2, 3]


def test_the_spec_is_a_copy():
    net = LoRKDNet(SMALL, {"a": 2}, rank=2, info={"tasks": {"a": {"labels": {"0": "no"}}}})
    spec = net.spec()
    spec["info"]["tasks"]["a"]["labels"]["0"] = "yes"
    spec["backbone"]["layers"][0] = 7
    assert net.info["tasks"]["a"]["labels"]["0"] == "no"
    assert net.spec()["backbone"]["layers"] == [1, 1, 1, 1]
