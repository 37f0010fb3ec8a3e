"""Header of a comparison, written before its first run: command, machine, data, settings and notes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.evaluation.paired_bootstrap import ONE_SEED
from graftwerk.experiments.axes import flow, written
from graftwerk.experiments.budget import Budget
from graftwerk.experiments.factors import Ablation
from graftwerk.experiments.method_specs import MethodSpec, settings_not_used
from graftwerk.experiments.pareto import COSTS
from graftwerk.experiments.result_folder import FORMAT
from graftwerk.experiments.tuning import Axes, require_validation
from graftwerk.machine import version_of

CONFIG = "config.yaml"


def comparison_header(
    base: RunConfig,
    entries: Sequence[MethodSpec],
    seeds: Sequence[int],
    augment: Sequence[str] | str | None,
    metric: str | None,
    checked: Mapping[str, Any],
    *,
    prefer: str,
    margin: float | None,
    own: Any,
    axes: Axes,
    budget: Budget | None = None,
    ablation: Ablation | None = None,
    vary: str = "training",
) -> dict[str, Any]:
    """Return the part of `comparison.json` that is known before training.

    Args:
        base: Settings that all runs share; its ``output_dir`` is the comparison's folder.
        entries: The methods.
        seeds: The seeds, each for every method.
        augment: Augmenters as they were given, or None if there are none.
        metric: Name of the metric that decides, or None for the task's own.
        checked: Facts about rows and methods from `jobs`.
        prefer: The cost that the recommendation minimises, one of `pareto.COSTS`.
        margin: Distance in the metric that was given, or None.
        own: The run file's own method, as it is written there.
        axes: Values that are tried for each method, by setting of the training.
        budget: What each method may spend on trials.
        ablation: Axes and cells of an ablation, or None for a comparison of methods.
        vary: One of `arguments.VARY`.

    Raises:
        ConfigError: No rows are held out to compare on, or none to choose among those values; or seeds draw rows of
            their own, and no test rows are common to them.
    """
    if vary == "split" and not checked["rows"].get("test"):
        raise ConfigError(
            "with vary=split each seed has validation rows of its own, and there are no test rows to compare on",
            where="data.test",
            hint="data.test: 500",
        )
    more = [] if vary == "training" else [f"vary={vary}"]
    more += [] if metric is None else ["--metric", metric]
    more += [] if prefer == next(iter(COSTS)) else ["--prefer", prefer]
    more += [] if margin is None else ["--margin", str(margin)]
    words = ablation.words() if ablation else _words(entries, augment, axes, budget)
    return {
        "format": FORMAT,
        "graftwerk": own_version(),
        "command": _command(base, seeds, [*words, *more], ablation),
        "model": base.model,
        "task": base.task.name,
        "metric": metric or checked["main_metric"],
        "confidence": base.evaluation.confidence,
        "seeds": list(seeds),
        "vary": vary,
        "prefer": prefer,
        "machine": checked["machine"],
        "versions": checked["versions"],
        "data": {name: checked[name] for name in ("origin", "fingerprint", "rows", "findings", "summary")},
        "training": base.training.model_dump(mode="json"),
        "notes": [*([] if ablation else settings_not_used(entries, own)), *_notes(base, seeds, checked, axes, budget)],
    }


def _command(base: RunConfig, seeds: Sequence[int], words: Sequence[str], ablation: Ablation | None) -> str:
    config = str(base.output_dir.absolute() / CONFIG)
    listed = f"seeds={','.join(map(str, seeds))}"
    return shlex.join(["graftwerk", "ablate" if ablation else "compare", config, words[0], listed, *words[1:]])


def _words(
    entries: Sequence[MethodSpec], augment: Sequence[str] | str | None, axes: Axes, budget: Budget | None
) -> list[str]:
    """Return the arguments that repeat a comparison of methods."""
    # a method that is compared with and without augmented rows is two entries and was named once
    given = list({id(entry.given): entry.given for entry in entries}.values())
    methods = ",".join(given) if all(isinstance(name, str) for name in given) else flow(given)
    words = [f"methods={methods}"]
    if augment is not None:
        words.append(f"augment={augment if isinstance(augment, str) else ','.join(augment)}")
    words += [f"{name}={written(values)}" for name, values in axes.items()]
    if budget is not None:
        words.append(f"budget={budget.trials if budget.seconds is None else f'{budget.seconds:g}s'}")
    return words


def _notes(
    base: RunConfig, seeds: Sequence[int], checked: Mapping[str, Any], axes: Axes, budget: Budget | None
) -> list[str]:
    notes = []
    require_validation(axes, checked["rows"], budget)
    if not checked["rows"].get("test"):
        if not checked["rows"].get("validation"):
            raise ConfigError("nothing is held out to compare on", where="data.test", hint="data.test: 500")
        chose = "the checkpoints and the settings" if axes or budget else "the checkpoints"
        notes.append(
            f"the validation rows that chose {chose} also make these "
            "metrics, which are a little too good for all methods; data.test holds out rows of their own"
        )
    if len(seeds) == 1:
        notes.append(f"one seed: {ONE_SEED}, so no method is called better; seeds=0,1,2")
    if base.training.learning_rate != "auto":
        notes.append(
            f"all methods were trained at learning rate {base.training.learning_rate:g}, which cannot suit "
            "them all; training.learning_rate=auto takes each method's own"
        )
    grave = [finding["message"] for finding in checked["findings"] if finding.get("grave")]
    return notes + grave


def own_version() -> str:
    """Return the installed version of this package, or "unknown"."""
    return version_of("graftwerk") or "unknown"
