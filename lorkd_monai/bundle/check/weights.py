"""The checks that run a bundle's network: every form of its weights, and MONAI's own commands."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorkd_monai.bundle.check.problem import BundleFiles, Problem
from lorkd_monai.errors import LoRKDError, first_line

__all__ = ["check_weights", "check_zoo_commands"]


def check_weights(bundle: BundleFiles) -> Iterator[Problem]:
    import torch

    from lorkd_monai.bundle.formats import build_network

    path = bundle.folder / "models" / "model.pt"
    if not path.is_file() or not bundle.readable:
        return
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        reason = first_line(error)
        yield Problem("weights", "models/model.pt", f"it cannot be read ({reason})", "export it again")
        return
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        yield Problem("weights", "models/model.pt", "expected a flat state_dict", "save network.state_dict()")
        return
    try:
        network = build_network(bundle.inference["network_def"], weights)
    except LoRKDError as error:
        yield Problem("weights", "models/model.pt", f"it does not fit network_def: {error}", "export it again")
        return
    inputs, outputs = bundle.tensor("inputs", "image"), bundle.tensor("outputs", "pred")
    shape = (1, inputs["num_channels"], *inputs["spatial_shape"])
    try:
        image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            result = network(image)
    except (RuntimeError, ValueError) as error:
        yield Problem(
            "channels", "configs/metadata.json", f"the network does not take the input that it describes, {shape}: "
            f"{first_line(error)}", "give the network's own input channels and size",
        )  # fmt: skip
        return
    if not isinstance(result, torch.Tensor):
        message = f"network_def returns a {type(result).__name__}, not one tensor"
        yield Problem(
            "channels", "configs/inference.json", message, "MONAI's tools need a network that returns one tensor"
        )
        return
    if result.shape[1] != outputs.get("num_channels"):
        yield Problem(
            "channels", "configs/metadata.json", f"it says {outputs.get('num_channels')} output channels, the network "
            f"gives {result.shape[1]}", "make num_channels and channel_def those of the network",
        )  # fmt: skip
    yield from _formats(bundle, weights, image, result)


def _formats(bundle: BundleFiles, weights: Mapping[str, Any], image: Any, expected: Any) -> Iterator[Problem]:
    """Every other form of the weights must give the output of model.pt."""
    import torch

    from lorkd_monai.bundle.formats import TOLERANCE, run_onnx

    def differs(got: Any) -> bool:
        scale = max(1.0, float(expected.abs().max()))
        return got.shape != expected.shape or float((got - expected).abs().max()) > TOLERANCE * scale

    models = bundle.folder / "models"
    again = "write it again from model.pt"
    if (models / "model.safetensors").is_file():
        from safetensors.torch import load_file

        try:
            stored = load_file(models / "model.safetensors")
            same = stored.keys() == weights.keys() and all(torch.equal(stored[k], weights[k]) for k in weights)
        except Exception:  # safetensors has an error class of its own for a damaged header
            same = False
        if not same:
            yield Problem("formats", "models/model.safetensors", "its tensors are not those of model.pt", again)
    for path in sorted(models.glob("*.ts")):
        name = f"models/{path.name}"
        yield from _archive(bundle, path)
        try:
            with torch.no_grad():
                wrong = differs(torch.jit.load(str(path), map_location="cpu").eval()(image))
        except Exception as error:  # TorchScript's errors have no common class
            reason = first_line(error)
            yield Problem("formats", name, f"it cannot be run ({reason})", again)
            continue
        if wrong:
            yield Problem("formats", name, "its output is not that of model.pt", again)
    onnx = models / "model.onnx"
    if onnx.is_file():
        try:
            if differs(run_onnx(onnx, image)):
                yield Problem("formats", "models/model.onnx", "its output is not that of model.pt", again)
        except ImportError:
            pass  # onnxruntime is an extra; what cannot be run here is not judged here
        except Exception as error:  # onnxruntime's errors have no common public class
            yield Problem("formats", "models/model.onnx", f"it cannot be run ({str(error)[:200]})", again)


def _archive(bundle: BundleFiles, path: Path) -> Iterator[Problem]:
    name = f"models/{path.name}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = names[0].split("/")[0]
            extra = {item: archive.read(item) for item in names if item.startswith(f"{root}/extra/")}
    except (OSError, zipfile.BadZipFile, IndexError):
        return  # running it says so
    if root != path.stem:
        yield Problem(
            "renamed-ts", name, f"its archive's root is {root!r}: the file was renamed after its export",
            "export it under its final name with monai.bundle ckpt_export",
        )  # fmt: skip
    for config in ("metadata", "inference"):
        stored = extra.get(f"{root}/extra/{config}.json")
        try:
            same = stored is not None and json.loads(stored) == bundle.json.get(f"configs/{config}.json")
        except ValueError:
            same = False
        if not same:
            yield Problem(
                "archive", name, f"its extra/{config}.json is missing or not configs/{config}.json",
                "export it again with monai.bundle ckpt_export",
            )  # fmt: skip


def check_zoo_commands(bundle: BundleFiles) -> Iterator[Problem]:
    """MONAI's own commands, as the zoo's CI runs them."""
    from monai.bundle import ckpt_export, verify_net_in_out

    if not bundle.readable or not (bundle.folder / "models" / "model.pt").is_file():
        return
    configs = bundle.folder / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    root = {"bundle_root": str(bundle.folder)}
    try:
        verify_net_in_out("network_def", **files, device="cpu", **root)
    except Exception as error:  # the network may raise anything
        fix = "describe the tensors of network_def as they are"
        yield Problem("verify", "configs/metadata.json", f"verify_net_in_out fails: {error}", fix)
    how = bundle.metadata.get("torchscript", "script")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            ckpt_export(
                "network_def", filepath=str(Path(temporary) / "model.ts"), use_trace=how == "trace",
                ckpt_file=str(bundle.folder / "models" / "model.pt"), **files, **root,
            )  # fmt: skip
        except Exception as error:  # TorchScript's errors have no common class
            reason = first_line(error)
            yield Problem(
                "torchscript", "models/model.pt", f"ckpt_export by {how} fails: {reason}",
                "set 'torchscript' in metadata.json to 'trace' where the network cannot be scripted",
            )  # fmt: skip
