"""Ways of augmenting, by name: classic ones, generated variants with their settings, and combinations.

A name reads ``none``, ``randaugment``, ``sgid``, ``sgid+mixup``, ``sgid:k=4,p=0.3`` or ``sgid:guidance=reverse+cutmix``. Every
method flips and crops; that is all that ``none`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchvision.transforms import v2

from sgid_transforms import Filters, Recipe, SimilarityGuidance

CLASSIC = ("none", "autoaugment", "randaugment", "trivialaugment", "augmix", "randomerasing", "mixup", "cutmix")
GENERATED = ("real-guidance", "sgid")
PROMPTS = {"both": "a photo of a {label}, {caption}", "label": "a photo of a {label}", "caption": "{caption}"}

GROUPS = {
    "classic": CLASSIC,
    "generated": GENERATED,
    "combined": tuple(f"sgid+{name}" for name in CLASSIC[1:]),
    "ablations": (
        "sgid:prompt=label",
        "sgid:prompt=caption",
        "sgid:guidance=2-4",
        "sgid:guidance=2-4,guidance=reverse",
        "sgid:guidance=1",
        "sgid:strength=0.3-0.5",
        "sgid:strength=0.5-0.7",
        "sgid:strength=0.7-0.9",
        "sgid:k=1",
        "sgid:k=4",
        "sgid:k=10",
        "sgid:p=0.3",
        "sgid:p=0.5",
        "sgid:p=1",
        "sgid:filter=none",
    ),
}
"""Names that stand for several methods."""


@dataclass(frozen=True)
class Variants:
    """Settings of generated variants: what a recipe needs, and how a training uses them.

    Args:
        guidance: scale at the lowest and at the highest similarity.
        strength: range from which each variant's is drawn.
        prompt: what the prompt says: ``both``, ``label`` or ``caption``.
        direction: ``similarity`` (rises with it), ``reverse`` (falls) or ``fixed`` (the middle of both for all images).
        measure: what the similarity is: ``prompt``, CLIP's cosine of image and prompt, or ``label``, CLIP's probability of the
            label (as in DALDA).
        varies: what follows the similarity: ``guidance``, or ``strength``, under the middle guidance scale for all images.
        context: whose caption the prompt has: ``own``, ``class`` or ``dataset``; ``None``: as the model's preset has it.
        filter: ``none``; ``argmax``: CLIP must recognise the label; or a number: CLIP's least probability of the label.
        k: variants per image.
        p: probability that an image is replaced.
    """

    guidance: tuple[float, float]
    strength: tuple[float, float]
    prompt: str = "both"
    direction: str = "similarity"
    measure: str = "prompt"
    varies: str = "guidance"
    context: str | None = None
    filter: str = "argmax"
    k: int = 20
    p: float = 0.8

    @classmethod
    def for_model(cls, model: str) -> Variants:
        """The strengths and guidance scales of a model's preset."""
        recipe = Recipe.for_model(model)
        guidance, strength = recipe.guidance, recipe.strength
        return cls(
            guidance=(guidance.low, guidance.high) if isinstance(guidance, SimilarityGuidance) else (guidance, guidance),
            strength=strength if isinstance(strength, tuple) else (strength, strength),
        )

    @property
    def ranked_scale(self) -> float | None:
        """The guidance scale of all images, if their strength follows the similarity; else None."""
        return sum(self.guidance) / 2 if self.varies == "strength" else None

    def recipe(self, model: str, seed: int, **settings: Any) -> Recipe:
        """The recipe by which they are made; ``settings`` are further fields of it."""
        low, high = self.guidance
        guidance: float | SimilarityGuidance = (low + high) / 2
        if self.varies == "strength":
            guidance = SimilarityGuidance(0, 1, reverse=self.direction == "reverse")  # the rank itself; see RankedStrength
        elif self.direction != "fixed" and low < high:
            guidance = SimilarityGuidance(low, high, reverse=self.direction == "reverse")
        return Recipe.for_model(
            model,
            prompt=PROMPTS[self.prompt],
            caption_from=self.context,
            guidance=guidance,
            strength=self.strength,
            filters=_filters(self.filter),
            seed=seed,
            **settings,
        )


