"""The four training bundles: made from one template, with the properties that MONAI expects."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kinds import BUNDLES, KINDS, SMALL, arguments
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig

from lorkd_monai.bundle import check_bundle
from lorkd_monai.bundle.inert import is_inert
from lorkd_monai.bundle.metadata import strings_of
from lorkd_monai.checkpoints.weights import load_weights
from lorkd_monai.data import make_phantoms
from lorkd_monai.errors import find_lorkd_error
from lorkd_monai.settings import BUNDLE_SETTINGS, check_values


def config_of(kind: str, name: str = "train.yaml") -> dict:
    return yaml.safe_load((BUNDLES / f"lorkd_{kind}" / "configs" / name).read_text())


def make_bundles(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "scripts" / "make_bundles.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_bundles_are_up_to_date(repository):
    done = make_bundles(repository, "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copied(repository, tmp_path):
    """A copy of the bundles and of what makes them."""
    shutil.copytree(repository / "bundles", tmp_path / "bundles", ignore=shutil.ignore_patterns("output", "data"))
    shutil.copytree(repository / "scripts", tmp_path / "scripts")
    shutil.copy(repository / "LICENSE", tmp_path)
    return tmp_path


def test_what_is_not_up_to_date_is_named_and_made_again(copied):
    bundle = copied / "bundles" / "lorkd_3d_segmentation"
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    changed, lost = bundle / "configs" / "train.yaml", bundle / "configs" / "add.yaml"
    changed.write_text(changed.read_text().replace("rank: 4", "rank: 5"))
    lost.unlink()
    done = make_bundles(copied, "--check")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert all(str(path.relative_to(copied)) in done.stderr for path in (changed, lost))
    assert done.stderr.count("lorkd_") == 2
    assert not lost.exists()
    assert make_bundles(copied).returncode == 0
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_change_of_a_template_reaches_all_bundles_and_their_pages(copied):
    template = copied / "scripts" / "bundle_templates" / "configs" / "train.yaml"
    template.write_text(template.read_text().replace("\nrank: 4\n", "\nrank: 5\n"))
    assert make_bundles(copied, "--check").stderr.count("lorkd_") == 8
    assert make_bundles(copied).returncode == 0
    for kind in KINDS:
        bundle = copied / "bundles" / f"lorkd_{kind}"
        assert yaml.safe_load((bundle / "configs" / "train.yaml").read_text())["rank"] == 5
        assert "| `rank` | `5` |" in (bundle / "docs" / "README.md").read_text()


def test_a_key_that_is_not_described_is_named(copied):
    template = copied / "scripts" / "bundle_templates" / "configs" / "train.yaml"
    template.write_text(template.read_text().replace("\nalpha: ", "\nbrand_new: 1\nalpha: "))
    done = make_bundles(copied)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "lorkd_monai/settings.py" in done.stderr
    assert "'brand_new'" in done.stderr


def test_every_description_is_of_a_key_that_exists():
    assert set(BUNDLE_SETTINGS) == {key for kind in KINDS for key in overridable(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_built_without_weights_and_images(kind, tmp_path, monkeypatch):
    """As the model zoo's tools do it, on a bundle that was just unpacked; from any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # `initialize` sets another
    configs = BUNDLES / f"lorkd_{kind}" / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.yaml")}
    verify_net_in_out("network_def", **files, device="cpu")
    workflow = ConfigWorkflow(files["config_file"], files["meta_file"], False, workflow_type="infer")
    workflow.initialize()
    assert workflow.check_properties() == []
    assert len(workflow.dataset) == 0
    with pytest.raises(RuntimeError) as raised:  # MONAI wraps what an expression raises
        workflow.run()
    assert "no trained weights at" in str(find_lorkd_error(raised.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_has_every_property_of_a_bundle(kind, tmp_path, monkeypatch):
    """Its data set is made of a data list, so that it needs one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    data, configs = tmp_path / "data", BUNDLES / f"lorkd_{kind}" / "configs"
    make_phantoms(data, kind[3:], int(kind[0]), num_images=10, image_size=16)
    given = {"dataset_dir": str(data), "output_dir": str(tmp_path / "output"), "transfer_weight": 0}
    small = {key: json.loads(value) if value[0] in "[0123456789" else value for key, value in SMALL[kind].items()
             if key != "formats"}  # fmt: skip
    workflow = ConfigWorkflow(
        str(configs / "train.yaml"), str(configs / "metadata.json"), False, workflow_type="train", **small, **given
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    # Nothing is transferred: no teacher is looked for.
    assert workflow.parser.get_parsed_content("train#export").parent["teacher"]() == {"name": "none"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "properties"), [("train.yaml", TrainProperties), ("inference.yaml", InferProperties)])
def test_required_properties(kind, name, properties):
    """Whether they can be made, the runs of each kind show; here, that MONAI finds them by their ids."""
    config = config_of(kind, name)
    for wanted in properties.values():
        part = config
        if wanted[BundleProperty.REQUIRED]:
            for key in wanted[BundlePropertyConfig.ID].split("::"):
                assert key in part, wanted[BundlePropertyConfig.ID]
                part = part[key]


@pytest.mark.parametrize("kind", KINDS)
def test_metadata(kind, shared):
    jsonschema = pytest.importorskip("jsonschema")
    bundle = BUNDLES / f"lorkd_{kind}"
    text = (bundle / "configs" / "metadata.json").read_text()
    metadata = json.loads(text)
    jsonschema.validate(metadata, json.loads((shared / "schema" / "meta_schema_20240725.json").read_text()))
    assert metadata["version"] in metadata["changelog"]
    assert metadata["name"]
    assert text.strip() == json.dumps(metadata, indent=4, ensure_ascii=False)
    assert all(is_inert(part) for part in strings_of(metadata))
    config = config_of(kind)
    image = metadata["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == config["in_channels"]
    size, dims = config["image_size"], int(kind[0])
    assert image["spatial_shape"] == (size if isinstance(size, list) else [size] * dims)
    for side, name in (("inputs", "image"), ("outputs", "pred")):
        tensor = metadata["network_data_format"][side][name]
        assert len(tensor["channel_def"]) == tensor["num_channels"]


# What a user overrides: every key above the networks that is a plain value, or a place.
PLACES = ("bundle_root", "dataset_dir", "output_dir", "teacher_bundle", "device")


def overridable(kind: str) -> dict[str, object]:
    config = config_of(kind)
    keys = list(config)[1 : list(config).index("initialize")]
    return {key: config[key] for key in keys}


@pytest.mark.parametrize("kind", KINDS)
def test_readme_lists_every_key_with_its_default(kind):
    text = (BUNDLES / f"lorkd_{kind}" / "docs" / "README.md").read_text()
    table = text.split("## Settings")[1].split("## ")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    for key, default in overridable(kind).items():
        assert f"`{key}`" in rows, key
        if key not in (*PLACES, "backbone", "teacher_backbone"):
            said = yaml.safe_load(rows[f"`{key}`"].split("|")[2].strip().strip("`"))
            assert said == default, key
    keys = {row.strip("`") for row in rows}
    assert keys == set(overridable(kind))
    for run_id in ("pretraining", "training", "evaluating"):
        assert f"`{run_id}`" in text
    assert "not for clinical use" in text.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_and_choice_has_a_rule_and_is_checked(kind):
    """A key without a rule is a path, a list of names or patterns, or a config."""
    call = next(step for step in config_of(kind)["initialize"] if "check_settings" in step)
    ruled = {key for key in overridable(kind) if BUNDLE_SETTINGS[key].rule is not None}
    assert set(re.findall(r"(\w+)=@(\w+)", call)) == {(key, key) for key in ruled}
    check_values({key: value for key, value in overridable(kind).items() if key in ruled}, BUNDLE_SETTINGS)
    for key in overridable(kind).keys() - ruled:
        default = overridable(kind)[key]
        assert default is None or isinstance(default, dict) or key in PLACES or key == "bundle_root", key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2d_classification", "3d_segmentation"])
def test_two_processes(kind, launch, tmp_path):
    """Training and pretraining by torchrun on the CPU: each process with its own part of the images."""
    data, output = tmp_path / "data", tmp_path / "output"
    make_phantoms(data, kind[3:], int(kind[0]), num_images=10, image_size=24 if kind == "2d_classification" else 16)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # fmt: skip
    for run_id in ("pretraining", "training"):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "-m", "monai.bundle"]  # fmt: skip
        given = arguments(kind, run_id, data, output, config="train.yaml,multi_gpu_train.yaml", batch_size=3)
        done = subprocess.run([*command, *given], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.count("Key metric: ") == 1  # the second process keeps quiet
    for expert in (output / "experts").iterdir():
        assert check_bundle(expert, thorough=False) == []
    weights = load_weights(output / "training" / "model.pt")
    assert not any(key.startswith("module.") for key in weights)
    assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())
