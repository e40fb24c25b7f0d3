"""What MONAI's transforms lack, and the stock configs that training and expert bundles share."""

from .augment import BatchAugment
from .loading import ImageFacts, ItemLoader, describe_image, wrap_array
from .preprocessing import (
    CT_WINDOW,
    PERCENTILES,
    default_intensity,
    postprocessing,
    preprocessing,
    saving_handlers,
)
from .views import augment_together, fixed_view

__all__ = [
    "CT_WINDOW",
    "PERCENTILES",
    "BatchAugment",
    "ImageFacts",
    "ItemLoader",
    "augment_together",
    "default_intensity",
    "describe_image",
    "fixed_view",
    "postprocessing",
    "preprocessing",
    "saving_handlers",
    "wrap_array",
]
