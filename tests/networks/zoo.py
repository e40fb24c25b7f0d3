"""MONAI's networks in tiny sizes, 2D and 3D, as configs: the table that the tests of decompositions share."""

from __future__ import annotations

from dataclasses import dataclass

from monai.bundle import ConfigParser
from torch import nn

CLASSES = 4  # of every backbone


@dataclass(frozen=True)
class Entry:
    """One network: its config, and the image it takes."""

    name: str
    dims: int
    config: dict
    size: int
    channels: int = 2
    heavy: bool = False  # too large for float64 and for gradients

    def build(self) -> nn.Module:
        return ConfigParser(dict(self.config)).get_parsed_content()

    def __str__(self) -> str:
        return f"{self.name}-{self.dims}d"


def _entry(name, dims, target, size, image_channels=2, heavy=False, **arguments):
    return Entry(name, dims, {"_target_": target, **arguments}, size, image_channels, heavy)


def _entries(n):
    unet = {"spatial_dims": n, "in_channels": 2, "out_channels": CLASSES}
    strides = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 6, 8]}
    anisotropic = {
        "kernel_size": [[1, 3, 3][-n:], [3] * n, [3] * n],
        "strides": [[1] * n, [1, 2, 2][-n:], [2] * n],
        "upsample_kernel_size": [[1, 2, 2][-n:], [2] * n],
        "filters": [4, 6, 8],
    }
    vit = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
    highres = [
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": [3, 3], "repeat": 1},
        {"name": "res_2", "n_features": 6, "kernels": [3, 3], "repeat": 1},
        {"name": "res_3", "n_features": 8, "kernels": [3, 3], "repeat": 1},
        {"name": "conv_1", "n_features": 6, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return [
        _entry("ResNet", n, "monai.networks.nets.resnet10", 16, spatial_dims=n, n_input_channels=2,
               num_classes=CLASSES, widen_factor=0.0625),
        _entry("DenseNet", n, "DenseNet", 16, spatial_dims=n, in_channels=2, out_channels=CLASSES,
               init_features=4, growth_rate=2, block_config=[2, 2], bn_size=2),
        _entry("SENet", n, "SENet", 16, spatial_dims=n, in_channels=2, block="se_resnetxt_bottleneck",
               layers=[1, 1, 1, 1], groups=32, reduction=16, inplanes=8, downsample_kernel_size=1,
               num_classes=CLASSES, dropout_prob=None),
        _entry("EfficientNet", n, "EfficientNet", 16, spatial_dims=n, in_channels=2, num_classes=CLASSES,
               blocks_args_str=["r1_k3_s11_e1_i32_o16_se0.25", "r2_k5_s22_e6_i16_o24_se0.25"],
               width_coefficient=0.25, depth_coefficient=1.0),
        _entry("ViT", n, "ViT", 16, in_channels=2, img_size=[16] * n, patch_size=[8] * n, num_layers=2,
               classification=True, num_classes=CLASSES, spatial_dims=n, **vit),
        _entry("UNet", n, "UNet", 16, **unet, channels=[4, 6, 8], strides=[2, 2]),
        _entry("UNet-residual", n, "UNet", 16, **unet, channels=[4, 6, 8], strides=[2, 2], num_res_units=2),
        _entry("BasicUNet", n, "BasicUNet", 32 if n == 2 else 16, **unet, norm="instance" if n == 2 else "batch",
               features=[2, 2, 4, 4, 4, 2]),
        _entry("BasicUNet++", n, "BasicUNetPlusPlus", 32 if n == 2 else 16, **unet,
               norm="instance" if n == 2 else "batch", features=[2, 2, 4, 4, 4, 2]),
        _entry("DynUNet", n, "DynUNet", 16, **unet, **strides),
        _entry("DynUNet-deep", n, "DynUNet", 16, **unet, **strides, deep_supervision=True, deep_supr_num=1),
        _entry("DynUNet-anisotropic", n, "DynUNet", 16, **unet, **anisotropic, res_block=True),
        _entry("SegResNet", n, "SegResNet", 16, **unet, init_filters=8),
        _entry("SegResNetDS", n, "SegResNetDS", 16, **unet, init_filters=4, blocks_down=[1, 1, 1], dsdepth=2),
        _entry("AttentionUnet", n, "AttentionUnet", 16, **unet, channels=[4, 6, 8], strides=[2, 2]),
        _entry("UNETR", n, "UNETR", 16, in_channels=2, out_channels=CLASSES, img_size=[16] * n, feature_size=4,
               spatial_dims=n, **vit),
        _entry("SwinUNETR", n, "SwinUNETR", 64 if n == 2 else 32, heavy=n == 3, in_channels=2,
               out_channels=CLASSES, feature_size=12, spatial_dims=n, norm_name="batch",
               depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4),
        _entry("MedNeXt", n, "MedNeXt", 32, heavy=n == 3, **unet, init_filters=4, kernel_size=3,
               blocks_down=[1, 1, 1, 1], blocks_bottleneck=1, blocks_up=[1, 1, 1, 1]),
        _entry("MedNeXt-deep", n, "MedNeXt", 32, **unet, init_filters=4, kernel_size=3, blocks_down=[1, 1, 1, 1],
               blocks_bottleneck=1, blocks_up=[1, 1, 1, 1],
               deep_supervision=True, use_residual_connection=True),
        _entry("FlexibleUNet", n, "FlexibleUNet", 32, heavy=n == 3, in_channels=2, out_channels=CLASSES,
               spatial_dims=n, backbone="resnet10" if n == 2 else "efficientnet-b0", pretrained=False,
               decoder_channels=[8, 8, 4, 4, 4]),
        _entry("HighResNet", n, "HighResNet", 12, **unet, layer_params=highres),
        _entry("VNet", n, "VNet", 16, 1, heavy=n == 3, spatial_dims=n, in_channels=1, out_channels=CLASSES,
               dropout_prob=None, dropout_prob_down=None, dropout_prob_up=[None, 0.0]),
    ]  # fmt: skip


ZOO = [*_entries(2), *_entries(3)]
