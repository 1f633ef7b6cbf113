"""Schedules: values of single steps, equality with torch, resuming, and silence."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils import config, optim
from utils.errors import UserError
from utils.lr_scheduler import (
    SCHEDULERS,
    build,
    needs_momentum,
    one_cycle,
    optimizer_steps,
    poly,
)
from utils.lr_scheduler import __main__ as command

# The arguments that each schedule needs.
ARGS = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ExponentialLR": {"gamma": 0.9},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "SequentialLR": {
        "schedulers": [{"type": "LinearLR", "args": {"total_iters": 4}}, {"type": "CosineAnnealingLR"}],
        "milestones": [4],
    },
    "ChainedScheduler": {
        "schedulers": [{"type": "LinearLR", "args": {"total_iters": 4}}, {"type": "StepLR", "args": {"step_size": 2}}]
    },
}
OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.01}}
each_schedule = pytest.mark.parametrize("name", list(SCHEDULERS))
each_optimizer = pytest.mark.parametrize("optimizer_name", OPTIMIZERS)


def make_optimizer(name="SGD", **args):
    """Return an optimizer with two groups of different learning rates."""
    args = args or OPTIMIZERS[name]
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))]}, {"params": [nn.Parameter(torch.ones(2, 2))]}]
    groups[1]["lr"] = args["lr"] * 0.1
    return getattr(torch.optim, name)(groups, **args)


def values(optimizer) -> list[tuple[float, float]]:
    return [(g["lr"], g["betas"][0] if "betas" in g else g["momentum"]) for g in optimizer.param_groups]


def run(schedule, steps: int) -> list[list[tuple[float, float]]]:
    """Return the values that each of ``steps`` optimizer steps uses."""
    seen = []
    for _ in range(steps):
        seen.append(values(schedule.optimizer))
        schedule.optimizer.step()
        schedule.step()
    return seen


def rates(schedule, steps: int) -> list[float]:
    return [step[0][0] for step in run(schedule, steps)]


# -- the pure functions ----------------------------------------------------------------------------------------


def test_poly_at_the_first_middle_and_last_step():
    assert poly(0, 100) == 1.0
    assert poly(50, 100) == pytest.approx(0.5**0.9)
    assert poly(99, 100) == pytest.approx(0.01**0.9)
    assert poly(100, 100) == 0.0
    assert poly(25, 100, power=2.0) == pytest.approx(0.75**2)


def test_poly_warm_up_rises_linearly_and_joins_the_decay():
    factors = [poly(step, 100, warmup=10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5**0.9)
    assert factors[99] == pytest.approx((1 / 90) ** 0.9)


def test_one_cycle_at_its_corners():
    # 101 steps with the peak at step 0.3 * 100 - 1.
    assert one_cycle(0, 100) == pytest.approx((1 / 25, 0.95))
    assert one_cycle(29, 100) == pytest.approx((1.0, 0.85))
    assert one_cycle(64, 100) == pytest.approx(((1 + 1 / 25e4) / 2, 0.9))
    assert one_cycle(99, 100) == pytest.approx((1 / 25e4, 0.95))


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 60), warmup=st.integers(0, 59), phase1=st.floats(0, 1), power=st.floats(0.1, 3))
def test_factors_stay_in_range_for_any_length(total, warmup, phase1, power):
    warmup = min(warmup, total - 1)
    factors = [poly(step, total, power, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    cycle = [one_cycle(step, total, phase1) for step in range(total)]
    assert all(0 < factor <= 1 + 1e-12 and 0.85 - 1e-12 <= momentum <= 0.95 + 1e-12 for factor, momentum in cycle)


def test_reading_the_state_changes_nothing():
    schedule = build("Poly", make_optimizer(), 10)
    assert schedule.state_dict() == schedule.state_dict()


@each_optimizer
@pytest.mark.parametrize("total", [5, 30, 77])
def test_one_cycle_equals_torch(optimizer_name, total):
    ours = run(build("OneCycle", make_optimizer(optimizer_name), total), total)
    theirs = run(build("OneCycleLR", make_optimizer(optimizer_name), total), total)
    assert torch.tensor(ours).tolist() == pytest.approx(torch.tensor(theirs), rel=1e-6)


def test_poly_without_warm_up_equals_torch():
    ours = run(build("Poly", make_optimizer(), 30, power=0.9), 30)
    theirs = run(build("PolynomialLR", make_optimizer(), 30, power=0.9), 30)
    assert torch.tensor(ours).tolist() == pytest.approx(torch.tensor(theirs), rel=1e-5)


# -- as schedules ----------------------------------------------------------------------------------------------


@each_optimizer
def test_poly_scales_every_group_and_leaves_the_momentum(optimizer_name):
    base = values(make_optimizer(optimizer_name))
    seen = run(build("Poly", make_optimizer(optimizer_name), 20, warmup=0.2), 20)
    for step, groups in enumerate(seen):
        factor = poly(step, 20, warmup=4)
        assert groups == [(lr * factor, momentum) for lr, momentum in base]


@each_optimizer
def test_one_cycle_moves_rates_and_momentum(optimizer_name):
    optimizer = make_optimizer(optimizer_name)
    beta2 = [g.get("betas", (None, None))[1] for g in optimizer.param_groups]
    seen = run(build("OneCycle", optimizer, 20), 20)
    for step, groups in enumerate(seen):
        factor, momentum = one_cycle(step, 20)
        assert groups == [(lr * factor, momentum) for lr, _ in values(make_optimizer(optimizer_name))]
    assert [g.get("betas", (None, None))[1] for g in optimizer.param_groups] == beta2


def test_one_cycle_can_leave_the_momentum_alone():
    seen = run(build("OneCycle", make_optimizer("SGD", lr=0.1), 9, momentums=None), 9)
    assert {momentum for groups in seen for _, momentum in groups} == {0}
    with pytest.raises(ValueError, match="momentums: OneCycle cycles the momentum, but SGD has none"):
        build("OneCycle", make_optimizer("SGD", lr=0.1), 9)
    with pytest.raises(ValueError, match="Adagrad has none"):
        build("OneCycle", make_optimizer("Adagrad", lr=0.1), 9)


def test_warm_up_is_a_fraction_or_a_number_of_steps():
    assert rates(build("Poly", make_optimizer(), 40, warmup=0.25), 40) == rates(
        build("Poly", make_optimizer(), 40, warmup=10), 40
    )


@pytest.mark.parametrize("name", ["Poly", "OneCycle"])
def test_values_stay_after_the_last_step(name):
    schedule = build(name, make_optimizer(), 10)
    seen = run(schedule, 15)
    assert all(later == seen[9] for later in seen[10:])
    assert seen[9][0][0] > 0


@pytest.mark.parametrize("name", ["Poly", "OneCycle", "CosineAnnealingLR", "OneCycleLR"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_work(name, total):
    seen = run(build(name, make_optimizer(), total), total) if (name, total) != ("OneCycleLR", 1) else [[(1.0, 1.0)]]
    assert all(math.isfinite(x) for groups in seen for group in groups for x in group)


@each_schedule
@each_optimizer
@pytest.mark.parametrize("stop", [0, 1, 4, 6, 10])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resuming_gives_the_same_bits(name, optimizer_name, stop, optimizer_first):
    args = ARGS.get(name, {})
    whole = build(name, make_optimizer(optimizer_name), 10, **args)
    before = run(whole, stop)
    saved = json.loads(json.dumps(whole.state_dict()))  # plain data, as in a checkpoint
    optimizer_state = whole.optimizer.state_dict()
    after = run(whole, 10 - stop)

    resumed = build(name, make_optimizer(optimizer_name), 10, **args)
    loads = [lambda: resumed.optimizer.load_state_dict(optimizer_state), lambda: resumed.load_state_dict(saved)]
    for load in loads if optimizer_first else loads[::-1]:
        load()
    assert run(resumed, 10 - stop) == after
    assert before + after == run(build(name, make_optimizer(optimizer_name), 10, **args), 10)


@pytest.mark.parametrize("name", ["Poly", "OneCycle", "OneCycleLR", "CosineAnnealingLR", "StepLR"])
def test_a_resumed_run_may_be_longer(name):
    args = ARGS.get(name, {})
    short = build(name, make_optimizer(), 6, **args)
    run(short, 6)
    longer = build(name, make_optimizer(), 12, **args)
    longer.load_state_dict(short.state_dict())
    assert run(longer, 6) == run(build(name, make_optimizer(), 12, **args), 12)[6:]


@pytest.mark.parametrize("name", ["Poly", "OneCycle", "OneCycleLR", "CosineAnnealingLR", "StepLR"])
def test_resuming_with_another_rate_follows_the_curve_of_the_new_one(name):
    args = ARGS.get(name, {})
    before = build(name, make_optimizer("AdamW", lr=0.5), 10, **args)
    run(before, 4)
    resumed = build(name, make_optimizer("AdamW", lr=0.1), 10, **args)
    resumed.load_state_dict(before.state_dict())
    assert run(resumed, 6) == run(build(name, make_optimizer("AdamW", lr=0.1), 10, **args), 10)[4:]


def test_resuming_with_other_groups_is_an_error():
    saved = build("Poly", make_optimizer(), 10).state_dict()
    one_group = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer 1"):
        build("Poly", one_group, 10).load_state_dict(saved)


@each_schedule
def test_nothing_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = build(name, make_optimizer(), 10, **ARGS.get(name, {}))
        run(schedule, 12)
        # AMP skips optimizer steps until it has found its scale; the schedule advances anyway.
        skipped = build(name, make_optimizer(), 10, **ARGS.get(name, {}))
        for _ in range(10):
            skipped.step()


def test_warnings_of_others_are_shown_once_not_in_every_step():
    # warnings.catch_warnings() makes Python repeat warnings, so schedules must not enter it in each step.
    schedule = build("StepLR", make_optimizer(), 20, step_size=3)
    schedule.optimizer.step()
    schedule.step()
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *args, **kwargs: shown.append(args[0])
        for _ in range(10):
            warnings.warn("from elsewhere", stacklevel=1)
            schedule.optimizer.step()
            schedule.step()
    assert len(shown) == 1


@each_schedule
def test_the_torch_schedules_are_torchs(name):
    if name in ("Poly", "OneCycle", "SequentialLR", "ChainedScheduler"):
        pytest.skip("not a single scheduler of torch")
    args = dict(ARGS.get(name, {}))
    ours = run(build(name, make_optimizer(), 10, **args), 10)
    defaults = {
        "CosineAnnealingLR": {"T_max": 10},
        "PolynomialLR": {"total_iters": 10},
        "OneCycleLR": {"max_lr": [0.1, 0.1 * 0.1], "total_steps": 10},
    }
    optimizer = make_optimizer()
    theirs = getattr(torch.optim.lr_scheduler, name)(optimizer, **defaults.get(name, {}), **args)
    seen = []
    for _ in range(10):
        seen.append(values(optimizer))
        optimizer.step()
        theirs.step()
    assert ours == seen


def test_sequential_warm_up_then_cosine():
    seen = rates(build("SequentialLR", make_optimizer(), 10, **ARGS["SequentialLR"]), 10)
    assert seen[0] == pytest.approx(0.1 / 3)
    assert seen[4] == pytest.approx(0.1)
    # The cosine takes the rest of the run.
    assert seen[9] == pytest.approx(0.05 * (1 + math.cos(math.pi * 5 / 6)))


def test_accumulated_batches_are_one_step():
    assert optimizer_steps(epochs=3, batches=10) == 30
    assert optimizer_steps(epochs=3, batches=10, accumulate=4) == 9
    total = optimizer_steps(2, 8, accumulate=4)
    optimizer = make_optimizer()
    schedule = build("Poly", optimizer, total)
    seen = []
    for _, batch in itertools.product(range(2), range(8)):
        seen.append(optimizer.param_groups[0]["lr"])
        if batch % 4 == 3:
            optimizer.step()
            schedule.step()
    assert seen == [0.1 * poly(step, 4) for step in range(4) for _ in range(4)]


@pytest.mark.parametrize("name", ["StepLR", "MultiStepLR", "CosineAnnealingLR", "Poly", "OneCycle", "SequentialLR"])
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 12])
def test_a_schedule_per_epoch_keeps_its_values_for_an_epoch_and_resumes(name, stop):
    args = ARGS.get(name, {})
    by_epoch = run(build(name, make_optimizer(), 6, **args), 6)
    whole = run(build(name, make_optimizer(), 18, steps_per_epoch=3, **args), 18)
    assert whole == [values for values in by_epoch for _ in range(3)]
    first = build(name, make_optimizer(), 18, steps_per_epoch=3, **args)
    assert run(first, stop) == whole[:stop]
    second = build(name, make_optimizer(), 18, steps_per_epoch=3, **args)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, 18 - stop) == whole[stop:]


# -- the table -------------------------------------------------------------------------------------------------


def test_the_table_contains_what_torch_has():
    assert {"Poly", "OneCycle", "StepLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"} <= set(SCHEDULERS)
    assert "LRScheduler" not in SCHEDULERS
    for name in ("LambdaLR", "MultiplicativeLR"):
        with pytest.raises(UserError, match="a config cannot contain a function"):
            SCHEDULERS[name]
    with pytest.raises(UserError, match="ReduceLROnPlateau cannot be used here: it depends on a score"):
        SCHEDULERS["ReduceLROnPlateau"]
    with pytest.raises(UserError, match="did you mean Poly"):
        build("poli", make_optimizer(), 10)


@each_schedule
def test_signatures_show_what_a_config_may_set(name):
    fields = SCHEDULERS.arguments(name).model_fields
    assert not {"optimizer", "total_steps", "last_epoch", "verbose"} & set(fields)
    required = {key for key, field in fields.items() if field.is_required()}
    assert required <= set(ARGS.get(name, {}))
    for key in required:
        with pytest.raises(ValueError, match=f"{key}: {name} needs this argument"):
            build(name, make_optimizer(), 10, **{k: v for k, v in ARGS[name].items() if k != key})
    with pytest.raises(ValueError, match=f"powr: {name} takes no such argument"):
        build(name, make_optimizer(), 10, powr=1.0)  # one message names all that is wrong


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Poly", {"power": 0.0}, "power"),
        ("Poly", {"warmup": -1}, "warmup"),
        ("Poly", {"warmup": 10}, "less than the run's 10 steps"),
        ("OneCycle", {"phase1": 1.5}, "phase1"),
        ("OneCycle", {"div_factor": 0.0}, "div_factor"),
        ("OneCycle", {"momentums": (0.95, 0.85)}, "momentums"),
        ("SequentialLR", {"schedulers": [{"type": "Poly"}, {"type": "StepLR"}], "milestones": [3]}, "Poly is not one"),
        ("SequentialLR", {"schedulers": [{"type": "ConstantLR"}], "milestones": [3]}, "need 0 milestones"),
        (
            "SequentialLR",
            {"schedulers": [{"type": "ConstantLR"}] * 3, "milestones": [5, 2]},
            r"\[5, 2\]; expected incr",
        ),
        (
            "SequentialLR",
            {"schedulers": [{"type": "ConstantLR"}] * 2, "milestones": [-1]},
            "increasing numbers above 0",
        ),
        ("ChainedScheduler", {"schedulers": [{"name": "ConstantLR"}]}, "expected"),
    ],
)
def test_values_out_of_range_are_reported(name, args, message):
    with pytest.raises(ValueError, match=message):
        build(name, make_optimizer(), 10, **args)


def test_a_run_has_steps():
    with pytest.raises(ValueError, match="total_steps is 0"):
        build("Poly", make_optimizer(), 0)


def test_which_schedules_need_momentum():
    assert needs_momentum("OneCycle", {})
    assert not needs_momentum("OneCycle", {"momentums": None})
    assert needs_momentum("CyclicLR", {})
    assert not needs_momentum("OneCycleLR", {"cycle_momentum": False})
    assert not needs_momentum("Poly", {})


# -- the picture -----------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    raw = {
        "name": "drawn",
        "arch": {"type": "PSPNet"},
        "train_loader": {"type": "Shapes", "args": {"val_split": 0.1}},
        "optimizer": {"type": "SGD", "differential_lr": True, "args": {"lr": 0.01, "momentum": 0.9}},
        "lr_scheduler": {"type": "OneCycle"},
        "trainer": {"epochs": 4, "accumulate": 2},
    }
    path.write_text(json.dumps(raw))
    return path


def test_the_command_draws_the_run(config_file, tmp_path, capsys):
    import cv2

    out = tmp_path / "folder" / "lr.png"
    assert command.main(["--config", str(config_file), "--out", str(out), "--iters-per-epoch", "20"]) == 0
    assert str(out) in capsys.readouterr().out
    picture = cv2.imread(str(out))[:, :, ::-1]
    assert picture.shape[1] == 960
    for color in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two: one curve per parameter group
        assert (picture == color).all(axis=2).sum() > 200


def test_the_run_has_as_many_steps_as_its_data_say(config_file, tmp_path, capsys):
    out = ["--config", str(config_file), "--out", str(tmp_path / "lr.png")]
    set_to = "train_loader.args={args}".format
    args = '{"length": 24, "batch_size": 4, "num_workers": 0}'
    assert command.main([*out, "--set", set_to(args=args)]) == 0
    assert "4 epochs of 6 batches" in capsys.readouterr().out
    assert command.main([*out, "--set", set_to(args=args), "--set", "trainer.limit_batches=5"]) == 0
    assert "4 epochs of 5 batches" in capsys.readouterr().out
    gone = ["--set", "train_loader.type=VOC", "--set", 'train_loader.args={"data_dir": "gone"}']
    assert command.main([*out, *gone]) == 0
    printed = capsys.readouterr()
    assert "4 epochs of 100 batches" in printed.out
    assert "assumes 100 batches per epoch" in printed.err
    assert "gone" in printed.err
    assert command.main([*out, *gone, "--set", "trainer.limit_batches=500"]) == 0
    printed = capsys.readouterr()
    assert "4 epochs of 500 batches" in printed.out
    assert "assumes" not in printed.err


def test_the_curves_follow_the_config(config_file):
    panels = command.curves(config.load(config_file, stages=()), epochs=4, batches=20)
    factors = [one_cycle(step, 40) for step in range(40)]  # two batches per step
    assert panels["learning rate"]["decoder"] == [0.01 * factor for factor, _ in factors]
    assert panels["learning rate"]["backbone"] == pytest.approx([0.001 * factor for factor, _ in factors])
    assert panels["momentum"] == {"momentum": [value for _, value in factors]}
    bare = ["optimizer.type=Adagrad", 'optimizer.args={"lr":0.1}', "lr_scheduler.type=Poly"]
    assert list(command.curves(config.load(config_file, bare, stages=()), 1, 4)) == ["learning rate"]
    steps = ["lr_scheduler.type=StepLR", 'lr_scheduler.args={"step_size": 1}', "lr_scheduler.step=epoch"]
    rates = command.curves(config.load(config_file, steps, stages=()), 2, 6)["learning rate"]["decoder"]
    assert rates == pytest.approx([0.01] * 3 + [0.001] * 3)


def test_mistakes_are_one_message(config_file, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "a.png")]
    warmup = ["--set", "lr_scheduler.type=Poly", "--set", "lr_scheduler.args.warmup=1000", "--iters-per-epoch", "5"]
    with pytest.raises(UserError, match=r"lr_scheduler.args: warmup is 1000; expected .* less than the run's 12 steps"):
        command.main(["--config", str(config_file), *warmup, *out])
    with pytest.raises(UserError, match="SGD has none"):
        command.main(["--config", str(config_file), "--set", 'optimizer.args={"lr":0.1}', *out])
    with pytest.raises(UserError, match="a.txt: cannot write the picture"):
        command.main(["--config", str(config_file), "--out", str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match="from 1 up"):
        command.main(["--config", str(config_file), "--epochs", "0"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        command.main(["--config", str(config_file), *out])


def test_learning_rates_for_logs_have_names():
    optimizer = make_optimizer()
    assert optim.learning_rates(optimizer) == {"group0": 0.1, "group1": pytest.approx(0.01)}
