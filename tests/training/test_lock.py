"""One run in a folder: who holds it is named, and the dead hold nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from graftwerk.errors import ConflictError
from graftwerk.machine import start_ticks
from graftwerk.training.lock import Holder, RunLock
from graftwerk.training.run_dir import LOCK
from tests.training.children import Child, until


def holding(folder: Path) -> Child:
    child = Child(lambda: (RunLock(folder).acquire(), time.sleep(60)))
    until(lambda: (folder / LOCK).exists() and (folder / LOCK).stat().st_size > 0)
    return child


def test_lock_second_holder_is_refused_with_name(tmp_path: Path) -> None:
    child = holding(tmp_path)
    try:
        with pytest.raises(ConflictError, match=f"process {child.pid} ") as caught:
            RunLock(tmp_path).acquire()
        assert caught.value.exit_code == 7
    finally:
        child.kill()


def test_lock_of_killed_holder_is_free(tmp_path: Path) -> None:
    holding(tmp_path).kill()
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_lock_removes_folders_made_for_it(tmp_path: Path) -> None:
    own = tmp_path / "runs" / "one"
    with RunLock(own):
        assert (own / LOCK).exists()
    assert not list(tmp_path.iterdir())
    own.mkdir(parents=True)
    with RunLock(own):
        pass
    assert own.is_dir(), "a folder that was there stays"
    with RunLock(own / "two"):
        (own / "kept").touch()
    assert [path.name for path in own.iterdir()] == ["kept"]
    with RunLock(own / "three"):
        (own / "three" / "result").touch()
    assert [path.name for path in (own / "three").iterdir()] == ["result"]


def test_lock_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConflictError, match=f"process {os.getpid()} "):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass


def test_lock_race_has_one_winner(tmp_path: Path) -> None:
    children = [Child(lambda: (RunLock(tmp_path).acquire(), time.sleep(60))) for _ in range(6)]
    until(lambda: (tmp_path / LOCK).exists() and (tmp_path / LOCK).stat().st_size > 0)
    winner = json.loads((tmp_path / LOCK).read_text())["pid"]
    assert [child.wait() for child in children if child.pid != winner] == [7] * 5
    assert next(child for child in children if child.pid == winner).kill() == -signal.SIGKILL


def stale(**changes: object) -> str:
    return json.dumps({**dataclasses.asdict(Holder.me()), **changes})


@pytest.mark.parametrize(
    "content",
    [
        stale(started=(start_ticks(os.getpid()) or 0) - 5),  # the pid is used again, by us
        stale(pid=2**22 + 1),
        stale(boot="00000000-0000-0000-0000-000000000000"),  # before the last start of this machine
        "",
        '{"pid": 1',
        '{"what": "ever"}',
        "[1, 2]",
    ],
    ids=["pid used again", "no such process", "other boot", "empty", "torn", "other keys", "no object"],
)
def test_lock_of_dead_process_is_broken(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["started"] == start_ticks(os.getpid())


def test_lock_of_living_process_holds_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text(stale(pid=1, started=start_ticks(1)))
    with pytest.raises(ConflictError, match="process 1 "):
        RunLock(tmp_path).acquire()
    monkeypatch.setattr("graftwerk.training.lock._flock", lambda descriptor: None)
    with pytest.raises(ConflictError, match="process 1 "):
        RunLock(tmp_path).acquire()
    (tmp_path / LOCK).write_text(stale(pid=2**22 + 1))
    with RunLock(tmp_path):
        pass
    (tmp_path / LOCK).write_text(stale(host="elsewhere", boot="another"))
    with pytest.raises(ConflictError, match="on elsewhere") as caught:
        RunLock(tmp_path).acquire()
    assert f"delete {tmp_path / LOCK}" in (caught.value.hint or "")


def test_lock_child_of_dead_holder_does_not_hold_it(tmp_path: Path) -> None:
    """A forked child inherits the kernel's lock; what is written says that its holder is dead."""

    def hold() -> None:
        RunLock(tmp_path).acquire()
        if (orphan := os.fork()) == 0:
            time.sleep(60)
        (tmp_path / "orphan").write_text(str(orphan))
        time.sleep(60)

    child = Child(hold)
    until(lambda: (tmp_path / "orphan").exists() and (tmp_path / "orphan").read_text() != "")
    child.kill()
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "orphan").read_text()), signal.SIGKILL)


def test_lock_ignores_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = holding(tmp_path)
    try:
        for jump in (-1e9, 1e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
            with pytest.raises(ConflictError):
                RunLock(tmp_path).acquire()
    finally:
        child.kill()
