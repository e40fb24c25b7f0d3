"""Writes docs/README.md of the four training bundles from their configs: run it where a default has changed.

    python scripts/bundle_docs.py [--check]

With --check nothing is written, and a page that is not up to date ends with exit code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"

KEYS = {
    "bundle_root": "folder of this bundle",
    "dataset_dir": "folder with the data list `dataset.json`, or the file itself",
    "output_dir": "everything that a run writes",
    "teacher_bundle": "folder of a MONAI bundle whose network knows the tasks; `pretraining` writes one here",
    "teacher_intensity": "for the teacher: `auto` (its bundle says), `same`, `zscore`, `{range: [a, b], to: [c, d]}`",
    "overwrite": "replace a teacher or experts that exist",
    "device": "where to run",
    "image_size": {
        "classification": "pixels or voxels to which every image is resized: one number, or one for each axis",
        "2d_segmentation": "side of the square that every image is fitted and padded into",
        "3d_segmentation": "voxels of a training patch and of a sliding window",
    },
    "in_channels": "channels of the network's input; grey images are repeated, colours made grey, to fit",
    "batch_size": "images of a step (of each process)",
    "sampling": "`natural`: each image once an epoch; `balanced`: each task as often; `temperature`: between the two",
    "sampling_temperature": "1 is `natural`; the larger, the more balanced",
    "tasks_per_batch": "batches of so many tasks, with as many images of each; null: all tasks mixed",
    "flip_axes": "axes along which images are mirrored at random, from 0; only where left and right do not matter",
    "rotate": "largest random rotation, in degrees",
    "cache_dir": "folder for preprocessed volumes that do not fit into memory, and for a faster next start",
    "rank": "rank of every expert, or one for each task: `\"{'spleen': 4, 'spinal_cord': 12}\"`; 0: no experts",
    "alpha": "experts are scaled by alpha / rank",
    "layout": "`lorkd` (the papers') or `conv` (a k×k convolution and a 1×1 one)",
    "norm": "`shared`, or `task`: each task has norms of its own, which need several images of each task in a batch",
    "rank_pattern": "factor of the rank by layer: `\"{'*submodule*': 2}\"` doubles it in the layers that match",
    "nested": "train experts that can be cut to any lower rank (`lorkd rank-curve`, `lorkd export --rank`)",
    "include": "patterns of the layers that get experts; null: all convolutions and linear layers but depthwise ones",
    "exclude": "patterns of layers that stay shared",
    "seed": "of everything random",
    "max_epochs": "epochs of `training`",
    "learning_rate": "highest learning rate of AdamW; it falls to 0 along a cosine",
    "weight_decay": "of AdamW",
    "temperature": "T of the transfer: the larger, the softer the teacher's answers",
    "transfer_weight": "weight of the transfer beside the task loss; 0 trains without a teacher",
    "transfer_positions": "positions in the transfer of a segmentation: `by_class` (classes weigh alike) or `equal`",
    "init": "where the shared network starts: `auto`, `teacher` (a selection of its weights) or `random`",
    "ema": "running average of the weights, which is validated and kept: share that is kept in each step; 0: none",
    "cache_teacher": "keep the teacher's answers on disk: `True` without augmentation, n with n fixed views per image",
    "amp": "mixed precision: float16 on GPUs, bfloat16 on the CPU",
    "accumulation_steps": "batches whose gradients are summed before a step",
    "val_interval": "epochs between two validations",
    "pretrain_epochs": "epochs of `pretraining`",
    "formats": "files of the experts' weights, of `['pt', 'safetensors', 'ts', 'onnx']`; null: all that can be written",
    "backbone": "MONAI config of the network; any of its values: `--backbone#… VALUE`",
    "teacher_backbone": "the same for the teacher that `pretraining` trains",
}

NOTES = {
    "2d_classification": """* Images are PNG, JPEG, TIFF or DICOM files, or arrays of an `.npz` file in MedMNIST's form.
