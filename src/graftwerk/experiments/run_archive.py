"""Run folders as tar files, for machines that share none."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

from graftwerk.errors import IntegrityError, ResourceError
from graftwerk.training.run_dir import LOCK, TRUNK


def pack(folder: Path) -> bytes:
    """Return the files of a run folder as a tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and not path.is_symlink() and inside.parts[0] not in (LOCK, TRUNK):
                archive.add(path, str(inside), recursive=False)
    return stream.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """Put a run folder in place of the one that is there.

    Raises:
        IntegrityError: The archive is damaged, or would write outside the folder.
        ResourceError: It cannot be written.
    """
    incoming, aside = (folder.with_name(f".{folder.name}.{name}") for name in ("incoming", "replaced"))
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        incoming.mkdir(parents=True)  # an archive may be empty: that of a run killed before its first file
        with tarfile.open(fileobj=io.BytesIO(archive)) as stream:
            stream.extractall(incoming, [member for member in stream if member.isfile()], filter="data")
    except tarfile.TarError as error:
        raise IntegrityError(f"a run folder arrived damaged: {error}", where=str(folder)) from None
    except OSError as error:
        raise ResourceError(f"a run folder arrived and cannot be written: {error}", where=str(folder)) from None
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    incoming.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
