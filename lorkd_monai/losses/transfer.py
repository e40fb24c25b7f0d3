"""Transfer of the teacher's knowledge to the experts, on logits or on pooled features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError

__all__ = ["POSITIONS", "FeatureTransferLoss", "TransferLoss", "full_precision", "transfer_loss"]

POSITIONS = ("equal", "by_class")
_SEEN = 1e-3  # share of the positions above which a class counts almost in full


def full_precision(x: Tensor) -> Tensor:
    """Half and bfloat16 become float32, as the logits of autocast need; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check_transfer_options(
    temperature: float, mode: str = "softmax", reduction: str = "mean", positions: str = "equal"
) -> None:
    """Raise `LoRKDError` where an option of a transfer loss is out of its range."""
    if not 0.0 < float(temperature) < float("inf"):
        raise LoRKDError(f"temperature: expected a finite number above 0, got {temperature!r}")
    for name, value, known in (
        ("mode", mode, ("softmax", "sigmoid")),
        ("reduction", reduction, ("mean", "sum", "none")),
        ("positions", positions, POSITIONS),
    ):
        if value not in known:
            raise LoRKDError(f"{name}: expected one of {known}, got {value!r}")


def own_channels(logits: Tensor) -> Tensor:
    """B×C booleans: the channels of each sample's own task, which are not -inf everywhere."""
    return ~logits.detach().isneginf().reshape(*logits.shape[:2], -1).all(2)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """``values`` of the first axes of ``like``, with axes of size 1 for the others."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


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

    The gradient with respect to a student logit is :math:`T (q_c - p_c)`; the factor T² keeps its size about the same
    for all T. ``mode="sigmoid"`` is for teachers with one independent sigmoid per class. It sums the divergences of
    the Bernoulli distributions of the classes: :math:`L = T^2 \sum_c KL(\mathrm{Bernoulli}(p_c) \|
    \mathrm{Bernoulli}(q_c))` with :math:`p_c = \sigma(z^{teacher}_c / T)`. A class whose teacher logit is -inf or NaN
    is unknown to the teacher (a background, say), and is left out.

    Averaging over positions underweights small structures. With ``positions="by_class"`` every class that the teacher
    sees has the same share in the mean: position x has the weight :math:`\frac{1}{C} \sum_c p_c(x) / \bar p_c`, with
    p the teacher's probabilities (T = 1) and :math:`\bar p_c` their mean over the sample. A class in less than a
    thousandth of the positions has a smaller share.

    Channels past a sample's own head are -inf in both tensors; they don't count, in value or gradient.

    Args:
        student_logits: B×C or B×C×spatial, -inf in the channels of other tasks.
        teacher_logits: the same shape. If the teacher has more finite channels than the student, only the student's
            count, and the teacher's probabilities are normalised over those. No gradient flows into it.
        valid: B×C boolean, the channels of each sample's own task. Default: those where the student is not -inf.
        temperature: T, above 0.
        mode: "softmax" or "sigmoid", the function that turns the teacher's logits into probabilities.
        reduction: "none" returns the B means over positions, "sum" their sum, "mean" the sum divided by B.
        positions: "equal" or "by_class", the weights in the means over positions.
        has_teacher: B booleans. A sample without teacher contributes 0 (and still counts in B). Default: False for
            the samples whose teacher logits are all NaN.

    Returns:
        A scalar, or B values; float32, or float64 if the student's logits are.

    Raises:
        LoRKDError: shapes differ, ``valid`` or ``has_teacher`` do not fit them, or an option is out of range.

    Source: the transfer term of LoRKD (arXiv 2404.17184), Hinton's T² (arXiv 1503.02531). ``"by_class"`` is ours;
    docs/results/appendix.md measures its effect.

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
            "same size, and let teachers.teacher.Teacher select each sample's channels."
        )
    student = full_precision(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    own = own_channels(student) if valid is None else valid
    if own.shape != student.shape[:2] or own.dtype != torch.bool:
        raise LoRKDError(
            f"valid: expected booleans of shape {tuple(student.shape[:2])}, got {own.dtype} of shape {tuple(own.shape)}"
        )
    own = spread(own, student).to(student.device)
    known = ~teacher.isnan().flatten(1).all(1) if has_teacher is None else has_teacher
    if known.shape != teacher.shape[:1] or known.dtype != torch.bool:
        raise LoRKDError(
            f"has_teacher: expected {len(teacher)} booleans, got {known.dtype} of shape {tuple(known.shape)}"
        )
    known = known.to(teacher.device)
    # The NaN of a missing teacher would survive a multiplication by 0.
    teacher = teacher.masked_fill(~spread(known, teacher), 0.0)
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
    # 0 · log 0 = 0: logarithms multiplied by a zero probability are replaced first, so that neither the value nor the
    # gradient contains inf · 0.
    log_q = log_q.masked_fill(outside, 0.0)
    log_p = log_p.masked_fill(p == 0, 0.0)
    return (p * (log_p - log_q)).sum(1)


def _sigmoid_divergence(student: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
    """Sum over the own channels of the divergences of Bernoulli distributions; B×C×… -> B×…."""
    s, t = student.masked_fill(~own, 0.0), teacher.masked_fill(~own, 0.0)
    p = t.sigmoid()
    return (p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))).sum(1)


def _class_shares(teacher: Tensor, own: Tensor, mode: str) -> Tensor:
    """Weights of the positions that give the teacher's classes equal shares in the mean; B×C×… -> B×…."""
    teacher, classes = teacher.masked_fill(~own, float("-inf")), own.flatten(2).any(2)
    if mode == "softmax":
        p = teacher.softmax(1)
    else:
        p = teacher.sigmoid()
        p = torch.cat([p, (1 - p).prod(1, keepdim=True)], 1)  # none of the classes
        classes = torch.cat([classes, classes.new_ones(len(classes), 1)], 1)
    mean = p.flatten(2).mean(2) + _SEEN
    weights = classes / (mean * classes.sum(1, keepdim=True))
    return (p * spread(weights, p)).sum(1)


