"""Following the preprocessing of a teacher's bundle: MONAI builds its transforms, which are tried and then used.

Transforms that load and turn an image are run on a small file, whose voxels are looked up afterwards. Those that change
values are run on the images themselves (`TeacherView`). Those that change the size are not run: the teacher sees the
student's voxels. Every other one must leave a small image as it is; else the teacher is refused.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Randomizable
from PIL import Image
from torch import Tensor

from lorkd_monai.errors import LoRKDError, root_cause
from lorkd_monai.teachers.intensity import Axes, Range, StudentImages, TeacherView, given_steps, run
from lorkd_monai.transforms.loading import quiet_readers

__all__ = ["OwnSteps", "find_steps", "teacher_view"]

_PLACES = ("preprocessing", "validate#preprocessing", "dataset#transform", "validate#dataset#transform")
_AXES = ("EnsureChannelFirst", "Orientation", "Transpose", "Flip", "Rotate90", "SqueezeDim")
_SIZES = ("Spacing", "Resize", "Zoom", "ResampleToMatch", "SpatialResample")
_CASTS = ("CastToType", "EnsureType", "ToTensor", "ToDevice", "Lambda")
_CT = (-1000.0, 1000.0)  # Hounsfield units that images of CT hold: air to bone
_MOST = 0.05  # of the range of the teacher's input: what may be lost by the student's range


@dataclass
class OwnSteps:
    """The transforms of a bundle's preprocessing that concern the image, sorted by what they do.

    Attributes:
        source: the bundle and the file, for messages.
        key: the image's key; None for transforms of arrays.
        names: of all these transforms, in order.
        opening: those that load the image and turn its axes.
        sizes: those that change its size, and are not executed; ``cropped``: the first that leaves voxels out
            or adds some, and the number of ``values`` before it.
        values: name and transform of those that change values.
        unknown: what can't be followed.
        several: the keys of the images, where it takes more than one.
        repeats: how often a file's channels are repeated.
        mark: a hash of the config file.
    """

    source: str
    key: str | None
    names: list[str] = field(default_factory=list)
    opening: list[Any] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)
    values: list[tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    repeats: int = 1
    cropped: tuple[str, int] | None = None
    mark: str = ""

    @property
    def loads(self) -> bool:
        """Whether it reads files; else images come to it from elsewhere, in unknown axes."""
        return any(isinstance(step, (mt.LoadImage, mt.LoadImaged)) for step in self.opening)


def find_steps(folder: Path, parsers: Sequence[tuple[Path, ConfigParser]], strict: bool = True) -> OwnSteps | None:
    """The preprocessing of a bundle, as MONAI builds it.

    It is the ``preprocessing`` of its config, or ``validate#preprocessing``, or the transform of its ``dataset``, or
    the one other `Compose` at the top of the config that loads an image.

    Args:
        folder: the bundle.
        parsers: its config files; the first that has a preprocessing counts.
        strict: refuse what can't be followed; False: leave it out.

    Raises:
        LoRKDError: it can't be built or followed, by name.
    """
    for file, parser in parsers:
        place = next((p for p in _PLACES if parser.get(p) is not None), None) or _other_compose(parser)
        if place is None:
            continue
        source = f"the teacher {folder.name}/configs/{file.name}"
        try:
            with quiet_readers():
                steps = list(_flat(parser.get_parsed_content(place)))
        except Exception as error:
            if not strict:
                return None
            raise _cannot(source, f"{place!r}, which can't be built: {root_cause(error)}") from error
        own = _sorted(steps, source)
        own.mark = hashlib.sha256(file.read_bytes()).hexdigest()
        if strict and own.several:
            raise LoRKDError(
                f"{source} takes several images at once ({', '.join(own.several)}), and the student's come one by one. "
                "Where a list of files for each image holds the same, in this order, give --teacher_intensity yourself"
            )
        if strict and own.unknown:
            raise _cannot(source, own.unknown[0])
        return own
    return None


def _other_compose(parser: ConfigParser) -> str | None:
    def loads(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and "LoadImage" in str(value)
            and str(value.get("_target_", "")).endswith("Compose")
        )

    found = [name for name, value in parser.config.items() if loads(value)]
    return found[0] if len(found) == 1 else None


def _flat(steps: Any) -> Iterator[Any]:
    for step in steps.transforms if type(steps) is Compose else steps:
        if type(step) is Compose or isinstance(step, (list, tuple)):
            yield from _flat(step)
        elif step is not None:
            yield step


def _name(step: Any) -> str:
    return type(step).__name__ if isinstance(step, mt.Transform) else getattr(step, "__name__", type(step).__name__)


def _plain(step: Any) -> str:
    """The name of the array transform, of a transform of either kind."""
    return _name(step).removesuffix("Dict").removesuffix("D").removesuffix("d")


def _cannot(source: str, what: str) -> LoRKDError:
    return LoRKDError(
        f"{source} prepares its images with {what}. That can't be followed from the student's images: say yourself "
        "what intensities it wants, with --teacher_intensity same, zscore, or \"{'range': [a_min, a_max], 'to': "
        '[b_min, b_max]}"'
    )


def _sorted(steps: Sequence[Any], source: str) -> OwnSteps:
    keyed = [step for step in steps if hasattr(step, "keys")]
    loaders = [step for step in keyed if isinstance(step, mt.LoadImaged)]
    keys = [str(k) for k in (loaders or keyed)[0].keys] if keyed else []
    own = OwnSteps(source, "image" if "image" in keys else keys[0] if keys else None)
    if len(keys) > 1 and own.key != "image":
        own.several, own.repeats = keys, len(keys)
    for step in steps:
        if isinstance(step, MapTransform):
            if own.key not in getattr(step, "keys", [own.key]):
                continue
            step = copy.copy(step)
            step.allow_missing_keys = True  # it may be for the label as well
        name, plain, module = _name(step), _plain(step), type(step).__module__
        own.names.append(name)
        if isinstance(step, (mt.LoadImage, mt.LoadImaged)) or plain in _AXES:
            own.opening.append(step)
        elif isinstance(step, Randomizable) or not module.startswith("monai."):
            own.unknown.append(f"{name} of {module}")
        elif plain == "RepeatChannel":
            own.repeats *= getattr(step, "repeater", step).repeats
        elif plain in _SIZES or module.startswith("monai.transforms.croppad"):
            own.sizes.append(step)
            if plain not in _SIZES and own.cropped is None:
                own.cropped = name, len(own.values)
        elif plain in _CASTS or module.startswith("monai.transforms.intensity"):
            own.values.append((name, partial(_applied, step, own.key)))
        elif _changes(step, own.key):
            own.unknown.append(name)
    return own


def _applied(step: Any, key: str | None, image: Tensor) -> Any:
    # As loaded images are: a step that takes the whole item may look at the metadata.
    return step(image) if key is None else step({key: MetaTensor(image)})[key]


def _changes(step: Any, key: str | None) -> bool:
    """Whether a transform of MONAI's does something to an image, or needs more than an image."""
    image = torch.arange(60.0).view(1, 3, 4, 5)
    try:
        after = _applied(step, key, image.clone())
    except Exception:
        return True
    return not isinstance(after, Tensor) or after.shape != image.shape or not torch.equal(torch.as_tensor(after), image)


