"""The expert pool: the extracted experts' answers, from any number of threads."""

import os
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from test_packs import decomposition

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.pool import ExpertPool

SHAPES = [(1, 32, 32), (1, 24, 40)]


def hammer(seconds, threads=8):
    """Random requests from many threads; the number answered, and the resident memory (MiB) after each second."""
    net = decomposition(tasks={"a": 2, "b": 3, "c": 4}).double()
    plain = [net.extract(t).eval() for t in net.tasks]
    failures, answered, memory, end = [], [0] * threads, [], time.monotonic() + seconds

    def ask(number):
        generator = torch.Generator().manual_seed(number)
        while time.monotonic() < end and not failures:
            task = int(torch.randint(3, (1,), generator=generator))
            shape = SHAPES[int(torch.randint(2, (1,), generator=generator))]
            image = torch.rand(shape, generator=generator, dtype=torch.float64)
            got = pool.predict(image, task)
            with torch.no_grad():
                expected = plain[task](image[None])[0]
            if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-9, atol=1e-12):
                failures.append((task, shape))
            answered[number] += 1

    with ExpertPool(net, max_batch=8) as pool:
        workers = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(1)
            memory.append(resident())
        for worker in workers:
            worker.join()
    assert not failures
    assert min(answered) > 0
    return sum(answered), memory


def resident():
    """Memory of this process that is in use, in MiB; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if status.exists() else 0.0


def test_every_thread_gets_its_own_experts_answers():
    hammer(seconds=3)


@pytest.mark.slow
def test_memory_does_not_grow_while_threads_ask():
    """LORKD_POOL_SECONDS=60 for the long one."""
    seconds = float(os.environ.get("LORKD_POOL_SECONDS", "20"))
    count, memory = hammer(seconds)
    start, end = statistics.median(memory[len(memory) // 4 :][:5]), statistics.median(memory[-5:])
    print(f"{count} answers in {seconds:g} s; {start:.1f} MiB after a quarter, {end:.1f} MiB at the end")
    assert end - start < 10


def test_a_bad_image_harms_its_own_caller_only():
    with ExpertPool(decomposition(), max_batch=4) as pool:
        good = [pool.submit(torch.rand(1, 32, 32), "xray") for _ in range(3)]
        bad = pool.submit(torch.rand(5, 32, 32), "xray")
        assert all(f.result().shape == (3,) for f in good)
        with pytest.raises(RuntimeError, match="channels"):
            bad.result()
        assert pool.predict(torch.rand(1, 32, 32), 0).shape == (2,)


def test_what_is_waiting_is_answered_before_the_pool_closes():
    pool = ExpertPool(decomposition())
    waiting = [pool.submit(torch.rand(1, 32, 32), i % 2) for i in range(20)]
    pool.close()
    assert all(f.done() and f.exception() is None for f in waiting)
    with pytest.raises(LoRKDError, match="the pool is closed"):
        pool.predict(torch.rand(1, 32, 32), 0)
    pool.close()


def test_bad_requests():
    with ExpertPool(decomposition()) as pool:
        with pytest.raises(LoRKDError, match="unknown task 'spleen'"):
            pool.predict(torch.rand(1, 32, 32), "spleen")
        with pytest.raises(LoRKDError, match="image must be one"):
            pool.predict([[0.0]], "xray")
    with pytest.raises(LoRKDError, match="max_batch must be a whole number"):
        ExpertPool(decomposition(), max_batch=0)
