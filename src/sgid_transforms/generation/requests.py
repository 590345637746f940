"""A generator's requests and results, and the protocol that every way of running a model follows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from sgid_transforms.errors import GenerationError


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One variant of one image.

    Requests compare by identity, since they carry a tensor.

    Args:
        image: uint8 ``(3, H, W)`` RGB; the result has the same height and width.
        prompt: the text that guides the variant.
        negative_prompt: what to steer away from; an empty text stands for the model's own unconditional embedding.
        strength: share of the noise schedule that is run, in (0, 1].
        guidance_scale: classifier-free guidance scale; at 1 or below only the conditional half is evaluated.
        seed: seed of this request's own random numbers, in [0, 2**64).
        label: class name, for filters that check whether the variant still shows it.
        id: free text that names the request in messages.

    Examples:
        >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        >>> GenerationRequest(image, "a photo of a cat", strength=0.7, guidance_scale=5.0, seed=1).strength
        0.7
    """

    image: torch.Tensor
    prompt: str
    negative_prompt: str = ""
    strength: float = 0.5
    guidance_scale: float = 5.0
    seed: int = 0
    label: str | None = None
    id: str = ""


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The outcome of one request: an image, or the reason why there is none.

    Args:
        image: uint8 ``(3, H, W)``, as large as the request's image, or ``None``.
        reason: why there is no image: ``nan``, ``black``, ``constant``, ``nsfw``, ``label``, ``too_similar``,
            ``too_different`` or ``error: ...``; ``None`` for an accepted image.
        seed: seed of the last attempt.
        strength: strength of the last attempt.
        attempt: number of the last attempt, from 0.
        rejected: reasons of all rejected attempts, in order.
        label_score: probability of the label according to the filter, in [0, 1], if it was checked.
        image_similarity: similarity to the original according to the filter, if it was checked.
        unet_evaluations: model evaluations (rows, not calls) that all attempts of this request took.
        failed: whether there is no image because of an error, which may be retried, and not because of a rejection, which would
            only repeat itself.

    Examples:
        >>> GenerationResult(None, "every attempt was rejected", rejected=("label", "label")).ok
        False
    """

    image: torch.Tensor | None
    reason: str | None = None
    seed: int = 0
    strength: float = 0.0
    attempt: int = 0
    rejected: tuple[str, ...] = ()
    label_score: float | None = None
    image_similarity: float | None = None
    unet_evaluations: int = 0
    failed: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is an image."""
        return self.image is not None


class RejectedImageError(GenerationError):
    """The model ran, but its image is not usable; ``reason`` is one of the short reasons of `GenerationResult`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @classmethod
    def not_finite(cls, request: GenerationRequest) -> RejectedImageError:
        """The rejection of an image with NaN pixels."""
        return cls("nan", f"the model returned NaN for {f'request {request.id!r}' if request.id else 'a request'}")


Pull = Callable[[int], Sequence[GenerationRequest]]
"""Hands over up to the given number of waiting requests, or fewer if fewer wait; it never waits for more. When it returns none
and all work is done, a stream ends."""

Answers = list[tuple[GenerationRequest, torch.Tensor | Exception]]
"""Requests that are done, each with its image, uint8 ``(3, H, W)``, or the exception that it raised."""


@runtime_checkable
class Engine(Protocol):
    """Runs requests through one model. An engine belongs to one thread at a time."""

    batch_size: int

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose limit binds prompts, or ``None`` if the model has none."""

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt in tokens, start and end included, or ``None`` if there is no limit."""

    def run(self, requests: Sequence[GenerationRequest]) -> list[torch.Tensor | Exception]:
        """One entry per request, in order: a uint8 ``(3, H, W)`` image, or the exception that this request raised.

        A request that fails never affects the others. Only errors that concern no single request are raised.
        """

    def stream(self, pull: Pull) -> Iterator[Answers]:
        """Pull requests whenever there is room for them, and yield what is done, in no particular order; it may be nothing, so
        that the caller can do something else between two steps."""

    def evaluations(self, request: GenerationRequest) -> int:
        """Model evaluations (rows of a batch) that this request takes, before it is run."""


_T = TypeVar("_T")


def pull_from(requests: Sequence[_T]) -> Callable[[int], list[_T]]:
    """Hands over a fixed list, in order."""
    waiting = deque(requests)
    return lambda room: [waiting.popleft() for _ in range(min(room, len(waiting)))]


def answer_all(
    stream: Callable[[Pull], Iterator[list[tuple[GenerationRequest, _T]]]], requests: Sequence[GenerationRequest]
) -> list[_T]:
    """A stream's answers to a fixed list, in order; duplicate requests are run once."""
    answers = {request: answer for group in stream(pull_from(list(dict.fromkeys(requests)))) for request, answer in group}
    return [answers[request] for request in requests]


def in_batches(run: Callable[[Sequence[Any]], Sequence[Any]], size: int, pull: Callable[[int], Sequence[Any]]) -> Iterator[Any]:
    """Turn a function that answers a list of requests into a stream. Each batch is finished before the next begins."""
    while batch := pull(size):
        answers = run(batch)
        if len(answers) != len(batch):
            raise GenerationError(f"{len(batch)} requests got {len(answers)} answers; the generator must answer each")
        yield list(zip(batch, answers, strict=True))


def check_strength(strength: float) -> None:
    """Raise `GenerationError` unless ``strength`` is in (0, 1]."""
    if not 0 < strength <= 1:
        raise GenerationError(f"strength {strength:g} is outside (0, 1]; use a strength above 0 and at most 1")


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """Number of denoising steps of an image-to-image run, ``int(num_inference_steps * strength)`` as in diffusers.

    Raises:
        GenerationError: strength is outside (0, 1], or so low that no step is left.
    """
    check_strength(strength)
    steps = min(int(num_inference_steps * strength), num_inference_steps)
    if steps < 1:
        # The smallest number of steps is searched, not computed: 1 / strength is a float and may round either way.
        needed = next(n for n in range(max(int(1 / strength) - 1, 1), 2**31) if int(n * strength) >= 1)
        raise GenerationError(
            f"strength {strength:g} with {num_inference_steps} steps runs int({num_inference_steps * strength:.3g}) = 0 steps; "
            f"raise num_inference_steps to at least {needed}"
        )
    return steps


def check_image(image: torch.Tensor) -> None:
    """Raise `GenerationError` unless ``image`` is uint8 ``(3, H, W)`` with at least one pixel."""
    if not isinstance(image, torch.Tensor):
        raise GenerationError(f"a request's image is a {type(image).__name__}; pass a uint8 tensor of shape (3, H, W)")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise GenerationError(
            f"a request's image has shape {tuple(image.shape)} and dtype {image.dtype}; pass a uint8 tensor of shape (3, H, W)"
        )


def check_text(text: str, tokenizer: Any, max_tokens: int, name: str = "prompt") -> None:
    """Raise `GenerationError` if ``text`` takes more than ``max_tokens`` tokens, start and end included."""
    # verbose=False: the tokenizer would log its own, vaguer warning
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if count > max_tokens:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise GenerationError(f"the {name} {shown!r} takes {count} tokens, the text encoder reads {max_tokens}; shorten it")
