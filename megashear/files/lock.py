"""Advisory lock of a run folder, released by the kernel when its holder dies.

Uses `flock` on `FOLDER/.lock`; the file says who holds the lock. It is never removed, because two processes could then
lock two files of that name.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megashear.errors import BusyError, StorageError
from megashear.files.atomic import storage_error

NAME = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where it is missing.

    Raises BusyError naming the holder's process and host; StorageError where the folder or a lock cannot be had.
    """
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        _take(descriptor, path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(
                f"{path}: cannot be locked ({error.strerror}); put run.folder on a file system with flock"
            ) from error
        holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "another process"
        raise BusyError(
            f"{path.parent}: in use by {holder}; wait for it, stop it, or choose another run.folder"
        ) from error
