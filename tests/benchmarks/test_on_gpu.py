"""The script for a GPU, tried on a CPU: the time it may take, what a second call does, every part with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, material, on_gpu
from benchmarks.harness import Row, expect
from benchmarks.on_gpu import NotHereError, Part, Results, Setting, counted_waits, differs, drawn, main, run

IDENTITY = {"device": "cuda: Fake", "versions": "torch 9", "commit": "abc", "dry run": False}


class Script:
    """Parts that take their seconds of a clock of their own."""

    def __init__(self, file: Path) -> None:
        self.now, self.file, self.ran = 0.0, file, list[str]()
        self.broken, self.said = {"second"}, list[str]()

    def part(self, name: str, seconds: float) -> Part:
        def work(setting: Setting) -> list[Row]:
            self.ran.append(name)
            self.now += seconds
            expect(name not in self.broken, "gradients differ")
            if name == "absent":
                raise NotHereError("bitsandbytes is not installed")
            return [Row("P2", name, 1.0, 2.0, "s", 0.5, "at most 1", True, note=f"of {name}")]

        return Part(name, work, seconds)

    def __call__(self, minutes: float) -> tuple[Results, list[str]]:
        chosen = [self.part("first", 30), self.part("second", 20), self.part("absent", 5), self.part("long", 100)]
        results = Results.opened(self.file, IDENTITY, fresh=False)
        setting = Setting("cuda", False, self.now + 60 * minutes, lambda: self.now)
        return results, run(chosen, results, setting, self.said.append)


def test_run_begins_no_part_that_may_end_late_and_goes_on_with_what_is_left(tmp_path: Path) -> None:
    script = Script(tmp_path / "out" / "on_gpu.json")
    assert script(0)[1] == ["first", "second", "absent", "long"]
    assert script.ran == []
    results, left = script(1)
    assert script.ran == ["first", "second", "absent"]
    assert left == ["second", "long"], "one failed, and for the other there was no time"
    assert results.parts["second"] == {
        "status": "failed", "rows": [], "note": "wrong: gradients differ", "seconds": 20.0,
    }  # fmt: skip
    text = drawn(results, left)
    assert "**second** was failed: wrong: gradients differ" in text
    assert "**absent** was skipped: bitsandbytes is not installed" in text
    assert "or because they failed: second, long" in text
    assert "| P2 | first | 1.00 s | 2.00 s | 0.500 | at most 1 | yes |" in text
    assert "- first: of first" in text
    script.broken.clear()
    results, left = script(10)
    assert script.ran == ["first", "second", "absent", "second", "long"], "what is done is not done again"
    assert left == []
    stored = json.loads(script.file.read_text())
    assert stored == {"identity": IDENTITY, "parts": results.parts}
    assert [path.name for path in script.file.parent.iterdir()] == ["on_gpu.json"]


def test_opened_results_of_another_device_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "on_gpu.json"
    Results(file, IDENTITY).store("first", status="done", rows=[])
    with pytest.raises(SystemExit, match="another device, commit: give --fresh"):
        Results.opened(file, {**IDENTITY, "device": "cuda: Other", "commit": "def"}, fresh=False)
    assert Results.opened(file, {**IDENTITY, "device": "cuda: Other"}, fresh=True).parts == {}


def test_main_without_an_accelerator_says_how_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--device cpu --dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--dry-run", "--part", "P99"])
    assert "no part is called P99; there are: waits, 1B bfloat16, P2" in capsys.readouterr().err


def test_main_dry_run_writes_rows_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["contract lora", "P3"]
    asked = ["--device", "cpu", "--dry-run", "--out", str(tmp_path), *(f"--part={name}" for name in names)]
    assert main(asked) == 0
    parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(names, "done")
    (row,) = parts["contract lora"]["rows"]
    assert (row["ours"], row["reached"]) == (2, True)
    assert len(parts["P3"]["rows"]) == 4
    assert "the figures mean nothing" in (tmp_path / "on_gpu.md").read_text()
    assert "complete" in capsys.readouterr().out
    assert main(asked) == 0
    assert "P3: done" not in capsys.readouterr().out, "nothing is run again"


@pytest.mark.slow
def test_main_dry_run_runs_every_part(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--dry-run", "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert set(parts) == {part.name for part in on_gpu.parts(True)}
    assert {part["status"] for name, part in parts.items() if name != "1B nf4"} == {"done"}
    rows = {row["what"]: row for part in parts.values() for row in part["rows"]}
    assert rows["Llama in bfloat16: tokens a second of training"]["ours"] > 0


def test_differs_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert differs("ia3", "bert", "cpu") == ""
    monkeypatch.setattr(on_gpu, "CLOSE", -1.0)
    assert "differs by" in differs("ia3", "bert", "cpu")
    assert "UnsupportedError" in differs("bitfit", "llama", "cpu")


def test_counted_waits_counts_what_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with counted_waits("cpu") as seen:
        x.sum()
        assert seen() == 0
        x.sum().item()
        x.nonzero()
        assert seen() == 2
    with pytest.raises(NotHereError, match="on mps"), counted_waits("mps"):
        pass


def test_counted_waits_on_cuda_counts_what_torch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_waits("cuda") as seen:
        for text in ("called a synchronizing CUDA operation (Triggered internally ...)", "something else") * 2:
            warnings.warn(text, stacklevel=1)
        assert seen() == 2
    assert modes == ["warn", 0]


def test_on_makes_models_and_batches_there_and_waits_around_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    with material.on("meta", tiny=True):
        assert material.minilm().device.type == "meta"
        batch = material.labelled(material.token_batch(material.SMOLLM2, 2, 8), 0.5)
        assert {tensor.device.type for tensor in batch.values()} == {"meta"}
    assert material.PLACE.get() == material.Place("cpu", False)
    order: list[str] = []
    held = harness.WAIT.set(lambda: order.append("wait"))
    harness.interleaved({"a": lambda: order.append("a")}, repeats=1, warmup=0)
    harness.WAIT.reset(held)
    assert order == ["wait", "a", "wait"]
