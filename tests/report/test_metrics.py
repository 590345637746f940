import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.report import metrics

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def picture(level, size=8):
    return torch.full((3, size, size), level, dtype=torch.uint8)


COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourScorer:
    """An honest, tiny stand-in for CLIP: an image's embedding is its mean colour, a text's the colour that it names."""

    def image_features(self, images):
        return F.normalize(torch.stack([image.float().mean((1, 2)) for image in images]), dim=1)

    def text_features(self, texts):
        return F.normalize(torch.tensor([COLOURS[text.split()[-1]] for text in texts]), dim=1)

    def probabilities(self, image_features, labels):
        return (10 * image_features @ self.text_features(labels).T).softmax(1)


def plain(red, green, blue, size=8):
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)


@given(n=SIZES, d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_vendi_is_1_for_equal_rows_and_between_1_and_their_number_for_any(n, d, seed):
    x = rows(n, d, seed)
    assert metrics.vendi_score(x[:1].expand(n, d)) == pytest.approx(1)
    assert 1 - 1e-9 <= metrics.vendi_score(x) <= min(n, d) + 1e-9
    assert metrics.vendi_score(torch.cat([x, x])) == pytest.approx(metrics.vendi_score(x))  # copies add nothing
    assert metrics.vendi_score(7 * x.flip(0)) == pytest.approx(metrics.vendi_score(x))  # nor do order and length


@given(n=SIZES, extra=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_vendi_and_pairwise_distance_of_orthogonal_rows(n, extra):
    x = torch.eye(n, n + extra)
    assert metrics.vendi_score(x) == pytest.approx(n)
    if n > 1:
        assert metrics.mean_pairwise_distance(x) == pytest.approx(1)


@given(n=st.integers(2, 12), d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_pairwise_distance_is_the_mean_over_all_pairs(n, d, seed):
    x = F.normalize(rows(n, d, seed).double(), dim=1)
    pairs = [1 - float(x[i] @ x[j]) for i in range(n) for j in range(i)]
    assert metrics.mean_pairwise_distance(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
    assert metrics.mean_pairwise_distance(x[:1].expand(n, d)) == pytest.approx(0, abs=1e-9)


def test_pairwise_distance_of_opposite_rows_is_2():
    assert metrics.mean_pairwise_distance(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(2)


@given(n=SIZES, m=SIZES, d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_cmmd_is_a_symmetric_distance_that_is_0_for_one_set_in_any_order(n, m, d, seed):
    x, y = rows(n, d, seed), rows(m, d, seed + 1)
    assert metrics.cmmd(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert metrics.cmmd(x, torch.cat([x, x])) == pytest.approx(0, abs=1e-6)
    assert metrics.cmmd(x, y) == pytest.approx(metrics.cmmd(y, x), abs=1e-6)
    assert metrics.cmmd(x, y) >= 0


def test_cmmd_follows_the_papers_formula_and_grows_with_the_shift():
    x, y = F.normalize(rows(30, 6, 0).double(), dim=1), F.normalize(rows(20, 6, 1).double() + 1, dim=1)
    kernel = [torch.exp(-torch.cdist(a, b).square() / (2 * 10.0**2)).mean() for a, b in ((x, x), (y, y), (x, y))]
    assert metrics.cmmd(x, y) == pytest.approx(1000 * float(kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-6)
    shifts = [metrics.cmmd(rows(200, 6, 2), rows(200, 6, 3) + shift) for shift in (0.0, 0.5, 1.0)]
    assert shifts == sorted(shifts)
    assert shifts[2] > 10 * shifts[0]


def test_large_sets_are_summed_in_blocks(monkeypatch):
    x, y = rows(50, 4, 0), rows(33, 4, 1)
    whole = metrics.cmmd(x, y)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert metrics.cmmd(x, y) == pytest.approx(whole, rel=1e-9)


def test_similarities_and_agreement_come_pair_by_pair():
    images = [plain(200, 0, 0), plain(0, 90, 0, size=5), plain(0, 200, 10)]
    scorer = ColourScorer()
    cosines = metrics.image_text_similarity(images, ["red", "green", "blue"], scorer)
    assert cosines.tolist() == pytest.approx([1, 1, 0.05], abs=1e-2)
    assert metrics.image_image_similarity(images, images[::-1], scorer).tolist() == pytest.approx([0, 1, 0], abs=1e-2)
    agrees = metrics.label_agreement(images, ["red", "green", "blue"], ["blue", "green", "red"], scorer)
    assert agrees.tolist() == [True, True, False]
    assert agrees.dtype == torch.bool


def test_no_images_have_no_similarities():
    assert metrics.image_text_similarity([], [], ColourScorer()).shape == (0,)
    assert metrics.image_image_similarity([], [], ColourScorer()).shape == (0,)
    assert metrics.label_agreement([], [], ["red", "blue"], ColourScorer()).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.vendi_score(torch.zeros(0, 4)), r"shape \(0, 4\)"),
        (lambda: metrics.vendi_score(torch.zeros(4)), r"shape \(4,\)"),
        (lambda: metrics.cmmd(torch.ones(2, 3), torch.ones(2, 4)), "3 and 4 numbers"),
        (lambda: metrics.mean_pairwise_distance(torch.ones(1, 4)), "at least 2 images, got 1"),
        (lambda: metrics.image_text_similarity([picture(1)], [], ColourScorer()), "1 images and 0 texts"),
        (lambda: metrics.image_image_similarity([picture(1)], [], ColourScorer()), "1 images and 0 others"),
        (lambda: metrics.label_agreement([picture(1)], ["red"], ["red", "red"], ColourScorer()), "at least two"),
        (lambda: metrics.label_agreement([picture(1)], ["pink"], ["red", "blue"], ColourScorer()), "'pink' is none of the 2"),
        (lambda: metrics.fid([picture(1)], [picture(1), picture(2)]), "at least 2 images in each set, got 1"),
        (lambda: metrics.lpips([picture(1)], []), "1 images and 0 others"),
        (lambda: metrics.lpips([picture(1)], [picture(1, size=9)]), "has shapes .* resize"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Colours(torch.nn.Module):
    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3))


def test_fid_and_kid_with_an_extractor_of_ones_own_need_no_download():
    pytest.importorskip("torchmetrics")
    images = list(torch.randint(0, 200, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    brighter = [image + 50 for image in images]
    assert metrics.fid(images, images, extractor=Colours()) == pytest.approx(0, abs=1e-3)
    assert metrics.fid(images, brighter, extractor=Colours()) == pytest.approx(3 * 50**2, rel=1e-3)  # the means' distance
    torch.manual_seed(0)
    same, _ = metrics.kid(images, images, extractor=Colours(), subsets=4)
    other, deviation = metrics.kid(images, brighter, extractor=Colours(), subsets=4)
    assert other > 100 * abs(same)
    assert math.isfinite(deviation)


def test_weights_that_cannot_be_downloaded_are_named_with_the_way_out(monkeypatch):
    pytest.importorskip("torchmetrics")
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelLoadError, match=r"LPIPS cannot be computed: the weights .*no network.*go online once"):
        metrics.lpips([picture(1)], [picture(2)])


@pytest.mark.parametrize("measure", [metrics.fid, metrics.kid])
def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, measure):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.kid", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'sgid-transforms\[metrics\]'"):
        measure([picture(1)] * 2, [picture(2)] * 2)
