"""Decomposed networks: low-rank layers, routing, heads and :class:`LoRKDNet`."""

from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.low_rank import LowRankLayer
from lorkd_monai.networks.routing.table import Routing, current_routing, route
from lorkd_monai.networks.task_channels import TaskChannels

__all__ = ["LoRKDNet", "LowRankLayer", "Routing", "TaskChannels", "current_routing", "route"]
