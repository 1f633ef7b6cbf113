"""Losses: against closed forms and other libraries, and the properties that all of them share."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.errors import UserError
from utils.losses import LOSSES, build, is_proper
from utils.registry import documented

IGNORE = 255

# Each loss with its defaults and with its options: name, args, numbers of channels.
CASES = [(name, {}, channels) for name in LOSSES for channels in (1, 4)] + [
    ("CrossEntropyLoss2d", {"weight": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1}, 4),
    ("CrossEntropyLoss2d", {"weight": [1.0, 2.0]}, 1),
    ("CrossEntropyLoss2d", {"top_k": 0.4, "weight": [1.0, 2.0, 0.5, 3.0]}, 4),
    ("FocalLoss", {"gamma": 0.5, "weight": [1.0, 2.0, 0.5, 3.0]}, 4),
    ("BCEWithLogitsLoss2d", {"weight": [1.0, 2.0, 0.5, 3.0], "pos_weight": [3.0, 2.0, 1.0, 0.5]}, 4),
    ("BCEWithLogitsLoss2d", {"weight": [1.0, 2.0]}, 1),
    ("BCEWithLogitsFocalLoss2d", {"gamma": 0.5, "alpha": 0.25, "weight": [1.0, 2.0, 0.5, 3.0]}, 4),
    ("DiceLoss", {"per_class": True, "per_image": True, "classes": "present", "smooth": 0.0}, 4),
    ("DiceLoss", {"per_image": True}, 1),
    ("BDiceLoss", {"per_class": True, "weight": [1.0, 2.0, 0.5, 3.0]}, 4),
    ("CE_DiceLoss", {"per_class": True, "weight": [1.0, 2.0, 0.5, 3.0], "dice_weight": 0.5}, 4),
    ("BCEDiceLoss", {"per_image": True, "pos_weight": [2.0]}, 1),
    ("TverskyLoss", {"per_image": True, "smooth": 0.0}, 4),
    ("LovaszSoftmax", {"per_image": True, "classes": "all", "weight": [1.0, 2.0, 0.5, 3.0]}, 4),
    ("LovaszHinge", {"per_image": False}, 1),
]
each_case = pytest.mark.parametrize(("name", "args", "channels"), CASES, ids=lambda v: str(v).replace(" ", ""))


def batch(channels: int, shape=(2, 5, 6), seed=0, scale=2.0, dtype=torch.float32, ignored=0.2):
    """Return random logits and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape[0], channels, *shape[1:], generator=generator, dtype=dtype)
    target = torch.randint(0, max(channels, 2), shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return logits, target


def value_and_gradient(loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


# -- promises --------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_ignored_pixels_change_neither_value_nor_gradient(name, args, channels, garbage):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels)
    ignored = (target == IGNORE).unsqueeze(1)
    value, gradient = value_and_gradient(loss, logits, target)
    value2, gradient2 = value_and_gradient(loss, logits.masked_fill(ignored, garbage), target)
    assert torch.equal(value, value2)
    assert torch.equal(gradient, gradient2)
    assert (gradient.masked_select(ignored) == 0).all()
    assert value > 0
    assert gradient.abs().sum() > 0


@each_case
def test_ignoring_pixels_is_leaving_them_out(name, args, channels):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels, shape=(1, 1, 60), dtype=torch.float64)
    keep = target[0, 0] != IGNORE
    torch.testing.assert_close(loss(logits, target), loss(logits[..., keep], target[..., keep]), rtol=1e-12, atol=0)


@each_case
@pytest.mark.parametrize("fill", [0.0, 1e4, float("nan")])
def test_a_batch_of_ignored_pixels_costs_nothing(name, args, channels, fill):
    loss = build(name, IGNORE, **args)
    value, gradient = value_and_gradient(loss, torch.full((2, channels, 3, 4), fill), torch.full((2, 3, 4), IGNORE))
    assert value == 0
    assert (gradient == 0).all()


@each_case
def test_an_ignored_image_does_not_dilute_the_others(name, args, channels):
    if not args.get("per_image"):
        pytest.skip("only where the mean is over images")
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels, shape=(3, 5, 6))
    target[1] = IGNORE
    torch.testing.assert_close(loss(logits, target), loss(logits[[0, 2]], target[[0, 2]]))


