"""Keys that a bundle is called with: those that nothing reads are refused, all others pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow

from lorkd_monai.bundle import check_overrides
from lorkd_monai.errors import LoRKDError, find_lorkd_error

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CONFIG = {
    "imports": ["$from lorkd_monai import bundle"],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/output'",
    "max_epochs": 3,
    "batch_size": 4,
    "note": "nobody reads this, but it stands in the file",
    "train": {"folder": "$@output_dir + '/training'", "trainer": {"_target_": "torch.nn.Linear", "in_features": 1}},
    "key_metric": {"dice": 1},
    "initialize": ["$bundle.check_overrides()"],
    "run": ["$@max_epochs * @batch_size", "$@key_metric"],
}


@pytest.fixture
def call(tmp_path):
    """``call(**overrides)``: initialise a workflow of a small bundle."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    file = tmp_path / "configs" / "train.json"
    file.write_text(json.dumps(CONFIG))
    (tmp_path / "configs" / "add.json").write_text(json.dumps({"trained": "x", "replace": False}))

    def run(config_file=file, **overrides):
        try:
            return create_workflow(config_file=config_file, logging_file=False, **overrides)
        except Exception as error:
            raise find_lorkd_error(error) or error from None

    return run


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_epoch", 3, r"reads --max_epoch \(did you mean --max_epochs\?\)"),
        ("batchsize", 3, r"--batchsize \(did you mean --batch_size\?\)"),
        ("train#max_epoch", 3, r"--train#max_epoch \(did you mean --max_epochs\?\)"),
        ("train::folders", "x", r"--train#folders \(did you mean --train#folder\?\)"),
        ("Max_Epochs", 3, r"--Max_Epochs"),
        ("wavelength", 7, r"reads --wavelength\. docs/README.md"),
        ("trained", "y", "--trained"),  # of another config file
        ("max_epoch", "$@batch_size", "--max_epoch "),
        ("max_epoch", {"max_epochs": 1}, "--max_epoch "),
    ],
)
def test_a_key_that_nothing_reads(key, value, words, call):
    with pytest.raises(LoRKDError, match=words):
        call(**{key: value})


def test_all_unknown_keys_in_one_message(call):
    with pytest.raises(LoRKDError, match=r"--max_epoch .* and --batchsize "):
        call(max_epoch=3, batchsize=4)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_epochs": 1, "note": "other"},
        {"train#trainer#bias": False, "train#trainer::out_features": 3},
        {"train#trainer": {"_target_": "torch.nn.ReLU", "inplace": True}},
        {"key_metric#surface": 2},
        {"half": 2, "batch_size": "$@half * 2"},
        {"size": {"small": 1}, "max_epochs": "@size#small"},
        {"run_id": "run", "meta_file": None, "workflow_type": "train"},
        {"experiment_name": "mine", "run_name": "first"},
        {"run_id": "mine", "mine": ["$1"]},
    ],
)
def test_keys_that_are_read(overrides, call):
    call(**overrides)


def test_keys_of_files(call, tmp_path):
    train, more = tmp_path / "configs" / "train.json", tmp_path / "my.yaml"
    more.write_text("max_epochs: 5\nhalf: 2\nbatch_size: $@half * 2\n")
    call([str(train), str(more)])
    more.write_text("max_epoch: 5\n")
    with pytest.raises(LoRKDError, match="--max_epoch "):
        call([str(train), str(more)])
    call([str(train), str(train.with_name("add.json"))], trained="y")
    arguments = tmp_path / "args.yaml"
    arguments.write_text("batchsize: 5\n")
    with pytest.raises(LoRKDError, match="--batchsize "):
        call(args_file=str(arguments))


@pytest.mark.parametrize("value", [2025, 20.5, True, ("a", "b"), ""])
@pytest.mark.parametrize("key", ["bundle_root", "output_dir"])
def test_paths_that_are_none(key, value, call):
    with pytest.raises(LoRKDError, match=rf"--{key}: expected a path, got"):
        call(**{key: value})


def test_nothing_is_checked_outside_a_workflow():
    check_overrides()
    assert (
        ConfigParser({"a": "$__import__('lorkd_monai.bundle').bundle.check_overrides()"}).get_parsed_content("a")
        is None
    )


@pytest.mark.parametrize("name", sorted(path.name for path in BUNDLES.iterdir()))
@pytest.mark.parametrize("overlay", ["", "add", "multi_gpu_train", "evaluate", "inference"])
def test_the_training_bundles_themselves(name, overlay):
    configs = BUNDLES / name / "configs"
    files = ["inference"] if overlay == "inference" else [file for file in ("train", overlay) if file]
    files = [str(configs / f"{file}.yaml") for file in files]
    more = {} if overlay == "inference" else {"train#trainer#val_handlers": None}
    workflow = ConfigWorkflow(files, logging_file=False, initialize="$bundle.check_overrides()", **more)
    workflow.initialize()
    workflow = ConfigWorkflow(files, logging_file=False, initialize="$bundle.check_overrides()", output_dirs="x")
    with pytest.raises(Exception, match="check_overrides") as caught:
        workflow.initialize()
    assert "--output_dirs (did you mean --output_dir?)" in str(find_lorkd_error(caught.value))
