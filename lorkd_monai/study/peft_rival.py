"""Adapters of Hugging Face's PEFT library on a frozen student, one for each task: the usual way to do it.

LoRA (Hu et al., arXiv 2106.09685) as the package ``peft`` does it: the student of all tasks is trained, then frozen,
and each task trains an adapter and its own head. The adapters are made and run by `peft`; here are the choice of the
layers that get one, what is frozen, and the plain network of a task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study.settings import StudySettings

__all__ = ["AdaptedNet", "adapt", "adapter_facts", "check_peft", "share_frozen"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def check_peft() -> Any:
    """The package ``peft``.

    Raises:
        LoRKDError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise LoRKDError("the method 'peft_lora' needs the package peft: pip install 'lorkd-monai[peft]'") from error
    return peft


class AdaptedNet(LoRKDNet):
    """A frozen network of one task with a PEFT adapter and a head that learn; made by `adapt`.

    Norms are frozen with the student: batch norms keep its statistics also while the adapter trains, so that one set
    serves all tasks, in training as in use. With ``own_norms`` each task trains its own instead.
    """

    own_norms = False

    @property
    def adapter_layers(self) -> dict[str, nn.Module]:
        """The layers that PEFT put an adapter on, by their name in the backbone."""
        return {name: m for name, m in self.backbone.named_modules() if hasattr(m, "lora_A")}

    @property
    def factors(self) -> list[nn.Parameter]:
        """The weights of the adapter."""
        return [p for name, p in self.backbone.named_parameters() if ".lora_" in name]

    def train(self, mode: bool = True) -> AdaptedNet:
        """Set training mode; frozen norms stay in evaluation mode."""
        super().train(mode)
        if not self.own_norms:
            for module in self.backbone.modules():
                if isinstance(module, _NORMS):
                    module.eval()
        return self

    @torch.no_grad()
    def extract(self, task: str | int, rank: int | None = None) -> nn.Module:
        """A plain network with the adapter merged into its weights: W0 + scaling · B A.

        The sum is made here: the merging of PEFT 0.20 does not take 3D convolutions of one voxel.
        """
        plain = super().extract(task, rank)
        vars(plain).pop("peft_config", None)
        for name in self.adapter_layers:
            layer = plain.get_submodule(name)
            base, (key,) = layer.get_base_layer(), layer.active_adapters
            b, a = layer.lora_B[key].weight, layer.lora_A[key].weight
            change = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape_as(base.weight)
            base.weight.add_(change * layer.scaling[key])
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, base)
        return plain


def adapt(plain: nn.Module, name: str, num_classes: int, settings: StudySettings, seed: int) -> AdaptedNet:
    """Freeze a network and put a PEFT adapter on it, whose task head goes on learning.

    The adapter is on the layers that experts of a decomposition are on, as far as PEFT adapts them: linear layers, and
    convolutions that are not grouped, dilated or padded with other than zeros (PEFT's adapter of a convolution takes
    over neither dilation nor padding mode, and can't be merged with groups). The others stay frozen, as do transposed
    convolutions.

    Args:
        plain: the trained student of this task; copied.
        name: of the task.
        num_classes: its output channels.
        settings: ``rank``, ``alpha`` (as PEFT's ``r`` and ``lora_alpha``: the adapter is scaled by alpha / rank);
            ``norm``: ``"task"`` lets each task train the norms.
        seed: of the adapter's first weights.

    Raises:
        LoRKDError: PEFT is not installed, no layer can be adapted, or the rank is not one number.
    """
    peft = check_peft()
    if not isinstance(settings.rank, int):
        raise LoRKDError(f"rank: PEFT's adapters have one rank for all tasks, got {settings.rank!r}")
    network = AdaptedNet(plain, {name: num_classes}, rank=0)
    network.own_norms = settings.norm == "task"
    candidates = LoRKDNet(plain, {name: num_classes}, rank=1).expert_layers
    modules = dict(network.backbone.named_modules())
    targets = [layer for layer in candidates if _fits(modules[layer])]
    if not targets:
        raise LoRKDError("backbone: it has no convolution or linear layer that PEFT puts an adapter on")
    # A pattern, because PEFT takes a name of a list for the end of a name as well.
    pattern = "|".join(re.escape(target) for target in targets)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=pattern)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, network.backbone)
    own = {id(tensor) for tensor in network.expert_tensors(0).values()}
    if network.own_norms:
        own |= {id(p) for m in network.modules() if isinstance(m, _NORMS) for p in m.parameters()}
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in key or id(parameter) in own)
    return network


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    plain_kind = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain_kind and layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def share_frozen(networks: Sequence[AdaptedNet]) -> None:
    """Let the frozen weights of all networks be the same tensors, so that they are kept and counted once."""
    first = dict(networks[0].named_parameters())
    for network in networks[1:]:
        for name, parameter in list(network.named_parameters()):
            kept: Tensor = first.get(name, parameter)
            if not parameter.requires_grad and torch.equal(kept, parameter):
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, kept)


def adapter_facts(network: AdaptedNet) -> dict[str, Any]:
    """What an adapter consists of: its layers, the layers of experts that have none, the number of its weights."""
    experts = LoRKDNet(network.extract(0), network.num_classes, rank=1).expert_layers
    return {
        "layers": list(network.adapter_layers),
        "layers_without": [name for name in experts if name not in network.adapter_layers],
        "parameters": sum(p.numel() for p in network.factors),
    }
