"""What is written while a run runs, and that a log can never cost the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from pathlib import Path

import pytest

from graftwerk.errors import ResourceError
from graftwerk.training.callbacks.jsonl import JsonLines
from graftwerk.training.callbacks.tensorboard import TensorBoard
from graftwerk.training.events import Event, EventBus, to_logging


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_writes_one_object_per_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    log(Event("step", 1, loss=0.5))
    assert lines(tmp_path / "log") == [{"kind": "step", "step": 1, "loss": 0.5}]
    log(Event("progress", 2, left_seconds=3.0))
    log(Event("bad_step", 2, loss=float("nan"), norm=[float("inf")], path=tmp_path))
    assert lines(tmp_path / "log")[1:] == [
        {"kind": "bad_step", "step": 2, "loss": "nan", "norm": ["inf"], "path": str(tmp_path)}
    ]


def test_jsonl_resume_truncates_to_checkpoint(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    log(Event("step", 1))
    offset = log.sync()
    log(Event("step", 2))
    os.write(os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND), b'{"kind": "st')  # killed in the middle of a line
    again = JsonLines(tmp_path / "log", offset)
    again(Event("step", 2, second=True))
    assert lines(tmp_path / "log") == [{"kind": "step", "step": 1}, {"kind": "step", "step": 2, "second": True}]
    assert again.missing == 0
    anew = JsonLines(tmp_path / "log")
    anew(Event("step", 1))
    assert len(lines(tmp_path / "log")) == 1


def test_jsonl_shorter_than_checkpoint_reports_missing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"kind": "step", "step": 1}\n')
    log = JsonLines(tmp_path / "log", 100)
    assert log.missing == 100 - 28
    log(Event("step", 2))
    assert [line["step"] for line in lines(tmp_path / "log")] == [1, 2]


def test_jsonl_full_disk_loses_lines_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = JsonLines(tmp_path / "log", on_trouble=said.append)
    log(Event("step", 1))
    real = os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    log(Event("step", 2))
    assert len(said) == 1  # at once, and not when more is lost
    log(Event("step", 3))
    monkeypatch.setattr(os, "pwrite", real)
    log(Event("step", 4))
    assert [line["step"] for line in lines(tmp_path / "log")] == [1, 4]
    assert log.lost == 2
    assert len(said) == 1
    assert "No space left" in said[0]


def test_jsonl_at_size_limit_writes_only_full_lines(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for step in range(10):
            log(Event("step", step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in lines(tmp_path / "log")] == [0, 1, 2]  # 28 bytes each
    assert log.lost == 7


def test_jsonl_unopenable_raises(tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        JsonLines(tmp_path / "no" / "folder" / "log")


def test_tensorboard_resume_purges_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # files of one second and process are read by the text of a counter, in which 10 comes before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first(Event("step", step, loss=float(step), note="words"))
    first(Event("evaluation", 3, accuracy=0.5, best=True))
    first(Event("phase", 3, name="x"))
    first.close()
    second = TensorBoard(tmp_path, after=1)
    second(Event("step", 2, loss=20.0))
    second.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/loss", "validation/accuracy"]
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_unwritable_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    board = TensorBoard(tmp_path / "file" / "below", on_trouble=said.append)
    board(Event("step", 1, loss=1.0))
    board(Event("step", 2, loss=1.0))
    board.close()
    assert len(said) == 1


def test_to_logging_warns_of_problems(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventBus(to_logging)
    with caplog.at_level(logging.INFO, logger="graftwerk"):
        hub(Event("step", 1, loss=0.5))
        hub(Event("diagnosis", 60, code="no_learning", text="nothing is learnt", hint="a higher rate"))
        hub(Event("finding", 0, message="leaked", grave=True))
        hub(Event("finding", 0, message="harmless", grave=False))
    assert [record.getMessage() for record in caplog.records] == [
        "step 60: nothing is learnt (a higher rate)",
        "step 0: leaked",
    ]


def test_event_figures_is_alias_of_values() -> None:
    event = Event("step", 3, loss=0.5)
    assert event.values == {"loss": 0.5}
    with pytest.warns(DeprecationWarning, match="values"):
        assert event.figures is event.values
    assert repr(event) == "Event('step', 3, loss=0.5)"
    assert event == Event("step", 3, loss=0.5)
    assert event != Event("step", 3, loss=0.6)
