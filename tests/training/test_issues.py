"""Every finding there is, each from a file that triggers it; and that there is no other."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import graftwerk
from graftwerk.config import RunConfig
from graftwerk.experiments.preflight import preflight
from graftwerk.models.load import load_tokenizer
from graftwerk.tasks.example_checks import _MEANINGS
from graftwerk.training.data_checks import GRAVE_CODES
from graftwerk.training.train import train

SRC = Path(graftwerk.__file__).parent
DOCS = SRC.parents[1] / "docs" / "data.md"
WORDS = "act ball city dog egg fish gold hill iron jam king lamp moon nest oak pond queen rain salt tree"
NO_END = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
TORN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}bo{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}bo{% endif %}"
)
"""`bo` alone are other pieces than `bo` at the beginning of `bonot`."""
LONG = [
    {"role": "system", "content": "fly " * 80},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


def text(at: int) -> str:
    """Twelve words, in an order of their own for each row."""
    words = WORDS.split()
    return " ".join(words[(at * 7 + step * (at % 9 + 1)) % len(words)] for step in range(11)) + f" {at}"


def rows(count: int = 20, label: Callable[[int], str] = lambda at: "ab"[at % 2]) -> list[Any]:
    return [{"text": text(at), "label": label(at)} for at in range(count)]


def turns(asked: str = "what is it ?", answered: str = "a ball", count: int = 6) -> list[Any]:
    return [{"prompt": f"{text(at)} {asked}", "completion": f"{answered} {at}"} for at in range(count)]


INSTRUCTION = {"model": "decoder", "task": {"name": "instruction", "template": "plain"}}
CHATTING = {"model": "decoder", "task": "instruction"}


TAGS = {"task": "token-classification"}


def tagged(count: int = 20) -> list[Any]:
    return [{"tokens": text(at).split(), "tags": ["B-A", *["O"] * 11]} for at in range(count)]


@dataclass(frozen=True)
class Case:
    """Files by name (rows, or bytes of another kind), and what the run file says beside `data.train: rows.jsonl`."""

    files: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    grave: bool = False
    template: str | None = None
    trained: bool = False
    """It is found when the training begins, and not before."""


TEST = {"data.test": "test.jsonl"}
CASES: dict[str, Case] = {
    "rows-skipped": Case({"rows.jsonl": [*rows(), "{"]}, {"data.on_bad_row": "skip"}),
    "files-passed-over": Case({"folder/rows.jsonl": rows(), "folder/README": "about"}, {"data.train": "folder"}),
    "filter-unmatched": Case({"rows.jsonl": rows()}, {"data.filter": {"label": ["a", "b", "z"]}}),
    "fewer-rows": Case({"rows.jsonl": rows()}, {"data.max_train_rows": 99}),
    "streamed": Case({"rows.jsonl": rows()}, {"data.streaming": True}),
    "duplicates": Case({"rows.jsonl": [*rows(), rows()[0]]}),
    "conflicting-labels": Case({"rows.jsonl": [*rows(), {"text": text(0), "label": "b"}]}),
    "leakage": Case({"rows.jsonl": rows(), "test.jsonl": [*rows()[:1], {"text": "new", "label": "b"}]}, TEST, True),
    "near-leakage": Case(
        {"rows.jsonl": rows(), "test.jsonl": [{"text": text(at) + " more", "label": "ab"[at]} for at in (0, 1)]}, TEST
    ),
    "absent-classes": Case({"rows.jsonl": rows(), "test.jsonl": [{"text": "new", "label": "a"}]}, TEST),
    "label-spelling": Case({"rows.jsonl": rows(label=lambda at: "bB"[at % 2])}, grave=True),
    "missing-values": Case({"rows.jsonl": rows(label=lambda at: ("a", "nan")[at % 2])}, grave=True),
    "many-classes": Case({"rows.jsonl": rows(40, lambda at: f"{at % 12 / 4}")}, grave=True),
    "unused-columns": Case({"rows.jsonl": [{**row, "history": [["a", "b"]]} for row in turns()]}, INSTRUCTION),
    "rare-classes": Case({"rows.jsonl": rows(label=lambda at: f"class {at}")}, grave=True),
    "label-skew": Case({"rows.jsonl": rows(400, lambda at: "ab"[at in (3, 9)])}, grave=True),
    "truncated": Case({"rows.jsonl": rows()}, {"data.max_length": 6}),
    "cut-into-blocks": Case({"rows.jsonl": rows()}, {"model": "decoder", "task": "causal", "data.max_length": 6}),
    "labels-all-masked": Case(
        {"rows.jsonl": [{"messages": LONG}]},
        {**INSTRUCTION, "data.max_length": 40},
        True,
    ),
    "end-untrained": Case({"rows.jsonl": turns()}, CHATTING, True, NO_END),
    "prompt-torn": Case({"rows.jsonl": turns(answered="not")}, CHATTING, template=TORN),
    "special-token-in-text": Case({"rows.jsonl": turns(asked="is </s> the end ?")}, INSTRUCTION),
    "few-scores": Case(
        {"rows.jsonl": [{"text": text(at), "score": at % 2} for at in range(20)]}, {"task": "regression"}
    ),
    "rare-labels": Case(
        {"rows.jsonl": [{"text": text(at), "labels": ["a"] if at else ["b"]} for at in range(20)]},
        {"task": "multilabel"},
    ),
    "constant-labels": Case(
        {"rows.jsonl": [{"text": text(at), "labels": ["a", "bc"[at % 2]]} for at in range(20)]}, {"task": "multilabel"}
    ),
    "rare-tags": Case({"rows.jsonl": [*tagged(), {"tokens": ["gold"], "tags": ["B-X"]}]}, TAGS),
    "windows": Case({"rows.jsonl": tagged()}, {**TAGS, "data.max_length": 8}),
    "span-inside-word": Case(
        {"rows.jsonl": [{"text": text(at), "spans": [{"start": 0, "end": 2, "label": "X"}]} for at in range(20)]}, TAGS
    ),
    "text-form": Case(
        {"rows.csv": "text;label\n" + "".join(f"{row['text']};{row['label']}\n" for row in rows())},
        {"data.train": "rows.csv"},
    ),
    "pair-unseparated": Case(
        {"rows.jsonl": [{**row, "text_pair": "so it is"} for row in rows()]}, {"model": "decoder"}
    ),
    "answer-limit": Case(
        {"rows.jsonl": turns(), "test.jsonl": turns(answered="a very long answer", asked="who ?")},
        {**INSTRUCTION, **TEST, "evaluation.max_new_tokens": 2, "data.max_truncated": 0.5},
        True,
    ),
    "retained-rows": Case(
        {"rows.jsonl": rows(), "kept.jsonl": [{"text": row["text"].upper().replace(" ", "  ")} for row in rows()]},
        {"model": "decoder", "task": "causal", "evaluation.retained": {"own": {"texts": "kept.jsonl"}}},
    ),
    "held-out-elsewhere": Case(
        {"a.jsonl": rows(8), "b.jsonl": rows(16)[8:], "held.jsonl": rows(10)[9:]},
        {
            "model": "decoder",
            "task": "causal",
            "data.train": [{"source": "a.jsonl", "validation": "held.jsonl"}, {"source": "b.jsonl", "validation": 2}],
        },
    ),
    "augmented-left-out": Case(
        {"rows.jsonl": [*rows(), {"text": "one", "label": "a"}]}, {"data.augment": ["word_shuffle"]}, trained=True
    ),
}


@pytest.fixture
def found(tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a case, its findings by their codes."""

    def found(case: Case) -> dict[str, dict[str, Any]]:
        for name, content in case.files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            if isinstance(content, list):
                content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content)
            (tmp_path / name).write_text(content, encoding="utf-8")
        model = tiny_decoder if case.run.get("model") == "decoder" else tiny_encoder
        if case.template is not None:
            shutil.copytree(model, tmp_path / "model")
            model = tmp_path / "model"
            tokenizer = load_tokenizer(str(model))
            tokenizer.chat_template = case.template
            tokenizer.save_pretrained(model)
        monkeypatch.chdir(tmp_path)
        tree = {
            "data": {"train": "rows.jsonl", "validation": None, "max_truncated": 1.0},
            "method": {"name": "lora", "r": 2},
            "training": {"max_steps": 1},
            "output_dir": "run",
        }
        changes = {**case.run, "model": str(model)}
        if case.trained:
            listed = train(RunConfig.build(tree, changes)).manifest["data"]["findings"]
        else:
            listed = preflight(RunConfig.build(tree, changes))["findings"]
        return {finding["code"]: finding for finding in listed}

    return found


