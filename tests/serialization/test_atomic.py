"""Folders and files appear whole or not at all: killed at any call, on a full, read-only or broken disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwerk.errors import ConflictError, IntegrityError, ResourceError
from graftwerk.serialization import atomic
from graftwerk.serialization.atomic import read_steadily, recover, write_file, write_folder


def filler(word: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "one").write_text(word)
        (folder / "inner").mkdir()
        (folder / "inner" / "two").write_text(word * 1000)

    return fill


def content(folder: Path) -> set[str]:
    """The words found in a folder; more than one is a mixture."""
    folder = recover(folder)
    return {(folder / "one").read_text(), (folder / "inner" / "two").read_text()[:3]}


def test_write_folder_creates_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c"
    assert write_folder(target, filler("new")) == target
    assert content(target) == {"new"}
    assert os.listdir(target.parent) == ["c"]


@pytest.mark.parametrize("exchange", [True, False])
def test_write_folder_replaces_existing_folder_without_leftovers(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "adapter"
    write_folder(target, filler("old"))
    (target / "extra").write_text("only in the old one")
    write_folder(target, filler("new"))
    assert content(target) == {"new"}
    assert not (target / "extra").exists()
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_write_folder_killed_at_every_system_call_leaves_old_or_new(
    tmp_path: Path, exchange: bool, existing: bool
) -> None:
    """A child dies at its n-th call, for every n until it gets through; each time old or new is found, whole."""
    calls = ["mkdir", "rename", "replace", "fsync", "open", "rmdir", "unlink"]
    outcomes = []
    for n in range(200):
        target = tmp_path / f"{n}" / "adapter"
        if existing:
            write_folder(target, filler("old"))
        child = os.fork()
        if child == 0:
            left = [n]
            for name in calls:
                setattr(os, name, _dying(getattr(os, name), left))
            atomic._exchange = _dying(atomic._exchange, left) if exchange else lambda one, other: False
            write_folder(target, filler("new"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if existing or recover(target).exists():
            found = content(target)
            assert found in ({"old"}, {"new"}), f"after call {n}: {found}"
            outcomes.append(found.pop())
        write_folder(target, filler("fin"))
        assert content(target) == {"fin"}
        assert os.listdir(target.parent) == ["adapter"], f"leftovers after call {n}"
        if done:
            break
    assert done
    assert n > 6
    assert outcomes[-1] == "new"
    assert not existing or "old" in outcomes


def _dying(function: Callable[..., object], left: list[int]) -> Callable[..., object]:
    def call(*arguments: object, **named: object) -> object:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*arguments, **named)

    return call


def test_recover_interrupted_rename_restores_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_folder(target, filler("old"))
    os.rename(target, tmp_path / ".adapter.replaced")
    assert recover(target) == target
    assert content(target) == {"old"}


def test_write_folder_after_interrupted_writer_removes_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for still_there in (False, True):
        write_folder(target, filler("old"))
        (shutil.copytree if still_there else os.rename)(target, tmp_path / ".adapter.replaced")
        write_folder(target, filler("new"))
        assert os.listdir(tmp_path) == ["adapter"]
        assert content(target) == {"new"}


def test_write_folder_removes_partial_folders_of_dead_processes_only(tmp_path: Path) -> None:
    mine = tmp_path / f".adapter.partial-{os.getpid()}-aaaa"
    dead = tmp_path / ".adapter.partial-4194999-bbbb"
    mine.mkdir()
    dead.mkdir()
    write_folder(tmp_path / "adapter", filler("new"))
    assert mine.exists()
    assert not dead.exists()


@pytest.mark.parametrize("number", sorted(atomic.FAULTS))
@pytest.mark.parametrize("hidden_in_text", [False, True])
def test_write_folder_os_error_raises_resource_error_and_keeps_old(
    tmp_path: Path, number: int, hidden_in_text: bool
) -> None:
    target = tmp_path / "adapter"
    write_folder(target, filler("old"))

    def fail(folder: Path) -> None:
        (folder / "one").write_text("half")
        if hidden_in_text:
            raise RuntimeError(f"Error while serializing: I/O error: something (os error {number})")
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError) as caught:
        write_folder(target, fail, bytes_needed=12_345)
    assert "12,345 bytes" in caught.value.what
    assert caught.value.exit_code == 5
    assert str(target) in str(caught.value.recovered)
    assert content(target) == {"old"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_write_folder_other_exception_propagates_without_leftovers(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "one").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "adapter", fail)
    assert os.listdir(tmp_path) == []


def test_write_folder_file_size_limit_keeps_old(tmp_path: Path) -> None:
    """A real one, set on a child: the kernel refuses the write, Python sees errno 27."""
    target = tmp_path / "adapter"
    write_folder(target, filler("old"))
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_folder(target, filler("new"))
        except ResourceError as fault:
            os._exit(0 if "file size" in fault.what and "3,003" not in fault.what else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert content(target) == {"old"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_write_folder_too_little_space_raises_before_writing(tmp_path: Path) -> None:
    filled = []
    with pytest.raises(ResourceError, match="bytes are free"):
        write_folder(tmp_path / "adapter", filled.append, bytes_needed=1 << 60)
    assert filled == []


def test_write_folder_read_only_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, mode: int = 0o777, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ResourceError, match="read-only") as caught:
        write_folder(tmp_path / "new" / "adapter", filler("new"))
    assert caught.value.exit_code == 5


def test_write_failed_fsync_raises_and_keeps_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "f", "old")

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ResourceError):
        write_file(tmp_path / "f", "new")
    with pytest.raises(ResourceError):
        write_folder(tmp_path / "folder", filler("new"))
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_write_folder_syncs_content_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, rename = os.fsync, os.rename

    def noted_sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    write_folder(tmp_path / "adapter", filler("new"))
    before, after = order[: order.index("rename")], order[order.index("rename") + 1 :]
    assert {"one", "two", "inner"} <= set(before)
    assert any(name.startswith(".adapter.partial") for name in before)
    assert tmp_path.name in after


def test_write_file_writes_text_bytes_and_streams(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    write_file(target, "ä")
    assert target.read_bytes() == "ä".encode()
    target.chmod(0o600)
    write_file(target, b"bytes")
    assert target.stat().st_mode & 0o777 == 0o600
    write_file(target, lambda stream: stream.write(b"streamed") and None)
    assert target.read_bytes() == b"streamed"
    assert os.listdir(target.parent) == ["file.json"]


def test_write_folder_follows_symlink(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", filler("old"))
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", filler("new"))
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"new"}


def test_write_file_and_folder_of_other_kind_raise_conflict(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConflictError):
        write_folder(tmp_path / "file", filler("new"))
    with pytest.raises(ConflictError):
        write_file(tmp_path / "folder", "new")
    with pytest.raises(ConflictError):
        write_file(tmp_path / "file" / "below", "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_write_error_after_rename_reports_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_file(tmp_path / "file", "old")
    write_folder(tmp_path / "folder", filler("old"))
    monkeypatch.setattr(atomic, "_sync_folder", fail)
    with pytest.raises(ResourceError) as caught:
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert "as it was to be written" in str(caught.value.recovered)
    monkeypatch.setattr(atomic, "_sync_tree", lambda folder: None)
    with pytest.raises(ResourceError) as caught:
        write_folder(tmp_path / "folder", filler("new"))
    assert content(tmp_path / "folder") == {"new"}
    assert "as it was to be written" in str(caught.value.recovered)


def test_read_steadily_folder_replaced_during_read_returns_one_state(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    write_folder(target, filler("old"))
    tries = []

    def read() -> tuple[str, str]:
        one = (target / "one").read_text()
        tries.append(one)
        if len(tries) < 3:
            write_folder(target, filler(f"n{len(tries)}"))
            if len(tries) == 1:
                raise IntegrityError("the files do not fit together")
        return one, (target / "inner" / "two").read_text()[:2]

    assert read_steadily(target, read) == ("n2", "n2")
    assert tries == ["old", "n1", "n2"]
    with pytest.raises(FileNotFoundError):
        read_steadily(tmp_path, lambda: (tmp_path / "nothing").read_text())
