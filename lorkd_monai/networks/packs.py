"""The former place of `lorkd_monai.checkpoints.packs`; it goes with version 0.2."""

import warnings

from lorkd_monai.checkpoints.packs import *  # noqa: F403
from lorkd_monai.checkpoints.packs import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.packs has moved to lorkd_monai.checkpoints.packs; the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
