"""Probing: what is fast decides, once for a machine; threads never exceed the cores that are ours."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.errors import ConfigError
from graftwerk.models import hardware
from graftwerk.models.cache import cache_folder, recall, remember
from graftwerk.models.hardware import ROUNDS, compute_type, probe, set_threads, usable_cores
from graftwerk.training.mode import check_compute_type
from tests.training.children import Child


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAFTWERK_COMPUTE_TYPE")  # which the tests of all else have
    hardware._probed.cache_clear()
    yield
    hardware._probed.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """Let products take so long; returns the list of types tried."""
    tried: list[str] = []

    def timed(dtype: torch.dtype, kind: str, *, limit: float, repeats: int = 5) -> float:
        name = str(dtype).removeprefix("torch.")
        tried.append(name)
        return seconds[name]

    monkeypatch.setattr(hardware, "_seconds", timed)
    return tried


@pytest.mark.parametrize(
    ("seconds", "on_cpu", "on_gpu"),
    [
        ({"float32": 1.0, "bfloat16": 9.0, "float16": 8.0}, torch.float32, torch.float32),
        ({"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}, torch.bfloat16, torch.bfloat16),
        ({"float32": 1.0, "bfloat16": 0.5, "float16": 0.3}, torch.bfloat16, torch.float16),
        ({"float32": 1.0, "bfloat16": 0.95, "float16": math.inf}, torch.float32, torch.float32),
        ({"float32": 1.0, "bfloat16": math.inf, "float16": 0.2}, torch.float32, torch.float16),
    ],
)
def test_compute_type_auto_chooses_fastest_if_worthwhile(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], on_cpu: torch.dtype, on_gpu: torch.dtype
) -> None:
    """On a processor never float16, which training refuses there: `auto` must not choose what is an error."""
    pretend(monkeypatch, **seconds)
    monkeypatch.setattr(hardware, "device_name", lambda kind: f"a {kind}")
    for kind, chosen in (("cpu", on_cpu), ("cuda", on_gpu)):
        found = compute_type("auto", kind)
        assert found == chosen
        check_compute_type(found, torch.device(kind))


def test_compute_type_is_probed_once_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, float32=1.0, bfloat16=0.1, float16=math.inf)
    assert compute_type() == compute_type() == torch.bfloat16
    assert tried == ["float32", "bfloat16", "float16"] * ROUNDS
    hardware._probed.cache_clear()  # as in a new process
    assert compute_type() == torch.bfloat16
    assert len(tried) == 3 * ROUNDS
    hardware._probed.cache_clear()
    monkeypatch.setattr(hardware, "device_name", lambda kind: "another processor")
    compute_type()
    assert len(tried) == 6 * ROUNDS


def test_probe_takes_the_least_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work falls on the first product in float32: it must not make bfloat16 the faster type."""
    pretend(monkeypatch, float32=1.0, bfloat16=1.0, float16=math.inf)
    timed, calls = hardware._seconds, []

    def disturbed(dtype: torch.dtype, kind: str, **more: Any) -> float:
        calls.append(dtype)
        return (9.0 if len(calls) == 1 else 1.0) * timed(dtype, kind, **more)

    monkeypatch.setattr(hardware, "_seconds", disturbed)
    assert compute_type() == torch.float32


def test_compute_type_damaged_cache_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, float32=1.0, bfloat16=0.1, float16=0.1)
    compute_type()
    path = cache_folder() / "compute-types.json"
    [key] = json.loads(path.read_text())
    for content in ("{", "[]", json.dumps({key: {"float32": "fast"}}), json.dumps({key: 7})):
        path.write_text(content)
        hardware._probed.cache_clear()
        before = len(tried)
        assert compute_type() == torch.bfloat16
        assert len(tried) == before + 3 * ROUNDS


def test_probe_times_every_type() -> None:
    seconds = probe("cpu")
    assert set(seconds) == {"float32", "bfloat16", "float16"}
    assert 0 < seconds["float32"] < math.inf
    assert compute_type("auto") in hardware.TYPES.values()


def test_compute_type_auto_follows_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWERK_COMPUTE_TYPE", "bfloat16")
    assert compute_type("auto") == torch.bfloat16
    assert compute_type("float32") == torch.float32
    monkeypatch.setenv("GRAFTWERK_COMPUTE_TYPE", "int3")
    with pytest.raises(ConfigError, match="int3") as error:
        compute_type()
    assert error.value.where == "GRAFTWERK_COMPUTE_TYPE"


def test_compute_type_unknown_name_raises() -> None:
    assert compute_type("float32") == torch.float32
    assert compute_type("bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match="no compute type `int3`"):
        compute_type("int3")


def test_compute_type_unsupported_by_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, float16=math.inf)
    with pytest.raises(ConfigError, match="cannot compute in float16"):
        compute_type("float16")


def test_set_threads_follows_environment_then_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads() == torch.get_num_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
        assert set_threads() == torch.get_num_threads() == 2
        assert set_threads(1) == torch.get_num_threads() == 1
        with pytest.raises(ConfigError):
            set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_usable_cores_respects_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, cores in (("max 100000", 64), ("150000 100000", 2), ("10000 100000", 1), ("nonsense", 64)):
        monkeypatch.setattr(Path, "read_text", lambda self, encoding, quota=quota: quota)
        assert usable_cores() == cores


def test_remember_and_recall_by_name_and_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recall("notes", "a") is None
    remember("notes", "a", [1])
    remember("notes", "b", 2)
    assert (recall("notes", "a"), recall("notes", "b"), recall("other", "a")) == ([1], 2, None)
    assert [entry.name for entry in cache_folder().iterdir()] == ["notes.json"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "file"))
    remember("notes", "a", 1)  # a cache that cannot be written is no error
    assert recall("notes", "a") is None


def test_cache_folder_follows_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("GRAFTWERK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "graftwerk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "graftwerk"


def test_set_threads_in_forked_process_allows_threads() -> None:
    """As transformers does when it loads weights; without the call it fails in nine of ten forks."""
    torch.set_num_threads(torch.get_num_threads())  # the parent has a pool
    (torch.randn(400, 400) @ torch.randn(400, 400)).sum()

    def compute() -> None:
        set_threads()
        together = threading.Barrier(8, timeout=60)

        def one(_: int) -> float:
            together.wait()
            return float(torch.ones(200_000).add_(1).sum())

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(one, range(8))) == [400_000.0] * 8

    assert [Child(compute).wait() for _ in range(5)] == [0] * 5
