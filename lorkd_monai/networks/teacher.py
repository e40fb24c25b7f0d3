"""The former place of `lorkd_monai.teachers.teacher`; it goes with version 0.2."""

import warnings

from lorkd_monai.teachers.teacher import *  # noqa: F403
from lorkd_monai.teachers.teacher import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.teacher has moved to lorkd_monai.teachers.teacher; the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
