"""All that the README tells a reader to run, run: its own words, in its own order, in a folder like a fresh clone.

What is shortened is the work, not the words: the folder holds the project's example run files with few rows and steps
of the same real text.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from graftwerk.cli.main import main
from graftwerk.config import RunConfig
from graftwerk.evaluation.paired_bootstrap import ONE_SEED
from graftwerk.experiments.table import HEADINGS
from graftwerk.resource_paths import locate
from graftwerk.yaml_files import read_yaml
from tests.contract.cases import table
from tests.readme import README, between_markers, blocks, commands, session

ROOT = README.parent
SHORT = {
    "data": {"max_train_rows": 16, "validation": 8, "test": 8},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4},
    "evaluation": {"resamples": 100, "latency_batches": 1},
}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: str, movies: str) -> Path:
    """The project's examples, shortened, and a reader's own file."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with locate(movies).open(newline="", encoding="utf-8") as whole, (tmp_path / "short.csv").open("w") as short:
        rows = csv.DictReader(whole)
        writer = csv.DictWriter(short, rows.fieldnames or ())
        writer.writeheader()
        writer.writerows(itertools.islice((row for row in rows if row["source"] == "rotten_tomatoes"), 0, 8000, 100))
    for path in (tmp_path / "examples").glob("*.yaml"):
        tree = read_yaml(path)
        for part, values in SHORT.items():
            tree[part] = {**tree.get(part, {}), **values}
        if tree["data"]["train"] == movies:
            tree["data"]["train"] = "short.csv"
        path.write_text(yaml.safe_dump(tree))
    with (tmp_path / "my-reviews.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["review", "label"], ["I liked it", 1], ["I did not", 0], ["wonderful", 1]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_commands_run(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = commands("graftwerk")
    assert len(given) >= 14
    shown = {shlex.split(command)[1] for command in given}
    assert shown == {
        "init", "doctor", "train", "evaluate", "predict", "inspect", "report", "compare", "methods", "schema",
        "merge", "export", "errors", "push", "plan", "search", "ablate",
    }  # fmt: skip
    for command in given:
        arguments = shlex.split(command)[1:]
        code = main(arguments)
        said = capfd.readouterr()
        assert code == 0, f"{command}\n{said.err}"
        assert "Traceback" not in said.err, command
        if arguments[0] == "train" and "--dry-run" not in arguments:
            folder = clone / said.out.rstrip("\n").rpartition("\n")[2]
            assert (folder / "adapter" / "adapter_config.json").is_file(), command
            assert (folder / "report.html").is_file(), command
        if "--json" in arguments:
            assert isinstance(json.loads(said.out), dict), command
        if arguments[0] == "predict":
            assert len(said.out.splitlines()) == 2


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: str, movies: str) -> Path:
    """`reviews.csv` of the README's first example, in the working folder."""
    with locate(movies).open(newline="", encoding="utf-8") as whole:
        rows = [row for row in csv.DictReader(whole) if row["source"] == "rotten_tomatoes"]
    with (tmp_path / "reviews.csv").open("w", newline="", encoding="latin-1", errors="replace") as file:
        writer = csv.writer(file, delimiter=";", lineterminator="\r\n")
        writer.writerow(["No", "Review", "Verdict"])
        for number, row in enumerate(rows[:: len(rows) // 600][:600], start=1):
            verdict = "" if number in (77, 301) else {"1": "good", "0": "bad"}[row["label"]]
            writer.writerow([number, row["text"], verdict])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shape(printed: str) -> str:
    """What was printed without its numbers and rules, which differ from machine to machine."""
    numbers = r"\d+ (?:h|min) \d+ (?:min|s)|\d[\d.,]*(?: ?(?:min|s|ms|MB|GB|kB))*|─+"  # 1 min 05 s is one
    return " ".join(re.sub(numbers, "#", printed).split())


def test_readme_first_example_begins_as_it_says(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is looked at in the same words, and what is written can be trained: three commands in all."""
    (looked, printed), trained, predicted = session()
    assert main(shlex.split(looked)[1:]) == 0
    assert capsys.readouterr().out == printed
    assert shlex.split(trained[0])[1:] == ["train", "run.yaml"]
    assert main([*shlex.split(trained[0])[1:], "--dry-run"]) == 0
    assert shlex.split(predicted[0])[2] == RunConfig.load("run.yaml").output_dir.as_posix()


@pytest.mark.slow
def test_readme_first_example_prints_what_it_says(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, printed in session():
        assert main(shlex.split(command)[1:]) == 0
        said = capsys.readouterr().out
        assert shape(said) == shape(printed), command


def test_readme_demo_table_has_todays_form() -> None:
    """Its headings, and sentences below it, are those that a comparison prints."""
    (demo,) = (block for block in blocks("text") if "against the best" in block)
    headings = [*HEADINGS[:1], "accuracy", *(name for name in HEADINGS[2:] if name != "SD of seeds")]
    assert re.split(r"\s{2,}", demo.splitlines()[0]) == headings
    assert f"one seed: {ONE_SEED}, so no method is called better" in demo
    makefile = (ROOT / "Makefile").read_text()
    (methods,) = re.findall(r"^DEMO_METHODS \?= (.*)$", makefile, re.MULTILINE)
    assert sorted(line.split()[0] for line in demo.splitlines()[2:9]) == sorted(methods.split(","))


def test_readme_python_example_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 11
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "'label':" in said
    assert "topics: LoRA" in said


def test_readme_run_file_is_valid() -> None:
    (example,) = blocks("yaml")
    config = RunConfig.build(yaml.safe_load(example))
    assert config.method.name == "lora"
    assert config.data.columns == {"text": "review", "label": "stars"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_run_files_are_valid(path: Path) -> None:
    config = RunConfig.load(path)
    assert config.output_dir.parts[0] == "runs"
    assert path.name in path.read_text().split("\n")[1], "its second line says how it is run"


def test_makefile_has_targets_of_readme() -> None:
    for command in commands("make"):
        done = subprocess.run(
            ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("setup", "demo", "check", "test", "bench", "clean"):
        assert f"make {target} " in done.stdout


def test_readme_capability_table_equals_contract_test() -> None:
    assert between_markers() == table(), "run `make capabilities`"


def test_readme_install_comes_early_and_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert any(line.startswith("make demo") for line in lines[:20])
    import re

    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    tree = next(block for block in blocks("") if block.startswith("src/graftwerk/"))
    rooms = {path.name for path in (ROOT / "src" / "graftwerk").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {word.strip("/") for word in tree.split() if word.endswith("/") and word.strip("/") in rooms}


def test_quickstart_script_runs(
    monkeypatch: pytest.MonkeyPatch, minilm: str, movies: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart

    monkeypatch.setattr(quickstart, "BATCH", 4)
    monkeypatch.setattr(quickstart, "EPOCHS", 1)
    quickstart.main(rows=8, held_out=8)
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said
    answers = json.loads(said.rpartition("three adapters: ")[2])
    assert answers[0] != answers[2]
