"""Times of mixed batches against the plain network, side by side in one run.

    python scripts/benchmark.py [--cases resnet18,resnet10,unet3d] [--tasks 8] [--threads 2] [--out benchmark]

writes ``<out>.json`` and ``<out>.md``: median, fastest and slowest time of forward + backward, and the ratio of the
medians to the plain network's. Rounds are interleaved, so that whatever else the machine does hits all ways alike.
``papers`` is the form of arXiv 2404.17184: one weight for each sample, of all tasks' ΔW under a one-hot mask, in a
convolution with B groups.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from monai.networks.nets import ResNet, UNet, resnet18, resnet50
from torch import Tensor, nn

from lorkd_monai.networks import LoRKDNet, LowRankLayer
from lorkd_monai.networks.functional import delta_weight, eks_strategy
from lorkd_monai.networks.routing import current_routing

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: resnet18(spatial_dims=2, n_input_channels=3, num_classes=3), (32, 3, 64, 64)),
    "resnet10": (
        lambda: ResNet("basic", [1, 1, 1, 1], [16, 32, 64, 128], spatial_dims=2, n_input_channels=3, num_classes=3),
        (64, 3, 64, 64),
    ),
    "unet3d": (lambda: UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2), (4, 1, 48, 48, 48)),
    "resnet50": (lambda: resnet50(spatial_dims=2, n_input_channels=3, num_classes=3), (16, 3, 224, 224)),
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
    y = layer_map.unpack(y, rows, x)
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


def run_case(name: str, tasks: int, rounds: int, ways: list[str], device: torch.device) -> dict:
    """Times of one case, by way."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    plain = build().to(device)
    net = LoRKDNet(build(), {f"task{t}": 3 for t in range(tasks)}, rank=4).to(device)
    for key, parameter in net.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.01)
    x, task = torch.randn(shape, device=device), torch.arange(shape[0]) % tasks

    def separate() -> Tensor:
        return torch.cat([net(x[task == t], int(t)) for t in task.unique()])

    calls = {way: {"plain": lambda: plain(x), "separate": separate}.get(way, lambda: net(x, task)) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):  # the first warms up
        for way, call in calls.items():
            strategy = way if way in ("auto", "split", "group", "factored", "measure") else "auto"
            with eks_strategy(strategy), PapersForm() if way == "papers" else nullcontext():
                took = seconds(call, device)
            if round_:
                times[way].append(took)
            plain.zero_grad()
            net.zero_grad()
    limit = statistics.median(times["plain"])
    return {
        way: {
            "median_s": statistics.median(t),
            "min_s": min(t),
            "max_s": max(t),
            "ratio": statistics.median(t) / limit,
            "ratio_of_fastest": min(t) / min(times["plain"]),
        }
        for way, t in times.items()
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="resnet18,resnet10,unet3d")
    parser.add_argument("--ways", default="plain,auto,split,group,factored,papers,separate")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = options.ways.split(",")
    if ways[0] != "plain":
        parser.error("--ways must start with plain: it is what the others are compared with")
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    results = {}
    for case in options.cases.split(","):
        results[case] = run_case(case, options.tasks, options.rounds, ways, torch.device(options.device))
        print(case, {way: round(r["ratio"], 2) for way, r in results[case].items()}, flush=True)
    facts = {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "threads": options.threads,
        "tasks": options.tasks,
        "rounds": options.rounds,
    }
    text = json.dumps({"facts": facts, "results": results}, indent=2)
    options.out.with_suffix(".json").write_text(text)
    lines = ["| case | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [
        f"| {case} | "
        + " | ".join(f"{r[w]['ratio']:.2f} ({r[w]['min_s']:.2f} to {r[w]['max_s']:.2f} s)" for w in ways)
        + " |"
        for case, r in results.items()
    ]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
