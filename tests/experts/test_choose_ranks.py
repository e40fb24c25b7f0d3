"""Spectra of updates and experts, and ranks proposed from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.choose_ranks import expert_spectrum, suggest_ranks, update_spectrum
from lorkd_monai.networks import LoRKDNet
from tests.networks.common import made


def backbone():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, (1, 3)), nn.Flatten(), nn.Linear(48, 4)
    )


def of_rank(weight, inner, rows, size=1.0):
    """An update whose matrix form has ``inner`` equal singular values."""
    matrix = weight.detach().double().reshape(rows, -1)
    u, _, v = torch.linalg.svd(torch.rand_like(matrix), full_matrices=False)
    return (size * u[:, :inner] @ v[:inner]).reshape(weight.shape)


def tuned(network, inner):
    state = {k: v.double() for k, v in network.state_dict().items()}
    state["0.weight"] = state["0.weight"] + of_rank(network[0].weight, 3 * inner, 24)
    state["2.weight"] = state["2.weight"] + of_rank(network[2].weight, inner, 8)
    return state


def test_update_spectrum_by_hand():
    update = torch.zeros(2, 2)
    update[0, 0], update[1, 1] = 3.0, 4.0
    assert update_spectrum(update).tolist() == [4.0, 3.0]
    assert len(update_spectrum(torch.rand(8, 2, 3, 3), "lorkd")) == 6  # 24 × 6
    assert len(update_spectrum(torch.rand(8, 2, 3, 3), "conv")) == 8  # 8 × 18


@pytest.mark.parametrize("layout", ["lorkd", "conv"])
def test_expert_spectrum_is_that_of_the_fused_update(layout):
    net = made(backbone().double(), {"a": 4, "b": 2}, rank=2, layout=layout)
    for name, values in expert_spectrum(net, "b").items():
        layer = net.expert_layers[name]
        direct = update_spectrum(layer.fused_weight(1) - layer.layer.weight, layout)
        assert torch.allclose(values, direct[: len(values)], atol=1e-10)
        assert (direct[len(values) :] < 1e-10).all()


def test_the_task_with_the_richer_update_gets_more_rank():
    network = backbone().double()
    net = LoRKDNet(network, {"a": 4, "b": 2}, rank=2)
    rows = suggest_ranks(net, {"a": tuned(network, 1), "b": tuned(network, 2)})
    assert [(r["task"], r["rank"], r["equal_rank"]) for r in rows] == [("a", 1, 2), ("b", 2, 2)]
    assert [r["energy"] for r in rows] == pytest.approx([1.0, 1.0])
    own = sum(p.numel() for n, p in net.named_parameters() if ".lora_" in n)
    assert sum(r["parameters"] for r in rows) < sum(r["equal_parameters"] for r in rows) == own
    # Within a budget of three units of rank, equal ranks can only be 1.
    unit = rows[0]["parameters"]
    rows = suggest_ranks(net, {"a": tuned(network, 1), "b": tuned(network, 2)}, budget=3 * unit)
    assert [r["rank"] for r in rows] == [1, 2] and [r["equal_rank"] for r in rows] == [1, 1]
    assert rows[1]["equal_energy"] == pytest.approx(0.5) and rows[1]["energy"] == pytest.approx(1.0)


def test_parameters_are_those_of_the_network_built_with_the_ranks():
    network = backbone().double()
    options = {"layout": "conv", "rank_pattern": {"2": 2}}
    net = LoRKDNet(network, {"a": 4, "b": 2}, rank=3, **options)
    torch.manual_seed(1)
    state = {k: torch.rand_like(v) for k, v in network.state_dict().items()}
    rows = suggest_ranks(net, {"a": state, "b": tuned(network, 1)})
    built = LoRKDNet(network, {"a": 4, "b": 2}, rank={r["task"]: r["rank"] for r in rows}, **options)
    for i, row in enumerate(rows):
        found = sum(layer.lora_A[i].numel() + layer.lora_B[i].numel() for layer in built.expert_layers.values())
        assert row["parameters"] == found
        assert 0 < row["energy"] <= 1 + 1e-9
    assert sum(r["energy"] for r in rows) >= sum(r["equal_energy"] for r in rows) - 1e-9


def test_layers_whose_rank_grows_by_less_than_the_tasks():
    network = backbone().double()
    net = LoRKDNet(network, {"a": 4, "b": 2}, rank=8, layout="conv", include=["0", "2"], rank_pattern={"*": 0.25})
    rows = suggest_ranks(net, {"a": tuned(network, 1), "b": tuned(network, 2)})
    layers = net.expert_layers.values()
    ranks = [[max(1, round(row["rank"] * layer.rank_factor)) for layer in layers] for row in rows]
    assert max(ranks[0]) >= 2 and max(ranks[1]) >= 2  # not stuck where the next rank changes nothing


def test_refusals():
    network = backbone().double()
    net = LoRKDNet(network, {"a": 4, "b": 2}, rank=2)
    good = tuned(network, 1)
    with pytest.raises(LoRKDError, match="holds the tasks a; expected a, b"):
        suggest_ranks(net, {"a": good})
    with pytest.raises(LoRKDError, match="'b': the weight '0.weight' is missing"):
        suggest_ranks(net, {"a": good, "b": {}})
    with pytest.raises(LoRKDError, match=r"'0.weight' is \(1,\), not \(8, 2, 3, 3\)"):
        suggest_ranks(net, {"a": good, "b": {**good, "0.weight": torch.rand(1)}})
    with pytest.raises(LoRKDError, match="'b': its weights do not differ"):
        suggest_ranks(net, {"a": good, "b": network.state_dict()})
    with pytest.raises(LoRKDError, match="budget of 10 parameters is too small: rank 1 for 2 tasks takes"):
        suggest_ranks(net, {"a": good, "b": good}, budget=10)
    with pytest.raises(LoRKDError, match="no layers with experts"):
        suggest_ranks(LoRKDNet(network, {"a": 4}, rank=0), {"a": good})
