"""The transfer losses, against sums written out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import FeatureTransferLoss, TransferLoss, transfer_loss

INF = float("inf")


def by_hand(student: list[float], teacher: list[float], temperature: float) -> float:
    """T² KL(p ‖ q) of one row of logits, with nothing but the math module."""
    p, q = ([math.exp(z / temperature) for z in row] for row in (teacher, student))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def by_hand_sigmoid(student: list[float], teacher: list[float], temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher):
        q, p = 1 / (1 + math.exp(-s / temperature)), 1 / (1 + math.exp(-t / temperature))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total


STUDENT = torch.tensor([[0.3, -1.2, 2.0], [1.5, 0.5, -INF], [-0.7, -INF, -INF]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, -INF], [4.0, -INF, -INF]], dtype=torch.float64)
OWN = (3, 2, 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("mode", "reference"), [("softmax", by_hand), ("sigmoid", by_hand_sigmoid)])
def test_value_is_the_sum_by_hand(mode, reference, temperature):
    expected = [reference(s[:n].tolist(), t[:n].tolist(), temperature) for s, t, n in zip(STUDENT, TEACHER, OWN)]
    each = transfer_loss(STUDENT, TEACHER, temperature=temperature, mode=mode, reduction="none")
    assert each.dtype == torch.float64
    assert each.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    total = transfer_loss(STUDENT, TEACHER, temperature=temperature, mode=mode, reduction="sum")
    mean = transfer_loss(STUDENT, TEACHER, temperature=temperature, mode=mode)
    assert total.item() == pytest.approx(sum(expected), rel=1e-12)
    assert mean.item() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_a_number_worked_out_on_paper():
    """Teacher (ln 3, 0) at T 1 is p = (3/4, 1/4); student (0, 0) is q = (1/2, 1/2): KL = ln 2 - H(p)."""
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert transfer_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("spatial", [(), (2,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_gradient_is_t_times_q_minus_p_and_zero_in_foreign_channels(spatial, mode):
    student = torch.randn(3, 3, *spatial, dtype=torch.float64)
    teacher = torch.randn(3, 3, *spatial, dtype=torch.float64)
    for b, n in enumerate(OWN):
        student[b, n:], teacher[b, n:] = -INF, -INF
    student.requires_grad_()
    transfer_loss(student, teacher, temperature=2.0, mode=mode).backward()

    p, q = ((x / 2.0).softmax(1) if mode == "softmax" else (x / 2.0).sigmoid() for x in (teacher, student.detach()))
    positions = math.prod(spatial)
    torch.testing.assert_close(student.grad, 2.0 * (q - p) / (3 * positions), rtol=1e-12, atol=1e-14)
    for b, n in enumerate(OWN):
        assert (student.grad[b, n:] == 0).all()


def test_mean_over_positions():
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rows = [
        by_hand(student[b, :, i, j].tolist(), teacher[b, :, i, j].tolist(), 3.0)
        for b in range(2)
        for i in range(4)
        for j in range(5)
    ]
    assert transfer_loss(student, teacher, temperature=3.0).item() == pytest.approx(sum(rows) / 40, rel=1e-12)


def shares_by_hand(p: torch.Tensor) -> torch.Tensor:
    """Weights of positions, p: classes × positions: the mean over classes of p_c(x) over p_c's mean."""
    rows = p.tolist()
    means = [sum(row) / len(row) + 1e-3 for row in rows]
    return torch.tensor([sum(row[x] / m for row, m in zip(rows, means)) / len(rows) for x in range(len(rows[0]))])


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_positions_by_class_are_weighted_by_hand(mode):
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), 3 * torch.randn(2, 3, 5, dtype=torch.float64)
    student[1, 2], teacher[1, 2] = -INF, -INF
    each = transfer_loss(student, teacher, temperature=2.0, mode=mode, reduction="none", positions="by_class")
    for b, n in enumerate((3, 2)):
        reference = by_hand if mode == "softmax" else by_hand_sigmoid
        values = [reference(student[b, :n, x].tolist(), teacher[b, :n, x].tolist(), 2.0) for x in range(5)]
        p = teacher[b, :n].softmax(0) if mode == "softmax" else teacher[b, :n].sigmoid()
        if mode == "sigmoid":
            p = torch.cat([p, (1 - p).prod(0, keepdim=True)])
        expected = sum(w * v for w, v in zip(shares_by_hand(p).tolist(), values)) / 5
        assert each[b].item() == pytest.approx(expected, rel=1e-6)


