"""One HTML file that shows what the augmentation does: figures, worst and best cases, every original with its variants."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import import_module, metadata, resources
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import SGIDError
from sgid_transforms.files import atomic_write
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.charts import draw_charts
from sgid_transforms.report.metrics import Scorer
from sgid_transforms.report.survey import ImageFacts, Originals, Reader, Row, Survey, VariantFacts
from sgid_transforms.variants.store import VariantStore

_CASES = 6
_PIXEL_ART = 64  # images up to this side are embedded unchanged, and enlarged without smoothing
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what HTML or UTF-8 cannot hold

Measure = Callable[[ImageFacts, VariantFacts], float | None]


class ReportError(SGIDError, RuntimeError):
    """A report cannot be made: there is nothing to show, a package is missing, or its file cannot be written."""


class Picture(NamedTuple):
    """An embedded image.

    Args:
        src: Data URI.
        pixels: Whether it is small enough to show its pixels.
    """

    src: str
    pixels: bool


class Card(NamedTuple):
    """One original with its variants, as shown in the gallery. Cards are sorted by ``worst``, ``best`` and ``change``."""

    image: ImageFacts
    anchor: str
    original: Picture | None
    variants: list[tuple[VariantFacts, Picture | None]]
    prompt: str
    state: str
    worst: float | None
    best: float | None
    change: float | None


def write_report(
    path: str | os.PathLike[str],
    captions: CaptionStore,
    variants: VariantStore,
    recipe: Recipe,
    *,
    originals: Originals | None = None,
    scorer: Scorer | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "Variants",
    max_originals: int = 2000,
    max_images: int = 600,
    max_side: int = 256,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Survey:
    """Measure the variants of a recipe and write an HTML report: one file that loads nothing from anywhere.

    Captions, class names and paths are always shown as text. A content security policy allows only the report's own script.

    Args:
        path: The HTML file; its folder is created, and an older file replaced.
        captions: Labels, captions and paths of the originals.
        variants: The variants.
        recipe: The recipe of these variants.
        originals: Folder that the records' relative paths start from (default: the working folder). For data sets without
            files: a function that returns the image of a record, or ``None``.
        scorer: An image-text model such as ``CLIPScorer``; without it, label agreement and diversity are not measured.
        class_names: Classes that the scorer chooses among; default: all labels of the caption store.
        title: Heading of the report.
        max_originals: Maximum number of originals to measure; of a larger store, the report shows a sample and says so.
        max_images: Maximum number of pictures to embed; beyond it, only the worst and best originals are shown, and the report
            says so.
        max_side: Longest side of an embedded picture in pixels.
        progress: Wraps the iterable of keys, as ``tqdm`` does.

    Returns:
        The figures.

    Raises:
        ReportError: There are neither variants nor failures of this recipe, Jinja2 or matplotlib is missing, or the file
            cannot be written.
        StoreError: A store cannot be read.
        ValueError: A limit is below 1.
    """
    for name, value in (("max_images", max_images), ("max_side", max_side)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_extra()
    reader = Reader(captions, variants, recipe, originals)
    facts = reader.survey(scorer, class_names, max_originals, progress)
    if not facts.images:
        raise ReportError(
            f"the variant store {variants.root} has no variants of recipe {recipe.fingerprint}; generate some first, "
            "or check the recipe"
        )
    cards = [_card(number, image, reader, max_side) for number, image in enumerate(choose(facts.images, max_images))]
    html = _render(facts, recipe, cards, title)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, html)
    except OSError as error:
        raise ReportError(f"the report {path} cannot be written ({error.strerror}); choose another place") from error
    return facts


def check_extra() -> None:
    """Raise `ReportError` if a package of the ``report`` extra is missing."""
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise ReportError(f"a report needs {name}: pip install 'sgid-transforms[report]'") from error


def choose(images: Sequence[ImageFacts], max_images: int) -> list[ImageFacts]:
    """Pick the worst and best originals in turn, up to ``max_images`` pictures with their variants; worst first.

    At least one original is picked, if there is any.
    """
    worst = sorted(images, key=lambda image: _last_if_none(_lowest(image, _badness)))
    best = sorted(images, key=lambda image: _last_if_none(_lowest(image, _goodness)))
    chosen: set[str] = set()
    room = max_images
    for image in filter(None, chain.from_iterable(zip_longest(worst, best))):
        if image.key in chosen:
            continue
        room -= 1 + sum(variant.made for variant in image.variants)
        if room < 0 and chosen:
            break
        chosen.add(image.key)
    return [image for image in worst if image.key in chosen]


def embed(image: torch.Tensor, max_side: int) -> Picture:
    """A uint8 image ``(3, H, W)`` as a data URI; see `encode`."""
    data, kind, pixels = encode(image, max_side)
    return Picture(f"data:{kind};base64,{base64.b64encode(data).decode()}", pixels)


def encode(image: torch.Tensor, max_side: int) -> tuple[bytes, str, bool]:
    """A uint8 image ``(3, H, W)`` for a page: lossless if it is small, else scaled down to ``max_side`` pixels.

    Returns:
        The file, its media type, and whether it is small enough to show its pixels.
    """
    picture = to_pil_image(image)
    pixels = max(picture.size) <= min(_PIXEL_ART, max_side)
    out = io.BytesIO()
    if pixels:
        picture.save(out, "PNG", optimize=True)
    else:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        picture.save(out, "WEBP", quality=82, method=4)
    return out.getvalue(), f"image/{'png' if pixels else 'webp'}", pixels


def _badness(image: ImageFacts, variant: VariantFacts) -> float | None:
    """The lower, the worse: the probability of the label, or without it the similarity to the original."""
    return variant.image_similarity if variant.label_probability is None else variant.label_probability


def _goodness(image: ImageFacts, variant: VariantFacts) -> float | None:
    """The lower, the better: the similarity to the original, if the label was kept."""
    return variant.image_similarity if variant.answer == image.label else None


def _lowest(image: ImageFacts, measure: Measure) -> float | None:
    return min((value for variant in image.variants if (value := measure(image, variant)) is not None), default=None)


def _last_if_none(value: float | None) -> float:
    return float("inf") if value is None else value


def _card(number: int, image: ImageFacts, reader: Reader, max_side: int) -> Card:
    """Read an image again to show it: keeping all of them until the choice is made would take too much memory."""
    row = next(reader.rows([image.key]), Row(image, None, {}))
    pictures = {number: embed(pixels, max_side) for number, pixels in row.pixels.items()}
    made = [variant for variant in image.variants if variant.made]
    prompts = {variant.prompt for variant in made}
    similarities = [variant.image_similarity for variant in made if variant.image_similarity is not None]
    kept = [variant.answer == image.label for variant in made if variant.answer is not None]
    states = {"lost": not all(kept), "kept": bool(kept) and all(kept), "rejected": len(made) < len(image.variants)}
    states["refused"] = any(variant.verdict == "reject" for variant in made)
    states["contradicts"] = image.contradiction is not None
    return Card(
        image=image,
        anchor=f"image-{number}",
        original=None if row.image is None else embed(row.image, max_side),
        variants=[(variant, pictures.get(variant.number)) for variant in image.variants],
        prompt=prompts.pop() if len(prompts) == 1 else "",
        state=" ".join(name for name, holds in states.items() if holds),
        worst=_lowest(image, _badness),
        best=_lowest(image, _goodness),
        change=sum(similarities) / len(similarities) if similarities else None,
    )


def _cases(cards: Sequence[Card], measure: Measure) -> list[tuple[Card, VariantFacts, Picture]]:
    """The variants with the lowest measures, at most one per original."""
    found = []
    for card in cards:
        scored = [
            (value, card, variant, picture)
            for variant, picture in card.variants
            if picture is not None and (value := measure(card.image, variant)) is not None
        ]
        if scored:
            found.append(min(scored, key=lambda case: case[0]))
    return [case[1:] for case in sorted(found, key=lambda case: case[0])[:_CASES]]


def _render(facts: Survey, recipe: Recipe, cards: Sequence[Card], title: str) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["fixed"] = lambda value, digits: f"{round(value, digits) + 0.0:,.{digits}f}"  # never -0.00
    environment.filters["short"] = lambda text, limit: text if len(text) <= limit else f"{text[: limit - 1]}…"
    script = _own_file("report.js")
    html: str = environment.from_string(_own_file("report.html.j2")).render(
        title=title,
        version=metadata.version("sgid-transforms"),
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        recipe=recipe,
        recipe_fields=[(field.name, _shown(getattr(recipe, field.name))) for field in dataclasses.fields(recipe)],
        facts=facts,
        worst=_cases(cards, _badness),
        best=_cases(cards, _goodness),
        charts=draw_charts(facts),
        classes=sorted(facts.classes, key=lambda one: (_last_if_none(one.agreement), one.label.casefold())),
        labels=sorted({card.image.label for card in cards}, key=str.casefold),
        cards=cards,
        pictures=sum(picture is not None for card in cards for picture in (card.original, *(one for _, one in card.variants))),
        style=Markup(_own_file("theme.css") + _own_file("report.css")),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )
    return html


def _printable(value: Any) -> Any:
    """Text with U+FFFD in place of lone surrogates and control characters."""
    return _UNPRINTABLE.sub("\ufffd", value) if type(value) is str else value


def _shown(value: object) -> str:
    if dataclasses.is_dataclass(value):
        return ", ".join(f"{field.name} {_shown(getattr(value, field.name))}" for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return " to ".join(map(str, value))
    return "–" if value is None or value == "" else str(value)


def _own_file(name: str) -> str:
    return resources.files("sgid_transforms.report").joinpath(name).read_text(encoding="utf-8")
