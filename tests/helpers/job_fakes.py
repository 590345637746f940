"""Models that take no time: what they make depends on what they are asked for, and on nothing else."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgid_transforms.bulk import Models
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult


class FakeCaptioner:
    """Captions an image by its mean colour."""

    id = "fake captioner"

    def __init__(self, tell: Callable[[str], None] = lambda event: None) -> None:
        self.tell = tell
        self.captioned = 0

    def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
        self.tell("caption")
        self.captioned += len(images)
        return ["a thing of colour " + " ".join(str(round(float(c.float().mean()))) for c in image) for image in images]


class FakeScorer:
    """Scores an image by its brightness."""

    def image_text(self, images: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
        assert len(images) == len(texts)
        return torch.tensor([float(image.float().mean()) / 255 for image in images])


class FakeGenerator:
    """Makes noise of the request's seed, shifted by its prompt and its guidance scale."""

    tokenizer = None

    def __init__(
        self, tell: Callable[[str], None] = lambda event: None, verdict: Callable[[str], str | None] | None = None
    ) -> None:
        self.tell = tell
        self.verdict = verdict
        self.made: list[str] = []

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        results = []
        for request in requests:
            self.tell("variant " + request.id)
            self.made.append(request.id)
            reason = self.verdict(request.id) if self.verdict else None
            text = zlib.crc32(request.prompt.encode())
            noise = torch.Generator().manual_seed(request.seed % 2**31 + round(1000 * request.guidance_scale) + text)
            image = torch.randint(0, 256, tuple(request.image.shape), dtype=torch.uint8, generator=noise)
            given = (request.seed, request.strength)
            failed = bool(reason and reason.startswith("error"))
            results.append(
                GenerationResult(None, reason, *given, failed=failed) if reason else GenerationResult(image, None, *given)
            )
        self.tell("batch")
        return results


def fake_models(
    generator: FakeGenerator | None = None, captioner: FakeCaptioner | None = None, batch_size: int = 4, **options: Any
) -> Models:
    """Models for a job, all fake."""
    made = generator or FakeGenerator()
    return Models(
        captioner=captioner or FakeCaptioner(),
        scorer=FakeScorer(),
        generator=lambda recipe, device, **given: made,
        batch_size=batch_size,
        options=options,
    )
