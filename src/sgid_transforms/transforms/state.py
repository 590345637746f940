"""State that every copy of one transform shares, in all processes of this machine: counters and live settings.

A small memory-mapped file holds one row of counters per process, so that counting takes no lock and no message, and a
version number that tells every process when a live setting changed. It works with and without a service.
"""

import contextlib
import copy
import json
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # pragma: no cover (not a POSIX system: one process at a time)
    fcntl = None  # type: ignore[assignment]

_VERSION = 0  # index of the settings' version in the file's first row
_ROWS = 1024  # processes alive at one time; rows of ended ones are folded into row 1 and used again
_RETIRED = 1
_forks = 0  # between this process and the one that imported the module: to ask the system for the id costs more than to count


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class SharedState:
    """Counters and settings shared by all copies of an object, across fork, spawn and pickle.

    A copy made within the process (``copy.deepcopy``, a pickle round trip) is independent: it starts from the same
    settings with counters of its own. A copy that reaches another process shares both with its origin.

    Args:
        names (sequence of str): The counters.
        settings (mapping): JSON-able live settings.
    """

    _seen_version: int

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.names = tuple(names)
        self._width = len(self.names) + 1  # the first number of a row is the process id
        self._path = tempfile.mkdtemp(prefix="sgid-state-")
        self._origin = os.getpid()
        self._settings = dict(settings)
        with open(os.path.join(self._path, "counters"), "wb") as file:
            file.write(bytes(8 * self._width * _ROWS))
        self._open()
        self._write_settings()
        weakref.finalize(self, _remove, self._path, self._origin)

    # --- counters

    def add(self, name: str, count: int = 1) -> None:
        """Count; exact also with threads."""
        index = self._index[name]
        if self._row_forks != _forks:
            self._claim_row()
        with self._thread_lock:
            self._cells[self._row * self._width + index] += count

    def totals(self) -> dict[str, int]:
        """Sums over all processes, ended ones included."""
        with self._locked():
            cells = self._cells.tolist()
        rows = [cells[start : start + self._width] for start in range(self._width, len(cells), self._width)]
        return {name: sum(row[index] for row in rows) for name, index in self._index.items()}

    # --- live settings

    def settings(self) -> dict[str, Any]:
        """The settings as the last process set them; costs one memory read while nothing changed."""
        if self._cells[_VERSION] != self._seen_version:
            self._seen_version = self._cells[_VERSION]
            with contextlib.suppress(OSError), open(os.path.join(self._path, "settings.json")) as file:
                self._settings = json.load(file)
        return self._settings

    def publish(self, **changes: Any) -> None:
        """Change settings for every process."""
        with self._locked():
            self._settings = {**self.settings(), **changes}
            self._write_settings()

    # --- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.names, copy.deepcopy(self.settings(), memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "path": self._path, "origin": self._origin, "settings": self.settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["origin"] == os.getpid() or not os.path.exists(os.path.join(state["path"], "counters")):
            self.__init__(state["names"], state["settings"])  # type: ignore[misc]
            return
        self.names = state["names"]
        self._width = len(self.names) + 1
        self._path, self._origin, self._settings = state["path"], state["origin"], state["settings"]
        self._open()

    # --- inside

    def _open(self) -> None:
        self._index = {name: index for index, name in enumerate(self.names, start=1)}
        with open(os.path.join(self._path, "counters"), "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("q")
        self._row = self._row_forks = -1
        self._seen_version = -1
        self._thread_lock = threading.Lock()

    def _write_settings(self) -> None:
        part = os.path.join(self._path, f"settings.{os.getpid()}.part")
        with contextlib.suppress(FileNotFoundError):  # the origin has ended: nobody is left to be told
            Path(part).write_text(json.dumps(self._settings))
            os.replace(part, os.path.join(self._path, "settings.json"))
        self._cells[_VERSION] += 1
        self._seen_version = self._cells[_VERSION]

    def _claim_row(self) -> None:
        """Find a row for this process: a free one, or one of a process that has ended."""
        self._thread_lock = threading.Lock()  # after a fork, the inherited one may be held by a thread that is not there
        pid = os.getpid()
        with self._locked():
            owners = self._cells[:: self._width].tolist()
            free = [row for row in range(_RETIRED + 1, _ROWS) if owners[row] in (0, pid) or not _is_alive(owners[row])]
            # With more processes than rows, two share one and may lose a count to each other.
            self._row = next(iter(free), _RETIRED + 1 + pid % (_ROWS - _RETIRED - 1))
            self._fold(self._row)
            self._cells[self._row * self._width] = pid
        self._row_forks = _forks

    def _fold(self, row: int) -> None:
        """Move a row's counts to the row of the ended processes."""
        for index in self._index.values():
            self._cells[_RETIRED * self._width + index] += self._cells[row * self._width + index]
            self._cells[row * self._width + index] = 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = try_lock(os.path.join(self._path, "lock"), wait=True)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)


def try_lock(path: str | os.PathLike[str], *, wait: bool = False) -> int | None:
    """Lock a file; the lock lasts until the returned descriptor, and every inherited copy of it, is closed.

    Returns None when another process holds the lock (and ``wait`` is False), or when the folder is gone.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked worker that drops its copy
        shutil.rmtree(path, ignore_errors=True)
