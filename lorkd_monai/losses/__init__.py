"""Losses of a decomposition: the task's own, and the transfer of the teacher's knowledge."""

from lorkd_monai.losses.objective import LoRKDLoss
from lorkd_monai.losses.task import CrossEntropyPerTask, PerTaskLoss
from lorkd_monai.losses.transfer import FeatureTransferLoss, TransferLoss, transfer_loss

__all__ = ["CrossEntropyPerTask", "FeatureTransferLoss", "LoRKDLoss", "PerTaskLoss", "TransferLoss", "transfer_loss"]
