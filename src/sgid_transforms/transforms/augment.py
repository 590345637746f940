"""``SGIDAugment``: the transform that replaces images by generated variants of themselves."""

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import BuilderSpec, GeneratorFactory, auto_models
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.captions.prepare import PrepareReport, prepare
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import GenerationError, MissingCaptionError, ServiceError
from sgid_transforms.images.forms import check_form, is_image, pil_like, refuse_other_images, tensor_like, to_pil
from sgid_transforms.images.keys import image_key, to_uint8_chw
from sgid_transforms.images.labels import check_class_names, find_labels, label_name
from sgid_transforms.models.loading import all_devices, default_device, own_device
from sgid_transforms.models.transfer import download, upload
from sgid_transforms.recipe.checks import integer
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.service.fleet import fleet_of
from sgid_transforms.service.process import GenerationService, job_rendezvous
from sgid_transforms.transforms.gate import P, balanced_p, check_p, class_p, unknown_classes
from sgid_transforms.transforms.state import STAT_NAMES, SharedState, Stats
from sgid_transforms.transforms.supply import VariantSupply
from sgid_transforms.variants.layout import image_part
from sgid_transforms.variants.store import VariantStore
from sgid_transforms.variants.verdicts import Rejections

OnMiss = Literal["generate", "queue", "original"]
Missing = Literal["error", "original", "caption"]
OnError = Literal["raise", "original"]

_log = logging.getLogger("sgid_transforms")
_REFUSED = (
    tv_tensors.BoundingBoxes,
    tv_tensors.Mask,
    tv_tensors.Video,
    *filter(None, [getattr(tv_tensors, "KeyPoints", None)]),
)
_REJECTIONS_EVERY = 1.0  # seconds
_WARN_SECONDS = 60.0  # between two warnings that originals take the place of variants
_KEY = re.compile(r"[0-9a-f]{8,64}")


class _Live(NamedTuple):
    """The live settings as last seen by this process."""

    source: Mapping[str, Any]  # the object they were read from
    p: float | None  # None: see class_p
    class_p: Mapping[str, float] | None
    training: bool
    address: str | None


