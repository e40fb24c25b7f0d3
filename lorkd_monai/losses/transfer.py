"""Transfer of the teacher's knowledge to the experts, on logits and on pooled features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError

__all__ = ["POSITIONS", "FeatureTransferLoss", "TransferLoss", "full_precision", "transfer_loss"]

_MODES = ("softmax", "sigmoid")
_REDUCTIONS = ("mean", "sum", "none")
POSITIONS = ("equal", "by_class")
_SEEN = 1e-3  # share of the positions from which on a class counts in full


def full_precision(x: Tensor) -> Tensor:
    """Half and bfloat16 become float32 (a loss of autocast logits is computed in full); float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check_transfer_options(
    temperature: float, mode: str = "softmax", reduction: str = "mean", positions: str = "equal"
) -> None:
    """Raise `LoRKDError` where an option of a transfer loss is out of its range."""
    if not 0.0 < float(temperature) < float("inf"):
        raise LoRKDError(f"temperature: expected a finite number above 0, got {temperature!r}")
    if mode not in _MODES:
        raise LoRKDError(f"mode: expected one of {_MODES}, got {mode!r}")
    if reduction not in _REDUCTIONS:
        raise LoRKDError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")
    if positions not in POSITIONS:
        raise LoRKDError(f"positions: expected one of {POSITIONS}, got {positions!r}")


def transfer_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 4.0,
    mode: str = "softmax",
    reduction: str = "mean",
    positions: str = "equal",
    has_teacher: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher, both softened by the temperature T.

    For one sample (and, with spatial dimensions, one position), over the channels c of its own task:

    .. math::  L = T^2 \sum_c p_c (\log p_c - \log q_c), \qquad
               p = \mathrm{softmax}(z^{teacher} / T), \quad q = \mathrm{softmax}(z^{student} / T)

    and the gradient with respect to a student logit is :math:`T (q_c - p_c)`. With the factor T² its size hardly
    depends on T. ``mode="sigmoid"``, for teachers with one independent sigmoid per class, sums the divergences of the
    two-valued distributions of each class instead: with :math:`p_c = \sigma(z^{teacher}_c / T)`,
    :math:`L = T^2 \sum_c KL(\mathrm{Bernoulli}(p_c) \| \mathrm{Bernoulli}(q_c))`; there a class whose teacher logit
    is -inf or NaN is one the teacher does not know (a background, say), and is left out.

    A mean over all positions underweights small structures. With ``positions="by_class"`` the classes have equal
    weights instead: position x has the weight :math:`\frac{1}{C} \sum_c p_c(x) / \bar p_c`, with p the teacher's
    probabilities (T = 1) and :math:`\bar p_c` their mean over the sample, so that each class that the teacher sees
    has the same share in the mean. One that it sees in less than a thousandth of the positions has a smaller share.

    Channels past a sample's own head are -inf in both tensors; they take no part, in value or gradient.

    Args:
        student_logits: B×C or B×C×spatial, -inf in the channels that are not of the sample's task.
        teacher_logits: the same shape. Where the teacher has more channels finite than the student, the student's
            decide, and the teacher's probabilities are normalised over those. No gradient flows into it.
        valid: B×C boolean, the channels of each sample's own task. Default: those where the student is not -inf.
        temperature: T, above 0.
        mode: "softmax" or "sigmoid", what the teacher's logits go through.
        reduction: "mean" is the sum over samples of their mean over positions, divided by B; "sum" leaves the
            division by B out; "none" returns the B means over positions.
        positions: "equal" or "by_class", the weights in the means over positions.
        has_teacher: B booleans. A sample without teacher contributes 0 (and still counts in B). Default: False for
            the samples whose teacher logits are all NaN.

    Returns:
        A scalar, or B values; float32, or float64 if the student's logits are.

    Raises:
        LoRKDError: if shapes differ, ``valid`` or ``has_teacher`` do not fit them, or an option is out of range.

    Source: the transfer term of LoRKD (arXiv 2404.17184), Hinton's T² (arXiv 1503.02531). ``"by_class"`` is this
    project's; docs/results/appendix.md says what it does.

    Example:
        >>> student = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 0.0, float("-inf")]])
        >>> loss = transfer_loss(student, teacher, temperature=1.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.3278, [-0.3808, 0.3808, 0.0])
    """
    check_transfer_options(temperature, mode, reduction, positions)
    if student_logits.ndim < 2 or student_logits.shape != teacher_logits.shape:
        raise LoRKDError(
            "transfer_loss: expected student and teacher logits of one shape B×C[×spatial], got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. Give the teacher the same images at the "
            "same size, and let networks.teacher select each sample's channels."
        )
    student = full_precision(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    own = _own_channels(student, valid)
    known = _known_samples(teacher, has_teacher)
    # A missing teacher's NaN would survive a multiplication by 0.
    teacher = teacher.masked_fill(~known.reshape(-1, *[1] * (teacher.ndim - 1)), 0.0)
    if mode == "sigmoid":  # the classes that the teacher knows
        own = own & ~(teacher.isnan() | teacher.isneginf())

    divergence = _softmax_divergence if mode == "softmax" else _sigmoid_divergence
    per_position = divergence(student / temperature, teacher / temperature, own) * temperature**2
    if positions == "by_class" and per_position.ndim > 1:
        per_position = per_position * _class_shares(teacher, own, mode)
    per_sample = per_position.flatten(1).mean(1) if per_position.ndim > 1 else per_position
    per_sample = torch.where(known, per_sample, torch.zeros_like(per_sample))
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def _softmax_divergence(student: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the own channels; B×C×… -> B×…."""
    outside = ~own
    log_q = student.masked_fill(outside, float("-inf")).log_softmax(1)
    log_p = teacher.masked_fill(outside, float("-inf")).log_softmax(1)
    p = log_p.exp()
    # 0 · log 0 = 0: the logarithms that a zero probability multiplies are replaced before, not after, so that
    # neither the value nor the gradient meets inf · 0.
    log_q = log_q.masked_fill(outside, 0.0)
    log_p = log_p.masked_fill(p == 0, 0.0)
    return (p * (log_p - log_q)).sum(1)


