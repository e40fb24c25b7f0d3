"""What reaches a teacher's network, against what its bundle's own preprocessing makes of the same file.

The bundles are small ones in the forms that the model zoo uses: equal within 1e-5, or refused by name.
"""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from teacher_cases import (
    BYTES,
    CT,
    FIRST,
    LIA,
    LOAD,
    LPS,
    MINMAX,
    RAS,
    SPACING,
    TYPED,
    WIDE,
    ZSCORE,
    check_equal,
    compose,
    of_arrays,
    own_tensor,
    reaching,
    step,
    student_image,
    task_of,
    teacher_of,
    valued,
    write_bundle,
    write_picture,
    write_volume,
)
from torch import nn

from lorkd_monai.data import TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.bundle import StudentImages, load_teacher
from lorkd_monai.teachers.cache import fingerprint
from lorkd_monai.transforms import ItemLoader, preprocessing

CT_FORMS = {
    "spleen": {"preprocessing": compose(LOAD, FIRST, RAS, SPACING, CT, TYPED)},
    "vista3d": {
        "image_key": "image",
        "device": "$torch.device('cpu')",
        "resample_spacing": [1.5, 1.5, 2.0],
        "preprocessing_transforms": [
            step("LoadImaged", "@image_key", image_only=True),
            step("EnsureChannelFirstd", "@image_key"),
            step("EnsureTyped", "@image_key", device="@device", track_meta=True),
            step("Spacingd", "@image_key", pixdim="@resample_spacing", mode="bilinear"),
            step("monai.apps.vista3d.transforms.VistaPreTransformd", "@image_key", labels_dict={"3": "spleen"}),
            step("ScaleIntensityRanged", "@image_key", a_min=-963.8, a_max=1053.7, b_min=0, b_max=1, clip=True),
            step("Orientationd", "@image_key", axcodes="RAS", labels=None),
            step("CastToTyped", "@image_key", dtype="$torch.float32"),
        ],
        "preprocessing": {"_target_": "Compose", "transforms": "$@preprocessing_transforms "},
    },
    "@steps": {"steps": [LOAD, FIRST, RAS, CT], "preprocessing": {"_target_": "Compose", "transforms": "@steps"}},
    "@pre": {"pre": compose(LOAD, FIRST, RAS, CT), "preprocessing": "@pre"},
    "cut after all": {
        "preprocessing": compose(LOAD, FIRST, RAS, ZSCORE, step("SpatialPadd", spatial_size=[4, 4, 4])),
    },
    "nested": {"preprocessing": compose(compose(LOAD, compose(FIRST, RAS)), compose(CT))},
    "list": {"preprocessing": [LOAD, FIRST, RAS, CT]},
    "expression": {"a": [LOAD, FIRST], "b": [RAS, CT], "preprocessing": {**compose(), "transforms": "$@a + @b"}},
    "alias D": {"preprocessing": compose(LOAD, FIRST, RAS, {**CT, "_target_": "ScaleIntensityRangeD"})},
    "alias Dict": {"preprocessing": compose(LOAD, FIRST, RAS, {**CT, "_target_": "ScaleIntensityRangeDict"})},
    "disabled": {"preprocessing": compose(LOAD, FIRST, RAS, {**CT, "a_min": 0, "_disabled_": True}, CT)},
    "keys by reference": {
        "image_key": "image",
        "preprocessing": compose(*({**s, "keys": ["@image_key"]} for s in (LOAD, FIRST, RAS, CT))),
    },
    "numbers by reference": {"low": -57, "preprocessing": compose(LOAD, FIRST, RAS, {**CT, "a_min": "@low"})},
    "LPS": {"preprocessing": compose(LOAD, FIRST, LPS, CT)},
    "LIA": {"preprocessing": compose(LOAD, FIRST, LIA, CT)},
    "flipped after": {"preprocessing": compose(LOAD, FIRST, RAS, step("Flipd", spatial_axis=0), CT)},
    "transposed after": {"preprocessing": compose(LOAD, FIRST, RAS, step("Transposed", indices=[0, 3, 2, 1]), CT)},
    "lambda": {"preprocessing": compose(LOAD, FIRST, RAS, valued("$lambda x: (x + 963.8) / 2017.5"))},
    "whole body": {
        "preprocessing": compose(
            LOAD,
            TYPED,
            FIRST,
            RAS,
            SPACING,
            step("NormalizeIntensityd", nonzero=True),
            step("ScaleIntensityd", minv=-1.0, maxv=1.0),
        )
    },
    "prostate": {"preprocessing": compose(LOAD, FIRST, RAS, SPACING, step("ScaleIntensityd", minv=0, maxv=1), ZSCORE)},
    "percentiles": {
        "preprocessing": compose(
            LOAD, FIRST, LIA, step("ScaleIntensityRangePercentilesd", lower=2, upper=98, b_min=0, b_max=1, clip=True)
        )
    },
    "clipped": {
        "preprocessing": compose(
            LOAD,
            FIRST,
            RAS,
            step("ClipIntensityPercentilesd", lower=1, upper=99),
            step("NormalizeIntensityd", subtrahend=99.4, divisor=210.5),
        )
    },
    "threshold": {
        "preprocessing": compose(
            LOAD, FIRST, RAS, step("ThresholdIntensityd", threshold=-200, above=True, cval=-200), CT
        )
    },
    "whole numbers": {"preprocessing": compose(LOAD, FIRST, RAS, step("CastToTyped", dtype="$np.int16"), CT)},
    "the label beside": {
        "preprocessing": compose(
            *(step(n, ["image", "label"], allow_missing_keys=True) for n in ("LoadImaged", "EnsureChannelFirstd")),
            RAS,
            step("ScaleIntensityd", "label", allow_missing_keys=True),
            CT,
        )
    },
    "arrays": {"preprocessing": compose(*map(of_arrays, (LOAD, FIRST, RAS, CT)))},
}


