"""Serving all experts of one decomposition at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.outputs import first_tensor

__all__ = ["ExpertPool"]


class ExpertPool:
    """One backbone and all its experts behind one call, for any number of threads.

    Requests that wait at the same moment and have images of the same shape and type go through the network together,
    whatever their tasks are: one routed pass. Answers are those of the extracted experts, to round-off.

    Args:
        net: the decomposition; it is put into evaluation mode and must not be trained while it serves.
        device: where to run.
        max_batch: most images in one pass.

    Raises:
        LoRKDError: ``max_batch`` below 1.

    Example::

        with ExpertPool(load_pack("pack"), max_batch=16) as pool:
            logits = pool.predict(image, "breast")       # image C×H×W -> 2 logits
    """

    def __init__(self, net: LoRKDNet, device: torch.device | str = "cpu", max_batch: int = 16) -> None:
        if not isinstance(max_batch, int) or max_batch < 1:
            raise LoRKDError(f"max_batch must be a whole number of at least 1, got {max_batch!r}")
        self.device = torch.device(device)
        self.net = net.to(self.device).eval()
        self.max_batch = max_batch
        self._requests: queue.SimpleQueue[tuple[Tensor, int, Future] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
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
            LoRKDError: an unknown task, an image that is no tensor of numbers, or a closed pool.
        """
        index = self.net.task_index(task)
        if not isinstance(image, Tensor) or image.ndim < 2:
            raise LoRKDError(f"image must be one C×H×W[×D] tensor, got {getattr(image, 'shape', type(image).__name__)}")
        future: Future = Future()
        with self._lock:  # nothing may be put behind the end mark
            if self._closed:
                raise LoRKDError("the pool is closed")
            self._requests.put((image.detach(), index, future))
        return future

    def predict(self, image: Tensor, task: str | int) -> Tensor:
        """The task's logits for one image.

        Args:
            image: C×H×W[×D].
            task: name or index.

        Returns:
            n_t × …, n_t being the task's classes, on the pool's device.

        Raises:
            LoRKDError: as :meth:`submit`. What the network raises for an image reaches the caller of that image only.
        """
        return self.submit(image, task).result()

    def close(self) -> None:
        """Answer what is waiting, and stop."""
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
            while len(waiting) < 4 * self.max_batch and waiting[-1] is not None:
                try:
                    waiting.append(self._requests.get_nowait())
                except queue.Empty:
                    break
            if waiting[-1] is None:
                ended = True
                waiting.pop()
            groups: dict[tuple, list[tuple[Tensor, int, Future]]] = {}
            for request in waiting:
                groups.setdefault((tuple(request[0].shape), request[0].dtype), []).append(request)
            for group in groups.values():
                for start in range(0, len(group), self.max_batch):
                    self._answer(group[start : start + self.max_batch])

    def _answer(self, requests: Sequence[tuple[Tensor, int, Future]]) -> None:
        requests = [r for r in requests if r[2].set_running_or_notify_cancel()]
        if not requests:
            return
        try:
            results = self._run([image for image, _, _ in requests], [task for _, task, _ in requests])
        except Exception as e:
            if len(requests) == 1:
                requests[0][2].set_exception(e)
                return
            for request in requests:  # one of them is to blame; the others still get their answers
                self._answer_alone(request)
            return
        for (_, _, future), result in zip(requests, results, strict=True):
            future.set_result(result)

    def _answer_alone(self, request: tuple[Tensor, int, Future]) -> None:
        image, task, future = request
        try:
            future.set_result(self._run([image], [task])[0])
        except Exception as e:
            future.set_exception(e)

    @torch.no_grad()
    def _run(self, images: list[Tensor], tasks: list[int]) -> list[Tensor]:
        classes = list(self.net.num_classes.values())
        batch = torch.stack(images).to(self.device)
        output = first_tensor(self.net(batch, torch.tensor(tasks)))
        return [row[: classes[task]].clone() for row, task in zip(output, tasks, strict=True)]
