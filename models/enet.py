"""ENet: Paszke, Chaurasia, Kim, Culurciello, "ENet: A Deep Neural Network Architecture for Real-Time Semantic
Segmentation", 2016 (https://arxiv.org/abs/1606.02147).

Table 1 of the paper is :data:`ARCHITECTURE`; figure 2 is :class:`InitialBlock` and :class:`Bottleneck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel
from models.blocks import init_weights
from models.pooling import pool_with_indices, unpool

#: Bottlenecks x.1 to x.8 of stages 2 and 3: the dilation of a 3x3 convolution, or "asymmetric" (1x5, then 5x1).
CONTEXT: tuple[int | str, ...] = (1, 2, "asymmetric", 4, 1, 8, "asymmetric", 16)

#: Name of each bottleneck, its kind ("down", "up", or as in CONTEXT), output channels.
ARCHITECTURE: tuple[tuple[str, int | str, int], ...] = (
    ("bottleneck10", "down", 64),
    *((f"bottleneck1{i}", 1, 64) for i in range(1, 5)),
    ("bottleneck20", "down", 128),
    *((f"bottleneck{stage}{i}", kind, 128) for stage in (2, 3) for i, kind in enumerate(CONTEXT, start=1)),
    *(("bottleneck40", "up", 64), ("bottleneck41", 1, 64), ("bottleneck42", 1, 64)),
    *(("bottleneck50", "up", 16), ("bottleneck51", 1, 16)),
)

INITIAL_CHANNELS = 16

#: Where a map was pooled: the positions of the maxima and the map's size.
Pooled = tuple[Tensor, tuple[int, int]]


class InitialBlock(nn.Module):
    """Figure 2a: a strided convolution and the pooled image, (B, in, H, W) -> (B, 16, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        self.conv = nn.Conv2d(in_channels, INITIAL_CHANNELS - in_channels, kernel_size=3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(INITIAL_CHANNELS)
        self.prelu = nn.PReLU(INITIAL_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Return 16 channels at half the resolution."""
        return self.prelu(self.bn(torch.cat([self.pool(x), self.conv(x)], dim=1)))


class Bottleneck(nn.Module):
    """Figure 2b: 1x1 projection, main convolution, 1x1 expansion, dropout; added to a shortcut.

    Args:
        in_channels, out_channels: channels; the projection has a quarter of ``in_channels``.
        kind: as in :data:`ARCHITECTURE`.
        dropout: probability of dropping a channel of the expansion.
        published: a single PReLU slope for all feature maps, and a nonlinearity also after the expansion.
        relu: ReLU instead of PReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kind: int | str = 1,
        dropout: float = 0.1,
        published: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        width, halving = in_channels // 4, 2 if kind == "down" else 1
        activation = partial(_activation, published=published, relu=relu)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=halving, stride=halving, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu1 = activation(width)
        self.conv2: nn.Module
        if kind == "asymmetric":
            self.conv2 = _asymmetric(width, activation)
        elif kind == "up":
            self.conv2 = _doubling(width, width)
        else:
            dilation = kind if isinstance(kind, int) else 1
            self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu2 = activation(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.prelu3 = activation(out_channels) if published else nn.Identity()
        self.regularizer = nn.Dropout2d(dropout)
        self.shortcut: nn.Module = nn.Identity()  # what changes the channels before the sum (or the unpooling)
        if kind == "down":  # append channels of zeros; the last three axes: C, h, w
            self.shortcut = nn.ZeroPad3d((0, 0, 0, 0, 0, out_channels - in_channels))
        elif kind == "up":
            conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.prelu_out = activation(out_channels)

    def project(self, x: Tensor) -> Tensor:
        """Return (B, in_channels / 4, h, w)."""
        return self.prelu1(self.bn1(self.conv1(x)))

    def expand(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, h, w) from the output of the main convolution."""
        x = self.prelu2(self.bn2(x))
        return self.regularizer(self.prelu3(self.bn3(self.conv3(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        return self.prelu_out(self.shortcut(x) + self.expand(self.conv2(self.project(x))))


class DownBottleneck(Bottleneck):
    """A bottleneck that halves the map, rounding up: the projection is 2x2 with stride 2; the shortcut pools.

    An odd map gets a row or column of zeros at its end before the projection.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Pooled]:  # type: ignore[override]  # blocks are called by kind
        """Map (B, in, h, w) to (B, out, ceil(h / 2), ceil(w / 2)); also return where the maxima were."""
        height, width = x.shape[-2:]
        pooled, indices = pool_with_indices(x, ceil_mode=True)
        y = self.expand(self.conv2(self.project(F.pad(x, (0, width % 2, 0, height % 2)))))
        return self.prelu_out(self.shortcut(pooled) + y), (indices, (height, width))


class UpBottleneck(Bottleneck):
    """A bottleneck that undoes a :class:`DownBottleneck`: transposed convolution; the shortcut unpools."""

    def forward(self, x: Tensor, pooled: Pooled) -> Tensor:  # type: ignore[override]  # blocks are called by kind
        """Map (B, in, h, w) to (B, out, H, W), the size of the map that was pooled."""
        indices, size = pooled
        shortcut = unpool(self.shortcut(x), indices, size)
        y = self.expand(_cropped(self.conv2(self.project(x)), size))
        return self.prelu_out(shortcut + y)


BLOCKS: dict[int | str, type[Bottleneck]] = {"down": DownBottleneck, "up": UpBottleneck}


class ENet(BaseModel):
    """ENet; output stride 8 (encoder); any input size; logits (B, num_classes, H, W).

    Every halving rounds up, and every doubling restores the recorded size, so images may have any size; for
    multiples of 8 this is the paper's network. In training a batch of one needs more than 8 x 8 pixels.

    Args:
        in_channels: channels of the images, 1 to 15 (the initial block contains the pooled image in 16 channels).
        published: as in the predecessors' code, PReLU has a single slope per layer instead of one per feature map, the
            decoder has ReLU instead of PReLU, and the expansion is followed by one more PReLU (ReLU) before the sum.

    Deviations from the paper, in both forms: the projection has a quarter of the *input's* channels also where
    a bottleneck changes their number, and the last transposed convolution is 3x3 (the paper leaves both open;
    its authors' code has a quarter of the output's channels and 2x2). The paper trains the encoder first, by
    itself; here the whole network is trained at once.
    """

    output_stride = 8
    published_mark = "bottleneck10.conv1.weight"
    published_classifier = ("fullconv.weight", 1)
    published_names = (
        (r"(bottleneck[45]0)\.spatil_conv\.", r"\1.shortcut.0."),
        (r"(bottleneck[45]0)\.bn_up\.", r"\1.shortcut.1."),
    )

    def __init__(
        self, num_classes: int, in_channels: int = 3, published: bool = False, freeze_bn: bool = False
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        if in_channels >= INITIAL_CHANNELS:
            raise ValueError(f"in_channels must be less than {INITIAL_CHANNELS} for ENet, got {in_channels}")
        self.initial = InitialBlock(in_channels)
        channels, decoder = INITIAL_CHANNELS, False
        for name, kind, out_channels in ARCHITECTURE:
            decoder = decoder or kind == "up"
            dropout = 0.01 if name < "bottleneck20" else 0.1
            block = BLOCKS.get(kind, Bottleneck)
            self.add_module(name, block(channels, out_channels, kind, dropout, published, relu=published and decoder))
            channels = out_channels
        self.fullconv = _doubling(channels, num_classes)
        init_weights(self)
        self.freeze(freeze_bn)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        size = x.shape[-2:]
        x = self.initial(x)
        pools: list[Pooled] = []
        for name, kind, _ in ARCHITECTURE:
            block = self.get_submodule(name)
            if kind == "down":
                x, pooled = block(x)
                pools.append(pooled)
            elif kind == "up":
                x = block(x, pools.pop())
            else:
                x = block(x)
        return _cropped(self.fullconv(x), size)


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Return a convolution from (B, in, h, w) to (B, out, 2 h, 2 w); the network crops where the map was odd.

    Cropping gives what ``output_size`` would, but ONNX has no padding that depends on the image's size.
    """
    return nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False
    )


def _cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    return x[..., : size[0], : size[1]]


def _activation(channels: int, published: bool, relu: bool) -> nn.Module:
    return nn.ReLU() if relu else nn.PReLU(1 if published else channels)


def _asymmetric(width: int, activation: partial[nn.Module]) -> nn.Sequential:
    """Return a 5x5 convolution factorised into 1x5 and 5x1."""
    return nn.Sequential(
        nn.Conv2d(width, width, kernel_size=(1, 5), padding=(0, 2)),
        nn.BatchNorm2d(width),
        activation(width),
        nn.Conv2d(width, width, kernel_size=(5, 1), padding=(2, 0)),
    )
