"""Draw docs/performance.md from the results; the same results give the same page, byte for byte.

python -m benchmarks.page            writes the page and its charts (docs/performance/P2.svg ...)
python -m benchmarks.page --check    exit code 1 where what is written is not what the results give
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

DOCS = ROOT / "docs"
TITLES = {
    "P1": "Time to the same held-out score",
    "P2": "A training step of LoRA",
    "P3": "Memory of a training step",
    "P4": "The causal loss",
    "P5": "The trunk computed once",
    "P6": "Sixteen trials of a search",
    "P7": "A batch with an adapter for each row",
    "P8": "Load, switch, merge",
    "P10": "Start",
}
HEAD = """# Performance

Drawn by `make bench-page` from [benchmarks/results](../benchmarks/results); how they are measured is in
[benchmarks/README.md](../benchmarks/README.md). Medians of sides that ran in turn on one machine; the worst repeat is
in brackets. A ratio is worded as its goal is. Goals that are not reached are listed like the others; what was tried is
in [decisions](decisions).
"""
TABLE = "| goal | what | ours | peer | ratio | target | reached |\n|---|---|--:|--:|--:|---|---|"
LEFT, WIDTH, BAR, GAP = 300, 380, 16, 10


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every committed result, by the number of its goal.

    Raises:
        ValueError: a file is not what `harness.write` writes.
    """
    found = []
    for file in folder.glob("P*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("goal") != file.stem or not result.get("machine") or not result.get("rows"):
            raise ValueError(f"{file} is no result of {file.stem}")
        found.append(result)
    return sorted(found, key=lambda result: int(result["goal"][1:]))


def pages(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The files of the page by their path below docs/."""
    made = {}
    text = [HEAD]
    if not found:
        text.append("Nothing has been measured yet.\n")
    else:
        text += [*_summary(found), ""]
    for result in found:
        goal, rows = result["goal"], result["rows"]
        text.append(f"## {goal}: {TITLES.get(goal, goal)}\n")
        chart = bars([(row["what"], row["ratio"], row["reached"]) for row in rows if row["ratio"] is not None])
        if chart:
            made[f"performance/{goal}.svg"] = chart
            text.append(f"![ratios of {goal}](performance/{goal}.svg)\n")
        text.extend(f"- {_cell(row['what'])}: {row['note']}" for row in rows if row["note"])
        peers = {
            json.dumps(row["settings"].get("peer"), sort_keys=True): row for row in rows if row["settings"].get("peer")
        }
        text.extend(f"- Peer ({_cell(row['what'])}): {_said(row['settings']['peer'])}" for row in peers.values())
        dates = sorted({f"{row['date']} at `{row['commit']}`" for row in rows})
        text.append(f"- Measured {', '.join(dates)}.\n")
    made["performance.md"] = "\n".join(text).rstrip() + "\n"
    return made


def _summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """One table of all rows; the machine of each sitting; one line for each goal that was missed."""
    made = [TABLE]
    made += [_line(row) for result in found for row in result["rows"]]
    where: dict[str, list[str]] = {}
    for result in found:
        where.setdefault(_machine(result["machine"]), []).append(result["goal"])
    made.append("")
    made += [f"Measured on {machine}: {', '.join(goals)}.\n" for machine, goals in where.items()]
    missed = [result for result in found if not all(row["reached"] for row in result["rows"])]
    made.append("## Missed\n" if missed else "Every goal that was measured is reached.")
    for result in missed:
        short = [row for row in result["rows"] if not row["reached"]]
        said = "; ".join(f"{_cell(row['what'])} {_reach(row)} ({_cell(row['target'])})" for row in short)
        made.append(f"- {result['goal']}, {len(short)} of {len(result['rows'])}: {said}.")
    if unmeasured := [goal for goal in TITLES if goal not in {result["goal"] for result in found}]:
        said = "; ".join(f"{goal} ({TITLES[goal].lower()})" for goal in unmeasured)
        made += ["", f"Not measured yet, though there is a benchmark: {said}."]
    return made


def _reach(row: dict[str, Any]) -> str:
    return f"{_number(row['ours'])} {row['unit']}" if row["ratio"] is None else _number(row["ratio"])


def _line(row: dict[str, Any]) -> str:
    worst = row["worst"]
    ours = f"{_number(row['ours'])}{_bracket(worst.get('ours'))} {row['unit']}"
    peer = "" if row["peer"] is None else f"{_number(row['peer'])}{_bracket(worst.get('peer'))} {row['unit']}"
    ratio = "" if row["ratio"] is None else _number(row["ratio"])
    reached = "yes" if row["reached"] else "**no**"
    return f"| {row['goal']} | {_cell(row['what'])} | {ours} | {peer} | {ratio} | {_cell(row['target'])} | {reached} |"


def _number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 8)}f}"


def _bracket(value: float | None) -> str:
    return "" if value is None else f" ({_number(value)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _said(value: Any) -> str:
    return value if isinstance(value, str) else "`" + json.dumps(value, sort_keys=True) + "`"


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft") if machine.get(name))
    cpu = machine["cpu"] + (f" ({', '.join(machine['instructions'])})" if machine.get("instructions") else "")
    return f"{cpu}, {machine['cores']} cores, {machine['threads']} threads; {versions}"


def bars(values: Sequence[tuple[str, float, bool]]) -> str:
    """A bar for each ratio, on a logarithmic axis through 1 where they span more than a factor of 20; '' for none."""
    if not values:
        return ""
    most, least = max(1.0, *(ratio for _, ratio, _ in values)), min(1.0, *(ratio for _, ratio, _ in values))
    logarithmic = least > 0 and most / least > 20

    def place(ratio: float) -> float:
        if logarithmic:
            return WIDTH * math.log(ratio / least) / math.log(most / least)
        return WIDTH * max(ratio, 0.0) / most

    height = len(values) * (BAR + GAP) + GAP + 18
    one = LEFT + place(1.0)
    whole = LEFT + WIDTH + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height}" width="{whole}" font-size="12"',
        '  font-family="system-ui, sans-serif">',
        f'<rect width="{whole}" height="{height}" fill="#ffffff"/>',
    ]
    for at, (what, ratio, reached) in enumerate(values):
        top = GAP + at * (BAR + GAP)
        begin, end = (
            (min(one, LEFT + place(ratio)), max(one, LEFT + place(ratio)))
            if logarithmic
            else (LEFT, LEFT + place(ratio))
        )
        label = what if len(what) <= 46 else what[:45] + "…"
        colour = "#2f7d6b" if reached else "#b5523b"
        parts += [
            f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end" fill="#222222">{escape(label)}</text>',
            f'<rect x="{begin:.1f}" y="{top}" width="{max(end - begin, 1):.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{end + 5:.1f}" y="{top + 12}" fill="#222222">{_number(ratio)}</text>',
        ]
    bottom = height - 18
    scale = "ratio, logarithmic" if logarithmic else "ratio"
    parts += [
        f'<line x1="{one:.1f}" y1="4" x2="{one:.1f}" y2="{bottom}" stroke="#222222" stroke-dasharray="3 3"/>',
        f'<text x="{one:.1f}" y="{height - 5}" text-anchor="middle" fill="#555555">1</text>',
        f'<text x="{LEFT - 8}" y="{height - 5}" text-anchor="end" fill="#555555">{scale}; red: goal not reached</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def stale(made: dict[str, str], docs: Path = DOCS) -> list[str]:
    """Files of the page that are not what the results give, and charts that no result has any more."""
    wrong = [
        name for name, text in made.items() if not (docs / name).is_file() or (docs / name).read_text("utf-8") != text
    ]
    charts = {f"performance/{file.name}" for file in (docs / "performance").glob("*.svg")}
    return sorted([*wrong, *(charts - made.keys())])


def main() -> int:
    made = pages(results())
    wrong = stale(made)
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/{name} is not what the results give: make bench-page" for name in wrong) or "up to date")
        return 1 if wrong else 0
    for name in wrong:
        (DOCS / name).unlink(missing_ok=True)
        if name in made:
            (DOCS / name).parent.mkdir(exist_ok=True)
            (DOCS / name).write_text(made[name], encoding="utf-8")
    print(f"{len(wrong)} of {len(made)} files written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
