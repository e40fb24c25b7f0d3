"""The config files of an expert bundle, of stock MONAI classes only."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorkd_monai.bundle.inert import check_task_name
from lorkd_monai.bundle.listed import LISTED, OTHER_CLASSES, STEMS, augment_steps, no_items, or_arrays
from lorkd_monai.tasks import Work
from lorkd_monai.transforms.dicom import IS_DICOM, SERIES_FAULT
from lorkd_monai.transforms.loading import PICTURES, SUFFIXES
from lorkd_monai.transforms.preprocessing import postprocessing as standard_postprocessing
from lorkd_monai.transforms.preprocessing import preprocessing as standard_preprocessing

__all__ = [
    "LOGGING",
    "Pipeline",
    "evaluate_config",
    "inference_config",
    "multi_gpu_config",
    "pipeline_of",
    "train_config",
]

LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""

DEVICE = "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"
_NO_IMAGES = (
    "$@images or sys.exit('error: no image in ' + repr(str(@dataset_dir)) + ': expected --dataset_dir to be an image "
    "or a folder of images (' + ' '.join(@suffixes) + ')')"
)
# In 2D a picture needs no suffix; in 3D a folder of DICOM files is an image too.
_IMAGES = {
    2: "$[@dataset_dir] if os.path.isfile(@dataset_dir) else sorted(path for path in "
    "glob.glob(glob.escape(@dataset_dir) + '/*') if path.lower().endswith(tuple(@suffixes)) or @is_dicom(path) or "
    f"os.path.isfile(path) and not os.path.splitext(path)[1] and open(path, 'rb').read(8).startswith({PICTURES}))",
    3: "$[@dataset_dir] if os.path.isfile(@dataset_dir) else [path for path in [@dataset_dir, "
    "*sorted(glob.glob(glob.escape(@dataset_dir) + '/*'))] if os.path.isfile(path) and "
    "path.lower().endswith(tuple(@suffixes)) or any(map(@is_dicom, sorted(glob.glob(glob.escape(path) + '/*'))))]",
}
_LEFT_OUT = (
    "$(lambda rest: rest and logging.getLogger('inference').warning('left out %d of %s, no images as expected here: "
    "%s', len(rest), @dataset_dir, ', '.join(rest[:3]) + ', …' * (len(rest) > 3)))(sorted(set(map(os.path.basename, "
    "glob.glob(glob.escape(@dataset_dir) + '/*'))) - set(map(os.path.basename, @paths))) if any(os.path.dirname("
    "os.path.abspath(path)) == os.path.abspath(@dataset_dir) for path in @paths) and @dataset_dir not in @images else "
    "[])"
)
# What the preprocessing refuses, or MONAI cannot read, is one line: the first error of the chain that MONAI makes of
# it, without the traceback that StatsHandler would log. A reader's error may not name its file: LoadImage knows it.
_REFUSED = (
    "(lambda found, chain: found[1] if found else next(('cannot read ' + ', '.join(map(str, monai.utils.ensure_tuple("
    "frame.f_locals['filename']))) + ': ' + type(chain[-1]).__name__ + ': ' + (str(chain[-1]).splitlines() or [''])[0] "
    "+ '; the file may be damaged, or of another format than its name says' for e in chain for frame, _ in "
    "traceback.walk_tb(e.__traceback__) if type(frame.f_locals.get('self')).__name__ == 'LoadImage' and 'filename' in "
    "frame.f_locals), ''))(re.search('ValueError: refused: (.*)', ''.join(traceback.format_exception(error))), "
    "(lambda causes: causes(causes, error))(lambda causes, e: [] if e is None else [e, *causes(causes, e.__cause__)]))"
)
_PLAIN_REFUSALS = (
    "$(setattr(sys, 'excepthook', lambda kind, error, trace: (lambda found: print('error: ' + found, "
    f"file=sys.stderr) if found else sys.__excepthook__(kind, error, trace))({_REFUSED})), "
    "logging.setLogRecordFactory(lambda *about, **more: logging.LogRecord(*about[:6], about[6] if about[6] and not "
    f"(lambda error: {_REFUSED})(about[6][1]) else None, *about[7:], **more)))"
)
# The name of an image's output: its own without the suffix, as MONAI makes it. Where images share that, the folders
# come before it, and then the suffix stays. Digits after a point are no suffix: folders are named by UIDs.
_NAMES = {
    "short_names": "$[os.path.basename(path) if os.path.isdir(path) else re.sub(r'(\\.[^.]+)?\\.gz$|"
    "\\.[^.]*[A-Za-z][^.]*$', '', os.path.basename(path)) for path in map(os.path.abspath, @paths)]",
    "common_folder": "$os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in @paths] or [os.sep])",
    "folders": "$['_'.join([*pathlib.Path(os.path.relpath(os.path.dirname(os.path.abspath(path)), @common_folder))"
    ".parts, '']) for path in @paths]",
    "possible_names": "$[(name, folder + name, folder + os.path.basename(os.path.abspath(path))) for path, folder, "
    "name in zip(@paths, @folders, @short_names)]",
    "output_names": "$(lambda times: {path: next((name for name in names if times[name] == 1), names[-1]) for path, "
    "names in zip(@paths, @possible_names)})(collections.Counter(name for names in @possible_names for name in "
    "set(names)))",
}
# With a point at its end the name is taken whole: MONAI cuts what follows the last one.
_OUTPUT_NAME = (
    "$lambda meta, _: {'subject': @output_names[path] + '.' if path in @output_names else path for path in "
    "[meta['filename_or_obj']]}"
)
_OUTPUTS = "$[str(@output_dir) + '/' + @output_names[path] + '_{}{}' for path in @paths]"
_QUOTED = "$lambda name: '\"' + name.replace('\"', '\"\"') + '\"' if set(name) & set(',\"\\n\\r') else name"
_PROBLEM = (
    "$('--images: expected a list such as [\\'a.png\\'], got ' + repr(@images) if isinstance(@images, str) else '') or "
    "next((f'there is no file or folder {path!r}: expected images' for image, path in zip(@images, @paths) for path in "
    "[path, *monai.utils.ensure_tuple(image)[1:]] if not os.path.exists(os.path.expanduser(path))), '') or "
    "next((f'{path!r} would be written twice: expected each image once' for path, times in "
    "collections.Counter(@outputs if len(@outputs) > 1 else @paths).items() if times > 1), '') or next((f'{path!r} is "
    "there already, the result of another run: expected an --output_dir without it, or --overwrite true' for path in "
    "@outputs if os.path.exists(path) and str(@overwrite).lower() != 'true' and not (path.endswith('.csv') and "
    "open(path, 'rb').read().count(b'\\n') < 2)), '') or next(filter(None, (@series_fault("
    "path) for path in @paths if os.path.isdir(path))), '')"
)
_IMPORTS = ("collections", "csv", "difflib", "glob", "logging", "os", "pathlib", "re", "sys", "traceback")
_NO_PATHS = (
    "$[sys.exit('error: --' + name + ': expected a path, got ' + repr(value) + '; write ./NAME for a file or folder of "
    "this name') for name, value in (('bundle_root', @bundle_root), ('dataset_dir', @dataset_dir), ('output_dir', "
    "@output_dir)) if isinstance(value, (int, float, tuple, list))]"
)
_NO_WEIGHTS = (
    "$os.path.isfile(@ckpt_path) or sys.exit('error: no weights at ' + repr(@ckpt_path) + ': expected --bundle_root "
    "to be the folder of this bundle')"
)
_TRAINING = [
    _PLAIN_REFUSALS,
    _NO_WEIGHTS,
    no_items("training", "train#dataset"),
    no_items("validation", "validate#dataset"),
    OTHER_CLASSES,
    "$@train#trainer.run()",
]


_MONAI_KEYS = (
    "run_id init_id final_id meta_file config_file logging_file tracking args_file workflow_name workflow_type "
    "properties_path tracking_uri experiment_name run_name save_execute_config"
)


def _unread_keys(config: Sequence[str]) -> str:
    """Refuses top-level keys of the command line that the config does not have and no other argument refers to."""
    return (
        "$[sys.exit('error: nothing in this bundle reads --' + key + ''.join(' (did you mean --' + near + '?)' "
        "for near in difflib.get_close_matches(key, known, 1))) "
        f"for known in ['{' '.join(config)} {_MONAI_KEYS}'.split()] "
        "for key in (arg[2:].split('=')[0].replace('-', '_') for arg in sys.argv if arg[:2] == '--') "
        "if 'monai.bundle' in sys.argv[0].replace(os.sep, '.') and key.isidentifier() and key not in known "
        "and not any(chr(64) + key in arg for arg in sys.argv)]"
    )


@dataclass(frozen=True)
class Pipeline:
    """What an expert does with an image before and after its network, as configs of stock MONAI classes.

    Attributes:
        preprocessing: for the key ``image``; refers to no other id.
        postprocessing: for the key ``pred``; may refer to ``@preprocessing`` and ``@output_dir``.
        training: the preprocessing of fine-tuning, for the keys ``image`` and ``label``.
        inferer: one pass, or sliding windows.
    """

    preprocessing: list[dict]
    postprocessing: list[dict]
    training: list[dict]
    inferer: dict[str, Any]


def pipeline_of(work: Work) -> Pipeline:
    """The pipeline of an expert as it was in the decomposition's training.

    Args:
        work: of one task.
    """
    given = (work.task, work.kind, work.spatial_dims, work.in_channels, work.image_size)
    before = standard_preprocessing(*given)
    training = before if work.kind == "classification" else standard_preprocessing(*given, keys=("image", "label"))
    after = standard_postprocessing(work.task, work.kind, work.spatial_dims)
    return Pipeline(before, after, training, default_inferer(work.kind, work.image_size))


def _compose(steps: Sequence[dict | str]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": copy.deepcopy(steps)}


def _saver(step: Any) -> dict[str, Any] | None:
    """Return the config of `SaveImaged` in a step of the postprocessing where MONAI names its files."""
    if not isinstance(step, dict):
        return None
    step = step.get("self", step)  # with options set, see `lorkd_monai.transforms.postprocessing`
    plain = str(step.get("_target_", "")).endswith("SaveImaged") and step.get("separate_folder") is False
    return step if plain and not {"output_name_formatter", "folder_layout", "data_root_dir"} & set(step) else None


def default_inferer(kind: str, image_size: tuple[int, ...]) -> dict[str, Any]:
    """One pass for classification, overlapping windows of the training size for segmentation."""
    if kind == "classification":
        return {"_target_": "SimpleInferer"}
    return {
        "_target_": "SlidingWindowInferer",
        "roi_size": [int(n) for n in image_size],
        "sw_batch_size": 4,
        "overlap": 0.5,
        "mode": "gaussian",
    }


def _loader(path: str = "@ckpt_path", network: str = "@network") -> dict[str, Any]:
    return {
        "_target_": "CheckpointLoader",
        "_disabled_": f"$not os.path.exists({path})",
        "load_path": path,
        "load_dict": {"model": network},
    }


def inference_config(work: Work, pipeline: Pipeline, network_config: dict) -> dict[str, Any]:
    """Return inference.json.

    ``--dataset_dir`` is one image (in 3D also a folder of DICOM slices) or a folder of images, ``--images "['a.png']"``
    a list of them; results go to ``--output_dir``, one for each image, and those of another run are replaced only with
    ``--overwrite true``. Classification writes predictions.csv: file, the probability of each
    class, the class index.
    """
    kind = work.kind
    handlers = [_loader(network="@network_def"), {"_target_": "StatsHandler", "iteration_log": False}]
    problem = "$@problem and sys.exit('error: ' + @problem)"
    run = [_PLAIN_REFUSALS, _NO_PATHS, _NO_WEIGHTS, _NO_IMAGES, problem, _LEFT_OUT]
    postprocessing = copy.deepcopy(pipeline.postprocessing)
    outputs: dict[str, Any] = {"outputs": []}
    saver = next(filter(None, map(_saver, postprocessing)), None)
    if saver is not None:
        outputs = {**_NAMES, "outputs": _OUTPUTS.format(saver.get("output_postfix", "trans"), saver["output_ext"])}
        saver["output_name_formatter"] = _OUTPUT_NAME
    if kind == "classification" and "SaveClassification" not in str(postprocessing):
        outputs = {"quoted": _QUOTED, "outputs": ["$str(@output_dir) + '/predictions.csv'"]}
        # CSVSaver writes no header: one is written first, and the saver appends to it.
        run += [
            "$os.makedirs(@output_dir, exist_ok=True)",
            "$csv.writer(open(@output_dir + '/predictions.csv', 'w', newline='')).writerow(['file', *@class_names, "
            "'class'])",
        ]
        handlers.append(
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": "predictions.csv",
                "overwrite": False,
                # The saver writes names as they are: a comma would begin a column.
                "batch_transform": "$lambda batch: [{'filename_or_obj': @quoted(item['image'].meta['filename_or_obj'])}"
                " for item in batch]",
                "output_transform": "$lambda output: [torch.cat([item['pred'].flatten(), "
                "item['pred'].argmax().reshape(1)]) for item in output]",
            }
        )
    run.append("$@evaluator.run()")
    config: dict[str, Any] = {
        "imports": [f"$import {name}" for name in _IMPORTS],
        "bundle_root": ".",
        "dataset_dir": "$str(@bundle_root) + '/data'",
        "output_dir": "$str(@bundle_root) + '/eval'",
        "overwrite": False,
        "ckpt_path": "$str(@bundle_root) + '/models/model.pt'",
        "suffixes": list(SUFFIXES[work.spatial_dims]),
        "is_dicom": f"${IS_DICOM}",
        "images": _IMAGES[work.spatial_dims],
        "paths": "$[str(pathlib.Path(monai.utils.ensure_tuple(image)[0]).expanduser()) for image in @images]",
        **outputs,
        "series_fault": f"${SERIES_FAULT}",
        "problem": _PROBLEM,
        "class_names": "$list(@_meta_#network_data_format#outputs#pred#channel_def.values())",
        "device": DEVICE,
        "network_def": copy.deepcopy(network_config),
        "network": "$@network_def.to(@device)",
        "preprocessing": _compose(pipeline.preprocessing),
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @images]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": copy.deepcopy(pipeline.inferer),
        "postprocessing": _compose(postprocessing),
        "handlers": handlers,
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": run,
    }
    if kind == "segmentation":
        del config["class_names"]
    config["initialize"] = [_unread_keys([*config, "initialize"])]
    return config


def _label_steps(kind: str, num_classes: int) -> list[dict]:
    """What makes a prediction and its label comparable: probabilities, or one-hot masks."""
    if kind == "classification":
        return [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]
    return [{"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": num_classes}]


def _key_metric(kind: str) -> dict[str, Any]:
    if kind == "segmentation":
        return {
            "val_mean_dice": {
                "_target_": "MeanDice",
                "include_background": False,
                "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
            }
        }
    return {
        "val_balanced_accuracy": {
            "_target_": "ignite.metrics.Recall",
            "average": "macro",
            "output_transform": "$lambda output: (torch.stack([item['pred'].as_tensor() for item in output]), "
            "torch.stack([torch.as_tensor(item['label']).flatten()[0] for item in output]).long())",
        }
    }


def _is_deep(network_config: dict) -> bool:
    """True for a network that returns several outputs in training."""
    return bool(network_config.get("deep_supervision")) or str(network_config["_target_"]).endswith("SegResNetDS")


def _loss(kind: str, network_config: dict) -> tuple[dict[str, Any], str]:
    loss: dict[str, Any] = {"_target_": "torch.nn.CrossEntropyLoss"}
    if kind == "segmentation":
        loss = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True}
    if not _is_deep(network_config):
        return loss, "@loss"
    # A network with deep supervision returns several outputs in training: the fine-tuning trains the full-size one.
    return loss, (
        "$lambda pred, label: @loss(pred[0] if isinstance(pred, (list, tuple)) else "
        "pred[:, 0] if pred.ndim > label.ndim else pred, label)"
    )


def train_config(
    work: Work, pipeline: Pipeline, network_config: dict, augmentation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return train.json, which goes on training this expert on the items {"image", "label"} of a data list.

    The list has the form that decompositions are trained on, or the Decathlon's,
    with ``training`` and ``validation``; items of another ``task``, and those without a label, are left out. The best
    weights go to ``--ckpt_dir`` as model.pt. ``augmentation`` holds the decomposition's ``rotate`` and ``flip_axes``;
    what it does not say is not done.
    """
    check_task_name(work.task.name)
    kind, preprocessing, inferer = work.kind, pipeline.training, pipeline.inferer
    loss, loss_function = _loss(kind, network_config)
    segmentation = kind == "segmentation"
    augmentation = augmentation or {}

    def dataset(section: str) -> dict[str, Any]:
        return {
            "_target_": "Dataset",
            "data": f"$@items('{section}', '{STEMS[section]}')",
            "transform": "@train#preprocessing" if section == "training" else "@validate#preprocessing",
        }

    if not segmentation:  # no mask is kept in an .npz file
        preprocessing = or_arrays(preprocessing, work.spatial_dims)
    trained: list[Any] = copy.deepcopy(preprocessing)
    if segmentation:
        # Images keep their own size: patches of the network's training size make a batch.
        pad = {"_target_": "SpatialPadd", "keys": ["image", "label"], "spatial_size": inferer["roi_size"]}
        crop = {
            "_target_": "RandCropByPosNegLabeld",
            "keys": ["image", "label"],
            "label_key": "label",
            "spatial_size": inferer["roi_size"],
            "pos": 1,
            "neg": 1,
            "num_samples": 2,
        }
        trained += [pad, crop]
    trained += augment_steps(["image", "label"] if segmentation else ["image"], work.image_size)
    config: dict[str, Any] = {
        "imports": [f"$import {name}" for name in ("difflib", "json", "logging", "os", "re", "sys", "traceback")],
        "bundle_root": ".",
        "task": work.task.name,
        "dataset_dir": "$str(@bundle_root) + '/data'",
        **LISTED,
        "ckpt_dir": "$str(@bundle_root) + '/models'",
        "ckpt_path": "$str(@bundle_root) + '/models/model.pt'",
        "output_dir": "$str(@bundle_root) + '/eval'",
        "device": DEVICE,
        "max_epochs": 20,
        "val_interval": 1,
        "batch_size": 4,
        "learning_rate": 0.0001,
        "rotate": float(augmentation.get("rotate", 0.0)),
        "flip_axes": [int(axis) for axis in augmentation.get("flip_axes", ())],
        "network_def": copy.deepcopy(network_config),
        "network": "$@network_def.to(@device)",
        "loss": loss,
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "params": "$@network.parameters()",
            "lr": "@learning_rate",
            "weight_decay": 0.0001,
        },
        "train": {
            "preprocessing": _compose(trained),
            "dataset": dataset("training"),
            "dataloader": {
                "_target_": "DataLoader",
                "dataset": "@train#dataset",
                "batch_size": "@batch_size",
                "shuffle": True,
                "num_workers": 0,
            },
            "inferer": {"_target_": "SimpleInferer"},
            "handlers": [
                _loader(),
                {
                    "_target_": "ValidationHandler",
                    "validator": "@validate#evaluator",
                    "interval": "@val_interval",
                    "epoch_level": True,
                },
                {
                    "_target_": "StatsHandler",
                    "tag_name": "train_loss",
                    "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
                },
            ],
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@max_epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "optimizer": "@optimizer",
                "loss_function": loss_function,
                "inferer": "@train#inferer",
                "train_handlers": "@train#handlers",
            },
        },
        "validate": {
            # The steps that training begins with.
            "preprocessing": _compose([f"%train#preprocessing#transforms#{i}" for i in range(len(preprocessing))]),
            "dataset": dataset("validation"),
            "dataloader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": 1, "num_workers": 0},
            "inferer": copy.deepcopy(inferer),
            "postprocessing": _compose(_label_steps(kind, work.task.num_classes)),
            "handlers": [
                {"_target_": "StatsHandler", "iteration_log": False},
                {
                    "_target_": "CheckpointSaver",
                    "save_dir": "$str(@ckpt_dir)",
                    "save_dict": {"model": "@network"},
                    "save_key_metric": True,
                    "key_metric_filename": "model.pt",
                },
            ],
            "key_metric": _key_metric(kind),
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@validate#dataloader",
                "network": "@network",
                "inferer": "@validate#inferer",
                "postprocessing": "@validate#postprocessing",
                "key_val_metric": "@validate#key_metric",
                "val_handlers": "@validate#handlers",
            },
        },
        "initialize": [],
        "run": _TRAINING,
        "training": "%run",
    }
    config["initialize"] = [_unread_keys([*config, "evaluating"]), "$monai.utils.set_determinism(seed=0)"]
    return config


