"""The command line ``lorkd``, also ``python -m lorkd_monai``: it parses and calls, no more."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire

from lorkd_monai.checks import as_names, as_path, as_value
from lorkd_monai.cli.study import report, study
from lorkd_monai.errors import LoRKDError, show_errors_plainly

if TYPE_CHECKING:
    from lorkd_monai.networks import LoRKDNet

__all__ = ["COMMANDS", "main"]

# Every command imports what it needs when it runs, so that `lorkd --help` answers at once.


def _checkpoint(path: Any) -> Path:
    """The checkpoint that a file, the output folder of a run, or a training bundle's folder means."""
    path = as_path(path, "checkpoint")
    if path.is_file():
        return path
    places = [path / p for p in ("training/model.pt", "model.pt", "output/training/model.pt")]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise LoRKDError(
            f"no decomposition at {path}: expected a checkpoint file, the output folder of a `training` run, or a "
            "training bundle that holds one"
        )
    return found


def _backbone(file: Any) -> dict[str, Any] | None:
    from lorkd_monai.workflows.import_released import read_backbone

    return None if file is None else read_backbone(as_path(file, "backbone"))


def _network(checkpoint: Any, backbone: Any = None) -> LoRKDNet:
    from lorkd_monai.checkpoints.weights import load_decomposition

    return load_decomposition(_checkpoint(checkpoint), _backbone(backbone))


def tasks(path: str, backbone: str | None = None) -> str:
    """Print the tasks, classes, ranks and sizes of a decomposition, or the task of an expert bundle, as JSON.

    Args:
        path: checkpoint file, output folder of a run, training bundle, or expert bundle.
        backbone: JSON or YAML file with the network's config, where it is none of MONAI's.
    """
    folder = as_path(path, "path")
    if (folder / "configs" / "metadata.json").is_file() and (folder / "models" / "model.pt").is_file():
        from lorkd_monai.bundle.export import describe_expert

        return _json(describe_expert(folder))
    from lorkd_monai.experts.describe import describe_tasks

    return _json(describe_tasks(_network(path, backbone)))


def inspect(path: str, as_json: bool = False, backbone: str | None = None) -> str:
    """List which layers of a decomposition carry experts, and what they cost in parameters.

    Args:
        path: checkpoint file, output folder of a run, or training bundle.
        as_json: print JSON in place of a table.
        backbone: JSON or YAML file with the network's config, where it is none of MONAI's.
    """
    from lorkd_monai.experts.describe import describe_layers

    net = _network(path, backbone)
    rows = describe_layers(net)
    if as_json:
        return _json(rows)
    header = ["layer", "type", "weight", "parameters", *(f"{t} (rank)" for t in net.tasks)]
    table = [
        [
            row["layer"], row["type"], "×".join(map(str, row["weight"])), str(row["parameters"]),
            *(f"{row['expert_parameters'][t]} ({row['ranks'][t]})" for t in net.tasks),
        ]
        for row in rows
    ]  # fmt: skip
    totals = [str(sum(r["expert_parameters"][t] for r in rows)) for t in net.tasks]
    table.append([f"{len(rows)} layers", "", "", str(sum(r["parameters"] for r in rows)), *totals])
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    lines = [header, *table]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def export(
    checkpoint: str,
    output: str,
    tasks: Any = None,
    overwrite: bool = False,
    formats: Any = None,
    figures: str | None = None,
    backbone: str | None = None,
    rank: int | None = None,
) -> str:
    """Write expert bundles from a checkpoint of a decomposition.

    Args:
        checkpoint: checkpoint file, or output folder of a run.
        output: folder for the bundles.
        tasks: names of the tasks, separated by commas; all by default.
        overwrite: replace bundles that are there.
        formats: of pt, safetensors, ts, onnx, separated by commas; all that can be written by default.
        figures: JSON file of metrics for the READMEs; figures.json beside the checkpoint by default.
        backbone: JSON or YAML file with the network's config, where it is none of MONAI's.
        rank: cut nested experts to at most this rank; metrics are then taken from --figures only.
    """
    from lorkd_monai.bundle.export import export_experts, read_figures
    from lorkd_monai.bundle.facts import read_facts

    file = _checkpoint(checkpoint)
    measured = as_path(figures, "figures") if figures is not None else file.with_name("figures.json")
    if figures is not None and not measured.is_file():
        raise LoRKDError(f"figures: there is no file {measured}")
    usable = measured.is_file() and (rank is None or figures is not None)  # those beside the file are at full rank
    net = _network(file, backbone)
    known = read_figures(measured, net.info) if usable else {}
    folder, names = as_path(output, "output"), as_names(tasks)
    written = export_experts(net, folder, names, known, read_facts(file), overwrite, as_names(formats), rank=rank)
    return "\n".join(map(str, written))