def teacher_view(
    own: OwnSteps | None,
    intensity: str | Mapping,
    tasks: Mapping[str, Any],
    student: StudentImages,
    dims: int,
    channels: int,
    name: str = "the teacher",
) -> TeacherView:
    """How a teacher is shown the student's images.

    Args:
        own: the preprocessing of its bundle.
        intensity: ``"auto"``: that; or what `given_steps` takes, in place of the steps that change values.
        tasks: task -> `TaskSpec`, whose ``modality`` says which are of CT, or its classes, in the student's order.
        student: the student's images.
        dims: 2 or 3.
        channels: of the teacher's images.
        name: of the teacher, for messages.

    Raises:
        LoRKDError: a step that fails, or that wants values that the student's images do not hold.
    """
    if intensity == "auto" and own is None:
        raise LoRKDError(
            f"{name} has no preprocessing in its configs, so that it is not known what its images look like: say it "
            "with --teacher_intensity same (as the student's, 0..1), zscore, or \"{'range': [a_min, a_max], 'to': "
            '[b_min, b_max]}"'
        )
    seen = student.seen(tasks)
    # Tasks without images make no difference to the teacher.
    ranges = {task: (student.ranges or {}).get(task) if task in seen else (0.0, 1.0) for task in tasks}
    ct = [task for task in seen if str(getattr(tasks[task], "modality", None)).strip().upper() == "CT"]
    axes = None if own is None or not own.loads else _axes(own, dims, channels, student.stored or None)
    named = own.values if intensity == "auto" else [(f"intensity {intensity}", step) for step in given_steps(intensity)]
    source = own.source if intensity == "auto" else name
    known = {task: (0.0, 1.0) if r is None else r for task, r in ranges.items()}
    alone = _try(named, source, channels, dims, known)
    pointwise = all(alone)
    steps = [step for _, step in named]
    from_files = student.from_files and dims == 3 and bool(steps)
    unknown = [task for task, r in ranges.items() if r is None]
    if steps and not from_files and unknown:
        _check_percentiles(steps, source, unknown, channels, dims)
    if intensity == "auto":
        if own.cropped and not all(alone[own.cropped[1] :]):
            raise _cannot(source, f"{own.cropped[0]} before it uses statistics of the image that is left")
        for task in ct if not from_files else ():
            if dims == 2 and known[task][0] >= 0:
                continue  # pictures of 8 or 16 bits, which are not cut
            _check_cut(steps, source, task, known[task], pointwise, channels)
    # Volumes of CT come uncut; of values that are scaled by percentiles nothing is known beforehand.
    shown = [_CT if from_files and task in ct else own for task, own in ranges.items()]
    told = [_axes_words(axes, dims), _value_words(steps, shown, pointwise, channels, dims)]
    if intensity != "auto":
        told.append(f"intensities as said ({intensity})")
    if own is not None:
        told += [f"its steps: {' '.join(own.names)}", *(f"not done: {_size_words(step)}" for step in own.sizes)]
    words = f"{intensity} {'' if own is None else own.mark}"
    return TeacherView(steps, list(known.values()), axes, from_files, words, ", ".join(told))


