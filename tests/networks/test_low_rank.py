"""Low-rank layers of every kind and geometry against the one-line reference: one matrix, all pairs of options."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LowRankLayer, route
from lorkd_monai.networks.eks.strategies import delta_weight, fuse
from tests.networks.reference import assert_close, reference

CONVOLUTIONS = {("conv", n): getattr(nn, f"Conv{n}d") for n in (1, 2, 3)}
TRANSPOSED = {("transposed", n): getattr(nn, f"ConvTranspose{n}d") for n in (1, 2, 3)}

SHARED_OPTIONS = {
    "dims": (1, 2, 3),
    "kernel": (1, 2, 3, "1x3x3", "3x1x2"),
    "stride": (1, 2, "1x2x2"),
    "dilation": (1, 2, "1x2x1"),
    "groups": (1, 2, "depthwise"),
    "bias": (True, False),
    "layout": ("lorkd", "conv"),
    "ranks": ((2, 2, 2), (1, 3, 2)),
}
OPTIONS = {
    "conv": {
        **SHARED_OPTIONS,
        "padding": (0, 1, "same", "0x1x1"),
        "padding_mode": ("zeros", "reflect", "replicate", "circular"),
    },
    "transposed": {
        **SHARED_OPTIONS,
        "padding": (0, 1, "0x1x1"),
        "output_padding": (0, 1, "0x1x1"),
        "output_size": (False, True),
    },
    "linear": {
        "tokens": ((), (5,), (2, 3)),
        "bias": (True, False),
        "layout": ("lorkd", "conv"),
        "ranks": ((2, 2, 2), (1, 3, 2)),
    },
}


def sizes(value, dims):
    """``"1x3x3"`` stands for the last ``dims`` of (1, 3, 3)."""
    return tuple(int(v) for v in value.split("x"))[-dims:] if isinstance(value, str) and "x" in value else value


def tuples(value, dims):
    value = sizes(value, dims)
    return value if isinstance(value, tuple) else (value,) * dims


def possible(kind, case):
    """False for combinations that torch itself does not have."""
    if kind == "linear":
        return True
    if kind == "conv":
        return not (case["padding"] == "same" and case["stride"] != 1)
    dims = case["dims"]
    room = [max(s, d) for s, d in zip(tuples(case["stride"], dims), tuples(case["dilation"], dims))]
    fits = all(o < r for o, r in zip(tuples(case["output_padding"], dims), room))
    return fits and not (case["output_size"] and case["output_padding"] != 0)


def covering(kind):
    """Cases in which every possible pair of option values occurs."""
    names, values = list(OPTIONS[kind]), list(OPTIONS[kind].values())
    everything = [c for c in (dict(zip(names, v)) for v in itertools.product(*values)) if possible(kind, c)]
    random.Random(0).shuffle(everything)
    seen, chosen = set(), []
    for case in everything:
        pairs = set(itertools.combinations(((k, case[k]) for k in names), 2))
        if not pairs <= seen:
            seen |= pairs
            chosen.append(case)
    return chosen


MATRIX = [(kind, case) for kind in OPTIONS for case in covering(kind)]


def label(value):
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else None


def build(kind, case):
    """The layer, an input of four samples, and the keyword arguments of a call."""
    if kind == "linear":
        return nn.Linear(6, 4, bias=case["bias"]), torch.rand(4, *case["tokens"], 6), {}
    dims = case["dims"]
    depthwise = case["groups"] == "depthwise"
    options = {
        "kernel_size": sizes(case["kernel"], dims),
        "stride": sizes(case["stride"], dims),
        "dilation": sizes(case["dilation"], dims),
        "padding": sizes(case["padding"], dims),
        "groups": 4 if depthwise else case["groups"],
        "bias": case["bias"],
    }
    x = torch.rand(4, 4, *(7, 6, 8)[:dims])
    kwargs = {}
    if kind == "conv":
        layer = CONVOLUTIONS[kind, dims](4, 8 if depthwise else 6, padding_mode=case["padding_mode"], **options)
    else:
        options["output_padding"] = sizes(case["output_padding"], dims)
        layer = TRANSPOSED[kind, dims](4, 4 if depthwise else 6, **options)
        if case["output_size"]:
            smallest = layer(x).shape[2:]
            kwargs["output_size"] = [n + (1 if s > 1 else 0) for n, s in zip(smallest, layer.stride)]
    return layer, x, kwargs


def randomised(layer, ranks, scale, layout):
    wrapped = LowRankLayer(layer, ranks, scale, layout)
    for b in wrapped.lora_B:
        nn.init.normal_(b, std=0.5)
    return wrapped


def weights(wrapped):
    layer = wrapped.layer
    bias = [] if layer.bias is None else [layer.bias]
    return [layer.weight, *bias, *wrapped.lora_A, *wrapped.lora_B]


def gradients(y, grad_y, tensors):
    return torch.autograd.grad(y, tensors, grad_y, allow_unused=True)


@pytest.mark.parametrize(("kind", "case"), MATRIX, ids=label)
def test_matrix(kind, case):
    layer, x, kwargs = build(kind, case)
    layer, x = layer.double(), x.double().requires_grad_()
    scales = [2.0, 0.5, 1.5]
    fresh = LowRankLayer(copy.deepcopy(layer), case["ranks"], scales, case["layout"])
    wrapped = randomised(copy.deepcopy(layer), case["ranks"], scales, case["layout"])
    assert wrapped.ranks == list(case["ranks"])
    for task in ([2, 0, 1, 0], [0, 0, 1, 2], [1, 1, 1, 1], [2, 0, 2, 2]):
        expected = reference(layer, x, task, wrapped.lora_A, wrapped.lora_B, scales, **kwargs)
        with route(torch.tensor(task), batch_size=4):
            y = wrapped(x, **kwargs)
            assert_close(fresh(x, **kwargs), layer(x, **kwargs), what="fresh")
        assert_close(y, expected, what="forward")
        grad_y = torch.rand_like(y)
        own = gradients(y, grad_y, [x, *weights(wrapped)])
        theirs = gradients(expected, grad_y, [x, *layer.parameters(), *wrapped.lora_A, *wrapped.lora_B])
        for a, b in zip(own, theirs, strict=True):
            if b is None:
                assert a is None or not a.any()  # the expert of a task that is not in the batch
            else:
                assert_close(a, b, what="gradient")
    for t in range(3):
        plain = wrapped.plain(t, {})
        assert type(plain) is type(layer) and plain.state_dict().keys() == layer.state_dict().keys()
        assert not plain._forward_pre_hooks and not plain._forward_hooks
        with route(t):
            assert torch.equal(plain(x, **kwargs), wrapped(x, **kwargs))


@pytest.mark.parametrize(("kind", "case"), MATRIX[::7], ids=label)
def test_float32_is_within_a_relative_1e5(kind, case):
    layer, x, kwargs = build(kind, case)
    wrapped = randomised(layer, case["ranks"], 2.0, case["layout"])
    double = copy.deepcopy(wrapped).double()
    with route([2, 0, 1, 0]):
        assert_close(wrapped(x, **kwargs), double(x.double(), **kwargs), torch.float32)


def test_every_pair_of_options_is_in_the_matrix():
    assert len(MATRIX) > 90
    for kind, options in OPTIONS.items():
        cases = [c for k, c in MATRIX if k == kind]
        for name, values in options.items():
            assert {c[name] for c in cases} == set(values)


# ---------------------------------------------------------------------- by hand


def test_linear_by_hand():
    layer = nn.Linear(2, 2)
    wrapped = LowRankLayer(layer, [1, 1], scale=2.0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
        wrapped.lora_A[1].copy_(torch.tensor([[1.0, 1.0]]))
        wrapped.lora_B[1].copy_(torch.tensor([[1.0], [0.0]]))
    with route([0, 1]):
        y = wrapped(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    # Task 1: ΔW = 2 · [[1], [0]] [[1, 1]] = [[2, 2], [0, 0]], so that 1 + 2·(1 + 2) + 10 = 17.
    assert y.tolist() == [[11.0, 22.0], [17.0, 22.0]]


def test_convolution_by_hand():
    layer = nn.Conv1d(1, 1, 2, bias=False)
    wrapped = LowRankLayer(layer, [1, 1], scale=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0]]]))
        wrapped.lora_A[0].copy_(torch.tensor([[1.0], [2.0]]))  # (r·k0) × i
        wrapped.lora_B[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # (o·k0) × (r·k0)
    # B A = [[1], [6]], the weight's shape 1 × 1 × 2: W = [2, 6].
    with route([1, 0]):
        y = wrapped(torch.tensor([[[1.0, 1.0, 2.0]], [[1.0, 1.0, 2.0]]]))
    assert y.tolist() == [[[1.0, 1.0]], [[8.0, 14.0]]]


@pytest.mark.parametrize(
    ("weight_layer", "layout", "shape_a", "shape_b"),
    [
        (nn.Conv2d(6, 8, 3), "lorkd", (2 * 3, 6 * 3), (8 * 3, 2 * 3)),  # the authors' rk × ik and ok × rk
        (nn.Conv3d(6, 8, 3), "lorkd", (2 * 3, 6 * 9), (8 * 3, 2 * 3)),  # rk × ik² and ok × rk
        (nn.Conv3d(6, 8, (1, 3, 3)), "lorkd", (2, 6 * 9), (8, 2)),
        (nn.Conv2d(6, 8, 3, groups=2), "lorkd", (2 * 3, 3 * 3), (8 * 3, 2 * 3)),
        (nn.ConvTranspose2d(6, 8, 3), "lorkd", (2 * 3, 8 * 3), (6 * 3, 2 * 3)),
        (nn.Conv2d(6, 8, 3), "conv", (2, 6 * 9), (8, 2)),
        (nn.Linear(6, 8), "lorkd", (2, 6), (8, 2)),
        (nn.Linear(6, 8), "conv", (2, 6), (8, 2)),
    ],
)
def test_shapes_of_the_factors(weight_layer, layout, shape_a, shape_b):
    wrapped = LowRankLayer(weight_layer, [2], layout=layout)
    assert wrapped.lora_A[0].shape == shape_a and wrapped.lora_B[0].shape == shape_b


def test_conv_layout_is_a_convolution_and_a_pointwise_one():
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False).double()
    nn.init.zeros_(layer.weight)
    wrapped = randomised(layer, [2], 3.0, "conv")
    x = torch.rand(2, 3, 5, 5).double()
    inner = nn.functional.conv2d(x, wrapped.lora_A[0].view(2, 3, 3, 3), padding=1)
    with route(0):
        assert_close(wrapped(x), 3.0 * nn.functional.conv2d(inner, wrapped.lora_B[0].view(4, 2, 1, 1)))


def test_initialisation():
    wrapped = LowRankLayer(nn.Conv2d(8, 8, 3), [4, 4])
    assert all(not b.any() for b in wrapped.lora_B)
    bound = (1 / (8 * 3)) ** 0.5  # kaiming uniform with a = √5: 1/√fan_in
    for a in wrapped.lora_A:
        assert 0.8 * bound < a.abs().max() <= bound
    assert not torch.equal(wrapped.lora_A[0], wrapped.lora_A[1])


def test_bfloat16_is_fused_in_float32():
    layer = nn.Linear(32, 32).bfloat16()
    wrapped = randomised(layer, [4], 0.37, "lorkd")
    a, b = wrapped.lora_A[0].float(), wrapped.lora_B[0].float()
    assert delta_weight(wrapped.lora_A[0], wrapped.lora_B[0], 0.37, layer.weight.shape).dtype == torch.float32
    exact = layer.weight.float() + 0.37 * (b @ a)
    fused = fuse(layer.weight, wrapped.lora_A[0], wrapped.lora_B[0], 0.37)
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, exact.bfloat16())  # rounded once


def test_autocast_routes_like_float32():
    wrapped = randomised(nn.Conv2d(3, 4, 3), [2, 2], 1.0, "lorkd")
    x = torch.rand(4, 3, 8, 8)
    with route([1, 0, 1, 0]):
        exact = wrapped(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = wrapped(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()


# ---------------------------------------------------------------------- experts come and go


def test_add_and_remove_experts():
    wrapped = randomised(nn.Linear(3, 3), [1, 2], [1.0, 2.0], "lorkd")
    first, second = wrapped.lora_A[0], wrapped.lora_A[1]
    wrapped.add_expert(3, 0.5)
    assert wrapped.ranks == [1, 2, 3] and wrapped.scales == [1.0, 2.0, 0.5]
    wrapped.remove_expert(0)
    assert wrapped.ranks == [2, 3] and wrapped.lora_A[0] is second and wrapped.scales == [2.0, 0.5]
    assert list(wrapped.expert_tensors(0)) == ["lora_A", "lora_B"] and first is not second
    assert len(list(wrapped.parameters())) == 2 + 4


def test_geometry_can_be_read_and_weights_can_not():
    layer = nn.Conv2d(3, 4, (1, 3), padding=(0, 1)).double()
    wrapped = LowRankLayer(layer, [1], name="enc.conv")
    assert (wrapped.in_channels, wrapped.out_channels, wrapped.kernel_size, wrapped.padding) == (3, 4, (1, 3), (0, 1))
    weight, x = wrapped.weight, torch.rand(2, 3, 5, 5)
    assert isinstance(weight, torch.Tensor) and weight.requires_grad
    assert (weight.dtype, weight.device, weight.shape) == (torch.float64, torch.device("cpu"), (4, 3, 1, 3))
    assert weight.size(0) == len(weight) == 4 and weight.numel() == 36 and weight.is_floating_point()
    assert x.to(weight).dtype == x.type_as(weight).dtype == weight.new_zeros(2).dtype == torch.float64
    assert LowRankLayer(nn.Linear(2, 2, bias=False), [1]).bias is None
    computing = [
        lambda w: torch.nn.functional.conv2d(x.double(), w), lambda w: w.t(), lambda w: w * 2, lambda w: 2 - w,
        lambda w: w.data, lambda w: w.detach(), lambda w: w[0], lambda w: torch.cat([layer.weight, w]),
        lambda w: w.mean(), lambda w: nn.init.zeros_(w), lambda w: w.numpy(), lambda w: w.float(), lambda w: w.to(x),
    ]  # fmt: skip
    for attribute in ("weight", "bias"):
        message = rf"'enc.conv': the network computes with its {attribute} .*exclude=\['enc.conv'\]"
        for compute in computing:
            with pytest.raises(LoRKDError, match=message):
                compute(getattr(wrapped, attribute))
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing
    assert "ranks=[1]" in repr(wrapped)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.BatchNorm2d(3), {"ranks": [1]}, "expected a convolution.*got BatchNorm2d"),
        (nn.Conv2d(3, 3, 1), {"ranks": []}, "one rank for each task"),
        (nn.Conv2d(3, 3, 1), {"ranks": 4}, "one rank for each task"),
        (nn.Conv2d(3, 3, 1), {"ranks": [0]}, "rank must be a whole number of at least 1, got 0"),
        (nn.Conv2d(3, 3, 1), {"ranks": [1.5]}, "rank must be a whole number of at least 1, got 1.5"),
        (nn.Conv2d(3, 3, 1), {"ranks": [True]}, "rank must be a whole number"),
        (nn.Conv2d(3, 3, 1), {"ranks": [1, 1], "scale": [1.0]}, "got 1 scales for 2 tasks"),
        (nn.Conv2d(3, 3, 1), {"ranks": [1], "layout": "peft"}, "layout must be one of"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), {"ranks": [1]}, "parametrization"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), {"ranks": [1]}, "hooks"),
    ],
)
def test_bad_arguments(layer, options, message):
    with pytest.raises(LoRKDError, match=message):
        LowRankLayer(layer, **options)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


@pytest.mark.parametrize("layer", [OwnForward(2, 2, 1), OwnConvForward(2, 2, 1), nn.Bilinear(2, 2, 2)])
def test_a_layer_with_a_forward_of_its_own_is_refused(layer):
    with pytest.raises(LoRKDError, match="expected a convolution, transposed convolution or linear layer of torch"):
        LowRankLayer(layer, [1])


def test_the_wrapped_layer_can_not_be_called_past_its_experts():
    layer = nn.Linear(2, 2)
    LowRankLayer(layer, [1], name="fc1")
    with pytest.raises(LoRKDError, match="'fc1' was called directly"):
        layer(torch.rand(1, 2))


@pytest.mark.parametrize(
    ("layer", "right", "wrong"),
    [
        (nn.Conv2d(3, 4, 3), [(2, 3, 8, 8), (2, 3, 3, 9)], [(2, 4, 8, 8), (2, 3, 8), (2, 3, 2, 8), (2, 3, 8, 8, 8)]),
        (nn.Conv3d(1, 2, (1, 3, 3)), [(2, 1, 1, 3, 3)], [(2, 1, 3, 3), (2, 1, 3, 2, 3), (2, 2, 3, 3, 3)]),
        (nn.ConvTranspose2d(3, 4, 2, 2), [(2, 3, 1, 1)], [(2, 4, 1, 1), (2, 3, 1), (2, 3, 1, 1, 1)]),
        (nn.Linear(3, 4), [(2, 3), (2, 7, 3), (2, 7, 5, 3)], [(2, 4), (2, 3, 4), (2,)]),
    ],
)
def test_right_and_wrong_shapes(layer, right, wrong):
    plain = copy.deepcopy(layer)
    wrapped = LowRankLayer(layer, [1, 1])
    for shape in right:
        with route([1, 0]):
            assert wrapped(torch.rand(shape)).shape == plain(torch.rand(shape)).shape
    for shape in wrong:
        with route([1, 0]), pytest.raises((RuntimeError, LoRKDError)):
            wrapped(torch.rand(shape))


def test_number_of_rows():
    wrapped = LowRankLayer(nn.Linear(3, 4), [1, 1], name="fc1")
    with route([1, 0]), pytest.raises(LoRKDError, match="'fc1' got 3 rows for a batch of 2 samples"):
        wrapped(torch.rand(3, 3))
    with route([1, 0]), pytest.raises(LoRKDError, match="'fc1' got 4 rows for a batch of 2 samples"):
        wrapped(torch.rand(4, 3))  # windows or patches: which row is whose is not known
    with route(1):
        assert wrapped(torch.rand(5, 3)).shape == (5, 4)
    with route([0, 2]), pytest.raises(LoRKDError, match=r"experts for 2 tasks \(0 to 1\), got task 2"):
        wrapped(torch.rand(2, 3))
    with pytest.raises(LoRKDError, match="called without a routing"):
        wrapped(torch.rand(2, 3))