* Figures: balanced accuracy, accuracy, AUROC, with 95 % bootstrap intervals.
* An expert writes `predictions.csv`: file, the probability of each class, the class.""",
    "3d_classification": """* Volumes are NIfTI, NRRD or MHA files, folders of DICOM slices, or arrays of an
  `.npz` file. Files are turned to RAS; arrays are taken as they are.
* CT is windowed to -160..240 HU and other volumes to their percentiles 0.5 and 99.5, unless the task has an
  `"intensity"` in the data list.
* Figures: balanced accuracy, accuracy, AUROC, with 95 % bootstrap intervals.
* An expert writes `predictions.csv`: file, the probability of each class, the class.""",
    "2d_segmentation": """* Images are PNG, JPEG, TIFF or DICOM files of any size and proportions: the
  longer side becomes `image_size`, the rest is padded. A mask holds class numbers, not grey values.
* Figures: Dice, normalised surface Dice and 95 % Hausdorff distance (in pixels of the preprocessed image), with 95 %
  bootstrap intervals.
* An expert writes `<name>_seg.png`, 8 bit, with the rows and columns of the image.""",
    "3d_segmentation": """* Volumes are turned to RAS and resampled to the task's spacing: what `"spacing"` in the
  data list says, else the median of its training images. Windows as in `"intensity"`; by default -160..240 HU for CT,
  and for others the percentiles 0.5 and 99.5 of each volume.
* Training cuts patches; half of them are centred on foreground, each class as often. Validation and the experts slide
  a window over the whole volume.
* Figures: Dice, normalised surface Dice (tolerance 1 mm) and 95 % Hausdorff distance (mm), with 95 % bootstrap
  intervals.
* An expert writes `<name>_seg.nii.gz`, uint8, with the affine and shape of the volume. It reads NIfTI,
  NRRD, MHA and folders of DICOM slices.
* More detail in the decoder: `--rank_pattern "{'*submodule.2*': 2}"` (the extended paper doubles the
  decoder's rank).""",
}

