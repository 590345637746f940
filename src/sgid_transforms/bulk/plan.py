"""What there is to do, and with which models: decided without loading any."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sgid_transforms.building.factory import GeneratorFactory
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import RecipeError
from sgid_transforms.images.folders import KnownImage
from sgid_transforms.models.captioner import BLIP
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore

CLIP: Final = "openai/clip-vit-base-patch32"

_CHUNK_PIXELS: Final = 32 * 2**20  # most pixels of the originals that are held at once, 96 MiB as tensors


@dataclass(frozen=True)
class Models:
    """Which models a job uses, and where they run.

    Args:
        device: where all of them run.
        captioner, scorer: ids, or objects as :func:`prepare` takes them; ``"auto"``: the bundled
            ones for a recipe of ``tiny``, else BLIP and CLIP.
        generator: ``(recipe, device, **options) -> generate``, in place of the package's generator.
        batch_size: images per forward pass of the captioner, and variants that are handed to the generator at once.
        options: keyword arguments for the generator.
    """

    device: str = "cpu"
    captioner: Any = "auto"
    scorer: Any = "auto"
    generator: GeneratorFactory | None = None
    batch_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def captioner_for(self, recipe: Recipe) -> Any:
        """The captioner that goes with a recipe."""
        return self.captioner if self.captioner != "auto" else "tiny" if recipe.model == "tiny" else BLIP

    def scorer_for(self, recipe: Recipe) -> Any:
        """The CLIP model that goes with a recipe."""
        return self.scorer if self.scorer != "auto" else "tiny" if recipe.model == "tiny" else CLIP


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal shares of a job, numbered from 1. An image's share depends on its pixels alone."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 1 <= self.number <= self.count:
            raise RecipeError(f"shard {self.number}/{self.count} does not exist; give i/n with i from 1 to n, such as 2/4")

    def __contains__(self, key: str) -> bool:
        return int(key[:8], 16) % self.count == self.number - 1


def incomplete(images: Sequence[KnownImage], captions: CaptionStore, *, scored: bool) -> list[KnownImage]:
    records = captions.get_many([image.key for image in images])

    def complete(record: CaptionRecord | None) -> bool:
        return record is not None and record.label is not None and (record.similarity is not None or not scored)

    return [image for image in images if not complete(records.get(image.key))]


def missing_variants(
    images: Sequence[KnownImage], recipe: Recipe, variants: VariantStore, count: int
) -> tuple[int, list[tuple[KnownImage, int]]]:
    """How many were filtered for good, and those that are neither there nor filtered, image by image."""
    filtered = 0
    todo = []
    for image in images:
        for number in range(count):
            if variants.contains(recipe, image.key, number):
                continue
            if variants.failure(recipe, image.key, number) is not None:
                filtered += 1
            else:
                todo.append((image, number))
    return filtered, todo


def chunks(todo: Sequence[tuple[KnownImage, int]], size: int) -> Iterator[list[tuple[KnownImage, int]]]:
    """Up to ``size`` variants at a time, fewer where their originals are large."""
    chunk: list[tuple[KnownImage, int]] = []
    pixels = 0
    for image, number in todo:
        area = image.size[0] * image.size[1]
        if chunk and (len(chunk) == size or pixels + area > _CHUNK_PIXELS):
            yield chunk
            chunk, pixels = [], 0
        chunk.append((image, number))
        pixels += area
    if chunk:
        yield chunk


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free space on the file system where ``path`` is, or would be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