def rank_curve(
    checkpoint: str,
    dataset_dir: str,
    output: str,
    tasks: Any = None,
    split: str = "test",
    backbone: str | None = None,
) -> str:
    """Draw the metric of each nested expert against its rank and parameters: rank_curve.png and .json.

    Args:
        checkpoint: checkpoint file, or output folder of a run, trained with --nested True.
        dataset_dir: data list of the decomposition.
        output: folder for the two files.
        tasks: names of the tasks, separated by commas; all by default.
        split: training, validation or test.
        backbone: JSON or YAML file with the network's config, where it is none of MONAI's.
    """
    from lorkd_monai.workflows.rank_curve import write_rank_curve

    folder, net = as_path(output, "output"), _network(checkpoint, backbone)
    table = write_rank_curve(net, as_path(dataset_dir, "dataset_dir"), folder, as_names(tasks), split)
    return f"{table}\n\n{folder / 'rank_curve.png'}\n{folder / 'rank_curve.json'}"


def remove_task(checkpoint: str, task: str, output: str, overwrite: bool = False, backbone: str | None = None) -> str:
    """Write a decomposition without one of its tasks; the outputs of the others stay bit-identical.

    Args:
        checkpoint: checkpoint file, or output folder of a run.
        task: name of the task.
        output: file to write, .pt or .safetensors.
        overwrite: replace a file that is there.
        backbone: JSON or YAML file with the network's config, where it is none of MONAI's.
    """
    from lorkd_monai.checkpoints.weights import save_weights
    from lorkd_monai.workflows.adding import network_without_task

    file = as_path(output, "output")
    if file.exists() and not overwrite:
        raise LoRKDError(f"{file} exists already: name another file, or say --overwrite")
    net = network_without_task(_checkpoint(checkpoint), str(task), _backbone(backbone))
    save_weights(file, net.state_dict())
    return f"{file}: {', '.join(net.tasks)}"


def check(bundle: str, schema: str | None = None) -> str:
    """Check an expert bundle as the model zoo's CI does; print what fails, and end with 1 where something does.

    A bundle without a licence of its data, or without authors, passes with a warning.

    Args:
        bundle: the bundle's folder.
        schema: a copy of MONAI's metadata schema, to validate metadata.json against it too.
    """
    from lorkd_monai.bundle import check_bundle, check_origin

    problems = check_bundle(as_path(bundle, "bundle"), schema=None if schema is None else as_path(schema, "schema"))
    warnings = [f"warning: {warning}" for warning in check_origin(as_path(bundle, "bundle"))]
    if problems:
        print("\n".join([*map(str, problems), *warnings]))
        raise SystemExit(1)
    return "\n".join([*warnings, f"{bundle}: nothing to complain about"])


def pack(bundle: str, output: str | None = None, overwrite: bool = False) -> str:
    """Write a bundle as the zip file that `python -m monai.bundle download --url file://…` takes.

    Args:
        bundle: the bundle's folder.
        output: the zip file, or a folder for it; beside the bundle by default.
        overwrite: replace a file that is there.
    """
    from lorkd_monai.bundle import pack_bundle

    target = None if output is None else as_path(output, "output")
    return str(pack_bundle(as_path(bundle, "bundle"), target, overwrite=overwrite))


def push(bundle: str, repo: str, token: str | None = None, private: bool = True, version: str | None = None) -> str:
    """Push a bundle to the Hugging Face Hub.

    Args:
        bundle: the bundle's folder.
        repo: "user/name".
        token: of the Hub; the one that you are logged in with by default.
        private: make the repository private.
        version: tag of this version.
    """
    from lorkd_monai.bundle import push_bundle

    return str(push_bundle(as_path(bundle, "bundle"), repo, token=token, private=private, version=version))


