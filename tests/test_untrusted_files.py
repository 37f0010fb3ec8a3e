"""Every file that is read: whatever bytes or values it holds, the answer is an error with a code of its own, never a
defect; and a file that was changed is not believed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.augmentation.progress_log import Journal, journal_of
from graftwerk.config import RunConfig, parse_overrides
from graftwerk.errors import ConfigError, ConflictError, GraftwerkError, IntegrityError
from graftwerk.evaluation.evaluate import predict
from graftwerk.evaluation.loading import find
from graftwerk.evaluation.results_io import load_evaluation
from graftwerk.experiments.compare import COMPARISON, Comparison
from graftwerk.inspection.adapter import describe_adapter
from graftwerk.models.safety_checks import check_configuration, check_weights
from graftwerk.reporting.html import write_report
from graftwerk.tasks.template import ModelTemplate
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.lock import RunLock
from graftwerk.training.run_dir import FILES, LOCK, STATE, Run
from graftwerk.training.train import train
from tests.cli.commands import run_file

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**64, 10**30, 1e308, float("inf"), float("nan"), "", "x" * 300, "a\0b", "\ud800",
    [], {}, [[]], [None], {"a": {}}, [{}], {"": 1}, [1, "a"],
)  # fmt: skip
FEW = settings(max_examples=25, deadline=None, derandomize=True)
Edit = Callable[[dict[str, Any]], dict[str, Any]]


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a tree a value may be exchanged."""
    yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*at, key))


def changed(tree: dict[str, Any], place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    tree = copy.deepcopy(tree)
    inner: Any = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


def assert_no_defect(act: Callable[[], Any]) -> None:
    """Nothing goes wrong, or it is said with a code of its own. Anything else that is raised fails the test."""
    try:
        act()
    except GraftwerkError as error:
        if error.exit_code not in (2, 3, 4, 5, 7, 8):
            raise
        str(error).encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path) -> Path:
    """A finished run, with a checkpoint and a stored evaluation."""
    from graftwerk.evaluation.evaluate import evaluate

    folder = tmp_path_factory.mktemp("run")
    config = run_file(folder, tiny_encoder, glosses)
    done = train(config, output_dir=str(folder / "run"), processes=1).folder
    evaluate(done, store=True)
    return done