def test_a_structure_of_few_positions_counts_by_class():
    teacher = torch.full((1, 2, 100, 100), 8.0, dtype=torch.float64)
    teacher[:, 1] = -8.0
    teacher[0, :, 50, 20:60] *= -1  # 40 of 10 000
    blind = teacher.abs() * torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1)  # all background
    equal = transfer_loss(blind, teacher, temperature=1.0)
    by_class = transfer_loss(blind, teacher, temperature=1.0, positions="by_class")
    assert equal.item() == pytest.approx(16 * 0.004, rel=1e-3)
    assert by_class.item() == pytest.approx(16 * 0.5 * 0.8, rel=0.02)  # half of the weight; 0.004 / (0.004 + 0.001)
    # What the teacher does not see anywhere does not make noise of where its logit happens to be highest.
    assert transfer_loss(blind + 1, blind, temperature=1.0, positions="by_class").item() == pytest.approx(0, abs=1e-9)
    noisy = blind + torch.randn(blind.shape, dtype=torch.float64)
    ratio = transfer_loss(noisy, blind, positions="by_class") / transfer_loss(noisy, blind)
    assert 0.3 < ratio < 1.2


def test_by_class_without_positions_is_the_same():
    plain, weighted = (transfer_loss(STUDENT, TEACHER, positions=own) for own in ("equal", "by_class"))
    assert torch.equal(plain, weighted)


def test_equal_logits_give_zero_and_no_gradient():
    student = STUDENT.clone().requires_grad_()
    loss = transfer_loss(student, STUDENT + 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["nan rows", "mask"])
def test_samples_without_teacher_contribute_zero_and_count_in_the_mean(mode, how):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    mask = None
    if how == "nan rows":
        teacher[1] = float("nan")
    else:
        mask = torch.tensor([True, False, True])
    each = transfer_loss(student, teacher, mode=mode, reduction="none", has_teacher=mask)
    full = transfer_loss(STUDENT, TEACHER, mode=mode, reduction="none")
    assert each.tolist() == pytest.approx([full[0].item(), 0.0, full[2].item()])
    mean = transfer_loss(student, teacher, mode=mode, has_teacher=mask)
    assert mean.item() == pytest.approx((full[0] + full[2]).item() / 3)
    mean.backward()
    assert torch.isfinite(student.grad).all() and (student.grad[1] == 0).all() and (student.grad[0] != 0).any()


def test_a_whole_batch_without_teacher_is_zero():
    student = STUDENT.clone().requires_grad_()
    loss = transfer_loss(student, torch.full_like(STUDENT, float("nan")))
    loss.backward()
    assert loss.item() == 0.0 and (student.grad == 0).all()


def test_teacher_channels_that_the_student_lacks_are_left_out_by_renormalising():
    student = torch.tensor([[0.5, 1.0, -INF]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, -1.0, 7.0]], dtype=torch.float64)
    assert transfer_loss(student, teacher).item() == pytest.approx(by_hand([0.5, 1.0], [1.0, -1.0], 4.0))


def test_sigmoid_leaves_out_classes_that_the_teacher_does_not_know():
    student = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    for unknown in (-INF, float("nan")):
        teacher = torch.tensor([[unknown, -1.0, 3.0]], dtype=torch.float64)
        loss = transfer_loss(student, teacher, mode="sigmoid")
        assert loss.item() == pytest.approx(by_hand_sigmoid([1.0, 2.0], [-1.0, 3.0], 4.0))


