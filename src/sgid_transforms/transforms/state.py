"""State that every copy of one transform shares, in all processes of this machine: counters and live settings.

A small memory-mapped file holds the settings, their version number, and one row of counters per process. Counting therefore
needs no message and no lock between processes, and reading settings costs one memory access. It works with and without a
service.
"""

import contextlib
import copy
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from sgid_transforms.errors import ServiceError
from sgid_transforms.files import Waiting, is_alive

try:
    import fcntl
except ImportError:  # pragma: no cover (not a POSIX system: one process at a time)
    fcntl = None  # type: ignore[assignment]

_FOLDERS = "sgid-state-"
_SETTINGS = 1 << 16  # bytes for the settings; the first 16 hold their version and their length
_ROWS = 1024  # processes alive at a time; rows of ended ones are added to row 0 and reused
_PATIENCE = 60.0  # seconds to wait for a lock that is held for microseconds
_PAUSE = 0.001  # seconds until the next try
_forks = 0  # between this process and the one that imported the module: cheaper to read than the process id
_lock = threading.Lock()


@dataclass(frozen=True)
class Stats:
    """Counts since the transform was made; ``after - before`` gives those of an epoch.

    Args:
        seen: images that passed through.
        gated: those that the gate chose for replacement.
        hits: gated ones whose variant was in the store.
        misses: gated ones whose variant was not.
        generated: variants that were made and stored.
        filtered: variants that the filters rejected for good; their images stay unchanged.
        failed: variants that could not be made because of an error.
        unavailable: gated images whose variant is known to have been filtered earlier, or whose variants people rejected.
        missing: gated images without a caption or label, left unchanged (``missing="original"``).
        queued: variants requested without waiting (``on_miss="queue"``).
        dropped: variants not requested because the queue was full.
        fallbacks: images left unchanged because the service or the model failed (``on_error="original"``).
        waits: calls that waited for the model.
        waited_us: microseconds that they waited in total.
    """

    seen: int = 0
    gated: int = 0
    hits: int = 0
    misses: int = 0
    generated: int = 0
    filtered: int = 0
    failed: int = 0
    unavailable: int = 0
    missing: int = 0
    queued: int = 0
    dropped: int = 0
    fallbacks: int = 0
    waits: int = 0
    waited_us: int = 0

    @property
    def mean_wait(self) -> float:
        """Average seconds of a call that had to wait."""
        return self.waited_us / self.waits / 1e6 if self.waits else 0.0

    def summary(self) -> str:
        """One line; the rarer counts are shown only if they are not 0."""
        shown = ["seen", "gated", "hits", "misses", "generated", "filtered", "failed"]
        rare = ["unavailable", "missing", "queued", "dropped", "fallbacks"]
        parts = [f"{getattr(self, name)} {name}" for name in [*shown, *(name for name in rare if getattr(self, name))]]
        return f"SGID: {', '.join(parts)}, mean wait {1000 * self.mean_wait:.1f} ms"

    def __sub__(self, other: Self) -> "Stats":
        return Stats(**{field.name: getattr(self, field.name) - getattr(other, field.name) for field in fields(self)})


STAT_NAMES = tuple(field.name for field in fields(Stats))


