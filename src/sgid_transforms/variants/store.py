"""Variants on disk: one ordinary image file each, found by (recipe, key, variant number), safe for many writers."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import codec, layout, maintenance
from sgid_transforms.variants.folder import StoreFolder
from sgid_transforms.variants.layout import HasFingerprint
from sgid_transforms.variants.maintenance import StoreStats, VerifyReport
from sgid_transforms.variants.provenance import Provenance

_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True, eq=False)
class Variant:
    """A stored variant.

    Args:
        image: uint8 tensor (3, H, W), RGB.
        provenance: how it came about.
        path: its file.
    """

    image: torch.Tensor
    provenance: Provenance
    path: Path


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


class VariantStore:
    """Variants by (recipe, key, variant number), below one folder that any number of processes may use at once.

    A variant is published in one step when it is complete, and the first writer of a name wins. Reading never raises on
    what it finds: a damaged or foreign file is moved to ``quarantine/``, counted, logged once per cause, and is a miss.
    Nothing is ever unpickled. The object pickles as its path and settings. The format is described in ``docs/stores.md``.

    Everywhere, ``recipe`` is a recipe or its fingerprint.

    Args:
        root: folder of the store; created with the first variant.
        readonly: never write, not even to move a damaged file aside.
        fsync: wait until a variant is on the disk before it counts as stored. Without it a power cut (not a killed
            process) can lose or damage the latest variants; the digest finds the damaged ones, which then are misses.

    Raises:
        StoreError: from every method that gets a fingerprint, key or variant number that no store can hold, or comes upon a
            store of a newer version.
    """

    def __init__(self, root: str | os.PathLike[str], *, readonly: bool = False, fsync: bool = True) -> None:
        self._folder = StoreFolder(root, readonly=readonly, fsync=fsync)
        self._names: dict[str, str] = {}  # fingerprint -> "<fingerprint>/", once checked
        self._extensions: dict[str, tuple[str, ...]] = {}  # fingerprint -> extensions to try, the one found last first

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
        """How many damaged or foreign files this object came across."""
        return self._folder.damaged_seen

    def __getstate__(self) -> dict[str, object]:
        return {"root": os.fspath(self.root), "readonly": self.readonly, "fsync": self._folder.fsync}

    def __setstate__(self, state: dict[str, object]) -> None:
        VariantStore.__init__(self, str(state["root"]), readonly=bool(state["readonly"]), fsync=bool(state["fsync"]))

    def __repr__(self) -> str:
        return f"VariantStore({os.fspath(self.root)!r}{', readonly=True' if self.readonly else ''})"

    def get_image(self, recipe: HasFingerprint | str, key: str, variant: int) -> torch.Tensor | None:
        """The pixels of a variant, or ``None``: uint8 (3, H, W), RGB, in channels-last memory, as decoders make it.

        This and :meth:`get_pil` are the hot path of a training: one file is opened, its digest checked, its image decoded.
        """
        found = self._find(recipe, key, variant, codec.decode)
        return None if found is None else _tensor(found[0])

    def get_pil(self, recipe: HasFingerprint | str, key: str, variant: int) -> Image.Image | None:
        """The pixels of a variant as an RGB PIL image, or ``None``; cheaper than to convert :meth:`get_image`'s tensor."""
        found = self._find(recipe, key, variant, codec.decode_pil)
        return None if found is None else found[0]

    def get(self, recipe: HasFingerprint | str, key: str, variant: int) -> Variant | None:
        """A variant with its provenance, or ``None``."""
        found = self._find(recipe, key, variant, codec.decode)
        if found is None:
            return None
        pixels, json, path = found
        try:
            provenance = Provenance.from_json(json)
        except ValueError as error:  # its digest is right, so another program made it
            self._folder.set_aside(path, f"its provenance cannot be read: {error}")
            return None
        return Variant(_tensor(pixels), provenance, Path(path))

    def contains(self, recipe: HasFingerprint | str, key: str, variant: int) -> bool:
        """Whether there is a file for this variant; its content is not looked at."""
        path = self._folder.path(self._name(recipe, key, variant))
        return any(os.path.lexists(path + extension) for extension in layout.EXTENSIONS)

    def failure(self, recipe: HasFingerprint | str, key: str, variant: int) -> tuple[str, ...] | None:
        """The reasons why this variant could not be made, as :meth:`put_failure` left them, or ``None``."""
        path = self._folder.path(self._name(recipe, key, variant) + layout.FAILURE_SUFFIX)
        return self._folder.load(path, layout.MAX_FAILURE, layout.unpack_failure)

    def may_have_old_keys(self, recipe: HasFingerprint | str) -> bool:
        """Whether an earlier version wrote variants of this recipe here, whose keys name the image alone."""
        return self._folder.check_version() < layout.FORMAT_VERSION

    def put(self, recipe: HasFingerprint | str, key: str, variant: int, image: torch.Tensor, provenance: Provenance) -> bool:
        """Store a variant, unless somebody was first.

        Args:
            recipe: its ``image_format`` decides on the file format; a mere fingerprint means ``"auto"``.
            key: of the original image.
            variant: number of the variant, from 0.
            image: uint8 tensor (3, H, W), RGB.
            provenance: kept inside the file.

        Returns:
            ``False`` if there was such a variant already; the given one is then dropped.

        Raises:
            StoreError: it cannot be written (no space, read-only media, ...), or an argument cannot be stored. No part of
                the variant is left behind.
        """
        name = self._name(recipe, key, variant)
        self._folder.prepare_to_write()
        if self.contains(recipe, key, variant):
            return False
        encoded, extension = codec.encode(image, "auto" if isinstance(recipe, str) else recipe.image_format)
        return self._folder.publish(layout.pack(encoded, provenance.to_json().encode("ascii"), name), name + extension)

    def put_failure(self, recipe: HasFingerprint | str, key: str, variant: int, reasons: Sequence[str]) -> bool:
        """Remember that a variant could not be made, so that it is not tried again in every epoch.

        A variant that gets stored all the same is found as any other; ask for it before asking for its failure.

        Returns:
            ``False`` if a failure of this variant was remembered already.

        Raises:
            StoreError: as :meth:`put`.
        """
        name = self._name(recipe, key, variant) + layout.FAILURE_SUFFIX
        self._folder.prepare_to_write()
        return self._folder.publish(layout.pack_failure(reasons), name)

    def forget_failures(self, recipe: HasFingerprint | str | None = None) -> int:
        """Forget the remembered failures of one recipe, or of all, so that they are tried again; returns how many."""
        self._folder.prepare_to_write()
        forgotten = 0
        for _, path, name in self._folder.walk(None if recipe is None else layout.check_fingerprint(recipe)):
            if name is not None and name.is_failure:
                self._folder.remove(path)
                forgotten += 1
        return forgotten

    def count(self, recipe: HasFingerprint | str | None = None) -> int:
        """How many variants there are, of one recipe or of all; failures are not counted."""
        return sum(1 for _ in self.iter(recipe))

    def iter(self, recipe: HasFingerprint | str | None = None) -> Iterator[VariantRef]:
        """All variants of one recipe, or of all, in no particular order; their content is not looked at."""
        self._folder.check_version()
        for fingerprint, path, name in self._folder.walk(None if recipe is None else layout.check_fingerprint(recipe)):
            if name is not None and not name.is_failure:
                yield VariantRef(fingerprint, name.key, name.variant, Path(path))

    def iter_failures(self, recipe: HasFingerprint | str | None = None) -> Iterator[VariantRef]:
        """All remembered failures of one recipe, or of all, in no particular order; :meth:`failure` has their reasons."""
        self._folder.check_version()
        for fingerprint, path, name in self._folder.walk(None if recipe is None else layout.check_fingerprint(recipe)):
            if name is not None and name.is_failure:
                yield VariantRef(fingerprint, name.key, name.variant, Path(path))

    def stats(self) -> StoreStats:
        """Counts and sizes, by walking the whole store."""
        self._folder.check_version()
        return maintenance.stats(self._folder)

    def verify(self, repair: bool = False, *, progress: maintenance.Progress = maintenance.no_progress) -> VerifyReport:
        """Read and decode every file.

        Args:
            repair: move damaged and foreign entries to the quarantine, and remove orphaned temporary files.
            progress: wraps the files while they are walked through, as ``tqdm`` does.
        """
        self._folder.check_version()
        if repair:
            self._folder.prepare_to_write()
            self.sweep()
        return maintenance.verify(self._folder, repair=repair, progress=progress)

    def prune(
        self,
        keep: HasFingerprint | str | Iterable[HasFingerprint | str],
        *,
        progress: maintenance.Progress = maintenance.no_progress,
    ) -> int:
        """Remove the variants and failures of all recipes but the one or those to keep; returns how many files.

        Only files that a store writes are removed; whatever else lies there stays, with its folder.

        Raises:
            StoreError: there is nothing to keep, or this store cannot be written.
        """
        recipes = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else keep
        kept = {layout.check_fingerprint(recipe) for recipe in recipes}
        if not kept:
            raise StoreError(
                f"prune was given no recipe to keep, so that all of {self.root} would go; delete the folder for that"
            )
        self._folder.prepare_to_write()
        return maintenance.prune(self._folder, kept, progress)

    def merge(self, other: "VariantStore | str | os.PathLike[str]") -> int:
        """Copy the variants and failures of another store that this one lacks; returns how many files.

        Damaged ones are left where they are, and logged. Copying the other store's folders over this one's, with any
        tool that does not overwrite, does the same without a check: later reads make up for that.

        Raises:
            StoreError: there is no such store, or this one cannot be written.
        """
        source = StoreFolder(other.root if isinstance(other, VariantStore) else other, readonly=True, fsync=False)
        if not source.root.is_dir():
            raise StoreError(f"there is no variant store at {source.root} to merge; check the path")
        source.check_version()
        self._folder.prepare_to_write()
        return maintenance.merge(self._folder, source)

    def sweep(self, max_age: float = layout.ORPHAN_AGE) -> int:
        """Remove the temporary files of killed writers; every process does so before its first write.

        Args:
            max_age: seconds after which a file of another host counts as left behind, too.

        Returns:
            How many were removed.
        """
        return self._folder.sweep(max_age)

    def _name(self, recipe: HasFingerprint | str, key: str, variant: int) -> str:
        fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
        folder = self._names.get(fingerprint)
        if folder is None:
            folder = f"{layout.check_fingerprint(fingerprint)}/"
            self._folder.check_version()
            self._names[fingerprint] = folder
        return folder + layout.stem(key, variant)

    def _find(
        self, recipe: HasFingerprint | str, key: str, variant: int, decode: Callable[[memoryview], _Decoded]
    ) -> tuple[_Decoded, bytes, str] | None:
        """Decoded image, provenance JSON and path of a variant."""
        name = self._name(recipe, key, variant)
        fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
        extensions = self._extensions.get(fingerprint, layout.EXTENSIONS)

        def parse(data: bytes) -> tuple[_Decoded, bytes]:
            body, image_end = layout.unpack(data, name)
            return decode(body[:image_end]), layout.provenance_of(body, image_end)

        for extension in extensions:
            path = self._folder.path(name + extension)
            found = self._folder.load(path, layout.MAX_FILE, parse)
            if found is not None:
                if extension is not extensions[0]:  # a recipe makes one format, mostly: try it first from now on
                    self._extensions[fingerprint] = (extension, *(other for other in extensions if other != extension))
                return *found, path
        return None


def _tensor(pixels: codec.Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)
