"""LoRKDNet: a shared backbone with one low-rank expert and one head for each task."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.low_rank import LowRankLayer
from lorkd_monai.networks.plain_view import PlainView
from lorkd_monai.networks.routing.folding import find_folding
from lorkd_monai.networks.routing.module import UnverifiedFolding
from lorkd_monai.networks.routing.recompute import remember_routing
from lorkd_monai.networks.routing.table import Routing, route, task_list
from lorkd_monai.networks.spec import (
    checked_options,
    checked_ranks,
    checked_tasks,
    cut_rank,
    cut_ranks,
    differences,
    draw_ranks,
    layer_rank,
    misfits,
    read_spec,
    write_spec,
)
from lorkd_monai.networks.surgery import replace
from lorkd_monai.networks.surgery.heads import head_like, pooled_head_input
from lorkd_monai.networks.surgery.outputs import fill_classes, first_rows, narrow_classes, select_rows, widen_classes
from lorkd_monai.networks.task_banks import TaskBank, watch_heads
from lorkd_monai.networks.trial import try_experts

__all__ = ["LoRKDNet"]

# The task that `serving` serves in this thread or asyncio task, by the id of its network.
_SERVING: ContextVar[Mapping[int, int]] = ContextVar("lorkd_serving", default={})  # noqa: B039 (never changed)


class LoRKDNet(nn.Module):
    """A backbone decomposed into one low-rank expert for each task (LoRKD, arXiv 2404.17184).

    The weights of ``backbone`` are shared by all tasks. Every convolution and linear layer but the head gets one
    low-rank expert for each task (:class:`LowRankLayer`), and the head is replaced by one head for each task. A batch
    may hold samples of any tasks in any order; the result is that of separate passes.

    Args:
        backbone: the network, or a MONAI config dict with ``_target_``. A module is copied, its source untouched.
        tasks: name of each task -> number of its output channels, in this order.
        rank: rank of every expert, or one for each task. 0 makes a plain multi-task network: heads, no experts.
        alpha: the factor of ΔW is ``alpha / rank`` of the layer's expert; or give the factor itself as ``scale``.
        layout: ``"lorkd"`` (the papers') or ``"conv"``; see :func:`~lorkd_monai.networks.eks.strategies.factor_shapes`.
        head: dotted name (or names) of the last layer; None: found by itself.
        include: glob patterns of layer names that get experts; None: all that can.
        exclude: glob patterns of layer names that stay shared.
        rank_pattern: glob pattern of layer names -> factor of the rank, such as the extended paper's doubled decoder
            rank; the first pattern that matches counts.
        norm: ``"shared"`` as in the papers, or ``"task"``: own batch and instance norms for each task.
        scale: factor of ΔW in place of ``alpha / rank``.
        info: what every checkpoint of this network is to carry along, as plain JSON data (classes, image size, …).
        nested: train experts that can be cut to any lower rank: each call in training mode uses the first components
            only, as many of each task's as torch's random generator draws evenly from 1 to its rank. The scale stays.

    Raises:
        LoRKDError: no tasks, a bad task name or class count, bad ranks, patterns that match nothing, no head found, a
            layer whose weight is shared or re-parametrised (weight norm, spectral norm).

    Example::

        >>> net = LoRKDNet(monai.networks.nets.resnet10(spatial_dims=2, n_input_channels=1), {"breast": 2, "xray": 6})
        >>> y = net(torch.rand(4, 1, 64, 64), torch.tensor([0, 1, 1, 0]))  # rows of "breast" end in four -inf
        >>> y.shape, y[0].isinf().sum()
        (torch.Size([4, 6]), tensor(4))
        >>> net.extract("breast").fc                                       # a plain ResNet with 2 outputs
        Linear(in_features=512, out_features=2, bias=True)
    """

    def __init__(
        self,
        backbone: nn.Module | Mapping | functools.partial,
        tasks: Mapping[str, int],
        rank: int | Mapping[str, int] = 4,
        alpha: float = 16.0,
        layout: str = "lorkd",
        head: str | Sequence[str] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rank_pattern: Mapping[str, float] | None = None,
        norm: str = "shared",
        scale: float | None = None,
        info: Mapping | None = None,
        nested: bool = False,
    ) -> None:
        super().__init__()
        self.info = dict(info or {})
        self._num_classes = checked_tasks(tasks)
        self._rank = checked_ranks(rank, list(self._num_classes))
        self._options = checked_options(alpha, scale, layout, head, include, exclude, rank_pattern, norm, nested)
        self._frozen = self._head_seen = self._tried = False
        self._serving: int | None = None
        self._verified: set[bool] = set()
        self.backbone, self._config = replace.build_backbone(backbone, max(self._num_classes.values()))
        self._heads, self._built_classes = replace.insert_heads(self.backbone, head, list(self._num_classes.values()))
        self._norms = replace.insert_norms(self.backbone, list(self._heads), len(self.tasks)) if norm == "task" else {}
        ranks = list(self._rank.values())
        self._layers = replace.insert_experts(self.backbone, list(self._heads), ranks, self._options, self.layer_scale)
        for module in self._routed().values():
            module.fold = None  # until the first batch of several tasks
        self._view = PlainView(self)

    def layer_scale(self, rank: int) -> float:
        """Factor of ΔW in a layer where an expert has this rank."""
        return self._options["alpha"] / rank if self._options["scale"] is None else self._options["scale"]

    # ------------------------------------------------------------------ what it is

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self._num_classes)

    @property
    def num_classes(self) -> dict[str, int]:
        """Output channels of each task."""
        return dict(self._num_classes)

    @property
    def expert_layers(self) -> dict[str, LowRankLayer]:
        """The layers that carry experts, by their name in the backbone."""
        return dict(self._layers)

    @property
    def norm_banks(self) -> dict[str, TaskBank]:
        """The norms of which each task has its own, by their name in the backbone; none with ``norm="shared"``."""
        return dict(self._norms)

    @property
    def layout(self) -> str:
        """How A_t and B_t make ΔW."""
        return self._options["layout"]

    @property
    def nested(self) -> bool:
        """Whether experts are trained so that they can be cut to any lower rank."""
        return self._options.get("nested", False)

    @property
    def rank_pattern(self) -> dict[str, float]:
        """Glob pattern of layer names -> factor of the rank."""
        return dict(self._options["rank_pattern"])

    def _routed(self) -> dict[str, LowRankLayer | TaskBank]:
        return {**self._layers, **self._norms, **self._heads}

    def spec(self) -> dict:
        """What it takes to build this network again, as plain JSON data."""
        return {
            "tasks": self.num_classes,
            "rank": dict(self._rank),
            **self._options,
            "backbone": copy.deepcopy(self._config),
            "info": copy.deepcopy(self.info),
        }

    @classmethod
    def from_spec(cls, spec: Mapping, backbone: nn.Module | Mapping | None = None) -> LoRKDNet:
        """Build the network that :meth:`spec` describes.

        Args:
            spec: as :meth:`spec` gives it.
            backbone: the backbone, needed where the described network was not built from a configuration.

        Raises:
            LoRKDError: there is no backbone in ``spec`` and none was given.
        """
        backbone = spec["backbone"] if backbone is None else backbone
        if backbone is None:
            raise LoRKDError("this decomposition was made from a network object: give that backbone, or its config")
        return cls(backbone, **{k: v for k, v in spec.items() if k != "backbone"})

    def backbone_config(self, task: str) -> dict | None:
        """A MONAI config of the plain network that :meth:`extract` gives for ``task``; None without a known config."""
        classes = self._num_classes[self.tasks[self.task_index(task)]]
        return None if self._config is None else replace.config_of_expert(self._config, classes)

    def task_index(self, task: str | int) -> int:
        """Index of a task given by name or index.

        Raises:
            LoRKDError: there is no such task.
        """
        if isinstance(task, str):
            if task not in self._num_classes:
                raise LoRKDError(f"unknown task {task!r}: this network has {', '.join(self.tasks)}")
            return self.tasks.index(task)
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise LoRKDError(f"a task is a name or an index, got {task!r}")
        if not 0 <= int(task) < len(self.tasks):
            raise LoRKDError(
                f"unknown task {int(task)}: this network has {len(self.tasks)} tasks, 0 to {len(self.tasks) - 1}"
            )
        return int(task)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        x: Tensor,
        task: str | int | Sequence[str | int] | Tensor | None = None,
        *,
        return_features: bool = False,
        rank: int | Mapping[str, int] | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Each sample through its own task's expert and head.

        Args:
            x: batch, BCHW[D].
            task: task of each sample: a name, an index, a LongTensor[B] or a list of either; a single one serves the
                whole batch (also as a tensor of length 1). May be left out in :meth:`serving` and after
                :meth:`switch_to`.
            return_features: also return the head's input, pooled over space: B × F.
            rank: cut the experts to at most this rank, one for all or by task, see :meth:`extract`.
            kwargs: passed to the backbone; tensors with B rows are routed with the batch.

        Returns:
            B × C_max × …, C_max being the widest head's channels; channels past a sample's own head are -inf. After
            :meth:`switch_to` and without ``task``: the channels of that task alone.

        Raises:
            LoRKDError: no task, an unknown task, or a number of tasks that is neither 1 nor B.
        """
        if isinstance(x, MetaTensor):
            y = self(x.as_tensor(), task, return_features=return_features, rank=rank, **kwargs)
            return MetaTensor(y, meta=x.meta, applied_operations=x.applied_operations) if isinstance(y, Tensor) else y
        narrow = None
        if task is None:
            task = _SERVING.get().get(id(self), self._serving)
            if task is None:
                raise LoRKDError(
                    "task is needed: give the task of each sample, or call it inside `with serving(task):`"
                )
            narrow = self._num_classes[self.tasks[task]]
        routing = self._routing(task, x.shape[0], rank)
        if not self._tried:
            try_experts(self, x, kwargs)
        alone = routing.uniform if routing.ranks is None and not return_features else None
        if self._view.usable(alone) and alone is not None:
            if not self._head_seen:
                self._routed_forward(x[:1], Routing([alone], 1), False, first_rows(kwargs, x.shape[0], 1))
            y = self._view(alone, x, kwargs, None)
            own, widest = self._num_classes[self.tasks[alone]], max(self._num_classes.values())
            return y if narrow or own == widest else widen_classes(y, own, widest, x.ndim)
        y, features = self._routed_forward(x, routing, return_features, kwargs)
        if narrow is not None:
            y = narrow_classes(y, max(self._num_classes.values()), narrow, x.ndim)
        return (y, features) if return_features else y

    def _routing(
        self, task: str | int | Sequence | Tensor, batch: int, rank: int | Mapping[str, int] | None
    ) -> Routing:
        if isinstance(task, str):
            indices = [self.task_index(task)]
        elif isinstance(task, (list, tuple)) and any(isinstance(t, str) for t in task):
            indices = [self.task_index(t) for t in task]
        else:
            indices = task_list(task)
            for index in set(indices):
                self.task_index(index)
        if rank is not None:
            return Routing(indices, batch, cut_ranks(self, rank))
        drawn = self.training and self.nested and self._layers
        return Routing(indices, batch, draw_ranks(list(self._rank.values())) if drawn else None)

    def _routed_forward(self, x: Tensor, routing: Routing, return_features: bool, kwargs: Mapping) -> tuple[Any, Any]:
        if routing.uniform is None and self.training not in self._verified:
            self._find_folding(x, kwargs)
        try:
            return self._ordered_forward(x, routing, return_features, kwargs)
        except UnverifiedFolding:  # a branch that was not taken, or images too small to fold, when it was found
            self._find_folding(x, kwargs)
            return self._ordered_forward(x, routing, return_features, kwargs)

    def _ordered_forward(self, x: Tensor, routing: Routing, return_features: bool, kwargs: Mapping) -> tuple[Any, Any]:
        # One order for the whole network, in which every layer can take the rows of each task as they are.
        ordered = routing.ordered
        shuffle = ordered is not routing
        if shuffle:
            size = x.shape[0]
            x = select_rows(x, routing.order)
            kwargs = {
                k: select_rows(v, routing.order) if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v
                for k, v in kwargs.items()
            }
        with route(ordered), watch_heads() as calls:
            y = self.backbone(x, **kwargs)
        if not calls:
            raise LoRKDError(
                f"the head {', '.join(map(repr, self._heads))} takes no part in the network's forward, so all tasks "
                "would share another: name the layer that gives the classes with head=…"
            )
        self._head_seen = True
        features = pooled_head_input([(x, head.channel_dim) for head, x in calls]) if return_features else None
        remember_routing((y, features), ordered)
        y = fill_classes(y, ordered, list(self._num_classes.values()), x.ndim)
        if shuffle:
            y = select_rows(y, routing.inverse)
            features = None if features is None else select_rows(features, routing.inverse)
        return y, features

    def _find_folding(self, x: Tensor, kwargs: Mapping) -> None:
        """Find out how the backbone folds its batch, once for training and once for evaluation mode."""

        pair = first_rows(kwargs, x.shape[0], 2)

        def call(batch: Tensor) -> object:
            with route(0, batch_size=batch.shape[0]):
                return self.backbone(batch, **pair)

        for module, fold in find_folding(call, self.backbone, self._routed().values(), x).items():
            module.learn_fold(fold)
        self._verified.add(self.training)

    def __deepcopy__(self, memo: dict) -> LoRKDNet:
        memo.update(replace.detached(self.backbone))
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def train(self, mode: bool = True) -> LoRKDNet:
        """Set training mode; norms shared by frozen tasks keep their statistics."""
        super().train(mode)
        self._view.clear()
        if self._frozen:
            for module in self.backbone.modules():
                if getattr(module, "track_running_stats", False) and not any(
                    p.requires_grad for p in module.parameters()
                ):
                    module.training = False
        return self

    # ------------------------------------------------------------------ experts as plain networks

    def extract(self, task: str | int, rank: int | None = None) -> nn.Module:
        """A plain network of the backbone's own class that computes what this one does for ``task`` (fusion).

        Its weights are W0 + ΔW of the task, its head is the task's, and its keys are the backbone's own; nothing in it
        belongs to this package.

        Args:
            task: name or index.
            rank: cut the task's expert to at most this rank (with ``nested``): its first ``rank`` components at the
                scale of the whole expert; ``rank`` × the layer's factor where ``rank_pattern`` names a layer.

        Raises:
            LoRKDError: unknown task, a bad rank, or experts that were not trained to be cut.
        """
        return self._plain(self.task_index(task), {}, None if rank is None else cut_rank(self, task, rank))

    def _plain(self, task: int, memo: dict, rank: int | None = None) -> nn.Module:
        replaced = {id(m): m.plain(task, memo) for m in (*self._norms.values(), *self._heads.values())}
        replaced |= {id(m): m.plain(task, memo, rank) for m in self._layers.values()}
        plain = copy.deepcopy(self.backbone, {**replace.detached(self.backbone), **memo, **replaced})
        for attribute in ("out_channels", "num_classes"):
            if getattr(plain, attribute, None) == self._built_classes:
                setattr(plain, attribute, self._num_classes[self.tasks[task]])
        return plain

    @contextmanager
    def serving(self, task: str | int) -> Iterator[LoRKDNet]:
        """Serve one task inside the block: calls without ``task`` give what :meth:`extract` of it gives, bit for bit.

        It holds for the thread (or asyncio task) that entered the block, so that two of them serve different tasks from
        one network; inside, it counts before :meth:`switch_to`.

        Raises:
            LoRKDError: unknown task.

        Example::

            >>> with net.serving("breast"):
            ...     net(x).shape              # B × 2
            torch.Size([2, 2])
        """
        token = _SERVING.set({**_SERVING.get(), id(self): self.task_index(task)})
        try:
            yield self
        finally:
            _SERVING.reset(token)

    def switch_to(self, task: str | int) -> None:
        """Serve one task from now on: calls without ``task`` give what :meth:`extract` of it gives, bit for bit.

        It holds for the whole process: where several threads share the network, use :meth:`serving`. W0 is not touched:
        the fused weights are next to it.
        """
        self._serving = self.task_index(task)

    def switch_off(self) -> None:
        """Serve no task by default any more."""
        self._serving = None
        self._view.clear()

    # ------------------------------------------------------------------ experts as weights

    def expert_state_dict(self, task: str | int) -> dict[str, Tensor]:
        """What belongs to one task alone: its factors, head and norms, by name."""
        index = self.task_index(task)
        return {k: v.detach() for k, v in self.expert_tensors(index).items()}

    def expert_tensors(self, index: int) -> dict[str, Tensor]:
        """The parameters and buffers themselves that belong to one task alone, by name."""
        return {
            f"{name}.{key}": tensor
            for name, module in self._routed().items()
            for key, tensor in module.expert_tensors(index).items()
        }

    @torch.no_grad()
    def load_expert_state_dict(self, task: str | int, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`expert_state_dict` gave. Nothing is changed where it does not fit.

        Raises:
            LoRKDError: a key too many or too few, or a shape that differs (another rank, layout or class count).
        """
        own = self.expert_tensors(self.task_index(task))
        problems = misfits(own, state)
        if problems:
            raise LoRKDError(f"expert of task {task!r} does not fit: " + "; ".join(problems))
        for key, tensor in own.items():
            tensor.copy_(state[key])

    def add_task(self, name: str, num_classes: int, rank: int | None = None, freeze: bool = False) -> None:
        """Add a fresh expert and head for one more task.

        Args:
            name: name of the task.
            num_classes: its output channels.
            rank: rank of its expert; None: that of the first task.
            freeze: leave all that existed untouched by training: only the new task's parameters require gradients,
                and norms that are shared keep their statistics.

        Raises:
            LoRKDError: the name is taken or bad, or the class count or rank is.
        """
        if name in self._num_classes:
            raise LoRKDError(f"task {name!r} exists already; tasks: {', '.join(self.tasks)}")
        checked_tasks({name: num_classes})
        rank = self._rank[self.tasks[0]] if rank is None else rank
        checked_ranks(rank, [name])
        if bool(rank) != bool(self._layers):
            raise LoRKDError(
                f"rank {rank} for task {name!r}: this network {'has' if self._layers else 'has no'} experts"
            )
        heads = {n: head_like(bank.tasks[0], num_classes, n) for n, bank in self._heads.items()}
        if freeze:
            self.requires_grad_(False)
            self._frozen = True
        self._num_classes[name] = num_classes
        self._rank[name] = rank
        self._tried = False
        for layer in self._layers.values():
            own = layer_rank(rank, layer.rank_factor)
            layer.add_expert(own, self.layer_scale(own))
        for head_name, bank in self._heads.items():
            for module in heads[head_name].modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            bank.add(heads[head_name].requires_grad_(True), num_classes)
        for norms in self._norms.values():
            norms.add(copy.deepcopy(norms.tasks[0]).requires_grad_(True))
        self._view.clear()
        self.train(self.training)

    def remove_task(self, task: str | int) -> None:
        """Delete a task's expert and head; later tasks move up by one.

        Raises:
            LoRKDError: unknown task, or the last one.
        """
        index = self.task_index(task)
        if len(self.tasks) == 1:
            raise LoRKDError(f"task {self.tasks[0]!r} is the last one and can't be removed")
        name = self.tasks[index]
        for module in self._routed().values():
            module.remove_expert(index)
        del self._num_classes[name], self._rank[name]
        self._serving = None
        self._view.clear()

    # ------------------------------------------------------------------ checkpoints

    def get_extra_state(self) -> Tensor:
        """The spec as bytes, so that every checkpoint says what it belongs to, in any file format."""
        return write_spec(self.spec())

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a checkpoint of another decomposition, with the differences by name."""
        differing = differences(read_spec(state), self.spec())
        if differing:
            raise LoRKDError("the checkpoint belongs to another decomposition: " + "; ".join(differing))
