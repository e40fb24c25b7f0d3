"""Networks that do unusual things: decomposed rightly, or refused by name; never silently wrong."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from common import TASKS, assert_nothing_of_ours, made, main_outputs
from reference import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet

NAMES = list(TASKS)
ROWS = [2, 0, 1, 0]


def check(backbone: nn.Module, x: Tensor, plain: bool = True, **options) -> LoRKDNet:
    """Fresh = backbone, mixed = separate, extraction exact and plain."""
    backbone = backbone.double().eval()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        expected = main_outputs(backbone(x))
        for a, b in zip(
            main_outputs(LoRKDNet(backbone, TASKS, rank=1, **options).eval()(x, "a")), expected, strict=True
        ):
            assert_close(a, b, what="fresh")
    net = made(backbone, **options).double()
    tasks = (ROWS * len(x))[: len(x)]
    mixed = main_outputs(net(x, torch.tensor(tasks)))
    for row, task in enumerate(tasks):
        for m, a in zip(mixed, main_outputs(net(x[row : row + 1], task)), strict=True):
            assert_close(m[row : row + 1], a, what="mixed")
    for task in NAMES:
        expert = net.extract(task)
        if plain:
            assert_nothing_of_ours(expert, backbone)
        with torch.no_grad():
            for y, own in zip(main_outputs(expert(x)), main_outputs(net(x, task)), strict=True):
                assert torch.equal(own[:, : TASKS[task]], y)
    return net


class Net(nn.Module):
    """conv → relu → conv → pool → linear."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1) if first is None else first
        self.second = nn.Conv2d(4, 4, 3, padding=1) if second is None else second
        self.fc = nn.Linear(4, 4)

    def features(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


X = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(3))


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


# ---------------------------------------------------------------------- batches folded


class Patches(nn.Module):
    """Cuts an image into patches that stand in the batch dimension, in one order or the other."""

    def __init__(self, order, reverse=False):
        super().__init__()
        self.embed = nn.Conv2d(2, 4, 3)
        self.mix = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 4)
        self.order, self.reverse = order, reverse

    def forward(self, x):
        b = len(x)
        if self.reverse:
            x = x.flip(0)
        patches = x.unfold(2, 3, 3).unfold(3, 3, 3).flatten(2, 3)  # B × C × N × 3 × 3
        patches = patches.permute(0, 2, 1, 3, 4) if self.order == "major" else patches.permute(2, 0, 1, 3, 4)
        h = self.mix(self.embed(patches.flatten(0, 1)).flatten(1).relu())
        h = h.unflatten(0, (b, -1) if self.order == "major" else (-1, b)).mean(1 if self.order == "major" else 0)
        return self.fc(h.flip(0) if self.reverse else h)


@pytest.mark.parametrize("order", ["major", "minor"])
def test_patches_in_the_batch(order):
    net = check(Patches(order), X)
    assert {m.fold for m in net.expert_layers.values()} == {order}
    # A smaller image gives one patch, a larger one more: the order stays.
    for size in (3, 9):
        x = torch.rand(4, 2, size, size).double()
        y = net(x, ROWS)
        for row, task in enumerate(ROWS):
            assert_close(y[row : row + 1], net(x[row : row + 1], task))


@pytest.mark.parametrize("order", ["major", "minor"])
def test_small_images_first(order):
    net = made(Patches(order)).double()
    net(torch.rand(2, 2, 3, 3).double(), [1, 0])
    assert net.expert_layers["embed"].fold == "rows"
    x = torch.rand(4, 2, 9, 9).double()
    y = net(x, ROWS)
    for row, task in enumerate(ROWS):
        assert_close(y[row : row + 1], net(x[row : row + 1], task))


class SequenceFirst(nn.Module):
    """Tokens in dim 0: as many rows as samples by chance, and none of them a sample's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.embed(x.flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize("tokens", [(2, 2), (1, 2), (3, 1)])
def test_sequence_first_layers_are_refused(tokens):
    net = made(SequenceFirst())
    x = torch.rand(4, 2, *tokens)
    with pytest.raises(LoRKDError, match=r"'embed': the rows of its input do not follow the samples"):
        net(x, ROWS)
    with torch.enable_grad():
        assert torch.allclose(net(x, "b")[:, :2], net.extract("b")(x), atol=1e-6)
    net = made(SequenceFirst(), exclude=["embed"], rank=0)
    y = net(x, ROWS)
    assert torch.allclose(y[1:2], net(x[1:2], 0), atol=1e-6)


class Centred(Net):
    def features(self, x):
        h = super().features(x)
        return h - h.mean(0)


class FoldedIntoChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.conv(x.flatten(0, 1)[None].flatten(0, 1)[:, None])
        return self.fc(h.mean((2, 3)).unflatten(0, (len(x), -1)).flatten(1)[:, :4])


class OneRow(nn.Module):
    """All samples side by side in one image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.conv(torch.cat(list(x), -1)[None])[0]
        return self.fc(torch.stack([p.mean((1, 2)) for p in h.chunk(len(x), -1)]))


