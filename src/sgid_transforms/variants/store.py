"""Variants on disk: one ordinary image file each, found by (recipe, key, variant number), safe for many writers."""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.files import try_lock
from sgid_transforms.variants import codec, layout
from sgid_transforms.variants.folder import StoreFolder, read
from sgid_transforms.variants.layout import DamagedFileError, FileName, HasFingerprint
from sgid_transforms.variants.packs import Packed, PackFolder, PackWriter
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.verdicts import FILE as VERDICTS
from sgid_transforms.variants.verdicts import Rejections, Verdict, VerdictLog

_Decoded = TypeVar("_Decoded")

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iterable of a store's files, as ``tqdm`` does."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A stored variant.

    Args:
        image: A uint8 tensor (3, H, W), RGB.
        provenance: How it was made.
        path: Its file.
        verdict: What people said about it, if anybody did.
    """

    image: torch.Tensor
    provenance: Provenance
    path: Path
    verdict: Verdict | None = None


class VariantRef(NamedTuple):
    """Where one variant is, without its content."""

    fingerprint: str
    key: str
    variant: int
    path: Path

    @property
    def image_key(self) -> str:
        """Key of the image that it is a variant of."""
        return layout.image_key_of(self.key)

    @property
    def is_packed(self) -> bool:
        """Whether it is a member of a pack; ``path`` is then the pack's file with the member's name below it."""
        return self.path.parent.suffix == ".tar"


@dataclass(frozen=True)
class StoreStats:
    """What lies in a variant store.

    Args:
        variants: Fingerprint -> number of variants.
        failures: Fingerprint -> number of remembered failures.
        bytes: Fingerprint -> bytes of its variants.
        quarantined: Entries in the quarantine.
        temporary: Files being written, or left behind by killed writers.
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
        checked: Variants and failures read.
        damaged: Those that are cut off, changed, renamed or not decodable.
        foreign: Entries of the recipes' folders that no store writes.
        repaired: How many damaged and foreign entries were moved to the quarantine.
    """

    checked: int
    damaged: tuple[Path, ...]
    foreign: tuple[Path, ...]
    repaired: int

    @property
    def ok(self) -> bool:
        """Whether nothing damaged or foreign was found."""
        return not self.damaged and not self.foreign


def _unwrapped(files: Iterable[Any]) -> Iterable[Any]:
    return files


class VariantStore:
    """Variants by (recipe, key, variant number), below one folder that any number of processes may use at once.

    A variant is published in one step when it is complete, and the first writer of a name wins. Reading never raises on a
    damaged or foreign file: it is moved to ``quarantine/``, counted, logged once per cause, and treated as a miss. Nothing is
    ever unpickled. The object pickles as its path and settings. The format is described in ``docs/stores.md``.

    In all methods, ``recipe`` is a recipe or its fingerprint.

    Args:
        root: Folder of the store; created with the first variant. It may be a symbolic link. Links below it are not followed
            for writing, moving or removing, and a recipe's folder that is a link counts as absent.
        readonly: Never write, not even to move a damaged file aside.
        fsync: Wait until a variant is on the disk before it counts as stored. Without it a power cut (not a killed process) can
            lose or damage the latest variants; the digest detects the damaged ones, which are then misses.

    Raises:
        StoreError: From every method, for a fingerprint, key or variant number that no store can hold, or for a store of a
            newer version.

    Examples:
        >>> store, recipe = VariantStore("own"), Recipe(model="tiny")
        >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        >>> store.put(recipe, "0f" * 16, 0, image, Provenance("a photo of a cat"))
        True
        >>> torch.equal(store.get_image(recipe, "0f" * 16, 0), image), store.get_image(recipe, "0f" * 16, 1)
        (True, None)
    """

    def __init__(self, root: str | os.PathLike[str], *, readonly: bool = False, fsync: bool = True) -> None:
        self._folder = StoreFolder(root, readonly=readonly, fsync=fsync)
        self._packs = PackFolder(self._folder.root)
        self._verdicts = VerdictLog(self._folder.path(VERDICTS))
        # checked fingerprint -> extensions to try, the one found last first; none if its folder is a link
        self._extensions: dict[str, tuple[str, ...]] = {}

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self._folder.root

    @property
    def readonly(self) -> bool:
        """Whether this object never writes."""
        return self._folder.readonly

    @property
    def quarantined(self) -> int:
        """How many damaged or foreign files this object has found."""
        return self._folder.damaged_seen

    def __getstate__(self) -> dict[str, object]:
        return {"root": os.fspath(self.root), "readonly": self.readonly, "fsync": self._folder.fsync}

    def __setstate__(self, state: dict[str, object]) -> None:
        VariantStore.__init__(self, str(state["root"]), readonly=bool(state["readonly"]), fsync=bool(state["fsync"]))

    def __repr__(self) -> str:
        return f"VariantStore({os.fspath(self.root)!r}{', readonly=True' if self.readonly else ''})"

    def get_image(self, recipe: HasFingerprint | str, key: str, variant: int) -> torch.Tensor | None:
        """The pixels of a variant, or ``None``: uint8 (3, H, W), RGB, in channels-last memory, as decoders make it.

        This and `get_pil` are the hot path of training: one file is opened, its digest checked, its image decoded.
        """
        found = self._find(recipe, key, variant, codec.decode)
        return None if found is None else _tensor(found[0])

    def get_pil(self, recipe: HasFingerprint | str, key: str, variant: int) -> Image.Image | None:
        """The pixels of a variant as an RGB PIL image, or ``None``; cheaper than converting `get_image`'s tensor."""
        found = self._find(recipe, key, variant, codec.decode_pil)
        return None if found is None else found[0]

    def get(self, recipe: HasFingerprint | str, key: str, variant: int) -> Variant | None:
        """A variant with its provenance, or ``None``."""
        found = self._find(recipe, key, variant, codec.decode)
        if found is None:
            return None
        pixels, json, path = found
        try:
            provenance = Provenance.from_json(bytes(json))
        except ValueError as error:  # its digest is right, so another program made it
            reason = f"its provenance cannot be read: {error}"
            if isinstance(path, Packed):
                self._forget(path, reason)
            else:
                self._folder.set_aside(path, reason)
            return None
        fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
        place = path.member if isinstance(path, Packed) else Path(path)
        return Variant(_tensor(pixels), provenance, place, self.verdicts().get((fingerprint, key, variant)))

    def provenance(self, recipe: HasFingerprint | str, key: str, variant: int) -> Provenance | None:
        """How a variant was made, or ``None``; its digest is checked, but its image is not decoded."""
        found = self._find(recipe, key, variant, lambda data: None)
        try:
            return None if found is None else Provenance.from_json(bytes(found[1]))
        except ValueError:
            return None

    def contains(self, recipe: HasFingerprint | str, key: str, variant: int) -> bool:
        """Whether there is a file for this variant; its content is not looked at."""
        stem, extensions = self._place(recipe, key, variant)
        return self._packed(stem, key, variant) is not None or any(
            os.path.lexists(self._folder.path(stem + extension)) for extension in extensions
        )

    def failure(self, recipe: HasFingerprint | str, key: str, variant: int) -> tuple[str, ...] | None:
        """The reasons why this variant could not be made, as `put_failure` left them, or ``None``."""
        stem, extensions = self._place(recipe, key, variant)
        if not extensions:
            return None
        packed = self._packed(stem, key, variant, failure=True)
        found = None if packed is None else self._unpacked(packed, layout.unpack_failure)
        if found is not None:
            return found
        return self._folder.load(self._folder.path(stem + layout.FAILURE_SUFFIX), layout.MAX_FAILURE, layout.unpack_failure)

    def may_have_old_keys(self, recipe: HasFingerprint | str) -> bool:
        """Whether this store may hold variants of an earlier version, whose keys name the image alone."""
        return self._folder.check_version() < layout.FORMAT_VERSION

    def put(self, recipe: HasFingerprint | str, key: str, variant: int, image: torch.Tensor, provenance: Provenance) -> bool:
        """Store a variant, unless it is already stored.

        Args:
            recipe: Its ``image_format`` decides the file format; a fingerprint alone means ``"auto"``.
            key: Of the original image.
            variant: Number of the variant, from 0.
            image: A uint8 tensor (3, H, W), RGB.
            provenance: Kept inside the file.

        Returns:
            ``False`` if the variant was already stored; the given one is then dropped.

        Raises:
            StoreError: It cannot be written (no space, read-only media, ...), or an argument cannot be stored. No part of
                the variant is left behind.
        """
        stem, _ = self._place(recipe, key, variant)
        self._folder.prepare_to_write()
        if self.contains(recipe, key, variant):
            return False
        encoded, extension = codec.encode(image, "auto" if isinstance(recipe, str) else recipe.image_format)
        return self._folder.publish(layout.pack(encoded, provenance.to_json().encode("ascii"), stem), stem + extension)

    def put_failure(self, recipe: HasFingerprint | str, key: str, variant: int, reasons: Sequence[str]) -> bool:
        """Remember that a variant could not be made, so that it is not tried again in every epoch.

        A variant that is stored later is found as usual, so look for the variant before its failure.

        Returns:
            ``False`` if a failure of this variant was already remembered.

        Raises:
            StoreError: As for `put`.
        """
        stem, _ = self._place(recipe, key, variant)
        self._folder.prepare_to_write()
        return self._folder.publish(layout.pack_failure(reasons), stem + layout.FAILURE_SUFFIX)

    def remove(self, refs: Iterable[VariantRef]) -> int:
        """Remove some variants or failures; returns how many files.

        Args:
            refs: Those to remove, as `iter` and `iter_failures` yield them.

        Raises:
            StoreError: The path of a ref is not that of its variant, or this store cannot be written.
        """
        self._folder.prepare_to_write()
        removed = 0
        recipes = set()
        for ref in refs:
            if ref.is_packed:
                removed += self._remove_packed(ref)
                continue
            suffix = ref.path.name.removeprefix(f"{ref.key}-{ref.variant}")
            if suffix not in (*layout.EXTENSIONS, layout.FAILURE_SUFFIX):
                raise StoreError(f"{ref.path} is not a file of variant {ref.variant} of {ref.key}; pass what iter() yields")
            stem, _ = self._place(ref.fingerprint, ref.key, ref.variant)
            removed += self._folder.remove(self._folder.path(stem + suffix))
            recipes.add(ref.fingerprint)
        for fingerprint in recipes:
            self._folder.remove_empty_folders(fingerprint)
        return removed

    def forget_failures(self, recipe: HasFingerprint | str | None = None) -> int:
        """Forget the remembered failures of one recipe, or of all, so that they are tried again; returns how many."""
        return self.remove(self.iter_failures(recipe))

    def judge(self, verdicts: Iterable[Verdict]) -> None:
        """Keep what people said about variants; it is on the disk when this returns.

        Training never draws a rejected variant again (`SGIDAugment`), and exports leave it out. Its file stays, so that the
        verdict can be taken back.

        Raises:
            StoreError: It cannot be written; then none of the verdicts is kept.
        """
        self._folder.prepare_to_write()
        try:
            self._verdicts.append(verdicts)
        except OSError as error:
            raise StoreError(
                f"the verdicts could not be written into {self.root}: {error.strerror}; check the folder"
            ) from error

    def verdicts(self) -> Mapping[tuple[str, str, int], Verdict]:
        """The verdict that counts for each judged variant, by (fingerprint, key, number): the newest one of anybody."""
        return self._verdicts.standing()

    def all_verdicts(self) -> tuple[Verdict, ...]:
        """Everything that anybody said, in the order in which it was said."""
        return self._verdicts.read()

    def rejections(self, recipe: HasFingerprint | str) -> Rejections:
        """The rejected variants of a recipe as (key, number), by the part of their keys that names the image."""
        return self._verdicts.rejections(recipe if isinstance(recipe, str) else recipe.fingerprint)

    def find(self, recipe: HasFingerprint | str, image_key: str) -> list[VariantRef]:
        """All variants of one image under any text, by number; their content is not looked at."""
        fingerprint, part = layout.check_fingerprint(recipe), layout.image_part(image_key)
        layout.stem(part, 0)
        names = self._folder.walk_shard(fingerprint, part[:2])
        refs = {
            (name.variant, name.key): VariantRef(name.fingerprint, name.key, name.variant, Path(path))
            for path, name in names
            if name is not None and not name.is_failure and layout.image_key_of(name.key) == part
        }
        packed = self._packs.find(fingerprint, part + "0" * (len(layout.variant_key(part)) - len(part)))
        refs |= {(one.variant, one.key): _ref(one) for one in packed if not one.is_failure}
        return [refs[place] for place in sorted(refs)]

    def data(self, ref: VariantRef) -> bytes:
        """The bytes of a variant's file, wherever it is: an image that any viewer opens, with the provenance behind it.

        Raises:
            OSError: It is not there any more, or cannot be read.
        """
        if not ref.is_packed:
            return ref.path.read_bytes()
        for packed in self._packs.find(ref.fingerprint, ref.key, ref.variant):
            if packed.member == ref.path:
                return packed.read()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(ref.path))

    def count(self, recipe: HasFingerprint | str | None = None) -> int:
        """How many variants there are, of one recipe or of all; failures are not counted."""
        return sum(1 for _ in self.iter(recipe))

    def iter(self, recipe: HasFingerprint | str | None = None) -> Iterator[VariantRef]:
        """All variants of one recipe, or of all, in no particular order; their content is not looked at."""
        return (ref for ref, is_failure in self._refs(recipe) if not is_failure)

    def iter_failures(self, recipe: HasFingerprint | str | None = None) -> Iterator[VariantRef]:
        """All remembered failures of one recipe, or of all, in no particular order; `failure` has their reasons."""
        return (ref for ref, is_failure in self._refs(recipe) if is_failure)

    def stats(self) -> StoreStats:
        """Counts and sizes, by walking the whole store."""
        variants, failures, sizes = Counter[str](), Counter[str](), Counter[str]()
        for packed in self._all_packed():
            (failures if packed.is_failure else variants)[packed.pack.fingerprint] += 1
            sizes[packed.pack.fingerprint] += 0 if packed.is_failure else packed.length
        for ref, is_failure in self._loose():
            (failures if is_failure else variants)[ref.fingerprint] += 1
            if not is_failure:
                with contextlib.suppress(OSError):
                    sizes[ref.fingerprint] += os.lstat(ref.path).st_size
        quarantined, temporary = map(self._folder.count_entries, (layout.QUARANTINE, layout.TEMPORARY))
        return StoreStats(dict(+variants), dict(+failures), dict(+sizes), quarantined, temporary)

    def verify(self, repair: bool = False, *, progress: Progress = _unwrapped) -> VerifyReport:
        """Read and decode every file.

        Args:
            repair: Move damaged and foreign entries to the quarantine, and remove orphaned temporary files.
            progress: Wraps the iterable of files, as ``tqdm`` does.
        """
        self._folder.check_version()
        if repair:
            self._folder.prepare_to_write()
            self.sweep()
        checked = repaired = 0
        damaged: list[Path] = []
        foreign: list[Path] = []
        for path, name in progress(self._folder.walk()):
            problem = "its name is not one that a store gives" if name is None else _problem(path, name)
            checked += name is not None
            if problem is not None:
                (foreign if name is None else damaged).append(Path(path))
                repaired += repair and self._folder.set_aside(path, problem) == "moved"
        for packed in progress(self._all_packed()):
            checked += 1
            problem = _packed_problem(packed)
            if problem is not None:
                damaged.append(packed.member)
                repaired += repair and self._forget(packed, problem)
        for fingerprint in self._packs.fingerprints():
            damaged += [pack.path for pack in self._packs.of(fingerprint) if pack.check() is not None]
        if self._verdicts.damaged():
            damaged.append(self.root / VERDICTS)  # its other lines count, so it stays
        return VerifyReport(checked, tuple(damaged), tuple(foreign), repaired)

    def prune(self, keep: HasFingerprint | str | Iterable[HasFingerprint | str], *, progress: Progress = _unwrapped) -> int:
        """Remove the variants and failures of all recipes except those to keep; returns how many files.

        Only files that a store writes are removed; any other file stays, with its folder.

        Raises:
            StoreError: There is nothing to keep, or this store cannot be written.
        """
        recipes = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else keep
        kept = {layout.check_fingerprint(recipe) for recipe in recipes}
        if not kept:
            raise StoreError(
                f"prune was given no recipe to keep and would remove all of {self.root}; delete the folder for that"
            )
        others = [fingerprint for fingerprint in self._folder.fingerprints() if fingerprint not in kept]
        removed = self.remove(progress(ref for fingerprint in others for ref, _ in self._loose(fingerprint)))
        for fingerprint in self._packs.fingerprints():
            if fingerprint not in kept:
                removed += self._remove_packs(fingerprint)
        for fingerprint in others:
            self._folder.remove_empty_folders(fingerprint)
        return removed

    def merge(self, other: "VariantStore | str | os.PathLike[str]") -> int:
        """Copy the variants, failures and verdicts of another store that this one lacks; returns how many files.

        Damaged ones are left where they are, and logged. Copying the other store's folders over this one's, with any tool that
        does not overwrite, does the same without the check, which later reads make up for.

        Raises:
            StoreError: There is no such store, or this one cannot be written.
        """
        source = StoreFolder(other.root if isinstance(other, VariantStore) else other, readonly=True, fsync=False)
        if not source.root.is_dir():
            raise StoreError(f"there is no variant store at {source.root} to merge; check the path")
        source.check_version()
        self._folder.prepare_to_write()
        copied = 0
        for path, name in source.walk():
            if name is None:
                continue
            suffixes = (name.suffix,) if name.is_failure else layout.EXTENSIONS
            if any(os.path.lexists(self._folder.path(name.stem + suffix)) for suffix in suffixes):
                continue
            data = source.load(path, name.max_size, partial(_checked, name))
            if data is not None:
                copied += self._folder.publish(data, name.stem + name.suffix)
        for packed in VariantStore(source.root, readonly=True)._all_packed():
            name = packed.name
            there = self.failure if name.is_failure else self.contains
            if not there(name.fingerprint, name.key, name.variant) and _packed_problem(packed) is None:
                copied += self._folder.publish(packed.read(), name.stem + name.suffix)
        known = set(self.all_verdicts())
        self.judge(one for one in VerdictLog(source.path(VERDICTS)).read() if one not in known)
        return copied

    def sweep(self, max_age: float = layout.ORPHAN_AGE) -> int:
        """Remove the temporary files of killed writers; every process does so before its first write.

        Args:
            max_age: Seconds after which a file of another host counts as left behind, too.

        Returns:
            How many were removed.
        """
        return self._folder.sweep(max_age)

    def pack(
        self, recipe: HasFingerprint | str | None = None, *, shard_bytes: int = 1 << 30, progress: Progress = _unwrapped
    ) -> int:
        """Move the loose files of one recipe, or of all, into a new pack: few large files that are only read.

        It can be interrupted at any time, and run again; readers find every variant all the while. Damaged files go to the
        quarantine.

        Args:
            recipe: What to pack.
            shard_bytes: Size of a tar file at which another one begins.
            progress: Wraps the iterable of files, as ``tqdm`` does.

        Returns:
            How many variants and failures were packed.

        Raises:
            StoreError: The store cannot be written, or another process packs it.
        """
        self._folder.prepare_to_write()
        self._packs.root.mkdir(exist_ok=True)
        lock = try_lock(self._packs.root / "lock")
        if lock is None:
            raise StoreError(f"another process packs {self.root}; wait until it is done")
        try:
            every = self._folder.fingerprints() if recipe is None else [layout.check_fingerprint(recipe)]
            return sum(self._pack(fingerprint, shard_bytes, progress) for fingerprint in every)
        except OSError as error:
            raise StoreError(f"{self.root} could not be packed: {error.strerror or error}; free some space") from error
        finally:
            os.close(lock)

    def _pack(self, fingerprint: str, shard_bytes: int, progress: Progress) -> int:
        self._packs.sweep(fingerprint)
        writer: PackWriter | None = None
        try:
            for path, name in progress(self._folder.walk(fingerprint)):
                if name is None or self._intact(name) is not None:
                    continue
                data = self._folder.load(path, name.max_size, partial(_checked, name))
                if data is not None:
                    writer = writer or PackWriter(self._packs.root / fingerprint, shard_bytes)
                    writer.add(name, data, None if name.is_failure else bytes(layout.unpack(data, name.stem)[1]))
            if writer is not None:
                writer.close()
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
        loose = ((path, name) for path, name in self._folder.walk(fingerprint) if name is not None)
        removed = sum(self._folder.remove(path) for path, name in loose if self._intact(name) is not None)
        self._folder.remove_empty_folders(fingerprint)
        return removed

    def _intact(self, name: FileName) -> Packed | None:
        """The packed entry of that name, if it can be read in full."""
        packed = self._packed(name.stem, name.key, name.variant, failure=name.is_failure)
        return None if packed is None or _packed_problem(packed) is not None else packed

    def _all_packed(self, fingerprint: str | None = None) -> Iterator[Packed]:
        """What is in packs; of what is in several, the one that is read."""
        for recipe in self._packs.fingerprints() if fingerprint is None else [fingerprint]:
            several = len(self._packs.of(recipe)) > 1
            for packed in (packed for pack in self._packs.of(recipe) for packed in pack):
                name = packed.name
                read = self._packed(name.stem, name.key, name.variant, failure=name.is_failure) if several else packed
                if read is not None and read.pack is packed.pack:
                    yield packed

    def _packed(self, stem: str, key: str, variant: int, *, failure: bool = False) -> Packed | None:
        found = self._packs.find(stem.partition("/")[0], key, variant)
        return next((packed for packed in found if packed.is_failure is failure), None)

    def _unpacked(self, packed: Packed, parse: Callable[[bytes], _Decoded]) -> _Decoded | None:
        """What ``parse`` makes of an entry; a damaged one counts as missing from now on."""
        try:
            return parse(packed.read())
        except DamagedFileError as error:
            self._forget(packed, str(error))
        except OSError as error:  # the file may come back
            self._folder.note_damage(str(packed.member), f"it cannot be read ({error.strerror or error})", "stays where it is")
        return None

    def _forget(self, packed: Packed, reason: str) -> bool:
        forgotten = False
        if not self.readonly:
            with contextlib.suppress(OSError):
                packed.pack.forget(packed.number)
                forgotten = True
        self._folder.note_damage(str(packed.member), reason, "stays where it is")
        return forgotten

    def _remove_packed(self, ref: VariantRef) -> int:
        found = [one for one in self._packs.find(ref.fingerprint, ref.key, ref.variant) if one.member == ref.path]
        try:
            for one in found:
                one.pack.forget(one.number)
        except OSError as error:
            raise StoreError(f"could not remove {ref.path}: {error.strerror}; check the folder") from error
        return len(found)

    def _remove_packs(self, fingerprint: str) -> int:
        packs = self._packs.of(fingerprint)
        removed = sum(1 for _ in self._all_packed(fingerprint))
        try:
            for pack in packs:
                pack.remove()
            os.rmdir(self._packs.root / fingerprint)
        except OSError as error:
            raise StoreError(f"could not remove the packs of {fingerprint}: {error.strerror}; check the folder") from error
        return removed

    def _loose(self, recipe: HasFingerprint | str | None = None) -> Iterator[tuple[VariantRef, bool]]:
        """All loose files that a store wrote, each with whether it is a failure."""
        self._folder.check_version()
        for path, name in self._folder.walk(None if recipe is None else layout.check_fingerprint(recipe)):
            if name is not None:
                yield VariantRef(name.fingerprint, name.key, name.variant, Path(path)), name.is_failure

    def _refs(self, recipe: HasFingerprint | str | None = None) -> Iterator[tuple[VariantRef, bool]]:
        """All variants and failures, loose and packed, each once."""
        fingerprint = None if recipe is None else layout.check_fingerprint(recipe)
        yield from ((_ref(one), one.is_failure) for one in self._all_packed(fingerprint))
        for ref, is_failure in self._loose(recipe):
            if self._packed(f"{ref.fingerprint}/", ref.key, ref.variant, failure=is_failure) is None:
                yield ref, is_failure

    def _place(self, recipe: HasFingerprint | str, key: str, variant: int) -> tuple[str, tuple[str, ...]]:
        """The name of a variant's file without its extension, and the extensions to look for."""
        fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
        extensions = self._extensions.get(fingerprint)
        if extensions is None:
            path = self._folder.path(layout.check_fingerprint(fingerprint))
            self._folder.check_version()
            extensions = self._extensions[fingerprint] = () if os.path.islink(path) else layout.EXTENSIONS
        return f"{fingerprint}/{layout.stem(key, variant)}", extensions

    def _find(
        self, recipe: HasFingerprint | str, key: str, variant: int, decode: Callable[[memoryview], _Decoded]
    ) -> tuple[_Decoded, memoryview, str | Packed] | None:
        """Decoded image, provenance JSON and place of a variant."""
        stem, extensions = self._place(recipe, key, variant)

        def parse(data: bytes) -> tuple[_Decoded, memoryview]:
            image, json = layout.unpack(data, stem)
            return decode(image), json

        packed = self._packed(stem, key, variant)
        if packed is not None and (unpacked := self._unpacked(packed, parse)) is not None:
            return *unpacked, packed
        for extension in extensions:
            path = self._folder.path(stem + extension)
            found = self._folder.load(path, layout.MAX_FILE, parse)
            if found is not None:
                if extension is not extensions[0]:  # a recipe mostly uses one format: try it first from now on
                    others = (other for other in extensions if other != extension)
                    self._extensions[stem.partition("/")[0]] = (extension, *others)
                return *found, path
        if packed is None and (packed := self._packed(stem, key, variant)) is not None:  # packed since we looked
            unpacked = self._unpacked(packed, parse)
            return None if unpacked is None else (*unpacked, packed)
        return None


def _tensor(pixels: codec.Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _ref(packed: Packed) -> VariantRef:
    return VariantRef(packed.pack.fingerprint, packed.key, packed.variant, packed.member)


def _packed_problem(packed: Packed) -> str | None:
    """What is wrong with one entry of a pack, or ``None``."""
    try:
        _checked(packed.name, packed.read())
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except DamagedFileError as error:
        return str(error)
    return None


def _checked(name: FileName, data: bytes) -> bytes:
    """Check ``data`` in full and return it."""
    if name.is_failure:
        layout.unpack_failure(data)
        return data
    image, json = layout.unpack(data, name.stem)
    codec.decode(image)
    try:
        Provenance.from_json(bytes(json))
    except ValueError as error:
        raise DamagedFileError(f"its provenance cannot be read: {error}") from None
    return data


def _problem(path: str, name: FileName) -> str | None:
    """What is wrong with one file, or ``None``."""
    try:
        _checked(name, read(path, name.max_size)[0])
    except FileNotFoundError:  # removed meanwhile
        return None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except DamagedFileError as error:
        return str(error)
    return None
