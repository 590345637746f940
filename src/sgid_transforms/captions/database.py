"""A SQLite file that may be used from any process and thread, across forks, and on read-only media."""

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from sgid_transforms.errors import StoreError

_BUSY_SECONDS = 30.0
_CACHE_KIB = 16384
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs"} | {
    f"fuse.{name}" for name in ("glusterfs", "sshfs", "s3fs", "ceph")
}

# Connections that a fork brought into this process. SQLite forbids to use or close them here, and they close when they are
# collected, so they must live as long as the process.
_inherited: list[sqlite3.Connection] = []


class _Handle:
    """A connection that closes itself, but only in the process that opened it."""

    def __init__(self, connection: sqlite3.Connection, *, writable: bool) -> None:
        self.connection = connection
        self.writable = writable
        self.pid = os.getpid()

    # The defaults keep what is needed alive while the interpreter shuts down.
    def close(self, getpid: Callable[[], int] = os.getpid, inherited: list[sqlite3.Connection] = _inherited) -> None:
        if self.pid == getpid():
            self.connection.close()
        else:
            inherited.append(self.connection)

    def __del__(self) -> None:
        self.close()


class Database:
    """Connections to one file: opened at first use, one for each process and thread.

    Args:
        path: of the file.
        readonly: never write; a missing file is an error.
        application_id: tells a file of ours from any other SQLite file.
        version: of the schema, kept in ``user_version``.
        schema: statement that creates the table.
        what: the thing's name in messages, such as "caption store".
        upgrades: statements that bring a file of the version before to this one.
        old: statement that makes such a file look like one of this version where it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        readonly: bool,
        application_id: int,
        version: int,
        schema: str,
        what: str,
        upgrades: Sequence[str],
        old: str,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self._application_id = application_id
        self._version = version
        self._schema = schema
        self._what = what
        self._upgrades, self._old = tuple(upgrades), old
        self._local = threading.local()  # drops, and thereby closes, the handle of a thread that ends
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, with SQLite's errors turned into ``StoreError``."""
        try:
            yield self._handle().connection
        except sqlite3.Error as error:
            raise self._failed("read", error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed at the end, rolled back by any exception."""
        try:
            handle = self._handle()
            if not handle.writable:
                why = "was opened with readonly=True" if self.readonly else "is write-protected or on read-only media"
                raise StoreError(f"the {self._what} {self.path} {why}; write to a copy of it")
            handle.connection.execute("BEGIN IMMEDIATE")
            try:
                yield handle.connection
                handle.connection.execute("COMMIT")
            except BaseException:
                if handle.connection.in_transaction:  # after some errors SQLite has rolled back already
                    handle.connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._failed("write", error) from error

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones. No other thread may be at work with them."""
        for handle in list(self._handles):
            handle.close()
        self._handles.clear()
        self._local = threading.local()

    def _handle(self) -> _Handle:
        handle: _Handle | None = getattr(self._local, "handle", None)
        if handle is None or handle.pid != os.getpid():
            handle = self._open()
            self._local.handle = handle
            self._handles.add(handle)
        return handle

    def _open(self) -> _Handle:
        if self.readonly or (self.path.exists() and not _is_writable(self.path)):
            return _Handle(self._open_readonly(), writable=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder of the {self._what} {self.path} cannot be made: {error.strerror}") from error
        connection = self._connect("mode=rwc")
        try:
            connection.execute("PRAGMA synchronous=FULL")  # a completed write outlives a power cut, too
            if not self._is_ours(connection):
                self._create(connection)
            self._upgrade(connection)
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        except BaseException:
            connection.close()
            raise
        return _Handle(connection, writable=True)

    def _open_readonly(self) -> sqlite3.Connection:
        if not self.path.exists():
            raise StoreError(f"there is no {self._what} at {self.path}; check the path, or open it without readonly=True")
        # A write-ahead log needs shared memory beside the file. Where none can be made, nobody can be writing either.
        try:
            return self._open_ours("mode=ro")
        except sqlite3.OperationalError:
            if not _can_be_immutable(self.path):
                raise
        return self._open_ours("mode=ro&immutable=1")

    def _open_ours(self, mode: str) -> sqlite3.Connection:
        connection = self._connect(mode)
        try:
            if self._is_ours(connection):
                if connection.execute("PRAGMA user_version").fetchone()[0] < self._version:
                    connection.execute(self._old)
                connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
                return connection
            raise StoreError(f"the {self._what} {self.path} is empty; open it without readonly=True to fill it")
        except BaseException:
            connection.close()
            raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        location = f"file:{quote(os.fsencode(self.path.absolute()))}?{mode}"
        # Threads do not share connections; the check would only keep close() from closing those of other threads.
        connection = sqlite3.connect(
            location, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        connection.text_factory = _decoded
        return connection

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether the file holds our table; ``False`` for an empty file, ``StoreError`` for anything else."""
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application_id == self._application_id:
            if version > self._version:
                raise StoreError(
                    f"the {self._what} {self.path} has schema version {version}, this version knows up to {self._version}; "
                    "upgrade sgid-transforms"
                )
            return True
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] or version:
            raise StoreError(f"{self.path} is a SQLite file, but no {self._what}; choose another path")
        return False

    def _create(self, connection: sqlite3.Connection) -> None:
        if not _is_on_network(self.path):  # where write-ahead logs do not work: https://sqlite.org/wal.html
            with contextlib.suppress(sqlite3.OperationalError):  # another process is just doing the same
                connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._is_ours(connection):  # asked again, now that nobody else can be creating it
                connection.execute(self._schema)
                connection.execute(f"PRAGMA application_id={self._application_id}")
                connection.execute(f"PRAGMA user_version={self._version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA user_version").fetchone()[0] >= self._version:
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] < self._version:  # nobody else can be doing it now
                for statement in self._upgrades:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={self._version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _failed(self, verb: str, error: sqlite3.Error) -> StoreError:
        text = str(error)
        hint = next((hint for part, hint in _HINTS if part in text), "check the file and its folder")
        return StoreError(f"could not {verb} the {self._what} {self.path}: {text}; {hint}")


_HINTS = (
    ("locked", f"another process has been writing for {_BUSY_SECONDS:.0f} s"),
    ("full", "free some space"),
    ("readonly", "write to a copy of it"),
    ("not a database", "it is no SQLite file: choose another path"),
    ("malformed", "it is damaged: restore it, or recover it with the sqlite3 tool's .recover"),
)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")  # a damaged letter must not make a record unreadable


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _can_be_immutable(path: Path) -> bool:
    """Whether the file alone holds everything, and nobody can be changing it."""
    if os.access(path.parent, os.W_OK):
        return False
    try:
        log_size = os.path.getsize(f"{path}-wal")
    except OSError:
        log_size = 0
    if log_size:
        raise StoreError(f"{path} has changes in its -wal file that read-only media hide; open it once where it can be written")
    return True


def _is_on_network(path: Path) -> bool:
    """Whether Linux says that the file lies on a network file system; elsewhere the answer is no."""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return False
    best, kind = "", ""
    absolute = os.path.realpath(path)
    for line in mounts:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if len(point) >= len(best) and (absolute == point or absolute.startswith(point.rstrip("/") + "/")):
            best, kind = point, name
    return kind in _NETWORK
