"""Variants of a folder's images."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sgid_transforms.building.builder import VariantJob, VariantMaker
from sgid_transforms.building.factory import MakerSpec
from sgid_transforms.bulk.captioning import CaptionReport, caption_folder
from sgid_transforms.bulk.plan import Models, Shard, chunks, free_bytes, missing_variants
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ImageError, RecipeError, StoreError
from sgid_transforms.images.folders import KnownImage, Scan, Skipped
from sgid_transforms.images.keys import image_key, to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore


@dataclass(frozen=True)
class GenerateReport:
    """What :func:`generate_folder` did.

    Args:
        captions: what it did about captions.
        images: different pictures in this shard.
        wanted: variants that they should have, together.
        present: those that were there already.
        generated: those that were made now.
        filtered: those that the recipe's filters rejected, now or earlier; they are not tried again.
        failed: what could not be made, and why; it is tried again next time.
        stopped: whether it was asked to stop before the end.
        seconds: time that the generation took.
    """

    captions: CaptionReport
    images: int
    wanted: int
    present: int
    generated: int
    filtered: int
    failed: tuple[Skipped, ...]
    stopped: bool
    seconds: float


def generate_folder(
    scan: Scan,
    recipe: Recipe,
    captions: CaptionStore,
    variants: VariantStore,
    *,
    count: int = 4,
    shard: Shard | None = None,
    models: Models | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> GenerateReport:
    """Make variants 0 to ``count - 1`` of every image that does not have them, after captioning what has no caption.

    Args:
        scan: the images.
        recipe: what to make.
        captions: captions by image; all images are captioned, whatever the shard, since ranks are of the whole data set.
        variants: where the variants go.
        count: variants per image.
        shard: the share of the images to work on; None: all.
        models: which models.
        progress: show progress bars.
        stop: asked between batches; when it says True, the job ends early, with everything that was made stored.

    Raises:
        ModelLoadError: a model cannot be loaded.
        StoreError: a store cannot be read or written.
        GenerationError: the model fails on everything.
    """
    if count < 1:
        raise RecipeError(f"{count} variants per image are too few; ask for at least 1")
    models = models or Models()
    shard = shard or Shard()
    images = [image for image in scan.images if image.key in shard]
    filtered, todo = missing_variants(images, recipe, variants, count)
    labels = sorted({image.file.label for image in scan.images})
    # The generator comes first: if it cannot be loaded, that is better known before than after an hour of captioning.
    maker = build_maker(recipe, captions, variants, models, labels) if todo and not stop() else None
    described = caption_folder(scan, recipe, captions, models, progress=progress, stop=stop)
    wanted = len(images) * count
    present = wanted - len(todo) - filtered
    generated = 0
    failed: list[Skipped] = []
    start = time.perf_counter()
    stopped = described.stopped
    if maker is not None and not stopped:
        records = captions.get_many([image.key for image, _ in todo])
        with tqdm(total=wanted, initial=wanted - len(todo), desc="variants", unit="img", disable=not progress) as bar:
            for chunk in chunks(todo, models.batch_size):
                if stop():
                    stopped = True
                    break
                made, rejected, problems = make(chunk, records, maker)
                generated, filtered = generated + made, filtered + rejected
                failed += problems
                bar.update(len(chunk))
    seconds = time.perf_counter() - start
    return GenerateReport(described, len(images), wanted, present, generated, filtered, tuple(failed), stopped, seconds)


def build_maker(
    recipe: Recipe, captions: CaptionStore, variants: VariantStore, models: Models, labels: Sequence[str]
) -> VariantMaker:
    """Load the generator, with the class names and the CLIP model that its filters need."""
    options = dict(models.options)
    if models.generator is None:
        scorer = models.scorer_for(recipe)
        options = {"labels": list(labels)} | ({"clip": scorer} if isinstance(scorer, str) else {}) | options
    return MakerSpec(recipe, variants, captions, device=models.device, generator=models.generator, options=options).build()


def make(
    chunk: Sequence[tuple[KnownImage, int]], records: Mapping[str, CaptionRecord], maker: VariantMaker
) -> tuple[int, int, list[Skipped]]:
    """Make and store some variants: how many were made, how many filtered, and what failed."""
    jobs: list[VariantJob] = []
    places: list[Path] = []
    problems = []
    tensors: dict[str, Any] = {}
    for image, number in chunk:
        path, record = image.file.path, records.get(image.key)
        try:
            if image.key not in tensors:
                tensors[image.key] = _load_same(image)
        except ImageError as error:
            problems.append(Skipped(path, str(error)))
            continue
        if record is None:  # it could be read when it was listed, but not when it was captioned
            problems.append(Skipped(path, "it has no caption; run the command again"))
            continue
        scores = (record.similarity, record.rank)
        jobs.append(VariantJob(image.key, number, tensors[image.key], image.file.label, record.caption, *scores))
        places.append(path)
    made = filtered = 0
    for job, path, outcome in zip(jobs, places, maker(jobs) if jobs else [], strict=True):
        if outcome.image is not None:
            if not maker.variants.contains(maker.recipe, job.key, job.variant):
                free = free_bytes(maker.variants.root) >> 20
                raise StoreError(
                    f"variants cannot be stored in {maker.variants.root} ({free} MiB are free there); "
                    "make room, or choose another folder, and run the command again"
                )
            made += 1
        elif outcome.error is not None or (outcome.reason or "").startswith("error"):
            problems.append(Skipped(path, outcome.error or str(outcome.reason)))
        else:
            filtered += 1
    return made, filtered, problems


def _load_same(image: KnownImage) -> Any:
    """The picture as a tensor, refused if the file has changed since its key was computed."""
    picture = load_image(image.file.path)
    if image_key(picture) != image.key:
        raise ImageError("it was changed while the job ran; run the command again")
    return to_uint8_chw(picture)
