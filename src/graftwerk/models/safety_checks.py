"""The one gate for base models: what a folder holds is checked before transformers reads any of it.

Refused: code that comes with the model, kernels fetched from a repository that the model names, checkpoints that only
exist pickled, adapter folders, weight files that are something else. A model needs `config.json` and safetensors.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftwerk.errors import AdapterError, IntegrityError, ResourceError
from graftwerk.resource_paths import open_regular
from graftwerk.sanitize import strings_in

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
PACKED = ("I8", "U8", "I32", "U32", "I64")
"""Types of tensors that may hold several quantized numbers in each of theirs."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_CONFIG_BYTES = 16 << 20
"""The list of weights of the largest models has 9 MB."""
MAX_CONFIG_VALUES = 500_000
MAX_TOKENIZER_BYTES = 64 << 20
"""The largest tokenizers have 33 MB, and 2 million values: words, and pairs that are merged."""
MAX_TOKENIZER_VALUES = 4_000_000
VALUES_PER_TOKEN = 16
"""Of a tokenizer file, for each token of the model; a pair that is merged has three, and there are twice as many."""
SPARE_VALUES = 200_000
MAX_HEADER_BYTES = 4 << 20
"""About 32,000 tensors in one file."""
MAX_COUNT = 1 << 17
"""Of layers, heads, experts, classes: each is at least an object in memory, whatever the weights hold."""
_COUNTS = re.compile(r"layer|block(?!_size)|depth|stage|label|head(?!_dim)|expert")
"""Keys of a configuration whose value says how many of something there are."""


def check_configuration(folder: Path, name: str) -> None:
    """Refuse a folder whose JSON files ask for foreign code. Needs no weights to be there.

    Raises:
        AdapterError: it is an adapter, not a base model.
        ResourceError: there is no `config.json`.
        IntegrityError: it asks for remote code or a kernel repository, or a file is not JSON.
    """
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise AdapterError(
                f"{name} is an adapter, not a base model", where=str(folder), hint="name its base model here"
            )
        raise ResourceError(f"{folder / CONFIG} is missing", where=name, hint="a model folder holds config.json")
    if (folder / "adapter_config.json").is_file():
        # transformers would follow it to another model, unasked
        raise AdapterError(
            f"{name} holds a base model and an adapter in one folder",
            where=str(folder / "adapter_config.json"),
            hint="move the adapter into a folder of its own",
        )
    tokens = 0
    for file in CHECKED:
        path = folder / file
        if path.is_file():
            tree = _read_json(path)
            _check_tree(tree, path)
            if file == CONFIG:
                _check_sizes(tree, path)
                tokens = max((n for key, n in _walk(tree) if key == "vocab_size" and type(n) is int), default=2**18)
    for file in TOKENIZERS:
        if (folder / file).is_file():
            _check_tokenizer(folder / file, min(MAX_TOKENIZER_VALUES, SPARE_VALUES + VALUES_PER_TOKEN * tokens))


def _check_sizes(tree: Any, path: Path) -> None:
    """Refuse sizes that no model has, before objects or lists of that many are made."""
    if not isinstance(tree, dict):
        raise IntegrityError(f"{path} holds no JSON object")
    for key, value in _walk(tree):
        if type(value) is not int:
            continue
        if not -(2**63) <= value < 2**63 or (value > MAX_COUNT and _COUNTS.search(key.lower())):
            raise IntegrityError(
                f"the model says that its `{key[:80]}` is {str(value)[:40]}, which no model has",
                where=str(path),
                hint="if it came from somebody else, do not trust it",
            )


def _check_tokenizer(path: Path, most: int) -> None:
    """Refuse a tokenizer file that would take long, or much memory, to read; ``most``: values that it may hold."""
    size = values = 0
    lines = path.suffix == ".txt"
    with _opened(path) as stream:
        while size <= MAX_TOKENIZER_BYTES and values <= most and (piece := stream.read(1 << 20)):
            size += len(piece)
            values += piece.count(b"\n") if lines else sum(map(piece.count, (b"{", b"[", b",")))
    if size > MAX_TOKENIZER_BYTES or (values > most and path.suffix in (".json", ".txt")):
        raise IntegrityError(
            f"{path} is larger than any tokenizer: more than "
            + (f"{MAX_TOKENIZER_BYTES:,} bytes" if size > MAX_TOKENIZER_BYTES else f"{most:,} values"),
            hint="if it came from somebody else, do not trust it",
        )