def phantoms(
    output: str,
    kind: str = "classification",
    spatial_dims: int = 2,
    num_images: int = 100,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Write a data list of synthetic images of several tasks, to try things out.

    Args:
        output: folder for the images and dataset.json.
        kind: classification or segmentation.
        spatial_dims: 2 or 3.
        num_images: images of each task, all splits together.
        seed: another one gives other images.
        overwrite: replace a list that is there.
    """
    from lorkd_monai.data import make_phantoms

    return str(make_phantoms(as_path(output, "output"), kind, spatial_dims, num_images, seed=seed, overwrite=overwrite))


def import_checkpoint(
    checkpoint: str,
    backbone: str,
    tasks: Any,
    output: str,
    alpha: float | None = None,
    scale: float | None = None,
    mapping: str | None = None,
    drop: Any = None,
    fresh: Any = None,
    head: Any = None,
    dataset_dir: str | None = None,
    kind: str | None = None,
    image_size: Any = None,
    report: str | None = None,
) -> str:
    """Convert a checkpoint of the released LoRKD code to a decomposition of this package.

    Args:
        checkpoint: the file with the state dict.
        backbone: JSON or YAML file with the MONAI config of the network without experts.
        tasks: names of the tasks in the order of their training, separated by commas; as "name=classes,…" where the
            checkpoint has no heads.
        output: file to write, .pt or .safetensors.
        alpha: the lora_alpha of the training, such as 16.
        scale: the scale itself in place of alpha, such as 2 for imbalanced ranks.
        mapping: JSON or YAML file with keys, rename, drop, fresh; see docs/import.md.
        drop: regular expressions of keys to leave out, with those of the mapping.
        fresh: glob patterns of the network's keys that may be initialised anew, with those of the mapping.
        head: names of the network's last layers, where they can't be found.
        dataset_dir: data list of the tasks, so that expert bundles can be exported.
        kind: classification or segmentation, with dataset_dir.
        image_size: size of the images or patches in voxels, with dataset_dir.
        report: JSON file to write, with what became of each key.
    """
    from lorkd_monai.workflows.import_released import import_file

    net, found = import_file(
        as_path(checkpoint, "checkpoint"), as_path(backbone, "backbone"), as_names(tasks) or [],
        as_path(output, "output"),
        alpha=alpha, scale=scale, mapping=mapping, drop=as_names(drop) or [], fresh=as_names(fresh) or [],
        head=as_names(head), dataset_dir=dataset_dir, kind=kind, image_size=image_size,
        report=None if report is None else as_path(report, "report"),
    )  # fmt: skip
    return f"{output}: {len(found.placed)} keys taken over, tasks {', '.join(net.tasks)}\n{found.summary()}".strip()


def renorm(
    checkpoint: str,
    dataset_dir: str,
    output: str,
    tasks: Any = None,
    batch_size: int = 16,
    overwrite: bool = False,
    formats: Any = None,
) -> str:
    """Write expert bundles whose batch-norm statistics are estimated anew on their own task's training images.

    Prints the test metrics before and after: not every task improves.

    Args:
        checkpoint: checkpoint file, or output folder of a run.
        dataset_dir: data list of the decomposition.
        output: folder for the bundles.
        tasks: names of the tasks, separated by commas; all by default.
        batch_size: images of one batch of the estimation.
        overwrite: replace bundles that are there.
        formats: of pt, safetensors, ts, onnx, separated by commas; all that can be written by default.
    """
    from lorkd_monai.workflows.renorm import renorm_experts

    written, table = renorm_experts(
        _checkpoint(checkpoint), as_path(dataset_dir, "dataset_dir"), as_path(output, "output"), as_names(tasks),
        batch_size, overwrite, as_names(formats),
    )  # fmt: skip
    return "\n".join([*map(str, written), *(["", table] if table else [])])


def suggest_ranks(checkpoint: str, tuned: Any, budget: int | None = None, as_json: bool = False) -> str:
    """Propose a rank for each task within a budget of parameters, compared with equal ranks.

    Each task's full update is the difference between its expert after a fine-tuning of all its weights
    (`monai.bundle run training` on the expert bundle) and the weights that the tasks share.

    Args:
        checkpoint: checkpoint file, or output folder of a run.
        tuned: "{task: path, …}", paths being expert bundles or files of weights.
        budget: parameters of all experts together; by default as many as the decomposition has.
        as_json: print JSON in place of a table.
    """
    from lorkd_monai.checkpoints.weights import load_weights
    from lorkd_monai.experts.choose_ranks import suggest_ranks as suggest

    given = as_value(tuned) if isinstance(tuned, str) else tuned
    if not isinstance(given, dict):
        raise LoRKDError(f"tuned: expected '{{task: path, other: path}}', got {tuned!r}")
    files = {str(name): as_path(path, f"tuned: {name}") for name, path in given.items()}
    files = {name: path / "models" / "model.pt" if path.is_dir() else path for name, path in files.items()}
    states = {name: load_weights(path) for name, path in files.items()}
    rows = suggest(_network(checkpoint), states, budget)
    if as_json:
        return _json(rows)
    lines = ["| task | rank | parameters | energy kept | equal rank | parameters | energy kept |", "|" + "---|" * 7]
    lines += [
        f"| {r['task']} | {r['rank']} | {r['parameters']} | {r['energy']:.3f} "
        f"| {r['equal_rank']} | {r['equal_parameters']} | {r['equal_energy']:.3f} |"
        for r in rows
    ]
    ranks = ", ".join(f"{r['task']}: {r['rank']}" for r in rows)
    return "\n".join([*lines, "", f"--rank '{{{ranks}}}'"])


def label_app(output: str, *more: str, experts: Any = None, overwrite: bool = False) -> str:
    """Write a MONAI Label app that serves expert bundles: lorkd label-app APP --experts E1 E2.

    Start it with `monailabel start_server --app APP --studies FOLDER`, in the environment of scripts/label_env.sh.

    Args:
        output: folder for the app.
        more: further bundles.
        experts: expert bundles, or folders that hold some.
        overwrite: replace a folder that is there; what was trained in it is lost.
    """
    from lorkd_monai.apps.label import write_label_app

    return str(write_label_app(as_path(output, "output"), [*(as_names(experts) or []), *map(str, more)], overwrite))


def deploy_app(output: str, *more: str, experts: Any = None, overwrite: bool = False) -> str:
    """Write one MONAI Deploy application that holds many expert bundles: lorkd deploy-app APP --experts E1 E2.

    Check its routing.yaml, then run `python APP/app.py -i INPUT -o OUTPUT` in the environment of scripts/deploy_env.sh.

    Args:
        output: folder for the application.
        more: further bundles.
        experts: expert bundles, or folders that hold some.
        overwrite: replace a folder that is there; what a person changed in it is lost.
    """
    from lorkd_monai.apps.deploy import write_deploy_app

    return str(write_deploy_app(as_path(output, "output"), [*(as_names(experts) or []), *map(str, more)], overwrite))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _data_commands() -> dict[str, Any]:
    from lorkd_monai.data import builders, decathlon

    return {
        "folders": builders.from_class_folders,
        "medmnist": builders.from_medmnist,
        "fetch_medmnist": builders.fetch_medmnist,
        "fetch_mednist": builders.fetch_mednist,
        "segmentation": decathlon.from_segmentation_folders,
        "combine": builders.combine,
    }


COMMANDS: dict[str, Any] = {
    "tasks": tasks,
    "inspect": inspect,
    "export": export,
    "rank-curve": rank_curve,
    "remove-task": remove_task,
    "import": import_checkpoint,
    "check": check,
    "pack": pack,
    "push": push,
    "renorm": renorm,
    "suggest-ranks": suggest_ranks,
    "phantoms": phantoms,
    "label-app": label_app,
    "deploy-app": deploy_app,
    "study": study,
    "report": report,
}


def _noted(command: Any, calls: list[Callable[[], Any]]) -> Any:
    """The command, or the commands of a group, with the call put off: fire notices a surplus word after it only."""
    if isinstance(command, dict):
        return {name: _noted(one, calls) for name, one in command.items()}

    @functools.wraps(command)
    def note(*args: Any, **kwargs: Any) -> None:
        calls.append(functools.partial(command, *args, **kwargs))

    return note


def main() -> None:
    """Run the command line."""
    show_errors_plainly()
    commands = dict(COMMANDS)
    # The data commands are named by their builders, which are worth importing only where they may be meant.
    if len(sys.argv) < 2 or sys.argv[1] in ("data", "-h", "--help", "--"):
        commands["data"] = _data_commands()
    arguments = sys.argv[1:]
    # After other arguments, fire would run the command and show the help of what it returned.
    if {"-h", "--help"} & set(arguments) and "--" not in arguments:
        arguments = [*arguments[: 2 if arguments[0] == "data" else 1], "--help"]
    calls: list[Callable[[], Any]] = []
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(_noted(commands, calls), command=arguments, name="lorkd")
    except fire.core.FireExit as end:
        if not end.code:
            print(said.getvalue(), file=sys.stderr, end="")
            raise
        known, words = commands, ["lorkd"]
        for word in arguments:
            if not isinstance(known, dict) or word not in known:
                break
            known, words = known[word], [*words, word]
        raise LoRKDError(
            f"{end.trace.elements[-1].ErrorAsStr()}. `{' '.join(words)} --help` says what there is"
        ) from None
    with _printed_log("lorkd_monai.data"):
        for call in calls:
            result = call()
            if result is not None:
                print(result)


@contextlib.contextmanager
def _printed_log(name: str) -> Iterator[None]:
    """Print what the logger ``name`` and those below it say, from INFO on, without time and level."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stdout)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
