"""Global convolutional network: Peng, Zhang, Yu, Luo, Sun, "Large Kernel Matters: Improve Semantic
Segmentation by Global Convolutional Network", CVPR 2017 (https://arxiv.org/abs/1703.02719).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel, resize_to
from models.backbones import Needs, ResNet, encoder
from models.blocks import init_weights
from models.upstream import names
from utils.bounds import Width

#: Levels of a ResNet, for the recorded names.
LEVELS = 4
#: Kernel size and width of the global convolutions in the last two stages of ResNet-GCN.
RESNET_GCN = {"layer3": (5, 85), "layer4": (7, 128)}


class GlobalConv(nn.Module):
    """Figure 2 B of the paper: a k x k receptive field as (k x 1, 1 x k) + (1 x k, k x 1), without non-linearity."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()

        def path(*kernels: tuple[int, int]) -> nn.Sequential:
            first = nn.Conv2d(in_channels, out_channels, kernels[0], padding="same")
            return nn.Sequential(first, nn.Conv2d(out_channels, out_channels, kernels[1], padding="same"))

        tall, wide = (kernel_size, 1), (1, kernel_size)
        self.tall_wide, self.wide_tall = path(tall, wide), path(wide, tall)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w)."""
        return self.tall_wide(x) + self.wide_tall(x)


class BoundaryRefinement(nn.Module):
    """Figure 2 C of the paper: x + conv(ReLU(conv(x))).

    ``published=True`` adds the two BatchNorms that the published code creates and never uses, so that the
    parameters are those of its checkpoints; they are not trainable.
    """

    def __init__(self, channels: int, published: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        if published:
            self.bn1 = nn.BatchNorm2d(channels).requires_grad_(False)
            self.bn2 = nn.BatchNorm2d(channels).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Refine scores (B, C, h, w)."""
        return x + self.conv2(F.relu(self.conv1(x)))


class GlobalBottleneck(nn.Module):
    """Figure 5 B of the paper: a residual block of a global convolution, ReLU(shortcut(x) + conv1x1(GlobalConv(x))).

    BatchNorm follows both convolutions, as in a ResNet's bottleneck. The 1x1 convolution has the stride.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            GlobalConv(in_channels, width, kernel_size), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.expand = _conv1x1(width, out_channels, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, ceil(h / stride), ceil(w / stride))."""
        return F.relu(self.shortcut(x) + self.expand(self.convolve(x)))


