"""Teachers from files: any MONAI bundle folder, or a checkpoint with the config of its network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.networks.nets import VISTA3D
from torch import nn

from lorkd_monai.checkpoints.weights import fit_weights, load_weights
from lorkd_monai.errors import LoRKDError, root_cause
from lorkd_monai.networks.surgery.replace import build_backbone, parsed_network
from lorkd_monai.teachers.channels import channels_by_name, labels_of, plain_name
from lorkd_monai.teachers.features import FeatureTeacher
from lorkd_monai.teachers.intensity import Range, StudentImages
from lorkd_monai.teachers.steps import find_steps, teacher_view
from lorkd_monai.teachers.teacher import Channel, Teacher, channels_of, check_channels
from lorkd_monai.teachers.vista import vista_teacher

__all__ = ["StudentImages", "bundle_network", "load_teacher", "teacher_from_checkpoint"]

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml", "train.json", "train.yaml", "train.yml")
_NETWORK_IDS = ("network_def", "network", "net", "model")
_WEIGHTS = ("model.pt", "model.safetensors")
_FEATURES = ("feature", "features", "embedding")


def load_teacher(
    bundle_folder: str | os.PathLike,
    tasks: Mapping[str, Any],
    student: StudentImages | None = None,
    intensity: str | Mapping = "auto",
    *,
    channels: Mapping[str, Sequence[Channel] | None] | None = None,
    activation: str | None = None,
    head: str | None = None,
    ranges: Mapping[str, Range | None] | None = None,
    features_only: bool | None = None,
) -> Teacher:
    """A teacher from a MONAI bundle folder.

    Its network is the ``network_def`` (or ``network``, ``net``, ``model``) of ``configs/inference.json`` or ``.yaml``,
    its weights are ``models/model.pt``, its classes the ``channel_def`` of the output in ``configs/metadata.json``.
    A bundle's config may hold expressions, which are run as MONAI runs them: use bundles that you trust.

    VISTA3D's network is prompted with the tasks' classes, see `vista_teacher`. An encoder without classes, whose
    metadata calls its output's type "feature", "features" or "embedding", gives a `FeatureTeacher`.

    Args:
        bundle_folder: the bundle's root.
        tasks: task -> its class names by id, or an object with such ``labels`` (``TaskSpec``), in the student's order.
        student: what is known of the images that it will see; None: they are taken as they are.
        intensity: what the teacher wants of the student's images: ``"auto"``, what its bundle's preprocessing does, see
            `teacher_view`; ``"same"``, the student's 0..1; ``"zscore"``; or ``{"range": [a_min, a_max], "to": [b_min,
            b_max]}``, the data's values a_min..a_max as b_min..b_max. Its axes are those of its bundle in any case.
        channels: the channels of each task, in place of finding them by name.
        activation: ``"softmax"`` or ``"sigmoid"``; None: what the bundle's postprocessing does.
        head: name of the network's last layer, where it is not found.
        ranges: short for ``student=StudentImages(ranges=ranges)``.
        features_only: the network is an encoder without classes; None: where its metadata says so.

    Raises:
        LoRKDError: no such folder, no network or weights in it, weights that do not fit, no class names, or classes
            that could not be matched.
    """
    folder = Path(bundle_folder)
    if not folder.is_dir():
        raise LoRKDError(f"no teacher bundle at {folder}: there is no such folder")
    student = student or StudentImages(ranges)
    parser, config_file = _read_config(folder)
    network = _build(parser, config_file)
    weights = next((folder / "models" / n for n in _WEIGHTS if (folder / "models" / n).is_file()), None)
    if weights is None:
        raise LoRKDError(f"the teacher bundle {folder} has no weights: expected models/{' or models/'.join(_WEIGHTS)}")
    fit_weights(network, load_weights(weights), str(weights))
    formats = _data_format(parser)
    labels = labels_of(tasks)
    counts = {name: len(classes) for name, classes in labels.items()}
    names = _class_names(formats)
    channels_in = _input_channels(formats) or channels_of(network)
    dims = next((len(m.kernel_size) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    if student.channels is not None and channels_in is not None:
        _check_image(channels_in, student.channels, dims, formats, f"the teacher {folder.name}")
    view = None
    if intensity != "auto" or (student.ranges is not None and not _is_own(names, labels)):
        others = [f for n in _CONFIGS if (f := folder / "configs" / n).is_file() and f != config_file]
        parsers = [(config_file, parser), *((file, _parser(folder, file)) for file in others)]
        own = find_steps(folder, parsers, strict=intensity == "auto")
        view = teacher_view(own, intensity, tasks, student, dims, channels_in or 1, f"the teacher {folder.name}")
        view = None if intensity == "same" and view.axes is None else view
    if features_only if features_only is not None else str(_first(formats, "outputs").get("type")) in _FEATURES:
        return FeatureTeacher(network, counts, in_channels=channels_in, intensity=view)
    if isinstance(network, VISTA3D):
        return vista_teacher(network, tasks, names, student.tasks, intensity=view)
    activation = activation or _activation_of(parser)
    if channels is None:
        if not names:
            raise LoRKDError(
                f"{folder}/configs/metadata.json does not name the teacher's classes (network_data_format, outputs, "
                "channel_def): add them, or give the channels of each task yourself"
            )
        channels = channels_by_name(names, {name: labels[name] for name in student.seen(tasks)}, activation)
    return Teacher(network, channels, counts, activation, channels_in, head, view)


def teacher_from_checkpoint(
    checkpoint: str | os.PathLike,
    network_config: Mapping,
    channel_def: Mapping[str | int, str] | Sequence[str] | None,
    tasks: Mapping[str, Any],
    *,
    channels: Mapping[str, Sequence[Channel] | None] | None = None,
    activation: str = "softmax",
    head: str | None = None,
) -> Teacher:
    """A teacher from a checkpoint and the MONAI config of its network.

    Args:
        checkpoint: a weights file, see `lorkd_monai.checkpoints.weights.load_weights`.
        network_config: config dict with ``_target_``.
        channel_def: the class name of each channel; not needed where ``channels`` is given.
        tasks, channels, activation, head: as for :func:`load_teacher`.

    Raises:
        LoRKDError: as :func:`load_teacher`.
    """
    network, _ = build_backbone(network_config, 1)
    fit_weights(network, load_weights(checkpoint), str(checkpoint))
    labels = labels_of(tasks)
    if channels is None:
        if not channel_def:
            raise LoRKDError("the teacher's classes are not known: give channel_def, or the channels of each task")
        names = channel_def if isinstance(channel_def, Mapping) else dict(enumerate(channel_def))
        channels = channels_by_name(names, labels, activation)
    return Teacher(network, channels, {n: len(c) for n, c in labels.items()}, activation, head=head)


def _read_config(folder: Path) -> tuple[ConfigParser, Path]:
    file = next((folder / "configs" / n for n in _CONFIGS if (folder / "configs" / n).is_file()), None)
    if file is None:
        raise LoRKDError(f"{folder} is no MONAI bundle: expected configs/{' or configs/'.join(_CONFIGS[:2])}")
    return _parser(folder, file), file


def _parser(folder: Path, file: Path) -> ConfigParser:
    parser = ConfigParser()
    try:
        parser.read_config(str(file))
        metadata = folder / "configs" / "metadata.json"
        if metadata.is_file():
            parser.read_meta(str(metadata))
    except Exception as e:
        raise LoRKDError(f"the config of the teacher bundle {folder} can't be read: {root_cause(e)}") from e
    parser["bundle_root"] = str(folder)
    return parser


def bundle_network(folder: str | os.PathLike) -> tuple[nn.Module, int | None]:
    """The network that a MONAI bundle defines, without its weights, and the channels of its images where it says so.

    Raises:
        LoRKDError: no bundle, or no network in it that can be built.
    """
    parser, file = _read_config(Path(folder))
    return _build(parser, file), _input_channels(_data_format(parser))


def _build(parser: ConfigParser, file: Path) -> nn.Module:
    config = parser.config
    ids = [i for i in _NETWORK_IDS if i in config]
    # The definition has priority over an expression that uses it, such as "$@network_def.to(@device)".
    ids.sort(key=lambda i: not (isinstance(config[i], Mapping) and "_target_" in config[i]))
    if not ids:
        raise LoRKDError(f"{file} defines no network: expected one of the ids {', '.join(_NETWORK_IDS)}")
    try:
        return parsed_network(parser, ids[0], f"{file}: {ids[0]!r}")
    except LoRKDError as e:
        if "scripts." not in root_cause(e):
            raise
        raise LoRKDError(f"{e} (its own code: start the command with PYTHONPATH={file.parent.parent})") from e


def _is_own(names: Mapping[int, str], labels: Mapping[str, Mapping[int, str]]) -> bool:
    """A teacher of `pretraining` names its classes "<task>: <class>": it was trained on the student's own images."""
    own = {plain_name(f"{task}: {name}") for task, classes in labels.items() for name in classes.values()}
    return any(plain_name(name) in own for name in names.values())


