"""The files that hold an adapter's tensors: one, or several that an index lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graftwerk.errors import AdapterError
from graftwerk.serialization.info import WEIGHTS_FILE, AdapterInfo
from graftwerk.serialization.strict_json import refuse
from graftwerk.serialization.untrusted_files import TensorInfo, read_header, read_json, read_tensors, refuse_pickles

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def weight_files(info: AdapterInfo) -> list[Path]:
    """Return the files that hold an adapter's tensors. A single file is read in place of an index, as PEFT does.

    Raises:
        AdapterError: there is none, or one that the index lists is missing.
        IntegrityError: there is only a pickle; the index is damaged or names a file outside the folder.
    """
    single, index = info.folder / WEIGHTS_FILE, info.folder / INDEX_FILE
    if single.exists() or info.own:
        files = [single]
    elif index.exists():
        files = [info.folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        refuse_pickles(info.folder, WEIGHTS_FILE)
        files = [single]
    if missing := [file.name for file in files if not file.exists()]:
        raise AdapterError(f"missing: {', '.join(missing[:8])}", where=str(info.folder))
    return files


def read_weights(info: AdapterInfo, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Read all tensors of an adapter folder, by the keys that they are stored under.

    Args:
        info: The folder.
        max_bytes: Most bytes to read in all; the machine's memory by default.

    Returns:
        By key, any shape.

    Raises:
        AdapterError, IntegrityError, ResourceError: as `weight_files` and `read_tensors`; a tensor is not in the file
            that the index names.
    """
    files = weight_files(info)
    if files[0].name == WEIGHTS_FILE:
        return read_tensors(files[0], max_bytes=max_bytes, written=info.written(WEIGHTS_FILE))
    tensors: dict[str, Tensor] = {}
    left = max_bytes
    for file in files:
        tensors.update(read_tensors(file, max_bytes=left))
        left = None if left is None else max(0, left - file.stat().st_size)
    _check_index(info.folder / INDEX_FILE, {file: list(read_header(file)) for file in files})
    return tensors


def read_headers(info: AdapterInfo) -> dict[str, TensorInfo]:
    """Read type and shape of all tensors of an adapter folder. Raises as `read_weights` does."""
    return {key: header for file in weight_files(info) for key, header in read_header(file).items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index says it."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        refuse(index, "its `weight_map` does not give a file for each tensor")
    for name in found.values():
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            refuse(index, f"it names {name!a:.80}, which is no safetensors file of this folder")
    return found


def _check_index(index: Path, keys: dict[Path, list[str]]) -> None:
    """Raise if a file has a tensor that the index does not place there, or lacks one that it does."""
    placed = _weight_map(index)
    for file, found in keys.items():
        if foreign := [key for key in found if placed.get(key) != file.name]:
            refuse(index, f"it does not place `{foreign[0]!a:.80}` in {file.name}, which has it")
    have = {key for found in keys.values() for key in found}
    if missing := [key for key in placed if key not in have]:
        raise AdapterError(f"missing: {', '.join(key[:200] for key in missing[:8])} ({len(missing)} in all)")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any shape to a safetensors file, readable as other files are under the user's umask."""
    from safetensors.torch import save_file

    # Views of one storage (a tied head) would be refused; copies on the CPU are what is meant.
    save_file(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, path, {"format": "pt"}
    )
    # The library makes files for their owner alone. The folder was made under the user's umask, as all other files.
    path.chmod(path.parent.stat().st_mode & 0o666)