@each_case
def test_inputs_are_not_changed(name, args, channels):
    logits, target = batch(channels)
    before = logits.clone(), target.clone()
    build(name, IGNORE, **args)(logits, target)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_huge_logits_stay_finite(name, args, channels, dtype, autocast):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels)
    logits = (logits.sign() * 1e4).to(dtype)
    for sample in (logits, torch.zeros_like(logits), -logits, logits[:, :1].expand_as(logits)):
        with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
            value, gradient = value_and_gradient(loss, sample, target)
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()


@each_case
def test_gradients_are_right(name, args, channels):
    logits, target = batch(channels, shape=(2, 2, 4), dtype=torch.float64)
    loss = build(name, IGNORE, **args)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@each_case
def test_half_precision_logits_are_computed_in_float32(name, args, channels):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels)
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target)
    assert torch.equal(value, loss(logits.float(), target))


@each_case
def test_better_predictions_cost_less(name, args, channels):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels)
    code = F.one_hot(target.masked_fill(target == IGNORE, 0), max(channels, 2)).movedim(-1, 1)
    code = 2.0 * (code if channels > 1 else code[:, 1:]) - 1
    # Towards the truth, but not to probability 1, which label smoothing punishes.
    costs = [loss(logits + step * code, target).item() for step in (0.0, 0.5, 1.0, 1.5)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] + 1e-3


@each_case
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integer_labels_will_do(name, args, channels, dtype):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels)
    assert torch.equal(loss(logits, target), loss(logits, target.to(dtype)))


