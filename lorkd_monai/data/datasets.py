"""The data set of many tasks: each task's preprocessing done once, kept as plain tensors."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Compose, Lambda, RandCropByPosNegLabeld, SpatialPadd
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from lorkd_monai import __version__
from lorkd_monai.data.datalist import DataList
from lorkd_monai.data.identity import file_stamps
from lorkd_monai.data.samplers import Draw
from lorkd_monai.errors import LoRKDError, find_lorkd_error
from lorkd_monai.losses.task import UNLABELLED
from lorkd_monai.tasks import TaskSpec, image_sides
from lorkd_monai.transforms.dicom import compiled
from lorkd_monai.transforms.gate import odd
from lorkd_monai.transforms.loading import ItemLoader, drop_alpha
from lorkd_monai.transforms.preprocessing import default_intensity, full_depth, preprocessing

__all__ = ["TaskDataset"]

_CENTRES = 4096  # crop centres that are kept for each class of a volume
_CHUNK = 256  # arrays that are preprocessed together


class TaskDataset(Dataset):
    """Preprocessed images of one split of a data list, all tasks together.

    An item is a dict of plain tensors: ``"image"`` float32 C×H×W[×D], ``"label"`` int64 (a number, or a mask
    1×H×W[×D]; -1, or a mask of -1, where the image has no label), ``"task"`` int64 number, and for segmentation
    ``"spacing"`` (mm or input pixels per voxel, after preprocessing). Items have the same values as the stock configs
    of `lorkd_monai.transforms.preprocessing` give; arrays of ``.npz`` files go through them many at a time.

    Preprocessing runs once, when the data set is made. Results stay in memory up to ``cache_bytes``; items beyond that
    are read from ``cache_dir`` (filled at first use), or preprocessed at each use.

    Args:
        data: the data list.
        split: ``"training"``, ``"validation"`` or ``"test"``.
        in_channels: channels of the network's input.
        image_size: see `preprocessing`.
        patch_size: for 3D segmentation, cut a random patch of this size (voxels per side, or one number for each
            axis) from each volume; half of them are centred on foreground, with each class as often. None gives
            whole volumes.
        cache_bytes: most memory of the cached items.
        cache_dir: folder of MONAI's `PersistentDataset` for those that do not fit, and to start faster next time.
        progress: show a progress bar on a terminal.

    Raises:
        LoRKDError: naming an image that cannot be read, or a mask with a value that is no class of its task.

    Example::

        data = load_data_list("data", "segmentation", 3)
        train = TaskDataset(data, "training", in_channels=1, image_size=96, patch_size=96)
        loader = DataLoader(train, batch_size=2, sampler=TaskSampler(train.task_of_item))
    """

    def __init__(
        self,
        data: DataList,
        split: str,
        in_channels: int,
        image_size: int | list[int],
        patch_size: int | list[int] | None = None,
        cache_bytes: int = 4 * 2**30,
        cache_dir: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> None:
        if patch_size is not None and (data.kind, data.spatial_dims) != ("segmentation", 3):
            raise LoRKDError(f"patch_size is for 3D segmentation, got it for {data.spatial_dims}D {data.kind}.")
        self.data, self.in_channels, self.image_size = data, in_channels, image_size
        self.items = data.split(split)
        self.task_of_item = [data.tasks[item["task"]].index for item in self.items]
        for task in data.tasks.values():
            to_grey = data.spatial_dims == 2 and in_channels == 1 and task.channels == 3
            if task.channels not in (None, 1, in_channels) and not to_grey:
                raise LoRKDError(
                    f"task {task.name!r} has images of {task.channels} channels, the network takes {in_channels}; "
                    "set in_channels to fit."
                )
        keys = ("image", "label") if data.kind == "segmentation" else ("image",)
        self._configs = {name: self._steps(name, keys) for name in data.tasks}
        self._loaders = {name: self._loader(name, configs) for name, configs in self._configs.items()}
        unlabelled = {item["task"] for item in self.items if item["label"] is None}
        self._without_mask = {name: self._loader(name, self._steps(name)) for name in unlabelled}
        self._pad = self._crop = None
        if patch_size is not None:
            size = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
            self._pad = SpatialPadd(keys, spatial_size=size, allow_missing_keys=True)
            self._crop = RandCropByPosNegLabeld(
                (*keys, "seen"), "label", size, fg_indices_key="foreground", bg_indices_key="background",
                allow_missing_keys=True,
            )  # fmt: skip
        self._disk = None if cache_dir is None else self._on_disk(Path(cache_dir), size if self._crop else None)
        self._cache: dict[int, dict[str, torch.Tensor]] = {}
        self._seen_by: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._seen: dict[int, torch.Tensor] = {}
        self._fill(cache_bytes, progress, split)

    @property
    def task_of_labelled(self) -> list[int]:
        """As ``task_of_item``, with -1 for the items without a label: a `TaskSampler` then never draws these."""
        return [
            UNLABELLED if item["label"] is None else task
            for item, task in zip(self.items, self.task_of_item, strict=True)
        ]

    def only(self, data: DataList, indices: Sequence[int]) -> TaskDataset:
        """A data set of some of these items, which shares what is in memory.

        Args:
            data: the data list with these items, and the same tasks.
            indices: of the items, in their order.
        """
        part = copy.copy(self)
        part.data, part.items = data, [self.items[i] for i in indices]
        part.task_of_item = [self.task_of_item[i] for i in indices]
        part._cache = {new: self._cache[i] for new, i in enumerate(indices) if i in self._cache}
        part._seen = {new: self._seen[i] for new, i in enumerate(indices) if i in self._seen}
        part._disk = None if self._disk is None else Subset(self._disk, indices)
        return part

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: int | Draw) -> dict[str, torch.Tensor]:
        index, seed = draw if isinstance(draw, tuple) else (draw, draw)
        item = self._cache.get(index)
        item = self._load(index) if item is None else item
        if self._seen_by is not None:
            seen = self._seen.get(index)
            item = {**item, "seen": self._see(index) if seen is None else seen}
        if self._crop is not None:
            self._crop.set_random_state(seed)
            item = self._crop(item)[0]
            item = {key: _plain(value) for key, value in item.items() if key not in ("foreground", "background")}
        image = item["image"]
        result = {**item, "image": image.expand(self.in_channels, *image.shape[1:]), "label": item["label"].long()}
        result["task"] = torch.tensor(self.task_of_item[index])
        return result

    def _steps(self, name: str, keys: Sequence[str] = ("image",)) -> list[dict[str, Any]]:
        data = self.data
        return preprocessing(data.tasks[name], data.kind, data.spatial_dims, self.in_channels, self.image_size, keys)

    def _loader(self, name: str, configs: list[dict[str, Any]]) -> ItemLoader:
        return ItemLoader(configs, self.data.spatial_dims, self.data.tasks[name].channels, self._array_name(name))

    def _array_name(self, name: str) -> str:
        return f"an image of {self.data.npz.get(name, 'the arrays')} (task {name!r})"

    def show_to(self, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Give each volume as ``"seen"`` too: as a teacher sees it, in the voxels and the axes of ``"image"``.

        Its values come from its file, with nothing cut off, and its mean and the like are those of the whole volume.
        2D images have all their values in ``"image"`` already: nothing is done for these.

        Args:
            made: makes what the teacher sees of the data's values C×H×W×D.
        """
        if self.data.spatial_dims == 2:
            return
        self._seen_by, self._values = made, {}
        for name in self.data.tasks:
            configs = self._steps(name)
            scaling = next(i for i, c in enumerate(configs) if c["_target_"].startswith("ScaleIntensityRange"))
            # All but the scaling and the step after it, which checks the result of the scaling.
            self._values[name] = self._loader(name, configs[:scaling] + configs[scaling + 2 :])
        bar = tqdm(list(self._cache), desc="preparing what the teacher sees", disable=None, leave=False)
        self._seen = {index: self._see(index) for index in bar}

    def _see(self, index: int) -> torch.Tensor:
        item = self.items[index]
        values = _plain(self._values[item["task"]]({"image": item["image"]})["image"])
        seen = self._seen_by(values)  # type: ignore[misc]  # only called where there is one
        return seen if self._pad is None else _plain(self._pad({"image": seen})["image"])

    def _fill(self, cache_bytes: int, progress: bool, split: str) -> None:
        bar = tqdm(total=len(self), desc=f"preparing {split} images", disable=None if progress else True, leave=False)
        left = cache_bytes
        with bar, _named_together(split), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), _CHUNK):
                for index, item in self._prepared(range(start, min(start + _CHUNK, len(self))), pool):
                    left -= sum(value.nbytes for value in item.values())
                    if left < 0:
                        return
                    self._cache[index] = item
                    bar.update()

    def _prepared(self, indices: range, pool: ThreadPoolExecutor) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yield the indices and their items: small images of one size together, the others one by one."""
        single: list[int] = []
        groups: dict[tuple, list[tuple[int, np.ndarray]]] = {}
        for index, array in zip(indices, pool.map(self._small_array, indices), strict=True):
            if array is None:
                single.append(index)
            else:
                groups.setdefault((self.items[index]["task"], array.shape), []).append((index, array))
        for (name, _), members in groups.items():
            images = self._preprocess_arrays([array for _, array in members], self.data.tasks[name])
            self._look(images, [self.items[index]["image"] for index, _ in members], name)
            for (index, _), image in zip(members, images, strict=True):
                yield index, {"image": _compact(image), "label": _class_tensor(self.items[index])}
        for start in range(0, len(single), 8):  # few at a time: where the memory is full, no more are prepared
            few = single[start : start + 8]
            yield from zip(few, pool.map(self._load, few), strict=True)

    def _look(self, images: torch.Tensor, sources: list[Any], task: str) -> None:
        """Warn of images that are odd after scaling, as the step of the configs does."""
        limits = default_intensity(self.data.tasks[task], self.data.spatial_dims)["range"]
        find, flat = compiled(f"$lambda low, high, mean: {odd(limits)}"), images.flatten(1)
        facts = zip(flat.amin(1).tolist(), flat.amax(1).tolist(), flat.mean(1).tolist(), sources, strict=True)
        for low, high, mean, source in facts:
            words = find(low, high, mean)
            if words:
                name = source if isinstance(source, str) else self._array_name(task)
                warnings.warn(f"look at {name}: {words}", stacklevel=2)

    def _small_array(self, index: int) -> np.ndarray | None:
        """Return an image to classify as an array if it needs nothing that differs from image to image, else None."""
        item, dims = self.items[index], self.data.spatial_dims
        image = item["image"]
        if self.data.kind != "classification" or "range" not in default_intensity(self.data.tasks[item["task"]], dims):
            return None
        size = image_sides(self.image_size, dims)
        if isinstance(image, str) and dims == 2:
            image = self._loaders[item["task"]].read_small(image, size)
        full = full_depth(self.data.tasks[item["task"]], dims)
        if not isinstance(image, np.ndarray) or (full and full != {"u1": 255, "u2": 65535}.get(image.dtype.str[1:])):
            return None
        return image if all(n <= most for n, most in zip(image.shape, size, strict=False)) else None

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        if self._disk is None:
            return self._prepare(self.items[index])
        try:
            return self._disk[index]
        except RuntimeError as error:  # MONAI wraps what a transform raises
            raise find_lorkd_error(error) or error from error

    def _prepare(self, item: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return one item after its deterministic transforms, as plain tensors in as few bytes as they need."""
        task = self.data.tasks[item["task"]]
        if item["label"] is None:
            loaded = self._without_mask[task.name]({"image": item["image"]})
        else:
            loaded = self._loaders[task.name]({"image": item["image"], "label": item["label"]})
        image = loaded["image"]
        if image.shape[0] != self.in_channels:
            raise LoRKDError(
                f"{item['image']} has {image.shape[0]} channels after preprocessing, "
                f"the network takes {self.in_channels}."
            )
        if self.data.kind == "classification":
            return {"image": _compact(image), "label": _class_tensor(item)}
        spacing = torch.as_tensor(np.asarray(image.pixdim), dtype=torch.float32)
        if self._pad is not None:
            loaded = self._pad(loaded)
        if item["label"] is None:  # made after the padding, which would put background around it
            mask = torch.full((1, *loaded["image"].shape[1:]), UNLABELLED, dtype=torch.int8)
        else:
            mask = _plain(loaded["label"]).to(torch.uint8)
        result = {"image": _compact(loaded["image"]), "label": mask, "spacing": spacing}
        if self._crop is not None:
            result["foreground"], result["background"] = _crop_centres(mask)
        return result

    def _preprocess_arrays(self, arrays: list[np.ndarray], task: TaskSpec) -> torch.Tensor:
        """Do what the stock transforms do, for arrays of one task together. Returns N×C×…, C = 1 for grey.

        The stock transforms take one image at a time, which takes 15 to 20 times as long; the values are bit-identical.
        """
        dims = self.data.spatial_dims
        stacked = np.stack(arrays)
        stacked = drop_alpha(stacked, task.channels) if dims == 2 and stacked.ndim == 4 else stacked
        images = torch.from_numpy(stacked.astype(np.float32))
        if not torch.isfinite(images).all():
            raise LoRKDError(f"task {task.name!r}: its arrays hold values that are not finite (NaN or infinity).")
        images = images.movedim(-1, 1) if images.ndim == dims + 2 else images.unsqueeze(1)
        if dims == 2 and self.in_channels == 1 and images.shape[1] == 3:
            images = (images * images.new_tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
        if images.shape[1] not in (1, self.in_channels):
            raise LoRKDError(
                f"task {task.name!r}: its images have {images.shape[1]} channels, the network takes {self.in_channels}."
            )
        low, high = map(float, default_intensity(task, dims)["range"])
        images = ((images - low) / (high - low)).clip(0, 1)
        size = image_sides(self.image_size, dims)
        if images.shape[2:] != size:
            images = interpolate(images, size, mode="bilinear" if dims == 2 else "trilinear", align_corners=False)
        return images.contiguous()

    def _on_disk(self, folder: Path, patch: list[int] | None) -> PersistentDataset:
        rows = []
        for item in self.items:
            # The key of a stored result: everything that it is made from, and what makes it.
            made_from = [
                file_stamps([item["image"], item["label"]]),
                self._configs[item["task"]],
                patch,
                self.data.tasks[item["task"]].num_classes,
                [__version__, monai.__version__],
            ]
            rows.append({**item, "made_from": json.dumps(made_from)})
        folder.mkdir(parents=True, exist_ok=True)
        # A MONAI transform: `PersistentDataset` takes other callables for random and stores nothing of theirs.
        return PersistentDataset(rows, Compose([Lambda(self._prepare, track_meta=False)]), cache_dir=folder)


@contextmanager
def _named_together(split: str) -> Iterator[None]:
    """Give one warning for each thing that is odd about the images, with the first of them and their number."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found: dict[str, list[str]] = {}
    seen: dict = {}
    for warning in caught:
        name, colon, words = str(warning.message).removeprefix("look at ").partition(": ")
        if str(warning.message).startswith("look at ") and colon:
            found.setdefault(words, []).append(name)
        elif not str(warning.message).startswith("Divide by zero"):  # of percentiles: the next step fixes it
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, registry=seen)
    for words, names in found.items():
        more = f" ({len(names)} images of {split})" if len(names) > 1 else ""
        warnings.warn(f"look at {min(names)}{more}: {words}", stacklevel=2)


def _class_tensor(item: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(UNLABELLED if item["label"] is None else item["label"])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def _compact(image: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor, of one channel where all are the same: `__getitem__` repeats it again."""
    image = _plain(image)
    grey = image.shape[0] > 1 and all(torch.equal(image[0], channel) for channel in image[1:])
    return (image[:1] if grey else image).clone(memory_format=torch.contiguous_format)


def _crop_centres(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return flat positions of foreground (as many of each class) and background, a bounded number of them.

    Where there is no label, both are drawn from everywhere.
    """
    flat = mask.flatten()
    generator = torch.Generator().manual_seed(0)
    if flat[0] == UNLABELLED:
        anywhere = torch.randint(len(flat), (_CENTRES,), generator=generator)
        return anywhere, anywhere
    chosen = {}
    for value in flat.unique().tolist():
        positions = torch.nonzero(flat == value).flatten()
        keep = torch.randint(len(positions), (_CENTRES,), generator=generator)
        chosen[value] = positions if value == 0 and len(positions) <= _CENTRES else positions[keep]
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([chosen[v] for v in chosen if v] or [empty]), chosen.get(0, empty)
