"""What becomes of an error: plain words, the exit code of its kind, JSON for programs, a traceback only on request."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graftwerk import errors
from graftwerk.cli import main as entry
from tests.cli.commands import Run


def breaking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("graftwerk.cli.methods.describe_methods", raises)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("w", where="k", hint="m", recovered="x"), 2),
        (errors.DataError("w", where="k", hint="m", recovered="x"), 3),
        (errors.ModelError("w", where="k", hint="m", recovered="x"), 4),
        (errors.AdapterError("w", where="k", hint="m", recovered="x"), 4),
        (errors.ResourceError("w", where="k", hint="m", recovered="x"), 5),
        (errors.MemoryShortage("w", where="k", hint="m", recovered="x"), 5),
        (errors.DivergedError("w", where="k", hint="m", recovered="x"), 6),
        (errors.ConflictError("w", where="k", hint="m", recovered="x"), 7),
        (errors.IntegrityError("w", where="k", hint="m", recovered="x"), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_command_error_prints_all_fields_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, graftwerk: Run, error: errors.GraftwerkError, code: int
) -> None:
    breaking(monkeypatch, error)
    said = graftwerk("methods")
    assert said.code == code
    assert said.out == ""
    assert said.err == "graftwerk: w\n  where: k\n  hint: m\n  recovered: x\n"
    said = graftwerk("methods", "--json")
    assert said.code == code
    assert said.json == {
        "error": error.code,
        "exit_code": code,
        "what": "w",
        "where": "k",
        "hint": "m",
        "recovered": "x",
        "mend": "m",
        "kept": "x",
    }
    assert "Traceback" not in said.err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_command_interrupted_exits_with_signal_code(
    monkeypatch: pytest.MonkeyPatch, graftwerk: Run, signum: int, code: int
) -> None:
    breaking(monkeypatch, errors.RunInterrupted(signum, "stopped after step 3", recovered="runs/x"))
    said = graftwerk("methods", "--json")
    assert said.code == code
    assert said.json["exit_code"] == code
    assert said.json["recovered"] == "runs/x"


def test_command_keyboard_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    breaking(monkeypatch, KeyboardInterrupt())
    said = graftwerk("methods")
    assert said.code == 130
    assert said.err == "graftwerk: stopped by Ctrl-C\n"


def test_command_unexpected_exception_prints_one_line(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    breaking(monkeypatch, KeyError("a\nb"))
    said = graftwerk("methods")
    assert said.code == 1
    first, hint, *rest = said.err.splitlines()
    assert first.startswith("graftwerk: KeyError: ")
    assert "--debug" in hint
    assert rest == []
    said = graftwerk("methods", "--debug")
    assert said.code == 1
    assert "Traceback (most recent call last)" in said.err
    assert "in raises" in said.err


def test_command_raises_gc_threshold_and_restores_it(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    before, inside = gc.get_threshold(), []

    def raises(*_: object, **__: object) -> None:
        inside.append(gc.get_threshold())
        raise KeyError("x")

    monkeypatch.setattr("graftwerk.cli.methods.describe_methods", raises)
    graftwerk("methods")
    assert inside == [entry.COLLECT_AFTER]
    assert gc.isenabled()
    assert gc.get_threshold() == before


def test_command_debug_after_double_dash_is_an_argument(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    breaking(monkeypatch, KeyError("x"))
    assert "Traceback" not in graftwerk("methods", "--", "--debug").err


def test_command_out_of_memory_or_disk_exits_5(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    breaking(monkeypatch, MemoryError())
    said = graftwerk("methods")
    assert said.code == 5
    assert "memory" in said.err
    breaking(monkeypatch, OSError(28, "No space left on device", "/x/y"))
    said = graftwerk("methods")
    assert said.code == 5
    assert "No space left on device" in said.err
    assert "where: /x/y" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "x.yaml"], "trian"),
        (["train"], "CONFIG.yaml"),
        (["methods", "--jsno"], "--jsno"),
        (["train", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
    ids=["no such command", "missing argument", "no such option", "no such file"],
)
def test_command_wrong_usage_exits_2_with_hint(graftwerk: Run, arguments: list[str], words: str) -> None:
    said = graftwerk(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert words in said.err
    assert "hint:" in said.err
    said = graftwerk(*arguments, "--json")
    assert said.code == 2
    assert words in said.json["what"]
    assert said.json["error"] == "config"


def test_train_misspelled_key_suggests_right_one(graftwerk: Run, config: Path) -> None:
    said = graftwerk("train", config, "--json", "training.lerning_rate=1e-3")
    assert said.code == 2
    assert "did you mean `learning_rate`" in said.json["what"]
    said = graftwerk("train", config, "method.rnak=4")
    assert said.code == 2
    assert "rank" in said.err


def test_command_closed_reader_exits_0() -> None:
    """`graftwerk schema | head -1`: no message, no traceback, nothing failed."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "graftwerk", "schema"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=600
    )
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["schema"], ["methods"], ["methods", "--json"]], ids=" ".join)
def test_command_broken_pipe_on_output_exits_0(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """A short result fits into the pipe before its reader goes, a long one does not."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    dropped: list[bool] = []
    monkeypatch.setattr(entry, "_drop_stdout", lambda: dropped.append(True))
    monkeypatch.setattr(sys, "stdout", Gone())
    assert entry.main(arguments) == 0
    assert dropped


def test_command_broken_pipe_during_work_exits_141(monkeypatch: pytest.MonkeyPatch, graftwerk: Run) -> None:
    breaking(monkeypatch, BrokenPipeError())
    monkeypatch.setattr(entry, "_drop_stdout", lambda: None)
    assert graftwerk("methods").code == entry.BROKEN_PIPE == 141


def test_help_and_version_are_printed(graftwerk: Run) -> None:
    said = graftwerk("--help")
    assert said.code == 0
    for name in ("train", "evaluate", "predict", "compare", "inspect", "methods", "doctor", "schema", "report"):
        assert f"\n  {name} " in said.out
        own = graftwerk(name, "--help")
        assert own.code == 0
        for option in ("--json", "--quiet", "--debug", "--help"):
            assert option in own.out, (name, option)
    alone = graftwerk()
    assert (alone.code, alone.out, alone.err) == (0, graftwerk("--help").out, "")
    assert graftwerk("--version").out.strip().count(".") == 2


def test_json_is_alone_on_stdout_despite_library_prints(tmp_path: Path) -> None:
    """Prints of Python and of C, and of child processes, go to stderr."""
    script = (
        "import os, sys\n"
        "from graftwerk.cli import methods\n"
        "def noisy():\n"
        "    print('from python'); os.write(1, b'from C\\n'); os.system('echo from a child')\n"
        "    return []\n"
        "methods.describe_methods = noisy\n"
        "from graftwerk.cli.main import main\n"
        "sys.exit(main(['methods', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"methods": []}
    assert done.stdout.count("\n") == 1
    for origin in ("from python", "from C", "from a child"):
        assert origin in done.stderr
