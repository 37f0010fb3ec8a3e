"""`push`: a finished folder on the hub, in one commit.

Everything goes into one commit of `huggingface_hub`: an upload that is interrupted leaves the repository as it was, and
the next one does not send again what has arrived.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ConflictError, GraftwerkError, IntegrityError, ResourceError
from graftwerk.evaluation.forgetting import refuse_to_hand_over
from graftwerk.evaluation.loading import find
from graftwerk.exports.source import FACTS
from graftwerk.models.hf_logging import quiet
from graftwerk.models.hub import is_hub_id
from graftwerk.own_files import refuse_links
from graftwerk.sanitize import redact
from graftwerk.serialization.info import check_files
from graftwerk.serialization.untrusted_files import PICKLE_SUFFIXES, read_header, read_json, read_sealed
from graftwerk.serialization.usage import loadable

_WORDS = {".json", ".md", ".txt", ".yaml", ""}
"""Endings of files that are searched for secrets; a tokenizer's own texts are not: its pieces may look like any."""
_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


def push(
    target: Any,
    repo: str,
    *,
    private: bool = True,
    message: str | None = None,
    allow_forgetting: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload an adapter, a merged model or an export to a repository of the hub, which is made if there is none.

    The token is that of ``HF_TOKEN`` or of ``hf auth login``. Files of the same names are replaced; others stay.

    Args:
        target: A run folder or `Run` (its adapter), an adapter folder, or a folder that `merge` or `export` wrote.
        repo: The repository, ``owner/name``.
        private: Make a new repository private; one that is public already is then refused.
        message: Title of the commit. Default: what is uploaded.
        allow_forgetting: Accept an adapter that has forgotten more than `evaluation.max_forgetting` of its run allows.
        dry_run: Check the folder and return the files; nothing is sent, and no token is needed.

    Returns:
        ``repo``, ``kind``, ``files`` (``name``, ``bytes``), ``bytes``, ``url`` and ``commit`` (None if nothing was
        sent), ``notes``.

    Raises:
        ConfigError: No such name of a repository, no token, or one that the hub does not know or that may not write
            there; or the folder is nothing finished.
        ConflictError: The repository is public, and ``private`` is asked for.
        ForgettingError: The adapter has forgotten too much.
        IntegrityError: Files were changed, are links or pickles, or hold what looks like a secret.
        ResourceError: The hub cannot be reached, or the upload broke off.

    Example:
        >>> import graftwerk as gw
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertModel(BertConfig(vocab_size=32, **sizes))
        >>> folder = gw.save(gw.attach(model, gw.LoRA(r=2)), mkdtemp(), metadata={"model": "org/tiny"})
        >>> sorted(file["name"] for file in gw.push(folder, "me/tiny-lora", dry_run=True)["files"])
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'graftwerk.json']
    """
    if "/" not in repo or not is_hub_id(repo):
        raise ConfigError(f"`{repo}` is no name of a repository", where="repo", hint="owner/name")
    folder, kind, base = _finished(target, allow_forgetting)
    files = _files(folder)
    result: dict[str, Any] = {
        "repo": repo,
        "kind": kind,
        "files": [{"name": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in files],
        "url": None,
        "commit": None,
        "notes": [],
    }
    result["bytes"] = sum(file["bytes"] for file in result["files"])
    if base is not None and (not loadable(base) or Path(base).is_absolute()):
        result["notes"].append(
            f"the adapter names `{base}` as its base, which means nothing elsewhere: push a folder of "
            "`graftwerk export --to peft --base-name org/model`"
        )
    return result if dry_run else {**result, **_upload(folder, files, repo, private, message or f"Upload {kind}")}


def _finished(target: Any, allow_forgetting: bool) -> tuple[Path, str, str | None]:
    """Return the folder to upload, what it is, and the base that an adapter names (None for a merged model)."""
    folder = Path(getattr(target, "folder", target))
    if not (folder / FACTS).is_file():
        info = find(target).info
        if info.own:
            check_files(info)
            refuse_to_hand_over(info.own, info.folder, allow_forgetting)
        return info.folder, "adapter", info.base_name or ""
    facts = read_sealed(folder / FACTS)
    kind = str(facts.get("kind"))
    name = (facts.get("base") or {}).get("name")
    if (config := folder / "adapter_config.json").is_file():
        name = read_json(config).get("base_model_name_or_path")
    return folder, f"{kind} export", None if kind in ("merged", "gguf") else str(name or "")


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder, all of them checked."""
    refuse_links(folder, os.listdir(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = 0
    for path in files:
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            raise IntegrityError(
                f"{name} is hidden, and was not written by graftwerk", where=str(path), hint="remove it, or move it"
            )
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise IntegrityError(
                f"{name} is a pickle, which can run any code when it is loaded", where=str(path), hint="remove it"
            )
        if path.suffix == ".safetensors":
            read_header(path)
        weights += path.suffix in (".safetensors", ".gguf")
        if path.suffix in _WORDS and path.name not in _TOKENIZER:
            text = path.read_text(encoding="utf-8", errors="replace")
            if redact(text) != text:
                raise IntegrityError(
                    f"{name} holds what looks like a secret (a token, a password, a signed address)",
                    where=str(path),
                    hint="take it out before others can read it",
                )
    if not weights:
        raise ConfigError(f"{folder} has no weights: it is not finished", hint="write it again")
    return files


def _upload(folder: Path, files: list[Path], repo: str, private: bool, message: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if not token:
        raise ConfigError(
            "there is no token of the hub", where="HF_TOKEN", hint="set HF_TOKEN, or sign in with `hf auth login`"
        )
    api = HfApi(token=token)
    with quiet(), _explained(repo, token, "nothing was sent"):
        url = api.create_repo(repo, private=private, exist_ok=True)
        public = private and not api.repo_info(repo).private
    if public:
        raise ConflictError(f"{repo} is public already", where=str(url), hint="--public, if everyone may read this")
    operations = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
    with quiet(), _explained(repo, token, f"{repo} is as it was; the same command sends what is missing"):
        commit = api.create_commit(repo, operations, commit_message=message)
    return {"url": str(url), "commit": commit.oid}


@contextmanager
def _explained(repo: str, token: str, recovered: str) -> Iterator[None]:
    """Give errors of the hub and of the network in plain words, never with the token in them."""
    from huggingface_hub import errors

    try:
        yield
    except GraftwerkError:
        raise
    except (OSError, RuntimeError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        cause: BaseException = error
        while not isinstance(cause, errors.HfHubHTTPError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        said = str(getattr(cause, "server_message", None) or cause).strip().partition("\n")[0]
        where = f"hub: {said.replace(token, '[redacted]')[:200]}"
        if status == 401:
            raise ConfigError(
                "the hub does not know this token", where=where, recovered=recovered,
                hint="make one that may write (settings of your account), and set HF_TOKEN or `hf auth login`",
            ) from None  # fmt: skip
        if status in (403, 404):
            raise ConfigError(
                f"your token may not write to {repo}", where=where, recovered=recovered,
                hint="name a repository of your own or of an organisation of yours, and a token that may write",
            ) from None  # fmt: skip
        if status is not None and status < 500 and status not in (408, 429):
            raise ConfigError(f"the hub refuses the upload to {repo}", where=where, recovered=recovered) from None
        raise ResourceError(
            "the hub cannot be reached, or the connection broke off", where=where, recovered=recovered,
            hint="try again; with HF_HUB_OFFLINE set nothing is sent",
        ) from None  # fmt: skip
