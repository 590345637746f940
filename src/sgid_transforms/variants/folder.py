"""The folder of a variant store: files are written atomically, and damaged ones are set aside.

This module does not know what the files contain. Only the root may be a symbolic link: below it, nothing is listed, written,
moved or removed through a link.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from sgid_transforms.errors import StoreError
from sgid_transforms.files import is_alive
from sgid_transforms.variants import layout
from sgid_transforms.variants.layout import DamagedFileError, FileName

logger = logging.getLogger("sgid_transforms.variants")

_MARKER = "sgid-variants.json"
_READ_ATTEMPTS = 3
_WRITE_ATTEMPTS = 5
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
_TEMPORARY = re.compile(r"(?P<host>[A-Za-z0-9.-]{1,64})_(?P<pid>[0-9]+)_[0-9]+_[0-9]+\.tmp")
_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit is too low",
    errno.EROFS: "the folder is on read-only media",
    errno.EACCES: "check the folder's permissions",
    errno.EPERM: "check the folder's permissions",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.ELOOP: "put a folder in its place",
}

_serial = itertools.count()
_T = TypeVar("_T")
_FileId = tuple[int, int]  # device and inode: tells a file from a later one with the same name


class StoreFolder:
    """Files by name below one root, written atomically, for any number of processes.

    Args:
        root: The folder; created with the first file.
        readonly: Never write.
        fsync: Force each file to the disk before it gets its name.
    """

    def __init__(self, root: str | os.PathLike[str], *, readonly: bool, fsync: bool) -> None:
        text = os.fspath(root)
        if not isinstance(text, str) or not text or "\0" in text:
            raise StoreError(f"store folder {text!r} is empty, of bytes, or holds a NUL character; choose another name")
        self.root = Path(text).expanduser()
        self.readonly = readonly
        self.fsync = fsync
        self.damaged_seen = 0
        self._prefix = f"{os.fspath(self.root)}/"
        self._logged: set[str] = set()
        self._version: int | None = None
        self._prepared_by: int | None = None

    def path(self, name: str) -> str:
        """The path of a name like ``<fingerprint>/<k0k1>/<key>-<variant>.png``."""
        return self._prefix + name

    def load(self, path: str, max_size: int, parse: Callable[[bytes], _T]) -> _T | None:
        """Read and parse one file; ``None`` when it is missing, unreadable or damaged.

        If ``parse`` raises ``DamagedFileError``, the file is damaged and is set aside.
        """
        for _ in range(_READ_ATTEMPTS):
            file_id = None
            try:
                data, file_id = read(path, max_size)
                return parse(data)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except DamagedFileError as error:
                reason = str(error)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    self._log_once(f"{path} cannot be read ({error.strerror}); it counts as missing", error.strerror or "")
                    return None
                reason = "it is a broken link"
            if self.set_aside(path, reason, file_id) != "replaced":
                return None
        return None  # another damaged file took its place each time

    def set_aside(self, path: str, reason: str, judged: _FileId | None = None) -> Literal["moved", "stays", "replaced"]:
        """Move a damaged or foreign file to the quarantine, count it, and log the first one of each cause.

        Returns:
            "moved"; "stays" when the file could not or must not be moved; "replaced", without counting, when another file has
            taken its name since it was read, and is worth reading.
        """
        outcome: Literal["moved", "stays"] = "stays"
        if not self.readonly:
            try:
                if not self._move_aside(path, judged):
                    return "replaced"
                outcome = "moved"
            except OSError as error:
                reason = f"{reason}; it could not be moved ({error.strerror})"
        self.note_damage(path, reason, "stays where it is" if outcome == "stays" else f"goes to {layout.QUARANTINE}/")
        return outcome

    def note_damage(self, path: str, reason: str, what: str) -> None:
        """Count something damaged, and log the first one of each cause."""
        self.damaged_seen += 1  # without a lock, which a fork could copy in its locked state
        self._log_once(f"{path} is not a usable variant: {reason}. It {what} and counts as missing", reason)

    def publish(self, data: bytes, name: str) -> bool:
        """Write ``data`` to a temporary file, then give it its name in one step; the first writer wins.

        Returns:
            Whether this call's file got the name.

        Raises:
            StoreError: The file cannot be written; no partial file is left under either name.
        """
        path = self.path(name)
        try:
            for _ in range(_WRITE_ATTEMPTS - 1):
                with contextlib.suppress(FileNotFoundError):
                    return self._publish_once(data, path)
                # The folder was pruned, or another process took this writer for dead and swept its temporary file.
            return self._publish_once(data, path)
        except OSError as error:
            raise self._failed(f"could not write {path}", error) from error

    def remove(self, path: str) -> bool:
        """Remove one file; returns whether it was there."""
        try:
            self._refuse_links(path)
            os.unlink(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failed(f"could not remove {path}", error) from error
        return True

    def remove_empty_folders(self, fingerprint: str) -> None:
        """Remove those of a recipe's folders that are empty."""
        shards = [entry.path for entry in self._scan(fingerprint) if layout.is_shard(entry.name)]
        for folder in (*shards, self.path(fingerprint)):
            with contextlib.suppress(OSError):  # not empty, or not a folder: then it is not ours
                os.rmdir(folder)

    def prepare_to_write(self) -> None:
        """Call this before writing. Once per process, it sweeps orphaned temporary files and marks the folder as a store.

        Raises:
            StoreError: Opened read-only, written by a newer version, or not writable.
        """
        if self.readonly:
            raise StoreError(f"the variant store {self.root} was opened with readonly=True; open it without readonly to write")
        if self._prepared_by == os.getpid():
            return
        self.check_version()
        self.sweep(layout.ORPHAN_AGE)
        if not os.path.lexists(self.path(_MARKER)):
            self.publish(layout.pack_marker(), _MARKER)
        self._prepared_by = os.getpid()

    def check_version(self) -> int:
        """The store's format. A newer format is refused, since its files would look damaged.

        Raises:
            StoreError: The store's format is newer than this package's.
        """
        if self._version is None:
            try:
                version = layout.unpack_marker(read(self.path(_MARKER), 4096)[0])
            except DamagedFileError:
                version = 1
            except OSError:
                version = layout.FORMAT_VERSION
            if version > layout.FORMAT_VERSION:
                raise StoreError(
                    f"the variant store {self.root} has format {version}, this version knows up to {layout.FORMAT_VERSION}; "
                    "upgrade sgid-transforms"
                )
            self._version = version
        return self._version

    def sweep(self, max_age: float) -> int:
        """Remove the temporary files of writers that are gone; returns how many.

        A writer is gone if it ran on this host and no process has its id, or if its file is older than ``max_age`` seconds.
        """
        removed = 0
        with contextlib.suppress(OSError):
            for entry in () if self.readonly else self._scan(layout.TEMPORARY):
                with contextlib.suppress(OSError):
                    if _is_orphan(entry, max_age):
                        os.unlink(entry.path)
                        removed += 1
        return removed

    def count_entries(self, name: str) -> int:
        """How many entries a folder has; 0 if it cannot be listed."""
        with contextlib.suppress(OSError):
            return sum(1 for _ in self._scan(name))
        return 0

    def fingerprints(self) -> list[str]:
        """The recipes that have a folder."""
        entries = self._scan("")
        return sorted(e.name for e in entries if layout.is_fingerprint(e.name) and e.is_dir(follow_symlinks=False))

    def walk(self, fingerprint: str | None = None) -> Iterator[tuple[str, FileName | None]]:
        """Path and name of everything below one recipe's folder, or all; the name is ``None`` for foreign entries."""
        for recipe in self.fingerprints() if fingerprint is None else [fingerprint]:
            for shard in self._scan(recipe):
                if not layout.is_shard(shard.name) or not shard.is_dir(follow_symlinks=False):
                    yield shard.path, None
                    continue
                yield from self.walk_shard(recipe, shard.name)

    def walk_shard(self, fingerprint: str, shard: str) -> Iterator[tuple[str, FileName | None]]:
        """As `walk`, for one of the 256 folders of a recipe."""
        if not os.path.islink(self.path(fingerprint)):
            for entry in self._scan(f"{fingerprint}/{shard}"):
                yield entry.path, layout.parse(fingerprint, shard, entry.name)

    def _scan(self, name: str) -> "Iterator[os.DirEntry[str]]":
        """Entries of a folder; none if it is missing, is a link, or is not a folder."""
        folder = self.path(name)  # the root's ends with a slash, so that it may be a link
        if os.path.islink(folder):
            return
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._failed(f"could not list {folder}", error) from error

    def _refuse_links(self, *paths: str) -> None:
        """Raise OSError where a folder between the root and one of ``paths`` is a symbolic link."""
        for path in paths:
            *folders, _ = self._below_root(path)
            for depth in range(1, len(folders) + 1):
                folder = self.path("/".join(folders[:depth]))
                if os.path.islink(folder):
                    raise OSError(errno.ELOOP, f"{folder} is a symbolic link")

    def _below_root(self, path: str) -> list[str]:
        return path[len(self._prefix) :].replace(os.sep, "/").split("/")

    def _move_aside(self, path: str, judged: _FileId | None) -> bool:
        """Move a file to the quarantine, unless another one has taken its name; returns whether this call moved it."""
        target = self.path(f"{layout.QUARANTINE}/{'_'.join(self._below_root(path))[-120:]}.{_temporary_name()[:-4]}")
        self._refuse_links(path, target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.replace(path, target)
        except FileNotFoundError:  # another reader was faster
            return False
        moved = os.lstat(target)
        if judged is None or judged == (moved.st_dev, moved.st_ino) or not stat.S_ISREG(moved.st_mode):
            return True
        _give_name(target, path)
        with contextlib.suppress(OSError):
            os.unlink(target)
        return False

    def _publish_once(self, data: bytes, path: str) -> bool:
        temporary = self.path(f"{layout.TEMPORARY}/{_temporary_name()}")
        self._refuse_links(path, temporary)
        for folder in (os.path.dirname(path), os.path.dirname(temporary)):  # before the file, which might be synced for nothing
            os.makedirs(folder, exist_ok=True)
        try:
            _write(temporary, data, fsync=self.fsync)
            return _give_name(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _log_once(self, message: str, cause: str) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            logger.warning("%s (further ones of this kind are not logged)", message)

    @staticmethod
    def _failed(what: str, error: OSError) -> StoreError:
        failed = StoreError(f"{what}: {error.strerror or error}; {_HINTS.get(error.errno or 0, 'check the folder')}")
        failed.errno = error.errno
        return failed


def read(path: str, max_size: int) -> tuple[bytes, _FileId]:
    """The bytes of a plain file, and the file's identity.

    Raises:
        DamagedFileError: It is a folder, pipe or device (never waited for), or larger than ``max_size`` bytes.
        OSError: It does not exist or cannot be read.
    """
    descriptor = os.open(path, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFileError("it is not a plain file")
        if status.st_size > max_size:
            raise DamagedFileError(f"it has {status.st_size} bytes, more than the {max_size} allowed")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
    finally:
        os.close(descriptor)
    return data, (status.st_dev, status.st_ino)


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
    """Give a file its name, unless that is taken.

    A hard link does both at once. File systems without hard links get a rename instead. A second writer may then replace the
    first one's file, but readers still find one complete file.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    else:
        return True
    if os.path.lexists(final):
        return False
    os.replace(temporary, final)
    return True


def _temporary_name() -> str:
    return f"{_host()}_{os.getpid()}_{threading.get_native_id()}_{next(_serial)}.tmp"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "host"


def _is_orphan(entry: "os.DirEntry[str]", max_age: float) -> bool:
    found = _TEMPORARY.fullmatch(entry.name)
    if found is None:
        return False
    if found["host"] == _host() and not is_alive(int(found["pid"])):
        return True
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > max_age
