"""Plan a job over a whole folder: what is missing, and which models to use. No model is loaded."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import GeneratorFactory, auto_models
from sgid_transforms.captions.prepare import Describer
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import MissingCaptionError, RecipeError
from sgid_transforms.images.folders import KnownImage
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.layout import image_part
from sgid_transforms.variants.store import VariantStore


@dataclass(frozen=True)
class Models:
    """Which models a job uses, and where they run.

    Args:
        device: Where all of them run.
        captioner, scorer: Ids, or objects as `prepare` takes them; ``"auto"``: the bundled
            ones for a recipe of ``tiny``, else BLIP and CLIP.
        generator: ``(recipe, device, **options) -> generate``, in place of the package's generator.
        batch_size: Images per forward pass.
        options: Keyword arguments for the generator.
    """

    device: str = "cpu"
    captioner: Any = "auto"
    scorer: Any = "auto"
    generator: GeneratorFactory | None = None
    batch_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def captioner_for(self, recipe: Recipe) -> Any:
        """The captioner that goes with a recipe."""
        return auto_models(recipe, self.captioner, self.scorer)[0]

    def scorer_for(self, recipe: Recipe) -> Any:
        """The CLIP model that goes with a recipe."""
        return auto_models(recipe, self.captioner, self.scorer)[1]

    def describer_for(self, recipe: Recipe) -> Describer:
        """What captions and scores images for a recipe."""
        captioner, scorer = auto_models(recipe, self.captioner, self.scorer)
        return Describer(recipe.prompt, captioner, scorer, self.device, self.batch_size, recipe.caption_mode)


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


def missing_variants(
    images: Sequence[KnownImage],
    recipe: Recipe,
    captions: CaptionStore,
    variants: VariantStore,
    count: int,
    replace_rejected: bool = False,
) -> tuple[int, list[tuple[KnownImage, int]]]:
    """How many variants were filtered for good, and the missing ones (neither stored nor filtered), image by image.

    Args:
        images: The images.
        recipe: What to make.
        captions: What is known about the images.
        variants: Where the variants are.
        count: Variants per image.
        replace_rejected: Count only variants that nobody rejected, so that others are made in their place.
    """
    address = Address(recipe, captions)
    rejections = variants.rejections(recipe) if replace_rejected else {}
    records = captions.get_many([image.key for image in images]) if captions.path.exists() else {}
    filtered = 0
    todo = []
    for image in images:
        record = records.get(image.key)
        rejected = rejections.get(image_part(image.key))
        numbers: Iterable[int] = range(count)
        if record is not None and rejected:
            with contextlib.suppress(MissingCaptionError):
                numbers = list(address.numbers(record, count, rejected, image.file.label))
        for number in numbers:
            try:
                key = None if record is None else address.key(record, number, image.file.label)
            except MissingCaptionError:  # there are no contexts yet; captioning comes first
                key = None
            if record is None or key is None:
                todo.append((image, number))
            elif not address.exists(variants, record, key, number):
                if variants.failure(recipe, key, number) is None:
                    todo.append((image, number))
                else:
                    filtered += 1
    return filtered, todo
