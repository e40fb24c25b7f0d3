"""The gate: what an image and a mask must be, in training and in use.

Each rule is an expression in the preprocessing configs. Training runs these, and an expert bundle contains them, so
that both refuse the same files. They use only MONAI, torch and numpy.

A fault is a ``ValueError("refused: FILE …")`` that says what is wrong and what to do. MONAI wraps it in errors of its
own; `refusal` finds it again. Something odd that may be right is a warning ``look at FILE: …``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import Any

from lorkd_monai.transforms.dicom import IS_DICOM, compiled

__all__ = ["affine_fault", "gate", "odd", "refusal", "scaled", "upright"]

# In the expressions, x is a plain tensor C×H×W[×D], m what is known of it (``meta``) and a its affine.
_NAME = "str(m.get('filename_or_obj', 'the image'))"
_MODE = "str(m.get('mode'))"  # PIL's, which gives a file's depth
# The further pictures of an MPO are previews of the first. Pillow 13 mixes up the pixels of a TIFF that lies on its
# side.
_PICTURE_FAULT = (
    "' holds ' + str(image.n_frames) + ' pages or frames, expected one; save each as a file of its own' "
    "if image.format != 'MPO' and getattr(image, 'n_frames', 1) > 1 else "
    "' lies on its side, as its orientation tag says; turn it and save it without the tag' "
    "if image.format == 'TIFF' and image.tag_v2.get(274, 1) > 4 else ''"
)
_TURN = "monai.utils.optional_import('PIL.ImageOps', name='exif_transpose')[0](image, in_place=True)"
# LoadImage tries other readers where one fails: what cannot be used raises when it is asked for its pixels.
_REFUSED = (
    "type('Refused', (), {'format': property(lambda refused: torch._check_value(False, "
    "lambda: 'refused: ' + str(image.filename) + fault))})()"
)
_AFFINE = (
    "(': its affine holds NaN or infinity; fix its header' if not a.isfinite().all() else "
    "': its affine has a spacing of 0 mm, or axes in one plane (spacing ' + str(a[:3, :3].norm(dim=0).tolist()) + "
    "'); fix its header' if not a[:3, :3].det().abs() > 1e-6 * a[:3, :3].norm(dim=0).prod() else '')"
)


def refusal(error: BaseException) -> str | None:
    """Return the gate's message about a file from an error that it caused; None for other errors."""
    found = re.search("ValueError: refused: (.*)", "".join(traceback.format_exception(error)))
    return None if found is None else found[1]


def affine_fault(affine: Any) -> str:
    """Return what is wrong with an affine (a 4×4 tensor), or an empty string."""
    return compiled(f"$lambda a: {_AFFINE}")(affine)


def upright(then: str = "image") -> str:
    """Return the converter of a `PILReader`: one picture, turned as its orientation tag says, and ``then``."""
    good = f"({_TURN}, {then})[-1]"
    return f"$lambda image: (lambda fault: {_REFUSED} if fault else {good})({_PICTURE_FAULT})"


def gate(
    spatial_dims: int, channels: Sequence[int], full: float | None, num_classes: int | None = None
) -> dict[str, Any]:
    """Return the config of the step that checks an image, and its mask where there are ``num_classes``, C×H×W[×D].

    Checked are the axes, the number of channels, the affine (3D) and the values; that a mask has one channel of class
    ids 0 to ``num_classes`` - 1; that it is where its image is. It gets the image's affine, as the two may differ by
    rounding, and its values are rounded to whole numbers. A grey 2D mask saved in colours is one channel.

    Args:
        spatial_dims: 2 or 3.
        channels: numbers of channels that an image may have.
        full: the value of white in 2D: files of 8 and 16 bits are brought to it by their own depth, floats and other
            numbers must have that range. None takes all values as they are.
        num_classes: None where there is no mask.
    """
    image = _checked("image", _image_faults(spatial_dims, channels, full), _own_depth(full))
    if num_classes is None:
        return {"_target_": "Lambda", "func": f"$lambda d: {image}"}
    mask = _checked("label", _mask_faults(spatial_dims, num_classes), "dict(d, label=d['label'][:1].round())")
    return {"_target_": "Lambda", "func": f"$lambda d: (lambda d: (lambda d: {_pair(spatial_dims)})({mask}))({image})"}