@pytest.mark.parametrize("form", CT_FORMS)
def test_3d_equal(form, tmp_path):
    folder = write_bundle(tmp_path / "bundle", CT_FORMS[form])
    task = task_of(modality="CT", intensity=WIDE, spacing=(1.5, 1.5, 2.0))
    file = write_volume(tmp_path, codes="LAS")
    teacher = teacher_of(folder, task, 3)
    check_equal(teacher, folder, file, student_image(file, task, 3, 1))


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "PIR"])
def test_volumes_as_they_are_stored(codes, tmp_path):
    """Brats and others: no Orientationd, all of the data's files stored alike; four sequences, statistics of each."""
    config = {"preprocessing": compose(LOAD, step("NormalizeIntensityd", nonzero=True, channel_wise=True))}
    folder = write_bundle(tmp_path / "bundle", config, channels=4, names=["T1c", "T1", "T2", "FLAIR"])
    task = task_of(modality="MR", intensity={"range": [0.0, 2000.0]}, channels=4)
    files = write_volume(tmp_path, 4, codes, low=0, high=2000)
    teacher = teacher_of(folder, task, 3, images=[files], channels=4)
    check_equal(teacher, folder, files, student_image(files, task, 3, 4))


def test_words_for_true(tmp_path):
    """As wholeBrainSeg writes it: "True" in quotes."""
    normalize = step("NormalizeIntensityd", nonzero="True", channel_wise="True")
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, normalize, TYPED)})
    task = task_of(modality="MR", intensity={"range": [0.0, 900.0]})
    file = write_volume(tmp_path, codes="LPS", low=0, high=900)
    check_equal(teacher_of(folder, task, 3, images=[file]), folder, file, student_image(file, task, 3, 1))


@pytest.mark.parametrize("place", ["validate#preprocessing", "transforms_infer", "dataset"])
def test_other_places(place, tmp_path):
    steps = compose(LOAD, FIRST, RAS, CT)
    file_name, where = "inference.json", place
    if place == "validate#preprocessing":
        config, file_name = (
            {"train": {"preprocessing": compose(LOAD)}, "validate": {"preprocessing": steps}},
            "train.json",
        )
    elif place == "dataset":
        config, where = {"dataset": {"_target_": "Dataset", "data": [], "transform": steps}}, "dataset#transform"
    else:
        config = {place: steps, "post_transforms": compose(step("Activationsd", "pred", softmax=True))}
    folder = write_bundle(tmp_path / "bundle", config, file=file_name)
    task = task_of(modality="CT", intensity=WIDE)
    file = write_volume(tmp_path)
    check_equal(teacher_of(folder, task, 3), folder, file, student_image(file, task, 3, 1), place=where, name=file_name)


