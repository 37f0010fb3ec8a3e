"""A signal at any moment of any command ends it with 128 + its number: none is lost, none becomes another error."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import GraftwerkError, RunInterrupted
from graftwerk.training.signals import StopSignals
from tests.cli.commands import Run, run_file

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def commands(graftwerk: Run, config: Path, tmp_path: Path, tiny_encoder: Path, glosses: Path) -> dict[str, Any]:
    """The arguments of each command, and what has to be gone before it runs again."""
    trained = tmp_path / "trained"
    assert graftwerk("train", config, f"output_dir={trained}").code == 0
    rows, more = str(glosses), str(tmp_path / "more.jsonl")
    compared = run_file(tmp_path, tiny_encoder, glosses, output_dir=str(tmp_path / "compared"))
    return {
        "train": (["train", str(config), f"output_dir={tmp_path / 'run'}"], [str(tmp_path / "run")]),
        "helpers": (
            ["train", str(config), "training.processes=2", f"output_dir={tmp_path / 'shared'}"],
            [str(tmp_path / "shared")],
        ),
        "evaluate": (["evaluate", str(trained), "--data", rows], []),
        "predict": (["predict", str(trained), "--data", rows], []),
        "augment": (["augment", "--data", rows, "--by", "word-dropout", "--out", more, "--overwrite"], [more]),
        "doctor": (["doctor", str(config), f"output_dir={tmp_path / 'run'}"], []),
        "compare": (
            ["compare", str(compared), "methods=lora,probe", "seeds=0", f"output_dir={tmp_path / 'compared'}"],
            [str(tmp_path / "compared")],
        ),
    }


def ends(commands: dict[str, Any], names: list[str], each: int, seed: int) -> list[dict[str, Any]]:
    """How commands ended that were sent a signal at seeded moments."""
    draw = random.Random(seed)
    trials = [
        {
            "arguments": commands[name][0],
            "fresh": commands[name][1],
            "share": draw.random() * 0.99,
            "signum": int(draw.choice(SIGNALS)),
        }
        for name in names
        for _ in range(each)
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("signalled.py")), json.dumps(trials)],
        capture_output=True,
        text=True,
        timeout=7200,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "GRAFTWERK_PLAIN": "prepared"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wrong(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{one['arguments'][0]} at call {one['at']:,} of {one['of']:,}, signal {one['signum']}: code {one['code']}\n"
        + one["said"]
        for one in found
        if one["code"] != 128 + one["signum"]
    ]


def test_command_signal_at_seeded_moments_exits_with_its_code(commands: dict[str, Any]) -> None:
    found = ends(commands, ["train", "evaluate"], each=3, seed=3)
    assert len(found) == 6
    assert not (faults := wrong(found)), "\n\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "helpers", "evaluate", "predict", "augment", "doctor", "compare"])
def test_command_signal_at_many_moments_exits_with_its_code(commands: dict[str, Any], name: str) -> None:
    each = int(os.environ.get("GRAFTWERK_TEST_SIGNALS", "20"))
    found = ends(commands, [name], each, seed=5)
    assert len(found) == each
    assert not (faults := wrong(found)), "\n\n".join(faults)


@pytest.mark.parametrize("signum", SIGNALS)
def test_signal_during_import_exits_with_its_code(signum: int) -> None:
    script = (
        "import builtins, os, sys, graftwerk.__main__ as entry\nown = builtins.__import__\n"
        "def importing(name, *rest):\n"
        f"    if name == 'typer': os.kill(os.getpid(), {int(signum)})\n"
        "    return own(name, *rest)\n"
        "builtins.__import__ = importing\nsys.argv = ['graftwerk', '--version']\nraise SystemExit(entry.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert done.returncode == 128 + signum, done.stderr


def test_run_interrupted_is_no_exception_and_has_error_fields() -> None:
    stopped = RunInterrupted(signal.SIGTERM, "stopped after step 3", recovered="runs/x")
    assert not isinstance(stopped, Exception | GraftwerkError)
    assert stopped.as_dict()["exit_code"] == stopped.exit_code == 143
    assert str(stopped) == "stopped after step 3\n  recovered: runs/x"


@pytest.mark.parametrize("signum", SIGNALS)
def test_stop_signals_lost_in_destructor_is_raised_at_exit(monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signum)
            sum(range(10))  # here the handler raises, where nobody can catch it

    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with pytest.raises(RunInterrupted) as caught, StopSignals().installed():
        Dying()
    assert caught.value.signum == signum
