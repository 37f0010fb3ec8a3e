"""GGUF files: unpacked once into a plain safetensors folder in the cache, because unpacking takes tens of seconds.

The copy is float32 and without the `quantization_config` that transformers leaves behind (the weights are no longer
quantized, and with it the model could not be saved). It is named by the file's SHA-256 and the library's version:
another file, or another unpacker, is another copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from graftwerk.errors import IntegrityError, ModelError, ResourceError
from graftwerk.models.cache import cache_folder
from graftwerk.models.hf_logging import quiet

MAGIC = b"GGUF"


def unpacked(path: Path) -> Path:
    """Return the folder with the converted copy of a GGUF file, and make it if it does not exist yet.

    Raises:
        ResourceError: The `gguf` package is missing, or the cache cannot be written (with the bytes needed).
        IntegrityError: It is not a GGUF file.
        ModelError: transformers cannot convert this kind of model.
    """
    import transformers

    state = path.stat()
    digest = _digest(path, state.st_size, state.st_mtime_ns)
    target = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if not target.is_dir():
        _unpack(path, target)
    return target


@cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file, cached for as long as its size and time stay the same."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise IntegrityError(f"{path} is not a GGUF file")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _without_bar() -> Iterator[None]:
    """Silence the progress bar of unpacking.

    The library transformers draws it with tqdm itself, which its own switch for bars does not reach.
    """
    from transformers import modeling_gguf_pytorch_utils as theirs

    theirs_own = getattr(theirs, "tqdm", None)
    theirs.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        theirs.tqdm = theirs_own


def _unpack(path: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401 - transformers needs it
    except ImportError:
        raise ResourceError(
            "reading .gguf files needs the package gguf", where=str(path), hint="pip install 'graftwerk[gguf]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"gguf_file": path.name, "local_files_only": True}
    try:
        with quiet(), _without_bar():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
            model = AutoModelForCausalLM.from_pretrained(path.parent, **place, dtype=torch.float32)
    except MemoryError:
        raise ResourceError(f"{path} does not fit into memory unpacked", hint="use a smaller model") from None
    except Exception as error:  # a damaged or foreign file fails wherever its bytes lead the reader
        raise ModelError(
            f"transformers cannot unpack {path}: {error}",
            hint="the file may be cut off or of an unknown kind; give the same model as a safetensors folder",
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpacking-"))
        try:
            with quiet():
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            _move_whole(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"the unpacked copy of {path.name} cannot be kept in {target.parent}: {error.strerror or error}",
            where=f"{needed:,} bytes are needed",
            hint="make room, or set GRAFTWERK_CACHE to a folder that can be written",
        ) from None


def _move_whole(temporary: Path, target: Path) -> None:
    """Put a file in place whole or not at all, by one rename; if another process was faster, its copy serves."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