PICTURE_FORMS = {
    "endoscopic tools": (
        3,
        [
            step("LoadImaged", image_only=False),
            step("EnsureChannelFirstd", channel_dim=-1),
            step("Resized", spatial_size=[16, 12]),
            MINMAX,
        ],
    ),
    "in body": (
        3,
        [
            LOAD,
            step("EnsureChannelFirstd", channel_dim=-1),
            step("CastToTyped", dtype="$torch.float32"),
            step("NormalizeIntensityd", nonzero=True, channel_wise=True),
            TYPED,
        ],
    ),
    "mammograms": (3, [LOAD, step("EnsureChannelFirstd", channel_dim=2), step("ScaleIntensityd", minv=0.0, maxv=1.0)]),
    "pathology": (
        3,
        [
            step("LoadImaged", reader="$monai.data.PILReader", converter="$lambda x: x.convert('RGB')"),
            FIRST,
            step("CastToTyped", dtype="float32"),
            BYTES,
        ],
    ),
    "8 bits": (3, [step("LoadImaged", dtype="uint8"), FIRST, BYTES]),
    "of each colour": (
        3,
        [
            LOAD,
            FIRST,
            MINMAX,
            step(
                "NormalizeIntensityd",
                subtrahend=[0.485, 0.456, 0.406],
                divisor=[0.229, 0.224, 0.225],
                channel_wise=True,
            ),
        ],
    ),
    "rows × columns": (3, [step("LoadImaged", reader="PILReader", reverse_indexing=False), FIRST, MINMAX]),
    "transposed back": (3, [LOAD, FIRST, step("Transposed", indices=[0, 2, 1]), MINMAX]),
    "grey": (1, [LOAD, FIRST, MINMAX]),
    "grey three times": (3, [LOAD, FIRST, MINMAX, step("RepeatChanneld", repeats=3)]),
}


@pytest.mark.parametrize("form", PICTURE_FORMS)
def test_2d_equal(form, tmp_path):
    channels, steps = PICTURE_FORMS[form]
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(*steps)}, dims=2, channels=channels)
    grey = form.startswith("grey")
    task, file = task_of(channels=1 if grey else 3), write_picture(tmp_path, colours=not grey)
    x = student_image(file, task, 2, 1 if grey else 3, "classification")
    check_equal(teacher_of(folder, task, 2, channels=x.shape[1]), folder, file, x)


@pytest.mark.parametrize(("dims", "modality"), [(2, "US"), (3, "CT"), (3, "MR")])
def test_an_expert_of_our_own_as_the_teacher(dims, modality, tmp_path):
    """Its configs hold steps that look at the whole item: they are executed, too."""
    task = task_of(modality=modality, spacing=(1.5, 1.5, 2.0) if dims == 3 else None, channels=1)
    kind = "classification" if dims == 2 else "segmentation"
    configs = preprocessing(task, kind, dims, 1, [12, 16] if dims == 2 else 16)
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(*configs)}, dims=dims)
    file = write_picture(tmp_path, colours=False) if dims == 2 else write_volume(tmp_path)
    teacher = teacher_of(folder, task, dims, images=[file], from_files=True)
    x = student_image(file, task, dims, 1, kind)
    if modality == "MR":  # whose values are those of its own percentiles: they come from the file
        values = ItemLoader([c for c in configs if c["_target_"] in ("LoadImaged", "EnsureChannelFirstd")], 3)
        x = teacher.intensity.of_values(values({"image": file})["image"].as_tensor())[None]
    seen = teacher._adapted(x, [0], shown=modality == "MR")
    torch.testing.assert_close(seen, own_tensor(folder, file), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axcodes", [None, "PL"])
def test_slices_in_nifti(axcodes, tmp_path):
    """Both readers take them as they are stored, where pictures are turned."""
    turn = [] if axcodes is None else [step("Orientationd", axcodes=axcodes, labels=None)]
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, *turn, MINMAX)}, dims=2)
    values = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint8)
    file = str(tmp_path / "slice.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    x = torch.from_numpy(values / np.float32(255))[None, None]
    check_equal(teacher_of(folder, task_of(), 2, images=[file]), folder, file, x)


def test_slices_of_ct_that_are_cut(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, ZSCORE)}, dims=2)
    with pytest.raises(LoRKDError, match=r"cut to -160\.\.240"):
        teacher_of(folder, task_of(modality="CT", intensity={"range": [-160.0, 240.0]}), 2)
    assert teacher_of(folder, task_of(modality="CT"), 2).intensity is not None  # 8 bits


