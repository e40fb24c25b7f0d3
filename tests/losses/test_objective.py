"""The objective: its sum, its terms, unlabelled samples, deep supervision, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss

from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import FeatureTransferLoss, LoRKDLoss, transfer_loss

INF = float("inf")
TASKS = {"breast": 2, "blood": 4, "xray": 3}


def batch(*spatial: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Five samples of three tasks, in no order, with a teacher."""
    task = torch.tensor([1, 0, 2, 1, 0])
    counts = torch.tensor(list(TASKS.values()))[task]
    student, teacher = torch.randn(5, 4, *spatial, dtype=dtype), torch.randn(5, 4, *spatial, dtype=dtype)
    for b, n in enumerate(counts.tolist()):
        student[b, n:], teacher[b, n:] = -INF, -INF
    shape = (5, 1, *spatial) if spatial else (5,)
    label = (torch.rand(shape) * counts.reshape(5, *[1] * (len(shape) - 1))).long()
    return {"student_out": student.requires_grad_(), "label": label, "task": task, "teacher_out": teacher}


def test_classification_total_and_terms_are_those_of_torch_sample_by_sample():
    given = batch()
    loss = LoRKDLoss("ce", transfer_weight=0.7, temperature=3.0, tasks=TASKS)
    total = loss(**given)
    names, each = list(TASKS), []
    for z, y, t in zip(given["student_out"].detach(), given["label"], given["task"].tolist()):
        each.append(F.cross_entropy(z[None, : TASKS[names[t]]], y[None]).item())
    transfer = transfer_loss(given["student_out"].detach(), given["teacher_out"], temperature=3.0).item()

    assert loss.terms["task"] == pytest.approx(sum(each) / 5, rel=1e-12)
    assert loss.terms["transfer"] == pytest.approx(transfer, rel=1e-12)
    assert loss.terms["total"] == total.item() == pytest.approx(sum(each) / 5 + 0.7 * transfer, rel=1e-12)
    assert loss.terms["task/blood"] == pytest.approx((each[0] + each[3]) / 2, rel=1e-12)
    assert loss.terms["task/breast"] == pytest.approx((each[1] + each[4]) / 2, rel=1e-12)
    assert loss.terms["task/xray"] == pytest.approx(each[2], rel=1e-12)
    assert all(type(value) is float for value in loss.terms.values())
    total.backward()
    grad = given["student_out"].grad
    assert torch.isfinite(grad).all() and (grad[given["student_out"] == -INF] == 0).all()


def test_the_transfer_is_on_by_default_and_its_gradient_does_not_vanish():
    """The authors' scripts multiply this term by zero."""
    given = batch()
    LoRKDLoss()(**given).backward()
    with_transfer = given["student_out"].grad.clone()
    given["student_out"].grad = None
    LoRKDLoss(transfer_weight=0.0)(**given).backward()
    difference = (with_transfer - given["student_out"].grad).abs().amax(1)
    assert (difference > 1e-3).all(), "some sample gets no gradient from the teacher"


@pytest.mark.parametrize("tasks", [TASKS, None])
def test_own_channels_come_from_the_tasks_or_from_the_padding(tasks):
    given = batch()
    loss = LoRKDLoss("ce", tasks=tasks)
    assert loss(**given).item() == pytest.approx(LoRKDLoss("ce", tasks=TASKS)(**given).item(), rel=1e-14)
    assert ("task/blood" in loss.terms) == (tasks is not None) and ("task/1" in loss.terms) == (tasks is None)


