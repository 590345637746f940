"""Work on a whole store: count, verify, prune, merge. Functions of its folder, used by the methods of ``VariantStore``."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgid_transforms.variants import codec, files, layout
from sgid_transforms.variants.codec import UndecodableImageError
from sgid_transforms.variants.folder import StoreFolder
from sgid_transforms.variants.layout import DamagedFileError
from sgid_transforms.variants.provenance import Provenance


@dataclass(frozen=True)
class StoreStats:
    """What lies in a variant store.

    Args:
        variants: fingerprint -> number of variants.
        failures: fingerprint -> number of remembered failures.
        bytes: fingerprint -> bytes of its variants.
        quarantined: entries in the quarantine.
        temporary: files being written, or left behind by killed writers.
    """

    variants: dict[str, int]
    failures: dict[str, int]
    bytes: dict[str, int]
    quarantined: int
    temporary: int


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every file in a store found.

    Args:
        checked: variants and failures read.
        damaged: those that are cut off, changed, renamed or not decodable.
        foreign: entries of the recipes' folders that no store writes.
        repaired: damaged and foreign entries moved to the quarantine.
    """

    checked: int
    damaged: tuple[Path, ...]
    foreign: tuple[Path, ...]
    repaired: int

    @property
    def ok(self) -> bool:
        """Whether there was nothing to complain of."""
        return not self.damaged and not self.foreign


Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the files of a store while they are walked through, as ``tqdm`` does."""


def no_progress(files: Iterable[Any]) -> Iterable[Any]:
    """The files, unwrapped."""
    return files


def stats(folder: StoreFolder) -> StoreStats:
    """Count everything in a store."""
    variants: dict[str, int] = {}
    failed: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for fingerprint, path, name in folder.walk():
        if name is None:
            continue
        counts = failed if name.is_failure else variants
        counts[fingerprint] = counts.get(fingerprint, 0) + 1
        if not name.is_failure:
            with contextlib.suppress(OSError):
                sizes[fingerprint] = sizes.get(fingerprint, 0) + os.lstat(path).st_size
    quarantined, temporary = (files.count_entries(folder.path(name)) for name in (layout.QUARANTINE, layout.TEMPORARY))
    return StoreStats(variants, failed, sizes, quarantined, temporary)


def verify(folder: StoreFolder, *, repair: bool, progress: Progress = no_progress) -> VerifyReport:
    """Read and decode every file of a store; with ``repair``, move what is not in order to the quarantine."""
    checked = repaired = 0
    damaged: list[Path] = []
    foreign: list[Path] = []
    for fingerprint, path, name in progress(folder.walk()):
        if name is None:
            foreign.append(Path(path))
            problem: str | None = "its name is none that a store gives"
        else:
            checked += 1
            problem = _problem(path, fingerprint, name)
            if problem is not None:
                damaged.append(Path(path))
        if problem is not None and repair:
            repaired += folder.set_aside(path, problem)
    return VerifyReport(checked, tuple(damaged), tuple(foreign), repaired)


def prune(folder: StoreFolder, keep: Collection[str], progress: Progress = no_progress) -> int:
    """Remove the files of all recipes but ``keep``, and the folders that this leaves empty; returns how many files.

    Never removes a tree: what no store writes stays, and so does its folder.
    """
    removed = 0
    for fingerprint in folder.fingerprints():
        if fingerprint in keep:
            continue
        for _, path, name in progress(folder.walk(fingerprint)):
            if name is not None:
                folder.remove(path)
                removed += 1
        root = Path(folder.path(fingerprint))
        for emptied in (*root.glob("??"), root):
            with contextlib.suppress(OSError):  # not empty, or no folder: then it is not ours
                emptied.rmdir()
    return removed


def merge(folder: StoreFolder, source: StoreFolder) -> int:
    """Copy what ``source`` has in good order and ``folder`` lacks; returns how many files."""
    copied = 0
    for fingerprint, path, name in source.walk():
        if name is None:
            continue
        target = f"{fingerprint}/{layout.stem(name.key, name.variant)}"
        suffixes = (name.suffix,) if name.is_failure else layout.EXTENSIONS
        if any(os.path.lexists(folder.path(target + suffix)) for suffix in suffixes):
            continue
        data = source.load(path, layout.MAX_FILE, lambda data, place=(fingerprint, name): _checked(data, *place))  # type: ignore[misc]
        if data is not None:
            copied += folder.publish(data, target + name.suffix)
    return copied


def _checked(data: bytes, fingerprint: str, name: layout.FileName) -> bytes:
    """``data``, after a full check of it."""
    if name.is_failure:
        layout.unpack_failure(data)
        return data
    body, image_end = layout.unpack(data, f"{fingerprint}/{layout.stem(name.key, name.variant)}")
    codec.decode(body[:image_end])
    try:
        Provenance.from_json(layout.provenance_of(body, image_end))
    except ValueError as error:
        raise DamagedFileError(f"its provenance cannot be read: {error}") from None
    return data


def _problem(path: str, fingerprint: str, name: layout.FileName) -> str | None:
    """What is wrong with one file, or ``None``."""
    try:
        _checked(files.read(path, layout.MAX_FAILURE if name.is_failure else layout.MAX_FILE)[0], fingerprint, name)
    except FileNotFoundError:  # removed meanwhile
        return None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (DamagedFileError, UndecodableImageError, files.NotAPlainFileError) as error:
        return str(error)
    return None
