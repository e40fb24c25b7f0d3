r"""Knowledge factorization (KF): a network of common knowledge and a small network of each task's own.

Source: Yang, Ye, Wang, "Factorizing Knowledge in Neural Networks", ECCV 2022, arXiv 2207.03337. The parts, from its
abstract and the authors' public configurations (github.com/Adamdad/KnowledgeFactor; the text of the paper was not at
hand, so there are no numbers of its equations here):

* a factor network of a task is the common-knowledge network and the task-specific one; their representations are added,
  and one head reads the sum;
* InfoMax: a contrastive bound on the mutual information of the common representation and the teacher's, in cosines,
  the teacher's seen through a small learned network; weight 1;
* InfoMin: the KL divergence of the task-specific representation, as a Gaussian with the mean and variance of the batch,
  from a standard one; weight 0.001;
* the task loss of the task-specific representation alone, through a head of its own; weight 1.

What is different here. Student, budget, augmentation and the transfer of logits are those of the study, in place of the
authors' (temperature 10, weight 0.1). InfoMax looks at the last representation; the authors' also at earlier ones. Its
bound is the Donsker-Varadhan one of Belghazi et al. (arXiv 1801.04062): the mean over matching pairs, minus the log of
the mean exponential over the others. In segmentation the task-specific representation is a map of the task's classes
that is added to the common network's logits, and is read by the losses as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.weight_selection import select_weights
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study.settings import StudySettings

__all__ = ["FactorLoss", "FactorNet", "build_factors", "info_max", "info_min", "narrowed"]

_WIDTHS = ("block_inplanes", "channels", "features", "filters", "growth_rate", "init_features", "init_filters")
_COMMON = 0.75  # share of the student's cost that the common network has; the task-specific one has the rest
_INFO_MAX, _INFO_MIN, _OWN_TASK = 1.0, 1e-3, 1.0


def narrowed(backbone: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A MONAI config with about this share of the cost: each layer has √share of its channels.

    Raises:
        LoRKDError: it has none of the arguments that are known to say how wide a network is.
    """
    known = [key for key in _WIDTHS if key in backbone]
    if not known:
        raise LoRKDError(
            f"backbone: to factorize knowledge it is made narrower, by one of {', '.join(_WIDTHS)}; "
            f"{backbone.get('_target_')} has none of them"
        )

    def fewer(width: Any) -> Any:
        return [fewer(w) for w in width] if isinstance(width, (list, tuple)) else max(1, round(width * share**0.5))

    return {**backbone, **{key: fewer(backbone[key]) for key in known}}


class FactorNet(nn.Module):
    """The factor networks of all tasks, which share the common-knowledge network; called with (image, task).

    Args:
        common: with a head for each task.
        specific: a network for each task, as wide at its end as the input of a linear head of ``common``, or as many
            channels as its task has classes.
    """

    def __init__(self, common: LoRKDNet, specific: Sequence[LoRKDNet]) -> None:
        super().__init__()
        self.common, self.specific = common, nn.ModuleList(specific)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return self.common.tasks

    @property
    def num_classes(self) -> dict[str, int]:
        """Output channels of each task."""
        return self.common.num_classes

    def forward(
        self, x: Tensor, task: Tensor | int, return_features: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]]:
        """B × C_max × …, -inf past each sample's own channels.

        With ``return_features`` also the common representation (B × F), and task -> (rows of the batch, task-specific
        representation of these rows).
        """
        task = torch.as_tensor(task, device=x.device).reshape(-1).expand(x.shape[0])
        answer = self.common(x, task, return_features=return_features)
        y, common = answer if return_features else (answer, None)
        added, own = torch.zeros_like(y), {}
        for index in task.unique().tolist():
            rows = (task == index).nonzero()[:, 0]
            alone = self.training and len(rows) == 1  # batch norms need two
            z = self.specific[index](x[rows.repeat(2) if alone else rows], 0)[: len(rows)]
            own[index] = (rows, z)
            head = linear_head(self.common, index)
            part = z if head is None else functional.linear(z, head[1])
            added[rows, : part.shape[1]] = part.to(added.dtype)
        y = y + added
        return (y, (common, own)) if return_features else y

    def extract(self, task: str | int) -> nn.Module:
        """The plain network that serves one task: the common network with its head, and the task's own."""
        index = self.common.task_index(task)
        head = linear_head(self.common, index)
        return _Factors(self.common.extract(index), self.specific[index].extract(0), None if head is None else head[0])


class _Factors(nn.Module):
    def __init__(self, common: nn.Module, specific: nn.Module, head: str | None) -> None:
        super().__init__()
        self.common, self.specific, self.head = common, specific, head

    def forward(self, x: Tensor) -> Tensor:
        # The head is linear: reading the sum of both representations is adding what it makes of each.
        z = self.specific(x)
        part = z if self.head is None else functional.linear(z, self.common.get_submodule(self.head).weight)
        return self.common(x) + part


def linear_head(common: LoRKDNet, task: int) -> tuple[str, Tensor] | None:
    """Name and weight of the linear layer that is the head of a task; None where the head is another kind of layer."""
    weights = {name: t for name, t in common.expert_tensors(task).items() if name.endswith("weight")}
    name, weight = next(iter(weights.items()))
    return (name.removesuffix(".weight"), weight) if len(weights) == 1 and weight.ndim == 2 else None


