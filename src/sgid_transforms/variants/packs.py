"""Packs: many variants in few large files, which are read-only.

Below the store's root, ``packs/<fingerprint>/`` holds for each time that a recipe was packed::

    <run>-<number>.tar   uncompressed tar files of about 1 GB in WebDataset's layout: each variant is its file, as a store
                         writes it, and a ``.json`` file with its provenance beside it; a failure is its file
    <run>.idx            where each is, sorted; it is written last, so that a pack without one does not count
    <run>.gone           numbers of entries that are damaged or were removed, 4 bytes each, appended

``run`` is a digest of the index. An index is a header, then the sorted heads (8 bytes each), then the entries. A head is the
start of a hash of the image's key, so that all variants of an image are neighbours. The index is memory-mapped, and opened in
the same time however long it is.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import layout
from sgid_transforms.variants.layout import FileName

VERSION = 1
_SUFFIXES = (*layout.EXTENSIONS, layout.FAILURE_SUFFIX)
_HEADER = struct.Struct("<8sIIQQ32s")  # magic, version, tar files, entries, reserved, digest of all that follows
_MAGIC = b"SGIDidx1"
_ENTRY = np.dtype(
    [
        ("key", "S32"),
        ("digits", "u1"),
        ("suffix", "u1"),
        ("file", "<u2"),
        ("variant", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("_", "<u4"),
    ]
)
_ROW = struct.Struct("<32sBBHIQI4x")  # the same
_BLOCK = tarfile.BLOCKSIZE


class Packed(NamedTuple):
    """Where one entry of a pack is."""

    pack: Pack
    number: int
    key: str
    variant: int
    suffix: str
    file: int
    offset: int
    length: int

    @property
    def name(self) -> FileName:
        """The name that its file would have."""
        return FileName(self.pack.fingerprint, self.key, self.variant, self.suffix)

    @property
    def is_failure(self) -> bool:
        return self.suffix == layout.FAILURE_SUFFIX

    @property
    def member(self) -> Path:
        """The tar file, and the name in it."""
        return self.pack.tar_path(self.file) / f"{self.key}-{self.variant}{self.suffix}"

    def read(self) -> bytes:
        """Its bytes, unchecked.

        Raises:
            OSError: The tar file cannot be read, or ends too soon.
        """
        data = os.pread(self.pack.descriptor(self.file), self.length, self.offset)
        if len(data) != self.length:
            raise OSError(f"{self.pack.tar_path(self.file)} ends too soon")
        return data


class Pack:
    """One index, with the tar files that it names.

    Args:
        path: The index.

    Raises:
        StoreError: It is of a newer version, cut short, or not an index.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.fingerprint = path, path.parent.name
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise StoreError(f"the pack {path} cannot be read: {error.strerror}; check the file system") from error
        if len(header) < _HEADER.size or header[:8] != _MAGIC:
            raise StoreError(f"{path} is not the index of a pack; remove it, or copy the pack again")
        _, version, self.files, self.count, _, self.digest = _HEADER.unpack(header)
        if version > VERSION:
            raise StoreError(
                f"the pack {path} has format {version}, this version knows up to {VERSION}; upgrade sgid-transforms"
            )
        if size != _HEADER.size + self.count * (8 + _ENTRY.itemsize):
            raise StoreError(f"the pack {path} is cut short ({size} bytes); copy it again")
        self._map: Any = b""
        if self.count:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._heads = np.frombuffer(self._map, "<u8", self.count, _HEADER.size if self.count else 0)
        self._start = _HEADER.size + 8 * self.count
        self._descriptors: dict[int, int] = {}
        self._gone: frozenset[int] = frozenset()
        self.refresh()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def find(self, key: str, variant: int | None = None) -> Iterator[Packed]:
        """The entries of a variant of that key, or of all variants of the image that this key is of."""
        head = np.uint64(_head(key))  # of the heads' dtype, or all of them would be converted
        number = int(self._heads.searchsorted(head))
        while number < self.count and self._heads[number] == head:
            one = self._entry(number)
            exact = one.key == key and one.variant == variant
            of_the_image = variant is None and layout.image_key_of(one.key) == layout.image_key_of(key)
            if (exact or of_the_image) and number not in self._gone:
                yield one
            number += 1

    def __iter__(self) -> Iterator[Packed]:
        return (self._entry(number) for number in range(self.count) if number not in self._gone)

    def refresh(self) -> None:
        """Learn which entries count as absent."""
        try:
            data = self._gone_path.read_bytes()
        except OSError:
            return
        self._gone = frozenset(number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4]))

    def forget(self, number: int) -> None:
        """Treat an entry as absent from now on, in all processes.

        Raises:
            OSError: That cannot be written.
        """
        descriptor = os.open(self._gone_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, struct.pack("<I", number))
        finally:
            os.close(descriptor)
        self._gone |= {number}
        os.utime(self.path.parent)  # so that others look again

    def tar_path(self, number: int) -> Path:
        """A tar file, by its number."""
        return self.path.with_name(f"{self.path.stem}-{number:05}.tar")

    def check(self) -> str | None:
        """What is wrong with the index or the tar files as a whole, or None."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(_HEADER.size)
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.digest() != self.digest:
            return "its index is not what was written: copy the pack again"
        missing = [path.name for path in map(self.tar_path, range(self.files)) if not path.is_file()]
        return f"{', '.join(missing)} of it is missing" if missing else None

    def remove(self) -> None:
        """Remove the pack, its index first."""
        for path in (self.path, self._gone_path, *map(self.tar_path, range(self.files))):
            path.unlink(missing_ok=True)

    def descriptor(self, number: int) -> int:
        """A tar file, open for reading at any place; it may be shared by forked processes."""
        found = self._descriptors.get(number)
        if found is None:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
            found = self._descriptors[number] = os.open(self.tar_path(number), flags)
        return found

    @property
    def _gone_path(self) -> Path:
        return self.path.with_suffix(".gone")

    def _entry(self, number: int) -> Packed:
        row = _ROW.unpack_from(self._map, self._start + number * _ROW.size)
        key, digits, suffix, file, variant, offset, length = row
        return Packed(self, number, key.hex()[:digits], variant, _SUFFIXES[suffix], file, offset, length)


class PackWriter:
    """Writes the files of one recipe into a new pack; it counts once `close` has returned.

    Args:
        folder: The recipe's folder of packs.
        shard_bytes: Size at which another tar file begins.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit = folder, shard_bytes
        self._rows, self._heads = bytearray(), bytearray()  # a list of ten million rows would take gigabytes
        self._files = 0
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None

    def add(self, name: FileName, data: bytes, provenance: bytes | None) -> None:
        """Append a variant with its provenance, or a failure."""
        if self._tar is None or self._tar.offset >= self._limit:
            self._next()
        assert self._tar is not None
        stem = f"{name.key}-{name.variant}"
        offset = self._append(stem + name.suffix, data)
        if provenance is not None:
            self._append(f"{stem}.json", provenance)
        key = bytes.fromhex(name.key.ljust(64, "0"))
        suffix = _SUFFIXES.index(name.suffix)
        self._heads += _head(name.key).to_bytes(8, "little")
        self._rows += _ROW.pack(key, len(name.key), suffix, self._files - 1, name.variant, offset, len(data))

    def close(self) -> Pack:
        """Finish the tar files, then publish the index."""
        self._end()
        heads, entries = np.frombuffer(self._heads, "<u8"), np.frombuffer(self._rows, _ENTRY)
        order = np.argsort(heads, kind="stable")
        body = heads[order].tobytes() + entries[order].tobytes()
        digest = hashlib.sha256(body).digest()
        run = digest.hex()[:16]
        for number in range(self._files):
            os.replace(self._temporary(number), self._folder / f"{run}-{number:05}.tar")
        temporary = self._folder / f"{run}.idx.tmp"
        with temporary.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, VERSION, self._files, len(heads), 0, digest) + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / f"{run}.idx")
        _sync(self._folder)
        return Pack(self._folder / f"{run}.idx")

    def abandon(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.close()
        for number in range(self._files):
            self._temporary(number).unlink(missing_ok=True)

    def _append(self, name: str, data: bytes) -> int:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        offset = self._tar.offset + _BLOCK
        self._tar.addfile(info, io.BytesIO(data))
        return offset

    def _next(self) -> None:
        self._end()
        self._files += 1
        self._file = self._temporary(self._files - 1).open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def _end(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._tar = self._file = None

    def _temporary(self, number: int) -> Path:
        return self._folder / f"{os.getpid()}-{number:05}.tar.tmp"


class PackFolder:
    """All packs of a store, read again when one comes or goes."""

    def __init__(self, root: Path) -> None:
        self.root = root / layout.PACKS
        self._seen: dict[str, tuple[int, list[Pack]]] = {}

    def of(self, fingerprint: str) -> list[Pack]:
        """The packs of a recipe; a broken one is refused, since its variants would be made again.

        Raises:
            StoreError: A pack is of a newer version, or cut short.
        """
        folder = f"{self.root}/{fingerprint}"
        try:
            changed = os.stat(folder).st_mtime_ns
        except OSError:
            return []
        seen = self._seen.get(fingerprint)
        if seen is None or seen[0] != changed:
            kept = {pack.path: pack for pack in seen[1]} if seen else {}
            for pack in kept.values():
                pack.refresh()
            paths = sorted(Path(folder).glob("*.idx"))
            seen = self._seen[fingerprint] = changed, [kept.get(path) or Pack(path) for path in paths]
        return seen[1]

    def fingerprints(self) -> list[str]:
        """The recipes that have packs."""
        try:
            names = os.listdir(self.root)
        except OSError:
            return []
        return sorted(name for name in names if layout.is_fingerprint(name) and self.of(name))

    def find(self, fingerprint: str, key: str, variant: int | None = None) -> Iterator[Packed]:
        """Entries of a variant, variants and failures alike."""
        for pack in self.of(fingerprint):
            yield from pack.find(key, variant)

    def sweep(self, fingerprint: str) -> None:
        """Remove what killed packers left behind: temporary files, and tar files without an index. Nobody else may pack."""
        folder = self.root / fingerprint
        for path in folder.glob("*"):
            run = path.name.partition("-")[0]
            if path.suffix == ".tmp" or (path.suffix == ".tar" and not (folder / f"{run}.idx").exists()):
                path.unlink(missing_ok=True)


def _head(key: str) -> int:
    return int.from_bytes(hashlib.sha256((layout.image_key_of(key) or key).encode()).digest()[:8], "little")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
