"""The plan of a sequence: from its file to the settings of each run.

A sequence's file is a run file with `tasks` in place of `task` and `data`, and perhaps `variants`:

    tasks:
      kinds: {task: classification, data: {...}}        # any keys of a run file, over the common ones
      films: {task: classification, data: {...}}
    variants:                                           # ways of learning them; default: the run file's method alone
      lora: {}
      replay: {training: {retain: {replay: 0.25}}}
      apart: {adapters: each}                           # a new adapter for each task
      full: {method: full}
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from graftwerk.absolute_paths import with_absolute_paths
from graftwerk.config import RunConfig, full_key
from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.modeling.adapter_slots import check_name
from graftwerk.sanitize import redacted
from graftwerk.yaml_files import read_yaml

ADAPTERS = ("one", "each")


@dataclass(frozen=True)
class Variant:
    """One way of learning the tasks.

    Attributes:
        name: Its name.
        changes: Keys of the run file in place of the common ones and those of the tasks.
        adapters: ``one`` that goes on from task to task, or ``each`` task with a new one.
    """

    name: str
    changes: Mapping[str, Any]
    adapters: Literal["one", "each"]


@dataclass(frozen=True)
class Plan:
    """All runs of a sequence.

    Attributes:
        common: Keys of the run file that all tasks share.
        tasks: Keys of each task, by name, in order.
        variants: The ways of learning them.
        folder: Folder of the sequence.
    """

    common: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    variants: tuple[Variant, ...]
    folder: Path

    def dump(self) -> str:
        """Return the file of the sequence with absolute paths, by which it can be repeated from anywhere."""
        variants = {
            each.name: {
                **with_absolute_paths(each.changes),
                **({"adapters": "each"} if each.adapters == "each" else {}),
            }
            for each in self.variants
        }
        tree = {
            **with_absolute_paths(self.common),
            "tasks": {name: with_absolute_paths(each) for name, each in self.tasks.items()},
            "variants": variants,
            "output_dir": f"{self.folder.absolute()}-repeated",
        }
        text: str = yaml.safe_dump(redacted(tree), sort_keys=False, allow_unicode=True)
        return text

    def folder_of(self, variant: Variant, seed: int, place: int) -> Path:
        """Return the folder of the run that learns a task, counted from 0."""
        return self.folder / f"{variant.name}-seed{seed}" / f"{place + 1}-{[*self.tasks][place]}"

    def config_of(self, variant: Variant, seed: int, place: int) -> RunConfig:
        """Return the settings of one run.

        Raises:
            ConfigError: Settings are wrong; the message names the task and the variant.
        """
        names = [*self.tasks]
        tree = merged(merged(self.common, self.tasks[names[place]]), variant.changes)
        training, evaluation = dict(tree.get("training") or {}), dict(tree.get("evaluation") or {})
        training["seed"] = seed
        bound = evaluation.pop("max_forgetting", None)  # refused where nothing is retained
        own = RunConfig.build(
            {**tree, "training": {**training, "retain": None}, "evaluation": evaluation}
        ).evaluation.retained
        earlier = range(place) if variant.adapters == "one" else range(0)
        evaluation["retained"] = {
            **{name: entry.model_dump(mode="json") for name, entry in own.items()},
            **{
                names[at]: {"run": str(self.folder_of(variant, seed, at).absolute()), "max_rows": None}
                for at in earlier
            },
        }
        if not evaluation["retained"]:
            training["retain"] = None  # nothing was learnt yet
        elif bound is not None:
            evaluation["max_forgetting"] = bound
        if earlier:
            training |= {"warm_start": str(self.folder_of(variant, seed, place - 1).absolute()), "new_head": True}
        output = str(self.folder_of(variant, seed, place))
        where = f"tasks.{names[place]}, variant `{variant.name}`"
        return RunConfig.build(
            {**tree, "training": training, "evaluation": evaluation, "output_dir": output}, where=where
        ).anchored()


def read_plan(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], chosen: list[str] | None = None
) -> Plan:
    """Read the file of a sequence.

    Args:
        config: The file, or its content.
        overrides: Settings of the run file by dotted key, for all tasks and variants.
        chosen: Names of the variants to take, or None for all.

    Raises:
        ConfigError: Keys are missing or wrong.
    """
    tree = dict(config) if isinstance(config, Mapping) else read_yaml(Path(config))
    tasks, variants = tree.pop("tasks", None), tree.pop("variants", None)
    if (
        not isinstance(tasks, Mapping)
        or len(tasks) < 2
        or not all(isinstance(each, Mapping) for each in tasks.values())
    ):
        raise ConfigError(
            "a sequence has two tasks or more, by name",
            where="tasks",
            hint="tasks: {kinds: {data: {train: kinds.csv}}, films: {data: {train: films.csv}}}",
        )
    for name in tasks:
        check_name(str(name))
    tree, given = _with_overrides(tree, overrides), variants if isinstance(variants, Mapping) else {}
    _check_part("sequence", tree)
    for kind, named in (("tasks", tasks), ("variants", given)):
        for name, part in named.items():
            _check_part(f"{kind}.{name}", part or {})
    tasks = {name: _without(part, overrides) for name, part in tasks.items()}
    found = _variants({name: _without(part or {}, overrides) for name, part in given.items()} or variants, tree)
    if chosen is not None:
        known = {variant.name: variant for variant in found}
        for name in chosen:
            if name not in known:
                raise ConfigError(
                    f"there is no variant `{name}`",
                    where="variants",
                    hint=did_you_mean(name, known, f"There are: {', '.join(known)}"),
                )
        found = [known[name] for name in chosen]
    folder = Path(str(tree.pop("output_dir", "runs/sequence")))
    named = {str(name): dict(each) for name, each in tasks.items()}
    return Plan(tree, named, tuple(found), folder)


def _with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the common keys with overrides, `learning_rate` standing for `training.learning_rate` as in a run file."""
    for dotted, value in overrides.items():
        *parents, last = full_key(dotted)
        if [*parents, last] == ["training", "seed"]:
            raise ConfigError("a sequence has several seeds", where="training.seed", hint="seeds=0,1,2")
        change: dict[str, Any] = {last: value}
        for parent in reversed(parents):
            change = {parent: change}
        tree = merged(tree, change)
    return dict(tree)


def _check_part(where: str, part: Any) -> None:
    """Raise if the common keys, or those of a task or variant, are no settings of a run or belong to the sequence."""
    if not isinstance(part, Mapping):
        raise ConfigError(
            f"`{where}` is settings by name, not `{part}`", where=where, hint=f"{where}: {{method: lora}}"
        )
    for key in ("training", "evaluation"):
        if not isinstance(part.get(key) or {}, Mapping):
            raise ConfigError(
                f"`{key}` is settings by name, not `{part[key]}`", where=where, hint=f"{key}: {{seed: 1}}"
            )
    for key in ("warm_start", "new_head"):
        if key in (part.get("training") or {}):
            raise ConfigError(f"`training.{key}` is set by the sequence itself", where=where, hint="leave it out")


def _without(part: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a task or variant without those that are overridden for all."""
    left = copy.deepcopy(dict(part))
    for dotted in overrides:
        *parents, last = full_key(dotted)
        inside: Any = left
        for parent in parents:
            inside = inside.get(parent) if isinstance(inside, Mapping) else None
        if isinstance(inside, dict):
            inside.pop(last, None)
    return left


def _variants(given: Any, tree: Mapping[str, Any]) -> list[Variant]:
    if given is None:
        method = tree.get("method")
        name = str(method.get("name") if isinstance(method, Mapping) else method)
        given = {name: {}}
    if not isinstance(given, Mapping) or not given:
        raise ConfigError("variants have names", where="variants", hint="variants: {lora: {}, full: {method: full}}")
    found = []
    for name, changes in given.items():
        check_name(str(name))
        keys = dict(changes or {})
        adapters = keys.pop("adapters", "one")
        if adapters not in ADAPTERS:
            raise ConfigError(
                f"`adapters: {adapters}` is unknown", where=f"variants.{name}", hint=f"there are: {', '.join(ADAPTERS)}"
            )
        if adapters == "each" and (keys.get("training") or {}).get("retain"):
            raise ConfigError(
                "tasks with an adapter each forget nothing, so `training.retain` would do nothing",
                where=f"variants.{name}",
                hint="leave it out, or `adapters: each`",
            )
        found.append(Variant(str(name), keys, adapters))
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others in place of them; mappings are merged, a method or task that is named anew is not.

    Example:
        >>> merged({"training": {"seed": 0}, "method": {"name": "lora", "r": 4}}, {"method": "full"})
        {'training': {'seed': 0}, 'method': 'full'}
        >>> merged({"training": {"seed": 0}}, {"training": {"max_steps": 5}})
        {'training': {'seed': 0, 'max_steps': 5}}
    """
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        whole = isinstance(value, Mapping) and "name" in value
        both = isinstance(value, Mapping) and isinstance(before, Mapping) and not whole
        result[key] = merged(before, value) if both else value  # type: ignore[arg-type]
    return result
