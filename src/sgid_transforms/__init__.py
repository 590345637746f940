"""Label- and caption-guided diffusion augmentation as a torchvision-style transform.

The method is SGID: "Semantic-Guided Generative Image Augmentation Method with Diffusion Models for Image Classification"
(Li et al., AAAI 2024, https://arxiv.org/abs/2302.02070). Names are imported when they are first used, and diffusers and
transformers only when a model is needed: importing this package costs next to nothing in a loader's worker.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgid_transforms.augment import SGIDAugment
    from sgid_transforms.captions import CaptionRecord, CaptionStore
    from sgid_transforms.dataset import SGIDDataset
    from sgid_transforms.errors import (
        GenerationError,
        MissingCaptionError,
        ModelLoadError,
        RecipeError,
        ServiceError,
        SGIDError,
        StoreError,
    )
    from sgid_transforms.generation.generator import Generator
    from sgid_transforms.generation.requests import GenerationRequest, GenerationResult
    from sgid_transforms.guidance import SimilarityGuidance
    from sgid_transforms.keys import image_key
    from sgid_transforms.recipe import Filters, Recipe
    from sgid_transforms.service import GenerationService
    from sgid_transforms.variants import Provenance, VariantStore

__version__ = "0.1.0"

_HOMES = {
    "CaptionRecord": "captions",
    "CaptionStore": "captions",
    "Filters": "recipe",
    "GenerationError": "errors",
    "GenerationRequest": "generation.requests",
    "GenerationResult": "generation.requests",
    "GenerationService": "service",
    "Generator": "generation.generator",
    "MissingCaptionError": "errors",
    "ModelLoadError": "errors",
    "Provenance": "variants",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "SGIDAugment": "augment",
    "SGIDDataset": "dataset",
    "SGIDError": "errors",
    "ServiceError": "errors",
    "SimilarityGuidance": "guidance",
    "StoreError": "errors",
    "VariantStore": "variants",
    "image_key": "keys",
}

__all__ = [
    "CaptionRecord",
    "CaptionStore",
    "Filters",
    "GenerationError",
    "GenerationRequest",
    "GenerationResult",
    "GenerationService",
    "Generator",
    "MissingCaptionError",
    "ModelLoadError",
    "Provenance",
    "Recipe",
    "RecipeError",
    "SGIDAugment",
    "SGIDDataset",
    "SGIDError",
    "ServiceError",
    "SimilarityGuidance",
    "StoreError",
    "VariantStore",
    "__version__",
    "image_key",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
