"""The network that many tests train or decompose: MONAI's ResNet with few channels, some 3 000 parameters."""

SMALL_RESNET = {
    "_target_": "ResNet", "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8],
    "spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 3,
}  # fmt: skip
