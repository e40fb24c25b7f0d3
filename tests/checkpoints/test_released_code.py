"""Importing state dicts laid out as those of the released code, which this file builds from that layout by itself."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from authors_shufflenet import AuthorsShuffleNet
from monai.bundle import ConfigParser
from torch import nn

from lorkd_monai.checkpoints.released_code import import_authors
from lorkd_monai.checkpoints.weights import load_decomposition, save_weights
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from tests.checkpoints import authors_shufflenet
from tests.networks.reference import assert_close

RESNET = {
    "_target_": "monai.networks.nets.resnet18", "spatial_dims": 2, "n_input_channels": 3, "conv1_t_stride": 2,
    "shortcut_type": "B", "bias_downsample": False, "widen_factor": 0.0625,
}  # fmt: skip
CLASSES = {"breast": 2, "blood": 5, "xray": 3}
UNET = {
    "_target_": "dynamic_network_architectures.architectures.unet.PlainConvUNet", "input_channels": 1, "n_stages": 3,
    "features_per_stage": [4, 6, 8], "conv_op": "$torch.nn.Conv3d", "kernel_sizes": 3, "strides": [1, 2, 2],
    "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "conv_bias": True, "norm_op": "$torch.nn.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": "$torch.nn.LeakyReLU", "num_classes": 2,
}  # fmt: skip


class Adapted(nn.Module):
    """A convolution kept as `conv`, beside the factors of every task."""

    def __init__(self, conv: nn.Module, ranks: list[int]) -> None:
        super().__init__()
        self.conv = conv
        o, i, k = conv.out_channels, conv.in_channels, conv.kernel_size[0]
        columns = i * k ** (len(conv.kernel_size) - 1)
        self.lora_A_list = nn.ParameterList([torch.randn(r * k, columns) for r in ranks])
        self.lora_B_list = nn.ParameterList([torch.randn(o * k, r * k) for r in ranks])

    def delta(self, task: int, scale: float) -> torch.Tensor:
        return (self.lora_B_list[task] @ self.lora_A_list[task]).view(self.conv.weight.shape) * scale


class Holder(nn.Module):
    """What the other code calls `module`, `CKN` and so on: a name before the keys."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def randomised(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.ones_like(tensor))
    return network