def test_valid_decides_which_channels_count():
    valid = torch.tensor([[True, True, False]])
    loss = transfer_loss(STUDENT[:1], TEACHER[:1], valid)
    assert loss.item() == pytest.approx(by_hand([0.3, -1.2], [1.0, 0.0], 4.0))


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(mode, size):
    student = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    loss = transfer_loss(student, torch.tensor([[-size, size, 0.0]]), mode=mode, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and loss > size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    loss = transfer_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, transfer_loss(student.float(), teacher.float()))


def test_no_gradient_into_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    transfer_loss(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_the_module_equals_the_function():
    module = TransferLoss(temperature=2.5, mode="sigmoid", reduction="sum")
    torch.testing.assert_close(
        module(STUDENT, TEACHER), transfer_loss(STUDENT, TEACHER, temperature=2.5, mode="sigmoid", reduction="sum")
    )
    assert "temperature=2.5" in repr(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"mode": "tanh"}, "mode: expected one of"),
        ({"reduction": "median"}, "reduction: expected one of"),
        ({"positions": "border"}, "positions: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LoRKDError, match=message):
        TransferLoss(**options)
    with pytest.raises(LoRKDError, match=message):
        transfer_loss(STUDENT, TEACHER, **options)


@pytest.mark.parametrize("teacher", [TEACHER[:2], TEACHER[:, :2], TEACHER[..., None]])
def test_bad_shapes(teacher):
    with pytest.raises(LoRKDError, match="one shape B×C"):
        transfer_loss(STUDENT, teacher)


def test_bad_masks():
    with pytest.raises(LoRKDError, match="valid: expected booleans of shape"):
        transfer_loss(STUDENT, TEACHER, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(LoRKDError, match="valid: expected booleans"):
        transfer_loss(STUDENT, TEACHER, torch.ones(3, 3))
    with pytest.raises(LoRKDError, match="has_teacher: expected 3 booleans"):
        transfer_loss(STUDENT, TEACHER, has_teacher=torch.ones(2, dtype=torch.bool))


def test_features_are_projected_and_compared_by_hand():
    loss = FeatureTransferLoss(2, 3, temperature=2.0).double()
    with torch.no_grad():
        loss.projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
        loss.projection.bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    student, teacher = torch.tensor([[0.2, -0.4]]).double(), torch.tensor([[1.0, 2.0, -1.0]]).double()
    projected = [0.2, -0.4 + 0.5, 0.2 + 0.4]
    expected = by_hand([float(torch.tensor(v)) for v in projected], teacher[0].tolist(), 2.0)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_features_train_student_and_projection_only_where_selected():
    loss = FeatureTransferLoss(4, 6)
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 6, requires_grad=True)
    loss(student, teacher, torch.tensor([True, False, True])).backward()
    assert loss.projection.weight.grad.abs().max() > 0
    assert student.grad[0].abs().max() > 0 and (student.grad[1] == 0).all()
    assert teacher.grad is None


def test_features_under_autocast_are_computed_in_float32():
    loss = FeatureTransferLoss(4, 6)
    student, teacher = torch.randn(3, 4), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(student, teacher)
    assert inside.dtype == torch.float32 and inside.item() == loss(student, teacher).item()


@pytest.mark.parametrize("sizes", [(0, 3), (3, -1), (2.0, 3), (True, 3)])
def test_bad_feature_sizes(sizes):
    with pytest.raises(LoRKDError, match="must be a whole number of at least 1"):
        FeatureTransferLoss(*sizes)


@pytest.mark.parametrize("shapes", [((3, 5), (3, 6)), ((3, 4), (2, 6)), ((3, 4), (3, 4)), ((3, 4, 1), (3, 6))])
def test_features_of_other_shapes(shapes):
    with pytest.raises(LoRKDError, match="expected student and teacher features of shapes"):
        FeatureTransferLoss(4, 6)(*[torch.zeros(s) for s in shapes])
