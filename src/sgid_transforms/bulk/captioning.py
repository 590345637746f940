"""Captions and similarities of a folder's images."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from sgid_transforms.bulk.plan import Models
from sgid_transforms.captions.prepare import Entry, alone, complete
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.images.folders import ImageFile, Scan, Skipped, list_folder, scan_files
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe


@dataclass(frozen=True)
class CaptionReport:
    """What `caption_folder` did.

    Args:
        images: Different pictures in the folder.
        captioned: Those that were captioned now.
        scored: Those whose similarity was computed now.
        skipped: What was left out, and why.
        stopped: Whether it was stopped before the end.
        turned: Images that were turned by their EXIF orientation.
        duplicates: Files that repeat a picture of the same class.
        contradictions: Images in the store whose caption contradicts their label; counted where there was something to do.
    """

    images: int
    captioned: int
    scored: int
    skipped: tuple[Skipped, ...]
    stopped: bool
    turned: int
    duplicates: int
    contradictions: int = 0


def scan_folder(data: str | os.PathLike[str], class_names: Mapping[str, str] | None = None, *, progress: bool = False) -> Scan:
    """List a folder and decode every image once; see `list_folder`.

    Raises:
        FolderError: There is no such folder, or no image in it that could be used.
    """
    listing = list_folder(data, class_names)

    def bar(files: Iterable[ImageFile]) -> Iterable[ImageFile]:
        shown: Iterable[ImageFile] = tqdm(files, desc="reading", unit="img", disable=not progress, delay=1)
        return shown

    return scan_files(listing, bar)


def caption_folder(
    scan: Scan,
    recipe: Recipe,
    captions: CaptionStore,
    models: Models | None = None,
    *,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> CaptionReport:
    """Caption every image, score it against its prompt, and rank the scores. Existing results that still apply are kept.

    Args:
        scan: The images.
        recipe: Its prompt template and its model decide the result.
        captions: Where the result goes.
        models: Which models to use.
        progress: Show a progress bar.
        stop: Called between images; when it returns True, the job ends early.

    Raises:
        ModelLoadError: A model cannot be loaded.
        StoreError: The caption store cannot be read or written.
    """
    models = models or Models()
    describer = models.describer_for(recipe)
    stopped = False

    def entries() -> Iterator[Entry]:
        nonlocal stopped
        for image in tqdm(scan.images, desc="captions", unit="img", disable=not progress, delay=1):
            stopped = stop()
            if stopped:
                return
            path = os.path.abspath(image.file.path)
            yield Entry(image.key, image.file.label, path, partial(load_image, path))

    with alone(captions):
        done = complete(entries(), captions, describer, lambda: stopped)
    skipped = (*scan.skipped, *(Skipped(Path(path or ""), reason) for path, reason in done.failed))
    turned = sum(image.turned for image in scan.images)
    return CaptionReport(
        len(scan.images), done.captioned, done.scored, skipped, stopped, turned, scan.duplicates, done.contradictions
    )
