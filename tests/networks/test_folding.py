"""Networks that fold the batch are routed rightly or refused; the measurement leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from tests.networks.common import TASKS, made
from tests.networks.reference import assert_close
from tests.networks.small import ROWS, Net, X, check

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
