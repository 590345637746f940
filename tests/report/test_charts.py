from xml.etree import ElementTree

import pytest

from sgid_transforms.report.charts import draw_charts, sanitize
from sgid_transforms.report.facts import ClassFacts, ImageFacts, Survey, VariantFacts


def facts(reasons=None, scored=True):
    variants = tuple(
        VariantFacts(n, "p", 0.3 + n / 10, 4.0, image_similarity=0.9 - n / 10, label_probability=0.8 if scored else None,
                     answer=("cat", "dog")[n % 2] if scored else None)
        for n in range(4)
    )  # fmt: skip
    image = ImageFacts("k", "cat", label_probability=0.9 if scored else None, variants=variants)
    return Survey((image,), (), ClassFacts("all", reasons=reasons or {}), 1, 4, 1)


def test_charts_are_drawn_from_what_there_is():
    assert [title for title, _, _ in draw_charts(facts())] == ["Is the label still seen?", "Strength and change"]
    assert [title for title, _, _ in draw_charts(facts(scored=False))] == ["Strength and change"]
    assert [title for title, _, _ in draw_charts(facts({"nan": 3}))][-1] == "Rejected attempts"
    assert draw_charts(Survey((), (), ClassFacts("all"), 0, 0, 0)) == []


def test_charts_follow_the_page_and_hold_nothing_but_drawing():
    hostile = {"</text><script>alert(1)</script>": 2, "costs $5 or $6$": 1, "\u9ed2": 1, "x" * 500: 1}
    charts = [svg for *_, svg in draw_charts(facts(hostile))]
    ids = [element.get("id") for svg in charts for element in ElementTree.fromstring(svg).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for svg in charts:
        assert "var(--" in svg
        assert "#0" not in svg
        assert "font-family" not in svg
        assert "http" not in svg
        assert "<style" not in svg
        assert "<script" not in svg
    assert "&lt;/text&gt;&lt;script" in charts[-1]  # the reason as text, cut
    assert "costs $5 or $6$" in charts[-1]
    assert "x" * 30 not in charts[-1]


def test_a_reference_within_a_chart_still_leads_to_its_target():
    for *_, svg in draw_charts(facts({"nan": 1})):
        root = ElementTree.fromstring(svg)
        ids = {element.get("id") for element in root.iter()}
        targets = [element.get("href") for element in root.iter("use")]
        clips = [element.get("clip-path") for element in root.iter() if element.get("clip-path")]
        assert {target.removeprefix("#") for target in targets} <= ids
        assert {clip.removeprefix("url(#").removesuffix(")") for clip in clips} <= ids


@pytest.mark.parametrize(
    "part",
    ["<script>alert(1)</script>", '<a href="https://evil"><path d="M0 0"/></a>', "<style>*{}</style>",
     '<image href="https://evil/x.png"/>', "<foreignObject><p>x</p></foreignObject>", "<metadata>x</metadata>",
     '<x:evil xmlns:x="urn:x"/>', "<!-- evil -->", "<?evil x?>", '<set attributeName="href" to="javascript:evil"/>'],
)  # fmt: skip
def test_what_is_no_drawing_is_dropped(part):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{part}<rect width="1"/></svg>'
    assert sanitize(svg) == '<svg viewBox="0 0 1 1"><rect width="1" /></svg>'


@pytest.mark.parametrize(
    "attribute",
    ['onload="evil()"', 'href="javascript:evil()"', 'xlink:href="https://evil"', 'fill="url(https://evil)"',
     'style="background: url( https://evil )"', 'style="@import evil"'],
)  # fmt: skip
def test_attributes_that_load_or_run_something_are_dropped(attribute):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><rect {attribute}/></svg>'
    assert sanitize(svg) == "<svg><rect /></svg>"


def test_what_is_no_svg_is_refused():
    with pytest.raises(ValueError, match="not an SVG"):
        sanitize("<svg")
    with pytest.raises(ValueError, match="entities"):
        sanitize('<!DOCTYPE svg [<!ENTITY a "b">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>')