def odd(limits: Sequence[float] | None) -> str:
    """Return the expression of what is odd about an image that was scaled to 0..1; an empty string for nothing.

    Its names are the image's ``low``, ``high`` and ``mean``.

    Args:
        limits: what became 0 and 1; None where each image is scaled by itself.
    """
    if limits is None:
        return "('it has one value throughout' if low == high else '')"
    scale = f"after scaling from {limits[0]:g}..{limits[1]:g} to 0..1: is that the range of its values?"
    text = (
        f"('it is nearly all 0 {scale}' if mean < 0.0005 or high < 0.05 else "
        f"'it is nearly all 1 {scale}' if mean > 0.995 or low > 0.95 else "
    )
    if limits[0] < 0:
        zero = limits[0] / (limits[0] - limits[1])
        text += f"'it holds no value below 0, its range begins at {limits[0]:g}' if low >= {zero} else "
    return text + "'')"


def scaled(limits: Sequence[float] | None) -> dict[str, Any]:
    """Return the config of the step that follows the scaling to 0..1 and warns of an image that is `odd` after it.

    Without ``limits`` it also scales channels whose percentiles are equal, which MONAI does not scale at all: from
    their least to their greatest value. A channel of a single value becomes 0.
    """
    warn = f"monai.utils.optional_import('warnings')[0].warn('look at ' + {_NAME} + ': ' + odd)"
    look = f"(lambda low, high, mean: (lambda odd: odd and {warn})({odd(limits)}) or d)(x.min(), x.max(), x.mean())"
    if limits is not None:
        return {"_target_": "Lambda", "func": f"$lambda d: {_of('image', look)}"}
    fixed = (
        "(lambda low, high: (lambda good: d if bool(good.all()) else dict(d, image=torch.where(good, d['image'], "
        "(d['image'] - low) / (high - low).clamp(min=1e-30))))((low == 0) & ((high - 1).abs() < 0.001)))"
        "(*[f(dim=tuple(range(1, x.ndim)), keepdim=True) for f in (x.amin, x.amax)])"
    )
    return {"_target_": "Lambda", "func": f"$lambda d: (lambda d: {_of('image', look)})({_of('image', fixed)})"}


def _image_faults(spatial_dims: int, channels: Sequence[int], full: float | None) -> list[str]:
    wanted = " or ".join(map(str, sorted(set(channels))))
    faults = [
        *_axes(spatial_dims),
        f"' has ' + str(x.shape[0]) + ' channel' + 's' * (x.shape[0] > 1) + ', expected {wanted}; save the one that "
        "is meant as a file of its own' "
        f"if x.shape[0] not in {tuple(channels)} else ''",
        "' holds values that are not finite (NaN or infinity); replace them' "
        "if not (x.sum().isfinite() or x.isfinite().all()) else ''",
    ]
    if full is not None:
        # A tenth may be an overshoot of resampling; of what is as dark as z-scores are, white may be something else.
        least = 0 if full == 1 else 0.02 * full
        fits = f"x.min() >= -0.1 * x.max() and {least:g} < x.max() <= {1.1 * full:g} or x.min() == x.max() == 0"
        faults.append(
            f"' holds values from {{:g}} to {{:g}}, but white is {full:g} in the task; scale them, or state the "
            "intensity of the task in its data list before training'.format(float(x.min()), float(x.max())) "
            f"if {_MODE} in ('F', 'I') and not ({fits}) else ''"
        )
    return faults


def _own_depth(full: float | None) -> str:
    if full is None:
        return "d"
    factors = dict.fromkeys(("L", "RGB"), full / 255) | dict.fromkeys(("I;16", "I;16L", "I;16B"), full / 65535)
    factors = {mode: factor for mode, factor in factors.items() if factor != 1}
    return f"dict(d, image=d['image'] * {factors}[{_MODE}]) if {_MODE} in {tuple(factors)} else d"


