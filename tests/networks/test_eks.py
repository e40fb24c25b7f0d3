"""Every EKS strategy against the loop over samples: forward and all gradients, in float64."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LowRankLayer, route
from lorkd_monai.networks.eks import costs
from lorkd_monai.networks.eks.factors import BranchFilters
from lorkd_monai.networks.eks.strategies import delta_weight, eks_strategy, factor_shapes
from tests.networks.reference import assert_close, reference

STRATEGIES = (*costs.STRATEGIES, "auto")

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (4, 5, 5)),
    "conv2d-strided": (lambda: nn.Conv2d(5, 4, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1)), (5, 9, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 6, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, (3, 4), padding="same"), (3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 5, 3, padding=1), (4, 5, 4, 5)),
    "conv3d-1x3x3": (lambda: nn.Conv3d(4, 5, (1, 3, 3), stride=(1, 2, 2), bias=False), (4, 3, 6, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 5, 3, stride=2), (4, 6)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 3, 3, stride=2, padding=1), (4, 3, 3, 4)),
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear-tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 2, 6)),
}

ROUTINGS = {
    "identical": [2, 2, 2, 2],
    "distinct": [3, 0, 2, 1],
    "uniform": [0, 0, 1, 1, 3, 3],
    "skewed": [1, 1, 1, 2, 1, 1, 0, 1],
    "single": [3],
    "rounds": [0, 3, 0, 3, 0, 3],
    "rounds of pairs": [0, 0, 2, 2, 0, 0, 2, 2],
    "skewed rounds": [1, 1, 1, 2, 1, 1, 1, 2],
}


def made(name: str, layout: str = "lorkd", ranks=(2, 1, 3, 2)) -> LowRankLayer:
    layer = LowRankLayer(LAYERS[name][0]().double(), list(ranks), [0.5, 2.0, 1.0, 0.7], layout)
    for b in layer.lora_B:
        nn.init.normal_(b)
    return layer


def gradients(y: torch.Tensor, x: torch.Tensor, layer: LowRankLayer) -> dict[str, torch.Tensor | None]:
    inputs = {"x": x, **dict(layer.named_parameters())}
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), list(inputs.values()), allow_unused=True)
    return dict(zip(inputs, grads, strict=True))


def slow(layer: LowRankLayer, x: torch.Tensor, task: list[int], **kwargs) -> torch.Tensor:
    bare = copy.copy(layer.layer)  # the same parameters, without the guard against direct calls
    bare._forward_pre_hooks = OrderedDict()
    return reference(bare, x, task, layer.lora_A, layer.lora_B, layer.scales, **kwargs)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_strategy_equals_the_loop_over_samples(name, routing):
    task = ROUTINGS[routing]
    for layout in ("lorkd", "conv"):
        layer = made(name, layout)
        x = torch.randn(len(task), *LAYERS[name][1], dtype=torch.float64, requires_grad=True)
        expected = slow(layer, x, task)
        expected_grads = gradients(expected, x, layer)
        for strategy in STRATEGIES:
            with eks_strategy(strategy), route(task):
                y = layer(x)
                with torch.no_grad():
                    assert_close(layer(x), expected, what=f"{layout} {strategy} without gradients")
            assert_close(y, expected, what=f"{layout} {strategy}")
            for key, grad in gradients(y, x, layer).items():
                if expected_grads[key] is None:
                    assert grad is None, f"{layout} {strategy}: {key} of an absent expert"
                else:
                    assert_close(grad, expected_grads[key], what=f"{layout} {strategy}: {key}")


@pytest.mark.parametrize("form", ["split", "group", "unfold"])
@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("conv2d")])
def test_every_form_of_the_factored_branch(monkeypatch, name, form):
    monkeypatch.setattr(costs, "branch_form", lambda s: form if form != "unfold" or s.unfolded else "split")
    task = [0, 0, 2, 3, 3, 3]
    for layout in ("lorkd", "conv"):
        layer = made(name, layout)
        x = torch.randn(len(task), *LAYERS[name][1], dtype=torch.float64, requires_grad=True)
        expected = slow(layer, x, task)
        with eks_strategy("factored"), route(task):
            y = layer(x)
        assert_close(y, expected, what=layout)
        expected_grads = gradients(expected, x, layer)
        for key, grad in gradients(y, x, layer).items():
            if expected_grads[key] is not None:
                assert_close(grad, expected_grads[key], what=f"{layout}: {key}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32(strategy):
    task = [0, 1, 1, 3]
    layer = made("conv2d").float()
    x = torch.randn(4, 4, 7, 6, requires_grad=True)
    expected = slow(layer, x, task)
    with eks_strategy(strategy), route(task):
        y = layer(x)
    assert_close(y, expected)
    for (key, grad), other in zip(gradients(y, x, layer).items(), gradients(expected, x, layer).values(), strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            assert_close(grad, other, what=key)


@pytest.mark.parametrize("strategy", costs.STRATEGIES)
@pytest.mark.parametrize("task", [[1, 0, 1], [0, 1, 0, 1]])
def test_gradients_of_gradients(strategy, task):
    layer = made("conv2d", ranks=(1, 1, 1, 1))
    x = torch.randn(len(task), 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x, weight, a, b):
        with eks_strategy(strategy), route(task):
            return torch.func.functional_call(layer, {"layer.weight": weight, "lora_A.1": a, "lora_B.1": b}, (x,))

    inputs = (x, layer.layer.weight, layer.lora_A[1], layer.lora_B[1])
    y = call(*inputs)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    rows = [slow(layer, x, task)]
    first = torch.autograd.grad(rows[0].square().sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for got, want in zip(second, expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("strategy", costs.STRATEGIES)
@pytest.mark.parametrize("frozen", ["layer", "lora_A", "lora_B", "x"])
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(strategy, frozen):
    task = [0, 1, 1]
    layer = made("conv2d")
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    grads = []
    for way in ("fast", "slow"):
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with eks_strategy(strategy), route(task):
            y = layer(x) if way == "fast" else slow(layer, x, task)
        y.square().sum().backward()
        grads.append([t.grad for t in (x, *layer.parameters())])
    for fast, expected in zip(*grads, strict=True):
        assert (fast is None) == (expected is None)
        if fast is not None:
            assert_close(fast, expected)


@pytest.mark.parametrize("strategy", costs.STRATEGIES)
@pytest.mark.parametrize("name", ["conv2d", "conv2d-strided", "conv3d"])
@pytest.mark.parametrize("task", [[0, 0, 2, 2], [0, 2, 0, 2]])
def test_channels_last_is_kept(strategy, name, task):
    memory = torch.channels_last if name != "conv3d" else torch.channels_last_3d
    layer = made(name).float()  # torch keeps it for float32 alone
    x = torch.randn(4, *LAYERS[name][1])
    expected = slow(layer, x, task)
    with eks_strategy(strategy), route(task):
        y = layer.to(memory_format=memory)(x.contiguous(memory_format=memory).requires_grad_())
    assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory) or strategy == "group"
    y.sum().backward()


def test_output_size_of_a_transposed_convolution():
    task = [1, 0, 1]
    layer = made("transposed3d")
    x = torch.randn(3, 4, 3, 3, 4, dtype=torch.float64)
    for strategy in costs.STRATEGIES:
        with eks_strategy(strategy), route(task):
            assert_close(layer(x, output_size=[6, 6, 8]), slow(layer, x, task, output_size=[6, 6, 8]))


def test_no_merged_weight_is_kept_for_the_backward_pass():
    layer = LowRankLayer(nn.Conv2d(64, 64, 3, padding=1), [2] * 4)
    x = torch.randn(4, 64, 4, 4, requires_grad=True)
    for strategy in costs.STRATEGIES:
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t),
            eks_strategy(strategy),
            route([0, 1, 2, 3]),
        ):
            layer(x)
        own = {t.data_ptr() for t in (x, *layer.parameters())}
        extra = sum(t.numel() for t in kept if t.data_ptr() not in own)
        assert extra < layer.layer.weight.numel() * 2, strategy  # four merged weights would be twice that


def test_strategy_is_forced_by_context_or_environment(monkeypatch):
    monkeypatch.setenv("LORKD_EKS", "group")
    assert costs.wanted() == "group"
    with eks_strategy("split"):
        assert costs.wanted() == "split"
    assert costs.wanted() == "group"
    monkeypatch.setenv("LORKD_EKS", "fast")
    with pytest.raises(LoRKDError, match=r"must be one of split, group, factored, auto, got 'fast'"):
        costs.wanted()


def test_unknown_strategy_is_refused():
    with pytest.raises(LoRKDError, match="got 'fastest'"), eks_strategy("fastest"):
        pass


def test_default_choice_depends_on_shapes_and_routing_alone():
    size = 512 * 512 * 9
    base = costs.Situation("cpu", (4,) * 8, 16, size, 2 * 32 * 512 * 16, 36 * 512 * 9, 512)
    assert costs.choose(base) == "factored"  # large weights, small maps
    thin = base._replace(positions=4096, weight=16 * 3 * 49, branch=0, channels=3, moved=19 * 32 * 4096)
    assert costs.choose(thin) == "split"
    narrow = base._replace(sizes=(1,) * 4, positions=24**3, weight=16 * 16 * 27, branch=36 * 16 * 27, channels=16)
    assert costs.choose(narrow._replace(moved=32 * 4 * 24**3, slow="plain")) == "group"


def test_grouping_is_cheaper_where_a_batch_lies_in_rounds():
    moved = 2 * 32 * 64 * 32**2
    rounds = costs.Situation("cpu", (4,) * 8, 32**2, 64 * 64 * 9, moved, 36 * 64 * 9, 64, rounds=4)
    assert rounds.in_place and costs.choose(rounds) == "group"
    sorted_ = rounds._replace(rounds=1)
    assert not sorted_.in_place and costs.choose(sorted_) == "split"


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_branch_filters_are_the_first_half_of_the_delta(multiple, ranks):
    shape, scales = (5, 4, 3, 3), (0.5, 2.0)
    sizes = [factor_shapes(shape, rank) for rank in ranks]
    a = [torch.randn(s[0], dtype=torch.float64, requires_grad=True) for s in sizes]
    b = [torch.randn(s[1], dtype=torch.float64, requires_grad=True) for s in sizes]
    filters = BranchFilters(shape, 3, max(len(f) for f in a), torch.float64, multiple)
    assert filters.count % multiple == 0
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    built, second = filters.build(a, range(2)), filters.second(b, scales)
    assert built.shape == (2, filters.count, 4, 3, 3)
    y = torch.stack([torch.conv2d(torch.conv2d(x, built[p]), second[p][..., None, None]) for p in range(2)])
    expected = torch.stack([torch.conv2d(x, delta_weight(a[p], b[p], scales[p], shape)) for p in range(2)])
    assert (y - expected).abs().max() < 1e-12
    g = torch.randn_like(built)
    grads = [None, None]
    filters.add_gradients(grads, [True, True], a, range(2), g)
    for found, want in zip(grads, torch.autograd.grad(built, a, g), strict=True):
        assert torch.equal(found, want)


def test_slow_kernel_of_one_3d_sample():
    sample = ((4, 16, 24, 24, 24), (3, 3, 3), 1)
    assert costs.left_to_slow_kernel("cpu", *sample)
    assert not costs.left_to_slow_kernel("cuda", *sample)
    assert not costs.left_to_slow_kernel("cpu", (4, 64, 24, 24, 24), *sample[1:])
    situation = costs.Situation("cpu", (1, 3), 24**3, 16 * 16 * 27, 10**6, 0, 16, slow="plain")
    larger = situation._replace(sizes=(2, 2))
    assert costs.costs(situation)["split"] > 2 * costs.costs(larger)["split"]


def test_absent_experts_cost_nothing():
    layer = LowRankLayer(nn.Conv2d(4, 4, 3), [1] * 64)
    seen = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t),
        route([3, 60]),
    ):
        layer(torch.rand(2, 4, 6, 6))
    touched = {p.data_ptr() for p in layer.parameters()} & set(seen)
    assert {layer.lora_A[t].data_ptr() for t in (3, 60)} <= touched
    assert not {layer.lora_A[t].data_ptr() for t in range(64) if t not in (3, 60)} & touched
