"""The fields of a config: their names, types, defaults and meaning.

:class:`Config` is the whole file; every class below is one section of it. Descriptions become the config
reference in the documentation and the hints in editors (``configs/schema.json``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PrivateAttr, field_validator, model_validator

from utils import rankdice
from utils.bounds import AboveZero, ClassId, Count, Label, NonNegative, Number, Positive, Seed, Share
from utils.cli import Mode, Procedure
from utils.rankdice import Metric, Solver

Presence = Literal["auto", "fitted", "rule", "prune", "all"]

EDITORS_KEY = "$schema"  # a config may name its schema, for editors
LONGEST_NAME = 200  # bytes; file systems take 255
SGD_DEFAULTS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


class Section(BaseModel):
    """A section of the config. Unknown keys and values of a wrong type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Component(Section):
    """A class, chosen by name, and the arguments of its constructor."""

    type: str = Field(description="name of the class")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of its constructor")


class Optimizer(Component):
    """Any optimizer of torch.optim, and its parameter groups."""

    type: str = Field("SGD", description="any class of torch.optim")
    args: dict[str, Any] = Field(
        default_factory=lambda data: dict(SGD_DEFAULTS) if data["type"] == "SGD" else {},
        description="arguments of its constructor; the defaults are only for SGD",
    )
    differential_lr: bool = Field(
        False, description="train the backbone with the learning rate lr * backbone_lr_factor"
    )
    backbone_lr_factor: NonNegative = Field(
        0.1, description="factor of the learning rate of the backbone; see differential_lr"
    )
    no_decay_on_norm_and_bias: bool = Field(
        False, description="no weight decay for normalization layers and for biases"
    )


class Schedule(Component):
    """The learning-rate schedule and its unit of time."""

    type: str = Field("Poly", description="Poly, OneCycle, or any class of torch.optim.lr_scheduler")
    step: Literal["iteration", "epoch"] = Field(
        "iteration",
        description="unit of the schedule's arguments (step_size, milestones, ...): optimizer steps or epochs",
    )


class RankDiceOptions(Section):
    """How procedure rankdice finds its masks (see docs/rankdice.md)."""

    solver: Solver = Field(
        rankdice.Options.solver,  # type: ignore[arg-type]  # a str there; validated here
        description="how the mask's volume is found: exactly, or by a published approximation",
    )
    metric: Metric = Field(
        rankdice.Options.metric,  # type: ignore[arg-type]  # as above
        description="the score to maximize in expectation",
    )
    smooth: float = Field(
        rankdice.Options.smooth,
        ge=0,
        le=rankdice.MOST_SMOOTH,
        description="added to numerator and denominator of the score",
    )
    prune: Share | None = Field(
        rankdice.Options.prune,
        description="a class gets no mask in an image where none of its probabilities is above this; null: no pruning",
    )

    @model_validator(mode="after")
    def _solver_supports_metric(self) -> RankDiceOptions:
        rankdice.Options(self.metric, self.solver, self.smooth, self.prune)
        return self


class PresenceFit(Section):
    """A fitted model of which classes are in an image. train.py and ``test.py --fit`` write it; do not edit it."""

    images: Count = Field(description="number of validation images used for the fit")
    classes: list[ClassId] = Field(description="class ids, in the order of the lists below")
    metric: Metric = Field(description="the score that was fitted")
    weight: Number = Field(description="weight of the standardized logit of the expected score")
    center: Number = Field(description="mean of that logit")
    spread: AboveZero = Field(description="standard deviation of that logit")
    bias: Number = Field(description="added to the logit of presence")
    class_bias: list[Number] = Field(description="added to the logit of presence, per class")
    score_shift: Number = Field(description="added to expected scores")
    score_slope: Number = Field(description="times (expected score - 0.6), added to expected scores")
    mean_score: Share = Field(description="mean score per image, used for tasks with a single class")
    mask_shift: Number = Field(description="added to the product of presence and score")
    mask_slope: Number = Field(description="times (product - 0.6), added to the product")
    mask_class: list[Number] = Field(description="added to the product, per class")

    @model_validator(mode="after")
    def _one_number_per_class(self) -> PresenceFit:
        if not len(self.classes) == len(self.class_bias) == len(self.mask_class):
            raise ValueError("classes, class_bias and mask_class must have the same length")
        return self


class Predict(Section):
    """How probabilities are turned into masks, and which classes are scored."""

    CoI: Literal["all"] | list[ClassId] = Field("all", description="classes of interest: 'all' or a list of class ids")
    train: Procedure = Field("max", description="procedure for the scores shown during training")
    val: Procedure = Field("rankdice", description="procedure in validation, for the scores that choose the best model")
    test: Procedure = Field("rankdice", description="default procedure of test.py and inference.py")
    threshold: Share = Field(0.5, description="threshold of procedure T")
    temperature: AboveZero = Field(1.0, description="the logits are divided by this")
    bias: list[Number] | None = Field(
        None, description="one number per class, added to the logits after the division by the temperature"
    )
    mode: Mode = Field(
        "single",
        description="default --mode of inference.py: the whole image, several scales, or tiles; with 'multiscale', "
        "test.py also scores the mean over scales",
    )
    presence: Presence = Field(
        "auto",
        description="which classes get a mask (see docs/presence.md): 'fitted', 'rule', 'prune' (as in the paper, see "
        "rankdice.prune) or 'all'; 'auto': 'fitted' if there is a presence_fit, else 'prune'",
    )
    presence_fit: PresenceFit | None = Field(
        None, description="the fit of 'fitted'; train.py and test.py --fit write it"
    )
    count_ignored: bool = Field(False, description="count predictions on ignored pixels as wrong")
    rankdice: RankDiceOptions = Field(default_factory=RankDiceOptions)

    @field_validator("CoI")
    @classmethod
    def _coi_is_a_set(cls, value: Any) -> Any:
        if value != "all" and (not value or len(set(value)) != len(value)):
            raise ValueError("a list of classes of interest needs at least one class, and each class only once")
        return value

    @model_validator(mode="after")
    def _fitted_needs_a_fit(self) -> Predict:
        if self.presence == "fitted" and self.presence_fit is None:
            raise ValueError(
                "presence 'fitted' needs presence_fit, which train.py (trainer.fit) and test.py --fit write into a "
                "checkpoint; use 'auto', 'rule', 'prune' or 'all'"
            )
        return self


