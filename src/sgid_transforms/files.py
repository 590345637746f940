"""Small things that every room needs around files and processes: whole writes, locks, waiting, which job this is, names."""

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
"""After so long without progress, whatever waits says what it waits for."""

_log = logging.getLogger("sgid_transforms")


def _harmless(record: logging.LogRecord) -> bool:
    """Names, captions and messages of other libraries may hold what a terminal would obey."""
    record.msg, record.args = "\n".join(map(show, record.getMessage().split("\n"))), None
    return True


_log.addFilter(_harmless)


class Waiting:
    """A wait for another process: it is told once when nothing happens for long, and may have a deadline.

    Args:
        what: What is waited for, as the log is to name it.
        timeout: Seconds until the deadline; None: there is none.
    """

    def __init__(self, what: str, timeout: float | None = None) -> None:
        self.what, self.timeout = what, timeout
        self._start = self._since = time.monotonic()
        self._told = False

    def progress(self) -> None:
        """Something has happened: the quiet begins anew."""
        self._since = time.monotonic()
        self._told = False

    def check(self) -> float:
        """Tell what is to be told; returns the seconds until something is due again.

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
    """A temporary path in the folder of ``path``, which takes its place at the end and vanishes after an error.

    A reader, or a crash, finds either the old file or the whole new one.

    Raises:
        OSError: As the file system gives it; an existing file is then left as it was.
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
    """Write a file that is there whole or not at all; text as UTF-8.

    Raises:
        OSError: As the file system gives it; an existing file is then left as it was.
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
    """Whether a process of this machine has this id; True where that cannot be known."""
    if os.name == "nt" or pid == os.getpid():  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def job_identity(*more: str) -> str | None:
    """A name for this distributed job on this machine, the same in all its ranks; None outside of one.

    Ranks of one machine are children of one launcher (``torchrun``, ``mp.spawn``), so the launcher's process id and the
    job's master address and port name the job.

    Args:
        more: What the name is for; other words give another name.
    """
    dist = sys.modules.get("torch.distributed")  # whoever did not import it has not initialised it either
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
    """A path for people: bytes that are no text, and control characters, are escaped."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
