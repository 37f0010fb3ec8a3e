"""Jobs on a Ray cluster: lost workers, folders that travel, and the table of one process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from graftwerk.errors import ConfigError, DivergedError, IntegrityError, ResourceError, RunInterrupted
from graftwerk.experiments import ray_actor, ray_cluster
from graftwerk.experiments.compare import compare
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.ray_actor import RayActor
from graftwerk.experiments.ray_cluster import RayCluster, RayRunner, read_resources
from graftwerk.experiments.run_archive import pack, unpack
from graftwerk.experiments.workers import Workers, machines
from graftwerk.training.run_dir import LOCK

# -- the interface, without a cluster ---------------------------------------------------------------------------------


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class Script(JobRunner):
    """What a machine's job runner does, told by a function of the job and the listener."""

    work: Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]

    def run(self, job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        return Script.work(job, on_event)


class Remote:
    """A method of an actor, called at once; a stream gives the values themselves as references."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **_: Any) -> Remote:
        return self


class FakeActor:
    """An actor in this process that is lost when its job raises `RayActorError`."""

    sees_the_folder = True
    made = 0
    on_its_way = 0
    """Folders that are lost with the actor when they are sent."""

    def __init__(self, folder: str, log: str, lock: str, threads: int) -> None:
        FakeActor.made += 1
        actor = RayActor(folder, log, lock if self.sees_the_folder else "another", threads)
        actor.runner = Script(Path(log), threads)
        self.facts, self.close, self.remove = Remote(actor.facts), Remote(actor.close), Remote(actor.remove)
        self.end_job, self.interrupt = Remote(actor.end_job), Remote(actor.interrupt)
        self.run = Remote(lambda *given: self._stream(actor.run(*given)))

    def _stream(self, messages: Iterator[str | bytes]) -> Iterator[Any]:
        for message in messages:
            lost = isinstance(message, bytes) and FakeActor.on_its_way
            FakeActor.on_its_way -= bool(lost)
            if lost or (isinstance(message, str) and "RayActorError" in message):
                raise RayActorError("The actor died\nSYSTEM_ERROR")
            yield message


FAKE = SimpleNamespace(
    exceptions=SimpleNamespace(RayError=RayError, RayActorError=RayActorError),
    get=lambda value, timeout=None: value, wait=lambda given, timeout: (given, []), kill=lambda actor: None,
)  # fmt: skip


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayRunner:
    monkeypatch.setattr(FakeActor, "made", 0)
    monkeypatch.setattr(Script, "work", lambda job, on_event: {}, raising=False)
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / LOCK).write_text("of the driver")
    return RayRunner(tmp_path / "cmp" / "workers.log", FakeActor, FAKE)


def job_of(runner: RayRunner) -> dict[str, Any]:
    return {"kind": "run", "config": {"output_dir": str(runner.folder / "lora-seed0")}}


def test_ray_runner_begins_a_lost_job_again(runner: RayRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [1, 2, 3]

    def work(job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        on_event({"kind": "progress", "step": 1})
        if losses:
            losses.pop()
            raise RayActorError("gone")
        return {"seconds": 1.0}

    monkeypatch.setattr(Script, "work", work)
    events: list[dict[str, Any]] = []
    with runner:
        assert runner.run(job_of(runner), events.append) == {"seconds": 1.0}
        assert [event["kind"] for event in events] == ["progress", "warning"] * 3 + ["progress"]
        assert "begun again" in events[1]["text"]
        losses += [1, 2, 3, 4]
        with pytest.raises(Crashed, match="lost, 4 in all"):
            runner.run(job_of(runner), events.append)
        runner.run(job_of(runner), events.append)
    assert FakeActor.made == 8  # the first, one for each loss but the last, and one for the job after it


def test_ray_runner_job_asked_to_end_is_not_begun_again(runner: RayRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        on_event({"kind": "evaluation"})
        raise RayActorError("gone")

    monkeypatch.setattr(Script, "work", work)
    heard: list[str] = []

    def gives_up(event: dict[str, Any]) -> None:
        heard.append(event["kind"])
        runner.end_job()

    with runner:
        with pytest.raises(RunInterrupted):
            runner.run(job_of(runner), gives_up)
        assert (heard, FakeActor.made) == (["evaluation"], 1)
        monkeypatch.setattr(Script, "work", lambda job, on_event: {})
        assert runner.run(job_of(runner), heard.append) == {}  # it was the other job that was to end
    # before there is an actor
    waiting = SimpleNamespace(**{**vars(FAKE), "wait": lambda given, timeout: ([], runner.end_job())})
    monkeypatch.setattr(runner, "_ray", waiting)
    with pytest.raises(RunInterrupted):
        runner.run(job_of(runner), heard.append)


def test_station_passes_on_an_end_to_the_job_at_work_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, asked = RayActor(str(tmp_path), str(tmp_path / "log"), "", 1), list[str]()

    def work(job: Mapping[str, Any], on_event: Any) -> dict[str, Any]:
        actor.end_job()
        return {}

    actor.runner = Script(tmp_path / "log")
    monkeypatch.setattr(Script, "work", work, raising=False)
    monkeypatch.setattr(Script, "end_job", lambda self: asked.append("at work"))
    actor.end_job()
    assert list(actor.run('{"kind": "run"}', None)) == ['{"done": {}}']
    actor.end_job()
    assert asked == ["at work"]


def test_ray_runner_error_keeps_its_class_and_stops_when_told(
    runner: RayRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(job: Mapping[str, Any], on_event: Any) -> dict[str, Any]:
        raise DivergedError("the loss is nan", hint="smaller")

    def waits(job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        on_event({"kind": "start"})
        raise RunInterrupted(signal.SIGTERM, "stopped", recovered="step 4")

    monkeypatch.setattr(Script, "work", diverges)
    with runner:
        with pytest.raises(DivergedError, match="nan") as caught:
            runner.run(job_of(runner), lambda event: None)
        assert caught.value.hint == "smaller"
        monkeypatch.setattr(Script, "work", waits)
        with pytest.raises(RunInterrupted, match="SIGINT") as stopped:
            runner.run(job_of(runner), lambda event: runner.interrupt(signal.SIGINT))
    assert stopped.value.recovered == "step 4"


def test_workers_give_resources_back_when_nothing_is_left(runner: RayRunner) -> None:
    """A runner that lost its machine may wait for the resources that the others had."""
    other, both = RayRunner(runner.log, FakeActor, FAKE), threading.Barrier(2, timeout=20)

    def work(which: JobRunner, job: dict[str, Any]) -> None:
        both.wait()  # each has one of the jobs
        which.run(job, lambda event: None)
        assert which._actor is not None  # type: ignore[attr-defined]

    with Workers([runner, other]) as workers:
        workers.each([job_of(runner), job_of(runner)], work)
        assert runner._actor is other._actor is None


def test_ray_runner_refuses_machines_that_cannot_work_for_this_one(
    runner: RayRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_there(*_: Any) -> FakeActor:
        raise RayActorError("an error raised in its creation task\nModuleNotFoundError: No module named 'graftwerk'")

    monkeypatch.setattr(runner, "_start", none_there)
    with pytest.raises(ResourceError, match="cannot run for this one: ModuleNotFoundError") as caught:
        runner.run(job_of(runner), lambda event: None)
    assert "on every machine" in str(caught.value.hint)
    monkeypatch.undo()
    monkeypatch.setattr(RayActor, "facts", lambda self: '{"host": "b", "graftwerk": "0.0.1", "torch": "2"}')
    with pytest.raises(ResourceError, match=r"the machine b has graftwerk 0\.0\.1, and this one"):
        runner.run(job_of(runner), lambda event: None)


def test_ray_runner_folder_comes_back_from_a_machine_that_does_not_share_it(
    runner: RayRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On such a machine the work is done under the same path, which is this one here: nothing of it stays there."""
    folder = runner.folder / "lora-seed0"
    monkeypatch.setattr(FakeActor, "sees_the_folder", False)
    monkeypatch.setattr(ray_actor, "CHUNK", 1000)
    seen: list[Any] = []

    def work(job: Mapping[str, Any], on_event: Any) -> dict[str, Any]:
        seen.append(sorted(path.name for path in folder.glob("*")))
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "adapter" / "weights").write_bytes(b"w" * 5000)
        (folder / LOCK).write_text("its own")
        raise DivergedError("the loss is nan")

    def arrives(content: bytes, at: Path) -> None:
        seen.append(at.with_name(".lora-seed0.sent").is_dir())
        unpack(content, at)

    monkeypatch.setattr(ray_cluster, "unpack", arrives)
    monkeypatch.setattr(FakeActor, "on_its_way", 1)
    monkeypatch.setattr(Script, "work", work)
    events: list[dict[str, Any]] = []
    with runner, pytest.raises(DivergedError):
        runner.run(job_of(runner), events.append)
    assert (folder / "adapter" / "weights").read_bytes() == b"w" * 5000
    assert not (folder / LOCK).exists()
    assert seen == [[], [LOCK, "adapter"], True]  # what was lost on its way is there when the job is begun again
    (runner.folder / "trials" / "empty").mkdir(parents=True)
    other = RayActor(str(runner.folder), str(runner.log), "another", 1)
    other.close()
    assert sorted(path.name for path in runner.folder.iterdir()) == [LOCK, "lora-seed0"]
    assert "does not see" in events[0]["text"]
    assert "come back through Ray" in events[0]["text"]
    assert "begun again" in events[1]["text"]


