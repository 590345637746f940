"""Matplotlib charts as SVG images for an HTML page. Browsers run no scripts in images, and load nothing for them."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from sgid_transforms.report.survey import Survey

_ORIGINAL, _KEPT, _LOST = "#6d4fc2", "#0a7d6c", "#bf3f0a"  # as in report.css
_MAX_POINTS = 1500
_MAX_BARS = 8


class Chart(NamedTuple):
    """A chart.

    Args:
        title: The question it answers.
        text: What it shows.
        src: Data URI of the SVG.
    """

    title: str
    text: str
    src: str


def draw_charts(facts: Survey) -> list[Chart]:
    """Draw the charts for which there are figures."""
    charts = []
    shown = [(image, variant) for image in facts.images for variant in image.variants]

    originals = [image.label_probability for image in facts.images if image.label_probability is not None]
    variants = [variant.label_probability for _, variant in shown if variant.label_probability is not None]
    if len(variants) > 1:
        text = "Probability that the scorer gives to an image's own label, for originals and variants."
        charts.append(Chart("Is the label still seen?", text, _render(lambda axes: _probabilities(axes, originals, variants))))

    points = [
        (variant.strength, variant.image_similarity, variant.answer not in (None, image.label))
        for image, variant in shown
        if variant.strength is not None and variant.image_similarity is not None
    ][:_MAX_POINTS]
    if len(points) > 1:
        text = "Each mark is a variant: its strength, and its similarity to the original."
        charts.append(Chart("Strength and change", text, _render(lambda axes: _change(axes, points))))

    reasons = facts.overall.reasons
    if reasons:
        text = "Attempts at variants that could not be made, by reason."
        charts.append(Chart("Rejected attempts", text, _render(lambda axes: _reasons(axes, dict(reasons)))))
    return charts


def _render(draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # the browser's fonts have glyphs that matplotlib's lacks
        "text.parse_math": False,  # a reason may hold a dollar sign
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "white",  # readable in dark mode, too
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.BytesIO()
        canvas.print_svg(out, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _probabilities(axes: Any, originals: list[float], variants: list[float]) -> None:
    bins = [step / 20 for step in range(21)]
    for values, colour, name in ((originals, _ORIGINAL, "originals"), (variants, _KEPT, "variants")):
        if values:
            weights = [100 / len(values)] * len(values)
            axes.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.35)
            axes.hist(values, bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="probability of the label", ylabel="% of images", xlim=(0, 1))
    _legend(axes)


def _change(axes: Any, points: list[tuple[float, float, bool]]) -> None:
    styles = (
        (False, "label kept", {"marker": "o", "color": _KEPT, "markersize": 3.5, "markeredgewidth": 0}),
        (True, "label lost", {"marker": "x", "color": _LOST, "markersize": 4, "markeredgewidth": 1.2}),
    )
    for lost, name, style in styles:
        chosen = [(strength, similarity) for strength, similarity, is_lost in points if is_lost is lost]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), linestyle="none", alpha=0.75, label=name, **style)
    axes.set(xlabel="strength", ylabel="similarity to the original")
    _legend(axes)


def _reasons(axes: Any, reasons: dict[str, int]) -> None:
    names = [reason if len(reason) <= 24 else f"{reason[:23]}…" for reason in reasons][:_MAX_BARS]
    bars = axes.barh(range(len(names)), list(reasons.values())[:_MAX_BARS], color=_LOST, height=0.62, alpha=0.8)
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("attempts")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    """Draw the legend above the axes, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.4, columnspacing=1.2)
