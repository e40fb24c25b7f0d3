"""The former place of `lorkd_monai.checkpoints.released_code`; it goes with version 0.2."""

import warnings

from lorkd_monai.checkpoints.released_code import *  # noqa: F403
from lorkd_monai.checkpoints.released_code import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.authors has moved to lorkd_monai.checkpoints.released_code; "
    "the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
