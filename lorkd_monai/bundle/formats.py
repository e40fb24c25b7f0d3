"""The weights of one network in every form that a tool may want: PyTorch, safetensors, TorchScript, ONNX."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from torch import nn

from lorkd_monai.bundle.metadata import strings_of
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.files import atomic_file
from lorkd_monai.networks.surgery.replace import parsed_network

__all__ = [
    "FORMATS",
    "build_network",
    "onnx_is_installed",
    "save_formats",
    "save_torchscript",
    "torchscript_of",
    "weights_of",
]

FORMATS = ("pt", "safetensors", "ts", "onnx")
TOLERANCE = 1e-4


def onnx_is_installed() -> bool:
    """True where the packages of the extra ``onnx`` that the export needs are installed."""
    return util.find_spec("onnx") is not None


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the flat state_dict on the CPU, each tensor contiguous and with memory of its own."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}


def build_network(network_config: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Build a network from its MONAI config, load ``weights`` strictly, and return it in eval mode.

    Raises:
        LoRKDError: the config is no plain MONAI config, or the weights do not fit it.
    """
    if not isinstance(network_config, Mapping) or not isinstance(network_config.get("_target_"), str):
        raise LoRKDError(
            "an expert bundle builds its network from a MONAI config: expected a dict with _target_ and plain "
            f"arguments, got {network_config!r}; give LoRKDNet its backbone as such a config"
        )
    ours = sorted({word for word in strings_of(network_config) if word.split(".")[0] in ("lorkd_monai", "scripts")})
    if ours:
        raise LoRKDError(
            f"an expert bundle runs with stock MONAI alone, but its network config refers to {', '.join(ours)}; "
            "decompose a network that MONAI or torch brings"
        )
    config = json.loads(json.dumps(dict(network_config)))
    name = f"the network config {network_config!r}"
    network = parsed_network(ConfigParser({"network_def": config}), "network_def", name)
    if weights is not None:
        try:
            network.load_state_dict(dict(weights), strict=True)
        except RuntimeError as error:
            raise LoRKDError(f"the weights do not fit the network config {network_config!r}: {error}") from error
    return network.eval()


def _output(network: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = network(image)
    return output.as_tensor() if hasattr(output, "as_tensor") else output


def _differ(got: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return got.shape != expected.shape or not torch.allclose(got, expected, rtol=0.0, atol=TOLERANCE * scale)


def torchscript_of(network: nn.Module, image: torch.Tensor) -> tuple[torch.jit.ScriptModule, str]:
    """Return ``network`` as TorchScript and how it was made: ``"script"``, or ``"trace"`` where that fails.

    ``image`` is one input, 1×C×H×W[×D]. Either form must give the network's own output on it.

    Raises:
        LoRKDError: neither form works.
    """
    expected, reasons = _output(network, image), []
    for how in ("script", "trace"):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                module = copy.deepcopy(network).eval()
                scripted = torch.jit.script(module) if how == "script" else torch.jit.trace(module, image)
            if _differ(_output(scripted, image), expected):
                raise RuntimeError("its output differs from the network's")
            return scripted, how
        except Exception as error:  # TorchScript's errors have no common class
            reasons.append(f"{how}: {first_line(error)}")
    raise LoRKDError(
        f"{type(network).__name__} cannot be exported to TorchScript ({'; '.join(reasons)}); leave 'ts' out of formats"
    )


def _save_onnx(network: nn.Module, path: Path, image: torch.Tensor) -> None:
    if not onnx_is_installed():
        raise LoRKDError(
            "model.onnx needs the package onnx: pip install 'lorkd-monai[onnx]', or leave 'onnx' out of formats"
        )
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["pred"], "external_data": False}
    module, expected = copy.deepcopy(network).eval(), _output(network, image)
    reasons = []
    # The tracing exporter takes a fraction of a second; the newer one takes over what that one cannot express.
    for dynamo in (False, True):
        shapes: dict[str, Any] = {"dynamic_axes": {"image": {0: "batch"}, "pred": {0: "batch"}}}
        if dynamo:
            shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(module, (image,), str(path), dynamo=dynamo, verbose=False, **names, **shapes)
            if util.find_spec("onnxruntime") is not None and _differ(run_onnx(path, image), expected):
                raise RuntimeError("its output differs from the network's")
            return
        except Exception as error:  # neither exporter has one class of errors
            path.unlink(missing_ok=True)
            reasons.append(f"{'torch.export' if dynamo else 'trace'}: {str(error).strip()[:300]}")
    raise LoRKDError(
        f"{type(network).__name__} cannot be exported to ONNX ({'; '.join(reasons)}); leave 'onnx' out of formats"
    )


def run_onnx(path: str | Path, image: torch.Tensor) -> torch.Tensor:
    """Return what ONNX Runtime makes of ``image``, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


def _drop_source_paths(path: Path) -> None:
    """Leave the source paths of the exporting machine out of a TorchScript archive.

    They are there for error messages only, and hold the paths of whoever exported the network.
    """
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as plain,
    ):
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                with archive.open(entry) as source, plain.open(zipfile.ZipInfo(entry.filename), "w") as sink:
                    shutil.copyfileobj(source, sink, 2**20)


def save_formats(models: Path, network: nn.Module, image: torch.Tensor, formats: Sequence[str]) -> None:
    """Write ``network`` (in eval mode, on the CPU) into the folder ``models``: model.pt, model.safetensors, model.onnx.

    TorchScript is written by :func:`save_torchscript`.
    """
    models.mkdir(parents=True, exist_ok=True)
    weights = weights_of(network)
    torch.save(weights, models / "model.pt")
    if "safetensors" in formats:
        from safetensors.torch import save_file

        with atomic_file(models / "model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
    if "onnx" in formats:
        _save_onnx(network, models / "model.onnx", image)


def save_torchscript(
    models: Path, scripted: torch.jit.ScriptModule, metadata: Mapping[str, Any], configs: Mapping[str, Any]
) -> None:
    """Write model.ts into the folder ``models``.

    The archive carries ``metadata`` and ``configs`` (by file name without .json) as extra files, unchanged, as MONAI
    Deploy reads them; its root is the file's stem, so that it is written under its final name.
    """
    models.mkdir(parents=True, exist_ok=True)
    extra = {f"{name}.json": json.dumps(config).encode() for name, config in configs.items()}
    save_net_with_metadata(
        scripted, str(models / "model.ts"), False, meta_values=dict(metadata), more_extra_files=extra
    )
    _drop_source_paths(models / "model.ts")