@dataclass(frozen=True)
class Method:
    """A way of augmenting.

    Args:
        name: as it was asked for.
        classic: ``none`` or another classic one, applied after the variants.
        variants: settings of generated variants, or ``None``.
    """

    name: str
    classic: str
    variants: Variants | None = None


def parse_method(name: str, defaults: Variants) -> Method:
    """The method of a name.

    Args:
        name: see the module.
        defaults: what ``sgid`` is without options. ``real-guidance`` is the same with a prompt of the label alone and a fixed
            guidance scale, as Real Guidance has them (He et al. 2023, arXiv 2210.07574).

    Raises:
        ValueError: for an unknown name, option or value.
    """
    first, *classic = name.split("+")
    base, _, options = first.partition(":")
    if base in CLASSIC and not options and not classic:
        return Method(name, base)
    if base not in GENERATED or len(classic) > 1 or any(one not in CLASSIC[1:] for one in classic):
        raise ValueError(
            f"method {name!r} is unknown; use one of {', '.join(CLASSIC + GENERATED)}, sgid:option=value, sgid+classic, "
            f"or one of the groups {', '.join(GROUPS)}"
        )
    variants = replace(defaults, prompt="label", direction="fixed") if base == "real-guidance" else defaults
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise ValueError(f"option {option!r} of method {name!r} is unknown; use one of {', '.join(_OPTIONS)}")
        try:
            variants = replace(variants, **_OPTIONS[key](value))
        except (ValueError, KeyError):
            raise ValueError(f"option {option!r} of method {name!r} cannot be read") from None
    return Method(name, classic[0] if classic else "none", variants)


def expand(names: Sequence[str]) -> list[str]:
    """Names with groups replaced by their members, each once."""
    return list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))


def image_policy(classic: str, *, small: bool) -> Callable[[Any], Any] | None:
    """torchvision's transform of a single uint8 image that a method stands for, with torchvision's defaults.

    Args:
        classic: one of `CLASSIC`.
        small: whether AutoAugment uses the policy that was found for CIFAR-10, or the one for ImageNet.
    """
    if classic == "autoaugment":
        return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10 if small else v2.AutoAugmentPolicy.IMAGENET)
    policies = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide, "augmix": v2.AugMix}
    return policies[classic]() if classic in policies else None


def batch_policy(classic: str, classes: int) -> Callable[..., Any] | None:
    """torchvision's transform of a whole batch that a method stands for: ``(images, labels) -> (images, (B, classes))``."""
    policies = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    return policies[classic](num_classes=classes) if classic in policies else None


def erase(images: torch.Tensor) -> torch.Tensor:
    """`v2.RandomErasing` with its defaults on each of ``(B, C, H, W)`` normalised images."""
    transform = v2.RandomErasing()
    return torch.stack([transform(image) for image in images])


def _range(text: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    return float(low), float(high if dash else low)


def _filters(text: str) -> Filters:
    if text in ("none", "argmax"):
        return Filters(label_check=text)
    return Filters(label_check="threshold", label_threshold=float(text))


def filter_name(text: str) -> str:
    """The text, if `Variants` takes it for its ``filter``.

    Raises:
        ValueError: it does not.
    """
    _filters(text)
    return text


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return check


def _guidance(text: str) -> dict[str, Any]:
    if text in ("similarity", "reverse", "fixed"):
        return {"direction": text}
    low, high = _range(text)
    return {"guidance": (low, high)}


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _probability(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


_OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda text: {"prompt": _one_of(*PROMPTS)(text)},
    "guidance": _guidance,
    "measure": lambda text: {"measure": _one_of("prompt", "label")(text)},
    "varies": lambda text: {"varies": _one_of("guidance", "strength")(text)},
    "context": lambda text: {"context": _one_of("own", "class", "dataset")(text)},
    "strength": lambda text: {"strength": _range(text)},
    "filter": lambda text: {"filter": filter_name(text)},
    "k": lambda text: {"k": _count(text)},
    "p": lambda text: {"p": _probability(text)},
}
