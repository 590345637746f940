import pytest
import torch
from PIL import Image

from sgid_transforms.report import contact_sheet


def solid(colour, height=32, width=32):
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


def test_every_image_shows_in_its_cell_with_its_own_pixels():
    sheet = contact_sheet([[solid((255, 0, 0)), solid((0, 255, 0))], [Image.new("L", (32, 32), 7)]], cell=64)
    assert sheet.size == (2 * 70 + 6, 2 * 70 + 6)
    assert sheet.getpixel((6, 6)) == sheet.getpixel((69, 69)) == (255, 0, 0)
    assert sheet.getpixel((76 + 32, 6 + 32)) == (0, 255, 0)
    assert sheet.getpixel((6 + 32, 76 + 32)) == (7, 7, 7)


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_shrunk_with_their_aspect_ratio():
    checker = (torch.arange(4).view(1, 2, 2) % 2 * 255).to(torch.uint8).expand(3, 2, 2)
    small = contact_sheet([[checker]], cell=65)  # 32 times, centred
    assert {small.getpixel((x, 20)) for x in range(6, 70)} <= {(0, 0, 0), (255, 255, 255)}
    wide = contact_sheet([[solid((9, 9, 9), height=50, width=200)]], cell=100)
    column = [wide.getpixel((50, y)) for y in range(wide.height)]
    assert column.count((9, 9, 9)) == 25


def test_titles_take_space_and_are_cut_to_it():
    plain = contact_sheet([[solid((9, 9, 9))]])
    titled = contact_sheet(
        [[solid((9, 9, 9))]], row_titles=["a caption that is far too long for one cell " * 5], column_titles=["x"]
    )
    assert titled.height == plain.height + 40
    assert titled.width == plain.width


def test_an_empty_cell_is_grey():
    sheet = contact_sheet([[solid((9, 9, 9)), None]], cell=32)
    assert sheet.getpixel((44 + 16, 6 + 16)) == (225, 225, 225)


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [([], {}, "at least one image"), ([[]], {}, "at least one image"),
     ([[solid((0, 0, 0))]], {"row_titles": ["a", "b"]}, "2 row titles for 1 rows"),
     ([[solid((0, 0, 0))]], {"column_titles": ["a", "b"]}, "2 column titles for 1 columns")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(rows, titles, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(rows, **titles)
