"""One key for one picture, in whatever form it is held."""

import hashlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from sgid_transforms.images.keys import image_key, to_uint8_chw

SIDES = st.integers(1, 9)
RGB = hnp.arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3)))
GREY = hnp.arrays(np.uint8, st.tuples(SIDES, SIDES))

CONVERTIBLE = ["1", "L", "P", "PA", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "RGBa"]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _image(mode: str, size: tuple[int, int] = (6, 5)) -> Image.Image:
    """A picture with varied pixels in this mode."""
    width, height = size
    values = np.random.default_rng(1).integers(0, 256, (height, width, 4), np.uint8)
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(values[..., 0].astype(dtype) * (200 if mode == "I;16" else 1))
    if mode in ("PA", "RGBa"):
        return Image.fromarray(values, "RGBA").convert({"PA": "P", "RGBa": "RGBa"}[mode]).convert(mode)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, size, values.tobytes())
    return Image.fromarray(np.ascontiguousarray(values[..., :3])).convert(mode)


class TestSamePicture:
    @given(RGB)
    def test_in_every_form(self, array: Any) -> None:
        image, tensor = Image.fromarray(array), _tensor(array)
        key = image_key(image)
        assert image_key(tensor) == key
        assert image_key(tv_tensors.Image(tensor)) == key
        assert (
            image_key(tensor.contiguous(memory_format=torch.contiguous_format).permute(1, 2, 0).contiguous().permute(2, 0, 1))
            == key
        )
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            assert image_key(tensor.to(torch.float64).div(255).to(dtype)) == key, dtype
        assert image_key(F.to_dtype(tensor, torch.float32, scale=True)) == key
        assert image_key(F.pil_to_tensor(image)) == key
        assert image_key(F.to_pil_image(tensor)) == key

    @given(GREY)
    def test_grey_and_rgb_with_equal_channels(self, array: Any) -> None:
        key = image_key(Image.fromarray(np.stack([array] * 3, -1)))
        plane = torch.from_numpy(array.copy())[None]
        assert image_key(Image.fromarray(array)) == key
        assert image_key(plane) == key
        assert image_key(plane / 255) == key
        assert image_key(tv_tensors.Image(plane)) == key
        assert image_key(plane.expand(3, -1, -1)) == key

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_all_levels_survive_floats(self, dtype: torch.dtype) -> None:
        levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        assert torch.equal(to_uint8_chw((levels / 255).to(dtype))[0], levels[0])

    @pytest.mark.parametrize("mode", CONVERTIBLE)
    def test_any_mode_is_its_rgb_conversion(self, mode: str) -> None:
        image = _image(mode)
        assert image.mode == mode
        rgb = image.convert("RGB")
        assert image_key(image) == image_key(rgb) == image_key(F.pil_to_tensor(rgb))
        assert torch.equal(to_uint8_chw(image), F.pil_to_tensor(rgb))

    @pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["colour", "table"])
    def test_transparent_palette_neither_warns_nor_changes_colours(self, transparency: int | bytes) -> None:
        image = _image("P")
        image.info["transparency"] = transparency
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rgb = image.convert("RGB")
        assert image_key(image) == image_key(rgb)

    def test_alpha_does_not_count(self) -> None:
        opaque = _image("RGB").convert("RGBA")
        clear = opaque.copy()
        clear.putalpha(7)
        assert image_key(clear) == image_key(opaque) == image_key(_image("RGB"))

    def test_views_and_gradients(self) -> None:
        whole = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
        assert image_key(whole[:, 1:5, ::2]) == image_key(whole[:, 1:5, ::2].clone())
        leaf = (whole / 255).requires_grad_()
        assert image_key(leaf) == image_key(torch.nn.Parameter(leaf.detach())) == image_key(whole)

    def test_follows_the_documented_format(self) -> None:
        """Keys name files in users' stores: this format is for good."""
        expected = hashlib.sha256(b"3x2:" + bytes([1, 2, 3] * 6)).hexdigest()[:32]
        assert image_key(Image.new("RGB", (3, 2), (1, 2, 3))) == expected == "fed3b66615dab28d7e09f93e27d4c028"


class TestOtherPicture:
    @given(RGB, st.data())
    @settings(max_examples=50)
    def test_one_changed_byte(self, array: Any, data: Any) -> None:
        other = array.copy()
        index = tuple(data.draw(st.integers(0, side - 1)) for side in array.shape)
        other[index] ^= data.draw(st.integers(1, 255))
        assert image_key(Image.fromarray(other)) != image_key(Image.fromarray(array))

    def test_same_bytes_in_another_size(self) -> None:
        raw = bytes(range(48))
        sizes = [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)]
        assert len({image_key(Image.frombytes("RGB", size, raw)) for size in sizes}) == len(sizes)

    def test_transposed_and_channel_swapped(self) -> None:
        tensor = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
        assert len({image_key(tensor.permute(order)) for order in [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)]}) == 4


class TestToUint8:
    def test_rgb_tensor_is_not_copied_and_no_input_is_written_to(self) -> None:
        tensor = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
        assert to_uint8_chw(tensor) is tensor
        floats = tensor / 255
        before, version = floats.clone(), floats._version
        to_uint8_chw(floats)
        image_key(floats)
        assert floats._version == version
        assert torch.equal(floats, before)

    def test_returns_a_plain_tensor(self) -> None:
        result = to_uint8_chw(tv_tensors.Image(torch.zeros(1, 4, 5, dtype=torch.uint8)))
        assert type(result) is torch.Tensor
        assert (result.shape, result.dtype) == ((3, 4, 5), torch.uint8)

    def test_result_of_a_pil_image_is_writable_and_its_own(self) -> None:
        image = _image("RGB")
        key = image_key(image)
        to_uint8_chw(image).zero_()
        assert image_key(image) == key


class TestRefused:
    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (np.zeros((4, 4, 3), np.uint8), TypeError, "expected a PIL image or a .* tensor, got ndarray"),
            ("cat.jpg", TypeError, "got str"),
            (None, TypeError, "got NoneType"),
            (tv_tensors.Mask(torch.zeros(1, 4, 4, dtype=torch.uint8)), TypeError, "got a tv_tensors.Mask"),
            (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "dtype torch.int64 is not an image"),
            (torch.zeros(3, 4, 4, dtype=torch.bool), TypeError, "dtype torch.bool is not an image"),
            (torch.zeros(2, 3, 4, 4), ValueError, r"shape \(2, 3, 4, 4\) .* one at a time"),
            (torch.zeros(4, 4), ValueError, r"shape \(4, 4\) is not one RGB or grey image"),
            (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"shape \(4, 4, 3\) is not one"),
            (torch.zeros(3, 0, 4), ValueError, "image of 4 x 0 pixels is empty"),
            (Image.new("RGB", (0, 4)), ValueError, "image of 0 x 4 pixels is empty"),
            (torch.full((3, 2, 2), 255.0), ValueError, r"values from 255 to 255, outside \[0, 1\]"),
            (
                torch.tensor([[[-2.0, 1.0]]]),
                ValueError,
                r"values from -2 to 1, outside \[0, 1\]; take the image before Normalize",
            ),
            (torch.tensor([[[float("nan"), 1.0]]]), ValueError, "nan"),
            (Image.new("La", (2, 2)), ValueError, "image of mode 'La' cannot be converted to RGB"),
        ],
    )
    def test_in_a_sentence(self, image: Any, error: type[Exception], message: str) -> None:
        for function in (image_key, to_uint8_chw):
            with pytest.raises(error, match=message) as caught:
                function(image)
            assert "\n" not in str(caught.value)
