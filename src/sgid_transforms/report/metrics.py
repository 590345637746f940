"""Metrics of sets of images: how far apart two sets are, and how diverse one set is.

They work on embeddings ``(N, D)`` of any model, such as those of `image_features`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Protocol

import torch
from torch.nn import functional as F

_BLOCK = 4096


class Scorer(Protocol):
    """What an image-text model must offer; ``CLIPScorer`` is one."""

    def image_features(self, images: Sequence[torch.Tensor], /) -> torch.Tensor:
        """Embeddings ``(N, D)`` of unit length of uint8 images ``(3, H, W)``."""

    def text_features(self, texts: Sequence[str], /) -> torch.Tensor:
        """Embeddings ``(N, D)`` of unit length of texts."""

    def probabilities(self, image_features: torch.Tensor, labels: Sequence[str], /) -> torch.Tensor:
        """Probability ``(N, L)`` of each label for image embeddings, by a softmax over the labels."""


def cmmd(features: torch.Tensor, others: torch.Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Distance between two image sets in CLIP's space: squared maximum mean discrepancy (Gaussian kernel), times ``scale``.

    0 for equal sets. Unlike FID, it assumes no normal distribution and does not need thousands of images. The estimator is that
    of the paper's code. Its expectation is above 0 for two samples of one distribution, so compare it with the figure for two
    halves of the originals. Figures of different CLIP models cannot be compared (the paper uses ViT-L/14 at 336 px).

    Source: Jayasumana et al. 2024, "Rethinking FID", arXiv 2401.09603.

    Args:
        features: embeddings ``(N, D)``; scaled to unit length here, as in the paper's code.
        others: embeddings ``(M, D)``.
        sigma: width of the kernel.
        scale: makes the figure easier to read.

    Raises:
        ValueError: not two non-empty matrices of the same width.
    """
    x, y = _unit(features), _unit(others)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"embeddings of {x.shape[1]} and {y.shape[1]} numbers are of different models; use one for both sets")
    distance = _mean_kernel(x, x, sigma) + _mean_kernel(y, y, sigma) - 2 * _mean_kernel(x, y, sigma)
    return max(0.0, scale * distance)


def vendi_score(features: torch.Tensor) -> float:
    """Effective number of different images: 1 for N equal ones, N for N that have nothing in common.

    It is the exponential of the entropy of the eigenvalues of ``K / N``, with cosines as the kernel ``K``. It grows with N, so
    compare sets of the same size.

    Source: Friedman and Dieng 2023, "The Vendi Score", arXiv 2210.02410.

    Args:
        features: embeddings ``(N, D)``; scaled to unit length here.

    Raises:
        ValueError: not a non-empty matrix.
    """
    x = _unit(features)
    # X X^T and X^T X share their eigenvalues but for zeros: take the smaller one.
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    shares = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return float(torch.special.entr(shares / shares.sum()).sum().exp())


def mean_pairwise_distance(features: torch.Tensor) -> float:
    """Mean cosine distance, ``1 - cosine`` in [0, 2], over all pairs of different rows; 0 for equal images.

    Args:
        features: embeddings ``(N, D)`` with N of at least 2; scaled to unit length here.

    Raises:
        ValueError: not a matrix of at least two rows.
    """
    x = _unit(features)
    n = len(x)
    if n < 2:
        raise ValueError(f"a distance between pairs needs at least 2 images, got {n}")
    # The sum of all cosines is the squared length of the sum of all rows: no N x N matrix is needed.
    cosines = float(x.sum(0).square().sum()) - n
    return min(2.0, max(0.0, 1 - cosines / (n * (n - 1))))


def human_consistency(seen: Sequence[bool]) -> tuple[float, float, float]:
    """Share of pictures in which people saw the label, with its 95 % interval (Wilson's), all in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        seen: for each answer, whether it was the label; at least one.

    Raises:
        ValueError: there is no answer.

    Examples:
        >>> [round(value, 2) for value in human_consistency([True] * 9 + [False])]
        [0.9, 0.6, 0.98]
    """
    n = len(seen)
    if not n:
        raise ValueError("there are no answers to take the share of")
    share, z = sum(seen) / n, NormalDist().inv_cdf(0.975)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _mean_kernel(x: torch.Tensor, y: torch.Tensor, sigma: float) -> float:
    # For rows of unit length |a - b|^2 = 2 - 2ab. Blocks bound the memory: 4096 x M doubles at a time.
    total = sum(float(torch.exp((rows @ y.T - 1) / sigma**2).sum()) for rows in torch.split(x, _BLOCK))
    return total / (len(x) * len(y))


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit length in double precision: differences of means near 1 would lose all digits in float32."""
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"embeddings of shape {tuple(features.shape)} are not (N, D) with at least one row; stack them")
    return F.normalize(features.detach().cpu().double(), dim=1)
