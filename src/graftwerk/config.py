"""The run file: composed from each part's settings, with `key=value` overrides and every error reported.

A run file is YAML with the keys of :class:`RunConfig`. Reading it never runs anything: tags, aliases that multiply
and deep nesting are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from graftwerk.absolute_paths import with_absolute_paths
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError
from graftwerk.evaluation.settings import SAMPLING, EvaluationSettings
from graftwerk.methods.base import Method
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.models.cache import recall, remember
from graftwerk.models.quantization import Quantization
from graftwerk.sanitize import REDACTED, redact, redacted, strings_in
from graftwerk.settings import Settings, describe_faults, known_keys, spellings
from graftwerk.tasks.base import Task
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.multitask import Multitask
from graftwerk.tasks.registry import TASKS, build_multitask, parse_task
from graftwerk.training.settings import TrainingSettings
from graftwerk.yaml_files import parse_override_value, parse_yaml, read_yaml

SECRETS = "secrets"
"""The file of the cache that holds what run files must not; readable to its owner alone."""


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
        """Refuse a method that trains weights which are codes, before anything is read or loaded."""
        if self.quantization is not None and self.method.kind == "weights":
            raise ValueError(
                f"`method: {self.method.name}` trains the base's own weights, and `quantization: "
                f"{self.quantization.name}` stores them as codes, which have no gradient; use lora, or leave "
                f"`quantization` out"
            )
        return self

    @model_validator(mode="after")
    def _check_retain(self) -> Self:
        """Refuse strategies that have nothing to retain, and a new head of nothing."""
        retain, training = self.training.retain, self.training
        if retain is not None and not self.evaluation.retained and (retain.replay or retain.consolidation):
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

    @property
    def compute_type(self) -> str:
        """The compute type that is asked for: weights of 16 bits are multiplied in their own type."""
        own = self.training.compute_type
        return self.model_dtype if own == "auto" and self.model_dtype not in ("auto", "float32") else own

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

        Args:
            config: As for `of`.

        Raises:
            ConfigError: The file cannot be read.
        """
        if isinstance(config, RunConfig):
            return config.model_dump(mode="json"), None
        return (
            (dict(config), None)
            if isinstance(config, Mapping)
            else (_with_secrets(read_yaml(Path(config))), str(config))
        )

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
            _apply_override(content, key, value)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise to_config_error(error, content, where) from None

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
        for secret in strings_in(tree):
            if redact(secret) != secret:
                remember(SECRETS, redact(secret), secret)
        tree = redacted(tree)
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


def _with_secrets(tree: Any) -> Any:
    """Restore the secrets that `RunConfig.dump` replaced, if this user's cache has them."""
    if isinstance(tree, dict):
        return {key: _with_secrets(inner) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [_with_secrets(inner) for inner in tree]
    known = recall(SECRETS, tree) if isinstance(tree, str) and REDACTED in tree else None
    return known if isinstance(known, str) else tree


def parse_overrides(overrides: list[str] | dict[str, Any] | None) -> dict[str, Any]:
    """Parse overrides of a run file.

    Args:
        overrides: ``["training.seed=1"]``, each value YAML; or a mapping, which is returned as it is; or None.

    Returns:
        Values by dotted key.

    Raises:
        ConfigError: An item is not of the form key=value, its value is not YAML, or two items set the same key.
    """
    if overrides is None:
        return {}
    if isinstance(overrides, dict):
        return overrides
    parsed = {}
    seen: dict[tuple[str, ...], str] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{item}` is not of the form key=value", hint="for instance training.seed=1")
        try:
            parsed_value = parse_override_value(value, key)
        except ConfigError as error:
            raise ConfigError(f"the value of `{key}` is not YAML: {value[:200]} ({error.what[:200]})") from None
        keys = tuple(full_key(key.strip()))
        if keys in seen:
            raise ConfigError(f"`{seen[keys]}` and `{item}` both set `{'.'.join(keys)}`", hint="give one of them")
        seen[keys] = item
        parsed[key.strip()] = parsed_value
    return parsed


def _apply_override(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = full_key(dotted)
    node = tree
    for key in parents:
        child = node.get(key)
        if key in ("method", "task", "quantization") and isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"`{key}` has no keys of its own, so `{dotted}` cannot be set", where=dotted)
        node[key] = child
        node = child
    model = _settings_at(parents, tree)
    for spelling in spellings(model, last) if model is not None else ():
        node.pop(spelling, None)  # in place of what the file says, however it is spelled there
    node[last] = value


def _settings_at(keys: Iterable[Any], tree: Any) -> type[Settings] | None:
    """Return the settings class at some keys of a run file, or None if those keys hold no settings.

    Args:
        keys: The keys, outermost first.
        tree: Content of the run file, whose `name` tells which method or task has the settings.
    """
    model: type[Settings] = RunConfig
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        found: Any = None
        if model is RunConfig and key in ("method", "task"):
            name = str(tree.get("name")) if isinstance(tree, Mapping) else str(tree)
            found = TASKS.get(name) if key == "task" else METHODS.get(str(SHORTHANDS.get(name, {"name": name})["name"]))
        elif (field := model.model_fields.get(key)) is not None:
            found = next((part for part in get_args(field.annotation) if part is not NoneType), field.annotation)
        if not (isinstance(found, type) and issubclass(found, Settings)):
            return None
        model = found
    return model


def full_key(dotted: str) -> list[str]:
    """Split a dotted key and complete it: `learning_rate` means `training.learning_rate`."""
    keys = dotted.split(".")
    if len(keys) == 1 and keys[0] not in RunConfig.model_fields:
        if keys[0] in known_keys(TrainingSettings):
            return ["training", keys[0]]
        if keys[0] in known_keys(DataSettings):
            return ["data", keys[0]]
    return keys


def to_config_error(error: ValidationError, tree: Mapping[str, Any], where: str | None) -> ConfigError:
    """Convert a pydantic error: each key, what is wrong with it, and the nearest valid one.

    Args:
        error: The error.
        tree: Content of the run file.
        where: The run file, for the message.
    """
    parts = (("evaluation", EvaluationSettings), ("data", DataSettings), ("training", TrainingSettings))
    homes = {key: f"{part}.{key}" for part, model in parts for key in known_keys(model)}
    lines = describe_faults(error, lambda keys: _keys_at(keys, tree), homes=homes)
    return ConfigError("; ".join(lines), where=where, hint="`graftwerk schema` lists every key with its meaning")


def _keys_at(keys: tuple[Any, ...], tree: Mapping[str, Any]) -> set[str]:
    if not keys:  # where `learning_rate` is understood too
        return known_keys(RunConfig) | known_keys(TrainingSettings) | known_keys(DataSettings)
    model = _settings_at(keys, tree)
    return known_keys(model) if model is not None else set()