def test_grey_of_colours_is_a_mean(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, MINMAX)}, dims=2)
    task, file = task_of(channels=1), write_picture(tmp_path, colours=False)
    x = student_image(file, task, 2, 3, "classification")  # a grey picture, repeated for a student that takes colours
    check_equal(teacher_of(folder, task, 2, channels=3), folder, file, x)


def test_pictures_that_come_as_arrays(tmp_path):
    """Pathology's patches of slides: no step loads a file, so the axes are the student's."""
    steps = [step("CastToTyped", dtype="float32"), BYTES, step("ToTensord")]
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(*steps)}, dims=2, channels=3)
    x = torch.rand(2, 3, 12, 16)
    torch.testing.assert_close(reaching(teacher_of(folder, task_of(), 2), x)[0], x * 2 - 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [[LOAD, FIRST, CT], [step("LoadImaged"), FIRST, LPS, CT]])
def test_answers_come_back_in_the_students_axes(steps, tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(*steps)})
    task, file = task_of(modality="CT", intensity=WIDE), write_volume(tmp_path, codes="PIR")
    teacher = teacher_of(folder, task, 3, images=[file])
    _, answer = reaching(teacher, student_image(file, task, 3, 1))
    item = ConfigParser({"p": compose(*steps)}).get_parsed_content("p")({"image": file})["image"]
    with torch.no_grad():
        own = teacher.network(item.as_tensor()[None])[0]
    back = nibabel.Nifti1Image(own.movedim(0, -1).numpy(), item.affine.numpy())
    expected = torch.from_numpy(np.asarray(nibabel.as_closest_canonical(back).dataobj).copy()).movedim(-1, 0)
    torch.testing.assert_close(answer[0], expected, rtol=1e-4, atol=1e-4)


def test_pictures_answer_in_rows_and_columns(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, MINMAX)}, dims=2)
    task, file = task_of(), write_picture(tmp_path, colours=False)
    teacher = teacher_of(folder, task, 2)
    _, answer = reaching(teacher, student_image(file, task, 2, 1, "classification"))
    with torch.no_grad():
        expected = teacher.network(own_tensor(folder, file)).transpose(2, 3)
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


