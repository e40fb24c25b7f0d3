"""Transfer: what a decomposition is worth to a task that it has never seen.

Each task in turn is held out. A teacher and a decomposition are trained on the others; then three networks are trained
on the held-out task alone: a student from scratch, the nearest expert, and the teacher.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study.agreement import agree_on_settings
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.methods import Method, kept_images_of
from lorkd_monai.study.models import build_student, members_of
from lorkd_monai.study.plan import PlannedRun, plan_runs, run_study
from lorkd_monai.study.runs import Workbench
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.study.students import Trained, draws_of
from lorkd_monai.study.subsets import Part
from lorkd_monai.study.training import fit

__all__ = ["STARTS", "nearest_task", "run_transfer", "the_decomposition"]

STARTS = {
    "from_scratch": Method("from_scratch", "stl", False, "a student from scratch"),
    "from_expert": Method("from_expert", "lorkd", False, "the nearest expert of a decomposition, fine-tuned"),
    "from_teacher": Method("from_teacher", "teacher_tuned", False, "the foundation model, fine-tuned"),
}
_IMAGES = 64  # of each task, to find the nearest


@torch.no_grad()
def nearest_task(network: LoRKDNet, known: Workbench, unseen: Part) -> tuple[str, dict[str, float]]:
    """The task whose expert's features differ least between its own images and the unseen ones, and all distances.

    For the distance of a task its expert computes pooled features of the task's own training images and of the unseen
    ones. The difference of the two means is divided by the standard deviation over the own images, feature by feature;
    the distance is the root mean square over the features.

    Args:
        network: the decomposition.
        known: with the training images of its tasks.
        unseen: training images of the new task; no label is looked at.
    """
    network = network.eval()
    device = next(network.parameters()).device

    def features(dataset: Any, items: Sequence[int], task: int) -> torch.Tensor:
        rows = []
        for i in items:
            image = dataset[i]["image"][None].to(device)
            rows.append(network(image, task, return_features=True)[1])
        return torch.cat(rows).double()

    new = torch.linspace(0, len(unseen) - 1, min(_IMAGES, len(unseen))).long().tolist()
    distances = {}
    for index, name in enumerate(network.tasks):
        own = [i for i, task in enumerate(known.training.task_of_item) if task == index]
        chosen = [own[i] for i in torch.linspace(0, len(own) - 1, min(_IMAGES, len(own))).long().tolist()]
        at_home, abroad = features(known.training, chosen, index), features(unseen, new, index)
        spread = at_home.std(0).clamp_min(1e-6)
        distances[name] = float(((abroad.mean(0) - at_home.mean(0)) / spread).square().mean().sqrt())
    return min(distances, key=lambda name: distances[name]), distances


def run_transfer(
    folder: str | os.PathLike,
    data: DataList,
    common: StudySettings,
    runs: Sequence[PlannedRun],
    held_out: Sequence[str],
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Hold out each of some tasks, and train on it from three starts; what is done already is not done again.

    Args:
        folder: of the study; ``unseen_<number of the task>`` in it is a study of each held-out task, and ``before`` in
            that one the study of the others.
        data: the data list.
        common: settings of all runs.
        runs: as `plan_runs` gives them for the one decomposition that gives the experts; a run's setting (``"few10"``,
            ``"full"``) is the part of the unseen task's training images that is used.
        held_out: names of tasks.
        device: where to train.
        say: is told what happens.

    Returns:
        The folders of the held-out tasks' studies.

    Raises:
        LoRKDError: an unknown task, one without a score, fewer than two tasks left, methods other than one
            decomposition.
    """
    decomposition = the_decomposition(runs)
    unequal = [run.setting for run in runs if kept_images_of(run.setting)]
    if unequal:
        raise LoRKDError(
            f"unseen: settings are full and few10, few30, …, not {unequal[0]}: one task alone is trained on"
        )
    unknown = [name for name in held_out if name not in data.tasks]
    if unknown:
        raise LoRKDError(f"unseen: unknown task {unknown[0]!r}; the tasks are {', '.join(data.tasks)}")
    if len(data.tasks) < 3:
        raise LoRKDError(f"unseen: with one task held out two must be left, {data.name!r} has {len(data.tasks)}")
    unscored = [name for name in held_out if name not in data.scored]
    if unscored:
        raise LoRKDError(f'unseen: task {unscored[0]!r} says "score": false in the data list, and has no score')
    without = [name for name in held_out if not data.counts()[name]["test"]]
    if without:
        raise LoRKDError(f"unseen: task {without[0]!r} has no test images; name the tasks to hold out one by one")
    teacher = Method("teacher", "teacher", False, "the foundation model of the other tasks")
    before_runs = plan_runs([teacher, decomposition], ["full"], [run.seed for run in runs])
    folders = []
    for name in held_out:
        place = Path(folder) / f"unseen_{data.tasks[name].index}"
        rest, own = data.only(*(task for task in data.tasks if task != name)), data.only(name)
        budget = common.changed(
            {
                "images_per_epoch": draws_of(data, common, [name]),
                "batch_size": common.images_of_one_task,
                "tasks_per_batch": None,
            }
        )
        origin = {"decomposition": decomposition.name, "settings of the decomposition": dict(decomposition.changes)}
        if place.exists():  # refused before anything is trained
            agree_on_settings(place, own, budget, origin)
        run_study(
            place / "before", rest, common, before_runs, device, keep_weights=True,
            say=lambda line, name=name: say(f"{name} held out: {line}"),
        )  # fmt: skip
        agree_on_settings(place, own, budget, origin)
        todo = [(start, run) for run in runs for start in STARTS.values()]
        todo = [(start, run) for start, run in todo if not RunFile(place, run.setting, start.name, run.seed).done]
        if todo:
            bench = Workbench(place, own, budget, device)
            before = Workbench(place / "before", rest, common, device)
        for start, run in todo:
            bench.record(start, run.setting, run.seed, partial(_fine_tune, start, run, bench, before))
            mean = RunFile(place, run.setting, start.name, run.seed).read()["mean"]
            say(f"{name} held out, {run.setting} {start.name} seed {run.seed}: test {mean:.3f}")
        folders.append(place)
    return folders


