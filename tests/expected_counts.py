"""How many regions well-known networks hold, derived by hand from the architectures' papers or source.

`identity` counts residual branches: joins of a value with a function of itself. `layers` counts composites,
where the joins of one forward follow each other directly. `projection` counts joins with a shortcut of
linear operators, `sequential` chains of equal shape; None stands where it was not derived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EXPECTED", "Expected"]


@dataclass(frozen=True, slots=True)
class Expected:
    """One network's row.

    Attributes:
        name: `torchvision:NAME` or `timm:NAME`.
        size: Shape of one sample of the smallest convenient input.
        identity: Residual branches joined by an identity path.
        layers: Composites of such branches.
        projection: Branches beside a projection shortcut.
        sequential: Chains of equal shape.
        fast: Whether the row belongs to the suite that always runs.
        options: Keyword arguments of the builder.
    """

    name: str
    size: tuple[int, ...]
    identity: int
    layers: int | None = 0
    projection: int | None = None
    sequential: int | None = None
    fast: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _vision(name: str, size: int, identity: int, **rest: Any) -> Expected:
    return Expected(f"torchvision:{name}", (3, size, size), identity, **rest)


def _video(name: str, frames: int, size: int, identity: int, **rest: Any) -> Expected:
    return Expected(f"torchvision:{name}", (3, frames, size, size), identity, **rest)


def _timm(name: str, size: int, identity: int, **rest: Any) -> Expected:
    return Expected(f"timm:{name}", (3, size, size), identity, **rest)


EXPECTED: tuple[Expected, ...] = (
    # ResNet, table 1 of the paper: the first block of a stage has a projection when width or size changes.
    # Basic blocks keep 64 channels into layer1, so only layer2 to layer4 project: 2+2+2+2 - 3.
    _vision("resnet18", 64, 5, projection=3, fast=True),
    # 3+4+6+3 - 3.
    _vision("resnet34", 64, 13, projection=3, fast=True),
    # Bottlenecks leave layer1 with 256 channels, so every stage projects once: 3+4+6+3 - 4.
    _vision("resnet50", 64, 12, projection=4, fast=True),
    # 3+4+23+3 - 4.
    _vision("resnet101", 64, 29, projection=4),
    # 3+8+36+3 - 4.
    _vision("resnet152", 64, 46, projection=4),
    # ResNet-50 with 32 groups, and with twice the inner width: the shortcuts are the same.
    _vision("resnext50_32x4d", 64, 12, projection=4),
    _vision("wide_resnet50_2", 64, 12, projection=4),
    # MobileNetV2, table 2: n - 1 of each stage's n blocks; (n) = 1,2,3,4,3,3,1, and every stage changes
    # width: 17 - 7. Its stride-1 first stage 32 -> 16 has no shortcut either, and no block has a projection.
    _vision("mobilenet_v2", 64, 10, projection=0, fast=True),
    # MobileNetV3, table 1: stride 1 and equal width at 16-16, 24-24, 2 of 40, 3 of 80, 112-112, 2 of 160.
    _vision("mobilenet_v3_large", 64, 10, projection=0, fast=True),
    # Table 2: 24-24, 2 of 40, 48-48, 2 of 96.
    _vision("mobilenet_v3_small", 64, 6, projection=0, fast=True),
    # MNASNet-B1: stages of 3,3,3,2,4,1 blocks behind a separable convolution, first block of each changes
    # width.
    _vision("mnasnet1_0", 64, 10, projection=0, fast=True),
    # At width 0.5 the rounded widths 16,8,16,24,40,48,96,160 still differ from stage to stage.
    _vision("mnasnet0_5", 64, 10, projection=0),
    # EfficientNet-B0, table 1: repeats 1,2,2,3,3,4,1, each stage's first block changes width: 16 - 7.
    _vision("efficientnet_b0", 64, 9, projection=0, fast=True),
    # B1 multiplies the repeats by 1.1, rounded up: 2,3,3,4,4,5,2; minus 7.
    _vision("efficientnet_b1", 64, 16, projection=0),
    # V2-S, table 4: 2 (24 -> 24 keeps the stem's width, so both) + 3 + 3 + 5 + 8 + 14.
    _vision("efficientnet_v2_s", 64, 35, projection=0),
    # ConvNeXt-T: 3+3+9+3 blocks, downsampling stands between the stages, outside the blocks.
    _vision("convnext_tiny", 64, 18, projection=0, fast=True),
    # ViT-B: 12 layers of two branches; both joins stand in EncoderBlock.forward.
    _vision("vit_b_16", 32, 24, layers=12, projection=0, options={"image_size": 32}, fast=True),
    # Swin-T: 2+2+6+2 layers of two branches; patch merging is a concatenation of strided slices.
    _vision("swin_t", 64, 24, layers=12, projection=0),
    # Swin v2 normalises behind the branch; the joins are the same.
    _vision("swin_v2_t", 64, 24, layers=12, projection=0),
    # RegNetY-400MF: the linear rule gives depths 1,3,6,6; each stage's first block projects.
    _vision("regnet_y_400mf", 64, 12, projection=4, fast=True),
    # 1,2,7,12.
    _vision("regnet_x_400mf", 64, 18, projection=4),
    # 1,3,8,2.
    _vision("regnet_y_800mf", 64, 10, projection=4),
    # DenseNet joins by concatenation only.
    _vision("densenet121", 64, 0, projection=0, fast=True),
    # VGG-16 (D): second of 64 and of 128, two of 256, two + three of 512, and the 4096 x 4096 layer.
    _vision("vgg16", 32, 0, projection=0, sequential=10, fast=True),
    # VGG-11 (A): second of 256, second of 512, both of the last stage, and the 4096 x 4096 layer.
    _vision("vgg11", 32, 0, projection=0, sequential=5),
    # VGG-19 (E): 1 + 1 + 3 + 3 + 4, and the 4096 x 4096 layer.
    _vision("vgg19_bn", 32, 0, projection=0, sequential=13),
    # AlexNet: conv5 is 256 -> 256, fc7 is 4096 x 4096.
    _vision("alexnet", 64, 0, projection=0, sequential=2, fast=True),
    # Fire modules concatenate; torchvision builds the variant without bypass.
    _vision("squeezenet1_1", 64, 0, projection=0, fast=True),
    # Inception modules concatenate.
    _vision(
        "googlenet", 64, 0, projection=0, options={"aux_logits": False, "init_weights": False}, fast=True
    ),
    _vision("inception_v3", 96, 0, projection=0, options={"aux_logits": False, "init_weights": False}),
    # ShuffleNet V2 concatenates the carried half with the branch.
    _vision("shufflenet_v2_x0_5", 64, 0, projection=0, fast=True),
    # MaxViT-T: 2+2+5+2 layers, each an MBConv and two attention layers of two branches: 11 x 4, and the
    # MBConvs but the 4 of stride 2, which project (average pool, convolution). A layer's joins stand in
    # PartitionAttentionLayer.
    _vision("maxvit_t", 224, 51, layers=22, projection=4),
    # FCN and DeepLab keep the backbone's blocks; dilation replaces strides, the projections stay for their
    # width.
    _vision("fcn_resnet50", 64, 12, projection=4, options={"weights_backbone": None}),
    _vision("deeplabv3_resnet50", 64, 12, projection=4, options={"weights_backbone": None}),
    # MobileNetV3-large's 10. The head adds low_classifier(low), one convolution, to all that follows low: a
    # projection.
    _vision("lraspp_mobilenet_v3_large", 64, 10, projection=1, options={"weights_backbone": None}),
    # The video ResNets have ResNet-18's blocks; R(2+1)D and MC3 change the convolutions inside.
    _video("r3d_18", 4, 32, 5, projection=3),
    _video("mc3_18", 4, 32, 5, projection=3),
    _video("r2plus1d_18", 4, 32, 5, projection=3),
    # Video Swin-T: 2+2+6+2 layers of two branches.
    _video("swin3d_t", 4, 64, 24, layers=12, projection=0),
    # ResNet-26: 2+2+2+2 bottlenecks - 4.
    _timm("resnet26", 64, 4, projection=4, fast=True),
    # One basic block a stage behind a 64-channel stem: only layer1 keeps its width.
    _timm("resnet10t", 64, 1, projection=3, fast=True),
    # ResNet-D projects by average pooling and a convolution, ResNet-18's counts otherwise.
    _timm("resnet18d", 64, 5, projection=3),
    # Pre-activation ResNet-50: the projection reads the normed input, which is then the entry: 16 - 4.
    _timm("resnetv2_50", 64, 12, projection=4),
    # NF-ResNet-50 scales the activated input before a projection; elsewhere the shortcut is the block's
    # input.
    _timm("nf_resnet50", 64, 12),
    # RegNetX/Y-200MF: depths 1,1,4,7, one projection a stage.
    _timm("regnetx_002", 64, 9, projection=4),
    _timm("regnety_002", 64, 9, projection=4),
    # The same definitions as torchvision's.
    _timm("mobilenetv2_100", 64, 10, projection=0, fast=True),
    _timm("efficientnet_b0", 64, 9, projection=0),
    _timm("mnasnet_100", 64, 10, projection=0),
    # PP-LCNet has depthwise-separable blocks without any shortcut.
    _timm("lcnet_050", 64, 0, projection=0),
    # GhostNet's table: 16-16, 24-24, 40-40, 3 of 80, 112-112, 4 of 160; the shortcuts of the 4 strided blocks
    # and of 80 -> 112 are a depthwise and a pointwise convolution.
    _timm("ghostnet_100", 64, 11, projection=5),
    # ReXNet adds the shortcut to some channels and concatenates the others, which leave the branch.
    _timm("rexnet_100", 64, 0),
    # Xception: 8 middle-flow blocks; 3 entry-flow and 1 exit-flow block project.
    _timm("legacy_xception", 96, 8, projection=4),
    # Inception-ResNet-v2: 10 + 20 + 9 + 1 blocks that add a scaled branch.
    _timm("inception_resnet_v2", 96, 40),
    # ConvNeXt-Atto: 2+2+6+2.
    _timm("convnext_atto", 64, 12, projection=0),
    # InceptionNeXt-Atto: 2+2+6+2 (token mixer, norm and MLP in one branch).
    _timm("inception_next_atto", 64, 12),
    # MambaOut-Femto: 3+3+9+3 gated blocks of one branch.
    _timm("mambaout_femto", 64, 18),
    # StarNet-S1: 2+2+8+3; the star is a product of two branches, not a gate of the entry.
    _timm("starnet_s1", 64, 15),
    # ConvMixer-768/32: a residual depthwise convolution in each of 32 blocks, the pointwise one has no
    # shortcut.
    _timm("convmixer_768_32", 56, 32, projection=0),
    # MLP-Mixer S/32 has 8 layers, B/16 12, each with a token and a channel branch.
    _timm("mixer_s32_224", 224, 16, layers=8, projection=0),
    _timm("mixer_b16_224", 224, 24, layers=12, projection=0),
    # ResMLP-S12: 12 layers of two branches with layer scale.
    _timm("resmlp_12_224", 224, 24, layers=12, projection=0),
    # gMLP: 30 blocks of one branch.
    _timm("gmlp_ti16_224", 224, 30, projection=0),
    # DeiT-Ti and DeiT-III-S: ViTs of 12 layers, the latter with layer scale.
    _timm("deit_tiny_patch16_224", 224, 24, layers=12, projection=0),
    _timm("deit3_small_patch16_224", 224, 24, layers=12, projection=0),
    # BEiT-B: 12 layers with layer scale and relative positions.
    _timm("beit_base_patch16_224", 224, 24, layers=12, projection=0),
    # CaiT-XXS-24: 24 layers of two branches. Two class-attention layers: the class token is a parameter at
    # first, so the first attention join is none; the second joins a token with a function of all tokens; both
    # MLPs are residual.
    _timm("cait_xxs24_224", 224, 50, layers=24, projection=0),
    # XCiT-N12: 12 layers of three branches, and two class-attention layers of two, with a norm between those
    # two.
    _timm("xcit_nano_12_p16_224", 224, 40, layers=12, projection=0),
    # PVTv2-B0: 2+2+2+2 layers of two branches.
    _timm("pvt_v2_b0", 64, 16, layers=8, projection=0),
    # PiT-Ti: 2+6+4 ViT layers.
    _timm("pit_ti_224", 224, 24, layers=12, projection=0),
    # NesT-T: 2+2+8 layers of two branches.
    _timm("nest_tiny", 224, 24, layers=12, projection=0),
    # Twins-SVT-S: 2+2+10+4 layers of two branches, and a residual depthwise position encoding in each of 4
    # stages.
    _timm("twins_svt_small", 224, 40, layers=18, projection=0),
    # Visformer-Ti: 7 convolutional blocks of one branch, 4+4 layers of two.
    _timm("visformer_tiny", 224, 23, layers=8, projection=0),
    # FocalNet-T: 2+2+6+2 layers of two branches; the modulation's sums start from zero and join no identity.
    _timm("focalnet_tiny_srf", 64, 24, layers=12, projection=None),
    # Swin-T again; timm reshapes between the two joins, so no layer follows from them directly.
    _timm("swin_tiny_patch4_window7_224", 224, 24, layers=None, projection=0),
)
