"""A study: which runs it consists of, and doing those that are missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.locks import mark_in_use
from lorkd_monai.study.agreement import agree_on_settings, check_finished
from lorkd_monai.study.factorization import build_factors
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.imbalance import small_tasks
from lorkd_monai.study.methods import Method, kept_images_of, label_share_of, teacher_setting_of
from lorkd_monai.study.models import build_student
from lorkd_monai.study.peft_rival import check_peft
from lorkd_monai.study.runs import Workbench, check_teacher
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.tasks import image_sides
from lorkd_monai.teachers.find import find_teacher

__all__ = ["PlannedRun", "plan_runs", "run_study"]


@dataclass(frozen=True)
class PlannedRun:
    """One run: a method in a setting with a seed."""

    method: Method
    setting: str
    seed: int

    def file(self, folder: str | os.PathLike) -> RunFile:
        """Where it keeps what it finds, in the folder of a study."""
        return RunFile(folder, self.setting, self.method.name, self.seed)


def plan_runs(methods: Sequence[Method], settings: Sequence[str], seeds: Sequence[int]) -> list[PlannedRun]:
    """The runs in their order: seed by seed, teachers first.

    One teacher sees all labels, for the settings of few labels too; a setting of fewer images has its own.

    Raises:
        LoRKDError: no methods, settings or seeds; a bad setting or seed.
    """
    for what, given in (("methods", methods), ("settings", settings), ("seeds", seeds)):
        if not given:
            raise LoRKDError(f"{what}: expected at least one")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise LoRKDError(f"seeds are whole numbers from 0 to 2147483647, got {seed!r}")
    for setting in settings:
        label_share_of(setting)
    ordered = sorted(methods, key=lambda m: m.family != "teacher")
    runs = []
    for seed in dict.fromkeys(seeds):
        for method in ordered:
            teaches = method.family == "teacher"
            own = dict.fromkeys(teacher_setting_of(setting) if teaches else setting for setting in settings)
            runs += [PlannedRun(method, setting, seed) for setting in own]
    return runs


def run_study(
    folder: str | os.PathLike,
    data: DataList,
    common: StudySettings,
    runs: Sequence[PlannedRun],
    device: str | torch.device = "cpu",
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Do the runs that are missing, so that a study that was stopped is resumed.

    A run's files are written when it is finished; one that was killed starts again.

    Args:
        folder: where the files go; ``study.json`` in it says what the runs have in common.
        data: the data list, with test images.
        common: settings of all runs.
        runs: as `plan_runs` gives them.
        device: where to train.
        keep_weights: see `Workbench`.
        say: is told what happens.

    Returns:
        The folder.

    Raises:
        LoRKDError: before anything is trained: a folder of a study with other settings or data, or with a finished run
            of another method of the same name; a method whose settings or network do not fit, or whose teacher is
            missing; a device that does not exist; no scored task, or one without validation or test images.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise LoRKDError(f"{folder} is a file, expected a folder for the study")
    if not data.scored:
        raise LoRKDError(f'the data list {data.name!r} has no task that counts: each says "score": false')
    for split in ("validation", "test"):
        without = [name for name in data.scored if not data.counts()[name][split]]
        if without:
            raise LoRKDError(
                f"the data list {data.name!r} has no {split} images of task {without[0]!r}, which a study needs; a "
                'task that is there to try things out says "score": false in the list'
            )
    if any(kept_images_of(run.setting) for run in runs):
        small_tasks(list(data.tasks))
    _check_networks(data, common, [run.method for run in runs], device)
    agree_on_settings(folder, data, common)
    _check_files(folder, common, runs)
    missing = [run for run in runs if not run.file(folder).done]
    say(f"{len(runs)} runs, {len(runs) - len(missing)} done already")
    if not missing:
        return folder
    bench = Workbench(folder, data, common, device, keep_weights)
    for number, run in enumerate(missing, 1):
        label = f"[{number}/{len(missing)}] {run.setting} {run.method.name} seed {run.seed}"
        bench.progress = lambda line, label=label: say(f"{label}: {line}")
        started = time.perf_counter()
        file = run.file(folder).json
        file.parent.mkdir(parents=True, exist_ok=True)
        with mark_in_use(file):
            if run.file(folder).done:  # by another process meanwhile
                continue
            bench.run(run.method, run.setting, run.seed)
        mean = run.file(folder).read()["mean"]
        shown = "no score" if mean is None else f"test {mean:.3f}"
        say(f"{label}: {shown}, {time.perf_counter() - started:.0f} s")
    return folder


def _check_networks(
    data: DataList, common: StudySettings, methods: Sequence[Method], device: str | torch.device
) -> None:
    """Check that the device exists, the foundation model can be read, and each student takes an image."""
    sides = image_sides(common.image_size, data.spatial_dims)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise LoRKDError(f"device: {str(device)!r} can't be used here: {first_line(error)}") from error
    if common.teacher_bundle is not None:
        find_teacher(common.teacher_bundle, data)
    image = torch.zeros(1, common.in_channels, *sides)
    tried = []
    for method in {method.name: method for method in methods}.values():
        settings = method.settings(common)
        if method.family == "teacher":
            continue
        if method.family == "peft":
            check_peft()
        factors, experts = method.family == "kf", method.family == "lorkd"
        student = build_factors(settings, data, 0) if factors else build_student(settings, data, experts, 0)
        if (factors, settings.backbone) in tried:
            continue
        tried.append((factors, settings.backbone))
        try:
            with torch.inference_mode():
                student.eval()(image, 0)
        except (RuntimeError, ValueError) as error:
            raise LoRKDError(
                f"method {method.name!r}: its backbone does not take images of {' × '.join(map(str, image.shape[1:]))} "
                f"(in_channels, image_size): {first_line(error)}"
            ) from error


def _check_files(folder: Path, common: StudySettings, runs: Sequence[PlannedRun]) -> None:
    """Check that finished runs are of these methods, and that missing runs will find their teacher."""
    taught = {(run.setting, run.seed) for run in runs if run.method.name == "teacher"}
    for run in runs:
        file = run.file(folder)
        if file.done:
            check_finished(file, run.method, common)
        needs = run.method.distilled or run.method.settings(common).init == "teacher"
        if common.teacher_bundle is None and run.method.family != "teacher" and needs and not file.done:
            teacher = RunFile(folder, teacher_setting_of(run.setting), "teacher", run.seed)
            if teacher.done or (teacher.setting, run.seed) not in taught:
                check_teacher(teacher)
