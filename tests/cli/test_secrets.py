"""A secret in a place of the run file is in no file of the run and nothing said; names that drive a terminal do not."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import graftwerk as gw
from graftwerk.errors import ConfigError
from graftwerk.models.cache import cache_folder
from graftwerk.sanitize import REDACTED, visible
from tests.cli.commands import Run, run_file

PASSWORD, TOKEN = "pa55w0rdX", "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egnp"


def held(folder: Path) -> list[str]:
    return [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in (PASSWORD, TOKEN))
    ]


@pytest.fixture
def secret(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> tuple[Path, Path]:
    """A run file whose model and data lie at places with a password and a token in them, and its run folder."""
    place = tmp_path / "https:" / f"me:{PASSWORD}@host.org" / TOKEN
    place.mkdir(parents=True)
    rows = Path(shutil.copy(glosses, place))
    model = Path(shutil.copytree(tiny_encoder, place / "model"))
    return run_file(tmp_path, model, rows), tmp_path / "run"


def test_run_with_secret_paths_redacts_and_works(graftwerk: Run, secret: tuple[Path, Path]) -> None:
    config, run = secret
    said = graftwerk("train", config, "max_steps=2", "eval_steps=1")
    assert said.code == 0, said.err
    assert held(run) == []
    assert PASSWORD not in said.out + said.err
    assert TOKEN not in said.out + said.err
    assert REDACTED in (run / "config.yaml").read_text()
    assert "holds a secret" in said.err
    assert (cache_folder() / "secrets.json").stat().st_mode & 0o77 == 0
    for arguments in (["evaluate", run, "--json"], ["predict", run, "a text"], ["inspect", run], ["report", run],
                      ["train", config, "max_steps=2", "eval_steps=1", "--resume"],
                      ["train", run / "config.yaml", "--resume"]):  # fmt: skip
        said = graftwerk(*arguments)
        assert said.code == 0, said.err
        assert PASSWORD not in said.out + said.err
    assert held(run) == []
    (cache_folder() / "secrets.json").unlink()
    with pytest.raises(ConfigError, match="left out"):
        gw.predict(run, ["a text"])


def test_compare_with_secret_paths_redacts(graftwerk: Run, secret: tuple[Path, Path]) -> None:
    config, run = secret
    tree = yaml.safe_load(config.read_text())
    del tree["method"]
    config.write_text(yaml.safe_dump(tree))
    said = graftwerk("compare", config, "methods=probe", "seeds=0", "max_steps=2", "eval_steps=1")
    assert said.code == 0, said.err
    assert held(run) == []
    content, where = gw.RunConfig.content(run / "config.yaml")  # as `compare`, `ablate` and `search` read it
    assert PASSWORD in content["model"]
    assert where == str(run / "config.yaml")
    assert PASSWORD not in said.out + said.err
    assert graftwerk("compare", config, "methods=probe", "seeds=0", "max_steps=2", "eval_steps=1").code == 0


@pytest.mark.parametrize("place", [f"https://me:{PASSWORD}@host.org/a.csv", f"https://h/a.csv?token={PASSWORD}", TOKEN])
def test_train_error_about_secret_path_redacts_it(graftwerk: Run, config: Path, place: str) -> None:
    for key in ("data.train", "model", "training.warm_start", "data.validation"):
        for extra in ([], ["--json"], ["--debug"]):
            said = graftwerk("train", config, f"{key}={place}", *extra)
            assert said.code != 0
            assert PASSWORD not in said.out + said.err
            assert TOKEN not in said.out + said.err


def hostile_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "rows.zip").unlink(missing_ok=True)
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr(f"{HOSTILE}.csv", "text,label\na,b\n")
        archive.writestr(f"2{HOSTILE}.csv", "text,label\na,b\n")
    (folder / "odd.jsonl").write_text(json.dumps({f"text{HOSTILE}": "a", "label": "b"}) + "\n")
    rows = [{"text": f"{HOSTILE} {i} {j}", "label": f"{j}{HOSTILE}"} for i in range(30) for j in "ab"]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"model": f"./{HOSTILE}"},
        "hub": {"model": f"a/{HOSTILE}"},
        "data": {"data": {"train": f"{HOSTILE}.csv"}},
        "zip": {"data": {"train": str(folder / "rows.zip")}},
        "columns": {"data": {"train": str(folder / "odd.jsonl")}},
        "key": {HOSTILE: 1},
        "method": {"method": HOSTILE},
        "labels": {"data": {"train": str(folder / "labels.jsonl"), "validation": 10, "test": 10}},
    }


def test_commands_escape_hostile_names(graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path) -> None:
    for name, changes in hostile_inputs(tmp_path).items():
        config = run_file(tmp_path, tiny_encoder, glosses)
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))
        for command in ("doctor", "train"):
            said = graftwerk(command, config, *(["--json"] if name == "key" else ["--debug"]))
            assert said.out + said.err == visible(said.out + said.err), (name, command)
    run = tmp_path / "run"
    assert (run / "adapter").is_dir()  # that of the hostile labels
    for path in ("report.html", "manifest.json", "metrics.jsonl", "config.yaml", "adapter/README.md"):
        content = (run / path).read_text()
        assert content == visible(content), path
    assert json.loads((run / "manifest.json").read_text())["labels"] == [f"a{HOSTILE}", f"b{HOSTILE}"]
    for arguments in (["evaluate", run], ["evaluate", run, "--json"], ["predict", run, HOSTILE], ["inspect", run]):
        said = graftwerk(*arguments)
        assert said.code == 0, said.err
        assert said.out + said.err == visible(said.out + said.err), arguments