@pytest.mark.parametrize(
    ("network", "layer"), [(Centred(), "fc"), (OneRow(), "conv"), (Patches("major", True), "embed")]
)
def test_networks_that_mix_the_batch_are_refused(network, layer):
    net = made(network)
    with pytest.raises(LoRKDError, match=f"'{layer}': the rows of its input do not follow the samples"):
        net(X, ROWS)


def test_channels_in_the_batch_are_routed():
    check(FoldedIntoChannels(), X)


@pytest.mark.parametrize("seed", range(40))
def test_random_foldings_are_right_or_refused(seed):
    """Any shuffling of batch, tokens and channels between layers."""
    draw = torch.Generator().manual_seed(seed)
    plans = [torch.randperm(3, generator=draw).tolist() for _ in range(2)]
    tokens = int(torch.randint(1, 5, (), generator=draw))
    merges = torch.randint(0, 3, (2,), generator=draw).tolist()

    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(1, 3), nn.Linear(3, 1)])
            self.fc = nn.Linear(2 * tokens, 4)

        def forward(self, x):
            h = x  # B × 2 × tokens
            for layer, plan, merge in zip(self.layers, plans, merges):
                h = h.permute(plan)
                shape = h.shape
                rows = h.flatten(0, 1) if merge == 1 else h.flatten() if merge == 2 else h
                y = layer(rows[..., None])
                y = y.sum(-1) if layer.out_features == 3 else y[..., 0] if layer.in_features == 1 else y.mean(-1)
                back = [plan.index(i) for i in range(3)]
                h = y.reshape(shape).permute(back)
            return self.fc(h.flatten(1))

    # The second layer takes three features: give it the same value thrice.
    class Spread(nn.Linear):
        pass

    network = Folding()
    network.layers[1] = nn.Linear(1, 2)
    network.double().eval()
    net = made(network).double()
    batch = int(torch.randint(2, 5, (), generator=draw))
    x = torch.rand(batch, 2, tokens, generator=draw).double()
    tasks = torch.randint(0, 3, (batch,), generator=draw).tolist()
    if len(set(tasks)) == 1:
        tasks[0] = (tasks[0] + 1) % 3
    try:
        y = net(x, tasks)
    except LoRKDError as e:
        assert "do not follow the samples" in str(e) or "without batch" in str(e) or "batch dimension" in str(e)
        return
    for row, task in enumerate(tasks):
        assert_close(y[row : row + 1], net(x[row : row + 1], task))


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


def test_integer_inputs():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.mix = nn.Linear(4, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.mix(self.embed(x)).mean(1))

    check(Tokens(), torch.randint(0, 10, (4, 5)), plain=False)


def test_further_inputs_are_routed_with_the_batch():
    class Conditioned(Net):
        def forward(self, x, shift, factor=1.0):
            return self.fc(self.features(x) * factor + shift)

    net = made(Conditioned()).double()
    shift = torch.rand(4, 4).double()
    y = net(X.double(), ROWS, shift=shift, factor=2.0)
    for row, task in enumerate(ROWS):
        assert_close(y[row : row + 1], net(X[row : row + 1].double(), task, shift=shift[row : row + 1], factor=2.0))


def test_buffers_are_as_before_after_the_measurement():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def features(self, x):
            self.seen += 1
            return super().features(x)

    net = LoRKDNet(Counting(), TASKS, head="fc")
    net(X, ROWS)
    assert net.backbone.seen == 1


def test_untrained_deep_network_in_float32():
    """Ten sigmoids leave nothing of the image that float32 could hold; routing is found all the same."""
    layers = [m for _ in range(12) for m in (nn.Linear(6, 6), nn.Sigmoid())]
    for layer in layers[::2]:
        layer.weight.data.mul_(0.02)
    net = made(nn.Sequential(nn.Flatten(), nn.Linear(72, 6), *layers, nn.Linear(6, 4)))
    y = net(X, ROWS)
    for row, task in enumerate(ROWS):
        assert_close(y[row : row + 1], net(X[row : row + 1], task))


def test_dropout_and_batch_norm_in_training():
    network = Net(second=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    net = LoRKDNet(network, TASKS, head="fc").train()
    before = copy.deepcopy(net.backbone.second[1].state_dict())
    state = torch.get_rng_state()
    net._find_folding(X, {})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.backbone.second[1].state_dict().items())
    assert net.backbone.second[1].training
    net(X, ROWS)
    assert net.backbone.second[1].num_batches_tracked == 1
