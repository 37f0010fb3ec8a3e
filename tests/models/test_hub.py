"""Hub models, without a network: from the cache, or with the missing file named; damage and pickle found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from graftwerk.errors import ConfigError, IntegrityError, ResourceError
from graftwerk.models import hub
from graftwerk.models.load import load_config, load_model, load_tokenizer, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "own"))
    return tmp_path / "hub"


@pytest.fixture
def snapshot(cache: Path, tiny_encoder: Path) -> Path:
    """`owner/tiny` as the hub's client leaves it: blobs by hash, a snapshot of links, a named branch."""
    root = cache / "models--owner--tiny"
    folder = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    folder.mkdir(parents=True)
    for file in tiny_encoder.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = root / "blobs" / (hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest())
        blob.write_bytes(content)
        (folder / file.name).symlink_to(blob)
    return folder


def test_hub_cached_model_needs_no_network(snapshot: Path) -> None:
    assert model_folder("owner/tiny") == snapshot
    assert model_folder("owner/tiny", "main") == snapshot
    assert model_folder("owner/tiny", COMMIT) == snapshot
    model = load_model("owner/tiny", None, None)
    assert model.config._name_or_path == "owner/tiny"
    assert load_tokenizer("owner/tiny").pad_token == "[PAD]"


@pytest.mark.parametrize("load", [load_config, load_tokenizer, model_folder])
def test_hub_offline_names_missing_file(cache: Path, load: Any) -> None:
    with pytest.raises(ResourceError) as caught:
        load("owner/absent")
    assert caught.value.exit_code == 5
    assert str(cache / "models--owner--absent" / "snapshots" / "main" / "config.json") in caught.value.what


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_hub_incomplete_snapshot_names_missing_file(snapshot: Path, missing: str) -> None:
    (snapshot / missing).unlink()
    with pytest.raises(ResourceError) as caught:
        load_model("owner/tiny", None, None)
    assert str(snapshot / missing) in caught.value.what


def test_hub_damaged_blob_raises_with_its_path(snapshot: Path) -> None:
    load_model("owner/tiny", None, None)
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ResourceError, match="is damaged: its SHA-256") as caught:
        load_model("owner/tiny", None, None)
    assert str(snapshot / "model.safetensors") in caught.value.what
    assert caught.value.where == str(blob)


def test_hub_intact_blob_is_hashed_once(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Any] = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hub.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or whole(file, name))
    model_folder("owner/tiny")
    model_folder("owner/tiny")
    assert len(hashed) == 1


def test_hub_remote_code_raises_before_weights_download(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model_folder("owner/tiny")
    assert [any("safetensors" in pattern for pattern in patterns) for patterns in asked] == [False, True]
    asked.clear()
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(IntegrityError, match="auto_map"):
        model_folder("owner/tiny")
    assert len(asked) == 1


def test_hub_pickle_is_never_requested(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    from huggingface_hub import HfApi

    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name, revision: ["config.json", "pytorch_model.bin"])
    with pytest.raises(IntegrityError, match=r"pickle only \(pytorch_model.bin\)"):
        model_folder("owner/tiny")
    patterns = [*hub.SMALL_FILES, *hub.WEIGHTS]
    for file in (
        "pytorch_model.bin",
        "model.pt",
        "tokenizer.pkl",
        "modeling_evil.py",
        "tf_model.h5",
        "model.fp16.safetensors",
    ):
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def test_hub_unknown_model_raises_config_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def download(*args: Any, **kwargs: Any) -> str:
        raise errors.RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match="the hub has no model `owner/absent` at revision `v9`"):
        load_config("owner/absent", "v9")


def test_is_hub_id_tells_ids_from_paths() -> None:
    for name in ("owner/name", "bert-base-uncased", "a.b/c_d-e"):
        assert hub.is_hub_id(name)
    for name in ("a/b/c", "../x", "a/..", "/a", "~/a", "a b", "", "a\\b", "pkg://a/b", "ü/x"):
        assert not hub.is_hub_id(name)


def test_model_folder_prefers_local_folder(
    snapshot: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_encoder, tmp_path / "owner" / "tiny")
    assert model_folder("owner/tiny") == Path("owner/tiny")