def _mask_faults(spatial_dims: int, num_classes: int) -> list[str]:
    last = num_classes - 1
    one = "x.shape[0] == 1"
    if spatial_dims == 2:
        one += f" or ((x[:-1] if {_MODE} in ('LA', 'PA', 'RGBA') else x) == x[:1]).all()"
    good = f"((x - x.round()).abs() < 0.001).all() and x.min() > -0.5 and x.max() < {last + 0.5}"
    bad = f"x[~(((x - x.round()).abs() < 0.001) & (x > -0.5) & (x < {last + 0.5}))]"
    hint = (
        "' (write class ids into the mask, not grey values)' if (bad == 255).all() else "
        "' (a mask holds whole class ids, 0 where there is none)' if not bad.min() == bad.min().round() else ''"
    )
    return [
        *_axes(spatial_dims),
        "': the mask has ' + str(x.shape[0]) + ' channels, expected one of class ids; write one, such as the argmax of "
        f"one-hot channels' if not ({one}) else ''",
        f"(lambda x: '' if {good} else (lambda bad: ': the mask holds ' + '{{:.7g}}'.format(float(bad.min())) + ', its "
        f"task has classes 0 to {last}' + ({hint}))({bad}))(x[:1])",
    ]


def _pair(spatial_dims: int) -> str:
    turned = "" if spatial_dims == 3 else " (a photograph is turned as its orientation tag says: turn its mask, too)"
    faults = [
        "': the image is of size ' + str(tuple(x.shape[1:])) + ', its mask of ' + str(tuple(y.shape[1:])) + "
        f"'; they must be the same{turned}' if x.shape[1:] != y.shape[1:] else ''"
    ]
    result = "d"
    if spatial_dims == 3:
        corners = "torch.cartesian_prod(*[torch.tensor([0.0, n - 1.0]).to(a) for n in x.shape[1:]]).T"
        faults.append(
            "(lambda shift: ': the mask lies up to {:.2f} mm beside its image; both need the same affine'"
            ".format(float(shift)) if shift > 0.5 * a[:3, :3].norm(dim=0).min() else '')"
            f"(((b - a)[:3, :3].matmul({corners}) + (b - a)[:3, 3:]).norm(dim=0).max())"
        )
        result = "(y.__setattr__('affine', x.affine.clone()), d)[-1]"
    name = f"{_NAME} + ' with mask ' + {_NAME.replace('m.', 'y.meta.')}"
    return (
        f"(lambda x, y, m, a, b: {_refuse(faults, name)} or {result})"
        "(d['image'], d['label'], d['image'].meta, d['image'].affine.double(), d['label'].affine.double())"
    )


def _axes(spatial_dims: int) -> list[str]:
    faults = [
        f"' has the axes ' + str(tuple(x.shape[1:])) + ', expected {spatial_dims} of them' "
        f"if x.ndim != {spatial_dims + 1} else ''"
    ]
    if spatial_dims == 2:
        return faults
    # MONAI replaces an affine that is not valid and drops imaginary parts: both are looked up in the file itself.
    stored = f"monai.utils.optional_import('nibabel')[0].load({_NAME})"
    nifti = f"{_NAME}.lower().endswith(('.nii', '.nii.gz'))"
    return [
        *faults,
        f"' is one DICOM slice; give the folder of its series' if x.shape[-1] == 1 and ({IS_DICOM})({_NAME}) else ''",
        "(lambda kind: '' if kind in 'biuf' else ' holds complex numbers or colours, expected one number a voxel; save "
        f"what is meant as a file of its own')({stored}.get_data_dtype().kind if {nifti} else 'f')",
        f"(lambda a: {_AFFINE})(torch.as_tensor({stored}.affine) if {nifti} else a)",
    ]


def _checked(key: str, faults: Sequence[str], result: str) -> str:
    return _of(key, f"{_refuse(faults, _NAME)} or ({result})")


def _of(key: str, expression: str) -> str:
    """An expression of x, m and a, which stand for what the item d has at ``key``."""
    return f"(lambda x, m, a: {expression})(d['{key}'].as_tensor(), d['{key}'].meta, d['{key}'].affine.double())"


def _refuse(faults: Sequence[str], name: str) -> str:
    """Raise the first fault that is no empty string; else the expression is None."""
    first = " or ".join(f"({fault})" for fault in faults)
    return f"(lambda fault: torch._check_value(not fault, lambda: 'refused: ' + {name} + fault))({first})"
