import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sgid_transforms.errors import RecipeError
from sgid_transforms.generation.support import (
    Formats,
    check_resolution,
    limit_tokenizers,
    memory_formats,
    native_resolution,
    resized_floats,
    resized_uint8,
    size_multiple,
    to_uint8,
    working_size,
)
from tiny_families import FAMILIES
from tiny_models import image, sdxl


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([(32, 8), (512, 64), (1024, 32)]))
def test_buckets_keep_area_and_aspect(height: int, width: int, model: tuple[int, int]) -> None:
    resolution, multiple = model
    rows, columns = working_size(height, width, resolution, multiple)
    assert rows % multiple == columns % multiple == 0
    assert rows >= multiple <= columns
    aspect = min(max(height / width, 1 / 4), 4)
    assert abs(rows - resolution * aspect**0.5) <= multiple / 2
    assert abs(columns - resolution / aspect**0.5) <= multiple / 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((375, 500), (448, 576)), ((500, 375), (576, 448)), ((512, 512), (512, 512)), ((10, 1000), (256, 1024))],
)
def test_sizes_at_512(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert working_size(*size, 512, 64) == expected


def test_a_pair_is_taken_as_it_is() -> None:
    assert working_size(100, 300, (64, 128), 64) == (64, 128)


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (4, "resolution 4 is too small for this model; use at least 8"),
        ((16, 20), r"resolution \(16, 20\) cannot be used; give height and width as multiples of 8"),
        ((0, 8), "multiples of 8"),
    ],
)
def test_resolutions_that_cannot_work(resolution: int | tuple[int, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_resolution(resolution, 8)


@pytest.mark.parametrize(
    ("own", "working"),
    [((20, 28), (64, 96)), ((64, 96), (20, 28)), ((3, 700), (32, 96)), ((40, 30), (40, 64)), ((20, 28), (20, 28))],
)
def test_photos_resized_in_blocks_are_the_same_to_the_bit(own, working, monkeypatch) -> None:
    """A photo of 24 megapixels took a gigabyte as floats."""
    monkeypatch.setattr("sgid_transforms.generation.support._BLOCK", 1500)
    photo = image(3, *own)

    def whole(images, size):
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    small = resized_floats(photo, working)
    assert torch.equal(small, whole(photo[None].float().div(255), working))
    assert torch.equal(resized_uint8(small[0], own), to_uint8(whole(small, own))[0])


def test_there_and_back_keeps_a_smooth_picture() -> None:
    pixels = image(3, 20, 28)
    larger = resized_floats(pixels, (64, 96))
    assert larger.shape == (1, 3, 64, 96)
    assert 0 <= larger.min() <= larger.max() <= 1
    assert (resized_uint8(larger[0], (20, 28)).int() - pixels).abs().max() < 13


def test_every_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("family", "resolution", "multiple"),
    [
        ("stable-diffusion-pag", 32, 4),  # 16 latents of 2 pixels; one UNet level below
        ("flux", 128, 2),  # its default of 128 latents, here of one pixel, packed two by two
        ("if", 32, 2),  # pixels
        ("kandinsky22", 32, 4),
        ("kandinsky3", None, 4),  # it does not say
    ],
)
def test_native_resolution_and_multiples(family: str, resolution: int | None, multiple: int) -> None:
    pipeline = FAMILIES[family]()
    assert (native_resolution(pipeline), size_multiple(pipeline)) == (resolution, multiple)


def test_memory_formats_follow_the_device() -> None:
    last, first = torch.channels_last, torch.contiguous_format
    assert memory_formats(None, "cpu") == Formats(unet=first, vae=last)
    assert memory_formats(None, "cuda:1") == memory_formats(True, "cpu") == Formats(last, last)
    assert memory_formats(False, "cuda") == Formats(first, first)


def test_tokenizers_without_a_limit_get_that_of_their_encoder() -> None:
    pipeline = sdxl()
    pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length = 10**30, 20
    limit_tokenizers(pipeline)
    assert (pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length) == (77, 20)
