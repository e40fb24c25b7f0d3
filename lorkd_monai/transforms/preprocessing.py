"""The stock MONAI transforms that turn a file into a network's input, as JSON-able configs.

They are the one source of preprocessing: training builds its transforms from them, and an expert bundle's
``configs/inference.json`` carries the same dictionaries. Only classes of MONAI appear in them, and every
expression in them (a string that starts with ``$``) is a constant of this file: no text of a data list gets in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.tasks import TaskSpec, check_kind, image_sides
from lorkd_monai.transforms.dicom import picture_reader
from lorkd_monai.transforms.gate import gate, scaled, upright
from lorkd_monai.transforms.loading import ImageFacts

__all__ = ["CT_WINDOW", "PERCENTILES", "default_intensity", "postprocessing", "preprocessing", "saving_handlers"]

CT_WINDOW = (-160.0, 240.0)
"""Default window of 3D CT, in HU: the soft-tissue window of the abdomen (level 40, width 400)."""

PERCENTILES = (0.5, 99.5)
"""Default intensity limits of other 3D images: percentiles of each image."""

# Grey and colour stay as they are, also 16-bit grey; palettes become colours, an alpha channel is dropped.
_READ_COLOURS = (
    "image if image.mode in ('L', 'RGB', 'F') or image.mode.startswith('I')"
    " else image.convert('L' if image.mode in ('1', 'LA', 'La') else 'RGB')"
)
# Weights of red, green and blue after ITU-R 601, which PIL's own conversion to grey uses.
_TO_GREY = (
    "$lambda x: x if x.shape[0] == 1"
    " else (x[:3] * x.new_tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(0, keepdim=True)"
)
# The stock Lambdad wraps one transform for any number of channels: RepeatChanneld would make nine of three.
_TO_CHANNELS = "$lambda x: x.expand({channels}, *x.shape[1:])"


def _step(target: str, keys: str | list[str], **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": keys, **arguments}


def default_intensity(task: TaskSpec, spatial_dims: int) -> dict[str, Any]:
    """Return ``task.intensity``, or the default of its kind.

    2D: grey values 0 to 255. 3D: `CT_WINDOW` in HU where the task's modality is CT, else the `PERCENTILES` of each
    image. A data list sets ``{"range": [0, 65535]}`` by itself where a task's 2D images have 16 bits, and
    ``{"range": [0, 255]}`` where its volumes are 8-bit arrays of an ``.npz`` file.
    """
    if task.intensity is not None:
        return task.intensity
    return {"range": [0.0, 255.0]} if spatial_dims == 2 else _volume_intensity(task.modality)


def full_depth(task: TaskSpec, spatial_dims: int) -> float | None:
    """Return the value of white of a 2D task whose files are read by their own depth; None where a range is stated."""
    if spatial_dims == 3 or not (task.intensity is None or task.measured):
        return None
    low, high = default_intensity(task, 2).get("range", (None, None))
    return high if low == 0 and high in (1, 255, 65535) else None


def measured_intensity(facts: ImageFacts, modality: str | None) -> dict[str, Any] | None:
    """Return the intensity of a 2D task whose list states none, from the values of its images; None for 0 to 255.

    8 and 16 bits have their full range, also in wider whole numbers; floats 0..1 or 0..255 where they fit one of these.
    Others, as HU or z-scores, are scaled as volumes: CT by `CT_WINDOW`, the rest by the `PERCENTILES` of each image.
    """
    if facts.values is None:
        return {"range": [0, 65535]} if facts.bits == 16 else None
    low, high = facts.values
    if facts.floats and low >= -0.1 * high and (high <= 1.1 or 25 < high <= 280.5):  # resampling overshoots
        return {"range": [0, 1]} if high <= 1.1 else None
    if not facts.floats and low >= 0 and high <= 65535:
        return {"range": [0, 65535]} if high > 255 else None
    return _volume_intensity(modality)


def _volume_intensity(modality: str | None) -> dict[str, Any]:
    if (modality or "").strip().upper() == "CT":
        return {"range": list(CT_WINDOW)}
    return {"percentiles": list(PERCENTILES)}


def preprocessing(
    task: TaskSpec,
    kind: str,
    spatial_dims: int,
    in_channels: int,
    image_size: int | Sequence[int],
    keys: Sequence[str] = ("image",),
) -> list[dict[str, Any]]:
    """Return the configs of the transforms that make a network's input of a task's image file.

    Every image ends as float32 C×H×W[×D] in 0..1 with ``in_channels`` channels. Grey images are repeated where the
    network takes colours; colours become grey (ITU-R 601) where it takes one channel.

    * 2D: axes are rows × columns, as `PIL.Image` and ``.npz`` files have them.
    * Classification: resized to ``image_size`` (2D: aspect ratio not kept; 3D: turned to RAS first).
    * 2D segmentation: the longer side becomes ``image_size``, the shorter one is padded with 0 to a square.
    * 3D segmentation: turned to RAS, resampled to ``task.spacing`` (mm; left as it is where that is None).
      ``image_size`` is the patch of training and sliding window, and changes nothing here.

    Args:
        task: gives ``intensity``, ``modality`` and ``spacing``.
        kind: ``"classification"`` or ``"segmentation"``.
        spatial_dims: 2 or 3.
        in_channels: channels of the network's input.
        image_size: pixels or voxels per side.
        keys: ``("image",)``, or ``("image", "label")`` for segmentation with masks.

    Raises:
        LoRKDError: for a kind, key or size that does not fit.

    Example::

        from monai.bundle import ConfigParser
        configs = preprocessing(task, "segmentation", 3, in_channels=1, image_size=96)
        parser = ConfigParser({"preprocessing": {"_target_": "Compose", "transforms": configs}})
        image = parser.get_parsed_content("preprocessing")({"image": "scan.nii.gz"})["image"]
    """
    check_kind(kind, spatial_dims)
    keys = list(keys)
    if keys not in (["image"], ["image", "label"]) or (keys != ["image"] and kind == "classification"):
        raise LoRKDError(f"expected keys ['image'], or ['image', 'label'] for segmentation, got {keys} for {kind}.")
    check_whole("in_channels", in_channels)

    masks = len(keys) == 2
    intensity = default_intensity(task, spatial_dims)
    channels, full = _channels(task, spatial_dims, in_channels), full_depth(task, spatial_dims)
    steps = _loading(spatial_dims, masks, intensity.get("range"), full is not None)
    steps.append(_step("EnsureChannelFirstd", keys))
    steps.append(gate(spatial_dims, channels, full, task.num_classes if masks else None))
    if spatial_dims == 3:
        steps.append(_step("Orientationd", keys, axcodes="RAS", labels=None))
        if kind == "segmentation" and task.spacing is not None:
            mode = ["bilinear", "nearest"] if masks else "bilinear"
            steps.append(_step("Spacingd", keys, pixdim=list(map(float, task.spacing)), mode=mode))
    if spatial_dims == 2 and in_channels == 1:
        steps.append(_step("Lambdad", "image", func=_TO_GREY))
    steps += [_intensity(intensity), scaled(intensity.get("range"))]
    if in_channels > 1:
        steps.append(_step("Lambdad", "image", func=_TO_CHANNELS.format(channels=int(in_channels))))
    if kind == "classification":
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        size = list(image_sides(image_size, spatial_dims))
        steps.append(_step("Resized", "image", spatial_size=size, mode=mode, anti_aliasing=True))
    elif spatial_dims == 2:
        side, other = image_sides(image_size, 2)
        if side != other:
            raise LoRKDError(f"2D segmentation resizes to a square: image_size must be one number, got {image_size!r}.")
        mode = ["bilinear", "nearest-exact"] if masks else "bilinear"
        smooth = [True, False] if masks else True
        steps += [
            _step("Resized", keys, spatial_size=side, size_mode="longest", mode=mode, anti_aliasing=smooth),
            _step("SpatialPadd", keys, spatial_size=[side, side]),
        ]
    return steps


def postprocessing(task: TaskSpec, kind: str, spatial_dims: int) -> list[dict[str, Any]]:
    """Return the configs of the transforms that turn the key ``"pred"`` (logits, C×…) into the answer.

    Classification: probabilities by softmax (saved by `saving_handlers`). Segmentation: the geometry of the input
    comes back (`Invertd` undoes the preprocessing on the logits), then argmax, uint8, and a file in the folder of the
    config id ``output_dir``: ``.png`` with the rows and columns of the input for 2D, ``.nii.gz`` with its affine and
    shape for 3D. The config must have the preprocessing under the id ``preprocessing``.

    Args:
        task: a segmentation task must have at most 256 classes.
        kind: ``"classification"`` or ``"segmentation"``.
        spatial_dims: 2 or 3.

    Raises:
        LoRKDError: for an unknown kind, or more than 256 classes.
    """
    check_kind(kind, spatial_dims)
    if kind == "classification":
        return [_step("Activationsd", "pred", softmax=True)]
    if task.num_classes > 256:
        raise LoRKDError(f"task {task.name!r} has {task.num_classes} classes; masks are uint8 and hold at most 256.")
    save = _step(
        "SaveImaged", "pred", output_dir="@output_dir", output_postfix="seg",
        output_ext=".png" if spatial_dims == 2 else ".nii.gz", output_dtype="$np.uint8", resample=False,
        separate_folder=False,
    )  # fmt: skip
    if spatial_dims == 2:
        # SaveImaged turns rows into columns unless the writer is told not to, and only set_options reaches the writer.
        options = {"write_kwargs": {"reverse_indexing": False}}
        save = {"_target_": "monai.transforms.SaveImaged.set_options", "self": save, **options}
    return [
        _step("Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=False, to_tensor=True),
        _step("AsDiscreted", "pred", argmax=True),
        _step("CastToTyped", "pred", dtype="$torch.uint8"),
        save,
    ]


def saving_handlers(kind: str) -> list[dict[str, Any]]:
    """Return the handler configs of an evaluator that write what no transform writes.

    Classification: ``predictions.csv`` in the folder of the config id ``output_dir``, with a line of file name and
    probabilities for each image.
    Segmentation needs none: its `postprocessing` ends in a transform that saves.
    """
    if kind != "classification":
        return []
    return [
        {
            "_target_": "ClassificationSaver",
            "output_dir": "@output_dir",
            "filename": "predictions.csv",
            "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
            "output_transform": "$monai.handlers.from_engine(['pred'])",
        }
    ]


def _channels(task: TaskSpec, spatial_dims: int, in_channels: int) -> list[int]:
    """Numbers of channels that an image of a task may have; in 2D both grey and colours do."""
    if spatial_dims == 2 and in_channels in (1, 3) and task.channels in (None, 1, 3):
        return [1, 3]
    return [1, in_channels] if task.channels is None else [task.channels]


def _loading(spatial_dims: int, masks: bool, limits: Any, own_depth: bool) -> list[dict[str, Any]]:
    if spatial_dims == 3:
        return [_step("LoadImaged", ["image", "label"] if masks else ["image"])]
    reader = picture_reader(upright(_READ_COLOURS), limits, own_depth)
    steps = [_step("LoadImaged", ["image"], reader=reader)]
    if masks:  # a palette's indices are the classes, so masks are not converted
        mask = {"_target_": "PILReader", "reverse_indexing": False, "converter": upright()}
        steps.append(_step("LoadImaged", ["label"], reader=mask))
    return steps


def _intensity(spec: dict[str, Any]) -> dict[str, Any]:
    (how, (low, high)), *more = spec.items()
    low, high = float(low), float(high)
    if how == "range" and not more and low < high:
        limits = _step("ScaleIntensityRanged", "image", a_min=low, a_max=high)
    elif how == "percentiles" and not more and 0 <= low < high <= 100:
        limits = _step("ScaleIntensityRangePercentilesd", "image", lower=low, upper=high, channel_wise=True)
    else:
        raise LoRKDError(
            'intensity must be {"range": [low, high]} with low < high, or '
            f'{{"percentiles": [low, high]}} within 0..100, got {spec!r}.'
        )
    return {**limits, "b_min": 0.0, "b_max": 1.0, "clip": True}
