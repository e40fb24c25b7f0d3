"""Metrics of each task, with bootstrap intervals."""

from lorkd_monai.metrics.classification import classification_figures
from lorkd_monai.metrics.segmentation import case_scores, segmentation_figures

__all__ = ["case_scores", "classification_figures", "segmentation_figures"]
