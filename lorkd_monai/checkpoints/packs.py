"""Expert packs: the shared weights in one file, each task's expert in a small one of its own.

``shared.safetensors`` holds the backbone's weights W0 and, in its header, how the decomposition is built;
``expert_<task>.safetensors`` holds one task's factors, head and norms. Every file carries the fingerprint of the
shared weights that it belongs to, so that an expert is never put on another backbone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorkd_monai.checkpoints.weights import check_backbone, hash_tensors
from lorkd_monai.checks import is_file_name
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.experts.nested import cut_expert_state, exchange_expert
from lorkd_monai.files import atomic_file
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.spec import SPEC_KEY, cut_rank, cut_ranks, misfits

__all__ = ["PackedExpert", "fingerprint", "load_expert", "load_pack", "read_expert", "save_expert", "save_pack"]

SHARED = "shared.safetensors"
_FORM = "lorkd-pack-1"


def shared_state_dict(net: LoRKDNet) -> dict[str, Tensor]:
    """What all tasks share: the state dict without experts, heads and task norms."""
    own = {id(tensor) for task in range(len(net.tasks)) for tensor in net.expert_tensors(task).values()}
    return {k: v for k, v in net.state_dict(keep_vars=True).items() if k != SPEC_KEY and id(v) not in own}


def fingerprint(net: LoRKDNet) -> str:
    """A SHA-256 of the shared weights and of how experts are built on them; it does not depend on the tasks."""
    construction = {k: v for k, v in net.spec().items() if k not in ("tasks", "rank", "info", "nested")}
    return hash_tensors(construction, shared_state_dict(net))


def expert_file(task: str) -> str:
    """Name of a task's file.

    Raises:
        LoRKDError: the task's name has other characters than letters, digits, ``_`` and ``-``.
    """
    if not is_file_name(task):
        raise LoRKDError(f"task {task!r} can't name a file: expected letters, digits, '_' and '-'")
    return f"expert_{task}.safetensors"


def save_pack(net: LoRKDNet, folder: str | os.PathLike, rank: int | Mapping[str, int] | None = None) -> list[Path]:
    """Write the shared weights and every expert of a decomposition; files of the same names are replaced.

    Args:
        net: the decomposition.
        folder: where the files go.
        rank: cut nested experts to at most this rank, one for all or by task, which makes their files smaller.

    Returns:
        The files, the shared one first.

    Raises:
        LoRKDError: a task whose name can't be a file's, or experts that can't be cut.
    """
    folder = Path(folder)
    for task in net.tasks:
        expert_file(task)  # a bad name is refused before anything is written
    spec = net.spec()
    cut = cut_ranks(net, rank) if rank is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(net)
    header = {"form": _FORM, "fingerprint": mark, "spec": json.dumps(spec)}
    written = [_write(folder / SHARED, shared_state_dict(net), header)]
    for index, task in enumerate(net.tasks):
        written.append(_write_expert(net, task, folder, cut.get(index, spec["rank"][task]), mark))
    return written


def save_expert(net: LoRKDNet, task: str, folder: str | os.PathLike, rank: int | None = None) -> Path:
    """Write one task's expert into the folder of a pack; with ``rank``, a nested one cut to at most that.

    Raises:
        LoRKDError: unknown task, an expert that can't be cut, a folder whose shared weights are not those of ``net``.
    """
    name = net.tasks[net.task_index(task)]
    rank = net.spec()["rank"][name] if rank is None else cut_rank(net, name, rank)
    mark = fingerprint(net)
    header, _ = _read(Path(folder) / SHARED)
    _check_fingerprint(header, mark, f"the pack {folder}")
    return _write_expert(net, name, Path(folder), rank, mark)


def load_pack(
    folder: str | os.PathLike, tasks: Sequence[str] | None = None, backbone: nn.Module | Mapping | None = None
) -> LoRKDNet:
    """Build a decomposition from its pack.

    Args:
        folder: where the files are.
        tasks: which experts, in this order; None: all whose files are there, the pack's own order first.
        backbone: needed if the pack was made from a network object, or from a network that is not MONAI's.

    Raises:
        LoRKDError: a file that is missing, truncated, or of another decomposition.
    """
    folder = Path(folder)
    header, state = _read(folder / SHARED)
    try:
        spec = json.loads(header["spec"])
        known = list(spec["tasks"])
    except (KeyError, TypeError, ValueError) as e:
        raise LoRKDError(f"{folder / SHARED} does not say how its decomposition is built ({type(e).__name__})") from e
    if backbone is None:
        check_backbone(spec, str(folder))
    if tasks is None:
        there = sorted(p.name[len("expert_") : -len(".safetensors")] for p in folder.glob("expert_*.safetensors"))
        tasks = [t for t in known if t in there] + [t for t in there if t not in known]
    if not tasks:
        raise LoRKDError(f"{folder} holds no expert: expected files expert_<task>.safetensors next to {SHARED}")
    experts = {task: _read(folder / expert_file(task)) for task in tasks}
    for task, (own, _) in experts.items():
        if own.get("task") != task:
            raise LoRKDError(f"{folder / expert_file(task)} holds the expert of task {own.get('task')!r}, not {task!r}")
        _check_fingerprint(own, header["fingerprint"], f"the expert of task {task!r}")
    spec["tasks"] = {task: int(own["num_classes"]) for task, (own, _) in experts.items()}
    spec["rank"] = {task: int(own["rank"]) for task, (own, _) in experts.items()}
    if spec["info"].get("tasks"):
        described = {task: json.loads(own["info"]) for task, (own, _) in experts.items()}
        spec["info"]["tasks"] = {
            t: {**fields, "index": i} for i, (t, fields) in enumerate(described.items()) if fields is not None
        }
    net = LoRKDNet.from_spec(spec, backbone)
    shared = shared_state_dict(net)
    problems = misfits(shared, state)
    if problems:
        raise LoRKDError(f"{folder / SHARED}, or the backbone, was changed: they do not fit: {'; '.join(problems)}")
    with torch.no_grad():
        for key, tensor in shared.items():
            tensor.copy_(state[key])
    for task, (_, tensors) in experts.items():
        net.load_expert_state_dict(task, tensors)
    if backbone is None and fingerprint(net) != header["fingerprint"]:
        raise LoRKDError(f"{folder / SHARED} does not have the weights that its fingerprint names: it was changed")
    return net.eval()


@dataclass(frozen=True)
class PackedExpert:
    """An expert read from its file: checked to belong to a decomposition, not yet part of it."""

    file: Path
    task: str
    num_classes: int
    rank: int
    info: dict[str, Any] | None
    state: dict[str, Tensor]

    def put_into(self, net: LoRKDNet) -> None:
        """Replace the expert of its task, or add the task.

        Raises:
            LoRKDError: it does not fit; ``net`` is then unchanged.
        """
        try:
            if self.task in net.tasks:
                exchange_expert(net, self.task, self.state, self.rank)
                return
            net.add_task(self.task, self.num_classes, self.rank)
            try:
                net.load_expert_state_dict(self.task, self.state)
            except LoRKDError:
                net.remove_task(self.task)
                raise
        except LoRKDError as e:
            raise LoRKDError(f"{self.file}: {e}") from e
        if self.info is not None and "tasks" in net.info:
            net.info["tasks"][self.task] = {**self.info, "index": net.task_index(self.task)}


def read_expert(net: LoRKDNet, file: str | os.PathLike) -> PackedExpert:
    """Read an expert's file and check that it belongs to a decomposition, which is not changed.

    Raises:
        LoRKDError: the file is truncated, is not an expert, or belongs to another backbone.
    """
    path = Path(file)
    header, state = _read(path)
    if "task" not in header:
        raise LoRKDError(f"{file} holds the shared weights of a pack, no expert: expected an expert_<task>.safetensors")
    _check_fingerprint(header, fingerprint(net), str(file))
    numbers = int(header["num_classes"]), int(header["rank"])
    return PackedExpert(path, header["task"], *numbers, json.loads(header["info"]), state)


def load_expert(net: LoRKDNet, file: str | os.PathLike) -> str:
    """Load the expert of a pack's file into a decomposition: it replaces that of its task, or adds the task.

    Its rank may differ from that of the expert it replaces. ``net`` must not be called meanwhile; while it serves, use
    :meth:`ExpertPool.exchange <lorkd_monai.serving.pool.ExpertPool.exchange>` and ``add``.

    Returns:
        The name of the task.

    Raises:
        LoRKDError: the file is truncated, belongs to another backbone, or does not fit; ``net`` is then unchanged.
    """
    expert = read_expert(net, file)
    expert.put_into(net)
    return expert.task


def _write_expert(net: LoRKDNet, task: str, folder: Path, rank: int, mark: str) -> Path:
    whole = rank == net.spec()["rank"][task]
    header = {
        "form": _FORM,
        "fingerprint": mark,
        "task": task,
        "num_classes": str(net.num_classes[task]),
        "rank": str(rank),
        "info": json.dumps(net.info.get("tasks", {}).get(task)),
    }
    state = net.expert_state_dict(task) if whole else cut_expert_state(net, task, rank)
    return _write(folder / expert_file(task), state, header)


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(plain, temporary, metadata=dict(header))
    return path


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file of a pack."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise LoRKDError(f"{path} is not a complete file of an expert pack: {first_line(e)}") from e
    if header.get("form") != _FORM:
        raise LoRKDError(f"{path} is not a file of an expert pack: expected one that save_pack wrote")
    return header, state


def _check_fingerprint(header: Mapping[str, str], expected: str, what: str) -> None:
    if header["fingerprint"] != expected:
        raise LoRKDError(
            f"{what} belongs to other shared weights (fingerprint {header['fingerprint'][:12]}…, expected "
            f"{expected[:12]}…): an expert only works on the backbone that it was trained with"
        )
