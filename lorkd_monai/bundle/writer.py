"""Writes bundles: one expert with everything that MONAI's tools want of it, or a teacher of many tasks."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorkd_monai.bundle import configs as bundle_configs
from lorkd_monai.bundle.configs import Pipeline
from lorkd_monai.bundle.formats import (
    FORMATS,
    build_network,
    onnx_is_installed,
    save_formats,
    save_torchscript,
    torchscript_of,
    weights_of,
)
from lorkd_monai.bundle.inert import check_task_name, inert_text
from lorkd_monai.bundle.metadata import build_metadata
from lorkd_monai.bundle.readme import data_license_text, readme_text
from lorkd_monai.checks import is_bundle_name
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.locks import is_abandoned, mark_in_use
from lorkd_monai.metrics.costs import measure
from lorkd_monai.tasks import Work

__all__ = [
    "KINDS",
    "bundle_folder",
    "expert_folder",
    "expert_name",
    "refuse_foreign",
    "write_expert_bundle",
    "write_teacher_bundle",
]

KINDS = ("classification", "segmentation")
LARGE = 25 * 2**20
_NO_ADDRESS = "not uploaded yet: write the file's https:// address here"
_log = logging.getLogger(__name__)


def expert_name(task_name: str, kind: str) -> str:
    """Return the folder name of a task's expert bundle, ``<task>_<kind>``; MONAI Label reads the kind from it.

    Raises:
        LoRKDError: the task name cannot be part of a folder name, or the kind is unknown.
    """
    if kind not in KINDS:
        raise LoRKDError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return f"{check_task_name(task_name)}_{kind}"


def expert_folder(folder: str | os.PathLike, task_name: str, kind: str, spatial_dims: int) -> Path:
    """Where in ``folder`` the expert of a task goes: ``<task>_<kind>``, if need be ``<task>_2d_<kind>`` or ``…_3d_…``.

    The longer name is taken where the shorter one belongs to another expert, such as the 3D one of the same task.

    Raises:
        LoRKDError: other experts have both names, or see `expert_name`.
    """
    names = [expert_name(name, kind) for name in (task_name, f"{task_name}_{spatial_dims}d")]
    for name in names:
        if not _is_another_expert(Path(folder) / name, task_name, spatial_dims):
            return Path(folder) / name
    raise LoRKDError(
        f"{folder} already holds other experts of the names {' and '.join(names)}: name another folder for the "
        f"{spatial_dims}D expert of task {task_name!r}"
    )


def _is_another_expert(folder: Path, task_name: str, spatial_dims: int) -> bool:
    try:
        metadata = read_json(folder / "configs" / "metadata.json")
        dims = len(metadata["network_data_format"]["inputs"]["image"]["spatial_shape"])
    except (LoRKDError, KeyError, TypeError):
        return False  # no expert, or none that can be read: what may be replaced is decided elsewhere
    _, colon, name = str(metadata.get("task")).rpartition(": ")
    return dims != spatial_dims or bool(colon and name != task_name)


def _dump(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_stale(folder: Path) -> None:
    """Delete what exports of this folder left behind whose process is gone, and put back what one had set aside."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(export|replaced)-(\d+-[0-9a-f]+)")
    for path in folder.parent.glob(f".{folder.name}.*-*"):
        match = pattern.fullmatch(path.name)
        if match is None or not path.is_dir() or not is_abandoned(_export(folder, match[2])):
            continue
        if match[1] == "replaced" and not folder.exists():
            os.replace(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _export(folder: Path, token: str) -> Path:
    return folder.with_name(f".{folder.name}.export-{token}")


def refuse_foreign(folder: str | Path, mark: str = "configs/metadata.json") -> None:
    """Raise where something is at ``folder`` that may not be replaced: it is not empty, and lacks its mark."""
    folder = Path(folder)
    if folder.exists() and not (folder / mark).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise LoRKDError(f"{folder} is not replaced: it holds no {mark}, so it is something else. Name another folder")


@contextmanager
def bundle_folder(folder: str | Path, overwrite: bool = False, mark: str = "configs/metadata.json") -> Iterator[Path]:
    """Give a temporary folder next to ``folder`` to write into, and move it into place when the block has ended.

    Where the block raises, nothing of it stays and an existing ``folder`` is as it was. What a killed process left
    (``.NAME.export-PID-…``) is removed by the next export of the same folder.

    Args:
        folder: to be made.
        overwrite: replace ``folder``, provided that it holds the file ``mark``, or nothing: a folder of images that is
            named by mistake stays.
        mark: a file that tells what kind of folder it is.

    Raises:
        LoRKDError: ``folder`` exists and ``overwrite`` is not set, or it is something else.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    _refuse_existing(folder, overwrite)
    refuse_foreign(folder, mark)
    token = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = _export(folder, token)
    with mark_in_use(temporary):
        temporary.mkdir()
        try:
            yield temporary
            _refuse_existing(folder, overwrite)  # another process may have written it meanwhile
            _put_in_place(temporary, folder, folder.with_name(f".{folder.name}.replaced-{token}"))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise LoRKDError(
            f"{folder} exists already: expected a folder that is still to be made; delete it, name another, or set "
            "overwrite=True (--overwrite)"
        )


def _put_in_place(temporary: Path, folder: Path, replaced: Path) -> None:
    """Move a folder to its place; what is there is set aside first, and deleted last."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    os.replace(folder, replaced)
    try:
        os.replace(temporary, folder)
    except BaseException:
        os.replace(replaced, folder)
        raise
    if replaced.is_dir() and not replaced.is_symlink():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        replaced.unlink()


def _list_large_files(folder: Path) -> None:
    """Write large_files.yml for what is above 25 MB: the model zoo keeps such files elsewhere, by URL and hash.

    Where that is, a person says; until then `lorkd check` names it.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size > LARGE:
            digest = sha256(path.read_bytes()).hexdigest()
            name = path.relative_to(folder).as_posix()
            entries.append(f'- path: "{name}"\n  url: "{_NO_ADDRESS}"\n  hash_val: "{digest}"\n  hash_type: "sha256"\n')
    if entries:
        (folder / "large_files.yml").write_text("large_files:\n" + "".join(entries), encoding="utf-8")


def _write_common(folder: Path, metadata: dict, inference: dict, readme: str) -> None:
    (folder / "configs").mkdir()
    (folder / "docs").mkdir()
    licence = resources.files("lorkd_monai.bundle").joinpath("apache-2.0.txt").read_text(encoding="utf-8")
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
    _dump(metadata, folder / "configs" / "metadata.json")
    _dump(inference, folder / "configs" / "inference.json")
    (folder / "configs" / "logging.conf").write_text(bundle_configs.LOGGING, encoding="utf-8")
    (folder / "docs" / "README.md").write_text(readme, encoding="utf-8")


def check_formats(formats: Sequence[str] | None) -> tuple[str, ...]:
    """The file formats that will be written, in order; None means all that can be.

    Raises:
        LoRKDError: an unknown format, no ``"pt"``, or ``"onnx"`` without its package.
    """
    if formats is None:
        if onnx_is_installed():
            return FORMATS
        _log.warning("model.onnx is left out: the package onnx is not installed (pip install 'lorkd-monai[onnx]')")
        return FORMATS[:-1]
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or "pt" not in formats:
        raise LoRKDError(f"formats must hold 'pt' and any of {', '.join(FORMATS[1:])}, got {', '.join(formats)!r}")
    if "onnx" in formats and not onnx_is_installed():
        raise LoRKDError(
            "the format 'onnx' needs the package onnx: pip install 'lorkd-monai[onnx]', or leave it out of formats"
        )
    return tuple(name for name in FORMATS if name in formats)


def _check_output(network: nn.Module, rebuilt: nn.Module, image: torch.Tensor, num_classes: int) -> None:
    """The network built from its config must be the given one, and its channels those of the task."""
    training = network.training
    device = next((value.device for value in network.state_dict().values()), torch.device("cpu"))
    try:
        with torch.no_grad():
            expected = network.eval()(image.to(device))
            got = rebuilt(image)
    except RuntimeError as error:
        raise LoRKDError(f"the network does not take one input of shape {tuple(image.shape)}: {error}") from error
    finally:
        network.train(training)
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        raise LoRKDError(
            f"the network returns a {type(expected).__name__}, but MONAI's tools take networks that return one tensor, "
            "B×C×…; export a network that does"
        )
    if got.shape[1] != num_classes:
        raise LoRKDError(f"the network gives {got.shape[1]} channels, but the task has {num_classes} classes")
    scale = max(1.0, float(expected.abs().max()))
    if got.shape != expected.shape or not torch.allclose(got, expected.cpu(), rtol=0.0, atol=1e-3 * scale):
        raise LoRKDError(
            "the network built from network_config gives another output than the network itself, with the same "
            "weights: expected the config of this very network; check its arguments (activation, norm, strides)"
        )


def write_expert_bundle(
    folder: str | Path,
    *,
    network: nn.Module,
    network_config: dict,
    work: Work,
    pipeline: Pipeline | None = None,
    metrics: Mapping[str, Any] | None = None,
    parent: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    formats: Sequence[str] | None = None,
    check: bool = True,
) -> Path:
    """Write the complete MONAI bundle of one extracted expert and return its folder.

    The bundle runs where only the packages of its own metadata.json are installed. It is written next to
    ``folder``, checked, and moved into place: a killed export leaves nothing half-done.

    Args:
        folder: the bundle's own folder; its name ends in ``_classification`` or ``_segmentation``, see `expert_name`.
        network: the extracted network, a plain `nn.Module`.
        network_config: the MONAI config (``_target_`` and arguments) that builds a network of the same keys and shapes.
        work: the kind of work, the images that the network takes, and its one task.
        pipeline: what is done before and after the network; None: `lorkd_monai.bundle.configs.pipeline_of`.
        metrics: measured metrics, ``{name: number or {"value", "low", "high", "n"}}``.
        parent: facts on the decomposition, shown in the README; ``teacher`` may be a dict that also holds what
            `measure` returns; ``authors``, ``copyright``, ``data_source``, ``data_license`` go where they belong, and
            ``augmentation`` (``{"rotate": …, "flip_axes": …}``) into the fine-tuning.
        overwrite: replace an existing folder.
        formats: of ``"pt"``, ``"safetensors"``, ``"ts"``, ``"onnx"``; None writes all that is possible here and logs
            what is left out.
        check: run `lorkd_monai.bundle.check_bundle` before the folder is moved into place.

    Raises:
        LoRKDError: an argument does not fit, the folder exists, or the written bundle fails its check.
    """
    folder, metrics, parent = Path(folder).absolute(), metrics or {}, parent or {}
    task, kind = work.task, work.kind
    name = check_task_name(task.name)
    if not (is_bundle_name(folder.name) and folder.name.endswith(f"_{kind}")):
        raise LoRKDError(
            f"the folder of this bundle must be named <task>_{kind} (MONAI Label reads the kind of work from it), "
            f"such as {expert_name(name, kind)}; got {folder.name!r}"
        )
    if sorted(task.labels) != list(range(len(task.labels))):
        raise LoRKDError(f"the class ids of task {name!r} must be 0 to n-1, got {sorted(task.labels)}")
    formats = check_formats(formats)
    plain, image = _rebuilt(network, network_config, work, task.num_classes)
    scripted, how = torchscript_of(plain, image) if "ts" in formats else (None, "script")
    pipeline = pipeline or bundle_configs.pipeline_of(work)
    metadata = build_metadata(work, pipeline, network_config, metrics, parent, how)
    inference = bundle_configs.inference_config(work, pipeline, network_config)
    train = bundle_configs.train_config(work, pipeline, network_config, parent.get("augmentation"))
    measured = measure(plain, image.shape)
    readme = readme_text(metadata, folder.name, work, pipeline, metrics, parent, measured, formats)
    with bundle_folder(folder, overwrite) as temporary:
        _write_common(temporary, metadata, inference, readme)
        _dump(train, temporary / "configs" / "train.json")
        _dump(bundle_configs.evaluate_config(kind), temporary / "configs" / "evaluate.json")
        _dump(bundle_configs.multi_gpu_config(network_config), temporary / "configs" / "multi_gpu_train.json")
        (temporary / "docs" / "data_license.txt").write_text(data_license_text(task, parent), encoding="utf-8")
        if scripted is not None:
            save_torchscript(temporary / "models", scripted, metadata, {"inference": inference})
        save_formats(temporary / "models", plain, image, formats)
        _list_large_files(temporary)
        if check:
            from lorkd_monai.bundle.check.checker import check_bundle

            problems = check_bundle(temporary, name=folder.name, thorough=False, for_zoo=False)
            if problems:
                listed = "\n".join(f"  {problem}" for problem in problems)
                raise LoRKDError(f"the bundle written for task {name!r} does not pass its check:\n{listed}")
    return folder


def _rebuilt(network: nn.Module, network_config: dict, work: Work, classes: int) -> tuple[nn.Module, torch.Tensor]:
    """The network that the config builds, with the weights of the given one, and one input for it."""
    plain = build_network(network_config, weights_of(network))
    image = torch.rand(work.image_shape, generator=torch.Generator().manual_seed(0))
    _check_output(network, plain, image, classes)
    return plain, image


def write_teacher_bundle(
    folder: str | Path,
    *,
    network: nn.Module,
    network_config: dict,
    work: Work,
    preprocessing: list[dict] | None = None,
    metrics: Mapping[str, Any] | None = None,
    description: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a teacher of many tasks as an ordinary MONAI bundle and return its folder.

    Its one output holds the classes of all tasks, in their order; ``channel_def`` names each channel
    ``"<task>: <class>"``. It holds configs/metadata.json, configs/inference.json (``network_def``), models/model.pt,
    LICENSE and docs/README.md: what `lorkd_monai.teachers.teacher` reads, and any other MONAI tool too.

    Raises:
        LoRKDError: an argument does not fit, or the folder exists and ``overwrite`` is not set.
    """
    from lorkd_monai.bundle.teacher_pages import teacher_files

    channels = [
        f"{check_task_name(name)}: {inert_text(text).strip()}"
        for name, task in work.tasks.items()
        for _, text in sorted(task.labels.items())
    ]
    plain, image = _rebuilt(network, network_config, work, len(channels))
    files = teacher_files(work, channels, network_config, preprocessing or [], metrics or {}, description)
    with bundle_folder(folder, overwrite) as temporary:
        _write_common(temporary, *files)
        save_formats(temporary / "models", plain, image, ("pt",))
        _list_large_files(temporary)
    return Path(folder).absolute()
