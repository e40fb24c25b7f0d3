"""The former place of `lorkd_monai.serving.pool`; it goes with version 0.2."""

import warnings

from lorkd_monai.serving.pool import *  # noqa: F403
from lorkd_monai.serving.pool import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.pool has moved to lorkd_monai.serving.pool; the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
