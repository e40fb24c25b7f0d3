"""Time and memory of mixed batches against the plain network, side by side in one run.

    python scripts/benchmark.py [--cases resnet18,resnet10,unet3d] [--tasks 8] [--threads 2] [--out benchmark]

writes ``<out>.json`` and ``<out>.md``. ``--tasks`` may be a list (``8,64``). For each case:

* forward + backward: median, fastest and slowest time, and the ratio of the medians to the plain network's. Rounds are
  interleaved, those of all numbers of tasks too, so that whatever else the machine does hits all ways alike, and each
  case has a process of its own.
  ``papers`` is the form of arXiv 2404.17184: one weight for each sample, of all tasks' ΔW under a one-hot mask, in a
  convolution with B groups;
* ``forward``: a mixed batch without gradients in evaluation mode, against the plain network; ``forward_peft``: the same
  with HF PEFT's adapters (LoRA of rank 4 on all convolutions and linear layers that it takes), where PEFT is installed;
* ``eval``: one task without gradients, against the extracted network;
* ``memory`` (CPU): what a process grows by in one step at its peak, against the plain network; the gradients of the
  experts are not counted.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from monai.networks.nets import ResNet, SwinUNETR, UNet, resnet18, resnet50
from torch import Tensor, nn

from lorkd_monai.networks import LoRKDNet, LowRankLayer
from lorkd_monai.networks.eks.strategies import delta_weight, eks_strategy
from lorkd_monai.networks.routing.table import current_routing

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: resnet18(spatial_dims=2, n_input_channels=3, num_classes=3), (32, 3, 64, 64)),
    "resnet10": (
        lambda: ResNet("basic", [1, 1, 1, 1], [16, 32, 64, 128], spatial_dims=2, n_input_channels=3, num_classes=3),
        (64, 3, 64, 64),
    ),
    "unet3d": (lambda: UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2), (4, 1, 48, 48, 48)),
    "resnet50": (
        lambda: resnet50(spatial_dims=2, n_input_channels=3, num_classes=3, conv1_t_stride=2),
        (16, 3, 224, 224),
    ),
    "swin_unetr": (lambda: SwinUNETR(1, 3, feature_size=24, spatial_dims=3), (2, 1, 64, 32, 32)),
}


def papers_form(layer: LowRankLayer, x: Tensor) -> Tensor:
    """One LowRankLayer in the papers' form; only convolutions with zero padding and one group."""
    x, layer_map = layer.op.resolve(x)
    weight, tasks = layer.layer.weight, current_routing().tasks
    deltas = torch.stack(
        [delta_weight(a, b, s, weight.shape) for a, b, s in zip(layer.lora_A, layer.lora_B, layer.scales)]
    )
    mask = torch.eye(len(deltas), device=x.device)[list(tasks)]
    weights = weight + (mask.view(*mask.shape, *[1] * weight.ndim) * deltas).sum(1)  # B · T · |W| numbers on the way
    rows = len(tasks)
    y = layer_map.grouped(rows)(layer_map.pack(x, rows), weights.flatten(0, 1), None)
    y = layer_map.unpack(y, rows, 1, x)
    bias = layer.layer.bias
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


class PapersForm:
    """Replace the forward of every low-rank layer inside the block."""

    def __enter__(self) -> None:
        self.own, LowRankLayer.forward = LowRankLayer.forward, papers_form

    def __exit__(self, *_: object) -> None:
        LowRankLayer.forward = self.own


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Time of one forward and backward pass."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call().square().mean().backward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call().square().mean().backward()
    return time.perf_counter() - start