GUIDANCE = {"_target_": "monai.apps.nuclick.transforms.AddClickSignalsd", "image": "image", "foreground": "foreground"}
LABEL = {"_target_": "monai.apps.nuclick.transforms.AddLabelAsGuidanced", "keys": "image", "source": "label"}
REFUSED = {
    "scripts": ([LOAD, FIRST, RAS, step("scripts.transforms.MyNormd")], "scripts.transforms.MyNormd"),
    "of another package": ([LOAD, FIRST, RAS, {"_target_": "operator.itemgetter", "item": "image"}], "itemgetter"),
    "a function": ([LOAD, FIRST, RAS, "$lambda item: item"], "of test|lambda"),
    "random": ([LOAD, FIRST, RAS, step("RandFlipd", prob=0.5)], "RandFlipd"),
    "clicks": ([LOAD, FIRST, RAS, GUIDANCE], "AddClickSignalsd"),
    "label as guidance": ([LOAD, FIRST, RAS, LABEL], "AddLabelAsGuidanced"),
    "phases": ([{**s, "keys": ["artery", "vein", "excret"]} for s in (LOAD, FIRST, LPS)], "artery, vein, excret"),
    "channels more": ([LOAD, FIRST, RAS, step("AddCoordinateChannelsd", spatial_dims=[0])], "AddCoordinateChannelsd"),
    "moving lambda": ([LOAD, FIRST, RAS, valued("$lambda x: x.flip(1)")], "Lambdad, which moves"),
    "cutting lambda": ([LOAD, FIRST, RAS, valued("$lambda x: x[:, 1:]")], "Lambdad, which makes"),
    "failing lambda": ([LOAD, FIRST, RAS, valued("$lambda x: x.nothing")], "Lambdad, which fails"),
    "wrong channels": (
        [LOAD, FIRST, RAS, step("NormalizeIntensityd", subtrahend=[1, 2], divisor=[1, 2], channel_wise=True)],
        "NormalizeIntensityd, which fails",
    ),
    "statistics of a crop": (
        [LOAD, FIRST, RAS, step("CropForegroundd", source_key="image"), ZSCORE],
        "CropForegroundd before it uses statistics",
    ),
    "files of another form": (
        [LOAD, step("EnsureChannelFirstd", channel_dim=5), RAS, CT],
        "can't load a file of 1 channels",
    ),
    "one slice": ([LOAD, FIRST, step("SqueezeDimd", dim=0), CT], "make an image of shape"),
    "none": (None, "has no preprocessing in its configs"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_by_name(form, tmp_path):
    steps, message = REFUSED[form]
    folder = write_bundle(tmp_path / "bundle", {} if steps is None else {"preprocessing": compose(*steps)})
    with pytest.raises(LoRKDError, match=message) as caught:
        teacher_of(folder, task_of(modality="CT", intensity=WIDE), 3)
    assert "\n" not in str(caught.value) and "bundle" in str(caught.value)


def test_said_in_place_of_what_cant_be_followed(tmp_path):
    """--teacher_intensity stands for unknown steps; the axes are still the bundle's own."""
    folder = write_bundle(tmp_path / "a", {"preprocessing": compose(LOAD, FIRST, LPS, GUIDANCE)})
    x = torch.rand(1, 1, 6, 7, 8)
    task = task_of(modality="CT", intensity=WIDE)
    got, _ = reaching(teacher_of(folder, task, 3, intensity={"range": [-1100, 1100], "to": [-1, 1]}), x)
    torch.testing.assert_close(got, x.flip([2, 3]) * 2 - 1, rtol=1e-5, atol=1e-5)
    assert torch.equal(reaching(teacher_of(folder, task, 3, intensity="same"), x)[0], x.flip([2, 3]))
    folder = write_bundle(tmp_path / "b", {"preprocessing": compose(LOAD, FIRST, step("scripts.Mined"))})
    assert torch.equal(reaching(teacher_of(folder, task, 3, intensity="same"), x)[0], x)


def test_stored_in_several_ways(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, CT)})
    task = task_of(modality="CT", intensity=WIDE)
    files = []
    for codes in ("RAS", "LAS"):
        (tmp_path / codes).mkdir()
        files.append(write_volume(tmp_path / codes, codes=codes))
    with pytest.raises(LoRKDError, match="as they are stored .*differs: LAS, RAS"):
        teacher_of(folder, task, 3, images=files)
    with pytest.raises(LoRKDError, match="as they are stored .*is not known"):
        teacher_of(folder, task, 3)
    assert teacher_of(folder, task, 3, images=files[:1]).intensity.axes is None


@pytest.mark.parametrize(
    ("window", "scale", "message"),
    [
        ([-160.0, 240.0], {"a_min": -57, "a_max": 164}, None),
        ([-160.0, 240.0], {"a_min": -175, "a_max": 250}, None),  # 0.04 of its range
        (
            [-160.0, 240.0],
            {"a_min": -963.8, "a_max": 1053.7},
            r"spleen.*-160..240.*up to 0\.\d+.*range\": \[-96\d, 1000\]",
        ),
        ([-160.0, 240.0], {"a_min": -500, "a_max": 500}, r'"range": \[-500, 500\]'),
        ([-1000.0, 1000.0], {"a_min": -963.8, "a_max": 1053.7}, None),
    ],
)
def test_what_the_student_cuts_off(window, scale, message, tmp_path):
    """A window of CT that is narrower than the teacher's is told, with the one that would do."""
    scaling = {**CT, **scale}
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, RAS, scaling)})
    task = TaskSpec("spleen", 0, {0: "background", 1: "spleen"}, modality="CT", intensity={"range": window})
    student = StudentImages({"spleen": tuple(window)})
    if message is None:
        assert load_teacher(folder, {"spleen": task}, student).intensity is not None
    else:
        with pytest.raises(LoRKDError, match=message):
            load_teacher(folder, {"spleen": task}, student)
        assert load_teacher(folder, {"spleen": task}, student, "same").intensity is None


def test_figures_of_a_window_are_refused(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST, RAS, ZSCORE)})
    with pytest.raises(LoRKDError, match=r'"range": \[-1000, 1000\]'):
        teacher_of(folder, task_of(modality="CT"), 3)
    assert teacher_of(folder, task_of(modality="CT", intensity=WIDE), 3).intensity is not None


