"""The folder of a variant store: names, whole files, damaged files set aside. Knows nothing of what the files contain."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import files, layout
from sgid_transforms.variants.codec import UndecodableImageError
from sgid_transforms.variants.layout import DamagedFileError

logger = logging.getLogger("sgid_transforms.variants")

MARKER = "sgid-variants.json"
_DAMAGE = (DamagedFileError, UndecodableImageError)
_READ_ATTEMPTS = 3
_T = TypeVar("_T")


class Entry(NamedTuple):
    """Something below a recipe's folder; ``name`` is ``None`` for what no store writes."""

    fingerprint: str
    path: str
    name: layout.FileName | None


class StoreFolder:
    """Whole files by name below one root, for any number of processes.

    Args:
        root: folder; created with the first file.
        readonly: never write.
        fsync: force each file to the disk before it gets its name.
    """

    def __init__(self, root: str | os.PathLike[str], *, readonly: bool, fsync: bool) -> None:
        text = os.fspath(root)
        if not isinstance(text, str) or not text or "\0" in text:
            raise StoreError(f"store folder {text!r} is empty, of bytes, or holds a NUL character; choose another name")
        self.root = Path(text)
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

        ``parse`` says that a file is damaged by raising ``DamagedFileError`` or ``UndecodableImageError``; such a file is
        set aside.
        """
        for _ in range(_READ_ATTEMPTS):
            try:
                data, file_id = files.read(path, max_size)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except files.NotAPlainFileError as error:
                self.set_aside(path, str(error))
                return None
            except OSError as error:
                if error.errno == errno.ELOOP:
                    self.set_aside(path, "it is a link that leads nowhere")
                else:
                    self._log_once(f"{path} cannot be read ({error.strerror}); it counts as missing", error.strerror or "")
                return None
            try:
                return parse(data)
            except _DAMAGE as error:
                if self.set_aside(path, str(error), file_id):
                    return None
        return None  # taken over by another damaged file each time

    def set_aside(self, path: str, reason: str, judged: files.FileId | None = None) -> bool:
        """Move a damaged or foreign file to the quarantine, count it, and log the first one of each cause.

        Returns:
            ``False`` when the name has been taken over by another file meanwhile, which is worth reading.
        """
        if not self.readonly:
            try:
                relative = os.path.relpath(path, self.root).replace(os.sep, "_")
                if not files.move_aside(path, self.path(layout.QUARANTINE), relative[-120:], judged):
                    return False
            except OSError as error:
                reason = f"{reason}; it could not be moved ({error.strerror})"
        self.damaged_seen += 1  # without a lock, which a fork could copy in its locked state
        what = "stays where it is" if self.readonly else f"goes to {layout.QUARANTINE}/"
        self._log_once(f"{path} is not a usable variant: {reason}. It {what} and counts as missing", reason)
        return True

    def publish(self, data: bytes, name: str) -> bool:
        """Give a whole file its name; ``False`` when the name is taken.

        Raises:
            StoreError: it cannot be written.
        """
        path = self.path(name)
        try:
            return files.publish(data, path, self.path(layout.TEMPORARY), fsync=self.fsync)
        except OSError as error:
            raise self._failed(f"could not write {path}", error) from error

    def remove(self, path: str) -> None:
        """Remove one file, if it is still there."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(f"could not remove {path}", error) from error

    def prepare_to_write(self) -> None:
        """To be called before writing: once per process it sweeps orphans and marks the folder as a store.

        Raises:
            StoreError: opened read-only, written by a newer version, or not writable.
        """
        if self.readonly:
            raise StoreError(f"the variant store {self.root} was opened with readonly=True; open it without to write")
        if self._prepared_by == os.getpid():
            return
        self.check_version()
        self.sweep(layout.ORPHAN_AGE)
        if not os.path.lexists(self.path(MARKER)):
            self.publish(layout.pack_marker(), MARKER)
        self._prepared_by = os.getpid()

    def check_version(self) -> int:
        """The store's format. One of a newer version is refused, since its files would look damaged.

        Raises:
            StoreError: the store's format is newer than this package's.
        """
        if self._version is None:
            version = layout.FORMAT_VERSION
            with contextlib.suppress(OSError):
                try:
                    version = layout.unpack_marker(files.read(self.path(MARKER), 4096)[0])
                except files.NotAPlainFileError:
                    version = 1
            if version > layout.FORMAT_VERSION:
                raise StoreError(
                    f"the variant store {self.root} has format {version}, this version knows up to {layout.FORMAT_VERSION}; "
                    "upgrade sgid-transforms"
                )
            self._version = version
        return self._version

    def sweep(self, max_age: float) -> int:
        """Remove what killed writers left behind; returns how many files."""
        return 0 if self.readonly else files.sweep(self.path(layout.TEMPORARY), max_age)

    def fingerprints(self) -> list[str]:
        """The recipes that have a folder."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if layout.is_fingerprint(e.name) and e.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed(f"could not list {self.root}", error) from error

    def walk(self, fingerprint: str | None = None) -> Iterator[Entry]:
        """Everything below one recipe's folder, or below all of them."""
        for recipe in self.fingerprints() if fingerprint is None else [fingerprint]:
            for shard in _scan(self.path(recipe)):
                if not layout.is_shard(shard.name) or not shard.is_dir(follow_symlinks=False):
                    yield Entry(recipe, shard.path, None)
                    continue
                for entry in _scan(shard.path):
                    yield Entry(recipe, entry.path, layout.parse(shard.name, entry.name))

    def _log_once(self, message: str, cause: str) -> None:
        if cause in self._logged:
            return
        self._logged.add(cause)
        logger.warning("%s (further ones of this kind are not logged)", message)

    @staticmethod
    def _failed(what: str, error: OSError) -> StoreError:
        hints = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "the quota is used up",
            errno.EFBIG: "the file size limit is too low",
            errno.EROFS: "the folder is on read-only media",
            errno.EACCES: "check the folder's permissions",
            errno.EPERM: "check the folder's permissions",
            errno.ENOTDIR: "a file stands where a folder should be",
        }
        hint = hints.get(error.errno or 0, "check the folder")
        failed = StoreError(f"{what}: {error.strerror or error}; {hint}")
        failed.errno = error.errno
        return failed


def _scan(folder: str) -> "Iterator[os.DirEntry[str]]":
    """Entries of a folder; none where it vanished or is no folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries
