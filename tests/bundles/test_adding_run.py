"""Run id `adding`: a new expert for a trained decomposition, and nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from kinds import KINDS, run_kind
from kinds import arguments as bundle_arguments
from test_resume import KILL_IN_EPOCH, same

from lorkd_monai.bundle import check_bundle, export_experts
from lorkd_monai.checkpoints.weights import load_decomposition, load_weights
from lorkd_monai.data import make_phantoms

KIND = "2d_classification"
OVERLAY = "train.yaml,add.yaml"


def make_lists(folder: Path, kind: str) -> tuple[Path, Path, list[str]]:
    """Phantoms with two lists beside that of all tasks: the last task alone, and the others; and the tasks."""
    size = {"2d_classification": 24, "3d_classification": 24, "2d_segmentation": 32, "3d_segmentation": 16}[kind]
    make_phantoms(folder, kind[3:], int(kind[0]), num_images=12, image_size=size)
    content = json.loads((folder / "dataset.json").read_text())
    names = list(content["tasks"])
    files = []
    for file, own in (("old.json", names[:-1]), ("new.json", names[-1:])):
        part = {**content, "tasks": {n: t for n, t in content["tasks"].items() if n in own}}
        for split in ("training", "validation", "test"):
            part[split] = [item for item in content.get(split, []) if item["task"] in own]
        (folder / file).write_text(json.dumps(part))
        files.append(folder / file)
    return files[0], files[1], names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [k if k == KIND else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_new_task_leaves_everything_as_it_was(kind, launch, tmp_path):
    old, new, names = make_lists(tmp_path / "data", kind)
    output = tmp_path / "output"
    run_kind(launch, kind, "training", old, output, transfer_weight=0)
    before = contents(output)
    run_kind(launch, kind, "adding", new, output, config=OVERLAY, rank=2)
    after = contents(output)
    assert {name: after[name] for name in before} == before  # experts, checkpoints, figures
    expert = output / "experts" / f"{names[-1]}_{kind[3:]}"
    assert sorted(p.name for p in (output / "experts").iterdir()) == sorted(f"{n}_{kind[3:]}" for n in names)
    assert check_bundle(expert, thorough=False) == []

    first = load_decomposition(output / "training" / "model.pt").eval()
    net = load_decomposition(output / "adding" / "model.pt").eval()
    assert net.tasks == names
    assert net.spec()["rank"] == {**dict.fromkeys(names[:-1], 4), names[-1]: 2}
    size = net.info["image_size"]
    x = torch.rand(2, net.info["in_channels"], *((size,) * net.info["spatial_dims"] if isinstance(size, int) else size))
    for name in first.tasks:
        with torch.no_grad():
            classes = first.num_classes[name]
            assert torch.equal(net(x, name)[:, :classes], first(x, name)[:, :classes])
    again = export_experts(net, tmp_path / "again", first.tasks, formats=["pt"])
    for folder in again:
        assert (folder / "models" / "model.pt").read_bytes() == before[f"experts/{folder.name}/models/model.pt"]
    assert any(v.abs().max() > 0 for k, v in net.expert_state_dict(names[-1]).items() if k.endswith("lora_B"))
    written = load_weights(expert / "models" / "model.pt")
    extracted = net.extract(names[-1]).state_dict()
    assert all(torch.equal(written[key], extracted[key]) for key in extracted)

    done = run_kind(
        launch, kind, "evaluating", tmp_path / "data", output, config=OVERLAY, rank=2, new_tasks=[names[-1]]
    )
    assert "mean of tasks" in done.out
    assert set(json.loads((output / "adding" / "evaluation.json").read_text())["experts"]) == set(names)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    return make_lists(tmp_path_factory.mktemp("lists"), KIND)


@pytest.fixture(scope="module")
def decomposed(lists, launch, tmp_path_factory) -> Path:
    """The output folder of a training on all tasks but the last."""
    output = tmp_path_factory.mktemp("decomposed") / "output"
    run_kind(launch, KIND, "training", lists[0], output, transfer_weight=0)
    return output


@pytest.fixture
def adding(launch):
    """Run `adding`, whatever comes of it."""

    def run(data, output, before="", **options):
        given = bundle_arguments(KIND, "adding", data, output, config=OVERLAY, **options)
        return launch("monai.bundle", *given, before=before)

    return run


def test_a_killed_run_ends_as_a_whole_one(adding, lists, decomposed, tmp_path):
    one = Path(shutil.copytree(decomposed, tmp_path / "one"))
    other = Path(shutil.copytree(decomposed, tmp_path / "other"))
    done = adding(lists[1], one, max_epochs=3)
    assert done.code == 0, done.err
    length = int(torch.load(one / "adding" / "last.pt", weights_only=True)["objects"]["lr_scheduler"]["last_epoch"])
    steps = torch.load(one / "adding" / "last.pt", weights_only=True)["objects"]["optimizer"]["state"]
    iteration = int(next(iter(steps.values()))["step"]) // length * 2 + 1
    done = adding(lists[1], other, before=KILL_IN_EPOCH.format(iteration=iteration), max_epochs=3)
    assert done.code == -signal.SIGKILL
    done = adding(lists[1], other, max_epochs=3)
    assert done.code == 0, done.err
    assert "resuming after epoch 2 of 3" in done.out
    name = f"{lists[2][-1]}_classification"
    for file in ("adding/model.pt", f"experts/{name}/models/model.pt"):
        assert same(one / file, other / file)


def test_another_network_or_task_is_no_resumption(adding, lists, decomposed, tmp_path):
    output = Path(shutil.copytree(decomposed, tmp_path / "output"))
    assert adding(lists[1], output, rank=2).code == 0
    done = adding(lists[1], output, rank=3, overwrite=True)
    assert done.code == 1
    assert re.search(r"belongs to a run with other settings: new_tasks: \w+ was 2, now 3\.", done.message)


def test_a_teacher_of_the_new_task_alone(adding, launch, lists, decomposed, tmp_path):
    output = Path(shutil.copytree(decomposed, tmp_path / "output"))
    run_kind(launch, KIND, "pretraining", lists[1], tmp_path / "other")
    done = adding(lists[1], output, teacher_bundle=tmp_path / "other" / "teacher")
    assert done.code == 0, done.err
    assert "transfer: " in done.out


def test_a_task_is_trained_anew(adding, lists, decomposed, tmp_path):
    output = Path(shutil.copytree(decomposed, tmp_path / "output"))
    name, *others = lists[2][:-1]
    before = contents(output)
    done = adding(lists[0], output, new_tasks=[name], replace=True)
    assert done.code == 0, done.err
    after = contents(output)
    changed = {file for file in before if after[file] != before[file]}
    assert f"experts/{name}_classification/models/model.pt" in changed
    assert all(file.startswith(f"experts/{name}_classification/") for file in changed)
    first = load_decomposition(output / "training" / "model.pt").eval()
    net = load_decomposition(output / "adding" / "model.pt").eval()
    assert net.tasks == [*others, name]
    assert list(net.info["tasks"]) == net.tasks
    assert [task["index"] for task in net.info["tasks"].values()] == list(range(len(net.tasks)))
    for other in others:
        plain, own = first.extract(other).state_dict(), net.extract(other).state_dict()
        assert all(torch.equal(plain[key], own[key]) for key in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tasks": "['{old}']"}, "error: task '{old}' exists already in .* say --replace True"),
        ({"new_tasks": "['spine']"}, "error: new_tasks: the data list .* has no task 'spine'; its tasks are"),
        ({"trained": "{folder}/no.pt"}, "error: no trained decomposition at .*no.pt: run `training`"),
        ({"replace": True}, "error: replace: name the tasks to train anew"),
        ({"transfer_weight": 1}, "error: transfer_weight is 1, and there is no teacher"),
        ({"image_size": 20}, "error: image_size is 20, but the decomposition .* was made for 16"),
    ],
)
def test_what_is_refused(options, message, adding, lists, decomposed, tmp_path):
    old = lists[2][0]
    given = {k: v.format(old=old, folder=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    before = contents(decomposed)
    done = adding(lists[1].with_name("dataset.json"), decomposed, **given)
    assert done.code == 1
    assert done.message.count("\n") == 0
    assert re.search(message.format(old=old), done.message), done.message
    assert contents(decomposed).keys() - before.keys() == set()