class SGIDAugment(v2.Transform):  # type: ignore[misc]
    """Replace images at random by label- and caption-guided variants of themselves.

    "Semantic-Guided Generative Image Augmentation Method with Diffusion Models for Image Classification" (Li et al., AAAI 2024,
    https://arxiv.org/abs/2302.02070). Variants are generated once, kept on disk and found by the pixels of their original, so
    put this transform first in a ``Compose``, where it sees the original.

    It takes what torchvision's v2 transforms take: an image, an image with its label, nested samples, a batch. The output has
    the type, size, dtype, device and structure of the input. Images that are not replaced are returned unchanged. The transform
    holds no weights: the model lives in a service process (`serve`), or in this process if no service runs.

    Args:
        model: ``"tiny"`` (bundled, ten classes at 32 x 32), a diffusers checkpoint id, or a local folder.
        recipe: Everything that decides a variant's pixels, in place of ``model``: give one of the two.
        captions: Captions by image, filled by `prepare`.
        variants: Variants by image; may be shared by any number of processes and machines.
        p: Probability that an image is replaced: a number in [0, 1]; or a mapping by class name, where ``"*"`` stands for all
            classes that are not named (0 without it); or ``"balanced"``, which replaces rare classes more often, so that
            class-balanced sampling shows every original equally often. Can be assigned at any time; running workers follow.
        variants_per_image: How many variants an image has; one is chosen uniformly.
        on_miss: What to do about a variant that does not exist yet: ``"generate"`` and wait for it, ``"queue"`` it and
            use the original this time (never waits; needs `serve`), or use the ``"original"``.
        missing: What to do about an image without caption or label that needs one: raise an ``"error"``, use the
            ``"original"``, or ``"caption"`` it now.
        on_error: What to do when the service or the model fails: ``"raise"``, or use the ``"original"`` and count it.
        class_names: Words for coded class names (``{"n02123045": "tabby cat"}``), or
            the name of each class number.
        key: ``image -> str``, for data sets with ids of their own; the default hashes the pixels.
        device: Where models run, unless `prepare` or `serve` is told otherwise; default: CUDA if available, else the CPU.
        captioner: What writes captions for `prepare` and ``missing="caption"``: ``"auto"`` (the bundled model for ``"tiny"``,
            else BLIP), the id of a model, or an object with ``caption(images)``.
        scorer: The CLIP model for similarities: ``"auto"`` (likewise), an id, or an object with ``image_text(images, texts)``.
        generator: ``(recipe, device, **options) -> generate``, where ``generate(requests)`` returns
            results, in place of the package's generator.
        timeout: Seconds that ``on_miss="generate"`` waits for the service before this counts as a failure (``on_error``). By
            default it waits as long as the service shows signs of life, and logs a warning when nothing was made for 30 s.

    Note:
        Floats must be in [0, 1]: after ``Normalize`` the pixels no longer identify the image. Boxes, masks, key points and
        videos are refused: they would not fit the generated image.

    Examples:
        >>> sgid = SGIDAugment(model="tiny", captions="captions.sqlite", variants="variants", p=0.5)
        >>> report = sgid.prepare(ImageFolder("train"), progress=False)
        >>> transform = v2.Compose([sgid, v2.RandAugment(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        >>> image, label = ImageFolder("train", transform)[0]
        >>> image.shape, sgid.stats().seen
        (torch.Size([3, 32, 32]), 1)
    """

    _transformed_types: ClassVar[tuple[Any, ...]] = (is_image,)
    _transient = ("_address", "_supply", "_live", "_logged", "_fallbacks", "_warn_again", "_rejected", "_look_again")

    def __init__(
        self,
        model: str = "tiny",
        *,
        recipe: Recipe | None = None,
        captions: str | os.PathLike[str] | CaptionStore = "captions.sqlite",
        variants: str | os.PathLike[str] | VariantStore = "variants",
        p: P = 0.5,
        variants_per_image: int = 4,
        on_miss: OnMiss = "generate",
        missing: Missing = "error",
        on_error: OnError = "raise",
        class_names: Mapping[str, str] | Sequence[str] | None = None,
        key: Callable[[Any], str] | None = None,
        device: str | None = None,
        captioner: Any = "auto",
        scorer: Any = "auto",
        generator: GeneratorFactory | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        variants_per_image = integer("variants_per_image", variants_per_image, minimum=1, maximum=10**9)
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"recipe is {recipe!r:.80}; pass a Recipe, such as Recipe.from_toml(...) or Recipe(model=...)")
        check_class_names(class_names)
        _check_choice("on_miss", on_miss, ("generate", "queue", "original"))
        _check_choice("missing", missing, ("error", "original", "caption"))
        _check_choice("on_error", on_error, ("raise", "original"))
        if recipe is not None and model != "tiny" and Recipe(model=model).model != recipe.model:
            raise ValueError(f"model is {model!r} and the recipe's model is {recipe.model!r}; give one of the two")
        self.recipe = recipe if recipe is not None else Recipe(model=model)
        self.captions = captions if isinstance(captions, CaptionStore) else CaptionStore(captions)
        self.variants = variants if isinstance(variants, VariantStore) else VariantStore(variants)
        self.variants_per_image = variants_per_image
        self.on_miss, self.missing, self.on_error = on_miss, missing, on_error
        self.class_names = class_names
        self.device = device
        self.captioner, self.scorer = auto_models(self.recipe, captioner, scorer)
        self._key = key
        self._generator = generator
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; it must be more than 0 seconds, or None")
        self.timeout = timeout
        self._state = SharedState(STAT_NAMES, {"p": check_p(p), "training": True})
        self._reported = Stats()
        self._reset()

    # --- settings

    @property
    def p(self) -> P:
        """Current probability that an image is replaced, in all processes that have this transform."""
        current: P = self._state.settings()["p"]
        return current

    @p.setter
    def p(self, p: P) -> None:
        self._state.publish(p=check_p(p), balanced=None)

    @property
    def training(self) -> bool:
        """False after ``eval()``: nothing is replaced, in all processes that have this transform."""
        state = self.__dict__.get("_state")
        return True if state is None else bool(state.settings()["training"])

    @training.setter
    def training(self, mode: bool) -> None:
        if "_state" in self.__dict__:  # not yet there when nn.Module sets itself up
            self._state.publish(training=bool(mode))

    def extra_repr(self) -> str:
        names = ("p", "variants_per_image", "on_miss", "missing")
        settings = [f"model={self.recipe.model!r}", *(f"{name}={getattr(self, name)!r}" for name in names)]
        return ", ".join([*settings, f"captions={str(self.captions.path)!r}", f"variants={str(self.variants.root)!r}"])

    # --- the transform

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        for value in flat_inputs:
            if isinstance(value, _REFUSED):
                raise ValueError(
                    f"{type(self).__name__}() does not support {type(value).__name__}: it would not fit the generated image"
                )

    def forward(self, *inputs: Any) -> Any:
        """Replace images of a sample at random.

        Shape:
            PIL images, or uint8 tensors in [0, 255] or float tensors in [0, 1] of shape ``(C, H, W)`` or ``(B, C, H, W)``,
            where C is 1 or 3; alone, with a label, or nested in dicts, tuples and lists. The output has the same form.

        Raises:
            MissingCaptionError: An image is not in the caption store (``missing="error"``).
            ServiceError: There is no service where one is needed, or it died (``on_error="raise"``).
            GenerationError: The generator raised (``on_error="raise"``).
        """
        sample = inputs if len(inputs) > 1 else inputs[0]
        live = self._now()
        if not live.training:
            return sample
        if isinstance(sample, Image.Image):  # by far the most frequent case, with nothing to search
            check_form(sample)
            return self._augment(live, [sample], [None])[0]
        flat, spec = tree_flatten(sample)
        self.check_inputs(flat)
        where = [index for index, needed in enumerate(self._needs_transform_list(flat)) if needed]
        if not where or all(type(flat[index]) is torch.Tensor for index in where):
            refuse_other_images(flat, alone=not where)
        if not where:
            what = f"a sample holds no image that could be replaced: {type(sample).__name__}"
            self._log_once("no image", what, "further ones are not logged")
        for index in where:
            check_form(flat[index])
        images: list[Any] = []
        spans = []
        for index in where:
            batched = isinstance(flat[index], torch.Tensor) and flat[index].ndim == 4
            members = list(flat[index].as_subclass(torch.Tensor).unbind()) if batched else [flat[index]]
            spans.append((index, batched, len(images), len(images) + len(members)))
            images += members
        outputs = self._augment(live, images, self._labels_of(sample, spans, len(images)))
        if all(output is image for output, image in zip(outputs, images, strict=True)):
            return sample
        for index, batched, start, stop in spans:
            flat[index] = _scatter(flat[index], images[start:stop], outputs[start:stop]) if batched else outputs[start]
        return tree_unflatten(flat, spec)

    def augment(self, images: Sequence[Any], labels: Sequence[Any] | None = None) -> list[Any]:
        """Decide independently for each image whether to replace it, and request all missing variants at once.

        Args:
            images: PIL images, and tensors ``(C, H, W)``.
            labels: Class number or name of each, or None.

        Returns:
            The images in order; those that are not replaced are the same objects.
        """
        live = self._now()
        if not live.training:
            return list(images)
        return self._augment(live, images, [None] * len(images) if labels is None else labels)

    # --- around the transform

    def prepare(
        self,
        dataset: Any,
        *,
        batch_size: int = 32,
        device: str | None = None,
        progress: bool = True,
        timeout: float | None = None,
    ) -> PrepareReport:
        """Write captions and similarities of all images of a data set into the caption store; see `prepare`."""
        report = prepare(
            dataset,
            self.captions,
            template=self.recipe.prompt,
            captioner=self.captioner,
            scorer=self.scorer,
            class_names=self.class_names,
            key=self.key_of,
            stop=SGIDAugment,
            batch_size=batch_size,
            device=device or self._device(),
            progress=progress,
            timeout=timeout,
            mode=self.recipe.caption_mode,
        )
        self._address = Address(self.recipe, self.captions)  # its contexts may have changed
        p = self.p
        if p == "balanced":
            self._state.publish(balanced=self._balanced())
        elif isinstance(p, Mapping):  # not an error: the other classes may be in the next data set
            for sentence in unknown_classes(p, {record.label for record in self.captions if record.label}):
                _log.warning("%s", sentence)
        return report

    def serve(
        self,
        device: str | None = None,
        *,
        devices: Sequence[str] | None = None,
        max_batch: int = 16,
        max_wait: float = 0.05,
        max_queue: int = 256,
        rendezvous: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> GenerationService:
        """Start one process that owns the model and serves all workers of this transform; use it in a ``with`` statement.

        Ranks of one distributed job on this machine share the process of the first rank that calls this with the same devices.

        Args:
            device: Where the model runs.
            devices: Several devices instead, with a process for each; ``["all"]``: all accelerators of this machine.
            max_batch: Maximum number of variants that an idle model waits for before it starts; a working model takes as many
                as it has room for.
            max_wait: Seconds that the first variant waits for others.
            max_queue: Maximum number of variants queued by ``on_miss="queue"``; further ones are dropped and counted.
            rendezvous: A file through which processes share one service, if they are not ranks of one job.
            timeout: Seconds until the service must be ready; by default there is no limit.
            **options: For the generator: ``dtype``, ``batch_size``, ``compile``...

        Raises:
            ModelLoadError: The model cannot be loaded.
            ServiceError: The process cannot be started, or this is a ``DataLoader`` worker.
        """
        if torch.utils.data.get_worker_info() is not None:
            raise ServiceError("sgid.serve() was called in a DataLoader worker; call it once, where the loader is made")
        if device is not None and devices is not None:
            raise ServiceError(f"serve() got device={device!r} and devices={list(devices)!r}; give one of them")
        names = all_devices(devices) if devices is not None else [own_device(device or self._device())]
        if rendezvous is None:
            asked = [] if device is None and devices is None else [",".join(names)]
            rendezvous = job_rendezvous(str(self.variants.root.resolve()), self.recipe.fingerprint, *asked)
        spec = replace(self._spec(names[0], options), batch_size=max_batch)
        background = 19 if names[0] == "cpu" else 10  # on an accelerator, a model needs little of the CPU, but that little soon
        service = _PublishedService(
            partial(fleet_of, spec, names) if len(names) > 1 else spec.build,
            max_batch=max_batch,
            max_wait=max_wait,
            max_queue=max_queue,
            rendezvous=rendezvous,
            recipe=self.recipe.fingerprint,
            niceness=background if self.on_miss == "queue" else 0,
            timeout=timeout,
        )
        service.state = self._state
        return service.start()

    def stats(self) -> Stats:
        """Counts since this transform was made, over all processes that have it."""
        return Stats(**self._state.totals())

    def epoch_summary(self) -> str:
        """One line about what was done since the last call of this method."""
        now = self.stats()
        change, self._reported = now - self._reported, now
        return change.summary()

    def key_of(self, image: Any) -> str:
        """The key under which an image is known: a hash of its pixels, or the result of the user's own function."""
        if self._key is None:
            return image_key(image)
        key = self._key(image)
        if not isinstance(key, str) or not key:
            raise TypeError(f"key= returned {key!r}; it must return a string that names the image")
        return key if _KEY.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()[:32]

    # --- copies

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    # --- inside

    def _augment(self, live: _Live, images: Sequence[Any], labels: Sequence[Any]) -> list[Any]:
        count = self._state.add
        outputs = list(images)
        if live.p == 0.0 or not images:
            count(seen=len(images))
            return outputs
        # Hashing needs bytes in memory; so those that are elsewhere are brought here, and their variants there, all at once.
        here = _OnHost(images)
        keys: dict[int, str] = {}
        limits = self._limits(live, here, labels, keys)
        # Both numbers are drawn for every image, replaced or not: the transforms that follow then see the same
        # random numbers whether the stores are full or empty.
        draws = torch.rand(len(images), 2, dtype=torch.float64).tolist()
        chosen = [position for position, (draw, _) in enumerate(draws) if draw < limits[position]]
        if not chosen:
            count(seen=len(images))
            return outputs
        self._add_keys(keys, here, chosen)
        here.bring(chosen)
        wanted = {position: (keys[position], int(draws[position][1] * self.variants_per_image)) for position in chosen}
        if rejections := self._rejections():
            self._draw_again(wanted, rejections, draws, labels)
        variants: dict[int, Any] = {}
        misses = self._look_up(wanted, here, labels, variants)
        unavailable = len(chosen) - len(wanted)  # people rejected all variants of these
        count(seen=len(images), gated=len(chosen), hits=len(wanted) - len(misses), misses=len(misses), unavailable=unavailable)
        if misses and self.on_miss != "original":
            self._make({position: wanted[position] for position in misses}, here, labels, variants)
        for position, variant in here.sent_back(variants).items():
            outputs[position] = variant
        return outputs

    def _reset(self) -> None:
        """Reset what belongs to one process only."""
        self._address = Address(self.recipe, self.captions)
        self._supply: VariantSupply | None = None
        self._live: _Live | None = None
        self._logged: set[str] = set()
        self._fallbacks = 0
        self._warn_again = -math.inf
        self._rejected: Rejections = {}
        self._look_again = 0.0

    def _now(self) -> _Live:
        settings = self._state.settings()
        live = self._live
        if live is None or live.source is not settings:
            p, table = settings["p"], None
            if isinstance(p, dict):
                p, table = None, p
            elif p == "balanced":
                p, table = None, settings.get("balanced")
            live = self._live = _Live(settings, p, table, settings["training"], settings.get("address"))
        return live

    def _limits(self, live: _Live, images: "_OnHost", labels: Sequence[Any], keys: dict[int, str]) -> list[float]:
        """The probability of each image; per class, the label is the given one, else the one in the caption store."""
        if live.p is not None:
            return [live.p] * len(images)
        table = live.class_p
        if table is None:
            table = self._balanced()
            self._live = live._replace(class_p=table)
        names = [label_name(label, self.class_names) for label in labels]
        unknown = [position for position, name in enumerate(names) if name is None]
        if unknown:
            self._add_keys(keys, images, unknown)
            records = self.captions.get_many([keys[position] for position in unknown])
            for position in unknown:
                record = records.get(keys[position])
                names[position] = record.label if record is not None else None
        return [class_p(table, name) for name in names]

    def _balanced(self) -> dict[str, float]:
        counts: dict[str, int] = {}
        for record in self.captions:
            if record.label is not None:
                counts[record.label] = counts.get(record.label, 0) + 1
        if not counts:
            raise MissingCaptionError("p='balanced' needs to know the classes; call sgid.prepare(dataset) first")
        return balanced_p(counts)

    def _add_keys(self, keys: dict[int, str], images: "_OnHost", positions: Sequence[int]) -> None:
        todo = [position for position in positions if position not in keys]
        if self._key is None:
            images.bring(todo)
        members = [images[position] for position in todo]
        keys.update(zip(todo, map(self.key_of, members), strict=True))

    def _rejections(self) -> Rejections:
        """What people rejected; looked for once a second, because asking a network file system for every image is slow."""
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again = now + _REJECTIONS_EVERY
            self._rejected = self.variants.rejections(self.recipe)
        return self._rejected

    def _draw_again(
        self,
        wanted: dict[int, tuple[str, int]],
        rejections: Rejections,
        draws: Sequence[Sequence[float]],
        labels: Sequence[Any],
    ) -> None:
        """Draw among the variants that are left where people rejected some; where none is left, the original stays."""
        for position, (key, _) in list(wanted.items()):
            rejected = rejections.get(image_part(key))
            record = self.captions.get(key) if rejected else None
            if record is None or not rejected:
                continue
            left = self._left(record, self._label(record, labels[position]), rejected)
            if left:
                wanted[position] = key, left[int(draws[position][1] * len(left))]
            else:
                del wanted[position]

    def _left(self, record: CaptionRecord, label: str | None, rejected: frozenset[tuple[str, int]]) -> list[int]:
        """Numbers of the variants to draw from; higher ones replace rejected ones only if they have been made."""
        left = []
        for number in range(self.variants_per_image + len(rejected)):
            place = self._place(record, number, label)
            is_wanted = number < self.variants_per_image or (
                place is not None and self.variants.contains(self.recipe, place, number)
            )
            if is_wanted and (place, number) not in rejected:
                left.append(number)
        return left[: self.variants_per_image]

    def _look_up(
        self, wanted: Mapping[int, tuple[str, int]], images: "_OnHost", labels: Sequence[Any], outputs: dict[int, Any]
    ) -> list[int]:
        """Put stored variants into ``outputs``; returns the positions of the missing ones."""
        records = self._records([key for key, _ in wanted.values()])
        misses = []
        for position, (key, variant) in wanted.items():
            record, image = records.get(key), images[position]
            pil = isinstance(image, Image.Image)
            place = None if record is None else self._place(record, variant, self._label(record, labels[position]))
            found = (
                None if record is None or place is None else self._address.find(self.variants, record, place, variant, pil=pil)
            )
            if found is None:
                misses.append(position)
            else:
                outputs[position] = pil_like(found, image) if pil else tensor_like(found, image)
        return misses

    def _records(self, keys: Sequence[str]) -> dict[str, CaptionRecord]:
        if len(keys) == 1:  # the frequent case, and twice as fast
            record = self.captions.get(keys[0])
            return {} if record is None else {keys[0]: record}
        return self.captions.get_many(keys)

    def _place(self, record: CaptionRecord, variant: int, label: str | None) -> str | None:
        try:
            return self._address.key(record, variant, label)
        except MissingCaptionError:  # no contexts to draw from
            if self.missing != "original":
                raise
            return None

    def _label(self, record: CaptionRecord | None, label: Any) -> str | None:
        """The class name in words: the one that was prepared, else that of the given label."""
        return record.label if record is not None and record.label else label_name(label, self.class_names)

    def _make(
        self, misses: Mapping[int, tuple[str, int]], images: "_OnHost", labels: Sequence[Any], outputs: dict[int, Any]
    ) -> None:
        """Request the missing variants, and look up again those that were waited for."""
        supply = self._own_supply()
        try:
            if self.on_miss == "queue" and supply.full:
                self._state.add(dropped=len(misses))
                return
            wanted = self._wanted(misses, images, labels)
            if self.on_miss == "queue":
                supply.enqueue(list(wanted.values()))
            elif wanted:
                outcomes = dict(zip(wanted, supply.wait_for(list(wanted.values())), strict=True))
                self._take(outcomes, {position: misses[position] for position in wanted}, images, labels, outputs)
        except (ServiceError, GenerationError) as error:
            if self.on_error == "raise":
                raise
            self._fall_back(len(misses), str(error))

    def _take(
        self,
        outcomes: Mapping[int, Outcome],
        wanted: Mapping[int, tuple[str, int]],
        images: "_OnHost",
        labels: Sequence[Any],
        outputs: dict[int, Any],
    ) -> None:
        stored = {position: wanted[position] for position, outcome in outcomes.items() if outcome.status is Status.STORED}
        problems = []
        for position in self._look_up(stored, images, labels, outputs):
            image, made = images[position], outcomes[position].image
            if made is None:
                problems.append(
                    f"variant {stored[position][1]} of {stored[position][0]} was made but is gone from {self.variants.root}"
                )
            elif isinstance(image, Image.Image):
                outputs[position] = pil_like(to_pil(made), image)
            else:
                outputs[position] = tensor_like(made, image)
        for position, outcome in outcomes.items():
            if outcome.status is Status.FILTERED:
                key, variant = wanted[position]
                self._log_once(outcome.reason, f"variant {variant} of {key} is not used: {outcome.reason}")
        failed = (Status.FAILED, Status.LOST)
        problems += [outcome.reason for outcome in outcomes.values() if outcome.status in failed]
        if problems and self.on_error == "raise":
            raise GenerationError(problems[0])
        if problems:
            self._fall_back(len(problems), problems[0])

    def _fall_back(self, count: int, reason: str) -> None:
        """Count images that stay originals by ``on_error="original"``, and say so, once a minute."""
        self._state.add(fallbacks=count)
        self._fallbacks += count
        if time.monotonic() >= self._warn_again:
            self._warn_again = time.monotonic() + _WARN_SECONDS
            _log.warning("training continues with originals (%d so far in this process): %s", self._fallbacks, reason)

    def _wanted(self, misses: Mapping[int, tuple[str, int]], images: "_OnHost", labels: Sequence[Any]) -> dict[int, Wanted]:
        """The variants to request, by position, without those known to be impossible."""
        records = self._records([key for key, _ in misses.values()])
        wanted = {}
        for position, (key, variant) in misses.items():
            record = records.get(key)
            label = self._label(record, labels[position])
            place = None if record is None else self._place(record, variant, label)
            if place is not None and self.variants.failure(self.recipe, place, variant) is not None:
                self._state.add(unavailable=1)
                continue
            unlabelled = label is None and (self._address.needs_label or record is None)
            if unlabelled or (place is None if record is not None else self.missing != "caption"):
                if self.missing == "original":
                    self._state.add(missing=1)
                    continue
                raise MissingCaptionError(_missing_message(record is None and self.missing == "error", key, labels[position]))
            wanted[position] = Wanted(key, variant, to_uint8_chw(images[position]), label)
        return wanted

    def _own_supply(self) -> VariantSupply:
        if self._supply is None:
            self._supply = VariantSupply(self._spec(self._device(), {}), self._state, self.timeout)
        return self._supply

    def _spec(self, device: str, options: Mapping[str, Any]) -> BuilderSpec:
        return BuilderSpec(
            self.recipe,
            self.variants,
            self.captions,
            device=device,
            generator=self._generator,
            options=dict(options),
            captioner=self.captioner if self.missing == "caption" else None,
            scorer=self.scorer,
            count=self._state.add,
        )

    def _device(self) -> str:
        return self.device or default_device()

    def _labels_of(self, sample: Any, spans: Sequence[tuple[int, bool, int, int]], total: int) -> list[Any]:
        """The label of each image: a batch has one for each member, several single images share one or have one each."""
        labels: list[Any] = [None] * total
        singles = [start for _, batched, start, _ in spans if not batched]
        for start, label in zip(singles, find_labels(sample, len(singles)), strict=True):
            labels[start] = label
        for _, batched, start, stop in spans:
            if batched:
                labels[start:stop] = find_labels(sample, stop - start)
        return labels

    def _log_once(self, cause: str, message: str, more: str = "further cases are only counted: see sgid.stats()") -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            _log.warning("%s (%s)", message, more)


class _PublishedService(GenerationService):
    """A service whose address reaches all live copies of a transform, also after a restart."""

    state: SharedState

    def start(self) -> "_PublishedService":
        super().start()
        self.state.register(self.client.address)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        try:
            if self._client is not None:
                self.state.unregister(self._client.address)
        finally:
            super().stop(timeout)


class _OnHost:
    """The images of one call by position, and in the CPU's memory those that were brought there."""

    def __init__(self, images: Sequence[Any]) -> None:
        self._images = images
        self._brought: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> Any:
        return self._brought.get(position, self._images[position])

    def bring(self, positions: Sequence[int]) -> None:
        """Bring tensors over from a device, those of a kind in one transfer."""
        for group in self._alike([position for position in positions if position not in self._brought]):
            self._brought.update(zip(group, download([self._images[position].detach() for position in group])(), strict=True))

    def sent_back(self, variants: Mapping[int, Any]) -> dict[int, Any]:
        """The variants in the place and class of their originals."""
        back = dict(variants)
        for group in self._alike(variants):
            device = self._images[group[0]].device
            back.update(zip(group, upload([variants[position] for position in group], device), strict=True))
        for position in back:
            if isinstance(self._images[position], tv_tensors.Image):
                back[position] = tv_tensors.Image(back[position])
        return back

    def _alike(self, positions: Iterable[int]) -> list[list[int]]:
        """Positions of tensors that are elsewhere, those of one device and dtype together."""
        groups: dict[Any, list[int]] = {}
        for position in positions:
            image = self._images[position]
            if isinstance(image, torch.Tensor) and image.device.type != "cpu":
                groups.setdefault((image.device, image.dtype), []).append(position)
        return list(groups.values())


def _scatter(batch: torch.Tensor, members: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A new batch of the outputs, or the same batch if they are its members."""
    if all(after is before for before, after in zip(members, outputs, strict=True)):
        return batch
    result = torch.stack(list(outputs))
    wrapped: torch.Tensor = tv_tensors.Image(result) if isinstance(batch, tv_tensors.Image) else result
    return wrapped


def _missing_message(caption: bool, key: str, label: Any) -> str:
    if caption:
        return (
            f"there is no caption for image {key}; call sgid.prepare(dataset) once with the same images "
            "(before any random transform), or pass missing='caption' or missing='original'"
        )
    what = "no label" if label is None else f"no name for label {label!r}"
    return (
        f"there is {what} for image {key}; pass the label along, `sgid(image, label)`, with class_names=dataset.classes, "
        "or call sgid.prepare(dataset), which keeps the label's name"
    )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