def classification(rank: int = 2, classes: dict[str, int] = CLASSES) -> tuple[nn.Module, dict[str, Adapted]]:
    """Their residual network: conv1 and both convolutions of each block are adapted, the shortcuts are not."""
    resnet = randomised(ConfigParser({**RESNET, "num_classes": 2}).get_parsed_content())
    features = resnet.fc.in_features
    del resnet.fc
    names = [n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    adapted = {n: Adapted(resnet.get_submodule(n), [rank] * len(classes)) for n in names}
    for name, layer in adapted.items():
        resnet.set_submodule(name, layer)
    heads = nn.ModuleList([Holder(module=nn.Linear(features, n)) for n in classes.values()])
    joint = Holder(module=nn.Linear(features, sum(classes.values())))
    return Holder(CKN=Holder(module=Holder(resnet=resnet)), head_task=heads, head=joint), adapted


class Block(nn.Module):
    """Their stacked convolutions: `stages` where the package says `convs`."""

    def __init__(self, convs: nn.Module) -> None:
        super().__init__()
        self.stages = convs


def segmentation(ranks: tuple[int, ...] = (1, 2), config: dict | None = None) -> tuple[nn.Module, dict[str, Adapted]]:
    """Their U-Net: adapted encoder and, with doubled ranks, decoder; no heads; inside a network of text queries."""
    unet = randomised(ConfigParser(config or UNET).get_parsed_content())
    adapted = {}
    del unet.decoder.encoder, unet.decoder.seg_layers  # theirs has neither
    for branch, factor in ((unet.encoder, 1), (unet.decoder, 2)):
        for name, module in list(branch.stages.named_modules()):
            if not hasattr(module, "convs"):
                continue
            for conv in module.convs:
                conv.conv = Adapted(conv.conv, [factor * r for r in ranks])  # all_modules.0 stays what it was
                key = f"{'encoder' if branch is unet.encoder else 'decoder'}.stages.{name}"
                adapted[f"{key}.convs.{list(module.convs).index(conv)}.conv"] = conv.conv
            branch.stages.set_submodule(name, Block(module.convs))
    model = Holder(module=Holder(backbone=unet, projection_layer=nn.Linear(3, 3)))
    return Holder(model=model, unet=unet), adapted


def test_classification_comes_out_exactly(tmp_path):
    theirs, adapted = classification()
    net, report = import_authors(theirs.state_dict(), RESNET, list(CLASSES), alpha=16.0, drop=[r"^head\."])
    assert net.num_classes == CLASSES and set(net.expert_layers) == set(adapted)
    assert net.spec()["rank"] == dict.fromkeys(CLASSES, 2) and net.rank_pattern == {}
    assert sorted(report.placed + report.dropped) == sorted(theirs.state_dict())
    assert report.dropped == ["head.module.weight", "head.module.bias"] and report.fresh == []
    for t, task in enumerate(CLASSES):
        plain = net.extract(task)
        for name, layer in adapted.items():
            expected = layer.conv.weight + layer.delta(t, 16.0 / 2)
            assert torch.equal(plain.get_submodule(name).weight, expected), name
        assert torch.equal(plain.fc.weight, theirs.head_task[t].module.weight)
        assert torch.equal(plain.fc.bias, theirs.head_task[t].module.bias)
    shortcut = theirs.CKN.module.resnet.layer2[0].downsample[0].weight
    assert torch.equal(plain.layer2[0].downsample[0].weight, shortcut)
    assert torch.equal(plain.bn1.running_var, theirs.CKN.module.resnet.bn1.running_var)

    save_weights(tmp_path / "imported.pt", net.state_dict())
    again = load_decomposition(tmp_path / "imported.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(x, [0, 2]), net(x, [0, 2]))


def test_output_is_that_of_their_weights():
    theirs, adapted = classification()
    net, _ = import_authors(theirs.state_dict(), RESNET, list(CLASSES), alpha=16.0, drop=["^head[.]"])
    for layer in adapted.values():
        layer.conv.weight.data += layer.delta(1, 8.0)
    plain = ConfigParser({**RESNET, "num_classes": CLASSES["blood"]}).get_parsed_content().eval()
    state = {k.replace(".conv.weight", ".weight"): v for k, v in theirs.CKN.module.resnet.state_dict().items()}
    plain.load_state_dict({k: v for k, v in state.items() if "lora_" not in k}, strict=False)
    plain.fc = theirs.head_task[1].module
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x, "blood")[:, :5], plain(x))


def test_mapping_gives_the_same_as_names():
    theirs, _ = classification()
    state = theirs.state_dict()
    mapping = {"rename": {r"^CKN\.resnet\.": ""}, "drop": [r"^head\."]}
    net, _ = import_authors(state, RESNET, list(CLASSES), scale=8.0, mapping=mapping)
    named, _ = import_authors(state, RESNET, list(CLASSES), alpha=16.0, drop=[r"^head\."])
    for key, tensor in named.backbone.state_dict().items():
        assert torch.equal(tensor, net.backbone.state_dict()[key]), key


@pytest.fixture
def nnunet():
    pytest.importorskip("dynamic_network_architectures")


MAPPING = {
    "rename": {r"^model\.backbone\.": "", r"^(.*)\.stages\.(\d+)\.(conv|norm|all_modules)": r"\1.convs.\2.\3"},
    "drop": [r"^model\.projection_layer\."],
    "fresh": ["decoder.seg_layers.*"],
}


@pytest.mark.parametrize(
    "mapping", [MAPPING, {k: v for k, v in MAPPING.items() if k != "rename"}], ids=["rules", "structure"]
)
def test_segmentation_comes_out_exactly(nnunet, mapping):
    theirs, adapted = segmentation()
    with torch.no_grad():  # whole numbers: their sums are exact in any order, on every processor
        for parameter in theirs.parameters():
            parameter.copy_((3 * parameter).round())
    state = theirs.state_dict()
    assert "model.module.backbone.encoder.stages.0.0.stages.0.conv.conv.weight" in state
    assert "model.module.backbone.encoder.stages.0.0.stages.0.conv.lora_A_list.1" in state
    net, report = import_authors(state, UNET, {"liver": 2, "lung": 3}, scale=2.0, mapping=mapping)
    assert net.spec()["rank"] == {"liver": 1, "lung": 2} and net.rank_pattern == {"decoder.*": 2.0}
    assert sorted(report.placed + report.dropped) == sorted(state)
    assert report.fresh and all("seg_layers" in name for name in report.fresh)
    for t, task in enumerate(net.tasks):
        plain = net.extract(task)
        for name, layer in adapted.items():
            assert torch.equal(plain.get_submodule(name).weight, layer.conv.weight + layer.delta(t, 2.0)), name
            assert torch.equal(plain.get_submodule(name).bias, layer.conv.bias)
        up = theirs.model.module.backbone.decoder.transpconvs[1].weight
        assert torch.equal(plain.decoder.transpconvs[1].weight, up)
    y = net(torch.rand(2, 1, 8, 8, 8), ["liver", "lung"])
    assert y.shape == (2, 3, 8, 8, 8)


