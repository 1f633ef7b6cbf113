"""The networks by the names that configs use (``arch.type``); importing this imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.registry import Registry

if TYPE_CHECKING:
    from base.base_model import BaseModel

MODELS = Registry(
    "model",
    {
        "FCN8": "models.fcn.FCN8",
        "UNet": "models.unet.UNet",
        "UNetResnet": "models.unet_resnet.UNetResnet",
        "SegNet": "models.segnet.SegNet",
        "SegResNet": "models.segresnet.SegResNet",
        "ENet": "models.enet.ENet",
        "GCN": "models.gcn.GCN",
        "DeepLab": "models.deeplab.DeepLab",
        "DeepLab_DUC_HDC": "models.deeplab_duc_hdc.DeepLab_DUC_HDC",
        "UperNet": "models.upernet.UperNet",
        "PSPNet": "models.pspnet.PSPNet",
        "PSPDenseNet": "models.pspnet.PSPDenseNet",
        "External": "models.external.External",
    },
    provided=("num_classes", "activation"),
)


def build(type: str, num_classes: int, **args: Any) -> BaseModel:
    """Build the network ``type`` for ``num_classes`` classes from its constructor's arguments.

    Raises:
        UserError: no such network, no such argument, or a value that the network does not take.
    """
    name = MODELS.canonical(type)
    try:
        MODELS.check(name, args)
        return MODELS[name](num_classes=num_classes, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"arch {name}: {error}") from error
    except UserError as error:
        text = str(error)
        raise UserError(f"arch.args.{text}" if text.startswith("pretrained") else text) from error
