"""`recommend`: methods ranked for a model, rows, memory and an aim, with reasons, sources, plan and command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, GraftwerkError, ModelError, ResourceError, did_you_mean
from graftwerk.experiments.preflight import preflight
from graftwerk.experiments.recommendation.evidence import Evidence, find_evidence
from graftwerk.experiments.recommendation.rules import AIMS, CANDIDATES, RULES, epochs_for, settings_of
from graftwerk.formatting import byte_size
from graftwerk.methods.learning_rates import default_learning_rates

PLANNED = {
    "memory": (("memory", "train_peak_bytes"), "least memory in training"),
    "speed": (("time", "step_seconds"), "shortest step"),
    "size": (("adapter_bytes",), "smallest adapter"),
}
"""Figure of the plan that an aim looks at, and what its smallest value is called."""
PLAN_POINTS = 3.0
"""Points of the smallest of these figures; the largest gets none, the others what their rank says."""
PLANS = 6
"""Candidates that are planned, the best by the rules; a plan takes seconds."""
UNKNOWN = (
    "the rules come from few benchmarks, most of them with one seed; only a comparison on these rows tells",
    "times are from counts and a short probe of this machine, and may be off by a factor of two",
    "latency is not planned; `graftwerk compare` measures it",
)


@dataclass
class Candidate:
    """One method, as it is ranked.

    Attributes:
        label: Its name in the table of candidates.
        config: The run with it.
        changes: Settings in place of the run file's, by key, as on the command line.
        reasons: Points, reason and source, each.
        plan: What the planner says, or None if it was not asked, or could not.
        missing: Why it cannot be used, or "".
    """

    label: str
    config: RunConfig
    changes: dict[str, Any]
    reasons: list[tuple[float, str, str]] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    missing: str = ""

    @property
    def points(self) -> float:
        """Return the sum of the points."""
        return sum(points for points, _, _ in self.reasons)


def recommend(
    config: RunConfig | str | Path | Mapping[str, Any],
    aim: str = "quality",
    *,
    memory: int | None = None,
    runs: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Rank methods for a run: no weight is loaded, nothing is trained.

    Args:
        config: A run file, its content, or a `RunConfig`; its method is not used.
        aim: One of `rules.AIMS`.
        memory: Bytes that training may take. Default: what this machine has.
        runs: Folder under which finished comparisons and searches are looked for. Default: that of `output_dir`.
        say: Called with what is being done.

    Returns:
        ``aim``, ``case`` (``parameters``, ``rows``, ``task``, ``memory_bytes``), ``ranked`` (each with ``method``,
        ``label``, ``settings``, ``reasons``, ``points``, ``plan``, ``command``), ``left_out`` (with the reason),
        ``unknown``.

    Raises:
        ConfigError: There is no such aim.
        ResourceError: No method fits into the memory.
        DataError, ModelError: The rows or the model cannot be read.

    Example:
        >>> from graftwerk import recommend
        >>> recommend({"model": "some/model", "data": {"train": "reviews.csv"}}, aim="memroy")
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: there is no aim `memroy`
        ...
    """
    from graftwerk.models.load import load_config
    from graftwerk.training.planning.plan import Planner

    if aim not in AIMS:
        raise ConfigError(f"there is no aim `{aim}`", where="--aim", hint=did_you_mean(aim, AIMS, ", ".join(AIMS)))
    given = str(config) if isinstance(config, str | Path) else "run.yaml"
    base = RunConfig.of(config).anchored()
    say("reading the rows")
    with_lora = RunConfig.build(base.model_dump(mode="json"), {"method": "lora"})
    # what fits is for the plans to say, and for the memory that was asked about
    facts = preflight(RunConfig.build(with_lora.model_dump(mode="json"), {"training.check_memory": False}))
    parameters, rows = facts["parameters"]["total"], facts["data"]["rows"]["train"]
    architecture = load_config(base.model, base.revision)
    depth = int(getattr(architecture, "num_hidden_layers", 0) or 6)
    folder = Path(runs) if runs is not None else base.output_dir.parent
    evidence = find_evidence(folder, base.model, base.task.name, facts["data"]["fingerprint"], depth)
    candidates = [
        _candidate(label, base, aim, depth, evidence, parameters=parameters, rows=rows) for label in CANDIDATES
    ]
    candidates.sort(key=lambda candidate: -candidate.points)
    planner = Planner(with_lora)
    for candidate in candidates:
        planned = sum(one.plan is not None and not one.missing for one in candidates)
        if planned < PLANS and not candidate.missing:
            say(f"planning {candidate.label}")
            _plan(candidate, planner, memory)
    left_out = [candidate for candidate in candidates if candidate.missing]
    usable = [candidate for candidate in candidates if not candidate.missing]
    if not usable:
        needed = [
            (candidate.plan["memory"]["train_peak_bytes"], candidate.label) for candidate in left_out if candidate.plan
        ]
        least = f": {min(needed)[1]}, the smallest, needs {byte_size(min(needed)[0])}" if needed else ""
        limit = f" into {byte_size(memory)}" if memory is not None else ""
        raise ResourceError(
            f"no method fits{limit}{least}",
            where="--memory",
            hint="a smaller model, or shorter rows (data.max_length=64)",
        )
    if aim in PLANNED:
        _sharpen([candidate for candidate in usable if candidate.plan is not None], aim)
    ranked = sorted(usable, key=lambda candidate: (candidate.plan is None, -candidate.points))
    notes = [f"no comparison of this task was found under {folder}"] if not evidence.files else []
    return {
        "aim": aim,
        "case": {"model": base.model, "task": base.task.name, "parameters": parameters, "rows": rows,
                 "memory_bytes": memory, "layers": depth},
        "ranked": [_described(candidate, given) for candidate in ranked],
        "left_out": [{"label": one.label, "reason": one.missing} for one in left_out],
        "unknown": [*notes, *evidence.notes, *UNKNOWN],
    }  # fmt: skip