def _after_fork() -> None:
    global _forks, _lock
    _forks += 1
    _lock = threading.Lock()  # the inherited one may be held by a thread that does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class SharedState:
    """Counters and settings shared by all copies of an object, across fork, spawn and pickle.

    A copy made within the process (``copy.deepcopy``, a pickle round trip) is independent: it starts from the same settings
    with its own counters, but still sees the services of its origin. A copy that reaches another process shares both with its
    origin.

    Args:
        names: Names of the counters.
        settings: Live settings that JSON can represent.
        origin: The state that this one was copied from.
    """

    _seen_version: int
    _seen_above: dict[str, Any] | None

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any], origin: "SharedState | None" = None) -> None:
        self.names = tuple(names)
        self._origin = os.getpid()
        self._parent = origin
        try:
            _sweep()
            self._path = tempfile.mkdtemp(prefix=f"{_FOLDERS}{os.getpid()}-")
            weakref.finalize(self, _remove, self._path, self._origin)
            with open(os.path.join(self._path, "state"), "wb") as file:  # written, not left sparse: a full disk fails now
                file.write(bytes(_SETTINGS + 8 * (len(self.names) + 1) * _ROWS))
            self._settings: dict[str, Any] = {}
            self._open()
        except OSError as error:
            reason = error.strerror or error
            raise ServiceError(f"the temporary folder has no room for what processes share ({reason}); set TMPDIR") from error
        self.publish(**settings)

    # --- counters

    def add(self, **counts: int) -> None:
        """Add to one or more counters; exact even with threads."""
        if self._row_forks != _forks:
            self._claim_row()
        start, index, cells = self._row * self._width, self._index, self._cells
        with _lock:
            for name, count in counts.items():
                cells[start + index[name]] += count

    def totals(self) -> dict[str, int]:
        """Sums over all processes, ended ones included."""
        with self._locked():
            cells = self._cells.tolist()
        rows = [cells[start : start + self._width] for start in range(0, len(cells), self._width)]
        return {name: sum(row[index] for row in rows) for name, index in self._index.items()}

    # --- live settings

    def settings(self) -> dict[str, Any]:
        """The current settings; costs one memory access while nothing has changed.

        ``address`` is that of the last registered service that is still there, here or at the origin.
        """
        version = self._version[0]
        above = None if self._parent is None else self._parent.settings()
        if version != self._seen_version or above is not self._seen_above:
            with self._locked():
                version, length = self._version[0], self._version[1]
                found = json.loads(self._map[16 : 16 + length])
            inherited = above.get("address") if above is not None else None
            found["address"] = next(iter(reversed(found.get("services", ()))), inherited)
            self._settings, self._seen_version, self._seen_above = found, version, above
        return self._settings

    def publish(self, **changes: Any) -> None:
        """Change settings for every process.

        Raises:
            ServiceError: The settings are too long to be shared.
        """
        self._change(lambda settings: settings | changes)

    def register(self, address: str) -> None:
        """Make a service known to every process."""
        self._change(lambda settings: settings | {"services": [*settings.get("services", ()), address]})

    def unregister(self, address: str) -> None:
        """Forget this service only."""
        self._change(lambda settings: settings | {"services": [one for one in settings.get("services", ()) if one != address]})

    # --- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.names, _own(copy.deepcopy(self.settings(), memo)), self)

    def __getstate__(self) -> dict[str, Any]:
        settings = _own(self.settings())
        return {"names": self.names, "path": self._path, "origin": self._origin, "settings": settings, "parent": self._parent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["origin"] == os.getpid() or not os.path.exists(os.path.join(state["path"], "state")):
            living = _living.get(state["path"])
            self.__init__(state["names"], state["settings"], living or state["parent"])  # type: ignore[misc]
            return
        self.names = state["names"]
        self._path, self._origin, self._parent, self._settings = state["path"], state["origin"], state["parent"], {}
        self._open()

    # --- inside

    def _open(self) -> None:
        self._width = len(self.names) + 1  # the first number of a row is the process id
        self._index = {name: index for index, name in enumerate(self.names, start=1)}
        self._file = os.open(os.path.join(self._path, "state"), os.O_RDWR)  # kept open, since its path may be removed
        weakref.finalize(self, os.close, self._file).atexit = False  # at exit, daemon threads may still count
        self._map = mmap.mmap(self._file, 0)
        whole = memoryview(self._map)
        self._version = whole[:16].cast("q")
        self._cells = whole[_SETTINGS:].cast("q")
        self._row = self._row_forks = -1
        self._seen_version, self._seen_above = -1, None
        _living[self._path] = self

    def _change(self, change: Any) -> None:
        with self._locked():
            length = self._version[1]
            settings = json.loads(self._map[16 : 16 + length]) if length else {}
            text = json.dumps(change(settings)).encode()
            if len(text) > _SETTINGS - 16:
                raise ServiceError(f"the settings of the transform take {len(text)} bytes; only {_SETTINGS - 16} can be shared")
            self._map[16 : 16 + len(text)] = text
            self._version[1] = len(text)
            self._version[0] += 1

    def _claim_row(self) -> None:
        """Find a row for this process: a free one, or one of a process that has ended."""
        pid = os.getpid()
        with self._locked():
            owners = self._cells[:: self._width].tolist()
            free = (row for row in range(1, _ROWS) if owners[row] in (0, pid) or not is_alive(owners[row]))
            # With more processes than rows, two processes share one and may lose a count.
            self._row = next(free, 1 + pid % (_ROWS - 1))
            for index in self._index.values():  # the counts of an ended process go to row 0
                self._cells[index] += self._cells[self._row * self._width + index]
                self._cells[self._row * self._width + index] = 0
            self._cells[self._row * self._width] = pid
        self._row_forks = _forks

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock that excludes all other processes and threads. A child that is forked meanwhile does not inherit it."""
        waiting = Waiting("another process that holds the transform's settings, and was perhaps stopped,", _PATIENCE)
        while not self._try_lock():
            try:
                time.sleep(min(_PAUSE, waiting.check()))
            except TimeoutError as error:
                raise ServiceError(f"{error}; look for a process that is stopped") from None
        try:
            yield
        finally:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
            _lock.release()

    def _try_lock(self) -> bool:
        if not _lock.acquire(timeout=_PAUSE):
            return False
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # belongs to the process alone: not to its children
        except BlockingIOError:
            _lock.release()
            return False
        except BaseException:
            _lock.release()
            raise
        return True


_living: "weakref.WeakValueDictionary[str, SharedState]" = weakref.WeakValueDictionary()


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a copy takes along; services stay with those that started them."""
    return {name: value for name, value in settings.items() if name not in ("services", "address")}


def _sweep() -> None:
    """Remove the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}[0-9]*-*"):
        owner = folder.name.removeprefix(_FOLDERS).partition("-")[0]
        with contextlib.suppress(OSError, AttributeError):
            if owner.isdecimal() and not is_alive(int(owner)) and folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked worker that drops its copy
        shutil.rmtree(path, ignore_errors=True)
