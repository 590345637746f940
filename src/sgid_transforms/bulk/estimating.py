"""How long a job would take and how much it would store, measured on a sample of it."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgid_transforms.building.builder import VariantMaker
from sgid_transforms.bulk.captioning import caption_folder
from sgid_transforms.bulk.generating import build_maker, make
from sgid_transforms.bulk.plan import Models, Shard, chunks, free_bytes, incomplete, missing_variants
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import RecipeError
from sgid_transforms.images.folders import KnownImage, Scan, Skipped
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore


@dataclass(frozen=True)
class Estimate:
    """What a job would take, measured on a sample of it.

    Args:
        images: different pictures in this shard.
        captions_missing: pictures without a caption, in the whole folder.
        wanted: variants that the pictures of this shard should have, together.
        missing: those that are not there yet.
        sampled: variants that were made to measure.
        seconds_per_caption, seconds_per_variant: measured, after a warm-up; 0 where nothing is missing.
        bytes_per_variant: measured.
        free_bytes: free space where the variants would go.
        skipped: what would be left out, and why.
    """

    images: int
    captions_missing: int
    wanted: int
    missing: int
    sampled: int
    seconds_per_caption: float
    seconds_per_variant: float
    bytes_per_variant: float
    free_bytes: int
    skipped: tuple[Skipped, ...]

    @property
    def seconds(self) -> float:
        """The whole job, on this device, without loading the models."""
        return self.captions_missing * self.seconds_per_caption + self.missing * self.seconds_per_variant

    @property
    def bytes(self) -> int:
        """Disk space for the variants that are missing."""
        return round(self.missing * self.bytes_per_variant)


def estimate_folder(
    scan: Scan,
    recipe: Recipe,
    captions: CaptionStore,
    variants: VariantStore,
    *,
    count: int = 4,
    shard: Shard | None = None,
    models: Models | None = None,
    sample: int = 16,
    progress: bool = False,
) -> Estimate:
    """Measure on a sample what :func:`generate_folder` would take. Nothing is written but temporary files.

    Args:
        sample: how many variants to make; they are spread evenly over those that are missing.
        scan, recipe, captions, variants, count, shard, models, progress: as there.
    """
    if count < 1:
        raise RecipeError(f"{count} variants per image are too few; ask for at least 1")
    models = models or Models()
    shard = shard or Shard()
    images = [image for image in scan.images if image.key in shard]
    known = captions.path.exists()
    scored = models.scorer_for(recipe) is not None
    uncaptioned = incomplete(scan.images, captions, scored=scored) if known else list(scan.images)
    _, todo = missing_variants(images, recipe, variants, count)
    chosen = [todo[index * len(todo) // sample] for index in range(sample)] if len(todo) > sample else todo
    per_caption = per_variant = per_file = 0.0
    with tempfile.TemporaryDirectory(prefix="sgid-dry-run-") as folder:
        notes = CaptionStore(Path(folder, "captions.sqlite"))
        samples = list({image.key: image for image, _ in chosen}.values())
        try:
            if chosen:
                if known:
                    notes.put_many(captions.get_many([image.key for image in samples]).values())
                labels = sorted({image.file.label for image in scan.images})
                maker = build_maker(recipe, notes, VariantStore(Path(folder, "variants")), models, labels)
                per_caption = _time_captions(samples, uncaptioned, recipe, notes, models, progress)
                per_variant, per_file = _time_variants(chosen, notes, maker, models.batch_size)
        finally:
            notes.close()
    return Estimate(
        images=len(images),
        captions_missing=len(uncaptioned),
        wanted=len(images) * count,
        missing=len(todo),
        sampled=len(chosen),
        seconds_per_caption=per_caption,
        seconds_per_variant=per_variant,
        bytes_per_variant=per_file,
        free_bytes=free_bytes(variants.root),
        skipped=scan.skipped,
    )


def _time_captions(
    samples: Sequence[KnownImage],
    uncaptioned: Sequence[KnownImage],
    recipe: Recipe,
    notes: CaptionStore,
    models: Models,
    progress: bool,
) -> float:
    """Caption the sample; returns seconds per image. The models are loaded and warmed up by one image before."""
    wanting = {image.key for image in uncaptioned}
    pending = [image for image in samples if image.key in wanting]
    timed: list[tuple[int, float]] = []
    for part in (pending[:1], pending[1:]):
        if part:
            start = time.perf_counter()
            scan = Scan(tuple(part), (), 0)
            caption_folder(scan, recipe, notes, models, progress=progress)
            timed.append((len(part), time.perf_counter() - start))
    if not timed:
        return 0.0
    images, seconds = timed[-1]
    return seconds / images


def _time_variants(
    chosen: Sequence[tuple[KnownImage, int]], notes: CaptionStore, maker: VariantMaker, batch_size: int
) -> tuple[float, float]:
    """Make the sample; returns seconds and bytes per variant. One variant before it warms the model up."""
    records = notes.get_many([image.key for image, _ in chosen])
    first, number = chosen[0]
    make([(first, number + 1_000_000)], records, maker)
    start = time.perf_counter()
    for chunk in chunks(chosen, batch_size):
        make(chunk, records, maker)
    seconds = time.perf_counter() - start
    sizes = [ref.path.stat().st_size for ref in maker.variants.iter(maker.recipe)]
    return seconds / len(chosen), sum(sizes) / max(1, len(sizes))
