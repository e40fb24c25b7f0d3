"""One image read from a file and from an array gives the same tensor; files that cannot be read are named."""

from __future__ import annotations

import itk
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from lorkd_monai.data import TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import ItemLoader, describe_image, preprocessing, wrap_array

TASK = TaskSpec("task", 0, {0: "a", 1: "b"})
RNG = np.random.default_rng(0)
IMAGES = {
    "grey": Image.fromarray(RNG.integers(0, 256, (20, 13), dtype=np.uint8)),
    "rgb": Image.fromarray(RNG.integers(0, 256, (20, 13, 3), dtype=np.uint8)),
    "rgba": Image.fromarray(RNG.integers(0, 256, (20, 13, 4), dtype=np.uint8)),
    "grey_alpha": Image.fromarray(RNG.integers(0, 256, (20, 13, 2), dtype=np.uint8)),
    "grey_16_bit": Image.fromarray(RNG.integers(0, 65536, (20, 13), dtype=np.uint16)),
}


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("mode", IMAGES)
@pytest.mark.parametrize("image_size", [16, 32])
def test_png_and_array_give_the_same_tensor(tmp_path, mode, in_channels, image_size):
    image = IMAGES[mode]
    image.save(tmp_path / "a.png")
    task = TaskSpec("task", 0, TASK.labels, intensity={"range": [0, 65535]} if mode == "grey_16_bit" else None)
    load = ItemLoader(preprocessing(task, "classification", 2, in_channels, image_size), 2)
    from_file = load({"image": str(tmp_path / "a.png")})["image"]
    from_array = load({"image": np.asarray(image)})["image"]
    assert from_file.shape == (in_channels, image_size, image_size)
    assert (from_file == from_array).all()
    assert from_file.min() >= 0 and from_file.max() <= 1 and from_file.std() > 0.1


@pytest.mark.parametrize("mode", ["P", "1"])
def test_palette_and_bit_images_are_read_as_they_look(tmp_path, mode):
    image = IMAGES["rgb"].convert(mode)
    image.save(tmp_path / "a.png")
    load = ItemLoader(preprocessing(TASK, "classification", 2, 3, 20), 2)
    from_file = load({"image": str(tmp_path / "a.png")})["image"]
    from_array = load({"image": np.asarray(image.convert("RGB"))})["image"]
    assert (from_file == from_array).all()


def test_nifti_and_array_give_the_same_tensor(tmp_path):
    volume = RNG.integers(0, 256, (9, 12, 7), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    task = TaskSpec("task", 0, TASK.labels, intensity={"range": [0, 255]})
    load = ItemLoader(preprocessing(task, "classification", 3, 1, 16), 3)
    from_file = load({"image": str(tmp_path / "a.nii.gz")})["image"]
    from_array = load({"image": volume})["image"]
    assert from_file.shape == (1, 16, 16, 16) and (from_file == from_array).all()


def test_volumes_of_other_orientations_are_turned(tmp_path):
    volume = RNG.integers(0, 256, (9, 12, 7), dtype=np.uint8)
    canonical = nibabel.Nifti1Image(volume, np.diag([1, 2, 3, 1]))
    turned = canonical.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    assert turned.shape != canonical.shape
    load = ItemLoader(preprocessing(TASK, "segmentation", 3, 1, 16), 3)
    images = []
    for name, image in (("canonical", canonical), ("turned", turned)):
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        images.append(load({"image": str(tmp_path / f"{name}.nii.gz")})["image"])
        assert describe_image(str(tmp_path / f"{name}.nii.gz")).spacing == pytest.approx((1, 2, 3))
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itk_formats_equal_nifti(tmp_path, suffix):
    volume = RNG.integers(0, 256, (9, 12, 7)).astype(np.int16)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (5, 6, 7)
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "a.nii")
    image = itk.image_from_array(np.ascontiguousarray(volume.T))
    image.SetSpacing([1.0, 2.0, 3.0])
    image.SetOrigin([-5.0, -6.0, 7.0])
    direction = np.diag([-1.0, -1.0, 1.0])  # itk counts towards left and posterior
    image.SetDirection(itk.matrix_from_array(direction))
    itk.imwrite(image, str(tmp_path / f"a{suffix}"))
    load = ItemLoader(preprocessing(TASK, "segmentation", 3, 1, 16), 3)
    expected, got = (load({"image": str(tmp_path / name)})["image"] for name in ("a.nii", f"a{suffix}"))
    assert (expected == got).all()
    np.testing.assert_allclose(got.affine, expected.affine, atol=1e-6)
    assert describe_image(str(tmp_path / f"a{suffix}")).spacing == pytest.approx((1, 2, 3))


