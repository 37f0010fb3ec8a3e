"""The one gate for base models: what a folder holds is checked before transformers reads any of it.

Refused: code that comes with the model, kernels fetched from a repository that the model names, checkpoints that only
exist pickled, adapter folders, weight files that are something else. A model needs `config.json` and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftwerk.errors import AdapterError, EnvironmentFault, IntegrityError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKED = (
    CONFIG,
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_CONFIG_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library itself accepts."""


def check_configuration(folder: Path, name: str) -> None:
    """Refuse a folder whose JSON files ask for foreign code. Needs no weights to be there.

    Raises:
        AdapterError: it is an adapter, not a base model.
        EnvironmentFault: there is no `config.json`.
        IntegrityError: it asks for remote code or a kernel repository, or a file is not JSON.
    """
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise AdapterError(
                f"{name} is an adapter, not a base model", where=str(folder), mend="name its base model here"
            )
        raise EnvironmentFault(f"{folder / CONFIG} is missing", where=name, mend="a model folder holds config.json")
    if (folder / "adapter_config.json").is_file():
        # transformers would follow it to another model, unasked
        raise AdapterError(
            f"{name} holds a base model and an adapter in one folder",
            where=str(folder / "adapter_config.json"),
            mend="move the adapter into a folder of its own",
        )
    for file in CHECKED:
        path = folder / file
        if path.is_file():
            _check_tree(_read_json(path), path)


def _check_tree(tree: Any, path: Path) -> None:
    for key, value in _walk(tree):
        if key == "auto_map" and value:
            raise IntegrityError(
                f"the model asks to run code of its own (`auto_map`: {_short(value)})",
                where=str(path),
                mend="such code is never run; if transformers knows this model type, remove `auto_map` from a copy",
            )
        if key == "trust_remote_code" and value:
            raise IntegrityError(
                "the model asks for `trust_remote_code`", where=str(path), mend="remove it from a copy"
            )
        if "implementation" in key or "kernel" in key:
            for text in _texts(value):
                if "/" in text or ":" in text:
                    raise IntegrityError(
                        f"the model asks for compiled code from a repository (`{key}`: {text[:80]!r})",
                        where=str(path),
                        mend=f"remove `{key}` from a copy; attention kernels are chosen here, not by the model",
                    )


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth (JSON's own reader limits the depth)."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise IntegrityError(f"{path} has {path.stat().st_size:,} bytes; a configuration is never so large")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from None
    except PermissionError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}") from None


def check_weights(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder, each found to be one by its first bytes.

    Raises:
        EnvironmentFault: a file is missing; it is named.
        IntegrityError: there are only pickled weights, or a file is not what its name says.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        files = _shards(folder)
    else:
        pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLED)
        if pickled:
            raise IntegrityError(
                f"{name} has its weights as pickle only ({', '.join(pickled[:3])}), which can run code when opened",
                where=str(folder),
                mend="use a model with safetensors, or convert it where running its code is safe",
            )
        raise EnvironmentFault(f"{folder / WEIGHTS} is missing", where=name, mend="fetch the model again")
    for file in files:
        _check_header(file)
    return files


def _shards(folder: Path) -> list[Path]:
    index = _read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise IntegrityError(f"{folder / INDEX} has no `weight_map` from tensors to files")
    files = []
    for file in sorted(set(names.values())):
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise IntegrityError(f"{folder / INDEX} names {file!r}, which is no safetensors file beside it")
        if not (folder / file).is_file():
            raise EnvironmentFault(f"{folder / file} is missing", mend="fetch the model again")
        files.append(folder / file)
    return files


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise EnvironmentFault(f"{path} is a Git LFS pointer, not the weights", mend="run `git lfs pull` in its folder")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > MAX_HEADER_BYTES or length + 8 > path.stat().st_size:
        raise IntegrityError(
            f"{path} is not a safetensors file, or is cut off", mend="fetch it again from a source that you trust"
        )


def _short(value: Any) -> str:
    return json.dumps(value)[:120]
