"""LoRKD for MONAI: decompose one foundation model into small, plain expert networks, one per task.

Importing this module is light: it loads neither torch nor MONAI. The parts live in
``lorkd_monai.networks``, ``.losses``, ``.data``, ``.transforms``, ``.teachers``, ``.engines``, ``.handlers``,
``.bundle`` and others: docs/architecture.md has the map.
"""

__version__ = "0.1.0"
