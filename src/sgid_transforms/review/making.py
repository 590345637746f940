"""Makes the variants of one image after a person has edited its text, in a thread of the review's server."""

import logging
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from sgid_transforms.building.builder import Builder, BuilderSpec
from sgid_transforms.building.wanted import Status, Wanted
from sgid_transforms.bulk.plan import Models
from sgid_transforms.captions.prepare import Describer, Entry, alone, complete
from sgid_transforms.generation.requests import pull_from
from sgid_transforms.models.checkpoints import first_sentence
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.review.gallery import Gallery
from sgid_transforms.variants.layout import image_part

_log = logging.getLogger("sgid_transforms")


@dataclass(frozen=True)
class Job:
    """How far the latest job is.

    Args:
        key: Key of its image.
        state: ``"idle"``, ``"loading"`` (of models), ``"making"``, ``"done"`` or ``"failed"``.
        done: Variants that are done.
        total: Variants to make.
        message: What was left out, or what failed.
    """

    key: str = ""
    state: str = "idle"
    done: int = 0
    total: int = 0
    message: str = ""


class Maker:
    """One job at a time; models are loaded at the first one, and kept.

    Args:
        gallery: The images.
        models: Which models to use.
        count: Variants per image.
    """

    def __init__(self, gallery: Gallery, models: Models, count: int) -> None:
        self._gallery, self._models, self._count = gallery, models, count
        self._lock = threading.Lock()
        self._job = Job()
        self._generate: Any = None
        self._describer: Describer | None = None
        self._tokenizer: Any = None

    def status(self) -> dict[str, Any]:
        """The latest job, for the page."""
        return asdict(self._job)

    def start(self, key: str) -> bool:
        """Start a job; False if one is at work."""
        with self._lock:
            if self._job.state in ("loading", "making"):
                return False
            self._job = Job(key, "loading")
        threading.Thread(target=self._run, args=(key,), name="sgid-review-maker", daemon=True).start()
        return True

    def prompt(self, label: str, caption: str) -> dict[str, Any]:
        """The prompt of a text, whether the caption was cut, its number of tokens, and the model's limit.

        The last two are None while the model's tokenizer is unknown.

        Raises:
            RecipeError: The label does not fit.
        """
        template, (tokenizer, limit) = self._gallery.recipe.prompt, self._reader()
        prompt = build_prompt(template, label, caption, tokenizer=tokenizer, max_tokens=limit)
        said: dict[str, Any] = {"prompt": prompt, "cut": prompt != build_prompt(template, label, caption)}
        if tokenizer is None:
            return said | {"tokens": None, "limit": None}
        return said | {"tokens": len(tokenizer(prompt)["input_ids"]), "limit": limit or int(tokenizer.model_max_length)}

    def _reader(self) -> tuple[Any, int | None]:
        """The tokenizer that counts: the loaded model's own, or the one in the checkpoint's folder."""
        if self._generate is not None:
            tokenizer = getattr(self._generate, "tokenizer", None)
            return tokenizer, getattr(self._generate, "max_tokens", None) if tokenizer is not None else None
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._gallery.recipe) or False
        return self._tokenizer or None, None

    def _run(self, key: str) -> None:
        try:
            self._make(key)
        except Exception as error:  # shown on the page
            _log.warning("the variants of %s could not be made: %s", key, error)
            self._job = replace(self._job, state="failed", message=first_sentence(error))

    def _make(self, key: str) -> None:
        gallery, recipe = self._gallery, self._gallery.recipe
        image = gallery.original(key)
        builder = self._builder()
        record = gallery.record(key)
        assert self._describer is not None
        with alone(gallery.captions):  # the scores of the new text, without which the address would change again later
            complete([Entry(key, record.label, record.path, lambda: image)], gallery.captions, self._describer)
        record = gallery.record(key)
        rejected = gallery.variants.rejections(recipe).get(image_part(key), frozenset())
        numbers = list(gallery.address.numbers(record, self._count, rejected))
        self._job = Job(key, "making", 0, len(numbers))
        problems = []
        for group in builder.stream(pull_from([Wanted(key, number, image, record.label) for number in numbers])):
            problems += [outcome.reason for _, outcome in group if outcome.status is not Status.STORED]
            self._job = replace(self._job, done=self._job.done + len(group))
        message = f"{len(problems)} of {len(numbers)} were not made: {problems[0]}" if problems else ""
        self._job = replace(self._job, state="done", message=message)

    def _builder(self) -> Builder:
        """A builder that knows the latest contexts."""
        gallery, models, recipe = self._gallery, self._models, self._gallery.recipe
        if self._generate is None:
            spec = BuilderSpec(
                recipe,
                gallery.variants,
                gallery.captions,
                device=models.device,
                generator=models.generator,
                options=models.options,
                scorer=models.scorer_for(recipe),
                labels=gallery.labels,
                batch_size=models.batch_size,
            )
            self._generate = spec.build().generate
            self._describer = models.describer_for(recipe)
        return Builder(recipe, self._generate, gallery.variants, gallery.captions, batch_size=models.batch_size)


def tokenizer_of(recipe: Recipe) -> Any | None:
    """The tokenizer of a recipe's checkpoint, without its model; None where that is not to be had."""
    from transformers import AutoTokenizer

    from sgid_transforms.models.checkpoints import resolve_model

    try:
        source = resolve_model(recipe.model, "pipeline")
        return AutoTokenizer.from_pretrained(source, subfolder="tokenizer", revision=recipe.revision)
    except Exception:  # a pipeline without a tokenizer, a checkpoint that is not there yet: the count is just not shown
        return None
