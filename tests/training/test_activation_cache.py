"""The trunk once: what is kept equals what would be computed, is used only where it may be, and is checked."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import RunInterrupted, UnsupportedError
from graftwerk.kernels import flags as fast
from graftwerk.methods.registry import parse_method
from graftwerk.modeling import frozen_layers as cutting
from graftwerk.modeling.architectures import read_architecture
from graftwerk.models.cache import make_room
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.tasks.base import Example
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.training.activation_cache import cache as trunk_module
from graftwerk.training.activation_cache import store as trunkstore
from graftwerk.training.activation_cache.device import DeviceStates
from graftwerk.training.activation_cache.store import ENDING, FileStates, MemoryStates, chunks, open_file
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event
from graftwerk.training.run_dir import read_manifest
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.train import train
from graftwerk.training.trainer import Trainer
from graftwerk.training.trainer_inputs import RunContext, TrainingData
from tests.contract.cases import perturb
from tests.families import FAMILIES

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 2, "lora_dropout": 0.1, "layers": "top-1"},
    "bottleneck": {"name": "bottleneck", "adapter_size": 3, "layers": "top-1"},
    "ia3": {"name": "ia3", "layers": "top-1"},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3, "layers": "top-1"},
    "prefix mlp": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6,
                   "layers": "top-1"},
    "bitfit": {"name": "bitfit", "layers": "top-1"},
    "probe": {"name": "probe"},
}  # fmt: skip
NO_BIAS = ("modernbert", "llama", "mistral", "gemma", "t5")
LAYERED_T5 = "hand more than hidden states on"


class Tokenizer:
    pad_token_id, pad_token_type_id = 0, 0


def rows(count: int, seed: int = 0, labels: int = 3, most: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, most, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        found.append(Example({"input_ids": ids}, int(torch.randint(0, labels, (1,), generator=generator))))
    return found


def of_text(examples: list[Example]) -> list[Example]:
    """The same rows with the second half of each as what is to be learnt."""
    return [
        Example(row.inputs, [-100] * (row.length // 2) + row.inputs["input_ids"][row.length // 2 :]) for row in examples
    ]


def trainer(
    model: Any,
    method: dict[str, Any],
    folder: Path,
    *,
    task: Any = None,
    train_rows: list[Example] | None = None,
    validation: list[Example] | None = None,
    emit: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(3)
    graft = gw.attach(model, parse_method(method))
    given = {"num_train_epochs": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return Trainer(
        graft, task or Classification(), Tokenizer(), TrainingData(train_rows or rows(40), validation or []),
        TrainingSettings.model_validate({**given, **settings}), RunContext(Checkpoints(folder / "checkpoints"), emit),
    )  # fmt: skip


def losses_of(events: list[Event]) -> list[float]:
    return [event.values["loss"] for event in events if event.kind == "step"]


# -- equal ------------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[tuple[str, str]]:
    for method in METHODS:
        for family in FAMILIES:
            if not (method == "bitfit" and family in NO_BIAS) and not (method == "probe" and family == "marian"):
                yield method, family


@pytest.mark.parametrize(("method", "family"), list(_cases()))
def test_cache_logits_and_gradients_equal_those_of_full_model(method: str, family: str) -> None:
    """Padded rows, in training mode; every family is skipped as said, or refused with the reason."""
    chosen = FAMILIES[family]
    head = method == "probe"
    model = chosen.build(classifier=head)
    batch = chosen.batch()
    if head and chosen.kind == "seq2seq":
        batch = {"input_ids": batch["input_ids"].clamp_min(3), "attention_mask": torch.ones_like(batch["input_ids"])}
        batch["input_ids"][:, -1] = 2
    settings = {**METHODS[method], **({"lora_dropout": 0.0} if method == "lora" else {})}
    graft = gw.attach(model, parse_method(settings))
    perturb(graft.parameters(), 7, 0.1)
    model.train()

    def call() -> Any:
        return model(**batch)

    view = read_architecture(model)
    cut = cutting.find_frozen_prefix(model, view, graft.method, graft.heads)
    assert (cut.skipped, cut.depth) == ((2, 2) if head else (1, 2))
    if family == "t5" and not head:
        with pytest.raises(UnsupportedError, match=LAYERED_T5):
            cutting.reach(model, cut, call)
        return
    stacks = {stack.path for stack in view.stacks}
    hosts = [model.get_submodule(path) for path in (*graft.hosts, *graft.heads) if path not in stacks]
    assert cutting.below(model, cut, hosts, call)
    extras = cutting.extras_of(model, cut, call)
    with torch.no_grad():
        states = cutting.reach(model, cut, call)
    wanted = call().logits
    slopes = torch.autograd.grad(wanted.square().sum(), list(graft.parameters()), allow_unused=True)
    layers = model.get_submodule(cut.layers)
    ran: list[int] = []
    handles = [
        child.register_forward_hook(lambda m, a, o, at=at: ran.append(at))
        for at, layer in enumerate(layers)
        for child in layer.children()
    ]
    with cutting.skipping(model, cut, states, extras=extras):
        found = call().logits
    for handle in handles:
        handle.remove()
    assert set(ran) == set(range(cut.skipped, cut.depth))
    mask = batch["attention_mask"].bool()
    if found.dim() == 3 and found.shape[1] == mask.shape[1]:
        found, wanted = found[mask], wanted[mask]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with cutting.skipping(model, cut, states, extras=extras):
        again = torch.autograd.grad(call().logits.square().sum(), list(graft.parameters()), allow_unused=True)
    for one, other in zip(slopes, again, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert torch.equal(call().logits[mask] if call().logits.dim() == 3 and found.dim() == 2 else call().logits, wanted)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "method", "task"),
    [("bert", "lora", "classification"), ("bert", "probe", "classification"), ("llama", "lora", "causal"),
     ("gpt2", "prefix", "causal"), ("bert", "bottleneck", "classification"), ("modernbert", "lora", "classification"),
     ("opt", "bitfit", "causal"), ("gpt2", "ia3", "causal")],
)  # fmt: skip
def test_cache_fifty_steps_equal_training_without_it(
    family: str, method: str, task: str, checkpointing: bool, tmp_path: Path
) -> None:
    causal = task == "causal"
    examples = of_text(rows(40)) if causal else rows(40)
    told: dict[bool, list[Event]] = {True: [], False: []}
    made = {}
    for kept in (True, False):
        model = FAMILIES[family].build(classifier=not causal)
        work = trainer(
            model, METHODS[method], tmp_path / str(kept), task=Causal().for_model(model.config) if causal else None,
            train_rows=examples, validation=examples[:9], emit=told[kept].append, trunk_cache=kept,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        work.fit()
        made[kept] = (work, [value.clone() for value in work.adapter.state_dict().values()])
    with_cache, without = losses_of(told[True]), losses_of(told[False])
    assert len(with_cache) == 50
    assert len(set(with_cache)) > 40
    torch.testing.assert_close(torch.tensor(with_cache), torch.tensor(without), atol=1e-5, rtol=0)
    figures = made[True][0].activation_cache.metrics()
    assert figures["on"]
    assert figures["kept"]
    assert figures["rows_computed"] == 0
    assert figures["rows_served"] == 5 * (40 + 9)
    scores = {
        kept: [event.values["loss"] for event in told[kept] if event.kind == "evaluation"] for kept in (True, False)
    }
    torch.testing.assert_close(torch.tensor(scores[True]), torch.tensor(scores[False]), atol=1e-5, rtol=0)
    assert not made[False][0].activation_cache.metrics()["on"]


def test_cache_plain_flag_turns_it_off(tmp_path: Path) -> None:
    """The plain way is the same training: the trunk is in evaluation mode, though it is computed."""
    told: dict[bool, list[Event]] = {True: [], False: []}
    for plainly in (True, False):
        model = FAMILIES["bert"].build(classifier=True, dropout=0.2)
        work = trainer(model, METHODS["lora"], tmp_path / str(plainly), emit=told[plainly].append, trunk_cache=True)
        if plainly:
            with fast.plain("trunk"):
                work.fit()
            assert not work.activation_cache.metrics()["kept"]
        else:
            work.fit()
            assert work.activation_cache.metrics()["kept"]
            assert work.activation_cache.metrics()["dropout_off"]
    torch.testing.assert_close(
        torch.tensor(losses_of(told[True])), torch.tensor(losses_of(told[False])), atol=1e-5, rtol=0
    )


# -- of a whole run ---------------------------------------------------------------------------------------------------

TOP = {"name": "lora", "r": 2, "layers": "top-1"}
Build = Callable[..., dict[str, Any]]


@pytest.fixture
def run_file(run_file: Build) -> Build:
    """The tiny encoder has dropout, so the cache is asked for; `auto` is about models that have none."""

    def build(*places: Any, **settings: Any) -> dict[str, Any]:
        return run_file(*places, **{"trunk_cache": True, **settings})

    return build


def events_of(tree: dict[str, Any], **options: Any) -> list[Event]:
    found: list[Event] = []
    train(tree, listener=found.append, **options)
    return found


def told(events: list[Event]) -> Event:
    return next(event for event in events if event.kind == "trunk")


def weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def test_cache_is_reported_in_log_and_manifest(run_file: Build, tmp_path: Path) -> None:
    events = events_of(run_file(method=TOP))
    figures = told(events).values
    assert (figures["layers_skipped"], figures["layers"], figures["where"]) == (1, 2, "memory")
    assert figures["bytes"] == figures["tokens"] * 32 * 4
    assert "1 frozen layers of 2 are computed once" in figures["text"]
    assert "dropout is off" in figures["text"]
    manifest = read_manifest(tmp_path / "run")
    assert manifest is not None
    # two epochs of 36 rows; 12 validation rows after 4, 8 and 12 steps
    assert manifest["trunk"]["rows_served"] == 2 * 36 + 3 * 12
    assert manifest["trunk"]["difference"] < 1e-5
    assert not (tmp_path / "run" / "trunk").exists()


def test_plan_preflight_equals_training(run_file: Build) -> None:
    from graftwerk.cli.doctor import describe_trunk
    from graftwerk.config import RunConfig
    from graftwerk.experiments.preflight import preflight

    tree = run_file(method=TOP)
    planned, done = preflight(RunConfig.build(tree))["trunk"], told(events_of(tree)).values
    assert planned["on"]
    assert {key: done[key] for key in planned} == planned
    assert "lowest 1 of 2 layers are frozen" in describe_trunk(planned)
    for method, why in ((("lora"), "lowest layer is adapted"), ("full", "every weight"), ("prompt", "at the input")):
        planned = preflight(RunConfig.build(run_file(method=method, trunk_cache="auto")))["trunk"]
        assert why in planned["why_not"]
        assert why in describe_trunk(planned)


@pytest.mark.parametrize(
    ("method", "training", "why"),
    [("lora", {}, "lowest layer is adapted"), ("full", {}, "every weight is trained"),
     ("prompt", {}, "stands at the input"), (TOP, {"num_train_epochs": 1}, "at most once"),
     (TOP, {"trunk_cache": False}, "trunk_cache is false"), (TOP, {}, "have dropout")],
)  # fmt: skip
def test_plan_unsuitable_run_gives_reason(
    method: Any, training: dict[str, Any], why: str, run_file: Build, tmp_path: Path
) -> None:
    events_of(run_file(method=method, **{"trunk_cache": "auto", **training}))
    manifest = read_manifest(tmp_path / "run")
    assert manifest is not None
    assert not manifest["trunk"]["on"]
    assert why in manifest["trunk"]["why_not"]
    assert manifest["trunk"]["rows_served"] == 0


def test_plan_redrawn_rows_are_not_cached(tmp_path: Path) -> None:
    """Masks that are drawn anew, rows that stand in other company, rows that are streamed."""
    from graftwerk.tasks.masked import Masked
    from graftwerk.training.activation_cache.plan import plan

    model = FAMILIES["bert"].build()
    graft = gw.attach(model, parse_method(METHODS["lora"]))
    settings = TrainingSettings()
    for task, given, why in (
        (Masked(), settings, "draws its rows anew"),
        (Classification(), settings.model_copy(update={"packing": True}), "packed"),
    ):
        found = plan(model, read_architecture(model), graft.method, graft.heads, task, given, [rows(4), []], 3)
        assert found.why_not
        assert why in found.why_not


def test_cache_required_but_impossible_raises(run_file: Build) -> None:
    with pytest.raises(UnsupportedError, match="lowest layer is adapted") as caught:
        train(run_file(trunk_cache=True))
    assert caught.value.where == "training.trunk_cache"


def test_cache_over_memory_budget_uses_temporary_file(run_file: Build, tmp_path: Path) -> None:
    in_memory = events_of(run_file(tmp_path / "a", method=TOP))
    in_file = events_of(run_file(tmp_path / "b", method=TOP, trunk_cache_gb=0))
    assert told(in_file).values["where"].endswith(".trunk")
    assert losses_of(in_memory) == losses_of(in_file)
    assert not (tmp_path / "b" / "trunk").exists()
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    assert manifest["trunk"]["rows_served"] == 108


@pytest.mark.parametrize("trouble", ["full", "filled", "limit", "forbidden"])
def test_cache_without_space_computes_every_step(
    run_file: Build, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed at every step then, in the same mode, and said."""
    wanted = events_of(run_file(tmp_path / "a", method=TOP))
    settings: dict[str, Any] = {"trunk_cache_gb": 0}
    if trouble == "full":
        monkeypatch.setattr(trunkstore, "MARGIN", 1 << 60)
        words = "do not fit on the disk"
    elif trouble == "filled":

        def fail(self: FileStates, states: Tensor) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(FileStates, "add", fail)
        words = "No space left"
    elif trouble == "limit":
        settings["trunk_cache_disk_gb"], words = 0, "trunk_cache_disk_gb"
    else:

        def refuse(self: FileStates, *args: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(FileStates, "__init__", refuse)
        words = "Permission denied"
    events = events_of(run_file(tmp_path / "b", method=TOP, **settings))
    assert any(words in event.values.get("text", "") for event in events if event.kind == "warning")
    assert "computed at every step" in told(events).values["text"]
    assert not list((tmp_path / "b").glob("trunk/.*"))
    torch.testing.assert_close(torch.tensor(losses_of(events)), torch.tensor(losses_of(wanted)), atol=1e-5, rtol=0)


def test_cache_shared_folder_is_read_by_other_runs(run_file: Build, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = events_of(run_file(tmp_path / "a", method=TOP, trunk_cache_dir=str(folder)))
    assert told(first).values["reused"] is False
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for name, method, seed in (
        ("b", TOP, 1), ("c", {"name": "bottleneck", "layers": "top-1"}, 0), ("d", {"name": "ia3", "layers": [1]}, 0),
        ("e", {"name": "prefix", "layers": "1-1"}, 0),
    ):  # fmt: skip
        again = events_of(run_file(tmp_path / name, method=method, trunk_cache_dir=str(folder), seed=seed))
        assert told(again).values["reused"] is True, name
        assert "read from a file" in told(again).values["text"]
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.read_bytes() == content
    alone = events_of(run_file(tmp_path / "f", method=TOP))
    assert losses_of(alone) == losses_of(first)


@pytest.mark.parametrize("change", ["rows", "max_length", "layer", "dtype", "weights"])
def test_cache_of_other_rows_or_weights_is_not_read(
    change: str, run_file: Build, tmp_path: Path, tiny_encoder: Path
) -> None:
    folder = tmp_path / "kept"
    tree = run_file(tmp_path / "a", method=TOP, trunk_cache_dir=str(folder))
    events_of(tree)
    other = run_file(tmp_path / "b", method=TOP, trunk_cache_dir=str(folder))
    if change == "rows":
        other["data"]["max_train_rows"] = 30
    elif change == "max_length":
        other["data"]["max_length"] = 8
    elif change == "layer":
        other["method"] = {"name": "probe"}
    elif change == "dtype":
        other["training"]["trunk_cache_dtype"] = "bfloat16"
    else:
        from transformers import BertModel

        copied = shutil.copytree(tiny_encoder, tmp_path / "model")
        model = BertModel.from_pretrained(copied)
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight.mul_(1.5)
        model.save_pretrained(copied)
        other["model"] = str(copied)
    assert told(events_of(other)).values["reused"] is False
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "head", "empty"])
def test_cache_damaged_file_is_computed_again(damage: str, run_file: Build, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    tree = run_file(tmp_path / "a", method=TOP, trunk_cache_dir=str(folder))
    events_of(tree)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    broken = bytearray(whole)
    if damage == "bit":
        broken[5000] ^= 1
    elif damage == "cut":
        del broken[-100:]
    elif damage == "head":
        broken[30] ^= 1
    else:
        broken.clear()
    file.write_bytes(broken)
    events = events_of(run_file(tmp_path / "b", method=TOP, trunk_cache_dir=str(folder)))
    assert any("computed again" in event.values["text"] for event in events if event.kind == "warning")
    assert told(events).values["reused"] is False
    assert file.read_bytes() == whole


def test_cache_with_wrong_logits_is_not_used(run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = events_of(run_file(tmp_path / "a", method=TOP))
    finished = MemoryStates.finished
    monkeypatch.setattr(MemoryStates, "finished", lambda self: finished(self).roll(1, 0))
    events = events_of(run_file(tmp_path / "b", method=TOP))
    assert any("outputs differ" in event.values["text"] for event in events if event.kind == "warning")
    assert told(events).values["kept"] is False
    torch.testing.assert_close(torch.tensor(losses_of(events)), torch.tensor(losses_of(wanted)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"trunk_cache_gb": 0}])
def test_cache_resumed_run_is_bit_exact(settings: dict[str, Any], run_file: Build, tmp_path: Path) -> None:
    whole = events_of(run_file(tmp_path / "a", method=TOP, **settings))

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 7):
            os.kill(os.getpid(), signal.SIGTERM)

    tree = run_file(tmp_path / "b", method=TOP, **settings)
    with pytest.raises(RunInterrupted):
        train(tree, listener=stop)
    rest = events_of(tree, resume=True)
    assert losses_of(rest) == losses_of(whole)[7:]
    for key, value in weights(tmp_path / "a").items():
        assert torch.equal(weights(tmp_path / "b")[key], value)