def test_class_weights_and_smoothing_are_those_of_torch():
    given = batch()
    weights = {"blood": [0.5, 1.0, 2.0, 3.0], "xray": [1.0, 0.2, 0.1]}
    smoothing = {"blood": 0.1, "breast": 0.2}
    loss = LoRKDLoss("ce", 0.0, tasks=TASKS, class_weights=weights, label_smoothing=smoothing)
    loss(**given)
    names, each = list(TASKS), []
    for z, y, t in zip(given["student_out"].detach(), given["label"], given["task"].tolist()):
        weight = torch.tensor(weights[names[t]], dtype=torch.float64) if names[t] in weights else None
        each.append(
            F.cross_entropy(
                z[None, : TASKS[names[t]]],
                y[None],
                weight=weight,
                reduction="none",
                label_smoothing=smoothing.get(names[t], 0.0),
            ).item()
        )
    assert loss.terms["task"] == pytest.approx(sum(each) / 5, rel=1e-12)


@pytest.mark.parametrize("spatial", [(6, 5), (4, 5, 3)])
def test_dice_ce_is_monai_by_task_weighted_by_the_share_of_samples(spatial):
    given = batch(*spatial)
    loss = LoRKDLoss("dice_ce", tasks=TASKS, task_loss_options={"include_background": False})
    total = loss(**given)
    monai_loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    expected = 0.0
    for t, (name, n) in enumerate(TASKS.items()):
        chosen = given["task"] == t
        of_task = monai_loss(given["student_out"].detach()[chosen][:, :n], given["label"][chosen]).item()
        assert loss.terms[f"task/{name}"] == pytest.approx(of_task, rel=1e-12)
        expected += of_task * chosen.sum().item() / 5
    assert loss.terms["task"] == pytest.approx(expected, rel=1e-12)
    total.backward()
    assert torch.isfinite(given["student_out"].grad).all()


def test_one_channel_is_foreground_by_sigmoid():
    student = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    label = (torch.rand(2, 1, 8, 8) > 0.5).long()
    loss = LoRKDLoss("dice_ce", 0.0, task_loss_options={"include_background": False})
    value = loss(student, label, torch.tensor([0, 0]))
    assert value.item() == pytest.approx(DiceCELoss(sigmoid=True)(student, label.double()).item(), rel=1e-12)


def test_any_callable_gets_one_task_at_a_time():
    seen = []

    def custom(output, label):
        seen.append(tuple(output.shape))
        return (output.mean(1) - label).pow(2).mean()

    given = batch()
    LoRKDLoss(custom, 0.0)(**given)
    assert sorted(seen) == [(1, 3), (2, 2), (2, 4)]


@pytest.mark.parametrize("weights", ["exp", "same", "two", [1.0, 0.3]])
@pytest.mark.parametrize("stacked", [False, True])
def test_deep_supervision_weighs_resolutions_as_monai_does(weights, stacked):
    given = batch(8, 8, dtype=torch.float32)
    fine = given.pop("student_out")
    coarse = fine.detach() + 1.0 if stacked else fine.detach()[:, :, ::2, ::2].clone()
    output = torch.stack([fine, coarse], 1) if stacked else [fine, coarse.requires_grad_()]
    loss = LoRKDLoss("dice_ce", tasks=TASKS, deep_supervision=weights)
    loss(output, **given).backward()

    fixed = weights if isinstance(weights, list) else None
    mode = "exp" if fixed else weights
    reference = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True), mode, fixed)
    chosen = given["task"] == 1
    expected = reference([fine[chosen], coarse[chosen]], given["label"][chosen].float())
    assert loss.terms["task/blood"] == pytest.approx(expected.item(), rel=1e-5)
    full_only = transfer_loss(fine, given["teacher_out"])
    assert loss.terms["transfer"] == pytest.approx(full_only.item(), rel=1e-5)


@pytest.mark.parametrize("spatial", [(), (6, 5)])
def test_unlabelled_samples_take_part_in_the_transfer_only(spatial):
    given = batch(*spatial)
    kind = "dice_ce" if spatial else "ce"
    given["label"][0], given["label"][2] = -1, -1  # one of the two "blood", and the only "xray"
    loss = LoRKDLoss(kind, tasks=TASKS)
    loss(**given).backward()
    assert "task/xray" not in loss.terms
    assert given["student_out"].grad[2].abs().max() > 0

    labelled = torch.tensor([1, 3, 4])
    rest = {k: v.detach()[labelled] for k, v in given.items()}
    alone = LoRKDLoss(kind, tasks=TASKS)
    alone(**rest)
    assert loss.terms["task"] == pytest.approx(alone.terms["task"], rel=1e-12)

    given["student_out"].grad = None
    LoRKDLoss(kind, 0.0, tasks=TASKS)(**given).backward()
    assert (given["student_out"].grad[[0, 2]] == 0).all()


