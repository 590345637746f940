"""How a process that owns the model sets itself up: a picklable description, and what is built from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgid_transforms.building.builder import Describe, Generate, VariantHandler, VariantMaker
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ServiceError
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.transforms.state import SharedState
from sgid_transforms.variants.store import VariantStore

GeneratorFactory = Callable[..., Generate]
"""``factory(recipe, device, **options)`` returns what makes images; it must pickle to run in a service."""


@dataclass(frozen=True)
class MakerSpec:
    """All that is needed to build a :class:`VariantMaker` in any process; pickles small.

    Args:
        recipe: What to make.
        variants: Where variants live.
        captions: Where captions live.
        device: Where the models run.
        generator: Loads the generator; None: the package's own.
        options: Keyword arguments for it.
        captioner: Id of the captioner that captions on demand; None: no captions on demand.
        scorer: Id of the CLIP model that scores them.
        clip: Id of the CLIP model of the filters, for the package's own generator.
        state: Shared counters.
    """

    recipe: Recipe
    variants: VariantStore
    captions: CaptionStore
    device: str = "cpu"
    generator: GeneratorFactory | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    captioner: Any = None
    scorer: Any = None
    clip: str | None = None
    state: SharedState | None = None

    def build(self) -> VariantMaker:
        """Load the models.

        Raises:
            ModelLoadError: A model cannot be loaded.
            ServiceError: CUDA is asked for in a forked process.
        """
        options = dict(self.options)
        if self.generator is None:
            options = self._filter_options() | options
        try:
            generate = (self.generator or load_generator)(self.recipe, self.device, **options)
        except RuntimeError as error:
            if "forked subprocess" in str(error):
                raise ServiceError(
                    "this process was forked from one that uses CUDA, so it cannot use CUDA itself; "
                    "run the loop inside `with sgid.serve(device='cuda')`: its own process then owns the model"
                ) from error
            raise
        describe = None
        if self.captioner is not None:
            describe = Describer(self.recipe.prompt, self.captioner, self.scorer, self.device)
        count = self.state.add if self.state is not None else lambda name, number: None
        return VariantMaker(self.recipe, generate, self.variants, captions=self.captions, describe=describe, count=count)

    def _filter_options(self) -> dict[str, Any]:
        """What the recipe's filters need: the class names that a label is told from, and a CLIP model."""
        options: dict[str, Any] = {} if self.clip is None else {"clip": self.clip}
        if self.recipe.filters.label_check != "none":
            options["labels"] = sorted({record.label for record in self.captions if record.label})
        return options

    def build_handler(self) -> VariantHandler:
        """What a :class:`GenerationService` calls in its process."""
        return VariantHandler(self.build())


class Describer(Describe):
    """Captions images and scores them against their prompts; the models are loaded at the first call.

    Args:
        template: The recipe's prompt template.
        captioner: Id of the captioner, or an object with ``caption(images)``.
        scorer: Id of the CLIP model, or an object with ``image_text(images, texts)``; None: no scores.
        device: Where both run, if they are loaded here.
        batch_size: Images per forward pass.
    """

    def __init__(self, template: str, captioner: Any, scorer: Any, device: str = "cpu", batch_size: int = 32) -> None:
        self.template, self.captioner, self.scorer = template, captioner, scorer
        self.device, self.batch_size = device, batch_size
        self.name = captioner if isinstance(captioner, str) else str(getattr(captioner, "id", type(captioner).__name__))
        self._captioner: Any = None if isinstance(captioner, str) else captioner
        self._scorer: Any = None if isinstance(scorer, str) else scorer

    def __call__(self, images: Sequence[torch.Tensor], labels: Sequence[str]) -> list[tuple[str, float | None]]:
        captions = self.caption(images)
        return list(zip(captions, self.score(images, labels, captions), strict=True))

    def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
        """One caption per uint8 ``(3, H, W)`` image."""
        if self._captioner is None:
            from sgid_transforms.models.captioner import Captioner

            self._captioner = Captioner(self.captioner, device=self.device, batch_size=self.batch_size)
        return list(self._captioner.caption(images))

    def score(
        self, images: Sequence[torch.Tensor], labels: Sequence[str | None], captions: Sequence[str]
    ) -> list[float | None]:
        """CLIP cosine of each image and its prompt; None without a scorer."""
        if self.scorer is None:
            return [None] * len(images)
        if self._scorer is None:
            from sgid_transforms.models.clip import CLIPScorer

            self._scorer = CLIPScorer(self.scorer, device=self.device)
        prompts = [
            build_prompt(self.template, label, caption) if label else caption
            for label, caption in zip(labels, captions, strict=True)
        ]
        return [float(value) for value in self._scorer.image_text(list(images), prompts)]


def load_generator(recipe: Recipe, device: str, **options: Any) -> Generate:
    """The package's own generator."""
    from sgid_transforms.generation.generator import Generator

    generator: Generate = Generator.from_recipe(recipe, device=device, **options)
    return generator
