"""Charts by matplotlib, as SVG that can stand inside an HTML page: no script, no style sheet, colours by CSS variables."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from sgid_transforms.report.facts import Survey

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_ELEMENTS = {"svg", "g", "defs", "path", "use", "text", "tspan", "rect", "circle", "line", "polyline", "polygon", "clipPath"}

# Colours that nobody would choose stand for the page's own, so that one drawing is right on light and on dark.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--original)",
    "#050505": "var(--kept)",
    "#060606": "var(--lost)",
}
_INK, _MUTED, _LINE, _ORIGINAL, _KEPT, _LOST = _COLOURS
_MAX_POINTS = 1500
_MAX_BARS = 8


def draw_charts(facts: Survey) -> list[tuple[str, str, str]]:
    """Those charts that the figures suffice for.

    Returns:
        Title, description and SVG of each; the SVG is safe to be put into a page as it is.
    """
    charts = [
        (
            "Is the label still seen?",
            "Probability that the scorer gives to an image's own label, for originals and variants.",
            _probabilities(facts),
        ),
        (
            "Strength and change",
            "Each mark is a variant: how much of it was redrawn, and how similar to its original it stayed.",
            _change(facts),
        ),
        ("Rejected attempts", "Attempts of variants that could not be made, by reason.", _reasons(facts)),
    ]
    return [
        (title, text, sanitize(_render(draw), prefix=f"c{number}-"))
        for number, (title, text, draw) in enumerate(charts)
        if draw is not None
    ]


def sanitize(svg: str, prefix: str = "") -> str:
    """An SVG for use inside a page: drawing elements only, ids made unique by ``prefix``, references to them alone.

    Scripts, style sheets, event handlers, links, foreign elements and comments are dropped.

    Raises:
        ValueError: not well-formed XML, or with a document type that declares entities.
    """
    if "<!ENTITY" in svg:
        raise ValueError("an SVG that declares entities is refused; it could be a decompression bomb")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"not an SVG: {error}") from error
    _clean(root, prefix)
    for attribute in ("width", "height"):  # the page decides; the view box keeps the shape
        root.attrib.pop(attribute, None)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, prefix: str) -> None:
    for child in list(element):
        if isinstance(child.tag, str) and child.tag.startswith(_SVG) and child.tag.removeprefix(_SVG) in _ELEMENTS:
            _clean(child, prefix)
        else:
            element.remove(child)
    element.tag = element.tag.removeprefix(_SVG)  # inside HTML it needs no namespace
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, prefix + value)
        elif name in (_LINK, "href"):
            del element.attrib[name]
            if value.startswith("#"):
                element.set("href", f"#{prefix}{value[1:]}")
        elif name.startswith(("on", "{")):
            del element.attrib[name]
        else:
            value = re.sub(r"url\(\s*#", f"url(#{prefix}", value)
            if re.search(r"url\((?!#)|@import|javascript:|expression\(", value, re.IGNORECASE):
                del element.attrib[name]
            else:
                element.set(name, _themed(value))


def _themed(value: str) -> str:
    for colour, variable in _COLOURS.items():
        value = value.replace(colour, variable)
    return re.sub(r"font-family:[^;]*;?|(?<=px )'[^;]*", "", value)


def _render(draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: it can be read out, found, and follows the page's font
        "svg.hashsalt": "sgid",
        "text.parse_math": False,  # a reason may hold a dollar sign
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _LINE,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # only measured with; the browser has the glyph
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # matplotlib's document type names a DTD on the web; ElementTree would not fetch it, and nobody needs it.
    return re.sub(r"<!DOCTYPE[^>]*>", "", out.getvalue())


def _probabilities(facts: Survey) -> Callable[[Any], None] | None:
    variants = [v.label_probability for image in facts.images for v in image.variants if v.label_probability is not None]
    originals = [image.label_probability for image in facts.images if image.label_probability is not None]
    if len(variants) < 2:
        return None

    def draw(axes: Any) -> None:
        bins = [step / 20 for step in range(21)]
        for values, colour, name in ((originals, _ORIGINAL, "originals"), (variants, _KEPT, "variants")):
            if values:
                weights = [100 / len(values)] * len(values)
                axes.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.35)
                axes.hist(values, bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
        axes.set_xlabel("probability of the label")
        axes.set_ylabel("% of images")
        axes.set_xlim(0, 1)
        _legend(axes)

    return draw


def _change(facts: Survey) -> Callable[[Any], None] | None:
    points = [
        (v.strength, v.image_similarity, v.answer is not None and v.answer != image.label)
        for image in facts.images
        for v in image.variants
        if v.strength is not None and v.image_similarity is not None
    ][:_MAX_POINTS]
    if len(points) < 2:
        return None

    def draw(axes: Any) -> None:
        for lost, colour, name in ((False, _KEPT, "label kept"), (True, _LOST, "label lost")):
            chosen = [point for point in points if point[2] is lost]
            if chosen:
                axes.plot(
                    [point[0] for point in chosen],
                    [point[1] for point in chosen],
                    "x" if lost else "o",
                    color=colour,
                    markersize=4 if lost else 3.5,
                    alpha=0.75,
                    markeredgewidth=1.2 if lost else 0,
                    label=name,
                )
        axes.set_xlabel("strength")
        axes.set_ylabel("similarity to the original")
        _legend(axes)

    return draw


def _reasons(facts: Survey) -> Callable[[Any], None] | None:
    reasons = list(facts.overall.reasons.items())[:_MAX_BARS][::-1]
    if not reasons:
        return None

    def draw(axes: Any) -> None:
        bars = axes.barh(range(len(reasons)), [count for _, count in reasons], color=_LOST, height=0.62, alpha=0.8)
        axes.bar_label(bars, padding=3, color=_INK)
        axes.set_yticks(range(len(reasons)), [reason if len(reason) <= 24 else f"{reason[:23]}…" for reason, _ in reasons])
        axes.set_xlabel("attempts")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def _legend(axes: Any) -> None:
    """Above the axes, where no data can be."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.4, columnspacing=1.2)
