"""Commands run inside the test's process, as `main` runs them: exit code, stdout, stderr."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftwerk.cli.main import main
from tests.cli.commands import Run, Said, run_file


@pytest.fixture
def graftwerk(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> Path:
    return run_file(tmp_path, tiny_encoder, glosses)
