"""Serving all experts of one decomposition at once."""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from types import TracebackType

import torch
from torch import Tensor

from lorkd_monai.checkpoints.packs import read_expert
from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.strategies import eks_strategy
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.surgery.outputs import first_tensor

__all__ = ["ExpertPool", "PoolFullError"]

_FUSE_AFTER = 8  # passes of one task in a row, after which fusing its expert pays: it costs a few passes
_Request = tuple[Tensor, int, Future]  # image, index of the task, the answer to come


class PoolFullError(LoRKDError):
    """More requests wait than the pool holds: ask again later, or turn the caller away."""


class ExpertPool:
    """One backbone and all its experts behind one call, for any number of threads.

    Requests of any tasks that wait at the same moment, with images of the same shape and type, share one routed pass.
    After many passes of the same task its expert is fused and kept, so that a pass costs as much as in a plain
    network. Answers are those of the extracted experts, to round-off.

    Args:
        net: the decomposition. It is copied if it is in training mode or on another device. Otherwise the pool uses
            it as it is, and it must not be changed or trained meanwhile.
        device: where to run; None: where ``net`` is.
        max_batch: most images in one pass.
        max_waiting: most requests that wait for a pass.

    Raises:
        LoRKDError: ``max_batch`` or ``max_waiting`` below 1.

    Example::

        with ExpertPool(load_pack("pack"), max_batch=16) as pool:
            logits = pool.predict(image, "breast")           # image C×H×W -> 2 logits
            pool.exchange("newer/expert_breast.safetensors")  # requests go on meanwhile
    """

    def __init__(
        self,
        net: LoRKDNet,
        device: torch.device | str | None = None,
        max_batch: int = 16,
        max_waiting: int = 1024,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            check_whole(name, value)
        here = next(net.parameters()).device
        self.device = here if device is None else torch.empty(0, device=device).device  # "cuda" -> cuda:0
        self.net = net if here == self.device and not net.training else copy.deepcopy(net).to(self.device).eval()
        self.max_batch = max_batch
        self._requests: queue.Queue[_Request | None] = queue.Queue(max_waiting)
        self._lock = threading.Lock()
        self._between = threading.Lock()  # held while the network runs, and while its experts change
        self._changing = threading.Lock()  # one change at a time: a file is checked against experts that don't change
        self._repeated: tuple[int, int] = (-1, 0)  # a task, and how many passes in a row were of it alone
        self._closed = False
        self._worker = threading.Thread(target=self._serve, name="ExpertPool", daemon=True)
        self._worker.start()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.net.tasks

    def submit(self, image: Tensor, task: str | int) -> Future:
        """Ask for one image, C×H×W[×D], without waiting.

        Returns:
            A future of what :meth:`predict` returns.

        Raises:
            LoRKDError: an unknown task, an image that is not one C×H×W[×D] tensor, or a closed pool.
            PoolFullError: ``max_waiting`` requests wait already.
        """
        index = self.net.task_index(task)
        if not isinstance(image, Tensor) or image.ndim < 2:
            raise LoRKDError(f"image must be one C×H×W[×D] tensor, got {getattr(image, 'shape', type(image).__name__)}")
        future: Future = Future()
        with self._lock:  # no request may follow the end mark
            if self._closed:
                raise LoRKDError("the pool is closed")
            try:
                self._requests.put_nowait((image.detach(), index, future))
            except queue.Full:
                raise PoolFullError(
                    f"the pool is full: {self._requests.maxsize} requests wait. Ask again later, or raise max_waiting"
                ) from None
        return future

    def predict(self, image: Tensor, task: str | int) -> Tensor:
        """The task's logits for one image.

        Args:
            image: C×H×W[×D].
            task: name or index.

        Returns:
            n_t × …, n_t being the task's classes, on the pool's device.

        Raises:
            LoRKDError: as :meth:`submit`. An error of the network reaches only the caller of the image that caused it.
        """
        return self.submit(image, task).result()

    def exchange(self, file: str | os.PathLike) -> str:
        """Replace the expert of a task while requests go on.

        The file is read and checked first. The expert is then replaced between two passes, so each request is
        answered by the old one or by the new one.

        Args:
            file: ``expert_<task>.safetensors`` of a pack of the same shared weights; its rank may be another.

        Returns:
            The name of the task.

        Raises:
            LoRKDError: the file is not an expert of this backbone, its task is not served here, or it does not fit. The
                pool then serves what it served before.
        """
        return self._put(file, served=True)

    def add(self, file: str | os.PathLike) -> str:
        """Serve one more task, whose expert is in ``file``, while requests go on; see :meth:`exchange`.

        Raises:
            LoRKDError: as :meth:`exchange`, or the task is served already.
        """
        return self._put(file, served=False)

    def _put(self, file: str | os.PathLike, served: bool) -> str:
        with self._changing:
            expert = read_expert(self.net, file)
            with self._between:
                if (expert.task in self.net.tasks) != served:
                    known, other = ("not served", "add") if served else ("served already", "exchange")
                    raise LoRKDError(
                        f"{file} holds the expert of task {expert.task!r}, which is {known} here: {other} it"
                    )
                expert.put_into(self.net)
        return expert.task

    def close(self) -> None:
        """Answer all requests that wait, and stop."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._requests.put(None)
        self._worker.join()

    def __enter__(self) -> ExpertPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self) -> None:
        ended = False
        while not ended:
            waiting = [self._requests.get()]
            with suppress(queue.Empty):
                while len(waiting) < 4 * self.max_batch and waiting[-1] is not None:
                    waiting.append(self._requests.get_nowait())
            ended = waiting[-1] is None
            groups: dict[tuple, list[_Request]] = {}
            for request in filter(None, waiting):
                groups.setdefault((tuple(request[0].shape), request[0].dtype), []).append(request)
            for group in groups.values():
                for start in range(0, len(group), self.max_batch):
                    part = group[start : start + self.max_batch]
                    self._answer([request for request in part if request[2].set_running_or_notify_cancel()])

    def _answer(self, requests: Sequence[_Request]) -> None:
        if not requests:
            return
        try:
            results = self._run([image for image, _, _ in requests], [task for _, task, _ in requests])
        except Exception as e:
            if len(requests) == 1:
                requests[0][2].set_exception(e)
            else:
                for request in requests:  # one of them caused it; the others still get their answers
                    self._answer([request])
            return
        for (_, _, future), result in zip(requests, results, strict=True):
            future.set_result(result)

    @torch.no_grad()
    def _run(self, images: list[Tensor], tasks: list[int]) -> list[Tensor]:
        batch = torch.stack(images).to(self.device)
        with self._between:
            classes = list(self.net.num_classes.values())
            with nullcontext() if self._fusing_pays(tasks) else eks_strategy("factored"):
                output = first_tensor(self.net(batch, torch.tensor(tasks)))
        return [row[: classes[task]].clone() for row, task in zip(output, tasks, strict=True)]

    def _fusing_pays(self, tasks: list[int]) -> bool:
        """Whether to let the network fuse and keep the expert of a batch of one task."""
        if len(set(tasks)) > 1:
            self._repeated = (-1, 0)
            return True  # nothing is fused
        task, times = self._repeated
        self._repeated = (tasks[0], times + 1 if task == tasks[0] else 1)
        return self._repeated[1] > _FUSE_AFTER or self.net._view.keeps(tasks[0])