def _try(
    named: Sequence[tuple[str, Callable]], source: str, channels: int, dims: int, known: Mapping[str, Range]
) -> list[bool]:
    """Run the steps on a small image of each task; return for each step whether it acts on each value separately."""
    alone = [True] * len(named)
    for low, high in known.values():
        image = _sample(low, high, channels, dims)
        for i, (name, step) in enumerate(named):
            try:
                after = run([step], image.clone())
            except Exception as error:
                raise _cannot(
                    source, f"{name}, which fails on an image of {channels} channels: {root_cause(error)}"
                ) from error
            if not isinstance(after, Tensor) or after.shape != image.shape:
                raise _cannot(
                    source, f"{name}, which makes {tuple(getattr(after, 'shape', ()))} of {tuple(image.shape)}"
                )
            if name.startswith("Lambda"):
                order = torch.randperm(image[0].numel(), generator=torch.Generator().manual_seed(1))
                moved = run([step], image.flatten(1)[:, order].view_as(image))
                if not _same(moved.flatten(1), after.flatten(1)[:, order]):
                    raise _cannot(source, f"{name}, which moves or mixes voxels")
            part = run([step], image[..., :2].clone())
            alone[i] = alone[i] and _same(part, after[..., :2])
            image = after
    return alone


def _sample(low: float, high: float, channels: int, dims: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(channels, *(5, 6, 4)[:dims], generator=generator) * (high - low) + low
    image[:, 0] = low
    return image


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4 * max(1e-6, float(b.float().abs().max())))


