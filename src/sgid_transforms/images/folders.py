"""A folder of class folders, as torchvision's ``ImageFolder`` reads it, but with every file accounted for."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sgid_transforms.errors import FolderError, ImageError, RecipeError
from sgid_transforms.files import show
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import is_image_name, read_image
from sgid_transforms.recipe.prompts import clean_label

_log = logging.getLogger("sgid_transforms")

_WRITTEN = re.compile("[a-z0-9_-]{4,64}/[0-9a-f]{2}|(tmp|quarantine)(/.*)?")  # folders that a store makes

VARIANTS_MARKER = "sgid-variants.json"
"""The file that marks a folder as a store of variants."""

EXPORT_METADATA = "metadata.jsonl"
"""The file beside exported variants, as Hugging Face's imagefolder reads it."""


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was left out, and the reason in a sentence."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ImageFile:
    """A file with an image extension, in a class folder.

    Args:
        path: of the file.
        folder: name of its class folder.
        label: the class in words.
    """

    path: Path
    folder: str
    label: str


@dataclass(frozen=True)
class KnownImage:
    """An image file that could be decoded.

    Args:
        file: where it is.
        key: of its picture (`image_key`).
        size: ``(height, width)`` in pixels, upright.
        turned: whether its EXIF orientation turned it.
    """

    file: ImageFile
    key: str
    size: tuple[int, int]
    turned: bool


@dataclass(frozen=True)
class Listing:
    """What lies in a folder of class folders, before any file is opened.

    Args:
        files: those with an image extension, sorted by class and name.
        classes: class folders with such files, sorted as ``ImageFolder`` numbers them.
        skipped: images and folders that look usable, but are left out.
        ignored: how many other files there are, such as ``readme.txt``; hidden ones are not counted.
        root: the folder.
    """

    files: tuple[ImageFile, ...]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    ignored: int
    root: Path | None = None


@dataclass(frozen=True)
class Scan:
    """A listing whose files were opened.

    Args:
        images: one for each different picture, in the listing's order.
        skipped: what was left out.
        duplicates: files that repeat a picture of the same class; they share its captions and variants.
        classes: the class folders.
        root: the folder that they lie in.
    """

    images: tuple[KnownImage, ...]
    skipped: tuple[Skipped, ...]
    duplicates: int
    classes: tuple[str, ...] = field(default=())
    root: Path | None = None


def list_folder(root: str | os.PathLike[str], class_names: Mapping[str, str] | None = None) -> Listing:
    """Find the image files of a folder of class folders, however deep, in an order that depends on names alone.

    Args:
        root: its folders are the classes.
        class_names: words for coded folder names, such as ``{"n02123045": "tabby cat"}``.

    Raises:
        FolderError: there is no such folder, or no class folder in it.
        RecipeError: a class folder's name has no words in it, or ``class_names`` names none of the folders.
    """
    top = Path(root)
    if not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise FolderError(f"{show(top)} {what}; give a folder that has one folder of images for each class")
    try:
        entries = sorted(top.iterdir())
    except OSError as error:
        raise FolderError(f"{show(top)} cannot be read ({error.strerror}); check its permissions") from None
    if is_ours(top):
        raise FolderError(f"{show(top)} is a store of variants or an export, and holds no originals; give another folder")
    ours = [entry for entry in entries if is_ours(entry)]
    entries = [entry for entry in entries if entry not in ours]
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry for entry in entries if is_image_name(entry) and not entry.is_dir()]
    if not folders:
        what = "images, but no class folders" if loose else "no class folders"
        raise FolderError(f"{show(top)} has {what}; put the images of each class into a folder named after the class")
    _known(class_names, folders)
    skipped = [Skipped(path, "it lies outside of the class folders; move it into one") for path in loose]
    for entry in ours:
        if entry.is_dir() and any(is_image_name(path) for path in entry.iterdir()):
            skipped.append(Skipped(entry, "it is a store of variants or an export; move the originals in it elsewhere"))
    for entry in entries:
        if entry.is_dir() and entry.name.startswith(".") and any(map(is_image_name, _walk(entry, lambda *_: None))):
            skipped.append(Skipped(entry, "it is a hidden folder, which ImageFolder takes for a class; move it away"))
    files: list[ImageFile] = []
    classes: list[str] = []
    ignored = sum(not entry.is_dir() and not is_image_name(entry) and not entry.name.startswith(".") for entry in entries)
    for folder in folders:
        found = list(_walk(folder, lambda path, reason: skipped.append(Skipped(path, reason))))
        images = sorted(path for path in found if is_image_name(path))
        ignored += sum(not is_image_name(path) and not path.name.startswith(".") for path in found)
        if not images:
            skipped.append(Skipped(folder, "it is a class folder without images; remove it, or fill it"))
            continue
        label = _label(folder, class_names)
        classes.append(folder.name)
        files += [ImageFile(path, folder.name, label) for path in images]
    return Listing(tuple(files), tuple(classes), tuple(skipped), ignored, top)


