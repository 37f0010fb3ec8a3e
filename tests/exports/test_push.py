"""`push` against a stand-in of the hub: what arrives, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import HfHubHTTPError

import graftwerk as gw
from graftwerk.errors import ConfigError, ConflictError, GraftwerkError, IntegrityError, ResourceError
from graftwerk.exports.push import _explained
from tests.exports.conftest import Make
from tests.exports.hub import Hub, serving

MINE = "wonder-of-the-world"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setenv("HF_TOKEN", MINE)
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_utils._http.time, "sleep", lambda seconds: None)  # between tries
        hub_utils.close_session()
        yield hub
        hub_utils.close_session()


@pytest.fixture
def adapter(make_adapter: Make, tiny_encoder: Path) -> Path:
    return make_adapter(tiny_encoder, "lora", "classification")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push_sends_every_file_in_one_private_commit(hub: Hub, adapter: Path) -> None:
    result = gw.push(adapter, "me/tiny")
    assert hub.files["me/tiny"] == contents(adapter)
    assert {file["name"] for file in result["files"]} == set(contents(adapter))
    assert (result["url"], result["commit"]) == (f"{hub.endpoint}/me/tiny", "c" * 40)
    assert hub.commits == ["Upload adapter"]
    assert hub.public == {"me/tiny": False}
    assert "means nothing elsewhere" in result["notes"][0]

    gw.push(adapter, "me/tiny", message="Again")  # what has arrived is not sent again
    assert hub.commits == ["Upload adapter", "Again"]
    assert sum(request.startswith("PUT") for request in hub.requests) == 1


def test_push_sends_merged_models_and_exports(hub: Hub, adapter: Path, labelled: str, tmp_path: Path) -> None:
    gw.merge(adapter, tmp_path / "merged", data=labelled)
    gw.export(adapter, tmp_path / "peft", to="peft", data=labelled, base_name="org/tiny")
    for name, kind in (("merged", "merged export"), ("peft", "peft export")):
        result = gw.push(tmp_path / name, f"me/{name}", private=False)
        assert (result["kind"], result["notes"]) == (kind, [])
        assert hub.files[f"me/{name}"] == contents(tmp_path / name)
        assert hub.public[f"me/{name}"]


def test_push_dry_run_sends_nothing_and_needs_no_token(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", "/nowhere/token")
    result = gw.push(adapter, "me/tiny", dry_run=True)
    assert {file["name"] for file in result["files"]} == set(contents(adapter))
    assert result["url"] is None
    assert not hub.requests
    with pytest.raises(ConfigError, match="there is no token"):
        gw.push(adapter, "me/tiny")
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("no-key-at-all", "me/tiny", "the hub does not know this token"),
        ("key-of-another", "me/tiny", "your token may not write to me/tiny"),
        (MINE, "other/tiny", "your token may not write to other/tiny"),
    ],
)
def test_push_without_rights_raises(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=said) as raised:
        gw.push(adapter, repo)
    assert token not in str(raised.value)
    assert not hub.files


def test_push_to_readable_repo_of_another_raises(hub: Hub, adapter: Path) -> None:
    hub.public["other/tiny"] = True
    with pytest.raises(ConfigError, match="may not write to other/tiny"):
        gw.push(adapter, "other/tiny", private=False)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (400, ConfigError, "refuses the upload"),
        (401, ConfigError, "does not know this token"),
        (403, ConfigError, "may not write"),
        (404, ConfigError, "may not write"),
        (408, ResourceError, "cannot be reached"),
        (429, ResourceError, "cannot be reached"),
        (503, ResourceError, "cannot be reached"),
    ],
)
def test_push_gives_each_answer_of_the_hub_its_error(status: int, error: type[GraftwerkError], said: str) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    with pytest.raises(error, match=said) as caught, _explained("me/a", "wonder", "nothing was sent"):
        raise HfHubHTTPError("not with wonder", response=response)
    assert caught.value.where == "hub: not with [redacted]"
    assert caught.value.recovered == "nothing was sent"


def test_push_to_public_repo_raises_unless_public_is_asked_for(hub: Hub, adapter: Path) -> None:
    hub.public["me/tiny"] = True
    with pytest.raises(ConflictError, match="public already"):
        gw.push(adapter, "me/tiny")
    assert not hub.files
    gw.push(adapter, "me/tiny", private=False)
    assert hub.files


def test_push_interrupted_leaves_the_repo_and_goes_on(hub: Hub, adapter: Path) -> None:
    hub.breaking = 100
    with pytest.raises(ResourceError, match="broke off") as raised:
        gw.push(adapter, "me/tiny")
    assert "me/tiny is as it was" in str(raised.value)
    assert MINE not in str(raised.value)
    assert not hub.files
    hub.breaking = 0
    gw.push(adapter, "me/tiny")
    assert hub.files["me/tiny"] == contents(adapter)


def test_push_without_network_raises(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="cannot be reached"):
        gw.push(adapter, "me/tiny")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    hub_utils.close_session()
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        gw.push(adapter, "me/tiny")


@pytest.mark.parametrize("repo", ["tiny", "me/tiny/more", "me/ti ny", "../tiny", ""])
def test_push_to_impossible_name_raises(adapter: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="no name of a repository"):
        gw.push(adapter, repo)


def test_push_of_unfinished_or_changed_folder_raises(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    def refused(error: type[GraftwerkError], said: str, folder: Path = adapter) -> None:
        with pytest.raises(error, match=said):
            gw.push(folder, "me/tiny", dry_run=True)

    (tmp_path / "empty").mkdir()
    refused(ConfigError, "neither a run folder nor an adapter folder", tmp_path / "empty")
    refused(ConfigError, "there is no folder", tmp_path / "nothing")
    for name, content, said in (
        (".env", "x", "is hidden"),
        ("optimizer.pt", "x", "is a pickle"),
        ("notes.md", "curl -H 'Authorization: Bearer abcdefghijkl'", "looks like a secret"),
    ):
        (adapter / name).write_text(content)
        refused(IntegrityError, said)
        (adapter / name).unlink()
    (adapter / "link.json").symlink_to(tmp_path / "rows.jsonl")
    refused(IntegrityError, "symbolic link")
    (adapter / "link.json").unlink()
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(IntegrityError, "changed")
    weights.unlink()
    refused(GraftwerkError, "adapter_model.safetensors")
    assert not hub.requests


def test_push_command_prints_files_and_address_and_no_token(hub: Hub, adapter: Path) -> None:
    hub.breaking = 0
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "graftwerk", "push", adapter, "me/tiny", "--json"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["url"] == f"{hub.endpoint}/me/tiny"
    assert "adapter_model.safetensors" in ran.stderr
    assert MINE not in ran.stdout + ran.stderr
    assert hub.files["me/tiny"] == contents(adapter)
