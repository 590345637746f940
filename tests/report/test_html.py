"""The report as a file. How it behaves in a browser is in test_report_browser.py."""

import base64
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from report_fakes import ColourScorer, make_stores, near
from sgid_transforms.building.address import Address
from sgid_transforms.captions import CaptionRecord
from sgid_transforms.images.keys import image_key
from sgid_transforms.report import ImageFacts, ReportError, VariantFacts, write_report
from sgid_transforms.report.html import choose, embed
from sgid_transforms.variants import Provenance


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of script and style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._skip = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)


def read(path):
    return path.read_text(encoding="utf-8")


def test_nothing_outside_of_the_file_is_named_as_a_source(report):
    page = Page(read(report[0]))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", read(report[0]))
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_every_text_is_escaped(report):
    html = read(report[0])
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<b>Test" not in html
    assert "<script>alert(1)</script> a red 'field' & \"sky\"" in " ".join(page.text)
    assert "<b>Test</b>" in page.text


def test_every_original_and_variant_is_there_with_its_figures(report):
    path, facts = report
    page = Page(read(path))
    cards = [attributes for tag, attributes in page.tags if tag == "article"]
    assert len(cards) == len(facts.images) == 9
    assert cards == sorted(cards, key=lambda card: float(card["data-worst"]))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert sum(attributes["alt"].startswith("original:") for attributes in images) == 9
    assert sum(attributes["alt"].startswith("variant ") for attributes in images) == 27
    charts = [attributes["alt"] for attributes in images if attributes["src"].startswith("data:image/svg+xml;base64,")]
    assert len(charts) == 3
    assert charts[0].startswith("Is the label still seen? Probability")
    text = " ".join(" ".join(page.text).split())
    for part in ("strength 0.30", "guidance 4.0", "seen as", "Prompt: a photo of a red", "rejected", "label kept by all"):
        assert part in text


def test_small_images_are_embedded_to_the_pixel_and_large_ones_scaled_down():
    small = torch.randint(0, 256, (3, 20, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = embed(small, 192)
    assert picture.pixels
    decoded = Image.open(io.BytesIO(base64.b64decode(picture.src.removeprefix("data:image/png;base64,"))))
    assert torch.equal(
        torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(20, 32, 3).permute(2, 0, 1), small
    )
    large = embed(small.repeat_interleave(20, 1).repeat_interleave(20, 2), 192)
    assert not large.pixels
    assert Image.open(io.BytesIO(base64.b64decode(large.src.partition(",")[2]))).size == (192, 120)


def test_a_figure_that_rounds_to_zero_has_no_sign(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    captions.set_similarities({image_key(near("red", 0, 0.0)): -0.004})
    write_report(tmp_path / "report.html", captions, variants, recipe, originals=tmp_path / "data")
    assert "caption similarity 0.00" in read(tmp_path / "report.html")


def image(key, scores, label="cat"):
    variants = [
        VariantFacts(
            n, image_similarity=similarity, label_probability=probability, answer="cat" if probability > 0.5 else "dog"
        )
        for n, (probability, similarity) in enumerate(scores)
    ]
    return ImageFacts(key, label, variants=tuple(variants))


def test_worst_and_best_are_chosen_in_turn_within_the_limit():
    images = [
        image("safe", [(0.9, 0.9)]),
        image("lost", [(0.1, 0.2)]),
        image("best", [(0.9, 0.3)]),
        image("middle", [(0.6, 0.8)]),
    ]
    assert [one.key for one in choose(images, 100)] == ["lost", "middle", "safe", "best"]
    assert {one.key for one in choose(images, 4)} == {"lost", "best"}
    assert [one.key for one in choose(images, 1)] == ["lost"]  # one is always shown
    assert choose([], 10) == []


def test_unmeasured_originals_come_last():
    unknown = ImageFacts("unknown", variants=(VariantFacts(0),))
    assert [one.key for one in choose([unknown, image("lost", [(0.1, 0.2)])], 10)] == ["lost", "unknown"]


def test_a_cut_is_stated(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=4)
    path = tmp_path / "report.html"
    write_report(
        path, captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer(), max_originals=10, max_images=12
    )
    page = Page(read(path))
    text = " ".join(" ".join(page.text).split())
    assert "sample of 10 of 12 originals" in text
    assert "3 of the 10 measured originals" in text
    assert "limited to 12 embedded pictures" in text
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 3


def test_a_report_without_scorer_originals_or_captions_says_what_is_missing(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=2)
    captions.remove([image_key(near("red", 0, 0.0))])
    path = tmp_path / "new" / "folder" / "report.html"
    write_report(path, captions, variants, recipe, originals=tmp_path / "nowhere")
    text = " ".join(" ".join(Page(read(path)).text).split())
    for part in ("No scorer was used", "2 of the originals could not be found", "original not found", "only counts are known"):
        assert part in text
    assert "Vendi score" not in text


def test_a_caption_that_contradicts_its_label_is_marked_and_can_be_filtered(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=2)
    captions.put(replace(next(iter(captions)), contradiction="words, scorer"))
    write_report(tmp_path / "r.html", captions, variants, recipe.replace(on_contradiction="keep"))
    html = (tmp_path / "r.html").read_text()
    assert html.count("contradicts the label, by words and scorer") == 1
    assert [state.split() for state in re.findall(r'data-state="([^"]*)"', html)].count(["rejected", "contradicts"]) == 1
    assert '<option value="contradicts">' in html


class Wrong(ColourScorer):
    """Takes red for green, and so on."""

    def image_features(self, images):
        return super().image_features(images).roll(1, dims=1)


@pytest.mark.parametrize("scorer", [ColourScorer(), Wrong()])
def test_a_scorer_that_does_not_know_the_originals_is_not_trusted(tmp_path, scorer):
    captions, variants, recipe = make_stores(tmp_path, per_class=1)
    write_report(tmp_path / "report.html", captions, variants, recipe, originals=tmp_path / "data", scorer=scorer)
    assert ("recognises only 0% of the originals" in read(tmp_path / "report.html")) == isinstance(scorer, Wrong)


def test_text_that_is_no_text_is_shown_as_far_as_it_can_be(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    key = image_key(near("red", 0, 0.0))
    captions.remove([key])
    text = "nul \0 bell \a right-to-left \u202e " + "long " * 500
    captions.put(CaptionRecord(key, text, "red" * 200, path="bad\udcff\udc80/\x1b.png"))
    place = Address(recipe, captions).key(captions.get(key), 0)
    variants.put(recipe, place, 0, near("red", 0, 0.1), Provenance(text, label="red" * 200, caption=text))
    write_report(tmp_path / "report.html", captions, variants, recipe, title="\ud800 title")
    html = read(tmp_path / "report.html")
    assert "nul \ufffd bell \ufffd" in html
    assert "\ufffd title" in html
    assert len(html) < 120_000


def test_a_recipe_without_variants_is_an_error_that_names_it(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    other = recipe.replace(seed=5)
    with pytest.raises(ReportError, match=f"has no variants of recipe {other.fingerprint}; generate some first"):
        write_report(tmp_path / "report.html", captions, variants, other)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ReportError, match=rf"a report needs {name}: pip install 'sgid-transforms\[report\]'"):
        write_report(tmp_path / "report.html", captions, variants, recipe)


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(tmp_path / "taken", captions, variants, recipe)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(tmp_path / "captions.sqlite" / "report.html", captions, variants, recipe)


@pytest.mark.parametrize("limit", ["max_images", "max_side"])
def test_a_limit_below_1_is_refused(tmp_path, limit):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        write_report(tmp_path / "report.html", captions, variants, recipe, **{limit: 0})
