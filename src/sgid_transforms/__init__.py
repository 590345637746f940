"""Label- and caption-guided diffusion augmentation as a torchvision-style transform.

The method is SGID: "Semantic-Guided Generative Image Augmentation Method with Diffusion Models for Image Classification"
(Li et al., AAAI 2024, https://arxiv.org/abs/2302.02070). Names are imported on first use, and diffusers and
transformers only when a model is needed, so importing this package in a loader's worker costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not follow __getattr__
    from sgid_transforms.captions import CaptionRecord, CaptionStore
    from sgid_transforms.errors import (
        DeviceLostError,
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
    from sgid_transforms.images.keys import image_key
    from sgid_transforms.recipe import Filters, Recipe, SimilarityGuidance
    from sgid_transforms.service import GenerationService
    from sgid_transforms.transforms.augment import SGIDAugment
    from sgid_transforms.transforms.dataset import SGIDDataset
    from sgid_transforms.variants import Provenance, VariantStore

__version__ = "0.2.0"

_PUBLIC = {
    "captions": (
        "CaptionRecord",
        "CaptionStore",
    ),
    "errors": (
        "DeviceLostError",
        "GenerationError",
        "MissingCaptionError",
        "ModelLoadError",
        "RecipeError",
        "ServiceError",
        "SGIDError",
        "StoreError",
    ),
    "generation.generator": ("Generator",),
    "generation.requests": (
        "GenerationRequest",
        "GenerationResult",
    ),
    "images.keys": ("image_key",),
    "recipe": (
        "Filters",
        "Recipe",
        "SimilarityGuidance",
    ),
    "service": ("GenerationService",),
    "transforms.augment": ("SGIDAugment",),
    "transforms.dataset": ("SGIDDataset",),
    "variants": (
        "Provenance",
        "VariantStore",
    ),
}
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
