"""Teachers whose answers are kept, on disk or in memory, so that each is computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorkd_monai import __version__
from lorkd_monai.checkpoints.weights import hash_tensors, tensor_bytes
from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["CachedTeacher", "RememberedTeacher"]


class _Remembering(nn.Module):
    """A teacher that keeps answers in memory, up to a number of bytes."""

    def __init__(self, teacher: Teacher, memory: int = 2**30) -> None:
        super().__init__()
        self.teacher = teacher
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._left = memory

    def __getattr__(self, item: str) -> Any:
        try:
            return super().__getattr__(item)
        except AttributeError:
            if item in ("activation", "channels", "in_channels", "intensity", "network", "num_classes", "tasks"):
                return getattr(super().__getattr__("teacher"), item)
            raise

    def train(self, mode: bool = True) -> _Remembering:
        """Stay in evaluation mode."""
        return super().train(False)

    def has_logits(self, task: Tensor | int | Sequence[int]) -> Tensor:
        """As the teacher's."""
        return self.teacher.has_logits(task)

    def _remember(self, key: str, answer: dict[str, Tensor]) -> None:
        size = sum(t.nbytes for t in answer.values())
        if size <= self._left:
            self._left -= size
            self._memory[key] = answer


class RememberedTeacher(_Remembering):
    """A teacher that answers a batch it has seen before from memory, exactly as it did then.

    All students of a seed that train on mixed batches see the same batches: what is drawn, and how it is augmented,
    is a function of the seed. One study asks its teacher about each of them once.

    Args:
        teacher: the teacher.
        memory: most bytes of answers that are kept.
    """

    @torch.no_grad()
    def forward(self, x: Tensor, task: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """See `Teacher`; features are not kept."""
        if return_features:
            return self.teacher(x, task, return_features=True)
        digest = hashlib.sha256(tensor_bytes(x))
        digest.update(repr((tuple(x.shape), task.tolist(), torch.is_autocast_enabled(x.device.type))).encode())
        key = digest.hexdigest()
        if key in self._memory:
            return self._memory[key]["logits"].to(x.device)
        answer = self.teacher(x, task)
        self._remember(key, {"logits": answer.cpu()})
        return answer


class CachedTeacher(_Remembering):
    """A `Teacher` whose answers are kept on disk.

    An answer is filed under a hash of the teacher (its weights, layers and channels of classes), of the versions
    of MONAI and of this package, of the task's name, and of the image's own values as they reach the teacher: after all
    transforms, so that another spacing, intensity or augmentation is another image. What is given back is bit-identical
    to what the teacher gave.

    A random augmentation would never show the same image twice. ``views`` says in how many fixed ways each image is
    shown, one after the other from epoch to epoch: 1 as it is, without augmentation; with n, the image itself and
    n - 1 augmented versions of it. The trainer reads it. Teacher and student always see the very same view.

    Each answer is one file, written beside its place and moved there; a run that is killed leaves whole answers, and
    a file that can't be read counts as missing. Several processes may share a folder.

    Args:
        teacher: the teacher.
        folder: where the answers are kept; made at the first one.
        views: fixed ways in which each image is shown.
        memory: bytes of answers that are kept in memory too.

    Raises:
        LoRKDError: ``views`` below 1, or a folder that is a file.

    Example::

        >>> cached = CachedTeacher(teacher, "output/teacher_cache", views=4)
        >>> logits = cached(x, 0)           # runs the teacher
        >>> torch.equal(cached(x, 0), logits), cached.answered_from_disk == len(x)
        (True, True)
    """

    def __init__(self, teacher: Teacher, folder: str | os.PathLike, views: int = 1, memory: int = 2**30) -> None:
        super().__init__(teacher, memory)
        check_whole("cache_teacher: views", views)
        self.folder = Path(folder)
        if self.folder.is_file():
            raise LoRKDError(f"cache_teacher: {folder} is a file, expected a folder for the teacher's answers")
        self.views = views
        self.asked = self.answered_from_disk = 0
        self._mark = fingerprint(teacher)
        self.eval()

    def features_of(self, x: Tensor, task: Tensor | int | Sequence[int] = 0) -> Tensor:
        """As the teacher's; not kept."""
        return self.teacher.features_of(x, task)

    @torch.no_grad()
    def forward(
        self, x: Tensor, task: Tensor | int | Sequence[int], return_features: bool = False, shown: bool = False
    ) -> Tensor | None | tuple[Tensor | None, Tensor]:
        """What `Teacher` gives for each sample, from the cache where it is there.

        Raises:
            LoRKDError: as `Teacher`.
        """
        x = x.as_tensor() if hasattr(x, "as_tensor") else x
        tasks = self.teacher._rows(x, task)
        keys = self._keys(x, tasks, return_features, shown)
        known: list[Any] = [self._read(key) for key in keys]
        missing = [i for i, answer in enumerate(known) if answer is None]
        self.asked += len(keys)
        self.answered_from_disk += len(keys) - len(missing)
        if missing:
            rows = torch.tensor(missing, device=x.device)
            out = self.teacher(x.index_select(0, rows), [tasks[i] for i in missing], return_features, shown)
            out, features = out if return_features else (out, None)
            counts = list(self.teacher.num_classes.values())
            for place, i in enumerate(missing):
                # Past its own classes a row is all -inf: that is not worth keeping. A row without logits is all NaN.
                answer = {} if out is None else {"logits": out[place, : counts[tasks[i]]].cpu().contiguous().clone()}
                if features is not None:
                    answer["features"] = features[place].cpu().contiguous().clone()
                known[i] = answer
                self._write(keys[i], answer)
        widest = max(self.teacher.num_classes.values())
        logits = None
        if all("logits" in answer for answer in known):
            logits = torch.stack([_padded(answer["logits"], widest) for answer in known]).to(x.device)
        if not return_features:
            return logits
        return logits, torch.stack([answer["features"] for answer in known]).to(x.device)

    def _keys(self, x: Tensor, tasks: Sequence[int], features: bool, shown: bool) -> list[str]:
        device = x.device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        about = [self._mark, str(x.dtype), list(x.shape[1:]), features, autocast, *(["shown"] if shown else [])]
        rows = x.detach().cpu()
        return [
            hashlib.sha256(json.dumps([*about, self.teacher.tasks[task]]).encode() + tensor_bytes(row)).hexdigest()
            for row, task in zip(rows, tasks, strict=True)
        ]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        if key in self._memory:
            return self._memory[key]
        try:
            answer = safetensors.torch.load_file(self._path(key))
        except (OSError, safetensors.SafetensorError):
            return None  # not there, or cut off by a full disk: the teacher is asked again and the file replaced
        self._remember(key, answer)
        return answer

    def _write(self, key: str, answer: dict[str, Tensor]) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(answer, temporary)
        self._remember(key, answer)


def fingerprint(teacher: Teacher) -> str:
    """SHA-256 of all that a teacher's answers depend on, but the image."""
    about = [
        __version__, monai.__version__, str(teacher), teacher.num_classes, teacher.activation, teacher.in_channels,
        {t: None if c is None else [list(e) if isinstance(e, tuple) else e for e in c]
         for t, c in teacher.channels.items()},
        getattr(teacher, "identity", None), str(teacher.intensity),
    ]  # fmt: skip
    return hash_tensors(about, teacher.state_dict())


def _padded(logits: Tensor, channels: int) -> Tensor:
    empty = float("nan") if logits.isnan().all() else float("-inf")
    return torch.nn.functional.pad(logits, [0] * (2 * logits.ndim - 1) + [channels - len(logits)], value=empty)
