"""The former place of `lorkd_monai.teachers.bundle`; it goes with version 0.2."""

import warnings

from lorkd_monai.teachers.bundle import *  # noqa: F403
from lorkd_monai.teachers.bundle import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.teacher_bundle has moved to lorkd_monai.teachers.bundle; the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
