"""The numbers of the authors' EKS convolution: outputs and every gradient, to 1e-10.

``tests/data/eks_dev.npz`` holds inputs, factors, outputs and gradients in float64, ``eks_dev.json`` the geometry of
each case; they were computed with the code that the authors of arXiv 2404.17184 released.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import nn

from lorkd_monai.networks import LowRankLayer, route

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def test_oracle(repository):
    arrays = np.load(repository / "tests" / "data" / "eks_dev.npz")
    cases = json.loads((repository / "tests" / "data" / "eks_dev.json").read_text())
    assert len(cases) >= 4
    for i, case in enumerate(cases):

        def tensor(name, i=i):
            return torch.from_numpy(arrays[f"{i}/{name}"])

        kind = {2: nn.Conv2d, 3: nn.Conv3d}[case["spatial_dims"]]
        geometry = {k: case[k] for k in ("kernel_size", "stride", "padding", "dilation", "bias")}
        layer = kind(case["in_channels"], case["out_channels"], **geometry).double()
        wrapped = LowRankLayer(layer, case["ranks"], case["scaling"])
        expected = {"weight": layer.weight}
        if case["bias"]:
            expected["bias"] = layer.bias
        for t in range(len(case["ranks"])):
            expected[f"A{t}"], expected[f"B{t}"] = wrapped.lora_A[t], wrapped.lora_B[t]
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(tensor(name))
        expected["x"] = tensor("x").requires_grad_()
        with route(tensor("task"), batch_size=len(expected["x"])):
            y = wrapped(expected["x"])
        torch.testing.assert_close(y, tensor("y"), **TIGHT)
        y.backward(tensor("grad_y"))
        assert {f"{i}/grad_{n}" for n in expected} <= set(arrays.files)
        for name, parameter in expected.items():
            torch.testing.assert_close(
                parameter.grad, tensor(f"grad_{name}"), **TIGHT, msg=lambda m, n=name: f"{n}: {m}"
            )
