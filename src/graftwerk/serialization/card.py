"""The model card (README.md) of an adapter: what it is, on what it was trained, how good it is, how to repeat it.

Everything in it that came from outside (names, labels, commands) is escaped: text stays text on whatever page shows the
card, and things that look like secrets are blotted out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from graftwerk.methods.registry import METHODS
from graftwerk.sanitize import redact
from graftwerk.serialization.usage import WITHOUT_ANSWERS, graftwerk_lines, merged_lines, peft_lines, sample

_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|<>&~$:@])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MOST_LABELS = 50
MERGEABLE = tuple(name for name, method in METHODS.items() if method.mergeable or name in ("full", "probe"))
"""Names of the methods that can be part of a plain model."""


def model_card(own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the text of a model card.

    Args:
        own: The content of `graftwerk.json`. Used where present: name, base, method, labels, task, data, metrics
            (``{"test": {"accuracy": {"value", "low", "high"}}}``), parameters, cost, command, license, versions.
        config: The content of `adapter_config.json`.
    """
    sections = [
        _front_matter(own, config),
        _opening(own, config),
        _metrics(own),
        _retained(own),
        _data(own),
        _settings(own),
        _use(own, config),
        _repeat(own),
        _limits(own),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def text(value: Any, most: int = 200) -> str:
    """Return ``value`` as one line of plain text: no markup, no control or direction characters, no secrets."""
    line = " ".join(redact(str(value)).split())
    line = "".join(character for character in line if unicodedata.category(character)[0] != "C")
    if len(line) > most:
        line = line[: most - 1] + "…"
    # Dots end numbers of lists only at the start of a line; nothing of ours begins with foreign text.
    return _SPECIAL.sub(r"\\\1", line).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def block(value: str, language: str = "") -> str:
    """Return a code block that its content cannot end."""
    lines = [
        "".join(character for character in line if character == "\t" or unicodedata.category(character)[0] != "C")
        for line in redact(value).splitlines()
    ]
    content = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def _front_matter(own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the metadata in YAML; every value is written as JSON text, which YAML reads as text."""
    lines = ["---"]
    base = _base_name(own)
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")
    if not str(config.get("peft_type", "")).startswith("GRAFTWERK"):
        lines.append('library_name: "peft"')
    if own.get("license"):
        lines.append(f"license: {json.dumps(str(own['license'])[:100])}")
    lines += ["tags:", '  - "graftwerk"', f"  - {json.dumps(str(_method(own).get('name', 'adapter'))[:40])}", "---"]
    return "\n".join(lines)


def _base_name(own: Mapping[str, Any]) -> str:
    base = own.get("base")
    return str(base.get("name") or "") if isinstance(base, Mapping) else ""


def _method(own: Mapping[str, Any]) -> Mapping[str, Any]:
    method = own.get("method")
    return method if isinstance(method, Mapping) else {}


def _opening(own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    base = own.get("base") if isinstance(own.get("base"), Mapping) else {}
    assert isinstance(base, Mapping)
    kind, name = text(_method(own).get("name", "?")), text(_base_name(own) or "an unnamed base")
    lines = [
        f"# {_title(own, own.get('task'))}",
        "",
        f"An adapter ({kind}, `{_code(config.get('peft_type', '?'))}`) for {name}.",
        "",
        f"- architecture: {text(base.get('architecture', '?'))}",
        f"- fingerprint of the base's weights: `{_code(base.get('fingerprint') or 'unknown')}`",
    ]
    if isinstance(quantization := base.get("quantization"), Mapping):
        double = ", double quantization" if quantization.get("double_quant") else ""
        compute = text(quantization.get("compute_type", "?"))
        lines.append(
            f"- base quantized by bitsandbytes: {text(quantization.get('name'))}{double}, compute type {compute}"
        )
    if own.get("task"):
        lines.append(f"- task: {text(own['task'])}")
    parameters = own.get("parameters")
    if isinstance(parameters, Mapping) and isinstance(parameters.get("trained"), int):
        share = parameters.get("share")
        of_base = f", {100 * share:.2f} % of the base's" if isinstance(share, int | float) else ""
        lines.append(f"- trained parameters: {parameters['trained']:,}{of_base}")
    labels = own.get("labels")
    if isinstance(labels, list) and labels:
        more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
        lines.append(f"- labels: {', '.join(text(label, 60) for label in labels[:MOST_LABELS])}{more}")
    return "\n".join(lines)


def _metrics(own: Mapping[str, Any]) -> str:
    metrics = own.get("metrics")
    rows = []
    for part, values in metrics.items() if isinstance(metrics, Mapping) else ():
        for metric, figure in values.items() if isinstance(values, Mapping) else ():
            if isinstance(figure, Mapping):
                interval = f"{_number(figure.get('low'))} to {_number(figure.get('high'))}"
                rows.append(f"| {text(part)} | {text(metric)} | {_number(figure.get('value'))} | {interval} |")
            else:
                rows.append(f"| {text(part)} | {text(metric)} | {_number(figure)} | |")
    if not rows:
        return ""
    return "\n".join(["## Metrics", "", "| rows | metric | value | interval |", "|---|---|---|---|", *rows])


def _retained(own: Mapping[str, Any]) -> str:
    """Return what the training was not to forget, before and after."""
    retained = own.get("retained")
    entries = retained.get("entries") if isinstance(retained, Mapping) else None
    if not isinstance(entries, Mapping) or not entries:
        return ""
    rows = []
    for name, entry in entries.items():
        part = _mapping(entry)
        before, after, lost = (_mapping(part.get(key)) for key in ("before", "after", "forgetting"))
        cells = " | ".join(_number(each.get("value")) for each in (before, after, lost))
        interval = f"{_number(lost.get('low'))} to {_number(lost.get('high'))}" if lost else ""
        rows.append(f"| {text(name)} | {text(part.get('metric'))} | {cells} | {interval} |")
    said = "Measured before and after the training on the same rows; points lost (percent, of a perplexity)."
    head = ["| what | metric | before | after | lost | interval |", "|---|---|---|---|---|---|"]
    return "\n".join(["## Retained", "", said, "", *head, *rows])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _data(own: Mapping[str, Any]) -> str:
    data = own.get("data")
    if not isinstance(data, Mapping) or not data:
        return ""
    lines = ["## Data", ""]
    origin = data.get("origin")
    if isinstance(origin, Mapping):
        # How many rows there were of each part is said below.
        facts = ((name, value) for name, value in origin.items() if name != "rows" and value not in (None, {}, []))
        lines += [f"- {text(name)}: {_fact(value)}" for name, value in facts]
    elif origin:
        lines.append(f"- from: {text(origin, 400)}")
    rows = data.get("rows")
    if isinstance(rows, Mapping):
        counts = ", ".join(f"{text(part)} {_number(count)}" for part, count in rows.items())
        lines.append(f"- rows: {counts}")
    augmented = data.get("augmented")
    for made in augmented.get("made", ()) if isinstance(augmented, Mapping) else ():
        if isinstance(made, Mapping):
            lines.append(
                f"- augmented: {_number(made.get('made'))} rows by {text(made.get('kind'), 40)}, made from "
                f"{_number(made.get('read'))}; in training alone"
            )
    if data.get("fingerprint"):
        lines.append(f"- fingerprint: `{_code(data['fingerprint'])}`")
    if isinstance(augmented, Mapping) and augmented.get("fingerprint"):
        lines.append(f"- fingerprint of the augmented rows: `{_code(augmented['fingerprint'])}`")
    return "\n".join(lines)


def _fact(value: Any) -> str:
    """Return a setting on one line: mappings as ``text = review``, without braces."""
    if isinstance(value, Mapping):
        return text(", ".join(f"{key} = {item}" for key, item in value.items()), 400)
    return text(value, 400)


def _settings(own: Mapping[str, Any]) -> str:
    method = _method(own)
    if not method:
        return ""
    return "## Settings\n\n" + block(json.dumps(method, indent=2, ensure_ascii=False), "json")


def _use(own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the lines that use the adapter from its own folder: with graftwerk, with PEFT, and merged."""
    base = _base_name(own)
    parts = ["## Use it", "Run in the folder of this file.", block(graftwerk_lines(own), "python")]
    if (lines := peft_lines(own, config, base)) is not None:
        parts += ["With PEFT:", block(lines, "python")]
    asks = "evaluate . --data texts.txt" if own.get("task") in WITHOUT_ANSWERS else f"predict . {_quoted(sample(own))}"
    parts += ["From the command line:", block(f"graftwerk {asks}", "sh")]
    if str(_method(own).get("name")) in MERGEABLE:
        parts += ["As a model of its own, which needs neither graftwerk nor PEFT:"]
        parts += [block("graftwerk merge . --out ../merged", "sh")]
    return "\n\n".join(parts)


def _quoted(asked: str) -> str:
    """Return a text as an argument in bash, which writes a tab as two characters."""
    return f'"{asked}"' if "\t" not in asked else "$'" + asked.replace("\t", "\\t") + "'"


def merged_card(
    own: Mapping[str, Any],
    *,
    task: str,
    architecture: str,
    parity: Mapping[str, Any],
    prompt: str | None,
    pairs: bool = False,
) -> str:
    """Return the text of a card for a merged model.

    Args:
        own: The content of the adapter's `graftwerk.json`, empty for a folder of PEFT.
        task: The task's name.
        architecture: The model's class.
        parity: ``rows``, ``max_abs_difference`` and ``agreement`` of the comparison with the adapter.
        prompt: A prompt as the model was trained on, for tasks that generate.
        pairs: True if rows are pairs of texts.
    """
    base, kind = _base_name(own) or "an unnamed base", str(_method(own).get("name", "an adapter"))
    head = ["---"]
    if _HUB_ID.fullmatch(base):
        head.append(f"base_model: {json.dumps(base)}")
    head += ['library_name: "transformers"', "tags:", '  - "graftwerk"', f"  - {json.dumps(kind[:40])}", "---"]
    compared = (
        f"The merged model answers as the adapter does: on {parity['rows']} rows, probabilities differ by at most "
        f"{parity['max_abs_difference']:.2g}, and {100 * parity['agreement']:.1f} % of the likeliest answers agree."
    )
    lines = merged_lines(task, architecture, prompt, pairs=pairs)
    use = ["## Use it", "Run in the folder of this file.", block(lines, "python")] if lines else []
    sections = [
        "\n".join(head),
        f"# {_title(own, task)}, merged",
        f"{text(base)} with an adapter ({text(kind, 40)}) merged into its weights, for {text(task, 40)}.",
        compared,
        _metrics(own),
        _data(own),
        *use,
        _repeat(own),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(own: Mapping[str, Any], task: str | None) -> str:
    """Return what the adapter is, by task and base: ``Classification with lora on org/model``."""
    base = _base_name(own).rstrip("/").rpartition("/")[2] or "an unnamed base"
    name = str(own.get("name") or "adapter")
    named = "" if name in ("adapter", "default") else f"{text(name)}: "
    what = text(str(task or "Adapter").capitalize(), 60)
    return f"{named}{what} with {text(_method(own).get('name', '?'), 40)} on {text(base, 100)}"


def _repeat(own: Mapping[str, Any]) -> str:
    parts = []
    if own.get("command"):
        parts.append("## Repeat\n\n" + block(str(own["command"])[:4000], "sh"))
    versions = own.get("versions")
    if isinstance(versions, Mapping) and versions:
        parts.append("With " + ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items()) + ".")
    cost = own.get("cost")
    if isinstance(cost, Mapping) and isinstance(cost.get("training_seconds"), int | float):
        parts.append(f"Training took {cost['training_seconds']:,.0f} seconds.")
    return "\n\n".join(parts)


def _limits(own: Mapping[str, Any]) -> str:
    return (
        "## Limits and licence\n\n"
        "The adapter works only with the base whose fingerprint stands above. It inherits the base's limits; on texts"
        " unlike those it was trained on, the metrics above say nothing. "
        + (
            f"Licence: {text(own['license'])}."
            if own.get("license")
            else "No licence was given; the base's and the data's apply."
        )
    )


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else text(value, 40)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _code(value: Any) -> str:
    """Return a text for use between single backticks."""
    return re.sub(r"[^\w.:/ -]", "", str(value), flags=re.ASCII)[:100]