def build_factors(settings: StudySettings, data: DataList, seed: int, start: nn.Module | None = None) -> FactorNet:
    """The factor networks of a study: one task's two networks together cost about what a student does.

    Args:
        settings: with the student's ``backbone``.
        data: the data list.
        seed: of the first weights.
        start: a network to start from, as `select_weights` does.

    Raises:
        LoRKDError: see `narrowed`.
    """
    torch.manual_seed(seed)
    norm = settings.norm if len(data.tasks) > 1 else "shared"
    common = LoRKDNet(narrowed(settings.backbone, _COMMON), data.num_classes, rank=0, norm=norm)
    head = linear_head(common, 0)
    small = narrowed(settings.backbone, 1 - _COMMON)
    specific = [
        LoRKDNet(small, {name: classes if head is None else head[1].shape[1]}, rank=0)
        for name, classes in data.num_classes.items()
    ]
    if start is not None:
        for network in (common, *specific):
            select_weights(network, start)
    return FactorNet(common, specific)


def info_max(common: Tensor, teacher: Tensor) -> Tensor:
    """Minus a bound on the mutual information of two representations of one batch (B × F each), in cosines."""
    cosines = functional.normalize(common, dim=1) @ functional.normalize(teacher, dim=1).T
    if len(cosines) < 2:
        return cosines.sum() * 0.0
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
    return others.exp().mean().log() - cosines.diagonal().mean()


def info_min(z: Tensor) -> Tensor:
    """KL divergence of a Gaussian with the mean and variance of each channel from a standard one; mean over channels.

    Args:
        z: B × F or B × C × spatial; mean and variance are over all but the channels.
    """
    rows = z.movedim(1, -1).flatten(0, -2)
    if len(rows) < 2:
        return rows.sum() * 0.0
    mean, variance = rows.mean(0), rows.var(0) + 1e-6
    return 0.5 * (mean.square() + variance - variance.log() - 1).mean()


class FactorLoss(LoRKDLoss):
    """The objective of a student, with InfoMax, InfoMin and the task loss of the task-specific representations.

    Its own layers (the view of the teacher's representation, the heads of the task-specific ones) are for training
    alone.

    Args:
        network: what is trained.
        teacher: gives its representation too.
        data: the data list.
        image: one image (1 × C × …) on the network's device, to find the widths.
        settings: ``transfer_weight``, ``temperature``, ``transfer_positions``.

    Raises:
        LoRKDError: there is no teacher.
    """

    def __init__(
        self, network: FactorNet, teacher: nn.Module | None, data: DataList, image: Tensor, settings: StudySettings
    ) -> None:
        if teacher is None or not settings.transfer_weight:
            raise LoRKDError("the method 'kf' factorizes what a teacher knows: it needs distilled and transfer_weight")
        kind, tasks = "ce" if data.kind == "classification" else "dice_ce", data.num_classes
        super().__init__(
            kind, settings.transfer_weight, settings.temperature, mode=teacher.activation,
            transfer_positions=settings.transfer_positions, tasks=tasks,
        )  # fmt: skip
        with torch.no_grad():
            training = network.training
            common, own = network.eval()(image, 0, return_features=True)[1]
            network.train(training)
            wide = teacher.to(image.device)(image, torch.zeros(1, dtype=torch.long), return_features=True)[1].shape[1]
        narrow = common.shape[1]
        # What the trainer sees here makes it ask for the representations.
        self.feature_transfer: Any = nn.Sequential(
            nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(), nn.Linear(narrow, narrow)
        )
        pooled = own[0][1].ndim == 2
        self.heads = nn.ModuleList(nn.Linear(narrow, n) if pooled else nn.Identity() for n in tasks.values())
        self.own_task = LoRKDLoss(kind, 0.0, tasks=tasks)

    def forward(
        self,
        student_out: Any,
        label: Tensor,
        task: Tensor,
        teacher_out: Tensor | None = None,
        student_features: Any = None,
        teacher_features: Tensor | None = None,
        has_teacher: Tensor | None = None,
    ) -> Tensor:
        """The total; see `LoRKDLoss` and `FactorNet.forward`."""
        total = super().forward(student_out, label, task, teacher_out, has_teacher=has_teacher)
        if student_features is None or teacher_features is None:
            return total
        common, own = student_features
        with torch.autocast(total.device.type, enabled=False):
            alone = torch.full_like(student_out, float("-inf"), dtype=torch.float32)
            narrow = total.new_zeros(())
            for index, (rows, z) in own.items():
                part = self.heads[index](z.float())
                alone[rows, : part.shape[1]] = part
                narrow = narrow + info_min(z.float()) / len(own)
            seen = self.feature_transfer(teacher_features.float()) if len(common) > 1 else common.detach()
            terms = {
                "info_max": info_max(common.float(), seen),
                "info_min": narrow,
                "own_task": self.own_task(alone, label, task),
            }
            total = total + sum(w * terms[k] for k, w in zip(terms, (_INFO_MAX, _INFO_MIN, _OWN_TASK), strict=True))
        self.terms |= {"total": float(total.detach()), **{k: float(v.detach()) for k, v in terms.items()}}
        return total