@pytest.mark.parametrize("code", CASES)
def test_issue_is_triggered_by_its_file(code: str, found: Callable[[Case], dict[str, dict[str, Any]]]) -> None:
    case = CASES[code]
    said = found(case)
    assert code in said
    assert said[code]["grave"] is case.grave
    assert said[code]["message"]
    others = {name for name, finding in said.items() if finding["grave"]} - {code}
    assert not others, "the file shows one thing"


def codes_in_source() -> set[str]:
    """What is given to `Issue` as its code, and what is written out as one."""
    found = set(_MEANINGS)
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Issue":
                given = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "code")]
                if not given:  # one from a cache, returned unchanged: `Issue(**cached)`
                    assert [word.arg for word in node.keywords] == [None], f"{path}:{node.lineno}"
                    continue
                code = given[0]
                assert isinstance(code, ast.Constant) or path.name == "example_checks.py", f"{path}:{node.lineno}"
                if isinstance(code, ast.Constant):
                    found.add(str(code.value))
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if getattr(key, "value", None) == "code" and isinstance(value, ast.Constant):
                        found.add(str(value.value))
    return found


def test_every_issue_has_a_file() -> None:
    found = codes_in_source()
    assert len(found) > 20, "nothing was walked"
    assert found == set(CASES)


def test_severe_codes_are_those_that_files_show() -> None:
    assert {code for code, case in CASES.items() if case.grave} == set(GRAVE_CODES)


def test_documentation_lists_every_issue() -> None:
    lines = re.findall(
        r"^\| `([a-z-]+)` \|.*\| (no|yes|.+?) \|[^|]*\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = {code: grave for code, grave in lines if code in CASES or "-" in code}
    assert set(listed) == set(CASES)
    assert {code for code, grave in listed.items() if grave != "no"} == set(GRAVE_CODES)
