"""Kill -9 at any moment: what comes after a resume is, to the last byte, what would have come without."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.training.train import train
from tests.training.children import Child, left_by, log_of

Build = Callable[..., dict[str, Any]]


def test_train_killed_at_random_resumes_bit_exact(run_file: Build, tmp_path: Path, undisturbed: Path) -> None:
    """Each child goes on where the one before was killed; the time to the kill is drawn from the time that a whole
    run takes.
    """
    tree = run_file()
    draw, kills, runs = random.Random(7), 0, 0
    started = time.monotonic()
    assert Child(lambda: train(run_file(tmp_path / "timed"))).wait() == 0
    whole = time.monotonic() - started
    while kills < 6:
        child = Child(lambda: train(tree, resume=True))
        time.sleep(draw.uniform(0.1, 0.9) * whole)
        code = child.kill()
        kills += code != 0
        if code == 0:  # it was done before the kill
            runs += 1
            assert left_by(tmp_path / "run") == left_by(undisturbed)
            shutil.rmtree(tmp_path / "run")
    assert Child(lambda: train(tree, resume=True)).wait() == 0
    assert left_by(tmp_path / "run") == left_by(undisturbed)
    kinds = ("step", "evaluation", "diagnosis")
    assert log_of(tmp_path / "run", *kinds) == log_of(undisturbed, *kinds)
    assert not list((tmp_path / "run").rglob(".*"))


def test_train_killed_after_each_step_and_save_resumes_bit_exact(
    run_file: Build, tmp_path: Path, undisturbed: Path
) -> None:
    """Moments that random kills may miss; the listener is called between them."""
    import os
    import signal

    moments = [
        ("step", 1),
        ("step", 4),
        ("evaluation", 4),
        ("checkpoint", 4),
        ("step", 7),
        ("checkpoint", 12),
        ("phase", 12),
    ]
    for moment in moments:

        def listener(event: Any, moment: tuple[str, int] = moment) -> None:
            if (event.kind, event.step) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        code = Child(lambda told=listener: train(run_file(), resume=True, listener=told)).wait()  # type: ignore[misc]
        assert code == -signal.SIGKILL, moment
    train(run_file(), resume=True)
    assert left_by(tmp_path / "run") == left_by(undisturbed)
    assert log_of(tmp_path / "run", "step") == log_of(undisturbed, "step")