class Trainer(Section):
    """The training run: its length, checkpoints, logs, and use of the device."""

    epochs: Positive = Field(80, description="number of training epochs")
    save_dir: str = Field("saved/", description="checkpoints are written to save_dir/name/loss/predict.val/MM-DD_HH-MM")
    save_period: Positive = Field(10, description="write checkpoint-epochN.pth every N epochs")
    keep_last: Positive | None = Field(
        None, description="keep this number of the newest checkpoint-epochN.pth; null: all"
    )
    save_every_iters: Positive | None = Field(
        None, description="also write latest.pth every N iterations; null: only with the other checkpoints"
    )
    monitor: str = Field(
        "max Mean_Dice",
        description="how the best model is chosen: 'max' or 'min' and the name of a logged value, or 'off'",
    )
    early_stop: Count = Field(0, description="stop after this number of validations without improvement; 0: never")
    tensorboard: bool = Field(True, description="write TensorBoard logs")
    log_dir: str = Field("saved/runs", description="TensorBoard logs are written to log_dir/name/MM-DD_HH-MM")
    log_per_iter: Positive = Field(20, description="log every N iterations")
    val: bool = Field(True, description="validate during training")
    val_per_epochs: Positive = Field(5, description="validate every N epochs, and after the last epoch")
    amp: Literal["off", "bf16", "fp16"] = Field("off", description="mixed precision; fp16 uses gradient scaling")
    channels_last: bool = Field(False, description="channels-last memory layout")
    compile: bool = Field(False, description="compile the model with torch.compile")
    accumulate: Positive = Field(1, description="batches per optimizer step (gradient accumulation)")
    clip_grad_norm: AboveZero | None = Field(None, description="clip gradients to this norm; null: no clipping")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, which is then validated and tested; "
        "null: no average",
    )
    profile: bool = Field(False, description="write a profiler trace of a few iterations to log_dir")
    limit_batches: Positive | None = Field(None, description="at most this many batches per epoch, for quick tests")
    fit: bool = Field(True, description="after training, fit temperature, presence and threshold on validation data")


class Tester(Section):
    """What test.py writes, and where."""

    tensorboard: bool = Field(False, description="also write the test scores as TensorBoard scalars")
    out_dir: str | None = Field(None, description="folder for the results; null: the folder of the checkpoint")


LossField = Annotated[
    Component,
    # A loss without arguments is written as its name alone, as in the predecessors' configs.
    PlainSerializer(lambda c: c.model_dump() if c.args else c.type, return_type=dict[str, Any] | str),
]


class Config(Section):
    """One run: model, data, optimization, prediction and logging."""

    name: str = Field(description="name of the run, part of the save path")
    about: str | None = Field(None, description="free text: paper, command, expected scores, hardware")
    n_gpu: Count = Field(1, description="number of GPUs; 0: CPU")
    use_synch_bn: bool = Field(False, description="synchronize batch norm across processes (several GPUs)")
    seed: Seed = Field(0, description="random seed of initialization, data order and augmentation")
    deterministic: bool = Field(
        False, description="use only deterministic algorithms, so that repeated runs are bit-identical"
    )
    arch: Component = Field(description="the model")
    train_loader: Component = Field(description="training data")
    val_loader: Component | None = Field(
        None, description="validation data; null: the samples that train_loader holds out (val_split)"
    )
    test_loader: Component | None = Field(None, description="test data; null: the data of val_loader")
    optimizer: Optimizer = Field(default_factory=Optimizer)
    loss: LossField = Field(default_factory=lambda: Component(type="CrossEntropyLoss2d"), description="the loss")
    aux_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss")
    ignore_index: Label | None = Field(None, description="label of ignored pixels; null: the data set's own")
    lr_scheduler: Schedule = Field(default_factory=Schedule)
    predict: Predict = Field(default_factory=Predict)
    trainer: Trainer = Field(default_factory=Trainer)
    tester: Tester = Field(default_factory=Tester)

    # Notes for the user that are not errors; the banner of a run prints them.
    _notes: list[str] = PrivateAttr(default_factory=list)

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_by_name(cls, value: Any) -> Any:
        value = {"type": value} if isinstance(value, str) else value
        return {"type": "CrossEntropyLoss2d", **value} if isinstance(value, Mapping) else value

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not value or "/" in value or "\\" in value or value in (".", "..") or len(value.encode()) > LONGEST_NAME:
            raise ValueError(
                f"the name becomes a folder: expected 1 to {LONGEST_NAME} bytes without slashes, and not '.' or '..'"
            )
        return value

    @property
    def notes(self) -> list[str]:
        """Notes for the user that are not errors, such as keys that have no effect."""
        return self._notes

    def loader_field(self, stage: str) -> str:
        """Return the field with the loader of a stage ("train", "val" or "test"): test falls back on val."""
        return "val_loader" if stage == "test" and self.test_loader is None else f"{stage}_loader"

    def loader(self, stage: str) -> Component | None:
        """Return the loader of a stage; None if there is none."""
        return getattr(self, self.loader_field(stage))
