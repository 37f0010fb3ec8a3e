"""SIGINT and SIGTERM, wherever they hit: the step is finished, the state saved, the exit code says it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import RunInterrupted
from graftwerk.evaluation import evaluate as evaluation
from graftwerk.models import load as loading
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event
from graftwerk.training.signals import StopSignals
from graftwerk.training.train import Run, train
from tests.training.children import Child, left_by, log_of

Build = Callable[..., dict[str, Any]]


def signals_at(kind: str, step: int, *signums: int) -> Callable[[Event], None]:
    def listener(event: Event) -> None:
        if (event.kind, event.step) == (kind, step):
            for signum in signums:
                os.kill(os.getpid(), signum)

    return listener


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_step_saves(run_file: Build, tmp_path: Path, undisturbed: Path, signum: int, code: int) -> None:
    with pytest.raises(RunInterrupted) as caught:
        train(run_file(), listener=signals_at("step", 6, signum))
    assert caught.value.exit_code == code
    assert (caught.value.recovered or "").endswith("step-000006")
    assert "--resume" in (caught.value.hint or "")
    assert Checkpoints(tmp_path / "run" / "checkpoints").load(6).state["step"] == 6
    assert Run(tmp_path / "run").manifest["status"] == "interrupted"
    assert not (tmp_path / "run" / ".lock").exists()
    train(run_file(), resume=True)
    assert (
        left_by(tmp_path / "run")["adapter/adapter_model.safetensors"]
        == (left_by(undisturbed)["adapter/adapter_model.safetensors"])
    )
    assert log_of(tmp_path / "run", "step", "evaluation") == log_of(undisturbed, "step", "evaluation")


def test_signal_during_evaluation_saves(
    run_file: Build, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left at once, the step is saved, and the resumed run evaluates first."""
    real = evaluation.run_model

    def run_model(*args: Any, on_progress: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, on_progress=on_progress, **kwargs)

    monkeypatch.setattr(evaluation, "run_model", run_model)
    events: list[Event] = []
    with pytest.raises(RunInterrupted):
        train(run_file(), listener=events.append)
    assert [event.step for event in events if event.kind == "evaluation"] == []
    assert [event.step for event in events if event.kind == "checkpoint"] == [4]
    monkeypatch.undo()
    train(run_file(), resume=True)
    assert left_by(tmp_path / "run") == left_by(undisturbed)
    assert log_of(tmp_path / "run", "step", "evaluation") == log_of(undisturbed, "step", "evaluation")


def test_signal_during_final_evaluation_resumes(run_file: Build, tmp_path: Path, undisturbed: Path) -> None:
    with pytest.raises(RunInterrupted) as caught:
        train(run_file(), listener=signals_at("phase", 12, signal.SIGTERM))
    assert (caught.value.recovered or "").endswith("step-000012")
    assert not (tmp_path / "run" / "adapter").exists()
    train(run_file(), resume=True)
    assert left_by(tmp_path / "run") == left_by(undisturbed)


def test_signal_during_setup_stops_at_once(run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunInterrupted) as caught:
        train(run_file(), listener=lambda event: os.kill(os.getpid(), signal.SIGINT) if event.kind == "phase" else None)
    assert caught.value.exit_code == 130
    real = loading.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(RunInterrupted) as caught:
        train(run_file())
    assert caught.value.exit_code == 143
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_signal_during_save_finishes_it(run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(1)
        if ".step-000004.partial" in os.readlink(f"/proc/self/fd/{descriptor}") and not signalled:
            signalled.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        real(descriptor)

    signalled: list[int] = []
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunInterrupted) as caught:
        train(run_file())
    assert signalled
    assert (caught.value.recovered or "").endswith("step-000004")
    assert Checkpoints(tmp_path / "run" / "checkpoints").load(4).step == 4


def test_second_signal_during_save_leaves_last_checkpoint(
    run_file: Build, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, signalled = os.fsync, []

    def fsync(descriptor: int) -> None:
        if ".step-000008.partial" in os.readlink(f"/proc/self/fd/{descriptor}") and len(signalled) < 2:
            for _ in range(2):
                signalled.append(1)
                os.kill(os.getpid(), signal.SIGINT)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunInterrupted) as caught:
        train(run_file())
    assert caught.value.exit_code == 130
    assert (caught.value.recovered or "").endswith("step-000004")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-000008" not in names
    assert not [name for name in names if name.startswith(".")]
    monkeypatch.undo()
    train(run_file(), resume=True)
    assert left_by(tmp_path / "run") == left_by(undisturbed)


def test_stop_signals_restores_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals().installed() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_train_outside_main_thread_installs_no_handlers(run_file: Build, tmp_path: Path) -> None:
    done: list[Run] = []
    thread = threading.Thread(target=lambda: done.append(train(run_file(max_steps=1, eval_steps=None))))
    thread.start()
    thread.join()
    assert done[0].manifest["status"] == "finished"


def test_train_in_locked_folder_names_holder(run_file: Build, tmp_path: Path) -> None:
    """And a run that waits for nothing is not disturbed by it."""
    import time

    from graftwerk.errors import ConflictError
    from tests.training.children import until

    slow = Child(lambda: train(run_file(), listener=lambda event: time.sleep(0.3) if event.kind == "step" else None))
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    with pytest.raises(ConflictError, match=f"process {slow.pid} ") as caught:
        train(run_file(), overwrite=True)
    assert caught.value.exit_code == 7
    assert slow.wait() == 0
