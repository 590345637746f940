"""Plan a job over a whole folder: what is missing, and which models to use. No model is loaded."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

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
        devices: Several devices that make variants instead of the first, each in a process of its own.
    """

    device: str = "cpu"
    captioner: Any = "auto"
    scorer: Any = "auto"
    generator: GeneratorFactory | None = None
    batch_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: Sequence[str] = ()

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

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """This process's share, by the variables of a SLURM array, of the tasks that srun starts, or of torchrun.

        Array jobs with several tasks each divide the work among all tasks of all jobs.

        Raises:
            RecipeError: There are no such variables, one is not a number, or they contradict each other.

        Examples:
            >>> Shard.from_environment({"RANK": "2", "WORLD_SIZE": "8"})
            Shard(number=3, count=8)
        """
        known = {name: _number(name, environ[name]) for name in _VARIABLES if environ.get(name)}
        array = _array(known)
        # Ranks of torchrun may be numbered in another order than the SLURM tasks that started them.
        inner = _place(known, "RANK", ("WORLD_SIZE",)) or _task(known)
        if array is None and inner is None:
            raise RecipeError(
                "neither SLURM_ARRAY_TASK_ID, nor SLURM_PROCID of a task that srun started, nor RANK tells this process its "
                f"share; {_INSTEAD}"
            )
        (index, count), (task, size) = array or (0, 1), inner or (0, 1)
        return cls(index * size + task + 1, count * size)

    def __contains__(self, key: str) -> bool:
        return int(key[:8], 16) % self.count == self.number - 1


_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
_TASK = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_VARIABLES = (*_ARRAY, *_TASK, "RANK", "WORLD_SIZE")
_NO_STEP = 0xFFFFFFF0  # from here on, SLURM's step ids have other meanings, such as the batch script
_INSTEAD = "give --shard i/n instead of auto"


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise RecipeError(f"{name} is {text!r}, which is not a number; {_INSTEAD}")
    return int(text)


def _array(known: Mapping[str, int]) -> tuple[int, int] | None:
    """The place of this task in its SLURM array, and the number of tasks."""
    if "SLURM_ARRAY_TASK_ID" not in known:
        return None
    missing = next((name for name in _ARRAY if name not in known and not name.endswith("STEP")), None)
    if missing is not None:
        raise RecipeError(f"SLURM_ARRAY_TASK_ID is set without {missing}; {_INSTEAD}")
    this, first, last, count = (known[f"SLURM_ARRAY_TASK_{name}"] for name in ("ID", "MIN", "MAX", "COUNT"))
    step = known.get("SLURM_ARRAY_TASK_STEP") or 1
    if last - first != (count - 1) * step or (this - first) % step or not first <= this <= last:
        raise RecipeError(
            f"the SLURM array of {count} tasks from {first} to {last} has gaps, so that shares would be left out; use one like "
            f"--array=0-{max(count - 1, 1)}, or {_INSTEAD}"
        )
    return (this - first) // step, count


def _task(known: Mapping[str, int]) -> tuple[int, int] | None:
    """The place of this task in its step. A batch script is task 0, too, but the others do not run it."""
    if not 0 <= known.get("SLURM_STEP_ID", _NO_STEP) < _NO_STEP:
        return None
    return _place(known, "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def _place(known: Mapping[str, int], index: str, counts: Sequence[str]) -> tuple[int, int] | None:
    if index not in known:
        return None
    count = next((name for name in counts if name in known), None)
    if count is None:
        raise RecipeError(f"{index} is set without {counts[-1]}; {_INSTEAD}")
    if known[index] >= known[count]:
        raise RecipeError(f"{index} is {known[index]}, but {count} is {known[count]}; {_INSTEAD}")
    return known[index], known[count]


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