def build_case(name: str, tasks: int, device: torch.device) -> tuple[nn.Module, LoRKDNet, Tensor, Tensor]:
    """The plain network, its decomposition with experts that are not zero, images, and the task of each."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    plain = build().to(device)
    net = LoRKDNet(build(), {f"task{t}": 3 for t in range(tasks)}, rank=4).to(device)
    for key, parameter in net.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.01)
    return plain, net, torch.randn(shape, device=device), torch.arange(shape[0]) % tasks


def summary(times: dict[str, list[float]], limit: str) -> dict[str, dict[str, float]]:
    """Median, range and ratio to ``limit`` of each way."""
    return {
        way: {
            "median_s": statistics.median(t),
            "min_s": min(t),
            "max_s": max(t),
            "ratio": statistics.median(t) / statistics.median(times[limit]),
            "ratio_of_fastest": min(t) / min(times[limit]),
        }
        for way, t in times.items()
    }


def run_case(name: str, counts: list[int], rounds: int, ways: list[str], device: torch.device) -> dict[str, dict]:
    """Times of one case, by number of tasks and way; the rounds of all are interleaved."""
    built = {tasks: build_case(name, tasks, device) for tasks in counts}
    plain, _, x, _ = built[counts[0]]
    calls: dict[tuple[int, str], Callable[[], Tensor]] = {(0, "plain"): lambda: plain(x)}
    for tasks, (_, net, _, task) in built.items():
        for way in ways[1:]:
            own = functools.partial(_separate, net) if way == "separate" else net
            calls[tasks, way] = functools.partial(own, x, task)
    times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for round_ in range(rounds + 1):  # the first warms up
        for (tasks, way), call in calls.items():
            strategy = way if way in ("auto", "split", "group", "factored") else "auto"
            with eks_strategy(strategy), PapersForm() if way == "papers" else nullcontext():
                took = seconds(call, device)
            if round_:
                times[tasks, way].append(took)
            (built[tasks][1] if tasks else plain).zero_grad()
    return {
        str(tasks): summary({way: times[0 if way == "plain" else tasks, way] for way in ways}, "plain")
        for tasks in counts
    }


def _separate(net: LoRKDNet, x: Tensor, task: Tensor) -> Tensor:
    return torch.cat([net(x[task == t], int(t)) for t in task.unique()])


@torch.no_grad()
def run_eval(name: str, tasks: int, rounds: int, device: torch.device) -> dict:
    """Times without gradients in evaluation mode: of one task, and of a mixed batch."""
    plain, net, x, task = build_case(name, tasks, device)
    extracted = net.extract(1).eval()
    net.eval()
    plain.eval()
    one = timed({"extracted": lambda: extracted(x), "eval": lambda: net(x, 1)}, 2 * rounds, device)
    mixed = {"plain": lambda: plain(x), "forward": lambda: net(x, task)}
    if importlib.util.find_spec("peft"):
        adapted = with_peft(copy.deepcopy(plain), tasks)
        names = [f"task{t}" for t in task.tolist()]
        mixed["forward_peft"] = lambda: adapted(x, adapter_names=names)
    found = summary(one, "extracted") | summary(timed(mixed, rounds, device), "plain")
    return {way: found[way] for way in ("forward", "forward_peft", "eval") if way in found}


def timed(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, in interleaved rounds after one that warms up."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    for round_ in range(rounds + 1):
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[way].append(time.perf_counter() - start)
    return times


def with_peft(network: nn.Module, tasks: int) -> nn.Module:
    """The network with PEFT's LoRA adapters of rank 4, one for each task, which are not zero."""
    from peft import LoraConfig, get_peft_model

    wanted = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=wanted, init_lora_weights=False)
    adapted = get_peft_model(network, config, adapter_name="task0")
    for t in range(1, tasks):
        adapted.add_adapter(f"task{t}", config)
    return adapted.to(next(network.parameters()).device).eval()


def memory_of_this_process(field: str) -> int:
    """Bytes; Linux. Not getrusage: its peak is never below that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def grown(name: str, tasks: int, way: str) -> float:
    """MiB that this process grows by in two training steps at their peak, without the gradients of experts."""
    plain, net, x, task = build_case(name, tasks, torch.device("cpu"))
    before = memory_of_this_process("VmRSS")
    for _ in range(2):
        (plain(x) if way == "plain" else net(x, task)).square().mean().backward()
    peak = memory_of_this_process("VmHWM")
    experts = sum(p.grad.nbytes for k, p in net.named_parameters() if ".lora_" in k and p.grad is not None)
    return (peak - before - experts) / 2**20


def run_memory(name: str, tasks: int, threads: int) -> dict[str, float]:
    """Growth in MiB, each in a process of its own, and their ratio."""
    found = {way: float(in_own_process("grown", name, tasks, threads, ways=way)) for way in ("plain", "auto")}
    return {**found, "ratio": found["auto"] / found["plain"]}


def in_own_process(part: str, name: str, tasks: int | str, threads: int, *flags: str, **options: object) -> str:
    """The last line that a part of this script prints for one case, untouched by what other cases left in memory."""
    command = [sys.executable, "-W", "ignore", __file__, "--part", part, "--cases", name, "--tasks", str(tasks), *flags]
    for key, value in {"threads": threads, **options}.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="resnet18,resnet10,unet3d")
    parser.add_argument("--ways", default="plain,auto,split,group,factored,papers,separate")
    parser.add_argument("--tasks", default="8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--step_only", action="store_true", help="forward + backward alone, for the large cases")
    parser.add_argument("--part", choices=("times", "grown"), help=argparse.SUPPRESS)  # see in_own_process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways, counts = options.ways.split(","), [int(n) for n in options.tasks.split(",")]
    if ways[0] != "plain" and options.part != "grown":
        parser.error("--ways must start with plain: it is what the others are compared with")
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    device = torch.device(options.device)
    if options.part == "grown":
        print(grown(options.cases, counts[0], ways[0]))
        return
    if options.part == "times":
        found = run_case(options.cases, counts, options.rounds, ways, device)
        if not options.step_only:
            for tasks in counts:
                found[str(tasks)] |= run_eval(options.cases, tasks, options.rounds, device)
        print(json.dumps(found))
        return
    results = {}
    for case in options.cases.split(","):
        own = {"ways": options.ways, "rounds": options.rounds, "device": options.device}
        flags = ["--step_only"] if options.step_only else []
        times = json.loads(in_own_process("times", case, options.tasks, options.threads, *flags, **own))
        for tasks in counts:
            name = f"{case}, T {tasks}"
            results[name] = times[str(tasks)]
            if not options.step_only and device.type == "cpu" and Path("/proc/self/status").exists():
                results[name]["memory"] = run_memory(case, tasks, options.threads)
            print(name, {way: round(r["ratio"], 2) for way, r in results[name].items()}, flush=True)
    facts = {
        "torch": torch.__version__,
        "peft": importlib.metadata.version("peft") if importlib.util.find_spec("peft") else None,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "threads": options.threads,
        "rounds": options.rounds,
    }
    options.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "results": results}, indent=2))
    columns = list(next(iter(results.values())))
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in results.items():
        cells = [
            f"{r['ratio']:.2f} ({r['min_s']:.2f} to {r['max_s']:.2f} s)" if "min_s" in r else f"{r['ratio']:.2f}"
            for r in found.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
