"""A generator, captioner and scorer that cost nothing, for the tests of everything around them."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe.recipe import Recipe

CLASSES = ["cat", "dog", "frog"]


class FakeGenerator:
    """Shifts the colours of each image by an amount that its seed decides; notes the size of each batch in a file."""

    def __init__(self, log: str | None, seconds: float, reject: bool, fail: bool, hold: str | None) -> None:
        self.log, self.seconds, self.reject, self.fail, self.hold = log, seconds, reject, fail, hold

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {len(requests)} {requests[0].image.device.type}\n")
        if self.fail:
            raise ValueError("the generator is broken")
        while self.hold is not None and not os.path.exists(self.hold):
            time.sleep(0.01)
        time.sleep(self.seconds * len(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: GenerationRequest) -> GenerationResult:
        if self.reject:
            return GenerationResult(None, "black", request.seed, request.strength, rejected=("black", "black"))
        image = (request.image.to(torch.int16) + 1 + request.seed % 251).remainder(256).to(torch.uint8)
        return GenerationResult(image, None, request.seed, request.strength)


def _make(recipe: Recipe, device: str, **options: Any) -> FakeGenerator:
    return FakeGenerator(**options)


def fake_generator(
    log: Any = None, *, seconds: float = 0.0, reject: bool = False, fail: bool = False, hold: Any = None
) -> "partial[FakeGenerator]":
    """A factory as ``SGIDAugment(generator=...)`` takes it.

    Args:
        log: file in which each batch is noted.
        seconds: that one image takes.
        reject: filter everything out.
        fail: raise.
        hold: file without which no batch ends.
    """
    paths = {"log": log and str(log), "hold": hold and str(hold)}
    return partial(_make, seconds=seconds, reject=reject, fail=fail, **paths)


class FakeCaptioner:
    """Says how bright an image is, and counts what it was asked."""

    id = "fake"

    def __init__(self) -> None:
        self.seen = 0

    def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
        self.seen += len(images)
        return [f"brightness {int(image.float().mean())}" for image in images]


class FakeScorer:
    """Scores by the length of the text."""

    def image_text(self, images: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([len(text) / 100 for text in texts])


def batches(log: Any) -> list[int]:
    """The sizes of the batches that a fake generator made."""
    return [int(line.split()[1]) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []


def picture(number: int, size: int = 32) -> torch.Tensor:
    """A distinct uint8 image (3, size, size)."""
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def pil_picture(number: int, size: int = 32) -> Image.Image:
    """The same as a PIL image."""
    return Image.fromarray(picture(number, size).permute(1, 2, 0).numpy())


OWN_CAPTIONS = Recipe(caption_from="own")
"""Needs no contexts of other images, so records are enough that no `prepare` wrote."""


def captioned(*images: Any, label: str = "cat") -> list[CaptionRecord]:
    """Caption records for images."""
    return [CaptionRecord(image_key(image), "a caption", label=label, similarity=0.3, rank=0.5) for image in images]


def image_folder(root: Path, per_class: int = 4, size: int = 32, suffix: str = "png") -> Path:
    """An ImageFolder on disk; item ``n`` is ``picture(n)``."""
    number = 0
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for _ in range(per_class):
            pil_picture(number, size).save(root / name / f"{number:03}.{suffix}")
            number += 1
    return root
