"""Export variants to an ordinary folder of class folders, for programs that cannot read a variant store."""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgid_transforms.building.address import Address
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import FolderError
from sgid_transforms.files import atomic_write, replacing, show
from sgid_transforms.images.folders import EXPORT_METADATA, KnownImage, Scan, Skipped
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.layout import EXTENSIONS, image_part
from sgid_transforms.variants.store import Variant, VariantRef, VariantStore

METADATA = EXPORT_METADATA
_LONGEST_STEM = 180  # bytes; with suffixes and a temporary name, this stays below the 255 of most file systems


@dataclass(frozen=True)
class ExportReport:
    """What `export_folder` wrote.

    Args:
        variants: variants in the folder now.
        images_with_variants: how many images have variants.
        originals: original images in the folder now.
        skipped: what was left out, and why.
    """

    variants: int
    images_with_variants: int
    originals: int
    skipped: tuple[Skipped, ...]


def export_folder(
    scan: Scan,
    recipe: Recipe,
    variants: VariantStore,
    out: str | os.PathLike[str],
    *,
    captions: CaptionStore | None = None,
    originals: bool = False,
    progress: Callable[[Iterable[KnownImage]], Iterable[KnownImage]] = iter,
) -> ExportReport:
    """Copy the variants of a folder's images to ``out/<class folder>/<stem>-<key>-<number>.<ending>``.

    A ``metadata.jsonl`` for Hugging Face's imagefolder is written beside them: ``file_name``, ``text`` (the prompt), ``label``,
    and where the variant comes from. Images are copied byte by byte; files that are there already are not written again.
    Variants that people rejected are left out; what they said about the others is in the metadata.

    Args:
        scan: the original images; class folders get the same names.
        recipe: whose variants.
        variants: where they are.
        out: a folder that is new, empty, or an earlier export of the same recipe.
        captions: leaves out variants that were made with an outdated caption or label; without it, the newest variant of each
            number is taken.
        originals: also copy the originals.
        progress: wraps the iterable of images, as ``tqdm`` does.

    Raises:
        FolderError: ``out`` holds something else, overlaps with the images, or cannot be written.
    """
    top = Path(out)
    _check_target(top, scan, recipe)
    known = _known_variants(recipe, variants, captions)
    rejections = variants.rejections(recipe)
    skipped = list(scan.skipped)
    lines: list[dict[str, Any]] = []
    counts = {"variants": 0, "images": 0, "originals": 0}
    try:
        for image in progress(scan.images):
            found = list(_variants_of(recipe, variants, known.get(image.key, {})))
            counts["images"] += bool(found)
            if originals:
                lines.append(_copy_original(image, recipe, top))
                counts["originals"] += 1
            for number, ref, variant in found:
                name = f"{_stem(image)}-{image.key[:8]}-{number}{ref.path.suffix}"
                _write(variants.data(ref), top / _text(image.file.folder) / name)
                lines.append(_line(image, recipe, number, variant, f"{_text(image.file.folder)}/{name}"))
                counts["variants"] += 1
            for number in {number for _, number in rejections.get(image_part(image.key), ())} - {
                number for number, *_ in found
            }:
                for suffix in EXTENSIONS:  # exported before somebody rejected it
                    (top / _text(image.file.folder) / f"{_stem(image)}-{image.key[:8]}-{number}{suffix}").unlink(
                        missing_ok=True
                    )
            if not found:
                skipped.append(Skipped(image.file.path, "it has no variants of this recipe; run sgid generate first"))
        top.mkdir(parents=True, exist_ok=True)
        atomic_write(top / METADATA, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise FolderError(f"could not write {show(error.filename or top)} ({error.strerror}); check its folder") from error
    return ExportReport(counts["variants"], counts["images"], counts["originals"], tuple(skipped))


def _check_target(top: Path, scan: Scan, recipe: Recipe) -> None:
    if top.exists() and not top.is_dir():
        raise FolderError(f"{show(top)} is a file; give a folder to export to")
    inside = top.resolve()
    if scan.root is not None and inside.is_relative_to(scan.root.resolve()):
        raise FolderError(f"{show(top)} overlaps with the images' folder {show(scan.root)}; export to a folder of its own")
    for folder in {image.file.path.parent for image in scan.images}:
        source = folder.resolve()
        if source.is_relative_to(inside) or inside.is_relative_to(source):
            raise FolderError(f"{show(top)} overlaps with the images themselves; export to a folder of its own")
    if not top.is_dir() or not any(top.iterdir()):
        return
    try:
        with open(top / METADATA, encoding="utf-8") as file:
            first: Any = json.loads(file.readline())
        known = isinstance(first, Mapping) and first.get("recipe") == recipe.fingerprint
    except (OSError, ValueError):
        known = False
    if not known:
        raise FolderError(f"{show(top)} holds something else than an export of this recipe; choose a new folder")


def _known_variants(recipe: Recipe, variants: VariantStore, captions: CaptionStore | None) -> dict[str, dict[int, VariantRef]]:
    """Image key -> number -> variant."""
    known: dict[str, dict[int, VariantRef]] = {}
    rejected = {name for names in variants.rejections(recipe).values() for name in names}
    if captions is not None:
        for ref, image_key, is_current in Address(recipe, captions).current(variants):
            if is_current and (ref.key, ref.variant) not in rejected:
                known.setdefault(image_key, {})[ref.variant] = ref
        return known
    for ref in sorted(variants.iter(recipe), key=lambda ref: (ref.path.parent if ref.is_packed else ref.path).stat().st_mtime):
        if (ref.key, ref.variant) in rejected:
            continue
        for image_key in (ref.image_key, ref.key):  # stores of version 0.1 use the image's key alone
            known.setdefault(image_key, {})[ref.variant] = ref
    return known


def _variants_of(
    recipe: Recipe, variants: VariantStore, refs: Mapping[int, VariantRef]
) -> Iterator[tuple[int, VariantRef, Variant]]:
    for number, ref in sorted(refs.items()):
        variant = variants.get(recipe, ref.key, number)  # reads the whole file, so damaged ones are left out
        if variant is not None:
            yield number, ref, variant


def _copy_original(image: KnownImage, recipe: Recipe, top: Path) -> dict[str, Any]:
    name = f"{_stem(image)}-{image.key[:8]}{image.file.path.suffix}"
    _copy(image.file.path, top / _text(image.file.folder) / name)
    label = image.file.label
    return {
        "file_name": f"{_text(image.file.folder)}/{name}",
        "text": label,
        "label": label,
        "key": image.key,
        "recipe": recipe.fingerprint,
    }


def _line(image: KnownImage, recipe: Recipe, number: int, variant: Variant, file_name: str) -> dict[str, Any]:
    made, verdict = variant.provenance, variant.verdict
    judged = {} if verdict is None else {"verdict": verdict.decision, "verdict_by": verdict.who, "verdict_why": verdict.why}
    return judged | {
        "file_name": file_name,
        "text": made.prompt,
        "label": image.file.label,
        "key": image.key,
        "variant": number,
        "original": _text(image.file.path.name),
        "recipe": recipe.fingerprint,
        "model": made.model,
        "strength": made.strength,
        "guidance_scale": made.guidance_scale,
        "seed": made.seed,
        "similarity": made.similarity,
    }


def _stem(image: KnownImage) -> str:
    """The file's own name, changed so that every file system and every reader of JSON accepts it."""
    stem = _text(image.file.path.stem)
    while len(stem.encode()) > _LONGEST_STEM:
        stem = stem[:-1]
    return stem


def _text(name: str) -> str:
    """A name with its undecodable bytes replaced."""
    return name.encode("utf-8", "replace").decode()


def _write(data: bytes, target: Path) -> None:
    """As `_copy`, of a file's bytes."""
    if not target.exists() or target.read_bytes() != data:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            Path(temporary).write_bytes(data)


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically, unless it is already there; an older variant of the same number is replaced."""
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
