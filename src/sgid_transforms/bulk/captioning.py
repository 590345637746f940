"""Captions and similarities of a folder's images."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from tqdm import tqdm

from sgid_transforms.bulk.plan import Models, incomplete
from sgid_transforms.captions.prepare import prepare
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.images.folders import ImageFile, KnownImage, Scan, Skipped, list_folder, scan_files
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe


@dataclass(frozen=True)
class CaptionReport:
    """What :func:`caption_folder` did.

    Args:
        images: different pictures in the folder.
        captioned: those that were captioned now.
        scored: those whose similarity was computed now.
        skipped: what was left out, and why.
        stopped: whether it was asked to stop before the end.
        turned: images that their EXIF orientation turned.
        duplicates: files that hold a picture of their class once more.
    """

    images: int
    captioned: int
    scored: int
    skipped: tuple[Skipped, ...]
    stopped: bool
    turned: int
    duplicates: int


class FolderImages:
    """Images of a folder as a map-style data set of ``(PIL image, class number)``.

    Args:
        images: which ones.
        stop: asked before each item; when it says True, KeyboardInterrupt is raised.
    """

    def __init__(self, images: Sequence[KnownImage], stop: Callable[[], bool] = lambda: False) -> None:
        self.classes = sorted({image.file.label for image in images})
        numbers = {label: number for number, label in enumerate(self.classes)}
        self.samples = [(os.path.abspath(image.file.path), numbers[image.file.label]) for image in images]
        self._stop = stop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self._stop():
            raise KeyboardInterrupt
        path, number = self.samples[index]
        return load_image(path), number


def scan_folder(data: str | os.PathLike[str], class_names: Mapping[str, str] | None = None, *, progress: bool = False) -> Scan:
    """List a folder and decode every image once; see :func:`~sgid_transforms.images.folders.list_folder`.

    Raises:
        FolderError: there is no such folder, or no image in it that could be used.
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
    """Caption every image, score it against its prompt, and rank the scores. What is there already is kept.

    An image whose class folder has got another name since is scored again, with its new label.

    Args:
        scan: the images.
        recipe: its prompt template and its model decide.
        captions: where the result goes.
        models: which models.
        progress: show a progress bar.
        stop: asked between images; when it says True, the job ends early.

    Raises:
        ModelLoadError: a model cannot be loaded.
        StoreError: the caption store cannot be read or written.
    """
    models = models or Models()
    scorer = models.scorer_for(recipe)
    _relabel(scan.images, captions)
    todo = incomplete(scan.images, captions, scored=scorer is not None)
    captioned = scored = 0
    skipped = list(scan.skipped)
    stopped = stop()
    if todo and not stopped:
        dataset = FolderImages(todo, stop)
        try:
            done = prepare(
                dataset,
                captions,
                template=recipe.prompt,
                captioner=models.captioner_for(recipe),
                scorer=scorer,
                batch_size=models.batch_size,
                device=models.device,
                progress=progress,
            )
        except KeyboardInterrupt:
            if not stop():  # not ours: a second Ctrl-C, or one without a handler
                raise
            stopped = True
        else:
            captioned, scored = done.captioned, done.scored
            skipped += [Skipped(todo[index].file.path, reason) for index, reason in done.failed]
    if not stopped and _unranked(scan.images, captions):
        captions.set_ranks()  # an earlier run was killed just before it would have done so
    turned = sum(image.turned for image in scan.images)
    return CaptionReport(len(scan.images), captioned, scored, tuple(skipped), stopped, turned, scan.duplicates)


def _relabel(images: Sequence[KnownImage], captions: CaptionStore) -> None:
    """Forget the similarities of images whose class has another name now: they were measured with the old one."""
    if not captions.path.exists():
        return
    records = captions.get_many([image.key for image in images])
    renamed = []
    for image in images:
        record = records.get(image.key)
        if record is not None and record.label is not None and record.label != image.file.label:
            renamed.append(replace(record, label=image.file.label, similarity=None, rank=None))
    if renamed:
        captions.put_many(renamed)
        captions.set_similarities(dict.fromkeys((record.key for record in renamed), None))


def _unranked(images: Sequence[KnownImage], captions: CaptionStore) -> bool:
    records = captions.get_many([image.key for image in images]).values()
    return any(record.similarity is not None and record.rank is None for record in records)