def _check_tree(tree: Any, path: Path) -> None:
    for key, value in _walk(tree):
        if key == "auto_map" and value:
            raise IntegrityError(
                f"the model asks to run code of its own (`auto_map`: {_short(value)})",
                where=str(path),
                hint="such code is never run; if transformers knows this model type, remove `auto_map` from a copy",
            )
        if key == "trust_remote_code" and value:
            raise IntegrityError(
                "the model asks for `trust_remote_code`", where=str(path), hint="remove it from a copy"
            )
        if "implementation" in key or "kernel" in key:
            for text in strings_in(value):
                if "/" in text or ":" in text:
                    raise IntegrityError(
                        f"the model asks for compiled code from a repository (`{key}`: {text[:80]!r})",
                        where=str(path),
                        hint=f"remove `{key}` from a copy; attention kernels are chosen here, not by the model",
                    )


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value, at any depth (JSON's own reader limits the depth)."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _read_json(path: Path) -> Any:
    with _opened(path) as stream:
        content = stream.read(MAX_CONFIG_BYTES + 1)
    values = sum(map(content.count, (b"{", b"[", b",")))
    if len(content) > MAX_CONFIG_BYTES or values > MAX_CONFIG_VALUES:
        raise IntegrityError(
            f"{path} has more than {MAX_CONFIG_BYTES:,} bytes or {MAX_CONFIG_VALUES:,} values; "
            "a configuration is never so large"
        )
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {str(error)[:200]}") from None


def _opened(path: Path) -> io.FileIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None


def check_weights(folder: Path, name: str) -> dict[str, int]:
    """Check the safetensors files of a folder by their headers.

    Returns:
        How many numbers each tensor holds at most; of integers, two for each byte, as in a 4-bit weight.

    Raises:
        ResourceError: a file is missing; it is named.
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
                hint="use a model with safetensors, or convert it where running its code is safe",
            )
        raise ResourceError(f"{folder / WEIGHTS} is missing", where=name, hint="fetch the model again")
    held: dict[str, int] = {}
    for file in files:
        held.update(_sizes(file))
    return held


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
            raise ResourceError(f"{folder / file} is missing", hint="fetch the model again")
        files.append(folder / file)
    return files


def _sizes(path: Path) -> dict[str, int]:
    with _opened(path) as file:
        start = file.read(64)
        file.seek(8)
        header = file.read(min(int.from_bytes(start[:8], "little"), MAX_HEADER_BYTES))
    if start.startswith(b"version https://git-lfs"):
        raise ResourceError(f"{path} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in its folder")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > MAX_HEADER_BYTES or length + 8 > path.stat().st_size:
        raise IntegrityError(
            f"{path} is not a safetensors file, or is cut off", hint="fetch it again from a source that you trust"
        )
    # What parsing it may cost is bounded before it is done: an entry has one brace, two brackets, few commas.
    braces, brackets, commas = map(header.count, (b"{", b"[", b","))
    try:
        if brackets > 2 * braces + 1_000 or commas > 16 * braces + 10_000:
            raise ValueError("it lists something else")
        tensors = {key: entry for key, entry in json.loads(header.decode()).items() if key != "__metadata__"}
        held, total = {}, 0
        for key, entry in tensors.items():
            begin, end = map(int, entry["data_offsets"])
            total += end - begin
            packed = 2 * (end - begin)
            held[key] = packed if entry["dtype"] in PACKED else min(packed, math.prod(map(int, entry["shape"])))
        if total > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        return held
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            f"{path} has a header that is no list of tensors ({str(error)[:80]})",
            hint="fetch it again from a source that you trust",
        ) from None


def _short(value: Any) -> str:
    return json.dumps(value)[:120]
