"""Variants of a folder's images."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sgid_transforms.building.builder import Builder, BuilderSpec
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.bulk.captioning import CaptionReport, caption_folder
from sgid_transforms.bulk.plan import Models, Shard, missing_variants
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import FolderError, GenerationError, ImageError, RecipeError, SGIDError, StoreError
from sgid_transforms.files import free_bytes, show
from sgid_transforms.images.folders import KnownImage, Scan, Skipped
from sgid_transforms.images.keys import image_key, to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.service.fleet import Fleet, fleet_of
from sgid_transforms.variants.store import VariantStore


@dataclass(frozen=True)
class GenerateReport:
    """What `generate_folder` did.

    Args:
        captions: what was captioned.
        images: different pictures in this shard.
        wanted: total number of variants that they should have.
        present: those that already existed.
        generated: those that were made now.
        filtered: those that the recipe's filters rejected, now or earlier; they are not tried again.
        failed: what could not be made, and why; it is tried again next time.
        stopped: whether it was stopped before the end.
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
    replace_rejected: bool = False,
) -> GenerateReport:
    """Caption the images that have no caption, then make all missing variants, numbered 0 to ``count - 1``.

    Args:
        scan: The images.
        recipe: What to make.
        captions: Captions by image; all images are captioned, whatever the shard, since ranks need the whole data set.
        variants: Where the variants go.
        count: Variants per image.
        shard: The share of the images to work on; None: all.
        models: Which models to use.
        progress: Show progress bars.
        stop: Called before the model takes more; when it returns True, the job stores what has begun and ends.
        replace_rejected: Make further variants in place of those that people rejected.

    Raises:
        ModelLoadError: A model cannot be loaded.
        StoreError: A store cannot be read or written.
        FolderError: The variant store is the images' folder, or one of its class folders.
        GenerationError: The model itself fails, not just a request.
    """
    if count < 1:
        raise RecipeError(f"{count} variants per image are too few; ask for at least 1")
    _check_place(scan, variants.root)
    models = models or Models()
    shard = shard or Shard()
    images = [image for image in scan.images if image.key in shard]
    _, todo = missing_variants(images, recipe, captions, variants, count, replace_rejected)
    with ExitStack() as stack:
        # Load the generator first: if it cannot be loaded, fail now and not after an hour of captioning.
        builder = build(scan, recipe, captions, variants, models, stack) if todo and not stop() else None
        described = caption_folder(scan, recipe, captions, models, progress=progress, stop=stop)
        filtered, todo = missing_variants(images, recipe, captions, variants, count, replace_rejected)
        if todo and builder is None and not described.stopped:  # new captions changed the keys of existing variants
            builder = build(scan, recipe, captions, variants, models, stack)
        wanted = len(images) * count
        work = Work(todo, stop)
        start = time.perf_counter()
        if builder is not None and not described.stopped:
            bar = tqdm(total=wanted, initial=wanted - len(todo), desc="variants", unit="img", disable=not progress)
            stack.enter_context(bar)
            try:
                work.run(builder, bar.update)
            except (SGIDError, MemoryError, torch.OutOfMemoryError):  # the last two already say what to do
                raise
            except Exception as error:
                raise GenerationError(f"the model failed: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
    return GenerateReport(
        captions=described,
        images=len(images),
        wanted=wanted,
        present=wanted - len(todo) - filtered,
        generated=work.generated,
        filtered=filtered + work.filtered,
        failed=tuple(work.failed),
        stopped=described.stopped or work.stopped,
        seconds=seconds,
    )


def _check_place(scan: Scan, root: Path) -> None:
    """Refuse a store whose files would lie among the originals."""
    if scan.root is None:
        return
    store, data = root.resolve(), scan.root.resolve()
    folders = {image.file.path.parent for image in scan.images} if store.is_relative_to(data) else ()
    if store == data or any(folder.resolve().is_relative_to(store) for folder in folders):
        raise FolderError(f"the variants would lie among the originals in {show(root)}; give a folder of their own")


def build(
    scan: Scan, recipe: Recipe, captions: CaptionStore, variants: VariantStore, models: Models, stack: ExitStack
) -> Builder | Fleet:
    """Load the generator, with the class names and the CLIP model that its filters need, on one device or on several.

    Processes of devices end with ``stack``.
    """
    labels = sorted({image.file.label for image in scan.images})
    spec = BuilderSpec(
        recipe,
        variants,
        captions,
        device=models.device,
        generator=models.generator,
        options=models.options,
        scorer=models.scorer_for(recipe),
        labels=labels,
        batch_size=models.batch_size,
    )
    if len(models.devices) <= 1:
        return spec.build()
    fleet = fleet_of(spec, models.devices)
    stack.callback(fleet.stop)
    return fleet


class Work:
    """Hands the missing variants to a builder one by one, and collects their outcomes.

    Args:
        todo: Images with the numbers of their variants.
        stop: Called before more is handed over; True stops the work.
    """

    def __init__(self, todo: Sequence[tuple[KnownImage, int]], stop: Callable[[], bool] = lambda: False) -> None:
        self._waiting = deque(todo)
        self._stop = stop
        self._files: dict[tuple[str, int], KnownImage] = {}  # those that the builder is working on
        self._last: tuple[str, Tensor] | None = None
        self.generated = self.filtered = 0
        self.failed: list[Skipped] = []
        self.stopped = False

    def run(self, builder: Builder | Fleet, done: Callable[[int], object] = lambda count: None) -> None:
        """Make all variants; ``done`` is called with the number of newly finished ones.

        Raises:
            StoreError: Variants cannot be stored, so going on would be pointless.
        """
        through = 0
        while self._waiting and not self.stopped:
            for group in builder.stream(self._pull):
                for wanted, outcome in group:
                    self._take(builder, wanted, outcome)
                now = self.generated + self.filtered + len(self.failed)
                done(now - through)
                through = now

    def _pull(self, room: int) -> list[Wanted]:
        taken: list[Wanted] = []
        while self._waiting and len(taken) < room:
            if self._stop():
                self.stopped = True
                break
            image, number = self._waiting.popleft()
            try:
                pixels = self._load(image)
            except ImageError as error:
                self.failed.append(Skipped(image.file.path, str(error)))
                continue
            self._files[image.key, number] = image
            taken.append(Wanted(image.key, number, pixels, image.file.label))
        return taken

    def _take(self, builder: Builder | Fleet, wanted: Wanted, outcome: Outcome) -> None:
        image = self._files.pop(wanted.name)
        if outcome.image is not None:
            root = builder.variants.root
            raise StoreError(
                f"variants cannot be stored in {root} ({free_bytes(root) >> 20} MiB are free there); "
                "make room, or choose another folder, and run the command again"
            )
        if outcome.status in (Status.FAILED, Status.LOST):
            self.failed.append(Skipped(image.file.path, outcome.reason))
        elif outcome.status is Status.FILTERED:
            self.filtered += 1
        else:
            self.generated += 1

    def _load(self, image: KnownImage) -> Tensor:
        """The picture as a tensor, refused if the file has changed since its key was computed."""
        if self._last is None or self._last[0] != image.key:
            picture = load_image(image.file.path)
            if image_key(picture) != image.key:
                raise ImageError("it was changed while the job ran; run the command again")
            self._last = image.key, to_uint8_chw(picture)
        return self._last[1]