def test_cache_interrupted_while_computing_resumes(
    run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half is left, and a resumed run begins."""
    monkeypatch.setattr(trunk_module, "ROWS", 8)

    def stop(event: Event) -> None:
        if event.kind == "phase" and "frozen layers" in event.values["name"]:
            os.kill(os.getpid(), signal.SIGTERM)

    tree = run_file(method=TOP, trunk_cache_dir=str(tmp_path / "kept"))
    with pytest.raises(RunInterrupted):
        train(tree, listener=stop)
    assert list((tmp_path / "kept").iterdir()) == []
    assert told(events_of(tree, resume=True)).values["reused"] is False


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_file_roundtrip(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(20, 8).to(dtype)
    path = tmp_path / "x.trunk"
    sink = FileStates(path, "key", 20, 8, dtype)
    sink.add(values[:7])
    sink.add(values[7:])
    assert not path.exists()
    assert torch.equal(sink.finished(), values)
    found, why = open_file(path, "key", 20, 8, dtype)
    assert why is None
    assert torch.equal(found, values)
    assert open_file(path, "other", 20, 8, dtype)[0] is None
    assert open_file(tmp_path / "none.trunk", "key", 20, 8, dtype) == (None, None)


def test_states_abandoned_files_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".a.trunk.4194305.1", tmp_path / f".a.trunk.{os.getppid()}.1"
    for path in (dead, alive):
        path.write_bytes(b"half")
    FileStates(tmp_path / "b.trunk", "key", 1, 1, torch.float32).abandon()
    assert [path.name for path in tmp_path.iterdir()] == [alive.name]


def test_make_room_deletes_least_recently_used(tmp_path: Path) -> None:
    for at, name in enumerate("abc"):
        (tmp_path / f"{name}.trunk").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}.trunk", (at, at))
    make_room(tmp_path, 300, needed=100, pattern="*" + ENDING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.trunk", "c.trunk"]
    make_room(tmp_path, 300, needed=100, pattern="*" + ENDING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.trunk", "c.trunk"]


def test_chunks_cover_every_row_once_within_limits() -> None:
    lengths = [50, 40, 40, 9, 9, 9, 3, 3, 3, 3, 3, 1]
    found = list(chunks(lengths, 4, 80))
    assert [row for places in found for row in places] == list(range(len(lengths)))
    assert all(len(places) <= 4 for places in found)
    assert all(len(places) * lengths[places[0]] <= 80 for places in found)
    assert list(chunks([500], 4, 80)) == [range(1)]


# -- on the device ----------------------------------------------------------------------------------------------------


def trained_on_device(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, *, out_of_memory: bool = False) -> Any:
    """A training whose device is said to have so much free memory."""
    monkeypatch.setattr("graftwerk.training.activation_cache.device.free_memory", lambda device: free)
    work = trainer(FAMILIES["bert"].build(classifier=True), METHODS["lora"], folder, validation=rows(9, seed=1))
    gradients, failed = work.gradients.__class__.__call__, []

    def failing(self: Any, *args: Any) -> Any:
        if out_of_memory and work.state.step == 7 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return gradients(self, *args)

    monkeypatch.setattr(work.gradients.__class__, "__call__", failing)
    work.fit()
    return work, [value.clone() for value in work.adapter.state_dict().values()]


def test_states_on_device_serve_every_batch_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        host, expected = trained_on_device(tmp_path / "host", patch, 0)
    assert not host.activation_cache.metrics()["on_device"]
    size = host.activation_cache.plan.bytes
    with monkeypatch.context() as patch:
        small, _ = trained_on_device(tmp_path / "small", patch, 4 * size - 1)
    assert not small.activation_cache.metrics()["on_device"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda *_: pytest.fail("a batch of states crossed from the host"))
        work, weights = trained_on_device(tmp_path / "device", patch, 4 * size)
    assert work.activation_cache.metrics()["on_device"]
    assert work.activation_cache.metrics()["rows_computed"] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_states_leave_the_device_before_micro_batches_are_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, _ = trained_on_device(tmp_path, monkeypatch, 2**40, out_of_memory=True)
    assert work.state.micro_batch == 4
    assert not work.activation_cache.leave_device()
    assert work.activation_cache.metrics()["rows_computed"] == 0


def test_device_states_of_a_batch_equal_its_rows() -> None:
    states = torch.randn(20, 4)
    batch = DeviceStates(states, torch.device("cpu")).batch([5, 0, 19], [3, 5, 1], 6)
    assert batch.shape == (3, 6, 4)
    for row, (start, length) in enumerate([(5, 3), (0, 5), (19, 1)]):
        assert torch.equal(batch[row, :length], states[start : start + length])
        assert not batch[row, length:].any()
