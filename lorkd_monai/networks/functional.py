"""The former place of `lorkd_monai.networks.eks.strategies`; it goes with version 0.2."""

import warnings

from lorkd_monai.networks.eks.strategies import *  # noqa: F403
from lorkd_monai.networks.eks.strategies import __all__ as __all__

warnings.warn(
    "lorkd_monai.networks.functional has moved to lorkd_monai.networks.eks.strategies; "
    "the old name goes with version 0.2",
    DeprecationWarning,
    stacklevel=2,
)
