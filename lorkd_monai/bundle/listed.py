"""How an expert's own configs read a data list and augment its items, by expressions and stock MONAI classes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LISTED", "OTHER_CLASSES", "STEMS", "augment_steps", "no_items", "or_arrays"]

# The items of a data list as the decomposition took them: by their own task, below the list's folder, also the arrays
# of an .npz file. MONAI's load_decathlon_datalist makes a path of every text that is also the name of a file or folder,
# such as a task's.
LISTED = {
    "data_list": "$str(@dataset_dir) if os.path.isfile(str(@dataset_dir)) else "
    "os.path.join(str(@dataset_dir), 'dataset.json')",
    "data_dir": "$os.path.dirname(str(@data_list)) if os.path.isfile(str(@dataset_dir)) else str(@dataset_dir)",
    # Without a list everything can be built all the same; the run says what is missing.
    "listed": "$json.load(open(@data_list, encoding='utf-8')) if os.path.isfile(@data_list) else {}",
    "entry": "$@listed.get('tasks', {}).get(str(@task), {})",
    "arrays": "$dict(np.load(os.path.join(@data_dir, @entry['npz']))) if 'npz' in @entry else {}",
    "located": "$lambda path: [os.path.join(@data_dir, name) for name in path] if isinstance(path, list) else "
    "os.path.join(@data_dir, path) if isinstance(path, str) else path",
    # An image without a label (null, -1) can neither be learnt from here nor be judged by.
    "items": "$lambda split, stem: [{'image': @located(item['image']), 'label': @located(item['label'])} "
    "for item in @listed.get(split, []) if isinstance(item, dict) and str(item.get('task', @task)) == str(@task) "
    "and item.get('label') not in (None, -1)] + [{'image': image, 'label': int(label)} for image, label in "
    "zip(@arrays.get(stem + '_images', []), np.ravel(@arrays.get(stem + '_labels', []))) if label != -1]",
    # Without spaces, # and :, of which the metadata's names and MONAI's parser make others.
    "spelled": "$lambda names: [''.join(str(name).split()).translate({35: None, 58: None}) for name in names]",
    "classes": "$@spelled(@_meta_#network_data_format#outputs#pred#channel_def.values())",
    "listed_classes": "$@spelled(@entry['labels'][key] for key in sorted(@entry['labels'], key=int)) "
    "if 'labels' in @entry else @classes",
}
OTHER_CLASSES = (
    "$@listed_classes == @classes or sys.exit('error: the classes of task ' + repr(@task) + ' are ' + "
    "', '.join(@listed_classes) + ' in ' + repr(@data_list) + ', and ' + ', '.join(@classes) + ' in this bundle: "
    "expected the same in the same order')"
)
STEMS = {"training": "train", "validation": "val", "test": "test"}  # of the arrays in an .npz file


def no_items(split: str, dataset: str) -> str:
    """The step of a run that refuses an empty ``dataset`` in one line."""
    return (
        f"$@{dataset}#data or sys.exit('error: no labelled {split} item of task ' + repr(@task) + (' in ' if "
        "os.path.isfile(@data_list) else ': there is no file ') + repr(@data_list) + (', which has the tasks ' + "
        "', '.join(@listed.get('tasks', {})) if @listed.get('tasks') else '') + ': expected --dataset_dir to be the "
        "folder of a data list with some, and --task its name for them')"
    )


def or_arrays(preprocessing: list[dict], spatial_dims: int) -> list[dict]:
    """``preprocessing`` that takes, in place of a file, an array with its channels last, as an .npz file holds it."""
    # A second or fourth channel of a picture is alpha, unless the network takes so many.
    alpha = (
        "x.ndim == 3 and x.shape[-1] in (2, 4) and x.shape[-1] != @_meta_#network_data_format#inputs#image#num_channels"
    )
    visible = f"x[..., :-1] if {alpha} else x" if spatial_dims == 2 else "x"
    wrap = {
        "_target_": "Lambdad",
        "_disabled_": "$not @arrays",
        "keys": "image",
        "func": "$lambda x: (lambda x: monai.data.MetaTensor(torch.as_tensor("
        f"np.ascontiguousarray(x).astype(np.float32)), meta={{'original_channel_dim': -1 if x.ndim > {spatial_dims} "
        "else 'no_channel', 'mode': {'u1': 'L', 'u2': 'I;16'}.get(x.dtype.str[1:], 'F' if x.dtype.kind == 'f' else "
        "'I'), 'filename_or_obj': 'an image of ' + "
        f"@entry['npz']}}))({visible})",
    }
    steps = [
        {**step, "_disabled_": "$bool(@arrays)"} if isinstance(step, dict) and step.get("_target_") == "LoadImaged"
        else step for step in preprocessing
    ]  # fmt: skip
    return [wrap, *steps]


def augment_steps(keys: list[str], image_size: Sequence[int]) -> list[dict | str]:
    """What `BatchAugment` does in the decomposition, by stock transforms, for ``@rotate`` and ``@flip_axes``."""
    dims = len(image_size)
    return [
        f"$monai.transforms.Compose([monai.transforms.RandLambdad({keys}, func=monai.transforms.Flip(axis), prob=0.5) "
        "for axis in @flip_axes])",
        {
            "_target_": "RandAffined",
            "keys": keys,
            "prob": 0.5,
            "rotate_range": f"$[float(np.radians(@rotate))] * {1 if dims == 2 else 3}",
            "scale_range": [0.1] * dims,
            "translate_range": [0.05 * n for n in image_size],
            "mode": ["bilinear", "nearest"][: len(keys)],
            "padding_mode": "zeros",
        },
        {"_target_": "RandScaleIntensityFixedMeand", "keys": "image", "factors": 0.1, "prob": 0.5},
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 0.5},
    ]