def _candidate(
    label: str, base: RunConfig, aim: str, depth: int, evidence: Evidence, *, parameters: int, rows: int
) -> Candidate:
    """Return a candidate with its settings and the points of rules and measurements."""
    settings = settings_of(label, depth)
    changes: dict[str, Any] = {"method": settings}
    if label == "lora-top" and aim in ("speed", "memory"):
        changes["training.trunk_cache"] = True
    reasons = [
        (rule.points, rule.why, rule.source)
        for rule in RULES
        if rule.candidate == label and rule.holds(aim, parameters, rows, base.task.generates)
    ]
    reasons += evidence.points.get(label, [])
    if base.training.max_steps is None:
        changes["training.num_train_epochs"], why = epochs_for(rows)
        epochs = changes["training.num_train_epochs"]
        reasons.append((0.0, f"{epochs:g} epochs to start with: {why}", "rule of thumb"))
    if (found := evidence.settings.get(label)) is not None:
        own = {key: value for key, value in found[0].items() if key.startswith("training.")}
        method = {key.partition(".")[2]: one for key, one in found[0].items() if key.startswith("method.")}
        changes |= {**own, "method": {**settings, **method}}
        reasons.append((1.0, "its settings are those that a search found better than the defaults", found[1]))
    if base.training.max_steps is not None:
        changes.pop("training.num_train_epochs", None)  # a search's
    try:
        config = RunConfig.build(base.model_dump(mode="json"), changes)
    except ConfigError as error:  # at odds with another setting of the run file
        return Candidate(label, base, changes, reasons, missing=error.what)
    if "training.learning_rate" not in changes:
        changes["training.learning_rate"] = default_learning_rates(config.method, base.task.name)[0]
    return Candidate(label, config, changes, reasons)


def _plan(candidate: Candidate, planner: Any, memory: int | None) -> None:
    """Plan a candidate, with a smaller micro-batch if it does not fit otherwise; note why it cannot be used."""
    training = candidate.config.training
    rows = training.per_device_train_batch_size
    tree = candidate.config.model_dump(mode="json")
    sizes = [rows >> halvings for halvings in range(rows.bit_length()) if rows % (1 << halvings) == 0]
    tried = (
        [{}]
        if memory is None
        else [
            {} if size == rows else training.micro_batch_overrides(size)
            for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        ]
    )
    for changes in tried:
        try:
            plan = planner.plan(RunConfig.build(tree, changes) if changes else candidate.config)
        except ModelError as error:
            candidate.missing = error.what
            return
        except GraftwerkError as error:
            candidate.missing = f"it cannot be planned: {error.what}"
            return
        candidate.plan = plan
        fits = plan["fits"] if memory is None else plan["memory"]["train_peak_bytes"] <= memory
        if fits is not False:
            candidate.changes |= changes
            if changes:
                candidate.reasons.append((-0.5, "fits with a smaller micro-batch, which is slower", "plan"))
            candidate.missing = ""
            return
        limit = plan["available_bytes"] if memory is None else memory
        candidate.missing = f"needs {byte_size(plan['memory']['train_peak_bytes'])}, and there are {byte_size(limit)}"


def _sharpen(usable: list[Candidate], aim: str) -> None:
    """Add points for the figure of the plan that the aim looks at."""
    keys, title = PLANNED[aim]
    values: list[tuple[float, Candidate]] = []
    for candidate in usable:
        value: Any = candidate.plan
        for key in keys:
            value = value[key]
        values.append((float(value), candidate))
    values.sort(key=lambda pair: pair[0])
    for place, (_, candidate) in enumerate(values):
        points = PLAN_POINTS * (1 - place / max(len(values) - 1, 1))
        said = title if place == 0 else f"{place + 1} of {len(values)} by the {title}"
        candidate.reasons.append((round(points, 2), said, "plan"))


def _described(candidate: Candidate, given: str) -> dict[str, Any]:
    method = candidate.changes["method"]
    words = ["graftwerk", "train", given, f"method={_flow(method)}"]
    words += [f"{key.partition('.')[2]}={_flow(value)}" for key, value in candidate.changes.items() if key != "method"]
    words.append(f"output_dir=runs/{candidate.label}")
    return {
        "method": candidate.config.method.name,
        "label": candidate.label,
        "settings": {**{f"method.{key}": value for key, value in method.items() if key != "name"},
                     **{key: value for key, value in candidate.changes.items() if key != "method"}},
        "points": round(candidate.points, 2),
        "reasons": [
            {"points": points, "text": text, "source": source}
            for points, text, source in sorted(candidate.reasons, key=lambda reason: -abs(reason[0]))
        ],
        "plan": candidate.plan,
        "command": shlex.join(words),
    }  # fmt: skip


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