@pytest.fixture(scope="module")
def spoilt(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to be spoilt and mended again."""
    return Path(shutil.copytree(run, tmp_path_factory.mktemp("spoilt") / "run"))


# -- any bytes, any values -----------------------------------------------------------------------------------------


READERS: dict[str, Callable[[Path], Any]] = {
    "manifest.json": lambda run: (Run(run).to_dict(), find(run), write_report(run)),
    "config.yaml": lambda run: (find(run), write_report(run)),
    "evaluation.json": lambda run: (load_evaluation(run, run / "adapter"), write_report(run)),
    "predictions.safetensors": lambda run: load_evaluation(run, run / "adapter"),
    "metrics.jsonl": write_report,
    "adapter/adapter_config.json": lambda run: (find(run), describe_adapter(run / "adapter")),
    "adapter/graftwerk.json": lambda run: (find(run), describe_adapter(run / "adapter")),
    "adapter/adapter_model.safetensors": lambda run: describe_adapter(run / "adapter"),
}


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=200), at=st.integers(0, 10**6))
@FEW
def test_reader_of_any_bytes_raises_no_defect(spoilt: Path, name: str, content: bytes, at: int) -> None:
    whole = (spoilt / name).read_bytes()
    at %= len(whole)
    try:
        for bytes_ in (content, whole[:at] + content + whole[at + len(content) :], whole[:at]):
            (spoilt / name).write_bytes(bytes_)
            assert_no_defect(lambda: READERS[name](spoilt))
    finally:
        (spoilt / name).write_bytes(whole)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".json", ".yaml"))])
@given(data=st.data())
@settings(FEW, max_examples=40)
def test_reader_of_wrong_types_raises_no_defect(spoilt: Path, name: str, data: st.DataObject) -> None:
    """Without its seal, as an older version wrote it: what is wrong must be seen by what it says."""
    whole = (spoilt / name).read_bytes()
    tree = yaml.safe_load(whole) if name.endswith(".yaml") else json.loads(whole)
    tree.pop("digest", None)
    place = data.draw(st.sampled_from(list(places(tree))))
    value = changed(tree, place, data.draw(st.sampled_from(HOSTILE)))
    text = yaml.safe_dump(value) if name.endswith(".yaml") else json.dumps(value)
    try:
        (spoilt / name).write_text(text)
        assert_no_defect(lambda: READERS[name](spoilt))
    finally:
        (spoilt / name).write_bytes(whole)


@given(data=st.data())
@settings(FEW, max_examples=6)
def test_resume_from_wrong_types_in_the_state_raises_no_defect(
    tmp_path_factory: pytest.TempPathFactory, run: Path, data: st.DataObject
) -> None:
    """The state of a checkpoint is vouched for by its list of files, which whoever changes it can write again."""
    import hashlib

    source = Checkpoints(run / "checkpoints").latest()
    assert source is not None
    tree = json.loads((source / STATE).read_text())
    place = data.draw(st.sampled_from([at for at in places(tree) if at[:1] != ("run",) or len(at) < 3]))
    value = changed(tree, place, data.draw(st.sampled_from(HOSTILE)))
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    shutil.copy(run / "config.yaml", folder)
    manifest = Run(run).manifest
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    target = folder / "checkpoints" / source.name
    content = json.dumps(value).encode()
    (target / STATE).write_bytes(content)
    listed = json.loads((target / FILES).read_text())
    listed["files"][STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / FILES).write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
    config = {**yaml.safe_load((folder / "config.yaml").read_text()), "output_dir": str(folder)}
    assert_no_defect(lambda: train(config, resume=True))
    shutil.rmtree(folder)


@given(content=st.one_of(st.binary(max_size=300), st.sampled_from([json.dumps(value).encode() for value in HOSTILE])))
@FEW
def test_lock_with_any_content_raises_no_defect(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("lock")
    (folder / LOCK).write_bytes(content)
    with RunLock(folder):
        assert (folder / LOCK).exists()


@pytest.mark.parametrize("key", ["pid", "started", "boot", "namespace", "host"])
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: f"{value!a:.12}")
def test_lock_with_a_hostile_holder_raises_no_defect(tmp_path: Path, key: str, value: Any) -> None:
    from dataclasses import asdict

    from graftwerk.training.lock import Holder

    (tmp_path / LOCK).write_text(json.dumps({**asdict(Holder.me()), "pid": 2**22 + 1, key: value}))
    with suppress(ConflictError), RunLock(tmp_path):
        pass


@given(content=st.binary(max_size=200))
@FEW
def test_journal_of_any_bytes_raises_no_defect(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    target = tmp_path_factory.mktemp("journal") / "made.jsonl"
    head = b'{"format": 1, "rows": "r"}\n'
    for written in (content, head + content + b"\n", head + b'["a", {"b": 1}]\n[1]\n"x"\nnull\n'):
        journal_of(target).write_bytes(written)
        with suppress(ConflictError), Journal(target, {"rows": "r"}, keep=True) as journal:
            journal.add("k", ["v\u2028"])


@given(data=st.data())
@FEW
def test_comparison_of_wrong_types_raises_no_defect(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    from tests.reporting.examples import comparison

    folder = tmp_path_factory.mktemp("comparison")
    tree = comparison()
    place = data.draw(st.sampled_from([at for at in places(tree) if at]))
    value = changed(tree, place, data.draw(st.sampled_from(HOSTILE)))
    (folder / COMPARISON).write_text(json.dumps(value))
    assert_no_defect(lambda: (Comparison(folder).table(), Comparison(folder).to_dict()))
    assert_no_defect(lambda: write_report(folder))


@given(
    file=st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]),
    value=st.one_of(st.sampled_from(HOSTILE), st.binary(max_size=100)),
    key=st.sampled_from(["hidden_size", "num_hidden_layers", "num_labels", "id2label", "vocab_size", "model_type"]),
)
@FEW
def test_configuration_of_a_base_of_any_values_raises_no_defect(
    tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory, file: str, value: Any, key: str
) -> None:
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    tree = json.loads((folder / "config.json").read_text())
    content = value if isinstance(value, bytes) else json.dumps({**tree, key: value}).encode()
    (folder / file).write_bytes(content)
    assert_no_defect(lambda: check_configuration(folder, "base"))
    shutil.rmtree(folder)


@given(content=st.binary(max_size=100), entry=st.sampled_from(HOSTILE), key=st.sampled_from(["dtype", "shape"]))
@FEW
def test_weights_of_a_base_of_any_header_raise_no_defect(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, entry: Any, key: str
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    described = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], key: entry}
    for header in (content, b"{" + content, json.dumps({"a": described}).encode(), json.dumps({"a": entry}).encode()):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        assert_no_defect(lambda: check_weights(folder, "base"))


@given(text=st.text(max_size=60))
@FEW
def test_overrides_of_any_text_raise_no_defect(text: str) -> None:
    assert_no_defect(lambda: RunConfig.build({"model": "x"}, [f"data.train={text}", text]))


@pytest.mark.parametrize(
    "value", ["2001-99-99", "1:" + "59:" * 300_000 + "1", "[" * 100_000, "&a [*a]", "!!python/name:os", "\x00", "'"]
)
def test_override_with_a_hostile_value_raises(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_overrides([f"training.seed={value}"])


BOMBS = {
    "numbers to the base of 60": "a: 1" + ":59" * 280_000,
    "digits": "a: " + "9" * 800_000,
    "lists": "a: [" + "[]," * 270_000 + "]",
    "anchors": "a: [" + "&a x," * 150_000 + "]",
    "nested": "[" * 800_000,
    "nested keys": "? " * 400_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_run_file_that_would_take_long_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text(BOMBS[name])
    with pytest.raises(ConfigError, match=r"items|characters|deeper"):
        RunConfig.load(tmp_path / "run.yaml")


def test_run_file_that_is_a_pipe_raises(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="no regular file"):
        RunConfig.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.seed", 10**30),
        ("training.num_train_epochs", float("inf")),
        ("training.learning_rate", float("nan")),
        ("output_dir", "a\0b"),
        ("model", "a\ud800"),
        ("data.filter", {"label": [2**70]}),
        ("data.filter", {"label\ud800": "x"}),
    ],
)
def test_setting_that_nothing_can_store_raises(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build({"model": "x", "method": "lora", "data": {"train": "y"}}, {key: value})
    assert key in caught.value.what
    str(caught.value).encode("utf-8", "replace")


def test_output_dir_of_too_long_a_name_is_no_defect(graftwerk_main: Callable[..., int], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: x\nmethod: lora\ndata: {{train: y}}\noutput_dir: {tmp_path / ('n' * 300)}\n")
    assert graftwerk_main("train", config) == 2
    for command in ("evaluate", "predict", "inspect", "report", "doctor", "train", "compare"):
        assert graftwerk_main(command, "n" * 300) in (2, 3, 5)


@pytest.fixture
def graftwerk_main() -> Callable[..., int]:
    from graftwerk.cli.main import main

    return lambda *arguments: main([str(argument) for argument in arguments])


# -- chat templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ '\\ud800' }}", "half a character"),
        ("{{ messages[0].content | center(200000) }}", "characters"),
        ("{% for i in range(90000) %}{{ 'xxxxxxxxxxxx' }}{% endfor %}", "characters"),
        ("{{ ('x' * 1000) | replace('x', 'y' * 100000) }}", "memory"),
        ("{{ 'x' | center(150000000) }}", "memory"),
        ("{{ raise_exception(messages[0].content * 100000) }}", "template says"),
    ],
)
def test_template_that_floods_raises_or_is_unfit(source: str, said: str) -> None:
    try:
        (rendered,) = ModelTemplate(source, {}).render([[("user", "what?"), ("assistant", "x")]])
        unfit = rendered.unfit
    except GraftwerkError as error:
        unfit = error.what if error.exit_code in (4, 8) else None
    assert unfit is not None
    assert said in unfit
    assert len(unfit) < 500


def test_template_of_a_long_conversation_renders() -> None:
    """The bound is on what a template makes of a conversation, not on the conversation."""
    turns = [("user", "word " * 1_000_000), ("assistant", "x" * 1_000_000)]
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    (rendered,) = ModelTemplate(source + "{% if add_generation_prompt %}assistant: {% endif %}", {}).render([turns])
    assert rendered.unfit is None
    assert len(rendered.text) > 6_000_000


# -- digests -------------------------------------------------------------------------------------------------------

VOUCHED = (
    "adapter/adapter_config.json",
    "adapter/graftwerk.json",
    "adapter/adapter_model.safetensors",
    "manifest.json",
    "config.yaml",
)


def said_of(run: Path) -> dict[str, Any]:
    """All that decides an answer, as it is read from a run's files: no model is loaded."""
    found = find(run)
    own = found.info.own
    keys = ("labels", "task", "task_settings", "max_length", "data")
    return {
        "config": found.info.config,
        "method": found.info.method,
        "settings": found.settings,
        "base": (found.info.base_name, found.info.base_fingerprint),
        "files": own.get("files"),
        **{key: (found.manifest.get(key), own.get(key)) for key in keys},
    }


@pytest.mark.parametrize("name", VOUCHED)
def test_flipped_bit_is_refused_or_changes_no_answer(spoilt: Path, name: str) -> None:
    from graftwerk.serialization.info import check_files

    whole, right = (spoilt / name).read_bytes(), said_of(spoilt)
    bits = range(0, 8 * len(whole), max(1, 8 * len(whole) // 400) | 1)
    try:
        for bit in bits:
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (spoilt / name).write_bytes(flipped)
            try:
                check_files(find(spoilt).info)
                said = said_of(spoilt)
            except GraftwerkError as error:
                if error.exit_code not in (2, 4, 8):
                    raise
                continue
            assert said == right, f"bit {bit}"
    finally:
        (spoilt / name).write_bytes(whole)


def test_reversed_labels_are_refused(spoilt: Path) -> None:
    for name in ("adapter/graftwerk.json", "manifest.json"):
        whole = (spoilt / name).read_bytes()
        tree = json.loads(whole)
        (spoilt / name).write_text(json.dumps({**tree, "labels": tree["labels"][::-1]}))
        with pytest.raises(IntegrityError, match="damaged or changed") as caught:
            predict(spoilt, ["a text"])
        assert caught.value.exit_code == 8
        (spoilt / name).write_bytes(whole)


def test_folder_without_digest_loads_with_a_note(spoilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("adapter/graftwerk.json", "manifest.json"):
        whole = (spoilt / name).read_bytes()
        tree = json.loads(whole)
        (spoilt / name).write_text(json.dumps({key: value for key, value in tree.items() if key != "digest"}))
        with caplog.at_level("INFO", logger="graftwerk"):
            find(spoilt)
        assert f"{spoilt / name} has no digest" in caplog.text
        (spoilt / name).write_bytes(whole)
