"""Files that appear whole or not at all, also when their writer is killed, and what killed writers leave behind."""

import contextlib
import errno
import itertools
import os
import re
import socket
import stat
import threading
import time
from typing import NamedTuple

from sgid_transforms.files import is_alive

_serial = itertools.count()
_TEMPORARY = re.compile(r"(?P<host>[A-Za-z0-9.-]{1,64})_(?P<pid>[0-9]+)_[0-9]+_[0-9]+\.tmp")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_ATTEMPTS = 5


class NotAPlainFileError(ValueError):
    """A folder, pipe, device or oversized file stands where a small plain file should."""


class FileId(NamedTuple):
    """What tells one file from another one that took over its name."""

    device: int
    inode: int


def read(path: str, max_size: int) -> tuple[bytes, FileId]:
    """The bytes of a plain file, and which file it was.

    Raises:
        NotAPlainFileError: it is a folder, pipe or device (never waited for), or larger than ``max_size`` bytes.
        OSError: it does not exist or cannot be read.
    """
    descriptor = os.open(path, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotAPlainFileError("it is not a plain file")
        if status.st_size > max_size:
            raise NotAPlainFileError(f"it has {status.st_size} bytes, more than the {max_size} allowed")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size:
            more = os.read(descriptor, status.st_size - len(data))
            if not more:
                break
            data += more
    finally:
        os.close(descriptor)
    return data, FileId(status.st_dev, status.st_ino)


def publish(data: bytes, final: str, temporary_folder: str, *, fsync: bool) -> bool:
    """Write ``data`` beside the store's files, then give it its name in one step; the first writer wins.

    A hard link does both at once: it fails where the name is taken. File systems without hard links get a rename, by which
    a second writer may replace the first one's file: still one whole file.

    Returns:
        Whether this call's file got the name.

    Raises:
        OSError: as the file system gives it; no half file is left under either name.
    """
    for attempt in itertools.count(1):
        temporary = os.path.join(temporary_folder, _temporary_name())
        try:
            _write(temporary, data, fsync=fsync)
            return _give_name(temporary, final)
        except FileNotFoundError:
            # A folder is missing, or somebody swept the temporary file of a writer that looked dead from another layout.
            if attempt == _ATTEMPTS:
                raise
            os.makedirs(os.path.dirname(final), exist_ok=True)
            os.makedirs(temporary_folder, exist_ok=True)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    raise AssertionError("unreachable")


def move_aside(path: str, folder: str, name: str, judged: FileId | None) -> bool:
    """Move a damaged file into ``folder``, unless another file has taken over its name since it was judged.

    Returns:
        Whether the judged file was moved by this call.

    Raises:
        OSError: the folder cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, f"{name}.{_temporary_name()[:-4]}")
    try:
        os.replace(path, target)
    except FileNotFoundError:  # another reader was faster
        return False
    moved = os.lstat(target)
    if judged is None or FileId(moved.st_dev, moved.st_ino) == judged or not stat.S_ISREG(moved.st_mode):
        return True
    _give_name(target, path)
    with contextlib.suppress(OSError):
        os.unlink(target)
    return False


def sweep(folder: str, max_age: float) -> int:
    """Remove the temporary files of writers that are gone.

    Gone means: on this host, and no process has the writer's id; or, on any host, not touched for ``max_age`` seconds.

    Returns:
        How many were removed.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if _is_orphan(entry, max_age):
                    os.unlink(entry.path)
                    removed += 1
    return removed


def count_entries(folder: str) -> int:
    """How many entries a folder has; 0 where there is none."""
    try:
        with os.scandir(folder) as entries:
            return sum(1 for _ in entries)
    except OSError:
        return 0


def _temporary_name() -> str:
    return f"{_host()}_{os.getpid()}_{threading.get_native_id()}_{next(_serial)}.tmp"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "host"


def _write(path: str, data: bytes, *, fsync: bool) -> None:
    descriptor = os.open(path, _WRITE_FLAGS, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if fsync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_name(temporary: str, final: str) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    if os.path.lexists(final):
        return False
    os.replace(temporary, final)
    return True


def _is_orphan(entry: "os.DirEntry[str]", max_age: float) -> bool:
    found = _TEMPORARY.fullmatch(entry.name)
    if found is None:
        return False
    if found["host"] == _host() and not is_alive(int(found["pid"])):
        return True
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > max_age
