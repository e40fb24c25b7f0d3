"""The former place of `lorkd_monai.checkpoints.weights`; it goes with version 0.2."""

import warnings

from lorkd_monai.checkpoints.weights import *  # noqa: F403
from lorkd_monai.checkpoints.weights import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.checkpoint has moved to lorkd_monai.checkpoints.weights; the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