def scan_files(listing: Listing, progress: Callable[[Iterable[ImageFile]], Iterable[ImageFile]] = iter) -> Scan:
    """Decode every file of a listing once, to get the keys of the pictures and find the files that cannot be used.

    Args:
        progress: wraps the iterable of files, as ``tqdm`` does.
    """
    images: dict[str, KnownImage] = {}
    skipped = list(listing.skipped)
    duplicates = 0
    for file in progress(listing.files):
        try:
            picture, turned = read_image(file.path)
        except ImageError as error:
            skipped.append(Skipped(file.path, str(error)))
            continue
        key = image_key(picture)
        first = images.setdefault(key, KnownImage(file, key, (picture.height, picture.width), turned))
        if first.file is file:
            continue
        if first.file.label == file.label:
            duplicates += 1
        else:  # one picture cannot have variants of two classes: its key is the same
            other = show(first.file.path)
            skipped.append(
                Skipped(file.path, f"it shows the same picture as {other}, which has another label; remove one of them")
            )
    return Scan(tuple(images.values()), tuple(skipped), duplicates, listing.classes, listing.root)


def is_ours(path: Path) -> bool:
    """Whether this package wrote a folder: a store of variants, or an export of them, without originals.

    Images in such a folder must never be taken for originals: they would get variants themselves.
    """
    if os.path.lexists(path / VARIANTS_MARKER):
        return True
    try:
        with open(path / EXPORT_METADATA, "rb") as file:
            first = json.loads(file.readline(65536))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"recipe", "key", "file_name"} <= first.keys()


def lies_in_ours(folder: Path) -> bool:
    """Whether this package wrote the contents of ``folder``. A store may have originals beside its own folders."""
    for parent in (folder, *folder.parents):
        if is_ours(parent):
            below = folder.relative_to(parent).parts
            if not os.path.lexists(parent / VARIANTS_MARKER) or _WRITTEN.fullmatch("/".join(below[:2])):
                return True
    return False


def _walk(folder: Path, skip: Callable[[Path, str], None]) -> Iterator[Path]:
    """All files below ``folder``. Links are followed, but no folder is visited twice."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skip(Path(error.filename), f"it cannot be read ({error.strerror})")

    for parent, names, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        place = (status.st_dev, status.st_ino)
        if place in seen:
            names.clear()
            continue
        seen.add(place)
        names[:] = sorted(name for name in names if not is_ours(Path(parent, name)))  # also hidden ones, as ImageFolder does
        for name in files:
            yield Path(parent, name)


def _label(folder: Path, class_names: Mapping[str, str] | None) -> str:
    try:
        return clean_label(folder.name, class_names)
    except RecipeError:
        raise RecipeError(
            f"the class folder {show(folder)} has no words in its name; rename it, or give its class in a file of class names"
        ) from None


def _known(class_names: Mapping[str, str] | None, folders: Iterable[Path]) -> None:
    names = {folder.name for folder in folders}
    unknown = [name for name in class_names or () if name not in names]
    if class_names and len(unknown) == len(class_names):
        raise RecipeError(f"none of the {len(unknown)} class names, such as {unknown[0]!r}, is a class folder; check the file")
    if unknown:
        _log.warning("%d class names match no class folder, such as %r", len(unknown), unknown[0])