def the_decomposition(runs: Sequence[PlannedRun]) -> Method:
    """The one method of runs, which must be a decomposition.

    Raises:
        LoRKDError: there are several methods, or it is no decomposition.
    """
    methods = {run.method.name: run.method for run in runs}
    experts = [method for method in methods.values() if method.family == "lorkd"]
    if len(experts) != 1 or len(methods) != 1:
        raise LoRKDError(f"unseen: expected one decomposition among the methods, got {', '.join(methods)}")
    return experts[0]


def _fine_tune(start: Method, run: PlannedRun, bench: Workbench, before: Workbench, labelled: list[bool]) -> Trained:
    """Train on the held-out task of ``bench`` from what the runs of the other tasks, ``before``, have left."""
    own, seed = bench.data, run.seed
    part = Part(bench.training, own.tasks, labelled, drop_unlabelled=True)
    notes: dict[str, Any] = {}
    if start.name == "from_scratch":
        network = build_student(bench.settings, own, False, seed)
    elif start.name == "from_teacher":
        network = _with_new_head(members_of(before.foundation(seed))[0], own, seed)
    else:
        decomposed = load_decomposition(RunFile(before.folder, "full", run.method.name, seed).weights).to(bench.device)
        nearest, distances = nearest_task(decomposed, before, part)
        network = _with_new_head(decomposed.cpu().extract(nearest), own, seed)
        notes = {"nearest": nearest, "distances": distances}
    fitted = fit(network.to(bench.device), part, Part(bench.validation, own.tasks), bench.settings, seed)
    return network, {"all tasks": fitted}, notes


def _with_new_head(plain: nn.Module, own: DataList, seed: int) -> LoRKDNet:
    """A network of one task with the weights of another, but for its head, which starts anew."""
    torch.manual_seed(seed)
    network = LoRKDNet(plain, own.num_classes, rank=0).requires_grad_(True)
    heads = {id(t) for t in network.expert_tensors(0).values()}
    for module in network.modules():
        if any(id(p) in heads for p in module.parameters(recurse=False)) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network