def _sigmoid_divergence(student: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
    """Sum over the own channels of the divergences of two-valued distributions; B×C×… -> B×…."""
    s, t = student.masked_fill(~own, 0.0), teacher.masked_fill(~own, 0.0)
    p = t.sigmoid()
    return (p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))).sum(1)


def _class_shares(teacher: Tensor, own: Tensor, mode: str) -> Tensor:
    """Weights of the positions with which the teacher's classes have equal shares in a mean; B×C×… -> B×…."""
    teacher, classes = teacher.masked_fill(~own, float("-inf")), own.flatten(2).any(2)
    if mode == "softmax":
        p = teacher.softmax(1)
    else:
        p = teacher.sigmoid()
        p = torch.cat([p, (1 - p).prod(1, keepdim=True)], 1)  # where none of the classes is
        classes = torch.cat([classes, classes.new_ones(len(classes), 1)], 1)
    mean = p.flatten(2).mean(2) + _SEEN
    weights = classes / (mean * classes.sum(1, keepdim=True))
    return (p * weights.reshape(*weights.shape, *[1] * (p.ndim - 2))).sum(1)


def _own_channels(student: Tensor, valid: Tensor | None) -> Tensor:
    """The mask of each sample's own channels, B×C×1×…, broadcastable to the logits."""
    batch, channels = student.shape[:2]
    if valid is None:
        valid = ~student.detach().isneginf().reshape(batch, channels, -1).all(2)
    elif valid.shape != (batch, channels) or valid.dtype != torch.bool:
        raise LoRKDError(
            f"valid: expected booleans of shape {(batch, channels)}, got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    return valid.reshape(batch, channels, *[1] * (student.ndim - 2)).to(student.device)


def _known_samples(teacher: Tensor, has_teacher: Tensor | None) -> Tensor:
    """The B samples that the teacher has logits for."""
    if has_teacher is None:
        return ~teacher.isnan().flatten(1).all(1)
    if has_teacher.shape != teacher.shape[:1] or has_teacher.dtype != torch.bool:
        raise LoRKDError(
            f"has_teacher: expected {teacher.shape[0]} booleans, got {has_teacher.dtype} of shape "
            f"{tuple(has_teacher.shape)}"
        )
    return has_teacher.to(teacher.device)


class TransferLoss(nn.Module):
    """`transfer_loss` with its options fixed.

    Args:
        temperature, mode, reduction, positions: see `transfer_loss`.

    Raises:
        LoRKDError: if an option is out of its range.
    """

    def __init__(
        self, temperature: float = 4.0, mode: str = "softmax", reduction: str = "mean", positions: str = "equal"
    ) -> None:
        super().__init__()
        check_transfer_options(temperature, mode, reduction, positions)
        self.temperature, self.mode, self.reduction = float(temperature), mode, reduction
        self.positions = positions

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        valid: Tensor | None = None,
        has_teacher: Tensor | None = None,
    ) -> Tensor:
        """See `transfer_loss`."""
        return transfer_loss(
            student_logits, teacher_logits, valid, temperature=self.temperature, mode=self.mode,
            reduction=self.reduction, positions=self.positions, has_teacher=has_teacher,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = f"mode={self.mode!r}, reduction={self.reduction!r}, positions={self.positions!r}"
        return f"temperature={self.temperature}, {options}"


class FeatureTransferLoss(nn.Module):
    r"""Transfer on pooled features, where the teacher has no head for a task.

    .. math::  L = T^2\, KL(\mathrm{softmax}(f^{teacher} / T) \,\|\, \mathrm{softmax}(P f^{student} / T))

    with a learned linear projection P (with bias) from the student's feature space into the teacher's. Its weights
    are parameters of this module: give them to the optimizer and save them with the network to resume a training.
    Nothing of it goes into an expert.

    Args:
        student_dim: D of the student's features B×D.
        teacher_dim: D of the teacher's features B×D.
        temperature, reduction: see `transfer_loss`.

    Raises:
        LoRKDError: if a dimension is not a positive integer or an option is out of its range.

    Source: the feature form of the transfer term of LoRKD (arXiv 2404.17184). The papers' student has the teacher's
    feature size; the projection makes other sizes possible.

    Example:
        >>> loss = FeatureTransferLoss(student_dim=64, teacher_dim=512)
        >>> loss(torch.randn(4, 64), torch.randn(4, 512)).ndim
        0
    """

    def __init__(self, student_dim: int, teacher_dim: int, temperature: float = 4.0, reduction: str = "mean") -> None:
        super().__init__()
        check_transfer_options(temperature, reduction=reduction)
        for name, size in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            check_whole(f"FeatureTransferLoss: {name}", size)
        self.temperature, self.reduction = float(temperature), reduction
        self.projection = nn.Linear(student_dim, teacher_dim)

    def forward(self, student_features: Tensor, teacher_features: Tensor, selected: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            student_features: B×student_dim.
            teacher_features: B×teacher_dim; no gradient flows into it.
            selected: B booleans; a sample that is not selected contributes 0 (and counts in B). Default: all.
        """
        batch = student_features.shape[0]
        expected = ((batch, self.projection.in_features), (batch, self.projection.out_features))
        came = (tuple(student_features.shape), tuple(teacher_features.shape))
        if came != expected:
            raise LoRKDError(
                f"FeatureTransferLoss: expected student and teacher features of shapes {expected[0]} and "
                f"{expected[1]}, got {came[0]} and {came[1]}. Pool the features to B×D, and make the loss with "
                "student_dim and teacher_dim of these networks."
            )
        weight = self.projection.weight
        with torch.autocast(weight.device.type, enabled=False):
            projected = self.projection(full_precision(student_features).to(weight.dtype))
            return transfer_loss(
                projected,
                teacher_features,
                torch.ones_like(projected, dtype=torch.bool),
                temperature=self.temperature,
                reduction=self.reduction,
                has_teacher=selected,
            )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
