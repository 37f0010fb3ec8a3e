"""Settings under `training:` in a run file; defaults that belong to a method (learning rate) are in its file."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator

from graftwerk.settings import Amount, Name, Settings

Tracker = Literal["tensorboard", "jsonl", "wandb", "mlflow"]


class TrainingSettings(Settings):
    """Settings of the training loop: length, learning rate, batches, checkpoints."""

    # length
    num_train_epochs: float = Field(
        default=3.0,
        gt=0,
        validation_alias=AliasChoices("num_train_epochs", "epochs"),
        description="passes over the data",
    )
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="exact number of optimizer steps, in place of num_train_epochs"
    )

    # rows of a step: per_device_train_batch_size x gradient_accumulation_steps x devices
    per_device_train_batch_size: int = Field(
        default=16,
        ge=1,
        validation_alias=AliasChoices("per_device_train_batch_size", "batch_size"),
        description="rows of a micro-batch on each device",
    )
    per_device_train_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="tokens of a forward pass, padding counted; a step's rows stay the same and are cut into pieces of "
        "similar length; a longer row is alone. none: pieces of per_device_train_batch_size rows",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="micro-batches summed into one optimizer step"
    )
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="rows per forward pass in evaluation; auto: four times those of a micro-batch, at most 64",
    )

    # optimizer and schedule
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        validation_alias=AliasChoices("learning_rate", "lr"),
        description="peak rate; auto: the method's own",
    )
    head_learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="peak rate of the task head; auto: the method's own"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="shape of the decay"
    )
    warmup_ratio: float = Field(
        default=0.06, ge=0, lt=1, description="share of the steps in which the rate rises from zero"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled decay, on matrices only")
    adam_beta1: float = Field(default=0.9, gt=0, lt=1, description="AdamW: decay of the mean of the gradients")
    adam_beta2: float = Field(default=0.999, gt=0, lt=1, description="AdamW: decay of the mean of their squares")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW: added to the root of that mean")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="clip the global gradient norm; null: never")

    # loss
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each target that is spread over all labels"
    )
    class_weights: Literal["balanced"] | dict[Name, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="classification: weight of a row of each class in the training loss; balanced: the inverse of "
        "the class frequency; classes that are not named have weight 1",
    )

    # batches, memory and speed
    length_group: bool = Field(
        default=True, description="batch rows of similar length, so that there is little padding"
    )
    packing: bool = Field(
        default=False,
        description="several rows in one of at most data.max_length tokens, none of which sees another: no padding",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, more time"
    )
    compile: bool = Field(
        default=False,
        description="torch.compile: the layers run as compiled graphs in training; the first step takes a minute or "
        "more, and hidden states of frozen layers are not cached",
    )

    # cache of the hidden states of frozen layers
    trunk_cache: Literal["auto"] | bool = Field(
        default="auto",
        description="compute the frozen layers below the lowest adapted one once, and reuse their hidden states in "
        "later epochs. auto: if rows are trained on more than once and stay the same, and these layers have no "
        "dropout; true: with dropout as well, which is then off",
    )
    trunk_cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="type in which hidden states are cached; the 16-bit types halve the memory"
    )
    trunk_cache_gb: float | None = Field(
        default=None,
        ge=0,
        description="gigabytes of hidden states in memory; more goes into a file. null: a quarter of the free memory",
    )
    trunk_cache_disk_gb: float = Field(
        default=20.0, ge=0, description="gigabytes of hidden states in files; more are computed again at every step"
    )
    trunk_cache_dir: str | None = Field(
        default=None,
        description="folder where hidden states stay for other runs on the same rows and layers, within "
        "trunk_cache_disk_gb; null: removed when the run ends (a comparison shares them among its runs)",
    )

    # hardware
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="processes that share each step's rows on a CPU, each with its part of the cores. auto: one "
        "for every 8 rows of a step, at most one per core, if the model is not tiny and memory holds them; "
        "GRAFTWERK_PROCESSES sets it for all runs",
    )
    compute_type: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the type that is fast on this hardware, found by a short probe"
    )
    check_memory: bool = Field(
        default=True,
        description="refuse, before the model is loaded, a run that cannot fit into the memory that is available; "
        "false: train all the same",
    )

    # start, and what is to be retained
    warm_start: str | None = Field(
        default=None,
        description="a run, checkpoint or adapter folder of the same method whose weights training starts from",
    )
    new_head: bool = Field(
        default=False,
        description="with warm_start: take the method's weights alone, and begin with a head for this run's own labels",
    )
    retain: RetainSettings | None = Field(
        default=None, description="strategies against forgetting what evaluation.retained names"
    )
    seed: int = Field(default=0, ge=0, description="of initialisation, row order and dropout")

    # evaluation and checkpoints
    eval_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="steps from one evaluation to the next; none: every epoch"
    )
    save_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="steps from one checkpoint to the next; none: with every evaluation"
    )
    save_total_limit: int = Field(default=2, ge=1, description="newest checkpoints to store, beside the best one")
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="evaluations without a better one after which training stops"
    )
    load_best: bool = Field(default=True, description="save the best evaluated state as the adapter, not the last")
    metric_for_best: str | None = Field(default=None, description="none: the task's own; `loss` is smaller-is-better")

    # health and logging
    max_bad_steps: int = Field(
        default=5, ge=0, description="steps with a non-finite loss or gradient that are skipped before stopping"
    )
    logging_steps: int = Field(default=10, ge=1, description="steps whose mean loss is logged together")
    report_to: tuple[Tracker, ...] = Field(
        default=("jsonl", "tensorboard"),
        description="destinations of metrics as they happen",
    )

    def global_batch_size(self, devices: int = 1) -> int:
        """Return the rows of one optimizer step: micro-batch x accumulation x devices.

        Args:
            devices: Devices that take a micro-batch each. Forked processes of a CPU share one device's rows.

        Example:
            >>> TrainingSettings(per_device_train_batch_size=8, gradient_accumulation_steps=2).global_batch_size()
            16
        """
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * devices

    @property
    def max_micro_batch_size(self) -> int:
        """Most rows of a device's micro-batch: all of the step's where `per_device_train_tokens` is the bound."""
        return self.per_device_train_batch_size if self.per_device_train_tokens is None else self.global_batch_size()

    @property
    def eval_batch_size(self) -> int:
        """Rows per forward pass in evaluation; ``auto``: four times the largest possible micro-batch, at most 64.

        Evaluation keeps no activations for a backward pass, so that more rows fit. With `per_device_train_tokens` a
        micro-batch may hold all rows of a step.
        """
        if self.per_device_eval_batch_size != "auto":
            return self.per_device_eval_batch_size
        return min(64, 4 * self.max_micro_batch_size)

    def micro_batch_overrides(self, rows: int) -> dict[str, int]:
        """Return the overrides of a run file that compute the same step in micro-batches of so many rows."""
        return {
            "training.per_device_train_batch_size": rows,
            "training.gradient_accumulation_steps": self.global_batch_size() // rows,
        }

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole training."""
        return self.max_steps or math.ceil(self.num_train_epochs * steps_per_epoch)


