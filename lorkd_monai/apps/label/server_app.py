"""A MONAI Label app that serves every expert bundle in its folder ``model/``; needs MONAI Label and nothing else.

    monailabel start_server --app APP --studies FOLDER --host 127.0.0.1 --port 8000

``--conf models a,b`` serves only some of the experts. Nothing is downloaded. Research only; not for clinical use.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import monailabel
import nibabel
import numpy as np
from monai.data import MetaTensor
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import strtobool
from PIL import Image

_log = logging.getLogger(__name__)


def _classes(bundle: Path) -> dict[int, str]:
    """Class index -> name, in the data list's own spelling."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return {int(index): str(text).strip() for index, text in channels.items()}


def _refuse(problem: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, problem)


class ExpertInferTask(BundleInferTask):
    """One expert. Its postprocessing restores the image's grid, so Label must not resize the mask again."""

    def __init__(self, bundle: Path, conf: dict[str, str]) -> None:
        kind = bundle.name.rsplit("_", 1)[1]
        super().__init__(
            str(bundle), conf, type=kind, add_post_restore=False, extend_load_image=False, load_strict=True
        )
        if not self.is_valid():
            raise _refuse(f"{bundle} is not an expert bundle with configs/inference.json and models/model.pt")
        # Label makes names lower-case and drops "background", even if it is one of the classes of a classification.
        first = 0 if kind == "classification" else 1
        self.labels = {text: index for index, text in sorted(_classes(bundle).items()) if index >= first}

    def writer(self, data: dict[str, Any], extension: Any = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write a mask as PNG (2D) or NIfTI (3D), on the image's grid; the stock writer transposes 2D masks."""
        if self.type == "classification":
            return super().writer(data, extension, dtype)
        mask = data[self.output_label_key]
        values = (mask.array if isinstance(mask, MetaTensor) else np.asarray(mask))[0].astype(np.uint8)
        suffix = ".png" if values.ndim == 2 else ".nii.gz"
        wanted = data.get("result_extension")
        if wanted and wanted not in ((suffix,) if values.ndim == 2 else (".nii.gz", ".nii")):
            raise _refuse(f"result_extension: this expert writes {suffix}, got {wanted!r}")
        with tempfile.NamedTemporaryFile(suffix=wanted or suffix, delete=False) as file:
            path = file.name
        if values.ndim == 2:
            Image.fromarray(values).save(path)
        else:
            image = nibabel.Nifti1Image(values, mask.affine.numpy())
            nibabel.save(image, path)
        return path, {}


class ExpertTrainTask(BundleTrainTask):
    """Trains one segmentation expert further, on the images whose label is final."""

    def __init__(self, bundle: Path, conf: dict[str, str]) -> None:
        super().__init__(str(bundle), conf, load_strict=True)
        self.classes = _classes(bundle)

    def _fetch_datalist(self, request: dict, datastore: Any) -> list[dict[str, str]]:
        items = super()._fetch_datalist(request, datastore)
        if len(items) < 2:
            raise _refuse(
                f"training needs at least 2 images with a final label, one of them to validate; got {len(items)}"
            )
        for item in items:
            highest = int(np.asarray(_mask(item["label"])).max())
            if highest not in self.classes:
                # All experts share one datastore: a mask of another task must not train this expert.
                raise _refuse(
                    f"{item['label']} holds class {highest}, but {Path(self.bundle_path).name} knows only "
                    f"{', '.join(f'{i} ({text})' for i, text in sorted(self.classes.items()))}"
                )
        return items

    def _partition_datalist(self, datalist: list, request: dict, shuffle: bool = False) -> tuple[list, Any]:
        split = float(request.get("val_split", 0.2))
        if split <= 0:
            raise _refuse(
                f"val_split must be above 0: the best weights are chosen on the validation images; got {split}"
            )
        count = min(max(1, round(len(datalist) * split)), len(datalist) - 1)
        return datalist[count:], datalist[:count]

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list) -> None:
        if pretrained:
            super()._load_checkpoint(model_pytorch, pretrained, train_handlers)
        else:
            train_handlers[:] = [item for item in train_handlers if item.get("_target_") != "CheckpointLoader"]


def _mask(path: str) -> Any:
    return Image.open(path) if path.lower().endswith((".png", ".jpg", ".tif", ".bmp")) else nibabel.load(path).dataobj


class ExpertsApp(MONAILabelApp):
    """Serves the experts of ``model/``, or those that ``--conf models`` names."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        found = {
            path.parent.parent.name: path.parent.parent
            for path in sorted(Path(app_dir).resolve().glob("model/*/configs/inference.json"))
        }
        wanted = [name.strip() for name in (conf or {}).get("models", "all").split(",") if name.strip()]
        unknown = [name for name in wanted if name not in found and name != "all"]
        if unknown or not found:
            raise _refuse(
                f"there is no expert {', '.join(unknown) or 'at all'}; model/ holds {', '.join(found) or 'none'}"
            )
        self.experts = found if "all" in wanted or not wanted else {name: found[name] for name in wanted}
        super().__init__(
            app_dir=app_dir, studies=studies, conf=conf, name="LoRKD experts", version=monailabel.__version__,
            description="Expert networks, one for each task. Research only; not for clinical use.",
        )  # fmt: skip

    def init_infers(self) -> dict[str, Any]:
        return {name: ExpertInferTask(bundle, self.conf) for name, bundle in self.experts.items()}

    def init_trainers(self) -> dict[str, Any]:
        if strtobool(self.conf.get("skip_trainers", "false")):
            return {}
        # Labels in MONAI Label are masks: a classification can't be trained on them.
        return {
            name: ExpertTrainTask(bundle, self.conf)
            for name, bundle in self.experts.items()
            if name.endswith("_segmentation") and (bundle / "configs" / "train.json").is_file()
        }

    def init_strategies(self) -> dict[str, Any]:
        return {"random": Random(), "first": First()}
