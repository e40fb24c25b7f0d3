"""The decomposition trainer: what the teacher sees, what is logged, what a step does."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, from_engine
from torch import nn

from lorkd_monai.engines import AutocastInferer, TaskEvaluator
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import FeatureTransferLoss, LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from tests.engines.tiny_run import TASKS, Items, Teacher, network, trainer


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def test_the_teacher_sees_the_images_that_the_network_sees():
    seen, net = [], network()
    net.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    run = trainer(net, augment=lambda image, mask, iteration: (image * (iteration + 1), mask), batch_size=16)
    # One batch of two tasks: the network sorts it, the teacher does not.
    run.run()
    (asked,) = run.teacher.asked
    assert torch.equal(asked, Items().images.double() * 2)
    assert any(torch.equal(x.flatten(1).sum(1).sort()[0], asked.flatten(1).sum(1).sort()[0]) for x in seen)


def test_terms_of_each_step_and_their_mean_over_the_epoch():
    run, steps = trainer(network()), []
    run.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(dict(engine.state.output["terms"])))
    run.run()
    assert len(steps) == 2
    assert steps[0].keys() == {"total", "task", "transfer", "task/a", "task/b"}
    for name in steps[0]:
        assert run.state.metrics[name] == pytest.approx((steps[0][name] + steps[1][name]) / 2)
    assert steps[0]["total"] == pytest.approx(steps[0]["task"] + steps[0]["transfer"])
    assert steps[0]["transfer"] > 0


def test_monai_s_handlers_can_read_the_output():
    run, losses = trainer(network()), []
    read = from_engine(["loss"], first=True)  # what MONAI's tracking reads it with
    run.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(read(engine.state.output).item()))
    run.run()
    assert sum(losses) / 2 == pytest.approx(run.state.metrics["total"])


def test_the_transfer_moves_the_weights():
    one, other = network(), network()
    trainer(one).run()
    trainer(other, teacher=None).run()
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("epochs", [1, 2])
def test_accumulated_steps_equal_a_large_batch(epochs):
    large, small = network(), network()
    trainer(large, batch_size=16, epochs=epochs).run()
    trainer(small, batch_size=4, epochs=epochs, accumulation_steps=4).run()
    before = network().state_dict()
    for key, value in large.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(small.state_dict()[key], value, rtol=0, atol=1e-13)
    assert any(not torch.equal(value, before[key]) for key, value in large.state_dict().items())


def test_loss_that_is_not_finite_stops_before_the_weights_change():
    items = Items()
    items.images[10] = float("nan")
    net = network()
    run, steps = trainer(net, items=items), []
    run.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(state(net)))
    with pytest.raises(LoRKDError, match="the loss is not finite: .*tasks in the batch: a, b"):
        run.run()
    assert len(steps) == 1
    assert all(torch.equal(value, steps[0][key]) for key, value in net.state_dict().items())
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_our_errors_are_not_logged_on_their_way(caplog):
    items = Items()
    items.images[0] = float("nan")
    run = trainer(network(), items=items, train_handlers=[StatsHandler(iteration_log=False, name="stats")])
    logging.getLogger("stats").propagate = True
    with caplog.at_level(logging.INFO), pytest.raises(LoRKDError):
        run.run()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR and record.name != "stats"]


def test_other_errors_are_logged(caplog):
    run = trainer(network())
    run.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: 1 / 0)
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError):
        run.run()
    assert any("terminating due to exception" in record.message for record in caplog.records)


def test_bfloat16_on_the_cpu():
    net, seen = network().float(), []
    items = Items()
    run = trainer(net, amp=True, items=items)
    items.images = items.images.float()
    net.backbone[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.run()
    assert set(seen) == {torch.bfloat16}
    assert run.scaler is None
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())
    assert isinstance(run.inferer, AutocastInferer)


def test_all_that_is_random_follows_from_seed_and_epoch():
    drawn = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            drawn.append(epoch)

    def draws(seed):
        run = trainer(network(), epochs=2, seed=seed)
        run.data_loader.batch_sampler.sampler.__class__ = Sampler
        numbers = []
        run.add_event_handler(
            Events.EPOCH_STARTED,
            lambda engine: numbers.append((torch.rand(1).item(), np.random.rand(), random.random())),
        )
        run.run()
        return numbers

    first = draws(3)
    torch.rand(7)
    assert draws(3) == first
    assert draws(4) != first
    assert first[0] != first[1]
    assert len({number for numbers in first for number in numbers}) == 6
    assert drawn[:2] == [0, 1]


def test_masks_are_augmented_with_their_images():
    class Masks(Items):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": torch.full((1, 8, 8), index % 2)}

    torch.manual_seed(0)
    net = LoRKDNet(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1)), TASKS, rank=1).double()
    seen = []

    def augment(image, mask, iteration):
        return image, 1 - mask

    loss = LoRKDLoss("dice_ce", 0.0, tasks=TASKS)
    run = trainer(net, teacher=None, loss_function=loss, items=Masks(), augment=augment)
    run.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda engine: seen.append(engine.state.output["label"]))
    run.run()
    assert seen[0][:, 0, 0, 0].tolist() == [1, 0] * 4


def test_features_are_distilled_where_the_teacher_has_no_logits():
    class Half(Teacher):
        def has_logits(self, task):
            return task == 0

        def forward(self, x, task, return_features=False):
            logits = super().forward(x, task).masked_fill((task == 1)[:, None], float("nan"))
            return (logits, x.flatten(1)[:, :7]) if return_features else logits

    loss = LoRKDLoss("ce", 1.0, 2.0, tasks=TASKS, feature_transfer=FeatureTransferLoss(36, 7, 2.0)).double()
    before = state(loss)
    net = network()
    run = trainer(net, teacher=Half(), loss_function=loss)
    run.run()
    assert run.state.metrics["feature_transfer"] > 0
    assert any(not torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_evaluator_leaves_the_batch_s_task_and_spacing():
    net, seen, modes = network(), [], []

    class Spaced(Items):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"image": item["image"].double(), "spacing": torch.tensor([2.0, 1.0])}

    net.backbone[0].register_forward_hook(lambda module, args, out: modes.append(net.training))
    run = TaskEvaluator("cpu", torch.utils.data.DataLoader(Spaced(4), batch_size=4), net)
    run.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    run.run()
    assert seen[0]["task"].tolist() == [0, 0, 1, 1]
    assert seen[0]["spacing"].shape == (4, 2)
    assert set(modes) == {False}
    with torch.no_grad():
        assert torch.equal(seen[0]["pred"], net(Items(4).images.double(), torch.tensor([0, 0, 1, 1])))
