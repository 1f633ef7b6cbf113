"""Optimizers: their parameter groups, and arguments that are refused."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.optim import OPTIMIZERS, build, learning_rates, restore


class Toy(nn.Module):
    """A model with a backbone and a decoder, like all models of the project."""

    def __init__(self, backbone: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU()) if backbone else nn.Identity()
        self.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), nn.GroupNorm(1, 2))

    def get_backbone_params(self):
        return self.encoder.parameters()

    def get_decoder_params(self):
        return self.decoder.parameters()


def names(model: nn.Module, group) -> set[str]:
    found = {id(p): name for name, p in model.named_parameters()}
    return {found[id(p)] for p in group["params"]}


def layout(optimizer) -> list[tuple[str, float, float]]:
    return [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def test_one_group_of_everything_by_default():
    model = Toy()
    optimizer = build("SGD", model, lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert layout(optimizer) == [("all", 0.1, 1e-4)]
    assert names(model, optimizer.param_groups[0]) == {name for name, _ in model.named_parameters()}


def test_differential_lr_puts_the_decoder_first():
    model = Toy()
    optimizer = build("SGD", model, differential_lr=True, lr=0.1)
    assert layout(optimizer) == [("decoder", 0.1, 0), ("backbone", pytest.approx(0.01), 0)]
    assert all(name.startswith("decoder") for name in names(model, optimizer.param_groups[0]))
    assert all(name.startswith("encoder") for name in names(model, optimizer.param_groups[1]))
    # A checkpoint numbers parameters in this order.
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
        *map(id, model.decoder.parameters()),
        *map(id, model.encoder.parameters()),
    ]


def test_the_factor_applies_to_the_default_rate_too():
    optimizer = build("AdamW", Toy(), differential_lr=True, backbone_lr_factor=0.5)
    default = inspect.signature(torch.optim.AdamW).parameters["lr"].default
    assert learning_rates(optimizer) == {"decoder": default, "backbone": default / 2}


def test_no_decay_on_norm_and_bias():
    model = Toy()
    optimizer = build("AdamW", model, True, 0.1, True, lr=0.1, weight_decay=0.05)
    assert layout(optimizer) == [
        ("decoder", 0.1, 0.05),
        ("decoder_no_decay", 0.1, 0.0),
        ("backbone", pytest.approx(0.01), 0.05),
        ("backbone_no_decay", pytest.approx(0.01), 0.0),
    ]
    assert [names(model, group) for group in optimizer.param_groups] == [
        {"decoder.0.weight"},
        {"decoder.0.bias", "decoder.1.weight", "decoder.1.bias"},
        {"encoder.0.weight"},
        {"encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "encoder.2.weight"},
    ]
    assert [g["name"] for g in build("SGD", model, False, 0.1, True).param_groups] == ["all", "all_no_decay"]


def test_decay_really_stops():
    model = Toy()
    optimizer = build("SGD", model, no_decay_on_norm_and_bias=True, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.ndim > 1 else 1.0)
        torch.testing.assert_close(p.detach(), expected)


def test_frozen_parameters_and_empty_groups_are_left_out():
    optimizer = build("SGD", Toy(backbone=False), differential_lr=True)
    assert [group["name"] for group in optimizer.param_groups] == ["decoder"]
    frozen = Toy()
    for p in frozen.encoder.parameters():
        p.requires_grad_(False)
    assert [g["name"] for g in build("SGD", frozen, differential_lr=True).param_groups] == ["decoder"]
    assert names(frozen, build("SGD", frozen).param_groups[0]) == {
        f"decoder.{n}" for n, _ in frozen.decoder.named_parameters()
    }
    for p in frozen.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build("SGD", frozen)


def test_groups_that_forget_or_repeat_a_parameter_are_refused():
    class Forgetful(Toy):
        def get_backbone_params(self):
            return list(super().get_backbone_params())[1:]

    class Repeating(Toy):
        def get_decoder_params(self):
            return [*super().get_decoder_params(), *super().get_backbone_params()]

    with pytest.raises(ValueError, match=r"Forgetful's parameter groups leave out encoder\.0\.weight$"):
        build("SGD", Forgetful(), differential_lr=True)
    with pytest.raises(ValueError, match="contain a parameter twice"):
        build("SGD", Repeating(), differential_lr=True)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_trains(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)  # Muon takes matrices only
    optimizer = build(name, model)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert learning_rates(optimizer) == {"all": OPTIMIZERS.arguments(name).model_fields["lr"].default}


def trained(name: str, **args: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that has taken a step, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    optimizer = build(name, model, **args)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(4, 3) / 10).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_restored_optimizer_continues_exactly_and_a_damaged_state_is_refused(name):
    args = {"momentum": 0.9} if name == "SGD" else {}
    model, optimizer = trained(name, **args)
    saved, other = deepcopy(optimizer.state_dict()), deepcopy(model)
    resumed = build(name, other, **args)
    restore(resumed, deepcopy(saved))
    assert torch.equal(other[0].weight, model[0].weight), "restoring takes no step"
    for pair in ((model, optimizer), (other, resumed)):
        step(*pair)
    assert torch.equal(other[0].weight, model[0].weight)
    for key, value in saved["state"][1].items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:  # a count of steps may have any shape
            continue
        bad = deepcopy(saved)
        bad["state"][1][key] = torch.zeros(7, 5)
        with pytest.raises(UserError, match=f"optimizer: {name} with the arguments .* cannot continue"):
            restore(build(name, other, **args), bad)


def test_arguments_that_need_another_state_are_named():
    """Without the check, the first step ends with a KeyError."""
    model, optimizer = trained("Adam")
    with pytest.raises(UserError, match="KeyError: 'max_exp_avg_sq.* keeps arguments that the state depends on"):
        restore(build("Adam", model, amsgrad=True), optimizer.state_dict())


def test_a_full_memory_is_not_taken_for_a_damaged_state(monkeypatch):
    model, optimizer = trained("Adam")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "zeros_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        restore(build("Adam", model), optimizer.state_dict())


def test_lists_from_json_become_tuples():
    optimizer = build("Adam", Toy(), betas=[0.8, 0.99])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_names_survive_a_checkpoint():
    saved = build("SGD", Toy(), differential_lr=True, lr=0.1).state_dict()
    resumed = build("SGD", Toy(), differential_lr=True, lr=0.5)
    resumed.load_state_dict(saved)
    assert learning_rates(resumed) == {"decoder": 0.1, "backbone": pytest.approx(0.01)}


def test_unusable_files_are_reported():
    with pytest.raises(UserError, match="did you mean AdamW"):
        build("AdamWW", Toy())
    with pytest.raises(UserError, match="LBFGS cannot be used here: it evaluates the loss several times"):
        build("LBFGS", Toy())
    with pytest.raises(UserError, match="sparse gradients"):
        OPTIMIZERS["SparseAdam"]
    assert "Optimizer" not in OPTIMIZERS
    assert len(list(OPTIMIZERS)) == len(OPTIMIZERS) > 10
    with pytest.raises(ValueError, match=r"momentun: SGD takes no such argument; did you mean momentum\?"):
        build("SGD", Toy(), momentun=0.9)
    assert not {"differentiable", "capturable"} & set(OPTIMIZERS.arguments("Adam").model_fields)
    with pytest.raises(ValueError, match="learning rate"):
        build("SGD", Toy(), lr=-1.0)
    with pytest.raises(ValueError, match="Rprop has no weight decay"):
        build("Rprop", Toy(), no_decay_on_norm_and_bias=True)


def test_signatures_can_be_checked_by_a_config():
    fields = OPTIMIZERS.arguments("SGD").model_fields
    assert "params" not in fields
    assert {"lr", "momentum", "weight_decay", "nesterov"} <= set(fields)
    assert fields["nesterov"].annotation in (bool, Any)
