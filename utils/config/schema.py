"""The fields of a config: their names, types, defaults and meaning.

:class:`Config` is the whole file; every class below is one section of it. Descriptions become the config
reference in the documentation and the hints in editors (``configs/schema.json``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PrivateAttr, field_validator, model_validator

from utils.bounds import AboveZero, ClassId, Count, Label, NonNegative, Number, Positive, Seed, Share

PROCEDURES = ("T", "max", "rankdice")
Procedure = Literal["T", "max", "rankdice"]
Presence = Literal["auto", "fitted", "rule", "prune", "all"]

EDITORS_KEY = "$schema"  # a config may name its schema, for editors
LONGEST_NAME = 200  # bytes; file systems take 255
SGD_DEFAULTS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


class Section(BaseModel):
    """A section of the config: an unknown key is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Component(Section):
    """A class chosen by name, and the arguments for its constructor."""

    type: str = Field(description="name of the class")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of its constructor")


class Optimizer(Component):
    """Any optimizer of torch.optim, and how parameters are grouped for it."""

    type: str = Field("SGD", description="any class of torch.optim")
    args: dict[str, Any] = Field(
        default_factory=lambda data: dict(SGD_DEFAULTS) if data["type"] == "SGD" else {},
        description="arguments of its constructor; for SGD they default to the customary ones",
    )
    differential_lr: bool = Field(False, description="train the backbone at lr * backbone_lr_factor")
    backbone_lr_factor: NonNegative = Field(0.1, description="see differential_lr")
    no_decay_on_norm_and_bias: bool = Field(False, description="no weight decay on norms and biases")


class Schedule(Component):
    """The learning-rate schedule, and what it counts."""

    type: str = Field("Poly", description="Poly, OneCycle, or any class of torch.optim.lr_scheduler")
    step: Literal["iteration", "epoch"] = Field(
        "iteration",
        description="unit of the schedule's numbers (step_size, milestones, ...): optimizer steps, or epochs",
    )


class RankDiceOptions(Section):
    """How the rankdice procedure finds its masks (see docs/rankdice.md)."""

    solver: Literal["exact", "ba", "trna", "paper", "rma"] = Field("exact", description="how the volume is found")
    metric: Literal["dice", "iou"] = Field("dice", description="the score whose expectation is maximised")
    smooth: NonNegative = Field(0.0, le=100_000, description="added to numerator and denominator; at most 100,000")
    prune: Share | None = Field(
        0.5,
        description="classes whose highest probability in an image is not above this get no mask; null: off",
    )

    @model_validator(mode="after")
    def _iou_has_two_solvers(self) -> RankDiceOptions:
        if self.metric == "iou" and self.solver not in ("exact", "rma"):
            raise ValueError(f"metric 'iou' is solved by 'exact' and 'rma', not by {self.solver!r}")
        return self


class PresenceFit(Section):
    """Which classes are in an image, learned from validation images; train.py and ``test.py --fit`` write it."""

    images: Count = Field(description="validation images it was learned from")
    classes: list[ClassId] = Field(description="ids of the classes that the lists below are of")
    metric: Literal["dice", "iou"] = Field(description="the score that it was learned for")
    weight: Number = Field(description="weight of the standardised logit of the expected score")
    center: Number = Field(description="mean of that logit")
    spread: AboveZero = Field(description="standard deviation of that logit")
    bias: Number = Field(description="added to the logit of presence")
    class_bias: list[Number] = Field(description="added to it per class")
    score_shift: Number = Field(description="added to expected scores")
    score_slope: Number = Field(description="times the expected score minus 0.6, added to it")
    mean_score: Share = Field(description="mean score per image, for tasks with a single class")
    mask_shift: Number = Field(description="added to the product of presence and score")
    mask_slope: Number = Field(description="times the product minus 0.6, added to it")
    mask_class: list[Number] = Field(description="added to it per class")

    @model_validator(mode="after")
    def _one_number_per_class(self) -> PresenceFit:
        if not len(self.classes) == len(self.class_bias) == len(self.mask_class):
            raise ValueError("classes, class_bias and mask_class must have the same length")
        return self


