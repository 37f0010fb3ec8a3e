"""Links, pipes and second names under the names of a run's files: refused, and what they lead to stays as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.augmentation.augment import augment
from graftwerk.augmentation.progress_log import Journal, journal_of
from graftwerk.errors import IntegrityError
from graftwerk.evaluation.loading import find
from graftwerk.experiments.compare import compare
from graftwerk.experiments.job_runner import JobRunner
from graftwerk.own_files import open_own
from graftwerk.reporting.html import write_report
from graftwerk.serialization.atomic import recover, write_file, write_folder
from graftwerk.training.activation_cache.store import open_file
from graftwerk.training.callbacks.jsonl import JsonLines
from graftwerk.training.lock import RunLock
from graftwerk.training.run_dir import LOCK, MADE_BEFORE, RUN_FILES, read_manifest
from graftwerk.training.train import train

Build = Callable[..., dict[str, Any]]
BELOW = ("checkpoints/latest", "checkpoints/best", "checkpoints/step-000004", "checkpoints/step-000004/state.json",
         "checkpoints/.old", "adapter/adapter_config.json", "tensorboard/events.out", "trunk/x.trunk")  # fmt: skip
NAMES = (LOCK, *MADE_BEFORE, *RUN_FILES, *BELOW)


def put(kind: str, place: Path, victim: Path) -> None:
    """Something at a place that leads to the victim."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "hard link":
        os.link(victim, place)
    else:
        place.symlink_to(victim if kind == "link" else victim / "nothing")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_train_with_a_link_under_any_name_of_ours_raises(
    run_file: Build, stopped: Path, tmp_path: Path, victim: Path, kind: str
) -> None:
    for name in NAMES:
        folder = tmp_path / "run"
        for how in ("fresh", "resume", "overwrite"):
            shutil.rmtree(folder, ignore_errors=True)
            if how != "fresh":
                shutil.copytree(stopped, folder)
            put(kind, folder / name, victim)
            with pytest.raises(IntegrityError) as caught:
                train(run_file(), **({} if how == "fresh" else {how: True}))
            assert caught.value.exit_code == 8
            assert str(folder / name) in str(caught.value), (name, how)
            assert victim.read_text() == "mine"
            assert os.path.lexists(folder / name)


def test_train_into_a_linked_output_dir_works(run_file: Build, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to("real")
    run = train(run_file(max_steps=1, eval_steps=None))
    assert run.manifest["status"] == "finished"
    assert (tmp_path / "real" / "adapter").is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "adapter", "adapter/adapter_config.json"])
def test_reading_a_run_through_a_link_raises(undisturbed: Path, tmp_path: Path, victim: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    outside = tmp_path / "outside"
    os.rename(folder / name, outside)
    (folder / name).symlink_to(outside)
    for read in (read_manifest, find):
        with pytest.raises(IntegrityError, match="symbolic link"):
            read(folder)
    if name in ("manifest.json", "config.yaml"):
        with pytest.raises(IntegrityError, match="symbolic link"):
            write_report(folder)


def test_report_through_a_link_raises(undisturbed: Path, tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    put("link", folder / "report.html", victim)
    with pytest.raises(IntegrityError, match="symbolic link"):
        write_report(folder)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "name", [LOCK, "comparison.json", "config.yaml", "workers.log", "report.html", "trunk", "lora-seed0"]
)
def test_compare_with_a_link_under_any_name_of_ours_raises(
    run_file: Build, tmp_path: Path, victim: Path, name: str
) -> None:
    tree = run_file()
    del tree["method"]
    put("link", tmp_path / "run" / name, victim)
    with pytest.raises(IntegrityError, match="symbolic link"):
        compare(tree, methods=["lora"], seeds=[0])
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_files_written_in_place_are_not_opened_through_a_link(tmp_path: Path, victim: Path, kind: str) -> None:
    rows = tmp_path / "rows.jsonl"
    opened: dict[Path, Callable[[], object]] = {
        tmp_path / "run" / LOCK: lambda: RunLock(tmp_path / "run").acquire(),
        tmp_path / "run" / "metrics.jsonl": lambda: JsonLines(tmp_path / "run" / "metrics.jsonl"),
        journal_of(rows): lambda: Journal(rows, {}, keep=True),
        tmp_path / "workers.log": lambda: JobRunner(tmp_path / "workers.log").run({}, lambda event: None),
        tmp_path / "other": lambda: open_own(tmp_path / "other", os.O_WRONLY),
    }
    for place, open_it in opened.items():
        put(kind, place, victim)
        with pytest.raises(IntegrityError, match=r"link|pipe|regular"):
            open_it()
        assert victim.read_text() == "mine", place


def test_own_files_are_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    put("link", tmp_path / "file", victim)
    with pytest.raises(IntegrityError):
        write_file(tmp_path / "file", "theirs", own=True)
    (tmp_path / "folder").mkdir()
    put("link", tmp_path / "link", tmp_path / "folder")
    with pytest.raises(IntegrityError):
        write_folder(tmp_path / "link", lambda folder: None, own=True)
    assert victim.read_text() == "mine"
    put("link", tmp_path / ".gone.replaced", tmp_path / "folder")
    recover(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()  # a link was not made the folder


def test_augment_beside_a_linked_origin_raises(tmp_path: Path, victim: Path) -> None:
    put("link", tmp_path / "more.about.json", victim)
    with pytest.raises(IntegrityError):
        augment(data=[{"text": "one two three"}], by="word_dropout", out=tmp_path / "more.jsonl", overwrite=True)
    assert victim.read_text() == "mine"


def test_stored_states_are_not_read_through_a_link(tmp_path: Path) -> None:
    import torch

    put("fifo", tmp_path / "x.trunk", tmp_path)
    with pytest.raises(IntegrityError):
        open_file(tmp_path / "x.trunk", "key", 1, 1, torch.float32)
