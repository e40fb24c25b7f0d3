"""What MONAI's transforms lack, and the stock configs that training and expert bundles share."""

from lorkd_monai.transforms.augment import BatchAugment
from lorkd_monai.transforms.loading import ImageFacts, ItemLoader, describe_image, wrap_array
from lorkd_monai.transforms.preprocessing import (
    CT_WINDOW,
    PERCENTILES,
    default_intensity,
    postprocessing,
    preprocessing,
    saving_handlers,
)
from lorkd_monai.transforms.views import augment_together, fixed_view

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