class ReplaySettings(Settings):
    """Kept rows, trained on beside the run's own."""

    share: float = Field(default=0.25, gt=0, le=4, description="kept rows of a step, as a share of the run's own rows")
    rows: int = Field(default=500, ge=1, description="most rows that are kept of each entry")
    weight: float = Field(default=1.0, gt=0, description="of their loss, beside the run's own")


class DistillationSettings(Settings):
    """Answers to the run's own rows, kept as they were."""

    weight: float = Field(default=1.0, gt=0, description="of the divergence, beside the run's own loss")
    temperature: float = Field(default=2.0, gt=0, description="scores are divided by it, on both sides")
    teacher: Literal["auto", "start", "base"] = Field(
        default="auto",
        description="of a model of text: start, the model as this run found it; base, with the adapter switched off; "
        "auto: start after a training.warm_start, else base. Heads of earlier runs answer on the start always",
    )


class ConsolidationSettings(Settings):
    """Elastic weight consolidation."""

    weight: float = Field(default=1.0, gt=0, description="of the penalty; 1: the estimated rise of the kept rows' loss")
    rows: int = Field(default=200, ge=1, description="training rows of each entry that the Fisher information is from")


class SelfReplaySettings(ReplaySettings):
    """Texts that the base writes, trained on beside the run's own rows."""

    rows: int = Field(default=200, ge=1, description="texts that the base writes before the first step")
    max_new_tokens: int = Field(default=48, ge=1, description="longest text in tokens")


class RetainedStopSettings(Settings):
    """Training ends once too much is lost of what is to be retained."""

    within: Amount = Field(
        default="2 points", description="most that an entry may lose, on rows that are not those it is measured on"
    )
    rows: int = Field(default=500, ge=1, description="most rows of each entry that are looked at in each evaluation")


class RetainSettings(Settings):
    """Strategies against forgetting what `evaluation.retained` names; they combine."""

    replay: ReplaySettings | None = Field(default=None, description="train on kept rows too; a number is the share")
    self_replay: SelfReplaySettings | None = Field(
        default=None, description="train on texts that the base writes itself; a number is the share"
    )
    distillation: DistillationSettings | None = Field(
        default=None, description="keep the answers that the model gave to the run's own rows; a number is the weight"
    )
    consolidation: ConsolidationSettings | None = Field(
        default=None, description="hold weights that matter near their start (EWC); a number is the weight"
    )
    early_stopping: RetainedStopSettings | None = Field(
        default=None,
        description="end the training once more is lost than an amount, and save the best step before; `2 points` or "
        "`5 %` is the amount",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _amount(cls, value: Any, info: ValidationInfo) -> Any:
        """A number alone stands for the main setting, `true` for the defaults."""
        if isinstance(value, bool):
            return {} if value else None
        name = str(info.field_name)
        main = "within" if name == "early_stopping" else "share" if name.endswith("replay") else "weight"
        alone = isinstance(value, int | float) or (main == "within" and isinstance(value, str))
        return {main: value} if alone else value

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError(f"name a strategy: {', '.join(type(self).model_fields)}; or leave `retain` out")
        return self


TrainingSettings.model_rebuild()  # `retain` names a class below