def _conv1x1(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def make_global(resnet: ResNet) -> None:
    """Replace the blocks of the last two stages of ``resnet`` by :class:`GlobalBottleneck`, with random weights."""
    for i, (name, (kernel_size, width)) in enumerate(RESNET_GCN.items(), start=2):
        in_channels, out_channels = resnet.channels[i - 1 : i + 1]
        blocks = len(getattr(resnet, name))
        stage = nn.Sequential(
            GlobalBottleneck(in_channels, out_channels, kernel_size, width, stride=2),
            *(GlobalBottleneck(out_channels, out_channels, kernel_size, width, stride=1) for _ in range(blocks - 1)),
        )
        init_weights(stage)
        setattr(resnet, name, stage)
    if resnet.weights_from:
        resnet.weights_from += f" (without {' and '.join(RESNET_GCN)})"


class Upsample(nn.Module):
    """Bring scores to the next resolution: bilinearly, or by a transposed convolution and a crop.

    ``crop_top_left``: the published code crops the transposed convolution's result at the top and left; by default it
    is cropped at the bottom and right, where the backbone rounded up.
    """

    def __init__(self, channels: int, use_deconv: bool, crop_top_left: bool) -> None:
        super().__init__()
        self.deconv = None
        if use_deconv:
            self.deconv = nn.ConvTranspose2d(
                channels, channels, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False
            )
        self.crop_top_left = crop_top_left

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, C, h, w) to (B, C, *size)."""
        if self.deconv is None:
            return resize_to(x, size, align_corners=True)
        x, (height, width) = self.deconv(x), size
        if self.crop_top_left:
            return x[..., x.shape[-2] - height :, x.shape[-1] - width :]
        return x[..., :height, :width]


class GCN(BaseModel):
    """Figure 2 A of the paper; any input size; logits (B, num_classes, H, W)::

        image -> backbone -> c1, c2, c3, c4 (strides 4 to 32)
        each level:  GlobalConv to num_classes -> BoundaryRefinement = scores
        c4's scores -> up, + c3's, refine -> up, + c2's, refine -> up, + c1's, refine
                    -> up to stride 2, refine -> up to the input, refine -> 1x1 conv

    ``published=True`` gives the published code's function: no enlargement to stride 2 before the eighth
    refinement (unless ``use_deconv``), crops at the top and left, and the unused BatchNorms of
    :class:`BoundaryRefinement`.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152, or timm:NAME.
        kernel_size: k of the global convolutions, odd.
        use_deconv: enlarge by transposed convolutions instead of bilinearly.
        use_resnet_gcn: the paper's ResNet-GCN: the blocks of the backbone's last two stages are global convolutions,
            which start from random weights.
    """

    align_corners = True
    published_mark = "gcn1.conv11.weight"
    published_classifier = ("final_conv.weight", 0)
    published_names = (
        *names.RESNET_NAMES,
        *(
            (rf"gcn{i + 1}\.conv{path}{step}\.", f"global_convs.{i}.{name}.{step - 1}.")
            for i in range(LEVELS)
            for path, name in ((1, "tall_wide"), (2, "wide_tall"))
            for step in (1, 2)
        ),
        *((rf"br{i + 1}\.((?:conv|bn)[12])\.", rf"refine_levels.{i}.\1.") for i in range(LEVELS)),
        *((rf"br{i + 5}\.((?:conv|bn)[12])\.", rf"refine_sums.{i}.\1.") for i in range(LEVELS + 1)),
        *((rf"decon{n}\.", f"upsamples.{i}.deconv.") for i, n in enumerate((4, 3, 2, 1, 5))),
        (r"br\d\.bn[12]\.", None),
        (r"final_conv\.", "classifier."),
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "resnet50",
        pretrained: bool | str = False,
        kernel_size: Width = 11,
        use_deconv: bool = False,
        use_resnet_gcn: bool = False,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.use_deconv = use_deconv
        self.backbone = encoder(backbone, in_channels, pretrained, Needs(published=published))
        if use_resnet_gcn:
            if published or not isinstance(self.backbone, ResNet):
                why = "the published code never ran with it" if published else f"{backbone} is not a ResNet of ours"
                raise ValueError(f"use_resnet_gcn: {why}; leave out one of the two")
            make_global(self.backbone)
        self.output_stride = self.backbone.strides[-1]
        strides = self.backbone.strides
        if use_deconv and any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:], strict=False)):
            raise ValueError(
                "use_deconv needs a backbone whose strides double from stage to stage; those of "
                f"{backbone} are {list(strides)}"
            )
        levels = len(strides)
        self.global_convs = nn.ModuleList(
            GlobalConv(channels, num_classes, kernel_size) for channels in self.backbone.channels
        )
        self.refine_levels = nn.ModuleList(BoundaryRefinement(num_classes, published) for _ in range(levels))
        self.refine_sums = nn.ModuleList(BoundaryRefinement(num_classes, published) for _ in range(levels + 1))
        self.upsamples = nn.ModuleList(Upsample(num_classes, use_deconv, published) for _ in range(levels + 1))
        self.classifier = nn.Conv2d(num_classes, num_classes, kernel_size=1)
        # Nothing is normalized between the backbone and the logits: with the gain of a ReLU everywhere they would start
        # near 100, and training would diverge. A refinement starts close to the identity.
        init_weights(self.global_convs, self.upsamples, self.classifier, nonlinearity="linear")
        nn.init.normal_(self.classifier.weight, std=0.01)
        for refine in (*self.refine_levels, *self.refine_sums):
            init_weights(refine)
            nn.init.normal_(refine.conv2.weight, std=0.01)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits at the input's size."""
        features = self.backbone(x)
        parts = zip(self.refine_levels, self.global_convs, features, strict=True)
        *finer, scores = [refine(convolve(feature)) for refine, convolve, feature in parts]

        height, width = x.shape[-2:]
        half = ((height + 1) // 2, (width + 1) // 2)  # not -(-height // 2): ONNX truncates negative quotients
        if self.published and not self.use_deconv:
            half = finer[0].shape[-2:]
        targets = [*(level.shape[-2:] for level in reversed(finer)), half, (height, width)]
        for i, (upsample, refine) in enumerate(zip(self.upsamples, self.refine_sums, strict=True)):
            scores = upsample(scores, targets[i])
            if i < len(finer):
                scores = scores + finer[-1 - i]
            scores = refine(scores)
        return self.classifier(scores)