class TransferLoss(nn.Module):
    """`transfer_loss` with its options fixed.

    Args:
        temperature, mode, reduction, positions: see `transfer_loss`.

    Raises:
        LoRKDError: an option is out of its range.
    """

    def __init__(
        self, temperature: float = 4.0, mode: str = "softmax", reduction: str = "mean", positions: str = "equal"
    ) -> None:
        super().__init__()
        check_transfer_options(temperature, mode, reduction, positions)
        self.temperature, self.mode = float(temperature), mode
        self.reduction, self.positions = reduction, positions

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        valid: Tensor | None = None,
        has_teacher: Tensor | None = None,
    ) -> Tensor:
        """See `transfer_loss`."""
        return transfer_loss(
            student_logits,
            teacher_logits,
            valid,
            temperature=self.temperature,
            mode=self.mode,
            reduction=self.reduction,
            positions=self.positions,
            has_teacher=has_teacher,
        )

    def extra_repr(self) -> str:
        options = f"mode={self.mode!r}, reduction={self.reduction!r}, positions={self.positions!r}"
        return f"temperature={self.temperature}, {options}"


class FeatureTransferLoss(nn.Module):
    r"""Transfer on pooled features, where the teacher has no head for a task.

    .. math::  L = T^2\, KL(\mathrm{softmax}(f^{teacher} / T) \,\|\, \mathrm{softmax}(P f^{student} / T))

    with a learned linear projection P (with bias) from the student's feature space into the teacher's. Its weights
    are parameters of this module: give them to the optimizer, and save them with the network to resume a training.
    They are not part of an expert.

    Args:
        student_dim: D of the student's features B×D.
        teacher_dim: D of the teacher's features B×D.
        temperature, reduction: see `transfer_loss`.

    Raises:
        LoRKDError: a dimension is not a positive integer, or an option is out of its range.

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
