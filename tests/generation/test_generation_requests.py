import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_text
from sgid_transforms.errors import GenerationError
from sgid_transforms.generation.requests import (
    GenerationResult,
    RejectedImageError,
    check_image,
    check_text,
    steps_to_run,
)
from tiny_models import request


def test_zero_steps_says_how_many_are_needed() -> None:
    with pytest.raises(GenerationError) as caught:
        steps_to_run(4, 0.1)
    assert str(caught.value) == "strength 0.1 with 4 steps runs int(0.4) = 0 steps; raise num_inference_steps to at least 10"


@given(st.integers(1, 100), st.floats(0.001, 1.0))
def test_steps_follow_diffusers_and_the_advice_works(steps: int, strength: float) -> None:
    try:
        assert steps_to_run(steps, strength) == int(steps * strength)
    except GenerationError as error:
        needed = int(str(error).rsplit(" ", 1)[1])
        assert steps_to_run(needed, strength) == 1
        with pytest.raises(GenerationError):
            steps_to_run(needed - 1, strength)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_strength_outside_its_range(strength: float) -> None:
    with pytest.raises(GenerationError, match=r"is outside \(0, 1\]"):
        steps_to_run(20, strength)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        "cat.png",
    ],
    ids=lambda image: str(tuple(getattr(image, "shape", "text"))),
)
def test_images_of_another_kind(image: torch.Tensor) -> None:
    with pytest.raises(GenerationError, match="pass a uint8 tensor of shape"):
        check_image(image)


def test_text_beyond_the_limit_is_counted_and_shortened_in_the_message() -> None:
    tokenizer = tiny_text.clip_tokenizer()
    check_text("a" * 75, tokenizer, 77)
    with pytest.raises(
        GenerationError, match=r"the prompt 'a{57}\.\.\.' takes 78 tokens, the text encoder reads 77; shorten it"
    ):
        check_text("a" * 76, tokenizer, 77)


def test_a_result_is_ok_when_it_has_an_image() -> None:
    assert GenerationResult(torch.zeros(3, 2, 2, dtype=torch.uint8)).ok
    assert not GenerationResult(None, reason="nsfw").ok


def test_requests_compare_by_identity() -> None:
    one, other = request(1), request(1)
    assert one != other
    assert len({one, other, one}) == 2


def test_rejection_carries_its_reason() -> None:
    assert RejectedImageError("nsfw", "the safety checker objects").reason == "nsfw"
