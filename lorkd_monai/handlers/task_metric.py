"""The metric that selects the best epoch: one score for each task, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from torch import Tensor

from lorkd_monai.metrics.classification import balanced_accuracy
from lorkd_monai.metrics.segmentation import case_scores

__all__ = ["TaskMetric"]


class TaskMetric(Metric):
    """Balanced accuracy (classification) or Dice (segmentation) of each task, and the mean over tasks.

    The mean is the metric's value; each task's score goes into ``engine.state.metrics`` under the task's name. A task
    without images does not count. The images of all processes are gathered.

    Args:
        num_classes: classes of each task by name, in the network's order.
        kind: ``"classification"`` or ``"segmentation"``.
        scored: names of the tasks that count in the mean; None: all. If none of them has images, all tasks count.
        output_transform: engine output -> (logits, label, task); the default fits `TaskEvaluator`.

    Example::

        metric = TaskMetric(net.num_classes)
        evaluator = TaskEvaluator(device, loader, net, key_val_metric={"mean_score": metric})
    """

    def __init__(
        self,
        num_classes: Mapping[str, int],
        kind: str = "classification",
        scored: Sequence[str] | None = None,
        output_transform: Callable = lambda output: (output["pred"], output["label"], output["task"]),
    ) -> None:
        self.tasks, self.classes, self.kind = list(num_classes), list(num_classes.values()), kind
        self.scored = self.tasks if scored is None else list(scored)
        self._rows: list[Tensor] = []
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget everything."""
        self._rows = []

    def update(self, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add a batch of logits, labels and tasks."""
        pred, label, task = (t.detach() for t in output)
        for logits, true, index in zip(pred, label, task.reshape(-1).expand(len(pred)).tolist(), strict=True):
            classes = self.classes[index]
            guess = logits[:classes].argmax(0)
            if self.kind == "classification":
                row = torch.tensor([index, int(guess), int(true)], dtype=torch.float64)
            else:
                dice = case_scores(guess, true[0], classes, surface=False)["dice"].nanmean()
                row = torch.tensor([index, float(dice), 0.0], dtype=torch.float64)
            self._rows.append(row)

    def compute(self) -> float:
        """Mean over tasks."""
        return self._mean(self.per_task())

    def _mean(self, scores: Mapping[str, float]) -> float:
        counting = [score for task, score in scores.items() if task in self.scored] or list(scores.values())
        return sum(counting) / len(counting) if counting else 0.0

    def per_task(self) -> dict[str, float]:
        """Score of each task that had images."""
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, 3, dtype=torch.float64)
        if idist.get_world_size() > 1:
            rows = evenly_divisible_all_gather(rows.to(idist.device())).cpu()
        scores = {}
        for index, name in enumerate(self.tasks):
            own = rows[rows[:, 0] == index]
            if not len(own):
                continue
            if self.kind == "classification":
                scores[name] = balanced_accuracy(own[:, 1].long(), own[:, 2].long(), self.classes[index]).item()
            else:
                scores[name] = own[:, 1].nanmean().nan_to_num(0.0).item()
        return scores

    def completed(self, engine: Engine, name: str) -> None:
        """Put the mean and the tasks' scores into ``engine.state.metrics``."""
        scores = self.per_task()
        engine.state.metrics.update(scores)
        engine.state.metrics[name] = self._mean(scores)