def _check_percentiles(steps: Sequence[Callable], source: str, tasks: Sequence[str], channels: int, dims: int) -> None:
    """Refuse images that are scaled one by one, unless a factor and a constant make no difference to the steps."""
    image = _sample(0.0, 1.0, channels, dims)  # with zeros, which some steps leave out
    if not _same(run(steps, image.clone()), run(steps, image * 40 - 7)):
        raise LoRKDError(
            f"{source} wants the data's own values, but the images of {', '.join(tasks)} are scaled by their own "
            'percentiles: give these tasks an "intensity": {"range": [low, high]} in the data list, or say '
            "--teacher_intensity same or zscore"
        )


def _check_cut(steps: Sequence[Callable], source: str, task: str, own: Range, pointwise: bool, channels: int) -> None:
    """Refuse a range of CT that cuts off what the teacher would see: by more than 0.05 of its input's range."""
    values = torch.linspace(*_CT, 2001)
    image = values.view(1, -1, 1, 1).repeat(channels, 1, 1, 1)
    full = run(steps, image.clone())
    lost = (full - run(steps, image.clamp(*own))).abs().max() / (full.max() - full.min()).clamp_min(1e-12)
    if lost <= _MOST:
        return
    low, high = _CT
    if pointwise:  # what the teacher cuts off itself, the student may cut off too
        below = values[(full - full[:, :1])[0].flatten() == 0]
        above = values[(full - full[:, -1:])[0].flatten() == 0]
        low, high = float(below.max()), float(above.min())
    raise LoRKDError(
        f"{source} sees values that the images of {task} do not hold any more: they are cut to {own[0]:g}..{own[1]:g}, "
        f"which changes its input by up to {float(lost):.2f} of its range. Give the task "
        f'"intensity": {{"range": [{low:g}, {high:g}]}} in the data list, or say --teacher_intensity yourself'
    )


def _axes(own: OwnSteps, dims: int, channels: int, images: Sequence[Any] | None) -> Axes | None:
    """The teacher's axes, found by loading small files as its bundle does. None: they are the student's."""

    def found_in(forms: Iterable[str]) -> dict[str, Axes]:
        return {form: _loaded(own, dims, channels, form) for form in sorted(forms)}

    if dims == 2:
        found = found_in({".png"} if images is None else {_stored(image, 2) for image in images})
    else:
        found = found_in({"RAS", "PIL"})
        if images is not None and found["RAS"] != found["PIL"]:
            found = found_in({_stored(image, 3) for image in images})
    if len(set(found.values())) > 1:
        raise LoRKDError(
            f"{own.source} takes images as they are stored (it has no Orientationd), and how the data's are stored "
            + ("is not known" if images is None and dims == 3 else f"differs: {', '.join(found)}")
            + ". Store them all in one way, or add an Orientationd to the bundle if you know its axes"
        )
    (axes,) = set(found.values())
    return None if axes == Axes(tuple(range(dims))) else axes


def _stored(image: Any, dims: int) -> str:
    """How an image is stored: ``".png"`` or ``".nii"`` in 2D, its axes such as ``"LAS"`` in 3D. Arrays are RAS."""
    file = image[0] if isinstance(image, (list, tuple)) else image
    is_file = isinstance(file, (str, os.PathLike))
    nifti = is_file and str(file).lower().endswith((".nii", ".nii.gz"))
    if dims == 2:
        return ".nii" if nifti else ".png"
    if not is_file:
        return "RAS"
    affine = nibabel.load(file).affine if nifti else np.asarray(mt.LoadImage(image_only=True)(file).affine)
    return "".join(nibabel.aff2axcodes(affine))


