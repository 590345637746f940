"""How long a job would take and how much it would store, measured on a sample of it."""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sgid_transforms.bulk.captioning import caption_folder
from sgid_transforms.bulk.generating import Work, build
from sgid_transforms.bulk.plan import Models, Shard, missing_variants
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import RecipeError
from sgid_transforms.files import free_bytes
from sgid_transforms.images.folders import Scan, Skipped
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore


@dataclass(frozen=True)
class Estimate:
    """What a job would take, measured on a sample of it.

    Args:
        images: different pictures in this shard.
        captions_missing: pictures without a caption, in the whole folder.
        wanted: total number of variants that the pictures of this shard should have.
        missing: those that do not exist yet.
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
        """Seconds for the whole job on this device, without loading the models."""
        return self.captions_missing * self.seconds_per_caption + self.missing * self.seconds_per_variant

    @property
    def bytes(self) -> int:
        """Disk space for the missing variants."""
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
    """Measure on a sample what `generate_folder` would take. Only temporary files are written.

    Args:
        sample: how many variants to make; they are spread evenly over the missing ones.
        scan, recipe, captions, variants, count, shard, models, progress: as for `generate_folder`.
    """
    if count < 1:
        raise RecipeError(f"{count} variants per image are too few; ask for at least 1")
    models = models or Models()
    shard = shard or Shard()
    images = [image for image in scan.images if image.key in shard]
    known = captions.get_many([image.key for image in scan.images]) if captions.path.exists() else {}
    _, todo = missing_variants(images, recipe, captions, variants, count)
    chosen = [todo[index * len(todo) // sample] for index in range(sample)] if len(todo) > sample else todo
    per_caption = per_variant = per_file = 0.0
    with tempfile.TemporaryDirectory(prefix="sgid-dry-run-") as folder, ExitStack() as stack:
        notes, store = CaptionStore(Path(folder, "captions.sqlite")), VariantStore(Path(folder, "variants"))
        try:
            if chosen:
                builder = build(scan, recipe, notes, store, models, stack)
                originals = list({image.key: image for image, _ in chosen}.values())
                timings = []
                for part in (originals[:1], originals):  # the first one loads the models and warms them up
                    start = time.perf_counter()
                    done = caption_folder(Scan(tuple(part), (), 0), recipe, notes, models, progress=progress)
                    timings.append((time.perf_counter() - start) / max(1, done.captioned))
                per_caption = timings[-1 if len(originals) > 1 else 0]
                Work([(chosen[0][0], chosen[0][1] + 1_000_000)]).run(builder)
                start = time.perf_counter()
                Work(chosen).run(builder)
                per_variant = (time.perf_counter() - start) / len(chosen)
                sizes = [ref.path.stat().st_size for ref in store.iter(recipe)]
                per_file = sum(sizes) / max(1, len(sizes))
        finally:
            notes.close()
    uncaptioned = sum(image.key not in known for image in scan.images)
    return Estimate(
        images=len(images),
        captions_missing=uncaptioned,
        wanted=len(images) * count,
        missing=len(todo),
        sampled=len(chosen),
        seconds_per_caption=per_caption if uncaptioned else 0.0,
        seconds_per_variant=per_variant,
        bytes_per_variant=per_file,
        free_bytes=free_bytes(variants.root),
        skipped=scan.skipped,
    )