def _check_image(wanted: int, came: int, dims: int, formats: Mapping, name: str) -> None:
    """Refuse images that lack a channel of the teacher's, also where it has three and they are no colours."""
    check_channels(wanted, came, dims, name)
    said = _first(formats, "inputs").get("channel_def")
    listed = list(said.values()) if isinstance(said, Mapping) else []
    named = [str(v).strip().casefold() for v in listed]
    if wanted != came and len(named) > 1 and [n[:1] for n in named] != ["r", "g", "b"]:
        raise LoRKDError(
            f"{name} takes images of the channels {', '.join(map(str, listed))}, got {came}: they are not "
            "filled with copies of one image. Give the student images with the same channels"
        )


def _activation_of(parser: ConfigParser) -> str:
    """``"sigmoid"`` where a step of the postprocessing says ``sigmoid: true``."""
    steps = parser.config.get("postprocessing")
    steps = steps.get("transforms", []) if isinstance(steps, Mapping) else []
    return "sigmoid" if any(isinstance(s, Mapping) and s.get("sigmoid") is True for s in steps) else "softmax"


def _data_format(parser: ConfigParser) -> Mapping:
    formats = parser.get("_meta_", {}).get("network_data_format")
    return formats if isinstance(formats, Mapping) else {}


def _first(formats: Mapping, side: str) -> Mapping:
    tensors = formats.get(side)
    first = next(iter(tensors.values()), None) if isinstance(tensors, Mapping) else None
    return first if isinstance(first, Mapping) else {}


def _class_names(formats: Mapping) -> dict[int, str]:
    names = _first(formats, "outputs").get("channel_def")
    return {int(k): str(v) for k, v in names.items() if str(k).isdigit()} if isinstance(names, Mapping) else {}


def _input_channels(formats: Mapping) -> int | None:
    count = _first(formats, "inputs").get("num_channels")
    return count if isinstance(count, int) and not isinstance(count, bool) else None