def test_segmentation_without_heads_needs_permission(nnunet):
    state = segmentation()[0].state_dict()
    with pytest.raises(LoRKDError, match="holds no heads .* give tasks as"):
        import_authors(state, UNET, ["liver", "lung"], scale=2.0, mapping=MAPPING)
    closed = {**MAPPING, "fresh": []}
    with pytest.raises(LoRKDError, match=r"gives no head for .*decoder.seg_layers.0.*name it in fresh"):
        import_authors(state, UNET, {"liver": 2, "lung": 3}, scale=2.0, mapping=closed)


# ---------------------------------------------------------------------- docs/import.md, run as it stands


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.S)


def commands_of(tasks: str) -> list[list[str]]:
    """The commands of the example with these tasks, in words without `lorkd`."""
    example = next(t for t in re.findall(r"(?:^    .*\n)+", DOCS, re.M) if tasks in t)
    return [shlex.split(line)[1:] for line in example.replace("\\\n", " ").splitlines()]


DOCS = (Path(__file__).parents[2] / "docs/import.md").read_text()
DOCS_UNET = next(json.loads(b) for b in blocks("json") if "PlainConvUNet" in b) | {
    "features_per_stage": [2, 3, 4, 5, 6]
}
COPIES = {
    "shared": lambda state, unet: {**state, **unet},
    "cloned": lambda state, unet: {**state, **{k: v.clone() for k, v in unet.items()}},
    "first": lambda state, unet: {**unet, **state},
    "first, cloned": lambda state, unet: {**{k: v.clone() for k, v in unet.items()}, **state},
    "parallel": lambda state, unet: {**state, **{k.replace("unet.", "unet.module."): v for k, v in unet.items()}},
    "absent": lambda state, unet: state,
    "alone": lambda state, unet: unet,
}


@pytest.mark.parametrize("mapped", [False, True], ids=["by itself", "mapping"])
@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
def test_segmentation_commands_of_the_docs(nnunet, tmp_path, monkeypatch, capsys, copies, mapped):
    theirs, adapted = segmentation(config=DOCS_UNET)
    own = theirs.state_dict()
    unet = {k: v for k, v in own.items() if k.startswith("unet.")}
    state = copies({k: v for k, v in own.items() if k not in unet}, unet)
    assert copies is COPIES["alone"] or "model.module.backbone.encoder.stages.0.0.stages.0.conv.conv.weight" in state
    monkeypatch.chdir(tmp_path)
    torch.save(state, "theirs.pth")
    Path("net.json").write_text(json.dumps(DOCS_UNET))
    Path("map.yaml").write_text(blocks("yaml")[0])
    words, inspect = commands_of("liver=2")
    run_cli(monkeypatch, *words, *(["--mapping", "map.yaml"] if mapped else []), "--report", "keys.json")
    printed = capsys.readouterr().out
    assert len(printed) < 1500 and "starting fresh, to be trained: " in printed
    lists = json.loads(Path("keys.json").read_text())
    assert sorted(lists["placed"] + lists["dropped"]) == sorted(state)
    assert all("projection_layer" in k for k in lists["dropped"])
    net = load_decomposition("ours.pt", backbone=DOCS_UNET)
    for t, task in enumerate(net.tasks):
        plain = net.extract(task)
        for name, layer in adapted.items():
            assert_close(plain.get_submodule(name).weight, layer.conv.weight + layer.delta(t, 2.0), what=name)
    run_cli(monkeypatch, *inspect)
    assert "encoder.stages.0.0.convs.0.conv" in capsys.readouterr().out