def test_unpack_refuses_what_would_land_outside(tmp_path: Path) -> None:
    import io
    import tarfile

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO(b""))
    for content in (stream.getvalue(), b"no archive"):
        with pytest.raises(IntegrityError, match="damaged"):
            unpack(content, tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "old"
    unpack(pack(tmp_path / "there"), tmp_path / "copy")
    assert (tmp_path / "copy" / "file").read_text() == "old"


def test_unpack_of_nothing_leaves_an_empty_folder_and_of_more_replaces_the_old(tmp_path: Path) -> None:
    """A run that was killed before its first file has an archive without members."""
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        unpack(pack(tmp_path / "empty"), tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "empty" / "log").write_text("1")
    (tmp_path / "run" / "old").write_text("0")
    unpack(pack(tmp_path / "empty"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]


def test_workers_at_once_do_each_item_once(tmp_path: Path) -> None:
    met = threading.Barrier(2, timeout=20)  # both are at work at the same time
    done: list[int] = []

    def work(runner: JobRunner, item: int) -> None:
        met.wait()
        done.append(item)

    with Workers([JobRunner(tmp_path / "log"), JobRunner(tmp_path / "log")]) as workers:
        workers.each(range(4), work)
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("given", ["CPU", "CPU=0", "CPU=much", "=2", "CPU=-1", "CPU=1.5", {"GPU": float("inf")}])
def test_read_resources_wrong_ones_raise(given: Any) -> None:
    with pytest.raises(ConfigError, match="no resource"):
        read_resources(given)


def test_machines_errors_are_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="on a Ray cluster"), machines(None, "CPU=2"):
        pass
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ResourceError, match="needs the package ray") as missing, machines("auto"):
        pass
    assert "graftwerk[ray]" in str(missing.value.hint)
    monkeypatch.undo()
    pytest.importorskip("ray")
    for address in ("127.0.0.1:9", "127.0.0.1:port", "no.such.host.invalid"):
        with pytest.raises(ResourceError, match="no Ray cluster at") as caught, RayCluster(address):
            pass
        assert "ray start --head" in str(caught.value.hint)
    with pytest.raises(ResourceError, match="cannot stream"), RayCluster("ray://127.0.0.1:9"):
        pass


