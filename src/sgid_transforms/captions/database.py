"""The SQLite file of a caption store, which may be used from any process and thread, across forks, and on read-only media."""

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sgid_transforms.captions.record import COLUMNS, FOREIGN, digest_of, from_row
from sgid_transforms.errors import StoreError

_APPLICATION_ID = 0x53474944  # "SGID"
_VERSION = 5
_SCHEMA = """
CREATE TABLE captions (
    key TEXT PRIMARY KEY NOT NULL, caption TEXT NOT NULL, label TEXT, similarity REAL, rank REAL,
    captioner TEXT NOT NULL, source TEXT NOT NULL, path TEXT, scorer TEXT, prompt TEXT, digest INTEGER,
    context TEXT, contradiction TEXT, words TEXT
) WITHOUT ROWID
"""
_ADDED = {
    2: {"scorer": "TEXT", "prompt": "TEXT"},
    3: {"digest": "INTEGER"},
    4: {"context": "TEXT", "contradiction": "TEXT"},
    5: {"words": "TEXT"},
}
"""Columns by the version of the schema that added them; a later version must add one."""

# Rows with the digest FOREIGN are accepted unchecked: another program wrote them.
_MARK = f"UPDATE captions SET digest = {FOREIGN} WHERE key = NEW.key"
_TRIGGERS = {
    name: f"CREATE TRIGGER {name} AFTER {event} ON captions BEGIN {_MARK}; END"
    for name, event in (("edited", f"UPDATE OF {', '.join(COLUMNS)}"), ("inserted", "INSERT"))
}
_ALL = ", ".join(COLUMNS)
_CHUNK = 500  # well below SQLite's oldest limit of 999 parameters

_BUSY_SECONDS = 30.0
_CACHE_KIB = 16384
_MAGIC = b"SQLite format 3\0"
_SALVAGE_DEPTH = 4  # unreadable rows are given up in groups whose keys share so many leading hexadecimal digits
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs"} | {
    f"fuse.{name}" for name in ("glusterfs", "sshfs", "s3fs", "ceph")
}

_HINTS = (
    ("locked", f"another process has been writing for {_BUSY_SECONDS:.0f} s"),
    ("full", "free some space"),
    ("readonly", "write to a copy of it"),
    ("not a database", "this is not a SQLite file, so choose another path"),
    ("malformed", "it is damaged: save what can be read with `sgid verify --captions FILE --repair`"),
)


# SQLite's locks must not be carried over a fork: a child would find its own file locked forever, or lose its writes when its
# parent closes. So a fork first waits for the running statement, and then closes the files.
_gate = threading.RLock()
_depth = 0  # how often the thread that holds the gate has entered it
_fork = threading.local()  # whether the thread that forks holds the gate
_databases: "weakref.WeakSet[Database]" = weakref.WeakSet()

# Connections that the forking thread itself was using. SQLite forbids using or closing them in the child. Garbage collection
# would close them, so they must live as long as the process.
_inherited: list[sqlite3.Connection] = []


@contextlib.contextmanager
def _in_use() -> Iterator[None]:
    global _depth
    with _gate:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def _before_fork() -> None:
    _fork.alone = _gate.acquire(timeout=_BUSY_SECONDS)
    if _fork.alone and not _depth:
        for database in list(_databases):
            database.close()


def _in_parent() -> None:
    if _fork.alone:
        _gate.release()


