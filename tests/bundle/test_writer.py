"""Expert bundles are complete, hold the network itself in every format, and are never half-written."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from PIL import Image

from lorkd_monai.bundle import check_bundle, check_origin, expert_name, measure, write_teacher_bundle
from lorkd_monai.bundle.formats import build_network, run_onnx, torchscript_of
from lorkd_monai.bundle.writer import bundle_folder
from lorkd_monai.errors import LoRKDError
from lorkd_monai.locks import mark_in_use
from lorkd_monai.tasks import TaskSpec, Work

KINDS = ("2d_classification", "3d_classification", "2d_segmentation", "3d_segmentation")
WRITTEN = {
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/evaluate.json",
    "configs/train.json",
    "configs/multi_gpu_train.json",
    "configs/logging.conf",
    "models/model.pt",
    "models/model.safetensors",
    "models/model.ts",
    "models/model.onnx",
    "docs/README.md",
    "docs/data_license.txt",
}


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_everything_is_there(case):
    assert {path.relative_to(case.folder).as_posix() for path in case.folder.rglob("*") if path.is_file()} == WRITTEN
    assert [path.name for path in case.folder.parent.iterdir()] == [case.folder.name]
    assert check_bundle(case.folder) == []


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_monai_verifies_it(case, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (schema,) = (shared / "schema").glob("meta_schema_*.json")
    shutil.copy(schema, tmp_path / "schema.json")
    meta = str(case.folder / "configs" / "metadata.json")
    verify_metadata(meta_file=meta, filepath=str(tmp_path / "schema.json"))
    config = str(case.folder / "configs" / "inference.json")
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu", bundle_root=str(case.folder))
    for name, workflow_type in (("inference", "infer"), ("train", "train")):
        data = (
            {"dataset#data": []} if name == "inference" else {"train#dataset#data": [{}], "validate#dataset#data": [{}]}
        )
        workflow = ConfigWorkflow(
            str(case.folder / "configs" / f"{name}.json"), workflow_type=workflow_type, logging_file=False, **data
        )
        workflow.initialize()
        assert workflow.check_properties() == []


def real_image(shared, kind_of_work: str, case) -> torch.Tensor:
    """One real image of the shared data, prepared as the bundle prepares it; volumes of 16³ as they are."""
    folder = shared / "data" / kind_of_work
    if kind_of_work == "2d_classification":
        image = np.load(folder / "retinamnist.npz")["test_images"][0].astype(np.float32) / 255
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(tensor, (32, 32))
    if kind_of_work == "3d_classification":
        image = np.load(folder / "vesselmnist3d.npz")["test_images"][0].astype(np.float32) / 255
        return torch.nn.functional.interpolate(torch.from_numpy(image)[None, None], (16, 16, 16))
    item = json.loads((folder / "dataset.json").read_text())["test"][0]
    steps = {"steps": {"_target_": "Compose", "transforms": case.arguments["preprocessing"]}}
    prepared = ConfigParser(steps).get_parsed_content("steps")({"image": str(folder / item["image"])})["image"]
    side = case.arguments["image_size"][0]
    middle = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in prepared.shape[1:])
    return prepared.as_tensor()[(slice(None), *middle)][None].contiguous()


@pytest.mark.parametrize("kind_of_work", KINDS)
def test_all_formats_give_the_same_output(kind_of_work, make_case, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = make_case(kind_of_work)
    from safetensors.torch import load_file

    image, models = real_image(shared, kind_of_work, case), case.folder / "models"
    config = json.loads((case.folder / "configs" / "inference.json").read_text())["network_def"]
    with torch.no_grad():
        expected = case.network(image)
        from_pt = build_network(config, torch.load(models / "model.pt", weights_only=True))(image)
        from_safetensors = build_network(config, load_file(models / "model.safetensors"))(image)
        from_ts = torch.jit.load(models / "model.ts").eval()(image)
        both = torch.jit.load(models / "model.ts").eval()(torch.cat([image, image]))
    assert torch.equal(from_pt, expected)
    assert torch.equal(from_safetensors, expected)
    assert torch.allclose(from_ts, expected, atol=1e-4)
    assert torch.allclose(both, torch.cat([expected, expected]), atol=1e-4)
    assert torch.allclose(run_onnx(models / "model.onnx", image), expected, atol=1e-4)
    assert torch.allclose(run_onnx(models / "model.onnx", torch.cat([image, image]))[1:], expected, atol=1e-4)


def test_the_archive_carries_the_configs_unchanged(make_case):
    case = make_case("2d_classification")
    from monai.data import load_net_with_metadata

    _, metadata, extra = load_net_with_metadata(
        str(case.folder / "models" / "model.ts"), more_extra_files=["inference.json"]
    )
    assert metadata == json.loads((case.folder / "configs" / "metadata.json").read_text())
    assert json.loads(extra["inference.json"]) == json.loads((case.folder / "configs" / "inference.json").read_text())


TEXTS = ("$(rm -rf /)", "$__import__('os').abort()", "@device", "%configs/x.json", "100% @#a %##b", "left/right",
         "naïve Müller-Zelle 细胞", "a | b <b>c</b>", "new\nline", "@meta#x")  # fmt: skip


@pytest.mark.parametrize("case", ["2d_segmentation"], indirect=True)
def test_no_file_tells_where_it_was_made(case):
    places = [str(Path(torch.__file__).parents[1]).encode(), str(case.folder.parent).encode()]
    for path in case.folder.rglob("*"):
        contents = [path.read_bytes()] if path.is_file() else []
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            contents += [archive.read(name) for name in archive.namelist()]
        assert not [place for place in places for content in contents if place in content], path.name


@pytest.mark.parametrize("text", TEXTS)
def test_a_class_name_is_data_whatever_it_is(text, make_case, tmp_path):
    case = make_case("2d_classification")
    task = TaskSpec("task_2d", 0, {0: text, 1: "b", 2: "c"}, modality=text, body_part=text, note=text)
    parent = {"authors": text, "teacher": {"network": text}}
    folder = case.write(
        tmp_path / "task_2d_classification", task=task, parent=parent, formats=("pt",), metrics={text: 1.0}
    )
    configs = folder / "configs"
    stored = json.loads((configs / "metadata.json").read_text(encoding="utf-8"))
    name = stored["network_data_format"]["outputs"]["pred"]["channel_def"]["0"]
    assert name.replace(" ", "") == "".join(text.split())
    parser = ConfigParser()
    parser.read_config(configs / "inference.json")
    parser.read_meta(configs / "metadata.json")
    parser.parse()
    resolved = parser.get_parsed_content("_meta_")
    assert resolved["network_data_format"]["outputs"]["pred"]["channel_def"]["0"].replace("::", "#") == name
    for config in ("inference", "train", "evaluate", "multi_gpu_train"):
        assert (configs / f"{config}.json").read_text() == (case.folder / "configs" / f"{config}.json").read_text()


@pytest.mark.parametrize(
    ("own", "parent", "licence", "authors"),
    [
        ({"licence": "CC BY 4.0", "authors": ["A. Nurse", "B. Doctor"]}, {}, "CC BY 4.0", "A. Nurse, B. Doctor"),
        ({"licence": "CC0", "authors": ["A"]}, {"data_license": "CC BY", "authors": "B"}, "CC BY", "B"),
        ({"licence": "$(a)\nb", "authors": ["@device"]}, {}, "$(a) b", " @device"),
    ],
)
def test_licence_and_authors_are_those_of_the_data_list(make_case, tmp_path, own, parent, licence, authors):
    task = TaskSpec("task_2d", 0, {0: "a", 1: "b", 2: "c"}, **own)
    folder = make_case("2d_classification").write(
        tmp_path / "task_2d_classification", task=task, parent=parent, formats=("pt",)
    )
    assert f"\nLicence: {licence}\n" in (folder / "docs" / "data_license.txt").read_text()
    assert json.loads((folder / "configs" / "metadata.json").read_text())["authors"] == authors
    assert check_origin(folder) == []


def test_an_existing_folder_is_kept(make_case, tmp_path):
    case = make_case("2d_classification")
    folder = tmp_path / "task_2d_classification"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(LoRKDError, match="exists already.*overwrite=True"):
        case.write(folder, formats=("pt",))
    with pytest.raises(LoRKDError, match="is not replaced: it holds no configs/metadata.json"):
        case.write(folder, formats=("pt",), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    case.write(folder, formats=("pt",), overwrite=True)
    (folder / "mine.txt").touch()
    case.write(folder, formats=("pt",), overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["task_2d_classification"]


def test_a_failed_export_leaves_the_old_bundle(make_case, tmp_path, monkeypatch):
    case = make_case("2d_classification")
    folder = tmp_path / "task_2d_classification"
    case.write(folder, formats=("pt",))
    before = (folder / "models" / "model.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt), bundle_folder(folder, overwrite=True) as temporary:
        (temporary / "half").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "models" / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_what_a_killed_export_left_is_removed(make_case, tmp_path):
    case = make_case("2d_classification")
    stale = tmp_path / ".task_2d_classification.export-77-0123abcd"
    running = tmp_path / ".task_2d_classification.export-78-0123abcd"
    other = tmp_path / ".other_classification.export-77-0123abcd"
    for path in (stale, running, other):
        path.mkdir()
    with mark_in_use(running):
        case.write(tmp_path / "task_2d_classification", formats=("pt",))
    assert not stale.exists() and running.exists() and other.exists()
    with bundle_folder(tmp_path / "other_classification"):
        pass
    assert not other.exists()


def test_a_bundle_that_appears_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "x_classification"
    with pytest.raises(LoRKDError, match="exists already"), bundle_folder(folder), bundle_folder(folder) as quicker:
        (quicker / "first").touch()
    assert (folder / "first").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_swap_that_was_killed_is_undone(tmp_path):
    set_aside = tmp_path / f".x_classification.replaced-{2**22 + 1}-0123abcd"
    set_aside.mkdir()
    (set_aside / "old").write_text("old")
    with pytest.raises(LoRKDError, match="exists already"), bundle_folder(tmp_path / "x_classification"):
        pass
    assert (tmp_path / "x_classification" / "old").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "detection"},
            "expected kind 'classification' or 'segmentation' and spatial_dims 2 or 3, got 'detection'",
        ),
        ({"spatial_dims": 4}, "spatial_dims 2 or 3, got 'classification' and 4"),
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"image_size": [32]}, "image_size must be a whole number above 0, or 2 of them"),
        ({"formats": ("ts",)}, "formats must hold 'pt'"),
        ({"formats": ("pt", "trt")}, "formats must hold 'pt' and any of .* got 'pt, trt'"),
        ({"network_config": None}, "expected a dict with _target_"),
        ({"network_config": {"_target_": "lorkd_monai.networks.LoRKDNet"}}, "refers to lorkd_monai.networks.LoRKDNet"),
        ({"network_config": {"_target_": "ResNet", "block": "basic"}}, "could not be built: TypeError"),
        ({"network_config": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1}}, "do not fit"),
        ({"in_channels": 1}, "does not take one input of shape"),
        ({"task": TaskSpec("a/b", 0, {0: "x", 1: "y", 2: "z"})}, "letters, digits.*got 'a/b'; rename the task"),
        ({"task": TaskSpec("a", 0, {0: "x", 1: "y"})}, "gives 3 channels, but the task has 2 classes"),
        ({"task": TaskSpec("a", 0, {0: "x", 1: "y", 3: "z"})}, "class ids of task 'a' must be 0 to n-1"),
    ],
)
def test_bad_arguments(changes, message, make_case, tmp_path):
    with pytest.raises(LoRKDError, match=message):
        make_case("2d_classification").write(tmp_path / "a_classification", **{"formats": ("pt",), **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["experts", "a_segmentation", "a b_classification"])
def test_a_bad_folder_name(name, make_case, tmp_path):
    with pytest.raises(LoRKDError, match="must be named <task>_classification"):
        make_case("2d_classification").write(tmp_path / name)


def test_a_config_of_another_activation_is_found_out(make_case, tmp_path):
    case = make_case("2d_classification")
    config = {**case.arguments["network_config"], "act": "tanh"}
    with pytest.raises(LoRKDError, match="gives another output than the network itself"):
        case.write(tmp_path / "a_classification", network_config=config)


def test_a_network_that_returns_a_tuple_is_refused(make_case, tmp_path):
    shape = {"in_channels": 3, "img_size": [32, 32], "patch_size": [16, 16], "spatial_dims": 2, "num_classes": 3}
    small = {"hidden_size": 12, "mlp_dim": 12, "num_layers": 1, "num_heads": 2, "classification": True}
    config = {"_target_": "ViT", **shape, **small}
    with pytest.raises(LoRKDError, match="returns a tuple.*one tensor"):
        make_case("2d_classification").write(
            tmp_path / "a_classification", network=build_network(config), network_config=config, formats=("pt",)
        )


def test_without_onnx(make_case, tmp_path, monkeypatch, caplog):
    case = make_case("2d_classification")
    monkeypatch.setattr("lorkd_monai.bundle.writer.onnx_is_installed", lambda: False)
    with pytest.raises(LoRKDError, match=r"pip install 'lorkd-monai\[onnx\]'"):
        case.write(tmp_path / "a_classification", formats=("pt", "onnx"))
    folder = case.write(tmp_path / "a_classification")
    assert not (folder / "models" / "model.onnx").exists()
    assert "model.onnx is left out" in caplog.text


def test_a_network_that_cannot_be_scripted_is_traced():
    class Unscriptable(torch.nn.Module):
        def forward(self, x, *more, **named):
            return x * 2

    assert torchscript_of(Unscriptable(), torch.rand(1, 1, 4, 4))[1] == "trace"


def test_expert_name():
    assert expert_name("blood_cell", "classification") == "blood_cell_classification"
    for bad in ("a/b", "..", "a b", "", "é", 3):
        with pytest.raises(LoRKDError, match="a task name becomes the name of its bundle's folder"):
            expert_name(bad, "segmentation")


def test_measure_counts_by_hand():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(32, 5))
    costs = measure(network, (1, 1, 4, 4))
    assert costs["parameters"] == 2 * 9 + 2 + 32 * 5 + 5
    assert costs["macs"] == 16 * 2 * 9 + 32 * 5
    assert costs["latency_ms"] > 0


def test_readme_shows_figures_and_intervals(make_case):
    text = (make_case("2d_classification").folder / "docs" / "README.md").read_text()
    assert "| score | 0.91 | 0.85 to 0.96 | 40 |" in text
    assert "12,345,678" in text
    assert "Not for clinical use" in text


def test_teacher_bundle(tmp_path, monkeypatch):
    import monai.bundle

    tasks = [TaskSpec("a", 0, {0: "no", 1: "yes"}), TaskSpec("b", 1, {0: "x", 1: "$y", 2: "z"})]
    config = {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 5,
        "channels": [4, 8],
        "strides": [2],
    }
    network = build_network(config)
    folder = write_teacher_bundle(
        tmp_path / "teacher", network=network, network_config=config,
        work=Work("segmentation", 2, 1, (16, 16), {task.name: task for task in tasks}),
    )  # fmt: skip
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(names.values()) == ["a: no", "a: yes", "b: x", "b: $y", "b: z"]
    monkeypatch.chdir(tmp_path)
    loaded = monai.bundle.load("teacher", bundle_dir=str(tmp_path), workflow_type="inference", source="github")
    assert all(torch.equal(value.cpu(), network.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(LoRKDError, match="exists already"):
        write_teacher_bundle(
            folder, network=network, network_config=config,
            work=Work("segmentation", 2, 1, (16, 16), {task.name: task for task in tasks}),
        )  # fmt: skip


def test_a_png_is_read_as_rows_and_columns(make_case, tmp_path):
    """What the bundle makes of a PNG file is what training makes of the array of the same image."""
    case = make_case("2d_classification")
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    config = json.loads((case.folder / "configs" / "inference.json").read_text())["preprocessing"]
    image = ConfigParser({"steps": config}).get_parsed_content("steps")({"image": str(tmp_path / "a.png")})["image"]
    assert torch.allclose(image.as_tensor(), torch.from_numpy(array).permute(2, 0, 1) / 255.0, atol=1e-6)