@each_case
def test_labels_out_of_range_are_an_error(name, args, channels):
    logits, target = batch(channels)
    target[0, 0, 0] = max(channels, 2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        build(name, IGNORE, **args)(logits, target)


@pytest.mark.parametrize("ignore_index", [0, 3, -1, -100])
@pytest.mark.parametrize("name", LOSSES)
def test_any_label_may_be_the_ignored_one(name, ignore_index):
    logits, target = batch(4)
    moved = torch.where(target == IGNORE, ignore_index, target)
    also = target.masked_fill(target == ignore_index, IGNORE)
    assert torch.equal(build(name, ignore_index)(logits, moved), build(name, IGNORE)(logits, also))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_pixels_does_not_matter(name):
    logits, target = batch(4, dtype=torch.float64)
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    flat = logits.flatten(2)[..., shuffle].view_as(logits), target.flatten(1)[:, shuffle].view_as(target)
    loss = build(name)
    torch.testing.assert_close(loss(logits, target), loss(*flat), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit_are_reported(name):
    logits, target = batch(4)
    with pytest.raises(ValueError, match=r"target has the shape .* need \(2, 5, 6\)"):
        build(name)(logits, target[:, :4])
    with pytest.raises(ValueError, match=r"torch.float32; expected integer"):
        build(name)(logits, target.float())


@pytest.mark.parametrize("name", LOSSES)
def test_volumes_are_fine(name):
    logits, target = batch(4)
    loss = build(name)
    assert torch.equal(loss(logits, target), loss(logits.view(2, 4, 5, 2, 3), target.view(2, 5, 2, 3)))


@pytest.mark.gpu
@each_case
def test_the_gpu_agrees(name, args, channels):
    loss = build(name, IGNORE, **args)
    logits, target = batch(channels, shape=(2, 33, 41))
    expected = value_and_gradient(loss, logits, target)
    found = value_and_gradient(loss.cuda(), logits.cuda(), target.cuda())
    torch.testing.assert_close(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-4, atol=1e-7)
    for dtype in (torch.float16, torch.bfloat16):
        huge = (logits.sign() * 1e4).cuda().to(dtype)
        with torch.autocast("cuda", dtype=dtype):
            value, gradient = value_and_gradient(loss, huge, target.cuda())
        assert value.isfinite()
        assert gradient.isfinite().all()


# -- strictly proper or not ------------------------------------------------------------------------------------


def expected_gradient(loss, channels: int) -> Tensor:
    """Return the gradient of the expected loss over all labelings of three pixels, at the true probabilities."""
    classes = max(channels, 2)
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(classes, 3, generator=generator, dtype=torch.float64) + 0.2
    p = p / p.sum(0)
    shown = p if channels > 1 else p[1:]
    sigmoid = loss.activation == "sigmoid" or channels == 1
    logits = (torch.logit(shown) if sigmoid else shown.log()).view(1, channels, 1, 3).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for labels in itertools.product(range(classes), repeat=3):
        chance = torch.stack([p[label, pixel] for pixel, label in enumerate(labels)]).prod()
        total = total + chance * loss(logits, torch.tensor(labels).view(1, 1, 3))
    return torch.autograd.grad(total, logits)[0]


@each_case
def test_exactly_the_proper_losses_are_stationary_at_the_truth(name, args, channels):
    loss = build(name, **args)
    gradient = expected_gradient(loss, channels).abs().max()
    if loss.proper:
        assert gradient < 1e-12
    else:
        assert gradient > 1e-4
    if not args:
        assert loss.proper is type(loss).proper


def test_is_proper_knows_the_arguments():
    assert is_proper("CrossEntropyLoss2d")
    assert is_proper("FocalLoss", gamma=0.0)
    assert is_proper("BCEWithLogitsFocalLoss2d", gamma=0.0)
    assert not is_proper("CrossEntropyLoss2d", weight="balanced")
    assert not is_proper("CrossEntropyLoss2d", label_smoothing=0.1)
    assert not is_proper("CrossEntropyLoss2d", top_k=0.5)
    assert not is_proper("BCEWithLogitsLoss2d", pos_weight=[2.0])
    assert {name for name, loss in LOSSES.items() if loss.proper} == {"CrossEntropyLoss2d", "BCEWithLogitsLoss2d"}


# -- closed forms and other libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(weight, smoothing):
    logits, target = batch(4)
    torch_weight = None if weight is None else torch.tensor(weight)
    expected = F.cross_entropy(logits, target, torch_weight, ignore_index=IGNORE, label_smoothing=smoothing)
    found = build("CrossEntropyLoss2d", weight=weight, label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(found, expected)


def test_top_k_is_the_mean_over_the_hardest_pixels():
    logits, target = batch(4)
    pixels = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")[target != IGNORE]
    for fraction in (0.01, 0.3, 0.5, 0.99):
        count = max(1, int(-(-fraction * len(pixels) // 1)))
        found = build("CrossEntropyLoss2d", top_k=fraction)(logits, target)
        torch.testing.assert_close(found, pixels.sort(descending=True).values[:count].mean())


@pytest.mark.parametrize("name", ["CrossEntropyLoss2d", "BCEWithLogitsLoss2d"])
def test_one_channel_cross_entropy_is_the_binary_one(name):
    logits, target = batch(1)
    valid = target != IGNORE
    z, t = logits[:, 0][valid], target[valid].float()
    torch.testing.assert_close(build(name)(logits, target), F.binary_cross_entropy_with_logits(z, t))
    weights = torch.tensor([1.0, 5.0])[target[valid]]
    expected = (F.binary_cross_entropy_with_logits(z, t, reduction="none") * weights).sum() / weights.sum()
    torch.testing.assert_close(build(name, weight=[1.0, 5.0])(logits, target), expected)


def select(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the counted pixels' logits ``(N, C)`` and one-hot labels ``(N, C)``."""
    valid = target != IGNORE
    channels = logits.shape[1]
    code = F.one_hot(target[valid], max(channels, 2)).float()
    return logits.movedim(1, -1)[valid], code if channels > 1 else code[:, 1:]


def test_bce_equals_torch():
    logits, target = batch(4)
    z, t = select(logits, target)
    weight, pos_weight = [1.0, 2.0, 0.5, 3.0], [3.0, 2.0, 1.0, 0.5]
    torch.testing.assert_close(
        build("BCEWithLogitsLoss2d", pos_weight=pos_weight)(logits, target),
        F.binary_cross_entropy_with_logits(z, t, pos_weight=torch.tensor(pos_weight)),
    )
    terms = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(0)
    torch.testing.assert_close(
        build("BCEWithLogitsLoss2d", weight=weight)(logits, target),
        (terms * torch.tensor(weight)).sum() / sum(weight),
    )


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
def test_bce_focal_equals_torchvision(channels, alpha, gamma):
    from torchvision.ops import sigmoid_focal_loss

    logits, target = batch(channels)
    z, t = select(logits, target)
    expected = sigmoid_focal_loss(z, t, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction="mean")
    found = build("BCEWithLogitsFocalLoss2d", gamma=gamma, alpha=alpha)(logits, target)
    torch.testing.assert_close(found, expected)


def test_bce_focal_is_taken_per_pixel_not_of_the_mean():
    # One easy and one hard pixel: a factor of the mean loss would weight both equally.
    logits, target = torch.tensor([[[[6.0, -3.0]]]]), torch.tensor([[[1, 1]]])
    p = torch.sigmoid(torch.tensor([6.0, -3.0]))
    torch.testing.assert_close(
        build("BCEWithLogitsFocalLoss2d")(logits, target), ((1 - p) ** 2 * -p.log()).mean(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_its_formula(gamma):
    logits, target = batch(4, dtype=torch.float64)
    valid = target != IGNORE
    p = logits.softmax(1).gather(1, target.masked_fill(~valid, 0).unsqueeze(1))[:, 0][valid]
    terms = (1 - p) ** gamma * -p.log()
    torch.testing.assert_close(build("FocalLoss", gamma=gamma)(logits, target), terms.mean())
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)[target[valid]]
    found = build("FocalLoss", gamma=gamma, weight=[1.0, 2.0, 0.5, 3.0])(logits, target)
    torch.testing.assert_close(found, (terms * weights).sum() / weights.sum())


@pytest.mark.parametrize("name", ["CrossEntropyLoss2d", "FocalLoss"])
def test_one_channel_is_the_two_channel_loss_of_zero_and_the_logit(name):
    logits, target = batch(1)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    for args in ({}, {"weight": [1.0, 3.0]}):
        assert torch.equal(build(name, **args)(logits, target), build(name, **args)(two, target))


def test_dice_equals_segmentation_models_pytorch():
    from segmentation_models_pytorch.losses import DiceLoss

    # Without smoothing, because that library adds half of it to numerator and denominator.
    logits, target = batch(4, shape=(3, 8, 9))
    reference = DiceLoss("multiclass", ignore_index=IGNORE)
    found = build("DiceLoss", smooth=0.0, per_class=True)(logits, target)
    torch.testing.assert_close(found, reference(logits, target))
    logits, target = batch(1, shape=(3, 8, 9))
    reference = DiceLoss("binary", ignore_index=IGNORE)
    for name in ("DiceLoss", "BDiceLoss"):
        torch.testing.assert_close(build(name, smooth=0.0)(logits, target), reference(logits, target.unsqueeze(1)))


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.5, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_tversky_equals_segmentation_models_pytorch(alpha, beta):
    from segmentation_models_pytorch.losses import TverskyLoss

    args = {"alpha": alpha, "beta": beta, "smooth": 1.0}
    logits, target = batch(4, shape=(3, 8, 9))
    reference = TverskyLoss("multiclass", ignore_index=IGNORE, **args)
    torch.testing.assert_close(build("TverskyLoss", **args)(logits, target), reference(logits, target))
    logits, target = batch(1, shape=(3, 8, 9))
    reference = TverskyLoss("binary", ignore_index=IGNORE, **args)
    torch.testing.assert_close(build("TverskyLoss", **args)(logits, target), reference(logits, target.unsqueeze(1)))


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_lovasz_equals_segmentation_models_pytorch(per_image, ignored):
    from segmentation_models_pytorch.losses import LovaszLoss

    logits, target = batch(4, shape=(3, 8, 9), ignored=ignored)
    reference = LovaszLoss("multiclass", per_image=per_image, ignore_index=IGNORE, from_logits=True)
    found = build("LovaszSoftmax", per_image=per_image)(logits, target)
    torch.testing.assert_close(found, reference(logits, target).to(found))
    logits, target = batch(1, shape=(3, 8, 9), ignored=ignored)
    reference = LovaszLoss("binary", per_image=per_image, ignore_index=IGNORE, from_logits=True)
    found = build("LovaszHinge", per_image=per_image)(logits, target)
    torch.testing.assert_close(found, reference(logits[:, 0], target).to(found))


@pytest.mark.parametrize(("name", "link"), [("DiceLoss", "softmax"), ("BDiceLoss", "sigmoid")])
@pytest.mark.parametrize("smooth", [0.0, 1.0, 7.0])
def test_published_dice_sums_over_everything(name, link, smooth):
    logits, target = batch(4)
    z, t = select(logits, target)
    p = z.softmax(1) if link == "softmax" else z.sigmoid()
    expected = 1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth)
    torch.testing.assert_close(build(name, smooth=smooth)(logits, target), expected)


def test_published_softmax_dice_is_the_mean_absolute_error():
    # Documented: without per_class, the Dice loss of a softmax ignores class sizes.
    logits, target = batch(4)
    z, t = select(logits, target)
    expected = (1 - (z.softmax(1) * t).sum(1)).mean()
    torch.testing.assert_close(build("DiceLoss", smooth=0.0)(logits, target), expected)


def dice_by_hand(logits: Tensor, target: Tensor, classes: str, weight: list[float]) -> Tensor:
    terms, weights = [], []
    for image in range(len(logits)):
        z, t = select(logits[image : image + 1], target[image : image + 1])
        for c in range(logits.shape[1]):
            p, y = z.softmax(1)[:, c], t[:, c]
            if classes == "all" or y.any():
                terms.append(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
                weights.append(weight[c])
    return (torch.stack(terms) * torch.tensor(weights)).sum() / sum(weights)


@pytest.mark.parametrize("classes", ["all", "present"])
@pytest.mark.parametrize("weight", [[1.0] * 4, [1.0, 2.0, 0.5, 3.0]])
def test_dice_per_class_and_image_by_hand(classes, weight):
    logits, target = batch(4)
    target[0][target[0] == 2] = 1  # a class that is missing in one image
    found = build("DiceLoss", per_class=True, per_image=True, classes=classes, weight=weight)(logits, target)
    torch.testing.assert_close(found, dice_by_hand(logits, target, classes, weight))


@pytest.mark.parametrize("name", ["DiceLoss", "BDiceLoss", "TverskyLoss"])
def test_a_class_rightly_absent_costs_nothing_without_smoothing(name):
    # 0 / 0: the class is in neither target nor prediction.
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = torch.tensor([1e4, -1e4, -1e4]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    value, gradient = value_and_gradient(build(name, smooth=0.0, per_class=True), logits, target)
    assert value == 0
    assert gradient.isfinite().all()


def test_dice_is_tversky_at_one_half():
    logits, target = batch(4)
    dice = build("DiceLoss", per_class=True, smooth=2.0)(logits, target)
    assert torch.equal(dice, build("TverskyLoss", alpha=0.5, beta=0.5, smooth=1.0)(logits, target))


def test_compound_losses_are_their_parts():
    logits, target = batch(4)

    def value(name, **args):
        return build(name, **args)(logits, target)

    ce, dice = value("CrossEntropyLoss2d", weight=[1.0, 2.0, 0.5, 3.0]), value("DiceLoss", smooth=3.0)
    torch.testing.assert_close(value("CE_DiceLoss", weight=[1.0, 2.0, 0.5, 3.0], smooth=3.0), ce + dice)
    torch.testing.assert_close(
        value("CE_DiceLoss", dice_weight=0.3), value("CrossEntropyLoss2d") + 0.3 * value("DiceLoss")
    )
    torch.testing.assert_close(value("BCEDiceLoss"), value("BCEWithLogitsLoss2d") + value("BDiceLoss"))
    torch.testing.assert_close(value("LogCoshDiceLoss"), torch.log(torch.cosh(value("DiceLoss"))))


def test_an_image_without_the_class_still_punishes_false_alarms():
    # With one channel there is no background class, so "present" must not leave such images out.
    target = torch.zeros(1, 3, 3, dtype=torch.int64)
    for name in ("TverskyLoss", "LovaszSoftmax", "LovaszHinge"):
        loss = build(name, classes="present")
        assert loss(torch.full((1, 1, 3, 3), 2.0), target) > loss(torch.full((1, 1, 3, 3), -2.0), target)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 100.0, 1e4]),
    ignored=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_every_loss_is_finite_and_not_negative(channels, seed, scale, ignored):
    logits, target = batch(channels, shape=(2, 3, 4), seed=seed, scale=scale, ignored=ignored)
    for name in LOSSES:
        value, gradient = value_and_gradient(build(name), logits, target)
        assert value.isfinite(), name
        assert value >= -1e-6, name
        assert gradient.isfinite().all(), name


# -- the table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_the_config_can_check_every_loss(name):
    loss = LOSSES[name]
    parameters = inspect.signature(loss).parameters
    assert parameters["ignore_index"].default == 255
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert all(field.annotation is not Any for field in LOSSES.arguments(name).model_fields.values())
    assert "ignore_index" not in LOSSES.arguments(name).model_fields
    assert loss.activation in ("softmax", "sigmoid")
    assert isinstance(loss.proper, bool)
    assert "proper" in loss.__doc__
    assert parameters.keys() <= documented(loss).keys()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_no_state_to_save(name):
    args = {"weight": [1.0, 2.0]} if name in ("CrossEntropyLoss2d", "FocalLoss") else {}
    assert not build(name, **args).state_dict()


def test_unknown_names_and_arguments_are_reported():
    with pytest.raises(UserError, match="did you mean CrossEntropyLoss2d"):
        build("CrossEntropyLos")
    with pytest.raises(ValueError, match="gama"):
        build("FocalLoss", gama=1)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("CrossEntropyLoss2d", {"weight": "balanced"}, "replace it with"),
        ("CrossEntropyLoss2d", {"weight": [1.0, -1.0]}, "weight"),
        ("CrossEntropyLoss2d", {"weight": [0.0, 0.0]}, "zero for every class"),
        ("CrossEntropyLoss2d", {"weight": []}, "weight"),
        ("CrossEntropyLoss2d", {"label_smoothing": 1.0}, "label_smoothing"),
        ("CrossEntropyLoss2d", {"top_k": 0.0}, "top_k"),
        ("FocalLoss", {"gamma": -1.0}, "gamma"),
        ("BCEWithLogitsFocalLoss2d", {"alpha": 2.0}, "alpha"),
        ("DiceLoss", {"smooth": -1.0}, "smooth"),
        ("DiceLoss", {"weight": [1.0, 2.0]}, "per_class"),
        ("DiceLoss", {"per_class": True, "classes": "some"}, "classes"),
        ("TverskyLoss", {"alpha": float("nan")}, "alpha"),
        ("CE_DiceLoss", {"dice_weight": -0.1}, "dice_weight"),
    ],
)
def test_values_out_of_range_are_reported(name, args, message):
    with pytest.raises(ValueError, match=message):
        build(name, **args)


@pytest.mark.parametrize("name", ["CrossEntropyLoss2d", "FocalLoss", "BCEWithLogitsLoss2d"])
def test_the_wrong_number_of_weights_is_reported(name):
    logits, target = batch(4)
    with pytest.raises(ValueError, match="weight has 3 entries; logits with 4 channels need 4"):
        build(name, weight=[1.0, 2.0, 3.0])(logits, target)
    with pytest.raises(ValueError, match=r"need 2 \(background, class\)"):
        build(name, weight=[1.0])(logits[:, :1], target.clamp(max=1))


def test_one_channel_has_no_classes_to_weigh():
    logits, target = batch(1)
    with pytest.raises(ValueError, match="one channel has no class weights"):
        build("LovaszHinge", weight=[1.0, 2.0])(logits, target)


def test_no_loss_waits_for_the_device():
    # A loss that reads a tensor's value on the host would stall the GPU in every step; meta tensors have none.
    for name, args, channels in CASES:
        logits = torch.zeros(2, channels, 5, 6, device="meta")
        value = build(name, **args)(logits, torch.zeros(2, 5, 6, dtype=torch.int64, device="meta"))
        assert value.shape == (), name


def test_the_module_says_what_it_offers():
    assert set(LOSSES) == {
        *("CrossEntropyLoss2d", "BCEWithLogitsLoss2d", "BCEWithLogitsFocalLoss2d", "DiceLoss", "BDiceLoss"),
        *("BCEDiceLoss", "CE_DiceLoss", "FocalLoss", "LovaszSoftmax", "LogCoshDiceLoss", "LovaszHinge", "TverskyLoss"),
    }
    assert all(loss.__name__ == name for name, loss in LOSSES.items())