def write_series(folder, volume):
    """One DICOM series of slices × rows × columns, 2.5 mm apart."""
    folder.mkdir()
    series = pydicom.uid.generate_uid()
    for number, plane in enumerate(volume):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.FrameOfReferenceUID = series, series, series
        slice_.Modality, slice_.InstanceNumber, slice_.PatientID = "CT", number + 1, "phantom"
        slice_.ImagePositionPatient, slice_.ImageOrientationPatient = [0, 0, 2.5 * number], [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing, slice_.SliceThickness = [0.7, 0.7], 2.5
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleIntercept, slice_.RescaleSlope = 0, 1
        slice_.PixelData = plane.tobytes()
        slice_.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def test_dicom_series_folder(tmp_path):
    volume = RNG.integers(0, 1000, (6, 12, 9)).astype(np.int16)
    folder = write_series(tmp_path / "series", volume)
    task = TaskSpec("task", 0, TASK.labels, intensity={"range": [0, 1000]})
    load = ItemLoader(preprocessing(task, "segmentation", 3, 1, 16), 3)
    image = load({"image": str(folder)})["image"]
    expected = volume.transpose(2, 1, 0)[::-1, ::-1]  # to RAS
    np.testing.assert_allclose(image[0], expected / 1000, atol=1e-5)
    assert describe_image(str(folder)).spacing == pytest.approx((0.7, 0.7, 2.5))


def test_a_series_with_a_missing_or_a_doubled_slice_and_one_slice_alone_are_refused(tmp_path):
    volume = RNG.integers(0, 1000, (6, 12, 9)).astype(np.int16)
    missing, doubled = (write_series(tmp_path / name, volume) for name in ("missing", "doubled"))
    (missing / "2.dcm").unlink()
    copy = pydicom.dcmread(doubled / "2.dcm")
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    copy.save_as(doubled / "again.dcm")
    load = ItemLoader(preprocessing(TASK, "segmentation", 3, 1, 16), 3)
    for path, words in (
        (missing, r"/missing' lie 2.5 to 5 mm apart; a slice is missing after .*/1.dcm"),
        (doubled, r"/doubled' holds 7 slices of 6 places; keep one of each"),
        (missing / "1.dcm", r"/1.dcm is one DICOM slice; give the folder of its series"),
    ):
        with pytest.raises(LoRKDError, match=words):
            load({"image": str(path)})
    with pytest.raises(LoRKDError, match="a slice is missing"):
        describe_image(str(missing))


def test_a_volume_beside_the_slices_of_a_series_is_refused(tmp_path):
    folder = write_series(tmp_path / "both", RNG.integers(0, 1000, (6, 12, 9)).astype(np.int16))
    (folder / "._a.nii").touch()
    assert describe_image(str(folder)).spatial_dims == 3
    (folder / "a.nii.gz").touch()
    words = r"/both' holds DICOM slices and the volume 'a.nii.gz'; keep one of them, or give each a folder of its own"
    with pytest.raises(LoRKDError, match=words):
        describe_image(str(folder))
    with pytest.raises(LoRKDError, match=words):
        ItemLoader(preprocessing(TASK, "segmentation", 3, 1, 16), 3)({"image": str(folder)})


def test_several_files_are_the_channels_of_one_image(tmp_path):
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"a_{number:04d}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(np.full((5, 6, 7), 50 * number, dtype=np.int16), np.eye(4)), paths[-1])
    task = TaskSpec("task", 0, TASK.labels, intensity={"range": [0, 100]})
    image = ItemLoader(preprocessing(task, "segmentation", 3, 2, 8), 3)({"image": paths})["image"]
    assert image.shape == (2, 5, 6, 7) and image[0].max() == 0 and (image[1] == 0.5).all()
    assert describe_image(paths).channels == 2


def test_several_pngs_are_the_channels_of_one_image(tmp_path):
    arrays = RNG.integers(0, 256, (3, 12, 10), dtype=np.uint8)
    paths = [str(tmp_path / f"a_{number:04d}.png") for number in range(3)]
    for array, path in zip(arrays, paths, strict=True):
        Image.fromarray(array).save(path)
    image = ItemLoader(preprocessing(TASK, "classification", 2, 3, [12, 10]), 2)({"image": paths})["image"]
    np.testing.assert_allclose(image, arrays / 255, atol=1e-6)


def test_a_corrupt_file_is_named(tmp_path):
    for name, dims in (("bad.png", 2), ("bad.nii.gz", 3)):
        (tmp_path / name).write_bytes(b"no image at all")
        load = ItemLoader(preprocessing(TASK, "classification", dims, 1, 16), dims)
        with pytest.raises(LoRKDError, match=f"cannot read .*{name}: .*\n.*damaged"):
            load({"image": str(tmp_path / name)})
        with pytest.raises(LoRKDError, match=f"cannot read .*{name}"):
            describe_image(str(tmp_path / name))


def test_a_truncated_png_is_named(tmp_path):
    IMAGES["rgb"].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    load = ItemLoader(preprocessing(TASK, "classification", 2, 1, 16), 2)
    with pytest.raises(LoRKDError, match=r"cannot read .*cut\.png"):
        load({"image": str(tmp_path / "cut.png")})


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path):
    def save(name, shape, affine):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, dtype=np.uint8), affine), tmp_path / name)
        return str(tmp_path / name)

    image = save("image.nii.gz", (8, 8, 8), np.eye(4))
    load = ItemLoader(preprocessing(TASK, "segmentation", 3, 1, 8, ("image", "label")), 3)
    shifted = np.eye(4)
    shifted[0, 3] = 5
    with pytest.raises(LoRKDError, match=r"image\.nii\.gz with mask .*shifted\.nii\.gz: .*5\.00 mm"):
        load({"image": image, "label": save("shifted.nii.gz", (8, 8, 8), shifted)})
    with pytest.raises(LoRKDError, match=r"size \(8, 8, 8\), its mask of \(8, 8, 9\)"):
        load({"image": image, "label": save("larger.nii.gz", (8, 8, 9), np.eye(4))})
    rounded = np.eye(4)
    rounded[0, 3] = 1e-3
    load({"image": image, "label": save("rounded.nii.gz", (8, 8, 8), rounded)})


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(LoRKDError, match="expected 2 axes"):
        wrap_array(np.zeros((2, 3, 4, 5)), 2)
