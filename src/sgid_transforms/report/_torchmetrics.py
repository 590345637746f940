"""FID, KID and LPIPS by torchmetrics. Their networks' weights are downloaded at first use, and are not part of this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sgid_transforms.errors import ModelLoadError

_BATCH = 32


def fid(originals: Sequence[torch.Tensor], variants: Sequence[torch.Tensor], *, extractor: nn.Module | None = None) -> float:
    """Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500) of two sets of images; 0 for equal sets.

    Biased by the number of images: below some thousands of them prefer :func:`~sgid_transforms.report.metrics.cmmd`.

    Args:
        originals: uint8 images ``(3, H, W)``; sizes may differ with Inception, which scales them to 299 x 299.
        variants: as ``originals``.
        extractor: module that maps uint8 ``(N, 3, H, W)`` to features ``(N, D)``; ``None``: Inception v3, downloaded.

    Raises:
        ModelLoadError: torchmetrics, or Inception's weights, are not there.
        ValueError: fewer than two images in a set.
    """
    _at_least(2, originals, variants)
    feature: Any = 2048 if extractor is None else extractor
    metric = _load("FID", "fid", "FrechetInceptionDistance", feature=feature)
    return float(_compare(metric, originals, variants))


def kid(
    originals: Sequence[torch.Tensor],
    variants: Sequence[torch.Tensor],
    *,
    extractor: nn.Module | None = None,
    subsets: int = 100,
    subset_size: int = 1000,
) -> tuple[float, float]:
    """Kernel inception distance (Bińkowski et al. 2018, arXiv 1801.01401): mean and standard deviation over subsets.

    Unbiased, unlike FID. The subsets are drawn from torch's global random state.

    Args:
        originals: uint8 images ``(3, H, W)``.
        variants: as ``originals``.
        extractor: as for :func:`fid`.
        subsets: how many subsets are drawn.
        subset_size: images in a subset; at most the size of the smaller set is used.

    Raises:
        ModelLoadError, ValueError: as :func:`fid`.
    """
    _at_least(2, originals, variants)
    size = min(subset_size, len(originals), len(variants))
    feature: Any = 2048 if extractor is None else extractor
    metric = _load("KID", "kid", "KernelInceptionDistance", feature=feature, subsets=subsets, subset_size=size)
    mean, deviation = _compare(metric, originals, variants)
    return float(mean), float(deviation)


def lpips(images: Sequence[torch.Tensor], others: Sequence[torch.Tensor], *, net: str = "alex") -> torch.Tensor:
    """Perceptual distance of each image and its counterpart (Zhang et al. 2018, arXiv 1801.03924); 0 for equal images.

    Shape:
        N and N uint8 images ``(3, H, W)``, each pair of one size -> ``(N,)``.

    Args:
        images: one of each pair.
        others: the other one.
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``: the network, whose weights are downloaded.

    Raises:
        ModelLoadError: torchmetrics, or the network's weights, are not there.
        ValueError: the lists differ in length, or a pair in size.
    """
    if len(images) != len(others):
        raise ValueError(f"got {len(images)} images and {len(others)} others; give one for each")
    for image, other in zip(images, others, strict=True):
        if image.shape != other.shape:
            raise ValueError(f"a pair has shapes {tuple(image.shape)} and {tuple(other.shape)}s in size; resize one of them")
    metric = _load("LPIPS", "lpip", "LearnedPerceptualImagePatchSimilarity", net_type=net, reduction="none", normalize=True)
    with torch.inference_mode():
        values = [
            metric(image[None].float() / 255, other[None].float() / 255).reshape(()).cpu()
            for image, other in zip(images, others, strict=True)
        ]
    return torch.stack(values) if values else torch.zeros(0)


def _compare(metric: Any, originals: Sequence[torch.Tensor], variants: Sequence[torch.Tensor]) -> Any:
    with torch.inference_mode():
        for images, real in ((originals, True), (variants, False)):
            for batch in _batches(images):
                metric.update(batch, real=real)
        return metric.compute()


def _batches(images: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Batches of neighbours of one size."""
    for _, group in groupby(images, key=lambda image: tuple(image.shape)):
        yield from torch.split(torch.stack(list(group)), _BATCH)


def _at_least(count: int, *sets: Sequence[torch.Tensor]) -> None:
    for images in sets:
        if len(images) < count:
            raise ValueError(f"a distance of two distributions needs at least {count} images in each set, got {len(images)}")


def _load(name: str, module: str, metric: str, **options: Any) -> Any:
    try:
        # Not from torchmetrics.image itself: that lacks the names where torch-fidelity is missing, though an extractor of
        # the caller's own needs none.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
            return getattr(import_module(f"torchmetrics.image.{module}"), metric)(**options)
    except ImportError as error:  # torchmetrics itself, or torch-fidelity, which holds Inception
        reason = "torchmetrics or its image extra is not installed: pip install 'sgid-transforms[metrics]'"
        raise ModelLoadError(f"{name} cannot be computed: {reason}") from error
    except OSError as error:  # URLError is one, too
        raise ModelLoadError(
            f"{name} cannot be computed: the weights of its network are not in {torch.hub.get_dir()} and could not be "
            f"downloaded ({error}); go online once, or copy that folder from a machine that has them"
        ) from error
