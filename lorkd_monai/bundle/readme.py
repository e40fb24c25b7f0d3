"""The pages of an expert bundle that a person reads: docs/README.md and docs/data_license.txt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorkd_monai.bundle.configs import Pipeline
from lorkd_monai.bundle.inert import markdown_text
from lorkd_monai.tasks import TaskSpec, Work

__all__ = ["SECTIONS", "data_license_text", "readme_text"]

# The model zoo's template; the checker wants each of these.
SECTIONS = (
    "Authors",
    "Tags",
    "Model Description",
    "Data",
    "Preprocessing",
    "Performance",
    "Usage",
    "System Configuration",
    "Limitations",
    "Citation Info",
    "References",
)

NO_LICENSE = "Whoever passes this bundle on has to find out the licence of the data and to name it here."

_COSTS = {
    "parameters": "Parameters",
    "macs": "Multiply-accumulates, one input",
    "weights_mib": "Weights in memory (MiB)",
    "activations_mib": "Outputs of all layers, one input (MiB)",
    "latency_ms": "Latency on the exporting CPU, one input (ms)",
}

_CITATION = """```
@inproceedings{zhou2024lorkd,
  title={Low-Rank Knowledge Decomposition for Medical Foundation Models},
  author={Zhou, Yuhang and Li, Haolin and others},
  booktitle={CVPR},
  year={2024}
}
```"""


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return markdown_text(value)


def _performance(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "No metrics were measured when this bundle was written; `configs/evaluate.json` measures them."
    rows = ["| Metric | Value | 95 % interval | Images |", "| --- | --- | --- | --- |"]
    for name, figure in metrics.items():
        values = figure if isinstance(figure, Mapping) else {"value": figure}
        low, high = values.get("low"), values.get("high")
        interval = f"{_number(low)} to {_number(high)}" if low is not None and high is not None else "not given"
        count = _number(values["n"]) if values.get("n") is not None else "not given"
        rows.append(f"| {markdown_text(name)} | {_number(values.get('value'))} | {interval} | {count} |")
    return "\n".join(rows)


def _costs(measured: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    rows = ["| | This expert | Teacher |", "| --- | --- | --- |"]
    for key, words in _COSTS.items():
        if key in measured:
            other = _number(teacher[key]) if key in teacher else "not given"
            rows.append(f"| {words} | {_number(measured[key])} | {other} |")
    return "\n".join(rows)


def _facts(facts: Mapping[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """One bullet for each fact that is a plain value or a flat mapping."""
    lines = []
    for key, value in facts.items():
        if key in left_out or value is None:
            continue
        words = markdown_text(str(key).replace("_", " "))
        if isinstance(value, Mapping):
            plain = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
            value = ", ".join(f"{markdown_text(k)} {_number(v)}" for k, v in plain.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(_number(item) for item in value)
        else:
            value = _number(value)
        lines.append(f"* {words}: {value}")
    return lines


def _preparation(preprocessing: list[dict]) -> str:
    """The transforms by name, with those of their arguments that are plain values."""
    lines = []
    for step in preprocessing:
        if isinstance(step, str):
            lines.append("1. an expression")
            continue
        plain = {key: value for key, value in step.items() if key not in ("_target_", "keys")}
        shown = [f"{k}={v!r}" for k, v in plain.items() if not isinstance(v, Mapping) and not str(v).startswith("$")]
        lines.append(f"1. `{step['_target_'].rsplit('.', 1)[-1]}({', '.join(shown)})`")
    return "\n".join(lines)


def _usage(name: str, kind: str, formats: tuple[str, ...], trace: bool) -> str:
    result = (
        "`predictions.csv`: for each image its file, the probability of each class, and the index of the likeliest"
        if kind == "classification"
        else "one mask per image (class indices, uint8) in the image's own geometry"
    )
    others = [f"`models/model.{suffix}`" for suffix in formats]
    return f"""The commands work from any working directory; `B` is the path of this bundle, as in `B={name}`. They need
the packages of `configs/metadata.json` and nothing else.

Images (one file, or a folder) to {result}:

```
python -m monai.bundle run --bundle_root $B --config_file $B/configs/inference.json \
--dataset_dir IMAGES --output_dir OUT
```

Chosen files: `--images "['a', 'b']"` in place of `--dataset_dir`. What another run wrote into
`OUT` is replaced only with `--overwrite true`.

Metrics on labelled images, and fine-tuning. `DATA/dataset.json` is a data list such as the decomposition was trained
on: `training`, `validation` and `test` items with `image` and `label`, those of another `task` and those without a
label left out (`--task` where the list has another name for it). Images are turned by up to `--rotate` degrees and
mirrored along `--flip_axes`, as in the decomposition. The best weights replace `models/model.pt` unless `--ckpt_dir`
names another folder:

