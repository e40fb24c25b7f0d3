"""Networks that do unusual things: decomposed rightly, or refused by name; never silently wrong."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from common import TASKS, made
from reference import assert_close
from small import ROWS, Net, X, check
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet


def test_plain_network_of_the_users():
    net = check(Net(), X)
    assert list(net.expert_layers) == ["first", "second"]


class UNet(Net):
    """The name of a network of MONAI's, and nothing of it."""


def test_a_class_of_the_users_with_a_known_name():
    check(UNet(), X)


# ---------------------------------------------------------------------- weights changed behind our back


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


# ---------------------------------------------------------------------- what networks return


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, h: {"logits": y, "hidden": h},
        lambda y, h: [y, h],
        lambda y, h: (y, [h, h]),
        lambda y, h: Pair(y, h),
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