def test_images_scaled_by_their_own_percentiles(tmp_path):
    """Do for a teacher to whom neither a factor nor a constant makes a difference."""
    mr = task_of(modality="MR")
    folder = write_bundle(tmp_path / "a", {"preprocessing": compose(LOAD, FIRST, RAS, ZSCORE)})
    x = torch.rand(1, 1, 6, 7, 8)
    expected = (x - x.mean()) / x.std(correction=0)
    torch.testing.assert_close(reaching(teacher_of(folder, mr, 3), x)[0], expected, rtol=1e-4, atol=1e-5)
    for name, other in (("b", CT), ("c", step("NormalizeIntensityd", nonzero=True))):
        folder = write_bundle(tmp_path / name, {"preprocessing": compose(LOAD, FIRST, RAS, other)})
        with pytest.raises(LoRKDError, match="images of t are scaled by their own percentiles"):
            teacher_of(folder, mr, 3)


@pytest.mark.parametrize(
    ("dims", "channels", "names", "came", "message"),
    [
        (3, 3, ["artery", "vein", "excretion"], 1, "images of 3 channels, got 1"),
        (3, 4, None, 1, "images of 4 channels, got 1"),
        (2, 5, None, 3, "images of 5 channels, got 3"),
        (2, 4, None, 1, "images of 4 channels, got 1"),
        (2, 3, ["stain", "mask", "edge"], 1, "channels stain, mask, edge, got 1"),
        (3, 1, None, 4, "images of 1 channels, got 4"),
    ],
)
def test_channels_are_not_filled(dims, channels, names, came, message, tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST)}, dims, channels, names)
    with pytest.raises(LoRKDError, match=message):
        teacher_of(folder, task_of(), dims, channels=came)


def test_kept_answers_are_of_one_preprocessing(tmp_path):
    """Another step, range or order of axes is another teacher; the same bundle is the same one again."""
    marks = set()
    network = nn.Conv3d(1, 2, 3, padding=1)
    for i, steps in enumerate(
        ([LOAD, FIRST, RAS, CT], [LOAD, FIRST, RAS, {**CT, "a_max": 200}], [LOAD, FIRST, LPS, CT])
    ):
        folder = write_bundle(tmp_path / str(i), {"preprocessing": compose(*steps)}, network=network)
        for task in (task_of(modality="CT", intensity=WIDE), task_of(modality="CT")):
            first, again = (fingerprint(teacher_of(folder, task, 3)) for _ in range(2))
            assert first == again
            marks.add(first)
    assert len(marks) == 6


def test_a_published_teacher_of_lia_axes(shared, tmp_path):
    """MeshNet of brainchop wants LIA; the same network with its kernels turned wants RAS: both answer alike."""
    bundles = [shared / "real_teacher" / name for name in ("brainchop_meshnet_18", "brainchop_meshnet_18_ras")]
    if not all(folder.is_dir() for folder in bundles):
        pytest.skip("the published network is not on this machine")
    name = sorted((shared / "real_teacher" / "brain_t1" / "images").iterdir())[0]
    whole = nibabel.load(name)
    part = whole.slicer[90:130, 100:146, 80:116]
    file = str(tmp_path / "part.nii.gz")
    nibabel.save(part, file)
    classes = json.loads((bundles[0] / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"][
        "pred"
    ]["channel_def"]
    task = TaskSpec(
        "t",
        0,
        {0: "background", 1: classes["1"]},
        modality="MR",
        intensity={"range": [0.0, float(np.max(part.dataobj))]},
        spacing=(1.0, 1.0, 1.0),
    )
    x = student_image(file, task, 3, 1)
    seen, answers = zip(*(reaching(teacher_of(folder, task, 3), x) for folder in bundles), strict=True)
    torch.testing.assert_close(seen[0], own_tensor(bundles[0], file), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], own_tensor(bundles[1], file), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)


def test_a_teacher_of_stored_axes_without_images_to_look_at(tmp_path):
    """No images of a split are as unknown ones: what is stored is not known."""
    folder = write_bundle(tmp_path / "bundle", {"preprocessing": compose(LOAD, FIRST)})
    for images in (None, []):
        with pytest.raises(LoRKDError, match="how the data's are stored is not known"):
            teacher_of(folder, task_of(), 3, images=images)