def _loaded(own: OwnSteps, dims: int, channels: int, stored: str) -> Axes:
    """The axes in which a small file comes out of the bundle's first steps."""
    count = max(1, channels // own.repeats)
    code = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(3, 4, 5)
    code = code if dims == 3 else code[0]
    causes = []
    with tempfile.TemporaryDirectory() as folder:
        for files in _probes(Path(folder), code.numpy().astype(np.uint8), count, stored):
            try:
                image: Any = files if own.key is None else {own.key: files}
                for step in own.opening:
                    image = step(image)
                image = torch.as_tensor(np.asarray(image if own.key is None else image[own.key]))
                break
            except Exception as error:
                causes.append(root_cause(error))
        else:
            raise LoRKDError(
                f"{own.source} can't load a file of {count} channels like the data's: {causes[0]}. It can't be followed"
            )
    flips = [flipped for n in range(dims + 1) for flipped in itertools.combinations(range(dims), n)]
    for order, flipped in itertools.product(itertools.permutations(range(dims)), flips):
        if image.ndim == dims + 1 and torch.equal(image[0].long(), code.permute(order).flip(flipped)):
            return Axes(order, flipped)
    raise LoRKDError(
        f"{own.source}: its first steps ({', '.join(map(_name, own.opening))}) make an image of shape "
        f"{tuple(image.shape)} of {tuple(code.shape)} voxels in {count} channels, which can't be followed"
    )


def _probes(folder: Path, code: np.ndarray, count: int, stored: str) -> Iterator[Any]:
    """Files that hold ``code`` in the student's axes, in the forms that a data list may name them."""
    is_png, affine = stored == ".png", np.eye(4)
    if stored not in (".png", ".nii"):
        ras, turn = map(nibabel.orientations.axcodes2ornt, ("RAS", stored))
        volume = nibabel.Nifti1Image(code, affine).as_reoriented(nibabel.orientations.ornt_transform(ras, turn))
        code, affine = np.asarray(volume.dataobj), volume.affine

    def save(name: str, array: np.ndarray) -> str:
        path = folder / f"{name}{'.png' if is_png else '.nii.gz'}"
        if is_png:
            Image.fromarray(array).save(path)
        else:
            nibabel.save(nibabel.Nifti1Image(array, affine), path)
        return str(path)

    one_picture = is_png and count in (1, 3)
    if count > 1 and not one_picture:
        yield [save(f"a{i}", code) for i in range(count)]
    if one_picture or not is_png:
        yield save("a", code if count == 1 else np.stack([code] * count, -1))


def _value_words(
    steps: Sequence[Callable], own: Sequence[Range | None], pointwise: bool, channels: int, dims: int
) -> str:
    if not steps:
        return "values 0..1 as the student's"
    if not pointwise or None in own:
        return "values by the statistics of each image"
    ramps = [torch.linspace(*r, 257).view(1, -1, *[1] * (dims - 1)).repeat(channels, *[1] * dims) for r in own]
    shown = torch.cat([run(steps, ramp) for ramp in ramps])
    return f"values {float(shown.min()):.4g}..{float(shown.max()):.4g}"


def _axes_words(axes: Axes | None, dims: int) -> str:
    if axes is None:
        return "axes as the student's"
    words = [("RAS" if dims == 3 else ("rows", "columns"))[a] for a in axes.order]
    opposite = {"R": "L", "A": "P", "S": "I", "rows": "rows reversed", "columns": "columns reversed"}
    words = [opposite[w] if i in axes.flipped else w for i, w in enumerate(words)]
    return f"axes {''.join(words) if dims == 3 else ' × '.join(words)}"


def _size_words(step: Any) -> str:
    inner = next((v for k, v in vars(step).items() if k in ("spacing_transform", "resizer")), step)
    size = next((getattr(inner, k) for k in ("pixdim", "spatial_size") if getattr(inner, k, None) is not None), None)
    return _name(step) if size is None else f"{_name(step)} to {np.asarray(size).tolist()}"
