"""All experts of an application in the memory of one: networks of one architecture share one set of tensors.

Every expert has its own network object, built from its own bundle. Tensors of the same architecture, name and shape
are shared (a head with another number of classes is not). `ExpertPool.use` copies one expert's weights into them from
its file: the network is bit-identical to the expert's own.
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
    """An expert's bundle cannot be used, or the expert cannot take an image."""


class Expert:
    """One expert bundle: its metadata, its transforms, and its network, whose weights `ExpertPool` loads.

    The expert's configs/inference.json is executed, as MONAI does: use only bundles that you trust.
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
            self.is_segmentation = formats["outputs"]["pred"]["format"] == "segmentation"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExpertError(f"{folder} is not an expert bundle: {error!r}") from error
        # The application loads images and saves masks itself.
        before, after = config["preprocessing"], config["postprocessing"]
        loading = [step for step in before["transforms"] if "LoadImage" in _target(step)]
        others = [step for step in before["transforms"] if step not in loading]
        answering = [step for step in after["transforms"] if "SaveImage" not in _target(step)]
        self.loading = {**before, "transforms": loading}
        self._parser = ConfigParser(
            {
                "device": str(device),
                "inferer": config["inferer"],
                "network_def": config["network_def"],
                "preprocessing": {**before, "transforms": others},
                "postprocessing": {**after, "transforms": answering},
            }
        )
        self.architecture = str(config["network_def"]["_target_"])
        self.weights = folder / "models" / "model.pt"
        self.network: nn.Module | None = None

    def build(self) -> nn.Module:
        """The network, with random weights."""
        return self._parser.get_parsed_content("network_def").eval()

    def key(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Experts share the tensors that have one key."""
        return self.architecture, name, tuple(tensor.shape), tensor.dtype

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The weights, memory-mapped from the file, so that they take no memory of their own."""
        try:
            return torch.load(self.weights, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
            raise ExpertError(f"{self.weights} is not a state_dict that can be read safely: {error}") from error

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
        """Return the class index of every voxel (uint8, on the image's own grid), or the probability of each class.

        ``image`` is as from `load`: an array with its affine and ``original_channel_dim``.

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
    """Why the expert's preprocessing refused an image, from the error that it raised; None for other errors."""
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
        """The expert's network, on the shared tensors of its architecture."""
        if expert.network is not None:
            return expert.network
        network = expert.build()
        tensors = {}
        for name, value in network.state_dict(keep_vars=True).items():
            key = expert.key(name, value)
            if key not in self._shared:
                self._shared[key] = value.detach().to(self.device)
            shared = self._shared[key]
            tensors[name] = nn.Parameter(shared, requires_grad=False) if isinstance(value, nn.Parameter) else shared
        network.load_state_dict(tensors, assign=True)
        expert.network = network.to(self.device).eval()
        return expert.network

    @contextmanager
    def use(self, name: str) -> Iterator[tuple[Expert, nn.Module]]:
        """Yield an expert and its network with its weights; no other expert runs until the block ends.

        Raises:
            ExpertError: there is no such expert, or its weights do not fit its network.
        """
        if name not in self.experts:
            raise ExpertError(f"there is no expert {name!r}; there are {', '.join(self.experts)}")
        expert = self.experts[name]
        with self._lock:
            network = self._network(expert)
            own = network.state_dict()
            keys = {key: expert.key(key, value) for key, value in own.items()}
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
        """The memory of all networks used so far, in bytes."""
        return sum(value.numel() * value.element_size() for value in self._shared.values())
