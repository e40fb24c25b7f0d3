"""The objective of a run."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset

from lorkd_monai.data import DataList
from lorkd_monai.losses import FeatureTransferLoss, LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.teachers.find import knows_tasks
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["make_objective"]


def make_objective(
    network: LoRKDNet | nn.Module,
    teacher: Teacher | None,
    data: DataList,
    dataset: Dataset,
    transfer_weight: float = 1.0,
    temperature: float = 4.0,
    transfer_positions: str = "by_class",
) -> LoRKDLoss:
    """The objective of a run: cross entropy or DiceCE, and the transfer that its teacher allows.

    Tasks that the teacher has classes for are distilled from its logits; where it lacks a task, that task is distilled
    from pooled features through a learned projection.

    Args:
        network: the network to train.
        teacher: None: no transfer.
        data: the data list.
        dataset: training images, for the width of the features.
        transfer_weight: of the transfer beside the task loss.
        temperature: of the transfer.
        transfer_positions: "equal" or "by_class", see `transfer_loss`.
    """
    features = None
    if teacher is not None and not knows_tasks(teacher, data, "training"):
        with torch.no_grad():
            device = next(network.parameters()).device
            image, task = dataset[0]["image"][None].to(device), int(dataset[0]["task"])
            training = network.training
            student = network.eval()(image, task, return_features=True)[1]
            network.train(training)
            width = teacher.to(device)(image, task, return_features=True)[1].shape[1]
        features = FeatureTransferLoss(student.shape[1], width, temperature)
    return LoRKDLoss(
        "ce" if data.kind == "classification" else "dice_ce",
        transfer_weight if teacher is not None else 0.0,
        temperature,
        mode="softmax" if teacher is None else teacher.activation,
        transfer_positions=transfer_positions,
        tasks=data.num_classes,
        feature_transfer=features,
        feature_weight=transfer_weight,
    )