def test_a_batch_without_labels_still_belongs_to_the_graph():
    given = batch()
    given["label"][:] = -1
    loss = LoRKDLoss("ce", 0.0, tasks=TASKS)
    loss(**given).backward()
    assert loss.terms["task"] == 0.0 and (given["student_out"].grad == 0).all()
    assert LoRKDLoss("ce", tasks=TASKS)(**given).item() > 0


def test_features_serve_the_samples_that_the_teacher_has_no_head_for():
    given = batch()
    given["teacher_out"][given["task"] == 2] = float("nan")
    features = FeatureTransferLoss(4, 6, temperature=2.0).double()
    student, teacher = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 6).double()
    loss = LoRKDLoss("ce", 1.0, tasks=TASKS, feature_transfer=features, feature_weight=0.5)
    total = loss(**given, student_features=student, teacher_features=teacher)
    total.backward()
    assert (student.grad[2] != 0).any() and (student.grad[[0, 1, 3, 4]] == 0).all()
    terms = loss.terms
    assert total.item() == pytest.approx(terms["task"] + terms["transfer"] + 0.5 * terms["feature_transfer"])
    assert len(list(loss.parameters())) == 2, "the projection is trained with the loss"

    given.pop("teacher_out")
    loss(**given, student_features=student, teacher_features=teacher)
    assert "transfer" not in loss.terms and loss.terms["feature_transfer"] > 0


def test_autocast_and_meta_tensors_change_nothing():
    given = batch(6, 5, dtype=torch.float32)
    expected = LoRKDLoss("dice_ce", tasks=TASKS)(**given)
    wrapped = {k: MetaTensor(v) if k in ("student_out", "label") else v for k, v in given.items()}
    with torch.autocast("cpu", torch.bfloat16):
        inside = LoRKDLoss("dice_ce", tasks=TASKS)(**wrapped)
    assert type(inside) is torch.Tensor and inside.dtype == torch.float32
    assert inside.item() == expected.item()


def test_task_may_be_one_number_for_all():
    given = batch()
    chosen = given["task"] == 1
    of_task = {k: v.detach()[chosen] for k, v in given.items()}
    expected = LoRKDLoss(tasks=TASKS)(**of_task)
    of_task["task"] = torch.tensor([1])
    assert LoRKDLoss(tasks=TASKS)(**of_task).item() == expected.item()


def test_label_of_shape_b_1_and_float_labels():
    given = batch()
    expected = LoRKDLoss()(**given).item()
    given["label"] = given["label"][:, None].float()
    assert LoRKDLoss()(**given).item() == expected


@pytest.mark.parametrize(
    ("where", "value", "term"),
    [("student_out", float("nan"), "task = nan"), ("student_out", INF, "task"), ("teacher_out", INF, "transfer = nan")],
)
def test_a_loss_that_is_not_finite_names_the_term_and_the_tasks(where, value, term):
    given = batch()
    given[where] = given[where].detach().clone()
    given[where][2, 0] = value
    with pytest.raises(LoRKDError, match=rf"not finite: .*{term}.*tasks in the batch: breast, blood, xray") as caught:
        LoRKDLoss(tasks=TASKS)(**given)
    assert "task/blood" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [3, -2])
def test_a_label_outside_the_classes(bad):
    given = batch()
    given["label"][2] = bad
    with pytest.raises(LoRKDError, match="task 'xray' has classes 0 to 2, sample 2 of the batch has labels"):
        LoRKDLoss(tasks=TASKS)(**given)


