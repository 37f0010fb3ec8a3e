"""`inspect --verify`: a base that was changed by one bit, before, in or after training, is told by the name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftwerk as gw
from graftwerk.cli.main import main
from graftwerk.errors import IntegrityError
from graftwerk.inspection.verify import verify
from graftwerk.reporting.html import write_report
from graftwerk.serialization.base_digests import base_digests
from graftwerk.training.train import Run
from graftwerk.training.trainer import Trainer
from tests.exports.conftest import Make
from tests.families import FAMILIES
from tests.training.conftest import _tree

NAME = "encoder.layer.1.attention.self.key.weight"


def flip(tensor: torch.Tensor) -> None:
    """Change the last bit of a tensor's last value."""
    tensor.detach().reshape(-1)[-1:].view(torch.uint8)[0] ^= 1


def trained(base: Path, rows: Path, folder: Path, method: Any = "lora") -> Run:
    tree = _tree(base, rows, folder, method)
    tree["training"] |= {"num_train_epochs": 1, "eval_steps": 100}
    return gw.train(tree, quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path) -> Path:
    """A folder with a base and a run on it. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("verified")
    base = shutil.copytree(tiny_encoder, folder / "base")
    trained(base, glosses, folder / "run")
    return folder


def test_verify_after_training_finds_the_base_unchanged(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = Run(made / "run").manifest["base_tensors"]
    assert proof["changed"] == {}
    assert proof["trained"] == 0
    checked = verify(made / "run")
    assert checked["unchanged"] is True
    assert checked["tensors"] == len(proof["before"]) - len(proof["drawn"]) > 30
    assert main(["inspect", str(made / "run"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == checked
    assert main(["inspect", str(made / "run"), "--model", "elsewhere"]) == 2


def test_verify_names_a_base_tensor_changed_by_one_bit(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    flip(tensors[NAME])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    checked = verify(made / "run", model=str(base))
    assert checked["changed"] == [f"bert.{NAME}"]
    assert main(["inspect", str(made / "run"), "--verify", "--model", str(base)]) == 8
    assert f"bert.{NAME}" in capsys.readouterr().err


def test_verify_names_a_changed_file_of_the_adapter(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        verify(run)


def test_training_that_changes_the_base_says_so(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def meddling(trainer: Trainer, *log_position: Any) -> None:
        fit(trainer, *log_position)
        flip(trainer.adapter.model.get_parameter(f"bert.{NAME}"))

    monkeypatch.setattr(Trainer, "fit", meddling)
    run = trained(tiny_encoder, glosses, tmp_path / "run")
    assert list(run.manifest["base_tensors"]["changed"]) == [f"bert.{NAME}"]
    checked = verify(run)
    assert (checked["changed"], checked["changed_in_training"]) == ([], [f"bert.{NAME}"])
    assert checked["unchanged"] is False
    assert main(["inspect", str(run.folder), "--verify"]) == 8
    log = (run.folder / "metrics.jsonl").read_text()
    assert f"training changed the base, which no adapter may do: bert.{NAME}" in log
    assert f"bert.{NAME}" in write_report(run.folder).read_text()


@pytest.mark.slow
def test_verify_of_other_runs_says_what_is_not_compared(
    made: Path, tmp_path: Path, tiny_encoder: Path, glosses: Path, make_adapter: Make
) -> None:
    full = verify(trained(tiny_encoder, glosses, tmp_path / "full", "full"))
    assert (full["tensors"], full["unchanged"]) == (0, None)
    assert "the whole base was trained" in full["notes"][0]
    alone = verify(make_adapter(tiny_encoder, "lora", "classification"))
    assert alone["unchanged"] is None
    assert "an adapter folder alone has no manifest" in alone["notes"][0]
    assert alone["files"] == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_base_digests_change_with_one_bit_of_any_tensor(family: str) -> None:
    model = FAMILIES[family].build()
    gw.attach(model, gw.LoRA(r=2))
    before = base_digests(model)
    for name in before:
        tensor = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        flip(tensor)
        after = base_digests(model)
        assert [other for other in before if after[other] != before[other]] == [name]
        flip(tensor)
    assert base_digests(model) == before


def test_base_digests_do_not_depend_on_layout_or_on_a_wider_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["bert"].build().bfloat16().requires_grad_(False)
    before = base_digests(model)
    monkeypatch.setattr("graftwerk.serialization.base_digests.PIECE", 100)
    assert base_digests(model) == before
    types = {name: digest.partition(" ")[0] for name, digest in before.items()}
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data.T.contiguous().T
    assert base_digests(model) == before
    assert base_digests(model.float()) != before
    assert base_digests(model, types) == before
