import base64
from xml.etree import ElementTree

from sgid_transforms.report import ClassFacts, ImageFacts, Survey, VariantFacts
from sgid_transforms.report.charts import draw_charts


def facts(reasons=None, scored=True):
    variants = tuple(
        VariantFacts(n, "p", 0.3 + n / 10, 4.0, image_similarity=0.9 - n / 10, label_probability=0.8 if scored else None,
                     answer=("cat", "dog")[n % 2] if scored else None)
        for n in range(4)
    )  # fmt: skip
    image = ImageFacts("k", "cat", label_probability=0.9 if scored else None, variants=variants)
    return Survey((image,), (), ClassFacts("all", reasons=reasons or {}), 1, 4, 1)


def test_charts_are_drawn_from_what_there_is():
    assert [chart.title for chart in draw_charts(facts())] == ["Is the label still seen?", "Strength and change"]
    assert [chart.title for chart in draw_charts(facts(scored=False))] == ["Strength and change"]
    assert [chart.title for chart in draw_charts(facts({"nan": 3}))][-1] == "Rejected attempts"
    assert draw_charts(Survey((), (), ClassFacts("all"), 0, 0, 0)) == []


def test_a_chart_is_an_image_of_its_own_that_shows_a_reason_as_text():
    hostile = {"</text><script>alert(1)</script>": 2, "costs $5 or $6$": 1, "\u9ed2": 1, "x" * 500: 1}
    for chart in draw_charts(facts(hostile)):
        kind, _, data = chart.src.partition(",")
        svg = base64.b64decode(data).decode()
        assert kind == "data:image/svg+xml;base64"
        texts = {"".join(one.itertext()) for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        assert "<script" not in svg
    assert {"</text><script>alert(1)…", "costs $5 or $6$", "\u9ed2", "x" * 23 + "…"} <= texts  # of the last chart