def test_copies_that_differ_are_refused(nnunet):
    state = segmentation()[0].state_dict()
    key = next(k for k in state if k.startswith("unet.") and k.endswith("conv.conv.weight"))
    state[key] = state[key] + 1
    with pytest.raises(LoRKDError, match="unet|shape|would go to"):
        import_authors(state, UNET, {"liver": 2, "lung": 2}, scale=2.0, mapping=MAPPING)


def test_residual_commands_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(classification()[0].state_dict(), "theirs.pth")
    config = next(json.loads(b) for b in blocks("json") if "resnet18" in b)
    Path("net.json").write_text(json.dumps({**config, "widen_factor": RESNET["widen_factor"]}))
    for words in commands_of("breast,blood,xray"):
        run_cli(monkeypatch, *words)
    assert "left out, as asked: 2 (head.module.weight, head.module.bias)" in capsys.readouterr().out


def test_shufflenet_commands_of_the_docs(tmp_path, monkeypatch, capsys):
    """The network of both released scripts, by torchvision's name, which stands for a small one here."""
    models = ModuleType("torchvision.models")
    models.shufflenet_v2_x1_0 = authors_shufflenet.shufflenet_v2_x1_0
    package = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    words, inspect = commands_of("path,oct")
    names, classes = words[3].split(","), [9, 4, 11, 8, 2, 8, 7, 11, 11, 2]
    resnet = randomised(AuthorsShuffleNet(lambda conv: Adapted(conv, [4] * 10)))
    heads = nn.ModuleList([Holder(module=nn.Linear(20, n)) for n in classes])
    theirs = Holder(CKN=Holder(module=Holder(resnet=resnet)), head_task=heads, head=Holder(module=nn.Linear(20, 73)))
    state = theirs.state_dict()
    assert "CKN.module.resnet.layers.0.0.branch1.1.conv.lora_A_list.9" in state
    assert "CKN.module.resnet.layers.0.0.branch1.0.conv.weight" in state  # depthwise
    monkeypatch.chdir(tmp_path)
    torch.save(state, words[1])
    Path("net.json").write_text(next(b for b in blocks("json") if "shufflenet" in b))
    run_cli(monkeypatch, *words)
    assert "left out, as asked: 2 (head.module.weight, head.module.bias)" in capsys.readouterr().out
    net = load_decomposition("ours.pt", backbone=json.loads(Path("net.json").read_text())).eval()
    assert net.num_classes == dict(zip(names, classes, strict=True)) and set(net.spec()["rank"].values()) == {4}
    resnet.eval()
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        for t, task in enumerate(names):
            expected = heads[t].module(resnet(x, t, 16 / 4))
            assert_close(net.extract(task)(x), expected, what=task)
    run_cli(monkeypatch, *inspect)
    assert "stage2.0.branch1.2" in capsys.readouterr().out


def test_the_report_fits_on_a_screen():
    state = classification()[0].state_dict()
    state |= {f"other.module.{b}.{i}.weight": torch.zeros(3) for b in "abc" for i in range(300)}
    with pytest.raises(LoRKDError) as e:
        import_authors(state, **arguments())
    assert "900 keys (" in str(e.value) and "more of other" in str(e.value) and len(str(e.value)) < 1500
    _, report = import_authors(state, **arguments(drop=["^head[.]", "^other[.]"]))
    assert len(report.dropped) == 902 and len(report.summary()) < 500
    assert report.summary().startswith("left out, as asked: 902 (")


@pytest.mark.parametrize(
    ("drop", "dropped"),
    [
        (r"^model\.(?!backbone\.)", ["model.module.text.weight"]),
        (r"^model\.module\.(?!backbone\.)", ["model.module.text.weight"]),
        (r"^model\.(module\.)?text", ["model.module.text.weight"]),
        (r"\.text\.", ["model.module.text.weight"]),
        (r"all_modules\.1", ["model.module.backbone.all_modules.1.weight"]),
    ],
)
def test_drop_is_matched_without_module(drop, dropped):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all_modules = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.PReLU(4)])
            self.fc = nn.Linear(4, 2)

    net, prefix = Net(), "model.module.backbone.all_modules.0."
    state = {
        prefix + "conv.weight": torch.rand(4, 1, 3, 3), prefix + "conv.bias": torch.rand(4),
        prefix + "lora_A_list.0": torch.rand(3, 3), prefix + "lora_B_list.0": torch.rand(12, 3),
        "model.module.backbone.all_modules.1.weight": torch.rand(4), "model.module.text.weight": torch.rand(5),
    }  # fmt: skip
    options = {"scale": 2, "fresh": ["fc.*", "all_modules.1.*"]}
    if dropped == ["model.module.text.weight"]:
        assert import_authors(state, net, {"a": 2}, drop=[drop], **options)[1].dropped == dropped
    else:
        del state["model.module.text.weight"]
        assert import_authors(state, net, {"a": 2}, drop=[drop], **options)[1].dropped == dropped


