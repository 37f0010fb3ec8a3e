"""Models of the Hugging Face hub: fetched into its cache in two steps, so that a refused model costs no weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, IntegrityError, ResourceError
from graftwerk.models.cache import recall, remember
from graftwerk.models.safety_checks import PICKLED, check_configuration

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
"""Configuration and tokenizers. `*.model` are sentencepiece's own files (protocol buffers)."""

WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
"""Not `model.fp16.safetensors` and other variants, which would be fetched for nothing."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(name: str) -> bool:
    """Return True for `owner/name`, or a bare `name` as the oldest models have."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name


def fetch(name: str, revision: str | None, *, weights: bool) -> Path:
    """Return the folder of a model's snapshot in the hub's cache, and download it if it is not there yet.

    Args:
        name: Id of the model on the hub.
        revision: Branch, tag or commit, or None for the main branch.
        weights: Also download the safetensors, after the configuration has passed the safety checks.

    Raises:
        ConfigError: There is no such model or revision, or no permission to read it.
        ResourceError: No network and not in the cache (the message names the file), or a file's hash is wrong.
        IntegrityError: Its weights exist as pickle only, or it needs code of its own.
    """
    folder = _snapshot(name, revision, SMALL_FILES)
    check_configuration(folder, name)
    if weights:
        if not any(folder.glob("*.safetensors")):
            _refuse_pickled(name, revision)
        folder = _snapshot(name, revision, [*SMALL_FILES, *WEIGHTS])
        for file in sorted(folder.glob("*.safetensors")):
            _check_hash(file)
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (
        errors.GatedRepoError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise ConfigError(
            f"the hub has no model `{name}`"
            + (f" at revision `{revision}`" if revision else "")
            + ", or you may not read it",
            where=f"model: {type(error).__name__}",
            hint="check the spelling; a local folder is given by its path",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        raise ResourceError(
            f"{cached / 'snapshots' / (revision or 'main') / 'config.json'} is not there and the hub cannot be reached",
            where=f"model: {name} ({_first(error)})",
            hint="fetch the model once with a network, or give a local folder",
        ) from None


def _refuse_pickled(name: str, revision: str | None) -> None:
    """Refuse a model without safetensors by its list of files, before a download. Offline, the gate does it."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files: list[str] = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError):
        return
    pickled = [file for file in files if file.endswith(PICKLED)]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise IntegrityError(
            f"{name} has its weights as pickle only ({pickled[0]}), which can run code when opened",
            hint="use a model with safetensors",
        )


def _check_hash(file: Path) -> None:
    """The hub's cache names a large file by its SHA-256. Checked once for each file as it is now, then remembered."""
    blob = file.resolve()
    if not _SHA256.fullmatch(blob.name):
        return
    state: Any = [blob.stat().st_size, blob.stat().st_mtime_ns]
    if recall("checked-hashes", blob.name) == state:
        return
    with blob.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != blob.name:
        raise ResourceError(
            f"{file} is damaged: its SHA-256 is {found[:16]}..., not {blob.name[:16]}...",
            where=str(blob),
            hint="delete this file; it is then fetched again",
        )
    remember("checked-hashes", blob.name, state)


def _first(error: Exception) -> str:
    """Return the first sentence of an error; the rest of what libraries write does not apply here."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0][:160] if lines else type(error).__name__
