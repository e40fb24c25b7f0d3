"""The expert pool: the extracted experts' answers, from any number of threads."""

import copy
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lorkd_monai.checkpoints.packs import load_pack, save_pack
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.serving.pool import ExpertPool, PoolFullError
from tests.checkpoints.test_packs import decomposition

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


def newer(net, folder, task, seed=7):
    """A pack file of ``net`` with another expert of ``task``, and what the expert answers."""
    other = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.expert_tensors(other.task_index(task)).values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor) + 0.1)
    save_pack(other, folder)
    return folder / f"expert_{task}.safetensors", other.extract(task).eval()


def test_experts_are_exchanged_and_added_under_load_without_a_wrong_answer(tmp_path):
    net = decomposition(tasks={"a": 2, "b": 3, "c": 4})
    save_pack(net, tmp_path / "pack")
    served = load_pack(tmp_path / "pack", tasks=["a", "b"])
    files, allowed = {}, {}
    for task in "abc":
        file, plain = newer(net, tmp_path / f"newer_{task}", task)
        files[task], allowed[task] = file, [net.extract(task).eval(), plain]
    image = torch.rand(1, 32, 32)
    with torch.no_grad():
        answers = {t: [plain(image[None])[0] for plain in plains] for t, plains in allowed.items()}
    assert all((old - new).abs().max() > 0.01 for old, new in answers.values())
    wrong, asked, seen, stop = [], [0], set(), []

    def client():
        while not stop:
            for future, task in [(pool.submit(image, t), t) for t in pool.tasks]:
                got = future.result()
                fits = [i for i, y in enumerate(answers[task]) if torch.allclose(got, y, rtol=1e-4, atol=1e-5)]
                seen.update((task, i) for i in fits)
                wrong.extend([] if fits else [task])
                asked[0] += 1

    with ExpertPool(served) as pool:
        client_thread = threading.Thread(target=client)
        client_thread.start()
        old = {t: tmp_path / "pack" / f"expert_{t}.safetensors" for t in "ab"}
        for _ in range(20):
            assert pool.exchange(files["a"]) == "a"
            pool.exchange(files["b"])
            pool.exchange(old["a"])
            pool.exchange(old["b"])
        assert pool.add(files["c"]) == "c"
        torch.testing.assert_close(pool.predict(image, "c"), answers["c"][1])
        stop.append(1)
        client_thread.join()
    assert not wrong and asked[0] > 20
    assert {("a", 0), ("a", 1), ("b", 0), ("b", 1)} <= seen


def test_several_callers_change_experts_at_once(tmp_path):
    names = [f"t{i}" for i in range(8)]
    save_pack(decomposition(tasks=dict.fromkeys(names, 2)), tmp_path)
    files = {t: tmp_path / f"expert_{t}.safetensors" for t in names}
    interval, refused = sys.getswitchinterval(), []

    def change(call, tasks):
        for task in tasks:
            try:
                call(files[task])
            except LoRKDError as e:
                refused.append(str(e))

    with ExpertPool(load_pack(tmp_path, tasks=names[:3])) as pool:
        callers = [threading.Thread(target=change, args=(pool.exchange, [t] * 25)) for t in names[:3]]
        callers.append(threading.Thread(target=change, args=(pool.add, names[3:])))
        sys.setswitchinterval(1e-5)
        try:
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
        finally:
            sys.setswitchinterval(interval)
        assert not refused
        assert sorted(pool.tasks) == names


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    net = decomposition()
    save_pack(net, tmp_path / "pack")
    good, other = tmp_path / "pack/expert_breast.safetensors", tmp_path / "other"
    save_pack(decomposition(seed=3), other)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-7])
    image = torch.rand(1, 32, 32)
    with ExpertPool(net) as pool:
        before = {t: pool.predict(image, t) for t in pool.tasks}
        for file, words in (
            (other / "expert_breast.safetensors", "other shared weights"),
            (cut, "not a complete file"),
            (tmp_path / "pack/shared.safetensors", "no expert"),
            (tmp_path / "missing.safetensors", "not a complete file"),
        ):
            with pytest.raises(LoRKDError, match=words):
                pool.exchange(file)
        with pytest.raises(LoRKDError, match="served already here: exchange it"):
            pool.add(good)
        others = copy.deepcopy(net)
        others.remove_task("breast")
        others.add_task("breast", 5)
        others.add_task("retina", 2)
        wider, _ = newer(others, tmp_path / "wider", "breast")
        with pytest.raises(LoRKDError, match=r"expert_breast.safetensors: expert of task 'breast' does not fit"):
            pool.exchange(wider)
        with pytest.raises(LoRKDError, match="not served here: add it"):
            pool.exchange(tmp_path / "wider/expert_retina.safetensors")
        assert all(torch.equal(pool.predict(image, t), y) for t, y in before.items())


def test_requests_of_changing_tasks_fuse_nothing(monkeypatch):
    fused = []
    extract = LoRKDNet._plain
    monkeypatch.setattr(LoRKDNet, "_plain", lambda net, *a, **k: fused.append(1) or extract(net, *a, **k))
    net = decomposition().double()
    plain = {t: net.extract(t).eval() for t in net.tasks}
    image = torch.rand(1, 32, 32, dtype=torch.float64)
    net.eval()(image[None], "breast")  # the first call ever tries the experts
    fused.clear()
    with ExpertPool(net) as pool, torch.no_grad():
        for task in ["breast", "xray"] * 10 + ["breast"] * 8:
            torch.testing.assert_close(pool.predict(image, task), plain[task](image[None])[0], rtol=1e-9, atol=1e-12)
        assert not fused
        for _ in range(20):
            torch.testing.assert_close(pool.predict(image, "breast"), plain["breast"](image[None])[0])
        assert len(fused) == 1


def test_a_full_pool_says_so_and_answers_what_it_took(monkeypatch):
    go = threading.Event()
    run = ExpertPool._run
    monkeypatch.setattr(ExpertPool, "_run", lambda pool, *args: go.wait() and run(pool, *args))
    with ExpertPool(decomposition(), max_batch=1, max_waiting=3) as pool:
        taken = []
        with pytest.raises(PoolFullError, match="the pool is full: 3 requests wait"):
            for _ in range(20):
                taken.append(pool.submit(torch.rand(1, 32, 32), "xray"))
        go.set()
        assert len(taken) >= 3 and all(f.result().shape == (3,) for f in taken)
        assert pool.predict(torch.rand(1, 32, 32), "xray").shape == (3,)
    with pytest.raises(LoRKDError, match="max_waiting must be a whole number"):
        ExpertPool(decomposition(), max_waiting=0)


def test_the_callers_network_stays_where_and_as_it_is():
    net = decomposition().train()
    with ExpertPool(net) as pool:
        assert net.training and not pool.net.training
        assert pool.predict(torch.rand(1, 32, 32), "xray").shape == (3,)
    with ExpertPool(net.eval(), device="meta") as pool:
        assert {p.device.type for p in net.parameters()} == {"cpu"}
        assert {p.device.type for p in pool.net.parameters()} == {"meta"}
    with ExpertPool(net) as pool:
        assert pool.net is net  # no second copy where none is needed
