"""How files are written: in one piece, by one process at a time, only where that is known to work,
and with checksums by which a later reader knows them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from glob import escape
from pathlib import Path

SUMS = "SHA256SUMS"
"""A file of checksums, as ``sha256sum`` writes and checks them."""


@contextmanager
def only_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Let no other process write to ``folder``, or of a named file there to it, meanwhile.

    The folder is made if it is not there, and taken away again if nothing was written to it. The
    lock is the system's, ``flock``: whose process has ended, however it did, holds it no more.

    Raises:
        BlockingIOError: a process holds it; the message says which, where and since when.
        OSError: the folder cannot be made or written to.
    """
    path = folder / (f".{name}.lock" if name else ".lock")
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        lock = _lock(path, folder / name)
        try:
            # of a writer that was killed: there is no other now
            for left in folder.glob(f".{escape(name) or '*'}.*.partial"):
                left.unlink()
            yield
        finally:
            # before the lock is free: nobody's else is taken away
            with suppress(OSError):
                path.unlink()
            os.close(lock)
    finally:
        for part in made:
            with suppress(OSError):
                part.rmdir()


def _lock(path: Path, what: Path) -> int:
    """Return the descriptor of a locked file, which says who holds it."""
    while True:
        lock = _open(path, what)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(lock)
            os.close(lock)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{holder} writes there: wait until it has ended, stop it, or take another place",
                str(what),
            ) from None
        except OSError as error:
            warnings.warn(
                f"{what}: the file system has no locks ({error.strerror}): see to it that no "
                "other process writes there",
                stacklevel=5,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        # its holder took it away in the meantime
        os.close(lock)
    since = datetime.now(UTC).isoformat(" ", "seconds")
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    # on a full disk it is no less locked
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(content).encode(), 0)
    return lock


def _open(path: Path, what: Path) -> int:
    tries = 10
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            tries -= 1
            # a writer that wrote nothing takes the folder that it made away again
            if tries and isinstance(error, (FileNotFoundError, FileExistsError)):
                continue
            error.filename = str(what)
            raise


def _holder(lock: int) -> str:
    try:
        found = json.loads(os.pread(lock, 4096, 0))
        pid, host = int(found["pid"]), str(found["host"])
        name = f"process {pid} on {host}, since {found['since']},"
    except (ValueError, KeyError, TypeError):
        # it has only just begun
        return "another process"
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return f"a child of {name} which has ended itself,"
        except PermissionError:
            pass
    return name


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it holds the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the file is then as it was, and nothing is left beside it.
    """
    # a name of its own: of two writers neither is to write into the other's
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with open(temporary, "xb") as file:
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with open(temporary, "xb"):
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


def digest(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the checksums of files in ``folder``; by default of all that lie there and below.

    Raises:
        OSError: a file cannot be read, or theirs not be written.
    """
    if names is None:
        found = (path for path in folder.rglob("*") if path.is_file())
        names = (path.relative_to(folder).as_posix() for path in found)
    lines = (f"{digest(folder / name)}  {name}\n" for name in sorted({*names} - {SUMS}))
    write_atomic(folder / SUMS, "".join(lines).encode())


def check_sums(folder: Path) -> None:
    """See that files are as they were when ``write_sums`` saw them.

    Raises:
        ValueError: one is missing or was changed; the message names it.
        OSError: one cannot be read.
    """
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: before for before, name in (line.split("  ", 1) for line in lines)}
    except ValueError:
        raise ValueError(f"{folder / SUMS} is damaged: it must have a SHA-256 a line") from None
    for name, before in sums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, and {SUMS} there lists it")
        if digest(path) != before:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {SUMS} there")
