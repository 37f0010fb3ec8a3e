"""Latency, peak memory and size: what is measured is there, whatever the machine is busy with."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graftwerk.evaluation import peak_memory as memory
from graftwerk.evaluation.cost import WARM_UP, latency, peak_memory, resident, size_on_disk
from graftwerk.tasks.base import Example
from tests.training.children import until

MB = 1_000_000


LOOKS: list[None] = []
"""One entry for each look of the sampler that has ended."""


@pytest.fixture(autouse=True)
def _counted_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the sampler's looks; give back what earlier tests held, lest it is freed or used again while measuring."""
    look = memory._Sampler._look
    monkeypatch.setattr(memory._Sampler, "_look", lambda sampler: (look(sampler), LOOKS.append(None)))
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory stays with glibc, and a block taken from it adds nothing


def work(megabytes: int) -> None:
    held = torch.ones(megabytes * MB // 4)
    held += 1
    begun = len(LOOKS)
    if any(thread.name == "peak-memory" for thread in threading.enumerate()):
        until(lambda: len(LOOKS) >= begun + 2)  # the first of them may have begun before
    assert held.numel()


@pytest.fixture(params=[memory._HighWater, memory._Sampler], ids=["high-water mark", "sampler"])
def meter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways of measuring on Linux."""
    if not memory._set_mark_back():
        pytest.skip("this system does not let a process set its high-water mark back")
    monkeypatch.setattr(memory, "_meter", lambda device: request.param())
    return request.param


def test_peak_memory_reports_most_bytes_held_at_once(meter: Any) -> None:
    work(10)  # the allocator and its pages are warm
    with peak_memory(device="cpu") as peak:
        assert peak.bytes is None
        work(200)
        work(80)
    assert peak.bytes is not None
    assert 190 * MB < peak.bytes < 240 * MB
    assert peak.how == meter.how


def test_peak_memory_above_earlier_baseline_includes_held_bytes(meter: Any) -> None:
    before = resident("cpu")
    kept = torch.ones(25 * MB)
    with peak_memory(above=before, device="cpu") as peak:
        work(50)
    assert peak.bytes is not None
    assert 145 * MB < peak.bytes < 190 * MB
    assert kept.numel()


def test_peak_memory_nested_blocks_keep_outer_peak() -> None:
    """An inner block sets the kernel's mark back; the outer one still knows how high it was."""
    with peak_memory(device="cpu") as outer:
        work(150)
        with peak_memory(device="cpu") as inner:
            work(30)
    assert outer.bytes is not None
    assert inner.bytes is not None
    assert outer.bytes > 140 * MB
    assert inner.bytes < 60 * MB


def test_peak_memory_block_that_raises_still_reports_peak() -> None:
    found = []

    def fail() -> None:
        with peak_memory(device="cpu") as peak:
            found.append(peak)
            work(60)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert found[0].bytes is not None
    assert found[0].bytes > 50 * MB
    assert memory._HighWater._open == []


def test_peak_memory_without_resettable_mark_samples_in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_set_mark_back", lambda: False)
    with peak_memory(device="cpu") as peak:
        work(60)
    assert "looked at every 10 ms" in peak.how


def test_peak_memory_without_proc_uses_ru_maxrss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "SELF", tmp_path)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_highest_so_far", lambda: 700)
    with peak_memory(above=100, device="cpu") as peak:
        pass
    assert (peak.bytes, peak.how) == (600, "ru_maxrss")


def test_resident_excludes_code_pages() -> None:
    """Libraries are tens of megabytes of resident files here; the baseline does not have them."""
    code = memory._code()
    held = memory._resident_set()
    now = resident("cpu")
    assert code > 20 * MB
    assert held is not None
    assert now is not None
    assert abs(held - code - now) < 20 * MB


def test_size_on_disk_sums_files_without_symlinks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_bytes(b"x" * 23)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert size_on_disk(tmp_path) == 123
    assert size_on_disk(tmp_path / "a") == 100


class Counter(nn.Module):
    """Stands in for a model: remembers the shape of each batch, and in which mode it was."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return SimpleNamespace(logits=torch.zeros(len(input_ids), 2))


class Padding:
    """Stands in for a task and its parts: pads to the longest."""

    @property
    def collator(self) -> Padding:
        return self

    @property
    def objective(self) -> Padding:
        return self

    def collate(self, examples: list[Example], tokenizer: Any) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(example.inputs["input_ids"]) for example in examples]
        return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        return model(**batch)


def rows(lengths: list[int]) -> list[Example]:
    return [Example({"input_ids": [1] * length}, None) for length in lengths]


def test_latency_batches_rows_of_similar_length_across_all_lengths() -> None:
    model = Counter().train()
    timed = latency(model, Padding(), rows([*range(1, 41), *range(40, 0, -1)]), None, batches=4, batch_sizes=(1, 10))  # type: ignore[arg-type]
    assert timed.keys() == {1, 10}
    assert all(milliseconds > 0 for milliseconds in timed.values())
    assert len(model.shapes) == 2 * (WARM_UP + 4)
    assert [shape[1] for shape in model.shapes[WARM_UP : WARM_UP + 4]] == [5, 15, 25, 35]
    assert model.shapes[-4:] == [(10, 8), (10, 18), (10, 28), (10, 38)]
    assert set(model.modes) == {(False, True)}
    assert model.training


def test_latency_few_rows_are_repeated_and_no_rows_give_empty() -> None:
    model = Counter()
    assert set(latency(model, Padding(), rows([3, 5]), None, batches=2)) == {1, 32}  # type: ignore[arg-type]
    assert model.shapes[-1] == (32, 5)
    assert latency(model, Padding(), [], None) == {}  # type: ignore[arg-type]