def _in_child() -> None:
    global _gate, _depth
    _gate, _depth = threading.RLock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


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
        path: Path of the file.
        readonly: Never write; a missing file is an error.
    """

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._local = threading.local()  # closes the handle of a thread when it ends
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        _databases.add(self)

    def one(self, statement: str, parameters: tuple[object, ...]) -> Any:
        """The first row of a result. Does the same as `reading`, but faster, because every hit of the transform comes here."""
        global _depth
        with _gate:
            _depth += 1
            try:
                return self._handle().connection.execute(statement, parameters).fetchone()
            except sqlite3.Error as error:
                raise self._failed("read", error) from error
            finally:
                _depth -= 1

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, with SQLite's errors turned into ``StoreError``."""
        with _in_use():
            try:
                yield self._handle().connection
            except sqlite3.Error as error:
                raise self._failed("read", error) from error

    @contextlib.contextmanager
    def writing(self, keys: Sequence[str] | None) -> Iterator[sqlite3.Connection]:
        """One transaction: committed at the end, rolled back by any exception.

        Args:
            keys: Keys of the rows that may change; None: any. Damaged rows are first moved to the table ``damaged``, so that
                nothing builds on them. Changed rows get their digests at the end.
        """
        with _in_use():
            try:
                handle = self._handle()
                if not handle.writable:
                    why = "was opened with readonly=True" if self.readonly else "is write-protected or on read-only media"
                    raise StoreError(f"the caption store {self.path} {why}; write to a copy of it")
                with _transaction(handle.connection):
                    _set_aside_damaged(handle.connection, keys)
                    yield handle.connection
                    _seal(handle.connection, keys)
            except sqlite3.Error as error:
                raise self._failed("write", error) from error

    def problem(self) -> str | None:
        """What SQLite or the schema check finds wrong with the file; None: nothing."""
        if not self.path.exists():
            raise StoreError(f"there is no caption store at {self.path}; check the path")
        try:
            with self.reading() as connection:
                found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        except StoreError as error:
            if not isinstance(error.__cause__, sqlite3.DatabaseError) or isinstance(error.__cause__, sqlite3.OperationalError):
                raise
            return str(error.__cause__)
        return None if found == "ok" else found.splitlines()[-1]

    def readable(self) -> dict[str, tuple[Any, ...]]:
        """All readable rows by key, with their digests; unreadable parts of the file are skipped.

        Reads a copy, after repairing its header and schema. The file itself is not changed.
        """
        rows: dict[str, tuple[Any, ...]] = {}

        def read(connection: sqlite3.Connection, condition: str, *parameters: str) -> bool:
            try:
                for row in connection.execute(f"SELECT {_ALL}, digest FROM captions {condition}", parameters):
                    rows.setdefault(str(row[0]), row)
            except sqlite3.DatabaseError:
                return False
            return True

        def read_between(connection: sqlite3.Connection, prefix: str) -> None:
            if not read(connection, "WHERE key >= ? AND key < ?", prefix, f"{prefix}g") and len(prefix) < _SALVAGE_DEPTH:
                for digit in "0123456789abcdef":
                    read_between(connection, prefix + digit)

        self.close()
        with tempfile.TemporaryDirectory() as folder, _in_use():
            copy = Path(folder, "copy")
            for end in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{self.path}{end}", f"{copy}{end}")
            with open(copy, "r+b") as file:
                file.write(_MAGIC)
            with contextlib.suppress(sqlite3.DatabaseError):
                _repair_schema(copy)
            connection = sqlite3.connect(copy, isolation_level=None)
            connection.text_factory = _decoded
            try:
                connection.execute("PRAGMA writable_schema=ON")  # tolerates a damaged schema and a truncated file
                if not read(connection, "ORDER BY key") and not read(connection, "ORDER BY key DESC"):
                    for digit in "0123456789abcdef":
                        read_between(connection, digit)
            except sqlite3.DatabaseError as error:
                raise self._failed("read", error) from error
            finally:
                connection.close()
        return rows

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        with _gate:
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
            if not self.path.exists():
                raise StoreError(f"there is no caption store at {self.path}; check the path, or open it without readonly=True")
            # A write-ahead log needs shared memory beside the file. Where none can be created, nobody can be writing either.
            try:
                return self._connect("mode=ro", writable=False)
            except sqlite3.OperationalError:
                if not _can_be_immutable(self.path):
                    raise
            return self._connect("mode=ro&immutable=1", writable=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder of the caption store {self.path} cannot be created: {error.strerror}") from error
        return self._connect("mode=rwc", writable=True)

    def _connect(self, mode: str, *, writable: bool) -> _Handle:
        location = f"file:{quote(os.fsencode(self.path.absolute()))}?{mode}"
        # Threads do not share connections. The check would only stop close() from closing those of other threads.
        connection = sqlite3.connect(
            location, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        connection.text_factory = _decoded
        try:
            version = self._version(connection)
            if writable:
                connection.execute("PRAGMA synchronous=FULL")  # a completed write also survives a power cut
                if version < _VERSION:
                    self._create_or_upgrade(connection)
            elif version == 0:
                raise StoreError(f"the caption store {self.path} is empty; open it without readonly=True to fill it")
            elif version < _VERSION:
                lacking = ", ".join(f"{FOREIGN if name == 'digest' else 'NULL'} AS {name}" for name in _added_since(version))
                connection.execute(f"CREATE TEMP VIEW captions AS SELECT *, {lacking} FROM main.captions")
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        except BaseException:
            connection.close()
            raise
        return _Handle(connection, writable=writable)

    def _version(self, connection: sqlite3.Connection) -> int:
        """The version of the file's schema, 0 for an empty file; ``StoreError`` if it is not a caption store.

        The columns decide. The header's numbers are for other programs: one flipped bit there must not close the whole store.
        """
        columns = {row[1] for row in connection.execute("PRAGMA main.table_info(captions)")}
        if not columns and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        lacking = next((version for version, names in sorted(_ADDED.items()) if not set(names) <= columns), _VERSION + 1)
        if not set(COLUMNS[:8]) <= columns:
            raise StoreError(f"{self.path} is a SQLite file, but not a caption store; choose another path")
        if columns > {*COLUMNS, "digest"}:
            raise StoreError(f"the caption store {self.path} was written by a later version; upgrade sgid-transforms")
        return lacking - 1

    def _create_or_upgrade(self, connection: sqlite3.Connection) -> None:
        if not self._version(connection) and not _is_on_network(self.path):  # no logs there: https://sqlite.org/wal.html
            with contextlib.suppress(sqlite3.OperationalError):  # another process is doing the same
                connection.execute("PRAGMA journal_mode=WAL")
        with _transaction(connection):
            version = self._version(connection)  # checked again, now that nobody else can change it
            if version < _VERSION:
                alter = [f"ALTER TABLE captions ADD COLUMN {name} {kind}" for name, kind in _added_since(version).items()]
                for statement in alter if version else (_SCHEMA, f"PRAGMA application_id={_APPLICATION_ID}"):
                    connection.execute(statement)
                for name, trigger in _TRIGGERS.items():
                    connection.execute(f"DROP TRIGGER IF EXISTS {name}")
                    connection.execute(trigger)
                if version < 3:
                    connection.execute(f"UPDATE captions SET digest = {FOREIGN}")
                    _seal(connection, None)
                    connection.execute("CREATE TABLE damaged AS SELECT * FROM captions WHERE FALSE")
                else:  # digests of version 3 stay valid
                    for name, kind in _added_since(version).items():
                        connection.execute(f"ALTER TABLE damaged ADD COLUMN {name} {kind}")
                connection.execute(f"PRAGMA user_version={_VERSION}")

    def _failed(self, verb: str, error: sqlite3.Error) -> StoreError:
        text = str(error)
        hint = next((hint for part, hint in _HINTS if part in text), "check the file and its folder")
        return StoreError(f"could not {verb} the caption store {self.path}: {text}; {hint}")


def _added_since(version: int) -> dict[str, str]:
    return {name: kind for added, columns in _ADDED.items() if added > version for name, kind in columns.items()}


def _repair_schema(path: Path) -> None:
    """Rewrite the table's definition if it is damaged; the table starts at the second page."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA writable_schema=ON")
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE rootpage = 2").fetchone() or (None,)
        if sql != _SCHEMA.strip() and "scorer" not in {row[1] for row in connection.execute("PRAGMA table_info(captions)")}:
            definition = ("table", "captions", "captions", _SCHEMA.strip())
            connection.execute(
                "UPDATE sqlite_master SET type = ?, name = ?, tbl_name = ?, sql = ? WHERE rootpage = 2", definition
            )
    finally:
        connection.close()


def in_chunks(keys: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Conditions that select the rows of ``keys``, with their parameters."""
    for start in range(0, len(keys), _CHUNK):
        chunk = keys[start : start + _CHUNK]
        yield f"key IN ({','.join('?' * len(chunk))})", chunk


def _set_aside_damaged(connection: sqlite3.Connection, keys: Sequence[str] | None) -> None:
    same = "FROM captions WHERE CAST(key AS BLOB) = ?"  # a damaged key may not be text any more
    for where, parameters in [("TRUE", ())] if keys is None else in_chunks(keys):
        rows = connection.execute(f"SELECT CAST(key AS BLOB), {_ALL}, digest FROM captions WHERE {where}", parameters)
        damaged = [row[:1] for row in rows if from_row(row[1:]) is None]
        connection.executemany(f"INSERT INTO damaged SELECT * {same}", damaged)
        connection.executemany(f"DELETE {same}", damaged)


def _seal(connection: sqlite3.Connection, keys: Sequence[str] | None) -> None:
    for where, parameters in [(f"digest = {FOREIGN}", ())] if keys is None else in_chunks(keys):
        rows = connection.execute(f"SELECT {_ALL} FROM captions WHERE {where}", parameters).fetchall()
        connection.executemany("UPDATE captions SET digest = ? WHERE key = ?", [(digest_of(row), row[0]) for row in rows])


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # after some errors, SQLite has already rolled back
            connection.execute("ROLLBACK")
        raise


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")  # a damaged character must not make other records unreadable


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _can_be_immutable(path: Path) -> bool:
    """Whether the file alone holds everything, and nobody can change it."""
    if os.access(path.parent, os.W_OK):
        return False
    try:
        log_size = os.path.getsize(f"{path}-wal")
    except OSError:
        log_size = 0
    if log_size:
        raise StoreError(f"{path} has changes in its -wal file that cannot be read here; open it once where it can be written")
    return True


def _is_on_network(path: Path) -> bool:
    """Whether Linux says that the file is on a network file system; always False on other systems."""
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
