"""Checkpoints are whole or not there; damage is seen, named and passed over."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.errors import DivergedError, IntegrityError, ResourceError
from graftwerk.training import checkpoint
from graftwerk.training.checkpoint import Checkpoints, Snapshot
from graftwerk.training.run_dir import FILES
from tests.training.children import Child


def snapshot(step: int, best: int | None = None, **state: Any) -> Snapshot:
    generator = torch.Generator().manual_seed(step)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Snapshot(
        step=step,
        weights={"a.lora_A.weight": tensor(4, 8), "classifier.bias": tensor(3)},
        optimizer={"exp_avg.classifier.bias": tensor(3), "step.classifier.bias": tensor()},
        rng={"0.torch": torch.arange(20, dtype=torch.uint8)},
        state={
            "step": step,
            "best": None if best is None else {"step": best, "metric": "accuracy", "value": 0.5},
            **state,
        },
    )


def same(one: Snapshot, other: Snapshot) -> bool:
    tensors = [(getattr(one, part), getattr(other, part)) for part in ("weights", "optimizer", "rng")]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
        for a, b in tensors
    ) and dict(one.state) == dict(other.state)


def test_checkpoint_roundtrip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() is None
    assert checkpoints.recoverable() is None
    saved = snapshot(7, figures={"x": [1.5, None]})
    path = checkpoints.save(saved)
    assert path == tmp_path / "step-000007"
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert same(saved, loaded)
    assert (tmp_path / "latest").read_text() == "step-000007\n"
    assert not (tmp_path / "best").exists()
    assert torch.equal(checkpoints.weights(7)["classifier.bias"], saved.weights["classifier.bias"])


def test_save_deletes_old_and_keeps_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        checkpoints.save(snapshot(step, best))
    assert checkpoints.steps() == [2, 4, 5]
    assert (tmp_path / "best").read_text() == "step-000002\n"
    checkpoints.save(snapshot(6, 6))
    # 5 could still be gone back to, and its best is 2.
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.save(snapshot(7, 6))
    assert checkpoints.steps() == [6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step-000006", "step-000007"]


@pytest.mark.parametrize("limit", [1, 2])
def test_save_after_resume_from_older_does_not_delete_it(tmp_path: Path, limit: int) -> None:
    for step in range(1, limit + 2):
        Checkpoints(tmp_path, limit=9).save(snapshot(step))
    for step in range(2, limit + 2):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    checkpoints = Checkpoints(tmp_path, limit=limit)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    checkpoints.finish_pruning(loaded)
    assert checkpoints.load(1).step == 1
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    checkpoints.save(snapshot(limit + 2))
    assert checkpoints.load_latest().step == limit + 2  # type: ignore[union-attr]


def test_save_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(3, first=True))
    checkpoints.save(snapshot(3, first=False))
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.state["first"] is False


def pair(folder: Path) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, warn=said.append)
    checkpoints.save(snapshot(1))
    checkpoints.save(snapshot(2))
    return checkpoints, said


FILE_NAMES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", FILES)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_load_truncated_anywhere_falls_back_and_names_file(tmp_path: Path, name: str) -> None:
    checkpoints, said = pair(tmp_path)
    file = tmp_path / "step-000002" / name
    whole = file.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 15)), len(whole) - 1}:
        file.write_bytes(whole[:length])
        said.clear()
        loaded = checkpoints.load_latest()
        assert loaded is not None
        assert loaded.step == 1, length
        assert str(file) in said[0], length
    file.write_bytes(whole)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 2


@pytest.mark.parametrize("name", FILE_NAMES)
def test_load_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    checkpoints, said = pair(tmp_path)
    file = tmp_path / "step-000002" / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 25)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(bytes(changed))
        loaded = checkpoints.load_latest()
        assert loaded is not None
        assert loaded.step == 1, (place, whole[place : place + 1])
        assert str(file.parent) in said[-1]


def test_load_missing_or_extra_file_is_detected(tmp_path: Path) -> None:
    checkpoints, said = pair(tmp_path)
    (tmp_path / "step-000002" / "extra").write_text("x")
    assert checkpoints.load_latest().step == 1  # type: ignore[union-attr]
    (tmp_path / "step-000002" / "extra").unlink()
    (tmp_path / "step-000002" / "optimizer.safetensors").unlink()
    assert checkpoints.load_latest().step == 1  # type: ignore[union-attr]
    assert "optimizer.safetensors is missing" in said[-1]


def test_load_latest_without_intact_checkpoint_raises_with_exit_code_8(tmp_path: Path) -> None:
    checkpoints, _ = pair(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"step-000002/state.json") as caught:
        checkpoints.load_latest()
    assert caught.value.exit_code == 8


def test_load_without_optimizer_allows_only_warm_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved = snapshot(1)
    checkpoints.save(saved)
    (tmp_path / "step-000001" / "optimizer.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"optimizer.safetensors is missing") as caught:
        checkpoints.load_latest()
    assert f"warm_start={tmp_path / 'step-000001'}" in (caught.value.hint or "")
    assert torch.equal(checkpoints.weights(1)["classifier.bias"], saved.weights["classifier.bias"])
    (tmp_path / "step-000001" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(IntegrityError) as caught:
        checkpoints.load_latest()
    assert "warm_start" not in (caught.value.hint or "")


def test_save_at_size_limit_leaves_last_checkpoint(tmp_path: Path) -> None:
    checkpoints, _ = pair(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    large = snapshot(3)
    large.weights["classifier.weight"] = torch.zeros(10_000)  # type: ignore[index]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ResourceError, match="larger than the allowed file size") as caught:
            checkpoints.save(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_load_latest_ignores_missing_or_wrong_pointers(tmp_path: Path) -> None:
    checkpoints, said = pair(tmp_path)
    (tmp_path / "latest").write_text("step-000001\n")
    assert checkpoints.load_latest().step == 2  # type: ignore[union-attr]
    (tmp_path / "latest").unlink()
    assert checkpoints.load_latest().step == 2  # type: ignore[union-attr]
    assert said == []


def test_load_latest_skips_later_format_with_reason(tmp_path: Path) -> None:
    checkpoints, said = pair(tmp_path)
    listing = tmp_path / "step-000002" / FILES
    listing.write_text(json.dumps({**json.loads(listing.read_text()), "format": 2}, indent=1, sort_keys=True) + "\n")
    assert checkpoints.load_latest().step == 1  # type: ignore[union-attr]
    assert "format 2" in said[0]


def test_save_non_finite_weights_raises(tmp_path: Path) -> None:
    checkpoints, _ = pair(tmp_path)
    bad = snapshot(3)
    bad.weights["classifier.bias"][1] = float("nan")
    with pytest.raises(DivergedError, match=r"classifier.bias") as caught:
        checkpoints.save(bad)
    assert checkpoints.steps() == [1, 2]
    assert (caught.value.recovered or "").endswith("step-000002")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_save_failing_leaves_last_checkpoint_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    checkpoints, _ = pair(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=r"[0-9,]+ bytes are needed") as caught:
        checkpoints.save(snapshot(3))
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert checkpoints.load_latest().step == 2  # type: ignore[union-attr]


def killed_at(call: int, save: Any) -> Child:
    """``save`` in a child that kills itself at its ``call``-th fsync, rename, write or deletion."""

    def run() -> None:
        calls = itertools.count(1)

        def deadly(real: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapped

        for name in ("fsync", "replace", "rename"):
            setattr(os, name, deadly(getattr(os, name)))
        shutil.rmtree = deadly(shutil.rmtree)
        Path.write_bytes = deadly(Path.write_bytes)  # type: ignore[method-assign]
        checkpoint.write_tensors = deadly(checkpoint.write_tensors)
        save()

    return Child(run)


def left_by(folder: Path) -> tuple[list[str], list[int]]:
    """Where the two pointers point, and the steps that are there."""
    return [(folder / name).read_text().strip() for name in ("latest", "best")], Checkpoints(folder).steps()


def test_save_is_atomic_under_kill(tmp_path: Path) -> None:
    """Also of a save that replaces a checkpoint and deletes old ones; and the next save works as if nothing had
    been.
    """
    kept, seen = tmp_path / "kept", set()
    checkpoints = Checkpoints(kept, limit=1)
    checkpoints.save(snapshot(1, 1))
    checkpoints.save(snapshot(2, 2))
    for target in (3, 2):  # a new one, and one that is there already
        for call in itertools.count(1):
            folder = tmp_path / f"{target}-{call}"
            shutil.copytree(kept, folder)
            checkpoints = Checkpoints(folder, limit=1)
            code = killed_at(call, lambda c=checkpoints, t=target: c.save(snapshot(t, t, again=True))).wait()
            checkpoints.clean()
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
            loaded = checkpoints.load_latest()
            assert loaded is not None
            new = same(loaded, snapshot(target, target, again=True))
            assert new or same(loaded, snapshot(2, 2)), call
            seen.add((target, new))
            checkpoints.finish_pruning(loaded)
            assert left_by(folder) == ([f"step-{loaded.step:06d}"] * 2, [loaded.step]), call
            if code == 0:
                assert new
                break
            assert code == -signal.SIGKILL
            if loaded.step == 2:
                checkpoints.save(snapshot(3, 3))
                assert checkpoints.steps() == [3]
            shutil.rmtree(folder)
        assert call > 15, "the kills did not hit"
    assert seen == {(3, False), (3, True), (2, False), (2, True)}
