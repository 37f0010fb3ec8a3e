"""Writing of tensors into a safetensors file, hashed on the way: no copy in memory, and no second reading.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data). Reading is
done by `serialization.untrusted_files.read_tensors`, as for all files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graftwerk.serialization.safetensors_header import header_of


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a new file; the same tensors give the same bytes, in whatever order they come.

    Args:
        path: The file, which must not exist.
        tensors: Tensors of any shape by name.

    Returns:
        The SHA-256 of the file, in hexadecimal digits.
    """
    names, text = header_of(tensors)
    digest = hashlib.sha256()
    with path.open("xb") as stream:
        for chunk in (len(text).to_bytes(8, "little"), text):
            stream.write(chunk)
            digest.update(chunk)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            content = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            stream.write(content)
            digest.update(content)
    return digest.hexdigest()
