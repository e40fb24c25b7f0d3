"""Networks that do unusual things: decomposed rightly, or refused by name; never silently wrong."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from tests.networks.common import TASKS, made
from tests.networks.reference import assert_close
from tests.networks.small import ROWS, Net, X, check


def test_plain_network_of_the_users():
    net = check(Net(), X)
    assert list(net.expert_layers) == ["first", "second"]


class UNet(Net):
    """The name of a network of MONAI's, and nothing of it."""


def test_a_class_of_the_users_with_a_known_name():
    check(UNet(), X)


# ---------------------------------------------------------------------- shared or re-parametrised weights


@pytest.mark.parametrize(
    "change",
    [nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["old-weight", "old-spectral", "weight", "spectral"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_and_spectral_norm(change):
    def network():
        return Net(second=change(nn.Conv2d(4, 4, 3, padding=1)))

    with pytest.raises(LoRKDError, match=r"layer 'second' has .*exclude=\['second'\]"):
        LoRKDNet(network(), TASKS)
    net = check(network(), X, plain=False, exclude=["second"])
    assert list(net.expert_layers) == ["first"]


def test_tied_weights():
    network = Net(second=nn.Conv2d(4, 4, 3, padding=1))
    network.third = nn.Conv2d(4, 4, 3, padding=1)
    network.third.weight = network.second.weight
    network.fc = nn.Linear(4, 4)
    with pytest.raises(LoRKDError, match="'second' shares its weight with 'third'"):
        LoRKDNet(network, TASKS, head="fc")
    net = check(network, X, head="fc", exclude=["second", "third"])
    expert = net.extract("b")
    assert expert.third.weight is expert.second.weight


def test_hooks_of_the_users_are_refused():
    network = Net()
    network.second.register_forward_hook(lambda m, a, y: y * 2)
    with pytest.raises(LoRKDError, match="'second' has forward hooks"):
        LoRKDNet(network, TASKS)


# ---------------------------------------------------------------------- modules used in unusual ways


class Twice(Net):
    def features(self, x):
        h = self.first(x)
        return self.second(self.second(h)).mean((2, 3))


def test_a_module_called_twice():
    check(Twice(), X)


class TwoNames(Net):
    def __init__(self):
        super().__init__()
        self.alias = self.second
        self.blocks = nn.ModuleList([self.first, self.second])

    def features(self, x):
        return self.alias(self.blocks[1](self.first(x))).mean((2, 3))


def test_a_module_of_two_names():
    net = check(TwoNames(), X, head="fc")
    expert = net.extract("b")
    assert expert.alias is expert.second is expert.blocks[1]


class KeptInList(Net):
    """Plain lists are no part of a module tree: layers in them are called past the registered ones."""

    def __init__(self, which):
        super().__init__()
        self.kept = [getattr(self, which)]
        self.which = which

    def forward(self, x):
        h = (self.kept[0] if self.which == "first" else self.first)(x)
        h = (self.kept[0] if self.which == "norm" else nn.Identity())(h)
        h = self.second(h.relu()).mean((2, 3))
        return (self.kept[0] if self.which == "fc" else self.fc)(h)


@pytest.mark.parametrize("which", ["first", "fc"])
def test_layers_and_heads_kept_in_plain_lists_are_refused(which):
    net = LoRKDNet(KeptInList(which), TASKS, head="fc").eval()
    for task in ("a", [0, 1, 2, 0]):
        with torch.enable_grad(), pytest.raises(LoRKDError, match=f"'{which}' was called directly"):
            net(X, task)


def test_norms_kept_in_plain_lists_are_refused():
    class NormInList(KeptInList):
        def __init__(self):
            Net.__init__(self)
            self.norm = nn.BatchNorm2d(4)
            self.kept, self.which = [self.norm], "norm"

    net = LoRKDNet(NormInList(), TASKS, head="fc", norm="task").eval()
    with torch.enable_grad(), pytest.raises(LoRKDError, match="'norm' was called directly"):
        net(X, [0, 1, 2, 0])


def test_unregistered_layers_are_shared():
    class Unregistered(Net):
        def __init__(self):
            super().__init__()
            self.more = [nn.Conv2d(4, 4, 1).double()]

        def features(self, x):
            return self.more[0](super().features(x)[:, :, None, None])[:, :, 0, 0]

    net = check(Unregistered(), X, plain=False)
    assert list(net.expert_layers) == ["first", "second"]


class Branches(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(4, 4, 1)
        self.bright = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 4)

    def features(self, x):
        h = self.first(x)
        if x.mean() > 10:
            h = self.bright(h)
        return self.second(h).mean((2, 3))


def test_layers_never_or_rarely_reached():
    net = check(Branches(), X, head="fc")
    assert net.expert_layers["unused"].fold is None and net.expert_layers["bright"].fold is None
    bright = X.double() + 100
    y = net(bright, ROWS)
    assert net.expert_layers["bright"].fold == "rows"
    for row, task in enumerate(ROWS):
        assert_close(y[row : row + 1], net(bright[row : row + 1], task))


def test_lazy_layers_are_refused():
    for network in (Net(first=nn.LazyConv2d(4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.LazyLinear(4))):
        with pytest.raises(LoRKDError, match="lazy: run the network once"):
            LoRKDNet(network, TASKS)
    network = Net(first=nn.LazyConv2d(4, 3, padding=1))
    network(X)
    check(network, X)


# ---------------------------------------------------------------------- transformers


class Attention(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mix = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 12))
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        h = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        if not self.batch_first:
            h = h.transpose(0, 1)
        return self.fc(self.mix(h).mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_stays_shared(batch_first):
    net = check(Attention(batch_first), X, plain=False)
    assert list(net.expert_layers) == ["embed", "mix"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x.reshape(len(x), -1, 12))).mean(1))


def test_transformer_layer_computes_with_its_experts():
    """Its fast path, which reads weights past the layers, is only taken by the extracted network."""
    net = check(Encoder(), X, plain=False)
    assert "encoder.linear1" in net.expert_layers
    expert = net.extract("b")
    with torch.no_grad():
        fast = expert(X.double())
    assert_close(fast, expert(X.double()).detach())


class OutProjectionLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = self.fc(x.reshape(len(x), -1, 12))
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


def test_a_projection_of_attention_is_no_head():
    with pytest.raises(LoRKDError, match="could not tell the last layer"):
        LoRKDNet(OutProjectionLast(), TASKS)


# ---------------------------------------------------------------------- layers of the users' own


class Standardized(nn.Conv2d):
    """A convolution with standardised filters, as in the networks of BiT."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class LoraLike(nn.Linear):
    """A linear layer with an adapter of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.lora_down, self.lora_up = nn.Parameter(torch.rand(1, inputs)), nn.Parameter(torch.rand(outputs, 1))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_down.t() @ self.lora_up.t()


class Quantised(nn.Linear):
    """A linear layer with a weight of whole numbers."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.randint(-9, 9, (outputs, inputs), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) / 9, self.bias)


class OwnLinear(Net):
    def __init__(self, layer):
        super().__init__()
        self.own = layer(4, 4)
        self.fc = nn.Linear(4, 4)

    def features(self, x):
        return self.own(super().features(x))


@pytest.mark.parametrize("layer", [LoraLike, Quantised, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_linear_layers_of_a_class_of_their_own(layer):
    net = check(OwnLinear(layer), X, head="fc")
    assert ("own" in net.expert_layers) == (layer.forward is nn.Linear.forward)


def test_convolutions_of_a_class_of_their_own_stay_shared():
    assert list(check(Net(second=Standardized(4, 4, 3, padding=1)), X).expert_layers) == ["first"]


def test_include_that_names_what_can_have_no_expert():
    for network, name, kind in (
        (Net(second=Standardized(4, 4, 3, padding=1)), "second", "a Standardized"),
        (Attention(), "attention.*", "a NonDynamicallyQuantizableLinear"),
        (Net(), "fc", "the head"),
    ):
        with pytest.raises(LoRKDError, match=rf"include: .*matches no layer that can have experts: .* is {kind}"):
            LoRKDNet(network, TASKS, include=["first", name] if isinstance(network, Net) else ["embed", name])


@pytest.mark.parametrize("layer", [LoraLike, Quantised])
def test_heads_of_a_class_of_their_own_are_refused(layer):
    network = Net()
    network.fc = layer(4, 4)
    with pytest.raises(LoRKDError, match=f"head: 'fc' is a {layer.__name__} with a forward of its own"):
        LoRKDNet(network, TASKS, head="fc")
    with pytest.raises(LoRKDError, match="could not tell the last layer"):
        LoRKDNet(network, TASKS)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "new"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_heads_with_weight_norm(change):
    network = Net()
    network.fc = change(network.fc)
    with pytest.raises(LoRKDError, match="head 'fc': the weight of its layer 'fc' is computed .*remove_"):
        LoRKDNet(network, TASKS, head="fc")


# ---------------------------------------------------------------------- weights that are read, not called


class AsksForType(Net):
    """Hugging Face's ViT, Dinov2 and T5 convert what they get to the type of a layer's weight."""

    def features(self, x):
        if isinstance(self.second.weight, Tensor) and self.second.weight.dtype != torch.int8:
            x = x.to(dtype=self.first.weight.dtype, device=self.first.weight.device)
        return super().features(x).to(self.fc.weight.dtype)

    def forward(self, x):
        return self.fc(self.features(x)).reshape(len(x), self.fc.out_features)


def test_type_and_place_of_a_weight_can_be_asked_for():
    net = check(AsksForType(), X)
    with torch.no_grad():
        assert torch.equal(net(X.half(), "b"), net(X.half().double(), "b"))


class Multiplies(Net):
    def __init__(self, which):
        super().__init__()
        self.mix, self.fc, self.which = nn.Linear(4, 4), nn.Linear(4, 4), which

    def forward(self, x):
        h = self.features(x)
        if self.which == "mix":
            return self.fc(nn.functional.linear(h, self.mix.weight, self.mix.bias))
        return h @ self.fc.weight.t()


def test_weights_that_are_computed_with_past_their_layer():
    for task in ("a", ROWS):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(LoRKDError, match=r"'mix': .*computes with its weight .*exclude=\['mix'\]"):
                LoRKDNet(Multiplies("mix"), TASKS, head="fc").eval()(X, task)
            with mode(), pytest.raises(LoRKDError, match=r"'fc': .*computes with its weight .*head=…"):
                LoRKDNet(Multiplies("fc"), TASKS, head="fc").eval()(X, task)
    check(Multiplies("mix"), X, head="fc", exclude=["mix"])


# ---------------------------------------------------------------------- experts that could not run


class FixedOutputs(Net):
    """As MONAI's Classifier and LocalNet: the number of outputs stands outside the head, too."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        return self.after(super().forward(x))


FIXED = {
    "reshape": lambda y: y.reshape(-1, 4),
    "view": lambda y: y.view(len(y), 2, 2).flatten(1),
    "loop": lambda y: torch.stack([y[:, c] for c in range(4)], 1),
    "weights": lambda y: y * torch.ones(4, dtype=y.dtype),
    "widened": lambda y: nn.functional.pad(y, (0, 4 - y.shape[1])),
}


@pytest.mark.parametrize("after", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("training", [True, False])
def test_an_expert_that_could_not_run_is_refused(after, training):
    net = LoRKDNet(FixedOutputs(after), {"a": 4, "b": 3}).train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for task in ([0, 1, 1, 0], "a", "b"):
        with pytest.raises(
            LoRKDError, match=r"expert of task 'b' with 3 outputs could not run: FixedOutputs fixes its 4"
        ):
            net(X, task)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training is training and all(m.training is training for m in net.modules())
    LoRKDNet(FixedOutputs(after), {"a": 4, "b": 4})(X, [0, 1, 1, 0])


def test_every_number_of_classes_is_tried():
    groups = FixedOutputs(lambda y: nn.functional.group_norm(y, 2))
    with pytest.raises(LoRKDError, match="expert of task '[bc]' with [23] outputs could not run"):
        LoRKDNet(groups, {"a": 4, "b": 2, "c": 3})(X, ROWS)
    net = LoRKDNet(FixedOutputs(FIXED["view"]), {"a": 4, "b": 4})
    net(X, [0, 1, 0, 1])
    net.add_task("more", 3)
    with pytest.raises(LoRKDError, match="expert of task 'more' with 3 outputs could not run"):
        net(X, "a")


class FixedAndNoClasses(Net):
    """As MONAI's GlobalNet: the head's numbers are a matrix, and what is returned holds none of them."""

    def forward(self, x):
        return x.flatten(2)[:, :, :2] @ super().forward(x).view(len(x), 2, 2)


@pytest.mark.parametrize("tasks", [{"a": 3, "b": 2}, {"a": 3, "b": 3}, {"a": 6, "b": 4}])
def test_a_network_whose_head_gives_no_classes_is_refused(tasks):
    for task in (0, [0, 1, 1, 0]):
        with pytest.raises(LoRKDError, match="could not run: FixedAndNoClasses fixes its 4 outputs outside its head"):
            LoRKDNet(FixedAndNoClasses(), tasks, head="fc")(X, task)


@pytest.mark.parametrize(
    "after",
    [lambda y: y - y.mean(1, keepdim=True), lambda y: nn.functional.normalize(y, dim=1), lambda y: y.flip(1)],
    ids=["mean", "normalize", "order"],
)
def test_what_mixes_the_classes_after_the_head_is_refused(after):
    net = LoRKDNet(FixedOutputs(after), TASKS)
    with pytest.raises(LoRKDError, match="after its head 'fc' mixes the classes: for task 'b', with 2 of 4"):
        net(X, ROWS)


@pytest.mark.parametrize("after", [torch.sigmoid, lambda y: y.softmax(1), lambda y: y.log_softmax(1) * 2])
def test_activations_after_the_head_are_not_refused(after):
    check(FixedOutputs(after), X, plain=False)


def test_what_fails_for_another_reason_says_so_itself():
    with pytest.raises(RuntimeError, match="expected input.* to have 2 channels"):
        LoRKDNet(Net(), TASKS)(torch.rand(4, 3, 6, 6), ROWS)


def test_the_trial_leaves_no_trace():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 4))
    net = LoRKDNet(network, {"a": 4, "b": 2})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    first = net(X, [0, 1, 0, 1])
    net.load_state_dict(before)
    torch.manual_seed(5)
    assert torch.equal(first, net(X, [0, 1, 0, 1]))


@pytest.mark.parametrize("task", ["b", [0, 1, 0, 1]])
@pytest.mark.parametrize("training", [True, False])
def test_the_trial_leaves_the_networks_own_buffers(task, training):
    class Remembers(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("seen", torch.zeros(2, 6, 6))

        def forward(self, x):
            self.calls += 1
            self.seen.copy_(x.detach().mean(0))
            return super().forward(x)

    net = LoRKDNet(Remembers(), {"a": 4, "b": 2}, head="fc").train(training)
    net(X, task)
    assert net.backbone.calls == 1
    assert_close(net.backbone.seen, X.mean(0))
    refused = LoRKDNet(FixedOutputs(lambda y: y.reshape(-1, 4)), {"a": 4, "b": 2}).train(training)
    refused.backbone.register_buffer("calls", torch.zeros(()))
    refused.backbone.after = lambda y: refused.backbone.calls.add_(1) * y.reshape(-1, 4)
    with pytest.raises(LoRKDError, match="could not run"):
        refused(X, task)
    assert refused.backbone.calls == 0


# ---------------------------------------------------------------------- what networks return


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Items:
    logits: Tensor
    hidden: Tensor


@dataclass
class ModelOutput(OrderedDict):
    """As that of Hugging Face: a dataclass whose fields, but those that are None, are items too."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is not None:
                super().__setitem__(f.name, getattr(self, f.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in fields(self))


def test_an_output_object_keeps_its_type_and_its_items():
    class Structured(Net):
        def forward(self, x):
            h = self.second(self.first(x).relu())
            return ModelOutput(loss=h.mean(), logits=self.fc(h.mean((2, 3))), hidden=(h, h))

    net = made(Structured())
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for task in (ROWS, "b"):
                y = net(X, task)
                assert type(y) is ModelOutput and list(y) == ["loss", "logits", "hidden"] and y.loss.ndim == 0
                assert y.logits is y["logits"] and y.logits.shape == (4, 4) and y["hidden"][1] is y.hidden[1]
    assert y.logits[:, 2:].isneginf().all()


def test_an_unknown_output_object_is_refused():
    class Structured(Net):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    with pytest.raises(LoRKDError, match="returns a SimpleNamespace that holds tensors"):
        made(Structured())(X, ROWS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, h: {"logits": y, "hidden": h},
        lambda y, h: [y, h],
        lambda y, h: (y, [h, h]),
        lambda y, h: Pair(y, h),
        lambda y, h: Items(y, h),
        lambda y, h: ModelOutput(logits=y, hidden=(h, h)),
        lambda y, h: OrderedDict(logits=y, hidden=h),
        lambda y, h: UserDict(logits=y, hidden=h),
        lambda y, h: {"out": [y, 2 * y], "name": "text", "none": None},
    ],
)
def test_structured_outputs(wrap):
    class Structured(Net):
        def forward(self, x):
            h = self.second(self.first(x).relu())
            return wrap(self.fc(h.mean((2, 3))), h)

    net = check(Structured(), X, plain=False)
    assert type(net(X.double(), ROWS)) is type(wrap(X, X))


def test_a_number_for_the_whole_batch_passes():
    class WithLoss(Net):
        def forward(self, x):
            h = self.features(x)
            return self.fc(h), h.square().mean()

    y, penalty = made(WithLoss())(X, ROWS)
    assert y.shape == (4, 4) and penalty.ndim == 0


def test_rows_that_are_no_samples_are_refused():
    class Windows(Net):
        def forward(self, x):
            h = self.first(x)
            return self.fc(self.second(h).mean((2, 3))), h.flatten(0, 1)

    with pytest.raises(LoRKDError, match=r"shape \(16, 6, 6\) for a batch of 4 samples"):
        made(Windows())(X, ROWS)


def test_activation_after_the_head():
    class Softmaxed(Net):
        def forward(self, x):
            return super().forward(x).sigmoid()

    y = made(Softmaxed())(X, ROWS)
    assert y[2, 2:].tolist() == [-torch.inf] * 2 and (y[2, :2] > 0).all()


def test_a_head_that_takes_no_part_is_refused():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(4, 4)  # the last layer, and unused

    for mode in (torch.no_grad, torch.enable_grad):
        for task in ("a", ROWS):
            net = LoRKDNet(Auxiliary(), TASKS).eval()
            with mode(), pytest.raises(LoRKDError, match=r"head 'auxiliary' takes no part.*head=…"):
                net(X, task)
    check(Auxiliary(), X, plain=False, head="fc")


def test_further_inputs_are_routed_with_the_batch():
    class Conditioned(Net):
        def forward(self, x, shift, factor=1.0):
            return self.fc(self.features(x) * factor + shift)

    net = made(Conditioned()).double()
    shift = torch.rand(4, 4).double()
    y = net(X.double(), ROWS, shift=shift, factor=2.0)
    for row, task in enumerate(ROWS):
        assert_close(y[row : row + 1], net(X[row : row + 1].double(), task, shift=shift[row : row + 1], factor=2.0))
