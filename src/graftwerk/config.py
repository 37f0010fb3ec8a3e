"""The run file: composed of the settings of each part, checked as a whole, loaded and saved.

A run file is YAML with the keys of :class:`RunConfig`. Reading it never runs anything: tags, aliases that multiply
and deep nesting are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from graftwerk.absolute_paths import with_absolute_paths
from graftwerk.config_keys import apply_override, full_key, parse_overrides, to_config_error
from graftwerk.config_secrets import hide_secrets, restore_secrets
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError
from graftwerk.evaluation.settings import SAMPLING, EvaluationSettings
from graftwerk.methods.base import Method
from graftwerk.methods.registry import parse_method
from graftwerk.models.quantization import Quantization
from graftwerk.settings import Settings
from graftwerk.tasks.base import Task
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.multitask import Multitask
from graftwerk.tasks.registry import build_multitask, parse_task
from graftwerk.training.settings import TrainingSettings
from graftwerk.yaml_files import parse_yaml, read_yaml

__all__ = ["RunConfig", "full_key", "parse_overrides"]


class RunConfig(Settings):
    """Everything a run depends on. `config.yaml` in a run folder holds it, with every default written out.

    Example:
        >>> from graftwerk import RunConfig
        >>> tree = {"model": "some/model", "data": {"train": "reviews.csv"}, "method": "lora"}
        >>> config = RunConfig.build(tree, ["method.r=16", "training.seed=1"])
        >>> config.method.r, config.training.seed, config.task.name
        (16, 1, 'classification')
        >>> RunConfig.build(tree, ["training.learn_rate=0.1"])
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: unknown key `training.learn_rate`; did you mean `learning_rate`?
        ...
    """

    model: str = Field(description="hub id, folder, .gguf file, or pkg://package/folder")
    revision: str | None = Field(default=None, description="for a hub id: branch, tag or commit")
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="type that the base's weights are loaded in; what is trained is float32. auto: the compute type on "
        "an accelerator; float32 on a CPU, and wherever the base itself is trained or numbers are learnt",
    )
    quantization: Quantization | None = Field(
        default=None,
        description="bits of the base's linear layers: nf4 or int8, or settings with `name`; adapters stay in float32",
    )
    task: Task = Field(
        default_factory=Classification, description="what is learnt: a task's name, or its settings with `name`"
    )
    data: DataSettings
    method: Method = Field(description="a method's name, or its settings with `name`")
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    output_dir: Path = Field(default=Path("runs/run"), description="the run folder")

    # -- loading and saving --------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> RunConfig:
        """Read a run file and apply overrides.

        Args:
            path: A YAML file.
            overrides: ``["training.seed=1", "method.r=16"]``, or a mapping with the same dotted keys. A value is YAML.

        Raises:
            ConfigError: The file cannot be read, or a key or value is wrong; the message names the nearest valid key.
        """
        tree, where = cls.content(path)
        return cls.build(tree, overrides, where=where)

    @staticmethod
    def content(config: RunConfig | str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Return the content of a run file as plain values, and the file it is from, None if it is from none.

        Raises:
            ConfigError: The file cannot be read.
        """
        if isinstance(config, RunConfig):
            return config.model_dump(mode="json"), None
        if isinstance(config, Mapping):
            return dict(config), None
        return restore_secrets(read_yaml(Path(config))), str(config)

    @classmethod
    def of(
        cls, config: RunConfig | str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """Return the settings in a run file, in the content of one, or given as they are, with overrides applied.

        Args:
            config: A run file, its content as a mapping, or a `RunConfig`.
            overrides: As for `load`.

        Raises:
            ConfigError: As for `load`.
        """
        if isinstance(config, RunConfig) and not overrides:
            return config
        tree, where = cls.content(config)
        return cls.build(tree, dict(overrides or {}), where=where)

    @classmethod
    def build(
        cls, tree: Mapping[str, Any], overrides: list[str] | dict[str, Any] | None = None, *, where: str | None = None
    ) -> RunConfig:
        """Build a run's settings from the content of a run file; the caller's mapping is not changed.

        Args:
            tree: Content of a run file.
            overrides: As for `load`.
            where: File that the content is from, for messages.

        Raises:
            ConfigError: A key or value is wrong; the message names the nearest valid key.
        """
        content = copy.deepcopy(dict(tree))
        for key, value in parse_overrides(overrides).items():
            apply_override(content, key, value, cls)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise to_config_error(error, content, where, cls) from None

    def anchored(self) -> RunConfig:
        """Return the run with absolute paths; `output_dir` stays as given."""
        tree = self.model_dump(mode="json")
        absolute = with_absolute_paths(tree)
        return self if absolute == tree else RunConfig.model_validate(absolute)

    def dump(self) -> str:
        """Return the resolved run file as YAML, with every default and with absolute paths.

        Secrets are replaced by placeholders and stored in this user's cache: `load` restores them here, and nobody
        else gets them with the run folder.

        Raises:
            ConfigError: With its defaults it is larger than what `load` reads.
        """
        tree = {**with_absolute_paths(self.model_dump(mode="json")), "output_dir": str(self.output_dir.absolute())}
        tree = hide_secrets(tree)
        text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        try:
            again = parse_yaml(text.encode(), "config.yaml")
        except ConfigError as error:
            raise ConfigError(
                f"the run file with every default written out could not be read again: {error.what}",
                hint="move long lists into data files, or shorten them",
            ) from None
        if again != tree:
            raise ConfigError("a text of the run file has characters that YAML does not give back")
        return text

    @property
    def compute_type(self) -> str:
        """The compute type that is asked for: weights of 16 bits are multiplied in their own type."""
        own = self.training.compute_type
        return self.model_dtype if own == "auto" and self.model_dtype not in ("auto", "float32") else own

    # -- parts by name, and what fits together -------------------------------------------------------------------------

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: Any) -> Task:
        return parse_task(value)

    @field_serializer("task")
    def _dump_task(self, task: Task) -> dict[str, Any]:
        return task.to_dict()

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        return parse_method(value)

    @field_serializer("method")
    def _dump_method(self, method: Method) -> dict[str, Any]:
        return method.to_dict()

    @model_validator(mode="after")
    def _compose_multitask(self) -> Self:
        """Compose the task from those of several data sets, unless a resolved run file has it already."""
        if self.data.sets and not isinstance(self.task, Multitask):
            object.__setattr__(self, "task", build_multitask(self.task, self.data.sets))  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        """Refuse a method that trains quantized weights, and QERA initialization without nf4 or with streamed rows."""
        if self.quantization is not None and self.method.kind == "weights":
            raise ValueError(
                f"`method: {self.method.name}` trains the base's own weights, and `quantization: "
                f"{self.quantization.name}` stores them as codes, which have no gradient; use lora, or leave "
                f"`quantization` out"
            )
        if self.method.starts_from_errors:
            if self.quantization is None or self.quantization.name != "nf4":
                raise ValueError(
                    "`init_lora_weights: qera` corrects the errors of 4-bit weights; use it with `quantization: nf4`"
                )
            if self.data.streaming and self.training.warm_start is None:
                raise ValueError(
                    "`init_lora_weights: qera` needs training rows before the first step, which `data.streaming` does "
                    "not keep in memory; use one or the other"
                )
        return self

    @model_validator(mode="after")
    def _check_retain(self) -> Self:
        """Refuse strategies that have nothing to retain, and a new head of nothing."""
        retain, training = self.training.retain, self.training
        needs = retain is not None and (retain.replay or retain.consolidation or retain.early_stopping)
        if needs and not self.evaluation.retained:
            raise ValueError("`training.retain` keeps what `evaluation.retained` names: give `retained: general`")
        if training.new_head and training.warm_start is None:
            raise ValueError("`training.new_head` leaves the head of `training.warm_start` out; give both, or neither")
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        """Refuse settings of sampling that would do nothing in a run."""
        changed = self.evaluation.model_fields_set & set(SAMPLING)
        default = EvaluationSettings()
        named = sorted(name for name in changed if getattr(self.evaluation, name) != getattr(default, name))
        if named and not self.task.generates:
            raise ValueError(
                f"`evaluation.{named[0]}` does nothing for {self.task.name}: nothing is written; leave it out"
            )
        if self.evaluation.num_return_sequences > 1:
            raise ValueError(
                "`evaluation.num_return_sequences`: a run measures one answer to a row; `graftwerk predict RUN"
                " --set num_return_sequences=3` gives several"
            )
        return self
