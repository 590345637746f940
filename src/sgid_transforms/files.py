"""Helpers for files and processes: atomic writes, locks, waiting, the name of a distributed job, printable paths."""

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover (not a POSIX system: nothing is locked there)
    fcntl = None  # type: ignore[assignment]

QUIET_SECONDS = 30.0
"""After this long without progress, a wait logs what it is waiting for."""

_log = logging.getLogger("sgid_transforms")


def _harmless(record: logging.LogRecord) -> bool:
    """Escape control characters: names, captions and messages of other libraries may contain terminal commands."""
    record.msg, record.args = "\n".join(map(show, record.getMessage().split("\n"))), None
    return True


_log.addFilter(_harmless)


class Waiting:
    """A wait for another process. It logs a warning once when nothing happens for long, and may have a deadline.

    Args:
        what: What is waited for, as named in the log.
        timeout: Seconds until the deadline; None: no deadline.
    """

    def __init__(self, what: str, timeout: float | None = None) -> None:
        self.what, self.timeout = what, timeout
        self._start = self._since = time.monotonic()
        self._told = False

    def progress(self) -> None:
        """Note that something has happened, which restarts the quiet period."""
        self._since = time.monotonic()
        self._told = False

    def check(self) -> float:
        """Log a warning if one is due; returns the seconds until the next check is due.

        Raises:
            TimeoutError: The deadline has passed.
        """
        now = time.monotonic()
        if self.timeout is not None and now >= self._start + self.timeout:
            raise TimeoutError(f"waited for {self.what} for timeout={self.timeout:g} s")
        if not self._told and now >= self._since + QUIET_SECONDS:
            self._told = True
            _log.warning("waiting for %s: nothing has happened for %.0f s", self.what, now - self._since)
        due = [] if self._told else [self._since + QUIET_SECONDS]
        if self.timeout is not None:
            due.append(self._start + self.timeout)
        return min(due, default=now + QUIET_SECONDS) - now


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path next to ``path``. It replaces ``path`` at the end, or is removed after an error.

    Readers see either the old file or the complete new one, even after a crash.

    Raises:
        OSError: The file cannot be written; an existing file is left unchanged.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name[:100]}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        with contextlib.suppress(OSError):  # there is none after a success
            temporary.unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes | str, *, fsync: bool = False) -> None:
    """Write a file completely or not at all; text is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written; an existing file is left unchanged.
    """
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def try_lock(path: str | os.PathLike[str]) -> int | None:
    """Lock a file; the lock lasts until the returned descriptor, and every inherited copy of it, is closed.

    Returns:
        A descriptor, or None when another process holds the lock.

    Raises:
        OSError: The file cannot be opened or created.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_alive(pid: int) -> bool:
    """Whether a process on this machine has this id; True if that cannot be known."""
    if os.name == "nt" or pid == os.getpid():  # on Windows, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def job_identity(*more: str) -> str | None:
    """A name for this distributed job on this machine, the same in all its ranks; None outside of a job.

    Ranks of one machine are children of one launcher (``torchrun``, ``mp.spawn``), so the launcher's process id and the
    job's master address and port name the job.

    Args:
        more: Words to include in the name; different words give different names.
    """
    dist = sys.modules.get("torch.distributed")  # if it was never imported, it was never initialised
    if dist is not None and dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
    else:
        text = os.environ.get("WORLD_SIZE", "").strip()
        size = int(text) if text.isdecimal() else 1
    if size <= 1:
        return None
    job = (str(os.getppid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), *more)
    return sha256("\0".join(job).encode()).hexdigest()[:24]


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free space on the file system where ``path`` is, or would be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def show(path: str | os.PathLike[str]) -> str:
    """A path to print: undecodable bytes and control characters are escaped."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
