"""Do variants keep their label, and how different are they: by a classifier that took no part in making or filtering them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.report.metrics import mean_pairwise_distance, vendi_score

_TOOLS = Path(__file__).parents[2] / "tools" / "train_tiny"

Judge = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
"""uint8 images ``(3, H, W)`` -> class ``(N,)``, and features ``(N, D)``."""


@dataclass(frozen=True)
class Views:
    """What several pictures of each of N originals are like.

    Args:
        agreement: share of pictures whose class, by the judge, is the label.
        distance: mean cosine distance between two pictures of one original, averaged over the originals.
        vendi: effective number of different pictures among one picture of each original.
    """

    agreement: float
    distance: float
    vendi: float


def load_judge(path: str, classes: Sequence[str]) -> Judge:
    """A judge from the weights of `tools/train_tiny/classifier.py` (a safetensors file, CIFAR-10 only), or ``clip:MODEL``.

    Raises:
        ValueError: the classes are not those that the file's classifier knows.
    """
    if path.startswith("clip:"):
        return _clip_judge(CLIPScorer(path.removeprefix("clip:")).load(), classes)
    if str(_TOOLS) not in sys.path:
        sys.path.insert(0, str(_TOOLS))
    from safetensors.torch import load_file

    import classifier
    from data import CLASSES

    if tuple(classes) != CLASSES:
        raise ValueError(f"{path} judges CIFAR-10's classes, not {', '.join(classes)}; use clip:MODEL")
    model = classifier.Classifier()
    model.load_state_dict(load_file(path))
    model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    kept: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))

    def judge(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        kept.clear()
        scores = torch.cat([model(classifier.normalize(x)) for x in torch.stack(list(images)).split(500)])
        return scores.argmax(1), F.normalize(torch.cat(kept), dim=1)

    return judge


def _clip_judge(scorer: CLIPScorer, classes: Sequence[str]) -> Judge:
    def judge(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = scorer.image_features(images)
        return scorer.probabilities(features, list(classes)).argmax(1).cpu(), features

    return judge


def judge_views(judge: Judge, views: Sequence[Sequence[Tensor]], labels: Sequence[int]) -> Views:
    """Figures of ``views``: for each original a list of pictures, as many for each.

    Raises:
        ValueError: there are no originals, or their numbers of pictures differ, or are 0.
    """
    each = len(views[0]) if views else 0
    if each == 0 or any(len(pictures) != each for pictures in views):
        raise ValueError("judge_views needs as many pictures of each original, at least 1")
    classes, features = judge([picture for pictures in views for picture in pictures])
    wanted = torch.tensor(labels).repeat_interleave(each)
    grouped = features.unflatten(0, (-1, each))
    distances = [mean_pairwise_distance(group) for group in grouped] if each > 1 else [0.0]
    return Views(
        agreement=float((classes == wanted).float().mean()),
        distance=sum(distances) / len(distances),
        vendi=vendi_score(grouped[:, 0]),
    )


def randaugment_views(images: Sequence[Tensor], each: int, seed: int = 0) -> list[list[Tensor]]:
    """``each`` pictures of every image by torchvision's RandAugment with its defaults."""
    transform = v2.RandAugment()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [[transform(image) for _ in range(each)] for image in images]