def test_a_label_map_with_a_stray_value():
    given = batch(6, 5)
    given["label"][1, 0, 2, 3] = 2
    with pytest.raises(LoRKDError, match="task 'breast' has classes 0 to 1"):
        LoRKDLoss("dice_ce", tasks=TASKS)(**given)


def test_a_missing_teacher_is_not_passed_over():
    given = batch()
    given.pop("teacher_out")
    with pytest.raises(LoRKDError, match="neither teacher_out nor teacher_features"):
        LoRKDLoss()(**given)
    for loss in (LoRKDLoss(transfer_weight=0.0), LoRKDLoss().eval()):
        loss(**given)
        assert "transfer" not in loss.terms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": torch.tensor([0, 1])}, "task: expected one task number for each of 5 samples"),
        ({"task": torch.tensor([0, 1, 2, 3, 0])}, "task: expected numbers 0 to 2"),
        ({"task": torch.tensor([0, 1, 2, -1, 0])}, "task: expected numbers 0 to 2"),
        ({"label": torch.zeros(5, 2)}, "label: expected shape"),
        ({"label": torch.zeros(4)}, "label: expected shape"),
        ({"teacher_out": torch.zeros(5, 3)}, "student and teacher logits of one shape"),
        ({"student_out": torch.zeros(5, 3), "teacher_out": torch.zeros(5, 3)}, "the loss was made for other tasks"),
    ],
)
def test_calls_that_do_not_fit(change, message):
    with pytest.raises(LoRKDError, match=message):
        LoRKDLoss(tasks=TASKS)(**{**batch(), **change})


def test_features_of_one_side_only():
    loss = LoRKDLoss(tasks=TASKS, feature_transfer=FeatureTransferLoss(4, 6))
    with pytest.raises(LoRKDError, match="without student_features"):
        loss(**batch(), teacher_features=torch.zeros(5, 6))


def test_ce_on_label_maps():
    with pytest.raises(LoRKDError, match="segmentation takes task_loss='dice_ce'"):
        LoRKDLoss("ce")(**batch(6, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_loss": "mse"}, "task_loss: expected 'ce', 'dice_ce' or a callable"),
        ({"transfer_weight": -1.0}, "transfer_weight: expected a finite number of 0 or more"),
        ({"transfer_weight": math.nan}, "transfer_weight"),
        ({"feature_weight": INF}, "feature_weight"),
        ({"temperature": 0}, "temperature"),
        ({"mode": "both"}, "mode"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected numbers in"),
        ({"label_smoothing": {"heart": 0.1}, "tasks": TASKS}, "label_smoothing: unknown task 'heart'"),
        ({"label_smoothing": {"blood": 0.1}}, "need tasks="),
        ({"class_weights": {"heart": [1.0]}, "tasks": TASKS}, "class_weights: unknown task 'heart'"),
        ({"class_weights": {"blood": [1.0]}, "tasks": TASKS}, "'blood' has 4 classes, got 1 weights"),
        ({"class_weights": {"breast": [1.0, -1.0]}, "tasks": TASKS}, "expected finite numbers of 0 or more"),
        ({"class_weights": {"breast": [1.0, 1.0]}, "task_loss": "dice_ce"}, "are for task_loss='ce'"),
        ({"task_loss_options": {"include_background": False}}, "task_loss_options are for"),
        ({"task_loss": "dice_ce", "task_loss_options": {"colour": 1}}, "does not take"),
        ({"task_loss": "dice_ce", "deep_supervision": "half"}, "deep_supervision: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LoRKDError, match=message):
        LoRKDLoss(**options)


def test_too_few_weights_for_the_resolutions():
    given = batch(8, 8)
    output = [given.pop("student_out"), torch.zeros(5, 4, 4, 4)]
    with pytest.raises(LoRKDError, match="the network has 2 outputs, got 1 weights"):
        LoRKDLoss("dice_ce", tasks=TASKS, deep_supervision=[1.0])(output, **given)