def arguments(**changes):
    return {"backbone": RESNET, "tasks": list(CLASSES), "alpha": 16.0, "drop": [r"^head\."], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": None}, "give either alpha .* or scale"),
        ({"scale": 2.0}, "give either alpha .* or scale"),
        ({"drop": []}, r"2 keys \(head.module.weight, head.module.bias\) found no place in ResNet.*drop=\['\^head"),
        ({"tasks": ["a", "b"]}, "has 3 experts, got 2 names: a, b"),
        ({"tasks": "breast"}, "tasks: expected the names"),
        ({"tasks": {"a": 2, "b": 5, "c": 4}}, "heads have the output channels"),
        ({"drop": ["head", "lora_"]}, "holds no experts"),
        ({"drop": ["^head[.]", "head_task"]}, "holds no heads"),
        ({"drop": ["^head[.]", "layer3.*bn1"]}, r"no key gives 8 keys \(layer3.0.bn1.weight.*name in fresh"),
        ({"drop": ["^head[.]", "layer3.0.conv1.lora_B_list.1"]}, r"lacks CKN.resnet.layer3.0.conv1.lora_B_list.1"),
        ({"drop": ["("]}, r"'\(' is not a regular expression"),
        ({"mapping": {"renames": {}}}, "expected the fields keys, rename, drop, fresh, got 'renames'"),
        ({"mapping": {"rename": ["a"]}}, "rename must map strings to strings"),
        ({"mapping": {"drop": "a"}}, "drop must be a list of strings"),
        ({"mapping": {"rename": {"CKN": r"\3"}}}, "invalid group reference"),
        ({"mapping": {"rename": {"^CKN.resnet.": "net."}}}, r"CKN.module.resnet.conv1.conv.weight → net.conv1.weight"),
        ({"backbone": {**RESNET, "widen_factor": 0.125}}, r"is \(4, 3, 7, 7\), but conv1.weight is \(8|would go to"),
        ({"backbone": {**RESNET, "_target_": "monai.networks.nets.resnet10"}}, "found no place in ResNet"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    state = classification()[0].state_dict()
    with pytest.raises(LoRKDError, match=message):
        import_authors(state, **arguments(**changes))


def test_every_homeless_key_is_listed():
    state = classification()[0].state_dict()
    state["CKN.module.resnet.extra.weight"] = torch.zeros(3)
    state["other.module.bias"] = torch.zeros(3)
    with pytest.raises(LoRKDError) as e:
        import_authors(state, RESNET, list(CLASSES), alpha=16.0)
    for key in ("head.module.weight", "head.module.bias", "CKN.module.resnet.extra.weight", "other.module.bias"):
        assert key in str(e.value)


def test_ranks_without_a_pattern():
    theirs, adapted = classification()
    adapted["layer1.0.conv2"].lora_A_list[1] = nn.Parameter(torch.zeros(3, 12))
    adapted["layer1.0.conv2"].lora_B_list[1] = nn.Parameter(torch.zeros(12, 3))
    with pytest.raises(LoRKDError, match=r"ranks of .* are \[2, .*no common multiple"):
        import_authors(theirs.state_dict(), **arguments())
    adapted["layer1.0.conv2"].lora_A_list[1] = nn.Parameter(torch.zeros(4, 12))
    with pytest.raises(LoRKDError, match=r"layer1.0.conv2: the factors of task 1 are \(4, 12\)"):
        import_authors(theirs.state_dict(), **arguments())


def test_values_that_float32_cannot_hold():
    state = classification()[0].state_dict()
    key = "CKN.module.resnet.bn1.weight"
    state[key] = state[key].double() / 3
    with pytest.raises(LoRKDError, match=r"CKN.resnet.bn1.weight holds torch.float64 values"):
        import_authors(state, **arguments())


def test_factors_of_grouped_convolutions_are_left_out():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.depthwise(self.first(x)).mean((2, 3)))

    theirs = Net()
    theirs.first, theirs.depthwise = Adapted(theirs.first, [1, 1]), Adapted(theirs.depthwise, [1, 1])
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc")}
    state |= {f"head_task.{t}.weight": torch.rand(3, 4) for t in range(2)}
    state |= {f"head_task.{t}.bias": torch.rand(3) for t in range(2)}
    net, report = import_authors(state, Net(), ["a", "b"], scale=1.0)
    assert set(net.expert_layers) == {"first"} and len(report.unused) == 4
    assert torch.equal(net.extract("a").depthwise.weight, theirs.depthwise.conv.weight)


def run_cli(monkeypatch, *words: str) -> None:
    from lorkd_monai.cli import commands as cli

    monkeypatch.setattr("sys.argv", ["lorkd", *words])
    cli.main()


def test_command_line(tmp_path, monkeypatch, capsys):
    theirs, _ = classification()
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    (tmp_path / "net.json").write_text(json.dumps({"network_def": RESNET}))
    output = str(tmp_path / "ours.pt")
    words = ["import", str(tmp_path / "theirs.pth"), str(tmp_path / "net.json"), "breast,blood,xray", output]
    with pytest.raises(LoRKDError, match="found no place"):
        run_cli(monkeypatch, *words, "--alpha", "16")
    assert not (tmp_path / "ours.pt").exists()
    run_cli(monkeypatch, *words, "--alpha", "16", "--drop", r"^head\.")
    assert re.search(r"ours.pt: \d+ keys taken over, tasks breast, blood, xray", capsys.readouterr().out)
    run_cli(monkeypatch, "tasks", output)
    assert "blood" in capsys.readouterr().out
    run_cli(monkeypatch, "inspect", output)
    assert "layer1.0.conv1" in capsys.readouterr().out
    with pytest.raises(LoRKDError, match="does not say what its tasks are"):
        run_cli(monkeypatch, "export", output, str(tmp_path / "experts"))


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    from lorkd_monai.workflows import import_released as imported

    (tmp_path / "net.yaml").write_text(f"_target_: {UNET['_target_']}\n")
    monkeypatch.setattr(imported.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoRKDError, match=r"pip install 'lorkd-monai\[nnunet\]'"):
        imported.read_backbone(tmp_path / "net.yaml")


@pytest.mark.parametrize("text", ["- a", "a: [", "a: 1"])
def test_bad_backbone_file(tmp_path, text):
    from lorkd_monai.workflows.import_released import read_backbone

    (tmp_path / "net.yaml").write_text(text)
    with pytest.raises(LoRKDError, match="backbone: .*(mapping|read|_target_)"):
        read_backbone(tmp_path / "net.yaml")


def test_is_a_decomposition_like_any_other():
    net, _ = import_authors(classification()[0].state_dict(), **arguments())
    assert isinstance(net, LoRKDNet)
    net.add_task("more", 2)
    assert net(torch.rand(1, 3, 32, 32), "more").shape == (1, 5)


def test_imported_checkpoint_is_exported(tmp_path, monkeypatch, capsys):
    from lorkd_monai.data import load_data_list, make_phantoms

    make_phantoms(tmp_path / "data", "classification", 2, 12)
    data = load_data_list(tmp_path / "data", "classification", 2)
    names = list(data.tasks)
    state = classification(classes=data.num_classes)[0].state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "theirs.pth")
    (tmp_path / "net.json").write_text(json.dumps(RESNET))
    words = ["import", str(tmp_path / "theirs.pth"), str(tmp_path / "net.json"), ",".join(names)]
    words += [str(tmp_path / "ours.pt"), "--alpha", "16", "--dataset_dir", str(tmp_path / "data")]
    with pytest.raises(LoRKDError, match="give kind .* and image_size"):
        run_cli(monkeypatch, *words)
    run_cli(monkeypatch, *words, "--kind", "classification", "--image_size", "32")
    run_cli(monkeypatch, "export", str(tmp_path / "ours.pt"), str(tmp_path / "experts"), "--formats", "pt")
    assert (tmp_path / "experts" / f"{names[0]}_classification" / "models" / "model.pt").is_file()