PAGE = """# {name}

Takes one network that does many {dims} {kind} tasks passably, and makes one small network of each task, by low-rank
knowledge decomposition (LoRKD, arXiv 2404.17184 and 2409.19540): a shared network with a low-rank expert for each
task learns from the frozen teacher; then each expert is fused into a plain MONAI network and written as a MONAI bundle
that needs nothing but MONAI.

Not for clinical use.

## Run

Needs the package `lorkd-monai` and a data list of your tasks (docs/data.md of the package says how to make one). `B` is
this folder, `D` holds `dataset.json`, `OUT` is where the results go.

```bash
python -m monai.bundle run RUN_ID --bundle_root B --config_file B/configs/train.yaml --dataset_dir D --output_dir OUT
```

| run id | what it does |
|---|---|
| `pretraining` | trains a teacher on all tasks together, where you have none: `OUT/teacher`, a MONAI bundle |
| `training` (also `run`) | decomposes the teacher: `OUT/experts/<task>_{kind}`, one bundle for each task |
| `evaluating` | figures of the experts, and of the teacher beside them, on the test images: `OUT/figures.json` |
| `adding` | trains experts for new tasks, see below |

A run that was interrupted goes on from its last epoch when it is started again with the same settings.

### Notes on {dims} {kind}

{notes}

## Settings

Each is given as `--key VALUE`.

| key | default | |
|---|---|---|
{table}

## What a run leaves

| in `OUT` | |
|---|---|
| `experts/<task>_{kind}/` | the experts |
| `training/model.pt` | the decomposition, best epoch on the validation images (`lorkd tasks`, `lorkd export`) |
| `training/last.pt` | the state that an interrupted run goes on from |
| `training/figures.json` | figures of the experts on the test images |
| `training/events.out.…` | TensorBoard: each task's loss, the transfer, the validation |
| `teacher/`, `pretraining/` | the same of the teacher |
| `adding/` | the same of the decomposition with its new tasks |

## One expert by itself

```bash
E=OUT/experts/TASK_{kind}
python -m monai.bundle run --bundle_root $E --config_file $E/configs/inference.json \\
  --dataset_dir IMAGES --output_dir ANSWERS
```

`IMAGES` is an image or a folder of images. Where images share a name, those of the outputs say their folders or
suffixes too. What another run wrote is replaced only with `--overwrite true`.

The same answers from the decomposition, without an export:

```bash
python -m monai.bundle run --bundle_root B --config_file B/configs/inference.yaml --output_dir OUT \\
  --task TASK --dataset_dir IMAGES --predictions_dir ANSWERS
```

## A new task for a trained decomposition

```bash
python -m monai.bundle run adding --bundle_root B --config_file "['B/configs/train.yaml','B/configs/add.yaml']" \\
  --dataset_dir D --output_dir OUT
```

`D` holds the new tasks at least; `OUT` the trained decomposition. Each task of `D` that it does not have gets an expert
and a head; the shared network and all other experts stay as they are, to the last bit. Only new experts are written.

| key | default | |
|---|---|---|
| `new_tasks` | `null` | names of the tasks to add; null: all of `D` that are new: `"['retina']"` |
| `replace` | `false` | `True`: tasks of `new_tasks` that exist are trained anew, and their experts replaced |
| `rank` | `null` | rank of the new experts; null: that of the first task, or of the one replaced |
| `teacher_bundle` | `null` | a teacher that knows the new tasks; null: labels alone (`transfer_weight` is 0 then) |
| `trained` | `OUT/training/model.pt` | checkpoint to start from, such as `OUT/adding/model.pt` of an earlier `adding` |

The result is `OUT/adding/model.pt`, which every `lorkd` command takes. The next tasks go into another folder:
`--trained OUT/adding/model.pt --output_dir OUT2`. `evaluating`, called with `add.yaml` too, gives the figures of all
tasks of `D` that the result has (`OUT/adding/evaluation.json`). Image size, channels, `alpha`, `layout`, `norm`, and
the layers that have experts are those of the trained decomposition. `lorkd remove-task` takes a task out.

## Several GPUs, or several processes on a CPU

```bash
torchrun --standalone --nproc_per_node=2 -m monai.bundle run training --bundle_root B \\
  --config_file "['B/configs/train.yaml','B/configs/multi_gpu_train.yaml']" --dataset_dir D --output_dir OUT
```

`configs/evaluate.yaml`, given after `train.yaml` in the same way, makes `run` do what `evaluating` does.
"""


def render(folder: Path) -> str:
    """The page of one bundle."""
    config = yaml.safe_load((folder / "configs" / "train.yaml").read_text(encoding="utf-8"))
    name = folder.name.removeprefix("lorkd_")
    dims, kind = name.split("_")
    rows = []
    for key in list(config)[1 : list(config).index("initialize")]:
        if key not in KEYS:
            sys.exit(f"error: say in scripts/bundle_docs.py what {key!r} is")
        text = KEYS[key]
        text = text if isinstance(text, str) else text.get(name) or text[kind]
        value = config[key]
        default = (
            f"see configs/train.yaml: {value['_target_']}" if isinstance(value, dict) else f"`{shown(key, value)}`"
        )
        rows.append(f"| `{key}` | {default} | {text} |")
    title = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))["name"]
    return PAGE.format(name=title, dims=dims.upper(), kind=kind, notes=NOTES[name], table="\n".join(rows))


def shown(key: str, value: object) -> str:
    """A default as a user would write it."""
    expressions = {
        "dataset_dir": "<bundle_root>/data",
        "output_dir": "<bundle_root>/output",
        "teacher_bundle": "<output_dir>/teacher",
        "device": "cuda:0 where there is one, else cpu",
    }
    return expressions.get(key) or (value if isinstance(value, str) else json.dumps(value))


def main() -> None:
    """Write or check the pages."""
    stale = []
    for folder in sorted(BUNDLES.glob("lorkd_*")):
        page, text = folder / "docs" / "README.md", render(folder)
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(page.relative_to(BUNDLES.parent)))
        if "--check" not in sys.argv:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"error: {', '.join(stale)} not up to date: run python scripts/bundle_docs.py")


if __name__ == "__main__":
    main()