# -- a cluster of this machine ----------------------------------------------------------------------------------------


def figures(content: Any) -> Any:
    """Return what does not depend on time, memory and folder."""
    if isinstance(content, list):
        return [figures(each) for each in content]
    if not isinstance(content, dict):
        return content
    measured = ("seconds", "bytes", "latency", "folder", "cost")
    return {key: figures(value) for key, value in content.items() if not any(word in key for word in measured)}


@pytest.mark.slow
def test_compare_on_two_ray_workers_one_of_them_killed_gives_the_table_of_one_process(
    tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48},
        "training": {"num_train_epochs": 2, "save_steps": 4, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 2},
    }
    given: dict[str, Any] = {"seeds": [0, 1], "budget": 2, "report": False}
    one = compare({**settings, "output_dir": str(tmp_path / "one")}, ["lora", "probe"], quiet=True, **given)
    notes: list[str] = []
    killed: list[int] = []

    def kill(event: ProgressEvent) -> None:
        if event.kind == "note":
            notes.append(event.text)
        if event.run.startswith("lora") and event.run.endswith("seed 0") and event.step and not killed:
            own = psutil.Process().children(recursive=True)  # the cluster is a child of this process
            actors = [each.pid for each in own if "ray::RayActor" in each.name() + " ".join(each.cmdline())]
            assert actors
            killed.extend(actors)  # whichever of them it was: the other's run is begun again as well
            for pid in actors:
                os.kill(pid, signal.SIGKILL)

    # as on a machine that shares nothing: the lock is not recognised, and the folders travel
    for shared in (True, False):
        folder = tmp_path / f"two-{shared}"
        if not shared:
            monkeypatch.setattr(ray_cluster, "LOCK", ".no-lock")
        found = compare(
            {**settings, "output_dir": str(folder)}, ["lora", "probe"], listener=kill,
            ray="local", resources={"CPU": 1 / 2 if (os.cpu_count() or 1) < 2 else 1}, **given,
        )  # fmt: skip
        for part in ("methods", "differences", "tuning", "rows", "metric", "detectable"):
            assert figures(found.result[part]) == figures(one.result[part]), part
        assert not ray.is_initialized()
    assert killed
    assert any("begun again" in note for note in notes)
    assert any("does not see" in note for note in notes)
