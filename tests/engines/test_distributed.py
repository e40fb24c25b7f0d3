"""How a process takes its leave of the others."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import glob, sys
from lorkd_monai.engines import leave_processes
import torch
import torch.distributed as dist

def threads():
    return sorted(open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm"))

leave_processes()  # nothing to leave
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2), find_unused_parameters=True)
network(torch.ones(2, 3)).sum().backward()
before = [name for name in threads() if "gloo" in name]
leave_processes()
print(len(before) > 0, [name for name in threads() if "gloo" in name], network.module.weight.grad.sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_no_thread_of_the_group_is_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "group")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "True [] 12.0"
