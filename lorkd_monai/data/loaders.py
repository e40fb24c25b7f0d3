"""Batches for training and evaluation."""

from __future__ import annotations

from torch.utils.data import DataLoader, Dataset, Sampler

from lorkd_monai.checks import check_whole
from lorkd_monai.data import TaskBatchSampler, TaskSampler

__all__ = ["test_loader", "train_loader"]


def train_loader(
    dataset: Dataset, sampler: TaskSampler, batch_size: int, num_workers: int = 0, tasks_per_batch: int | None = None
) -> DataLoader:
    """Batches for training; a last batch that is not full is left out, as batch norm may find a single sample in it.

    ``tasks_per_batch`` makes batches of so many tasks with as many samples each, see `TaskBatchSampler`; None: all
    tasks mixed, each as it was drawn.

    Raises:
        LoRKDError: a batch size below 1, or more tasks in a batch than samples.
    """
    check_whole("batch_size", batch_size)
    if tasks_per_batch is not None:
        batches = TaskBatchSampler(sampler, batch_size, tasks_per_batch)
        return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)
    full = len(sampler) >= batch_size
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=full, num_workers=num_workers)


def test_loader(dataset: Dataset, batch_size: int = 64, sampler: Sampler | None = None) -> DataLoader:
    """Batches for evaluation, in order; images of different sizes need ``batch_size=1``.

    ``sampler`` chooses the images of this process, where several share the work; None: all.
    """
    return DataLoader(dataset, batch_size, shuffle=False, sampler=sampler)