def evaluate_config(kind: str) -> dict[str, Any]:
    """Return evaluate.json, used over train.json: the key metric on the labelled ``test`` images of a data list."""
    key = next(iter(_key_metric(kind)))
    saver: dict[str, Any] = {"_target_": "MetricsSaver", "save_dir": "$str(@output_dir)", "metrics": [key]}
    if kind == "segmentation":
        saver["metric_details"] = [key]
        saver["batch_transform"] = "$lambda batch: [item['image'].meta for item in batch]"
    return {
        "validate#dataset#data": f"$@items('test', '{STEMS['test']}')",
        "validate#handlers": [_loader(), {"_target_": "StatsHandler", "iteration_log": False}, saver],
        "run": [
            _PLAIN_REFUSALS,
            _NO_WEIGHTS,
            no_items("test", "validate#dataset"),
            OTHER_CLASSES,
            "$@validate#evaluator.run()",
        ],  # fmt: skip
        "evaluating": "%run",
    }


def multi_gpu_config(network_config: dict) -> dict[str, Any]:
    """Return multi_gpu_train.json, used over train.json under torchrun (nccl on GPUs, gloo on CPUs)."""
    first = "$dist.get_rank() > 0"
    return {
        "imports": [
            "$import json",
            "$import logging",
            "$import os",
            "$import re",
            "$import sys",
            "$import traceback",
            "$import torch._dynamo",  # later, its modules would keep the group as a default argument
            "$import torch.distributed as dist",
            "$import ignite.distributed as idist",
        ],
        "device": "$torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else "
        "torch.device('cpu')",
        "network": {
            "_target_": "torch.nn.parallel.DistributedDataParallel",
            "module": "$@network_def.to(@device)",
            "device_ids": "$[@device] if @device.type == 'cuda' else None",
            "find_unused_parameters": _is_deep(network_config),
        },
        "train#sampler": {"_target_": "DistributedSampler", "dataset": "@train#dataset", "even_divisible": True},
        "train#dataloader#sampler": "@train#sampler",
        "train#dataloader#shuffle": False,
        "train#handlers#2#_disabled_": first,
        "validate#sampler": {
            "_target_": "DistributedSampler",
            "dataset": "@validate#dataset",
            "even_divisible": False,
            "shuffle": False,
        },
        "validate#dataloader#sampler": "@validate#sampler",
        "validate#handlers#0#_disabled_": first,
        "validate#handlers#1#_disabled_": first,
        "initialize": [
            "$dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')",
            "$torch.cuda.set_device(@device) if torch.cuda.is_available() else None",
            # A collective call, which ignite would make by itself at different times in different processes.
            "$idist.sync()",
            "$monai.utils.set_determinism(seed=0)",
        ],
        "run": _TRAINING,
        "training": "%run",
        # A wrapped network that still holds the group would keep its threads alive into the interpreter's end.
        "finalize": [
            "$[setattr(@network, name, None) for name in ('process_group', 'reducer', 'logger')]",
            "$dist.is_initialized() and dist.destroy_process_group()",
        ],
    }
