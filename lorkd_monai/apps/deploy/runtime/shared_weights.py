"""All experts of an application in the memory of one: networks of one architecture share one set of tensors.

Every expert has its own network object, built from its own bundle, but tensors of the same name, shape and
architecture are one tensor for all of them (a head with another number of classes is its own). `ExpertPool.use`
copies one expert's weights there from its file: the result is the expert's own network, bit for bit.
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import nn

__all__ = ["Expert", "ExpertError", "ExpertPool"]


class ExpertError(ValueError):
    """An expert's bundle that cannot be used, or an image that it cannot take."""


class Expert:
    """One expert bundle: its metadata, its transforms, its network without weights of its own.

    Its configs/inference.json is run as MONAI runs it: use only bundles that you would also run by themselves.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.name, self.device = folder, folder.name, device
        try:
            self.metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
            config = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
            formats = self.metadata["network_data_format"]
            self.spatial_dims = len(formats["inputs"]["image"]["spatial_shape"])
            channels = formats["outputs"]["pred"]["channel_def"]
            self.classes = {int(i): str(text).strip() for i, text in channels.items()}
            self.kind = formats["outputs"]["pred"]["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExpertError(f"{folder} is no expert bundle: {error!r}") from error
        self.is_segmentation = self.kind == "segmentation"
        # Images come from memory and masks go on from there: what loads and what saves is left out.
        self._config = {"device": str(device), "inferer": config["inferer"], "network_def": config["network_def"]}
        for key, left_out in (("preprocessing", "LoadImage"), ("postprocessing", "SaveImage")):
            steps = [step for step in config[key]["transforms"] if left_out not in _target(step)]
            self._config[key] = {**config[key], "transforms": steps}
        self.loading = {
            **config["preprocessing"],
            "transforms": [s for s in config["preprocessing"]["transforms"] if "LoadImage" in _target(s)],
        }
        self._parser = ConfigParser(dict(self._config))
        self.network: nn.Module | None = None

    @property
    def architecture(self) -> str:
        """The class of the network: tensors are shared within one."""
        return str(self._config["network_def"]["_target_"])

    @property
    def weights(self) -> Path:
        return self.folder / "models" / "model.pt"

    def build(self) -> nn.Module:
        return self._parser.get_parsed_content("network_def").eval()

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The weights, mapped from the file where it allows that, so that they take no memory of their own."""
        try:
            return torch.load(self.weights, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
            raise ExpertError(f"{self.weights} is no state_dict that can be read safely: {error}") from error

    def load(self, path: str | Path) -> MetaTensor:
        """Read an image file as the bundle itself does."""
        try:
            return ConfigParser({"loading": self.loading}).get_parsed_content("loading")({"image": str(path)})["image"]
        except Exception as error:  # readers raise what they like
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            words = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise ExpertError(_refusal(error) or f"{self.name} cannot read {path}: {words}") from error

    def load_dicom(self, path: str | Path) -> MetaTensor:
        """Read a DICOM file of one picture as the bundle itself does."""
        if "pydicom" not in str(self.loading):
            raise ExpertError(f"{self.name} is of an earlier version, which reads no DICOM pictures; export it again")
        return self.load(path)

    def predict(self, network: nn.Module, image: MetaTensor) -> torch.Tensor:
        """Return the class index of every voxel (uint8, the image's own grid), or the classes' probabilities.

        ``image`` is what `load` gives: an array with its affine and ``original_channel_dim``.

        Raises:
            ExpertError: the expert's preprocessing refuses the image.
        """
        try:
            item = self._parser.get_parsed_content("preprocessing")({"image": image})
        except RuntimeError as error:  # MONAI wraps what a transform raises
            words = _refusal(error)
            if words is None:
                raise
            raise ExpertError(words) from error
        inferer = self._parser.get_parsed_content("inferer")
        with torch.no_grad():
            output = inferer(item["image"][None].to(self.device), network)
        item["pred"] = output[0].cpu()
        answer = self._parser.get_parsed_content("postprocessing")(item)["pred"]
        answer = answer.as_tensor() if isinstance(answer, MetaTensor) else torch.as_tensor(answer)
        return answer[0] if self.is_segmentation else answer.flatten()


def _refusal(error: BaseException) -> str | None:
    """What the expert's preprocessing said of an image, from an error that it led to."""
    found = re.search("ValueError: refused: (.*)", "".join(traceback.format_exception(error)))
    return None if found is None else found[1]


def _target(step: Any) -> str:
    return str(step.get("_target_", "")) if isinstance(step, dict) else str(step)


class ExpertPool:
    """The experts of a folder, one bundle a subfolder.

    Args:
        folder: holds one folder for each expert.
        device: where the networks run; the first GPU, or else the CPU, by default.

    Example::

        pool = ExpertPool("app/models")
        with pool.use("spleen_segmentation") as (expert, network):
            mask = expert.predict(network, expert.load("scan.nii.gz"))
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        folder = Path(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = sorted(path.parent.parent for path in folder.glob("*/configs/metadata.json"))
        if not found:
            raise ExpertError(f"there is no expert bundle in {folder}; expected one folder for each expert")
        self.experts = {path.name: Expert(path, self.device) for path in found}
        self._shared: dict[tuple[Any, ...], torch.Tensor] = {}
        self._active: dict[tuple[Any, ...], str] = {}
        self._lock = threading.RLock()

    def _network(self, expert: Expert) -> nn.Module:
        """The expert's network; its tensors are those of the architecture, where there are some already."""
        if expert.network is not None:
            return expert.network
        network = expert.build()
        tensors = {}
        for name, value in network.state_dict(keep_vars=True).items():
            key = (expert.architecture, name, tuple(value.shape), value.dtype)
            if key not in self._shared:
                self._shared[key] = value.detach().to(self.device)
            shared = self._shared[key]
            tensors[name] = nn.Parameter(shared, requires_grad=False) if isinstance(value, nn.Parameter) else shared
        network.load_state_dict(tensors, assign=True)
        expert.network = network.to(self.device).eval()
        return expert.network

    @contextmanager
    def use(self, name: str) -> Iterator[tuple[Expert, nn.Module]]:
        """Give an expert and its network with its weights; no other expert runs until the block ends.

        Raises:
            ExpertError: no such expert, or weights that do not fit its network.
        """
        if name not in self.experts:
            raise ExpertError(f"there is no expert {name!r}; there are {', '.join(self.experts)}")
        expert = self.experts[name]
        with self._lock:
            network = self._network(expert)
            own = network.state_dict()
            keys = {key: (expert.architecture, key, tuple(value.shape), value.dtype) for key, value in own.items()}
            if any(self._active.get(key) != name for key in keys.values()):
                weights = expert.read_weights()
                problems = sorted(set(own) ^ set(weights)) or [
                    key for key in own if own[key].shape != weights[key].shape or own[key].dtype != weights[key].dtype
                ]
                if problems:
                    raise ExpertError(f"{expert.weights} does not fit the network of {name}: {', '.join(problems[:5])}")
                for key, value in own.items():
                    value.copy_(weights[key])
                    self._active[keys[key]] = name
            yield expert, network

    def bytes(self) -> int:
        """The memory of all networks that were used so far."""
        return sum(value.numel() * value.element_size() for value in self._shared.values())