```
python -m monai.bundle run --bundle_root $B --config_file "['$B/configs/train.json','$B/configs/evaluate.json']" \
--dataset_dir DATA --output_dir OUT
python -m monai.bundle run training --bundle_root $B --config_file $B/configs/train.json --dataset_dir DATA
torchrun --standalone --nproc_per_node=2 -m monai.bundle run training --bundle_root $B \
--config_file "['$B/configs/train.json','$B/configs/multi_gpu_train.json']" --dataset_dir DATA
```

The same weights are in {", ".join(others)}. After fine-tuning, write the TorchScript form again (never rename it):

```
python -m monai.bundle ckpt_export network_def --filepath $B/models/model.ts --ckpt_file $B/models/model.pt \
--meta_file $B/configs/metadata.json --config_file $B/configs/inference.json{" --use_trace True" if trace else ""}
```"""


def readme_text(
    metadata: Mapping[str, Any],
    folder_name: str,
    work: Work,
    pipeline: Pipeline,
    metrics: Mapping[str, Any],
    parent: Mapping[str, Any],
    measured: Mapping[str, Any],
    formats: tuple[str, ...],
) -> str:
    """Return docs/README.md, after the model zoo's template.

    ``metrics`` maps a name to a number or to ``{"value", "low", "high", "n"}``; ``measured`` and
    ``parent["teacher"]`` may hold what `lorkd_monai.metrics.costs.measure` returns; what else ``parent`` holds is
    listed as it is.
    """
    task = work.task
    teacher = parent["teacher"] if isinstance(parent.get("teacher"), Mapping) else {}
    teacher_facts = _facts(teacher, tuple(_COSTS))
    parent_facts = _facts(parent, ("teacher", "augmentation", "authors", "copyright", "data_source", "data_license"))
    classes = "\n".join(f"* {i}: {markdown_text(name)}" for i, name in sorted(task.labels.items()))
    data = [f"* modality: {markdown_text(task.modality or 'not given')}"]
    data.append(f"* body part: {markdown_text(task.body_part or 'not given')}")
    if task.note:
        data.append(f"* note: {markdown_text(task.note)}")
    if parent.get("data_source"):
        data.append(f"* source: {markdown_text(parent['data_source'])}")
    references = "\n".join(f"[{i}] {text}\n" for i, text in enumerate(metadata["references"], 1))
    packages = {"torch": metadata["pytorch_version"], "monai": metadata["monai_version"]}
    packages |= {"numpy": metadata["numpy_version"], **metadata["required_packages_version"]}
    pins = " ".join(f"{name}=={version}" for name, version in packages.items())
    newline = "\n"
    return f"""# {markdown_text(metadata["name"])}

### **Authors**
{markdown_text(metadata["authors"])}

### **Tags**
{work.kind.capitalize()}, {markdown_text(metadata["task"].split()[0])}, {markdown_text(task.modality or "image")}, LoRKD

## **Model Description**
{markdown_text(metadata["description"])}

It runs without the package that made it [1, 2]. Its classes, in the order of its output channels:

{classes}

#### **Parent decomposition**
{newline.join(parent_facts) or "No facts were given when this bundle was written."}

#### **Teacher**
{newline.join(teacher_facts) or "No facts were given when this bundle was written."}

## **Data**
{newline.join(data)}

The licence of the data: `docs/data_license.txt`.

#### **Preprocessing**
As `configs/inference.json` does it:

{_preparation(pipeline.preprocessing)}

## **Performance**
{_performance(metrics)}

## **Usage**
{_usage(folder_name, work.kind, formats, metadata.get("torchscript") == "trace")}

## **System Configuration**
A CPU is enough; a GPU is used where there is one. The tested packages:

```
pip install {pins}
```

{_costs(measured, teacher)}

## **Limitations**
* **Not for clinical use.** This is research software; no regulatory agency has cleared or approved it.
* It knows the classes above and nothing else: on an image of another modality, body part or device its output means
  nothing, and it does not say so.
* The metrics above are those of one data set; measure it on your own images first.

## **Citation Info**
{_CITATION}

## **References**
{references}"""


def data_license(task: TaskSpec, parent: Mapping[str, Any]) -> str | None:
    """The licence of the training data: what ``parent`` says, else what the data list says of the task."""
    return parent.get("data_license") or task.licence


def data_license_text(task: TaskSpec, parent: Mapping[str, Any]) -> str:
    """Return docs/data_license.txt: what is known of the training data and its licence, and plainly what is not."""
    source = parent.get("data_source")
    licence = data_license(task, parent)
    lines = [
        f"The data that the expert '{task.name}' was trained on",
        "",
        f"Source: {' '.join(str(source).split()) if source else 'not given by the data list'}",
        f"Licence: {' '.join(str(licence).split()) if licence else 'not given by the data list'}",
    ]
    if task.note:
        lines.append(f"Note: {' '.join(str(task.note).split())}")
    if not licence:
        lines += ["", NO_LICENSE]
    return "\n".join(lines) + "\n"
