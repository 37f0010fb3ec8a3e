"""`.ci/run` says how the tests ended, in its last line and its exit code."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "run"


@pytest.mark.parametrize(
    ("recipe", "last", "failed"),
    [
        (["3 failed, 2 passed in 1.00s is said by a test", "=== 12 passed, 1 skipped in 2.31s ==="], None, False),
        (["==== 1 failed, 11 passed in 62.31s (0:01:02) ====", "!exit 1"], 0, True),
        (["ruff found 3 errors", "!exit 1"], "make test stopped before pytest ran", True),
    ],
    ids=["passed", "failed", "stopped before"],
)
def test_ci_run_ends_with_last_line_and_exit_code(
    tmp_path: Path, recipe: list[str], last: object, failed: bool
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    lines = [line[1:] if line.startswith("!") else f"@echo '{line}'" for line in recipe]
    (tmp_path / "Makefile").write_text("test:\n" + "".join(f"\t{line}\n" for line in lines))
    done = subprocess.run([str(tmp_path / ".ci" / "run")], capture_output=True, text=True, timeout=60)
    expected = last if isinstance(last, str) else [line for line in recipe if not line.startswith("!")][-1]
    assert done.stdout.splitlines()[-1] == expected
    assert (done.returncode != 0) is failed


def test_package_data_names_every_file_beside_the_code() -> None:
    """What an installed package would lack, an editable one still finds."""
    package = ROOT / "src" / "graftwerk"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["graftwerk"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    beside = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside == shipped