class Predict(Section):
    """How probabilities become masks, and which classes are scored."""

    CoI: Literal["all"] | list[ClassId] = Field("all", description="classes of interest: 'all' or a list of class ids")
    train: Procedure = Field("max", description="procedure behind the scores shown while training")
    val: Procedure = Field("rankdice", description="procedure in validation: the best model is chosen by it")
    test: Procedure = Field("rankdice", description="procedure of test.py and inference.py unless -p says otherwise")
    threshold: Share = Field(0.5, description="threshold of procedure T")
    temperature: AboveZero = Field(1.0, description="logits are divided by it")
    bias: list[Number] | None = Field(None, description="added to the logits after that, one number per class")
    mode: Literal["single", "multiscale", "sliding"] = Field(
        "single", description="how inference.py views an image unless --mode says otherwise"
    )
    presence: Presence = Field(
        "auto",
        description="which classes get a mask (see docs/presence.md): 'fitted', 'rule', 'prune' (the paper's, see "
        "rankdice.prune) or 'all'; 'auto': 'fitted' with presence_fit, else 'prune'",
    )
    presence_fit: PresenceFit | None = Field(None, description="written by train.py and test.py --fit")
    count_ignored: bool = Field(False, description="count predictions on ignored pixels as wrong")
    rankdice: RankDiceOptions = Field(default_factory=RankDiceOptions)

    @field_validator("CoI")
    @classmethod
    def _coi_is_a_set(cls, value: Any) -> Any:
        if value != "all" and (not value or len(set(value)) != len(value)):
            raise ValueError("a list of classes of interest names each class once and at least one")
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
    """The run: how long, what is saved, what is logged, how the device is used."""

    epochs: Positive = Field(80, description="number of training epochs")
    save_dir: str = Field("saved/", description="checkpoints go to save_dir/name/loss/predict.val/MM-DD_HH-MM")
    save_period: Positive = Field(10, description="write checkpoint-epochN.pth every so many epochs")
    keep_last: Positive | None = Field(None, description="keep only so many checkpoint-epochN.pth; null: all")
    save_every_iters: Positive | None = Field(None, description="write latest.pth every so many iterations")
    monitor: str = Field("max Mean_Dice", description="'off', or min/max and a logged value; chooses the best model")
    early_stop: Count = Field(0, description="stop after so many validations without improvement; 0: never")
    tensorboard: bool = Field(True, description="write TensorBoard logs")
    log_dir: str = Field("saved/runs", description="TensorBoard logs go to log_dir/name/MM-DD_HH-MM")
    log_per_iter: Positive = Field(20, description="log every so many iterations")
    val: bool = Field(True, description="validate during training")
    val_per_epochs: Positive = Field(5, description="validate every so many epochs, and after the last")
    amp: Literal["off", "bf16", "fp16"] = Field("off", description="mixed precision (fp16 scales the loss)")
    channels_last: bool = Field(False, description="channels-last memory layout")
    compile: bool = Field(False, description="compile the model with torch.compile")
    accumulate: Positive = Field(1, description="batches per optimizer step")
    clip_grad_norm: AboveZero | None = Field(None, description="largest gradient norm")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, which is validated and tested",
    )
    profile: bool = Field(False, description="write a profiler trace of a few iterations into log_dir")
    limit_batches: Positive | None = Field(None, description="at most so many batches per epoch, for smoke runs")
    fit: bool = Field(True, description="at the end, fit temperature, presence and threshold into the best model")


class Tester(Section):
    """Where test.py writes, for configs that say so."""

    tensorboard: bool = Field(False, description="also write the test scores as TensorBoard scalars")
    out_dir: str | None = Field(None, description="folder of the results; null: beside the checkpoint")


def _default_type(name: str) -> Callable[[Any], Any]:
    """Return what gives a section its type where only arguments were given: the default one."""
    return lambda value: {"type": name, **value} if isinstance(value, Mapping) else value


def _section_of_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


LossField = Annotated[
    Component,
    # A loss without arguments is written as its bare name, in files old and new.
    PlainSerializer(lambda c: c.model_dump() if c.args else c.type, return_type=dict[str, Any] | str),
]


class Config(Section):
    """One run: model, data, optimisation, prediction and logging."""

    name: str = Field(description="name of the run, part of the save path")
    about: str | None = Field(None, description="free text: paper, command, expected scores, hardware")
    n_gpu: Count = Field(1, description="GPUs to use; 0 is the CPU")
    use_synch_bn: bool = Field(False, description="synchronise batch norm across processes (several GPUs)")
    seed: Seed = Field(0, description="seed of initialisation, data order and augmentation")
    deterministic: bool = Field(False, description="only deterministic algorithms: same run, same bits")
    arch: Component = Field(description="the model")
    train_loader: Component = Field(description="training data")
    val_loader: Component | None = Field(None, description="validation data; absent: train_loader's val_split")
    test_loader: Component | None = Field(None, description="test data; absent: val_loader")
    optimizer: Optimizer = Field(default_factory=Optimizer)
    loss: LossField = Field(default_factory=lambda: Component(type="CrossEntropyLoss2d"), description="the loss")
    aux_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss")
    ignore_index: Label | None = Field(None, description="label of pixels that are ignored; null: the data set's own")
    lr_scheduler: Schedule = Field(default_factory=Schedule)
    predict: Predict = Field(default_factory=Predict)
    trainer: Trainer = Field(default_factory=Trainer)
    tester: Tester = Field(default_factory=Tester)

    # What a user should know about this config although nothing is wrong; the banner of a run prints it.
    _notes: list[str] = PrivateAttr(default_factory=list)

    # Validators that run before run last to first.
    _loss_type = field_validator("loss", mode="before")(_default_type("CrossEntropyLoss2d"))
    _loss_by_name = field_validator("loss", mode="before")(_section_of_name)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not value or "/" in value or "\\" in value or value in (".", "..") or len(value.encode()) > LONGEST_NAME:
            raise ValueError(
                f"the name becomes a folder: give 1 to {LONGEST_NAME} bytes without slashes, and not '.' or '..'"
            )
        return value

    @property
    def notes(self) -> list[str]:
        """What a user should know although nothing is wrong, such as keys that have no effect."""
        return self._notes

    def loader(self, stage: str) -> Component | None:
        """Return the loader of a stage ("train", "val" or "test"): test falls back on val."""
        if stage == "train":
            return self.train_loader
        return self.val_loader if stage == "val" or self.test_loader is None else self.test_loader
