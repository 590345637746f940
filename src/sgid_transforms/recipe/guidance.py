"""Guidance scale from similarity, and everything else about a variant that follows from its name alone.

A variant is named by (recipe fingerprint, image key, variant number, user seed). Its noise seed and its strength come from
hashes of that name, so they do not depend on the batch, the number of workers, or any random state.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sgid_transforms.errors import RecipeError
from sgid_transforms.recipe.checks import number


@dataclass(frozen=True)
class SimilarityGuidance:
    """Guidance scale that follows how well the prompt describes the image.

    ``scale = low + (high - low) * rank``, where ``rank`` in [0, 1] is the rank of the CLIP cosine of (image, prompt) within
    the data set: raw cosines differ by model, ranks do not. A text that describes its image well may guide it strongly; one
    that does not must not pull the image away from its label. The paper (Li et al., AAAI 2024, arXiv 2302.02070) does not say
    in which direction the scale goes; this one is the project's own choice.

    Args:
        low: scale of the image that its prompt describes worst (best, if ``reverse``); at least 0.
        high: scale of the image that its prompt describes best (worst, if ``reverse``); at least ``low``.
        reverse: let the scale fall with the similarity instead, as DALDA (2024) does for its adapter weight.

    Raises:
        RecipeError: for a value that is not a finite number >= 0, or ``low`` above ``high``.

    Examples:
        >>> Recipe(guidance=SimilarityGuidance(low=3.0, high=8.0)).guidance.low
        3.0
    """

    low: float
    high: float
    reverse: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", number("guidance.low", self.low, minimum=0.0))
        object.__setattr__(self, "high", number("guidance.high", self.high, minimum=0.0))
        if not isinstance(self.reverse, bool):
            raise RecipeError(f"guidance.reverse is {self.reverse!r}; it must be true or false")
        if self.low > self.high:
            raise RecipeError(
                f"guidance.low {self.low} is above guidance.high {self.high}; swap them, "
                "and set reverse=True if the scale should fall as the similarity rises"
            )

    def scale(self, rank: float) -> float:
        """The guidance scale, between ``low`` and ``high``, of an image whose similarity has this rank in [0, 1].

        Raises:
            RecipeError: for a rank outside [0, 1].
        """
        if not 0.0 <= rank <= 1.0:  # also catches NaN
            raise RecipeError(
                f"similarity rank {rank!r} is outside [0, 1]; use rank_similarities to make ranks of raw similarities"
            )
        if self.reverse:
            return max(self.low, self.high - (self.high - self.low) * rank)
        return min(self.high, self.low + (self.high - self.low) * rank)


def guidance_scale(policy: float | SimilarityGuidance, rank: float | None) -> float:
    """The guidance scale that ``policy`` gives an image with this similarity rank.

    Args:
        policy: a number (the same scale for every image) or a `SimilarityGuidance`.
        rank: the image's similarity rank in [0, 1]; ``None`` (never measured) counts as the middle, 0.5.
    """
    if isinstance(policy, SimilarityGuidance):
        return policy.scale(0.5 if rank is None else rank)
    return float(policy)


def rank_similarities(values: Sequence[float | None]) -> list[float | None]:
    """Ranks of similarities in [0, 1]: 0 for the lowest, 1 for the highest, in between by order, not by distance.

    Equal values share the mean of their ranks, so the result does not depend on the order of the data set; a single
    known value gets 0.5. ``None`` and NaN are unknown: their rank is ``None``, and they do not count.
    """
    ranks: list[float | None] = [None] * len(values)
    known = sorted((value, index) for index, value in enumerate(values) if value is not None and not math.isnan(value))
    top = len(known) - 1
    start = 0
    while start <= top:
        end = start
        while end < top and known[end + 1][0] == known[start][0]:
            end += 1
        rank = (start + end) / (2 * top) if top else 0.5
        for _, index in known[start : end + 1]:
            ranks[index] = rank
        start = end + 1
    return ranks


def variant_seed(fingerprint: str, key: str, variant: int, seed: int) -> int:
    """Seed of the noise of one variant, in [0, 2**63), as ``torch.Generator.manual_seed`` takes it.

    Args:
        fingerprint: ``recipe.fingerprint``.
        key: ``image_key(image)``, or the user's own key.
        variant: number of the variant, from 0.
        seed: the user's seed.
    """
    return _hash64("seed", fingerprint, key, variant, seed) >> 1


def variant_strength(strength: float | tuple[float, float], fingerprint: str, key: str, variant: int, seed: int) -> float:
    """Strength of one variant: ``strength`` itself if it is a number, else drawn uniformly from ``[low, high]``.

    The other arguments are those of `variant_seed`.
    """
    if not isinstance(strength, tuple):
        return float(strength)
    low, high = strength
    share = (_hash64("strength", fingerprint, key, variant, seed) >> 11) / 2**53  # all the bits that a float holds
    return min(high, low + (high - low) * share)


def context_draw(fingerprint: str, key: str, variant: int, seed: int) -> int:
    """64 bits that choose one variant's context. The arguments are those of `variant_seed`."""
    return _hash64("context", fingerprint, key, variant, seed)


def _hash64(purpose: str, fingerprint: str, key: str, variant: int, seed: int) -> int:
    """64 bits of SHA-256 over the parts; their lengths keep (``ab``, ``c``) and (``a``, ``bc``) apart."""
    parts = f"{purpose}\0{len(fingerprint)}\0{fingerprint}\0{len(key)}\0{key}\0{variant:d}\0{seed:d}\0" + "0"
    return int.from_bytes(hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()[:8], "big")
