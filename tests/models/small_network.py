"""A small network that is not in the project's table, as a user's factory would build it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SmallNetwork(nn.Module):
    """An encoder of stride 8 with a dropout, and a classifier; returns what ``form`` asks for."""

    def __init__(self, classes: int, channels: int = 3, form: str = "tensor", width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            inputs = channels if i == 0 else width
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Conv2d(2 * width, classes, 1)
        self.form = form

    def forward(self, x: Tensor) -> object:
        y = self.head(self.dropout(self.encoder(x)))
        if self.form == "mapping":
            return {"out": y, "aux": y / 2} if self.training else {"out": y}
        if self.form == "object":
            return Output(y)
        large = F.interpolate(y, size=x.shape[-2:])
        forms = {
            "tensor": y,
            "probabilities": large.softmax(dim=1),
            "sigmoid": large.sigmoid(),
            "aux probabilities": {"out": large.softmax(dim=1), "aux": (large / 2).softmax(dim=1)},
            "aux of two classes": {"out": y, "aux": y[:, :2]},
            "mean over the batch": y.mean(dim=0, keepdim=True),
            "several": (y, y),
        }
        return forms.get(self.form, {"answer": y})


class FixedSize(SmallNetwork):
    """Takes images of 40 x 40 only."""

    def forward(self, x: Tensor) -> object:
        assert x.shape[-2:] == (40, 40)
        return super().forward(x)


class Tied(nn.Module):
    """A decoder that shares a parameter with the encoder, and comes before it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(8, 8, 3, padding=1)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.encoder[1].weight = self.decoder.weight
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def build(**args: object) -> nn.Module:
    return SmallNetwork(**args)


def fail(**_: object) -> nn.Module:
    raise RuntimeError("out of luck")


not_a_module = dict
