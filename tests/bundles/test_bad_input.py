"""What a user can get wrong: each ends in one plain message on standard error, and a log without a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorkd_monai.locks import claimed


def refused(run: object, *words: str) -> None:
    """The run ended with one message ``error: …`` that holds these words, and nothing else."""
    assert run.code == 1, run.out[-2000:] + run.err[-2000:]
    assert run.message.startswith("error: "), run.message
    assert "Traceback" not in run.out + run.err
    assert run.out.count("terminating") == 0
    for word in words:
        assert word in run.message


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may spoil."""
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


def spoil(data: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((data / "dataset.json").read_text())
    change(content)
    (data / "dataset.json").write_text(json.dumps(content))


def empty(content: dict) -> None:
    content["training"] = []
    content["tasks"] = {name: task for name, task in content["tasks"].items() if "npz" not in task}


def rename(content: dict) -> None:
    content["tasks"]["../ct.x"] = content["tasks"].pop("ct")


DATA_FAULTS = {
    "empty": (empty, "training"),
    "missing": (lambda c: c["training"][0].update(image="ct/images/none.png"), "none.png"),
    "unknown task": (lambda c: c["training"][0].update(task="breast"), "unknown task 'breast'"),
    "label": (lambda c: c["training"][0].update(label=7), "7"),
    "two splits": (lambda c: c["test"].append(c["training"][0]), "training"),
    "task name": (rename, "'../ct.x'"),
}


def no_labels(content: dict) -> None:
    for item in content["training"][::3]:
        item["label"] = None


def no_files_to_test(content: dict) -> None:
    """No test images: those of an ``.npz`` file go with their task."""
    content["tasks"] = {name: task for name, task in content["tasks"].items() if "npz" not in task}
    content["test"] = []


def test_images_without_labels_need_a_teacher(bundle_run, data, tmp_path):
    spoil(data, no_labels)
    done = bundle_run("training", data, tmp_path / "out", transfer_weight=0)
    refused(done, "have no label and learn from a teacher alone", "--teacher_bundle")
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_teacher_needs_labels_of_every_task(bundle_run, data, tmp_path):
    def nothing_known(content: dict) -> None:
        for item in content["training"]:
            item["label"] = -1 if item["task"] == "ct" else item["label"]

    spoil(data, nothing_known)
    done = bundle_run("pretraining", data, tmp_path / "out")
    refused(done, "task 'ct'", "has no training image with a label", "--teacher_bundle")


def test_images_without_labels_learn_from_the_teacher(bundle_run, data, tmp_path):
    spoil(data, no_labels)
    for run_id in ("pretraining", "training"):
        done = bundle_run(run_id, data, tmp_path / "out", max_epochs=1)
        assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    page = (tmp_path / "out" / "experts" / "ct_classification" / "docs" / "README.md").read_text()
    assert "training images without a label" in page


def test_lists_without_test_images(bundle_run, data, tmp_path):
    spoil(data, no_files_to_test)
    out = tmp_path / "out"
    for run_id in ("pretraining", "training"):
        done = bundle_run(run_id, data, out, max_epochs=1)
        assert done.code == 0, done.out[-2000:] + done.err[-2000:]
        assert "the list has no test images: experts are written without metrics" in done.out
    expert = out / "experts" / "ct_classification"
    assert "No metrics were measured when this bundle was written" in (expert / "docs" / "README.md").read_text()
    metadata = json.loads((expert / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"] == {} and "No metrics were measured" in metadata["description"]
    refused(bundle_run("evaluating", data, out), "has no test images with labels", "--dataset_dir")


def test_lists_without_validation_images(bundle_run, data, tmp_path):
    spoil(data, lambda content: content.update(validation=[]))
    spoil(data, no_files_to_test)
    done = bundle_run("training", data, tmp_path / "out", transfer_weight=0)
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    assert "the list has no validation images: the weights of the last epoch are kept" in done.out
    state = torch.load(tmp_path / "out" / "training" / "last.pt", weights_only=True)
    assert state["best"] == {"epoch": 2}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_bad_data_lists(fault, bundle_run, data, tmp_path):
    change, words = DATA_FAULTS[fault]
    spoil(data, change)
    refused(bundle_run("training", data, tmp_path / "out", transfer_weight=0), str(data / "dataset.json"), words)
    assert not (tmp_path / "out" / "experts").exists()


def test_no_data(bundle_run, tmp_path):
    refused(bundle_run("training", tmp_path / "nowhere", tmp_path / "out"), str(tmp_path / "nowhere"))


def test_list_that_is_no_json(bundle_run, data, tmp_path):
    (data / "dataset.json").write_text('{"tasks": ')
    refused(bundle_run("training", data, tmp_path / "out", transfer_weight=0), "dataset.json")


def test_corrupt_image(bundle_run, data, tmp_path):
    image = sorted((data / "ct" / "images").glob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:60])
    refused(bundle_run("training", data, tmp_path / "out", transfer_weight=0), image.name)


SETTINGS = {
    "batch_size": (0, "a"),
    "image_size": (0, -4, "big"),
    "max_epochs": (0, 1.5),
    "rank": (-1, "abc"),
    "layout": ("other",),
    "norm": ("other",),
    "sampling": ("other",),
    "learning_rate": (-1, "fast"),
    "temperature": (0,),
    "transfer_weight": (-1, "much"),
    "ema": (1, "much"),
    "alpha": ("x",),
    "seed": (-1, "abc"),
    "accumulation_steps": (0,),
    "amp": ("maybe",),
    "overwrite": ("false",),
    "formats": ("['exe']",),
    "flip_axes": ("[7]", "up"),
    "include": ("['nothing*']",),
    "backbone__layers": ("[1]",),
    "in_channels": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in SETTINGS.items() for v in values])
def test_bad_settings(name, value, bundle_run, phantoms, tmp_path):
    done = bundle_run("training", phantoms, tmp_path / "out", **{"transfer_weight": 0, name: value})
    refused(done, name.split("_")[0])
    assert not (tmp_path / "out" / "training" / "last.pt").exists()


def test_several_bad_settings_in_one_message(bundle_run, phantoms, tmp_path):
    done = bundle_run("training", phantoms, tmp_path / "out", batch_size=0, max_epochs="no", seed=-1)
    refused(done, "batch_size must be a whole number of at least 1, got 0", "max_epochs", "seed")


def test_no_teacher(bundle_run, phantoms, tmp_path):
    refused(bundle_run("training", phantoms, tmp_path / "out"), "no teacher at", "pretraining", "--teacher_bundle")


def test_loss_that_is_not_finite(bundle_run, phantoms, tmp_path):
    done = bundle_run("training", phantoms, tmp_path / "out", transfer_weight=0, learning_rate=1e30)
    refused(done, "the loss is not finite", "learning rate")
    assert not (tmp_path / "out" / "experts").exists()


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's output that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "output"))


def test_existing_experts_are_kept(bundle_run, phantoms, output):
    before = (output / "experts" / "ct_classification" / "models" / "model.pt").stat().st_mtime_ns
    (output / "training" / "last.pt").unlink()
    done = bundle_run("training", phantoms, output)
    refused(done, "already holds the experts", "ct_classification", "--overwrite True")
    assert (output / "experts" / "ct_classification" / "models" / "model.pt").stat().st_mtime_ns == before


def test_existing_teacher_is_kept(bundle_run, phantoms, output):
    refused(bundle_run("pretraining", phantoms, output), "exists already", "--overwrite True")


def test_evaluating_before_training(bundle_run, phantoms, tmp_path):
    refused(bundle_run("evaluating", phantoms, tmp_path / "out"), "no trained weights", "`training`")


def test_evaluating_another_decomposition(bundle_run, phantoms, output):
    refused(bundle_run("evaluating", phantoms, output, rank=2), "another decomposition", "rank")


def test_resume_with_other_ranks(bundle_run, phantoms, output):
    shutil.rmtree(output / "experts")
    refused(bundle_run("training", phantoms, output, rank=2), "last.pt", "rank", "--output_dir")


def test_resume_with_other_tasks(bundle_run, data, output):
    shutil.rmtree(output / "experts")
    spoil(data, lambda c: c["tasks"].pop("ultrasound"))
    refused(bundle_run("training", data, output), "last.pt", "tasks", "ultrasound", "--output_dir")
    shutil.rmtree(output / "teacher")
    refused(bundle_run("pretraining", data, output), "last.pt", "tasks", "ultrasound", "--output_dir")


def test_resume_with_other_settings(bundle_run, phantoms, output):
    done = bundle_run("training", phantoms, output, seed=5, overwrite=True)
    refused(done, "other settings: seed was 0, now 5")


def rename_a_class(content):
    content["tasks"]["ct"]["labels"]["0"] = "something else"


def turn_classes_round(content):
    names = list(content["tasks"]["ct"]["labels"].values())
    content["tasks"]["ct"]["labels"] = {str(i): name for i, name in enumerate(reversed(names))}


def move_an_image(content):
    own = next(item for item in content["training"] if item["task"] == "ct")
    content["training"].remove(own)
    content["test"].append(own)


def relabel_an_image(content):
    own = next(item for item in content["training"] if item["task"] == "ct")
    own["label"] = 1 - min(own["label"], 1)


def state_an_intensity(content):
    content["tasks"]["ct"]["intensity"] = {"range": [0, 1000]}


LISTS = {
    "class name": (rename_a_class, "something else"),
    "class order": (turn_classes_round, "classes was"),
    "intensity": (state_an_intensity, "1000"),
    "split": (move_an_image, "digest of the test images and labels"),
    "label": (relabel_an_image, "digest of the training images and labels"),
}


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", LISTS)
def test_resume_with_a_list_that_means_something_else(case, bundle_run, data, output):
    change, words = LISTS[case]
    spoil(data, change)
    for run_id, folder in (("training", "experts"), ("pretraining", "teacher")):
        shutil.rmtree(output / folder)
        before = files_of(output)
        more = {"transfer_weight": 0} if run_id == "training" else {}
        done = bundle_run(run_id, data, output, max_epochs=5, pretrain_epochs=5, **more)
        refused(done, "last.pt", "other settings", words, "--output_dir")
        assert files_of(output) == before


@pytest.mark.parametrize("case", ["class name", "class order", "intensity"])
def test_evaluating_under_another_meaning(case, bundle_run, data, output):
    change, words = LISTS[case]
    spoil(data, change)
    refused(bundle_run("evaluating", data, output), "does not mean what", "training/model.pt", words, "task 'ct'")
    assert not (output / "figures.json").exists()


def test_evaluating_on_other_images_is_said(bundle_run, data, output):
    shutil.rmtree(output / "teacher")
    line = "other test images"
    assert line not in bundle_run("evaluating", data, output).out
    spoil(data, move_an_image)
    done = bundle_run("evaluating", data, output)
    assert done.code == 0 and line in done.out


def test_a_second_run_leaves_the_first_alone(bundle_run, phantoms, output):
    with claimed(output / "training", ""):
        before = files_of(output)
        done = bundle_run("training", phantoms, output, overwrite=True)
        refused(done, str(output / "training"), "in use", "--output_dir")
        assert files_of(output) == before
        assert bundle_run("evaluating", phantoms, output).code == 0
    assert bundle_run("training", phantoms, output, overwrite=True).code == 0
    assert not list(output.rglob("*.lock"))


@pytest.mark.parametrize("run_id", ["pretraining", "training", "evaluating"])
def test_keys_and_paths_of_the_call(run_id, bundle_run, phantoms, tmp_path):
    refused(bundle_run(run_id, phantoms, tmp_path / "out", max_epoch=3), "--max_epoch (did you mean --max_epochs?)")
    refused(bundle_run(run_id, phantoms, tmp_path / "out", train__max_epoch=3), "--train#max_epoch (did you mean")
    refused(bundle_run(run_id, phantoms, 2026), "--output_dir: expected a path, got 2026; write ./2026")
    refused(bundle_run(run_id, 2025, tmp_path / "out"), "--dataset_dir: expected a path, got 2025")
    refused(bundle_run(run_id, phantoms, tmp_path / "out", teacher_bundle=7), "--teacher_bundle: expected a path")
    assert list(tmp_path.iterdir()) == []


def test_resume_from_garbage(bundle_run, phantoms, output):
    shutil.rmtree(output / "experts")
    last = output / "training" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    refused(bundle_run("training", phantoms, output), "last.pt can't be resumed from", "Delete it")


def test_teacher_weights_that_are_no_state_dict(bundle_run, phantoms, output):
    shutil.rmtree(output / "experts")
    torch.save(torch.nn.Linear(2, 2), output / "teacher" / "models" / "model.pt")
    refused(bundle_run("training", phantoms, output), "model.pt", "state_dict")
    torch.save([1, 2], output / "teacher" / "models" / "model.pt")
    refused(bundle_run("training", phantoms, output), "model.pt", "state dict")


def test_teacher_that_does_not_fit(bundle_run, data, output):
    shutil.rmtree(output / "experts")
    shutil.rmtree(output / "training")

    def other_classes(content):
        for task in content["tasks"].values():
            task["labels"] = {key: f"other {key}" for key in task["labels"]}

    spoil(data, other_classes)
    refused(bundle_run("training", data, output), "the teacher knows no class of any task", "other 0")


def test_teacher_folder_that_is_no_bundle(bundle_run, phantoms, tmp_path):
    done = bundle_run("training", phantoms, tmp_path / "out", teacher_bundle=tmp_path)
    refused(done, f"{tmp_path} is no MONAI bundle")
