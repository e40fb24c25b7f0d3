"""Small bundles of one convolution in the forms that the model zoo uses, files for them, and what reaches a teacher."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, LoadImage
from PIL import Image
from torch import nn

from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import TaskSpec
from lorkd_monai.teachers.bundle import StudentImages, load_teacher
from lorkd_monai.transforms import ItemLoader, default_intensity, preprocessing

WIDE = {"range": [-1100.0, 1100.0]}


def step(name, keys="image", **arguments):
    return {"_target_": name, "keys": keys, **arguments}


LOAD, FIRST, TYPED = step("LoadImaged"), step("EnsureChannelFirstd"), step("EnsureTyped")
RAS, LPS, LIA = (step("Orientationd", axcodes=codes, labels=None) for codes in ("RAS", "LPS", "LIA"))
SPACING = step("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear")
CT = step("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True)
BYTES = step("ScaleIntensityRanged", a_min=0.0, a_max=255.0, b_min=-1.0, b_max=1.0)
ZSCORE, MINMAX = step("NormalizeIntensityd"), step("ScaleIntensityd")


def compose(*steps):
    return {"_target_": "Compose", "transforms": list(steps)}


def valued(function):
    return step("Lambdad", func=function)


def of_arrays(config):
    """A dictionary transform's config as that of the array transform."""
    return {k: v.removesuffix("d") if k == "_target_" else v for k, v in config.items() if k != "keys"}


def write_bundle(folder, config, dims=3, channels=1, names=None, file="inference.json", network=None):
    """A bundle of one convolution whose kernel is the same in no two directions."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    arguments = {"in_channels": channels, "out_channels": 2, "kernel_size": 3, "padding": 1}
    network = network or getattr(nn, f"Conv{dims}d")(**arguments)
    definition = {"_target_": f"torch.nn.Conv{dims}d", **arguments}
    (folder / "configs" / file).write_text(json.dumps({"network_def": definition, **config}))
    inputs = {"num_channels": channels, **({"channel_def": dict(enumerate(names))} if names else {})}
    outputs = {"channel_def": {"0": "background", "1": "spleen"}}
    formats = {"network_data_format": {"inputs": {"image": inputs}, "outputs": {"pred": outputs}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps(formats))
    save_weights(folder / "models" / "model.pt", network.state_dict())
    return folder


def write_volume(folder, channels=1, codes="RAS", low=-1000, high=1000, dtype=np.int16):
    """A volume of 1.5 × 1.5 × 2 mm, with a margin of zeros; several channels are several files."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(channels):
        values = rng.integers(low, high, (8, 9, 10)).astype(dtype)
        values[:2] = 0
        image = nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 2.0, 1.0]))
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes)
        )
        files.append(str(folder / f"volume{i}.nii.gz"))
        nibabel.save(image.as_reoriented(turn), files[-1])
    return files[0] if channels == 1 else files


def write_picture(folder, colours=True):
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3) if colours else (12, 16), dtype=np.uint8)
    values[:3] = 0
    Image.fromarray(values).save(folder / "picture.png")
    return str(folder / "picture.png")


def task_of(**more):
    return TaskSpec("t", 0, {0: "background", 1: "spleen"}, **more)


def student_image(file, task, dims, channels, kind="segmentation"):
    size = [12, 16] if kind == "classification" else 16
    loader = ItemLoader(preprocessing(task, kind, dims, channels, size), dims)
    return loader({"image": file})["image"].as_tensor()[None]


def teacher_of(folder, task, dims, images=None, channels=None, from_files=False, **more):
    own = default_intensity(task, dims).get("range")
    student = StudentImages({"t": own and tuple(own)}, stored=images, channels=channels, from_files=from_files)
    return load_teacher(folder, {"t": task}, student, **more)


def reaching(teacher, x):
    """The tensor that the teacher's network gets, and the answer for it."""
    kept = []
    with teacher.network.register_forward_pre_hook(lambda module, args: kept.append(args[0])):
        answer = teacher(x, 0)
    return kept[0], answer


def own_tensor(folder, file, place="preprocessing", name="inference.json"):
    parser = ConfigParser(json.loads((folder / "configs" / name).read_text()))
    steps = Compose(parser.get_parsed_content(place))
    item = (
        steps(file)[None]
        if isinstance(steps.flatten().transforms[0], LoadImage)
        else steps({"image": file})["image"][None]
    )
    return torch.as_tensor(np.asarray(item)).float()


def check_equal(teacher, folder, file, x, **where):
    expected = own_tensor(folder, file, **where)
    got, answer = reaching(teacher, x)
    span = float(expected.max() - expected.min())
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1.0, span))
    assert answer.shape[2:] == x.shape[2:] and not answer.isnan().any()
