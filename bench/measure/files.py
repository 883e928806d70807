"""How files are written: in one piece, and only where that is known to work."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it holds the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the file is then as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    # the rename itself is durable once the folder is
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def claim_file(path: Path) -> None:
    """See that a file can be written, and leave it as it is.

    Raises:
        OSError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb"):
            pass
        temporary.unlink()
    except OSError as error:
        error.filename = str(path)
        raise


def claim_folder(folder: Path) -> None:
    """Make ``folder`` and see that files can be written to it, before anything is measured.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "the output folder must be writable", str(folder))
