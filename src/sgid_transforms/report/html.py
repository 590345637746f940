"""One HTML file that shows what the augmentation does: figures, worst and best cases, every original beside its variants."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import SGIDError
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report import _view
from sgid_transforms.report._pictures import Picture, embed
from sgid_transforms.report._reading import Originals, Reader
from sgid_transforms.report.charts import draw_charts
from sgid_transforms.report.facts import ImageFacts, Survey
from sgid_transforms.report.metrics import Scorer
from sgid_transforms.report.survey import survey
from sgid_transforms.variants.store import VariantStore


class ReportError(SGIDError, RuntimeError):
    """A report cannot be made: there is nothing to show, a package is missing, or its file cannot be written."""


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

    Captions, class names and paths are shown as text, whatever they hold; a content security policy lets no script run but
    the report's own.

    Args:
        path: of the HTML file; its folder is created, an older file replaced, all or nothing.
        captions: labels, captions and paths of the originals.
        variants: the variants.
        recipe: whose variants.
        originals: the folder that relative paths of the records start from (default: the working folder), or a function
            that gives the image of a record, or ``None``, for data sets without files.
        scorer: an image-text model such as ``CLIPScorer``: without it there are neither label agreement nor diversity.
        class_names: what the scorer chooses among; default: all labels of the caption store.
        title: heading of the report.
        max_originals: originals to measure; a larger store is sampled, which the report says.
        max_images: pictures to embed; more are cut to the worst and best originals, which the report says.
        max_side: longest side of an embedded picture in pixels.
        progress: wraps the keys while they are measured, as ``tqdm`` does.

    Returns:
        The figures.

    Raises:
        ReportError: there are neither variants nor failures of this recipe, Jinja2 or matplotlib is missing, or the file
            cannot be written.
        StoreError: a store cannot be read.
        ValueError: a limit below 1.
    """
    for name, value in (("max_images", max_images), ("max_side", max_side)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_extra()
    facts = survey(
        captions,
        variants,
        recipe,
        originals=originals,
        scorer=scorer,
        class_names=class_names,
        max_originals=max_originals,
        progress=progress,
    )
    if not facts.images:
        raise ReportError(
            f"the variant store {variants.root} has no variants of recipe {recipe.fingerprint}; generate some first, "
            "or check the recipe"
        )
    chosen = _view.choose(facts.images, max_images)
    pictures = _pictures(Reader(captions, variants, recipe, originals), chosen, max_side)
    _write(Path(path), render(facts, recipe, chosen, pictures, title=title))
    return facts


def render(facts: Survey, recipe: Recipe, chosen: Sequence[ImageFacts], pictures: _view.Pictures, *, title: str) -> str:
    """The report as HTML.

    Args:
        facts: the figures.
        recipe: whose variants.
        chosen: originals to show, worst first.
        pictures: what is embedded of these.
        title: heading of the report.
    """
    from markupsafe import Markup

    gallery = _view.cards(chosen, pictures)
    script, style = (_own_file(name) for name in ("report.js", "report.css"))
    measured = any(image.label_probability is not None for image in facts.images)
    by_label = "Variants whose label the scorer finds least likely."
    text = by_label if measured else "Variants that are least like their original."
    return str(
        _template().render(
            title=title,
            version=metadata.version("sgid-transforms"),
            date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            recipe=recipe,
            recipe_fields=[(field.name, _shown(getattr(recipe, field.name))) for field in dataclasses.fields(recipe)],
            facts=facts,
            tiles=list(_view.tiles(facts)),
            notes=list(_view.notes(facts)),
            worst=_view.worst_cases(gallery),
            worst_text=text,
            best=_view.best_cases(gallery),
            charts=draw_charts(facts),
            columns=_view.columns(bool(facts.scorer)),
            classes=_view.sorted_classes(facts),
            labels=sorted({image.label for image in chosen}, key=str.casefold),
            orders=_view.orders(facts),
            cards=gallery,
            shown_text=_view.shown_text(len(chosen), len(pictures), facts),
            style=Markup(style),
            script=Markup(script),
            script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}",
        )
    )


def _pictures(reader: Reader, chosen: Sequence[ImageFacts], max_side: int) -> dict[tuple[str, int | None], Picture]:
    """Read the chosen images once more: all of them would not fit into memory until it is known which are chosen."""
    pictures: dict[tuple[str, int | None], Picture] = {}
    for image in chosen:
        for row in reader.rows({image.key: [variant.number for variant in image.variants]}):
            if row.image is not None:
                pictures[image.key, None] = embed(row.image, max_side)
            for variant, pixels in row.variants:
                if pixels is not None:
                    pictures[image.key, variant.number] = embed(pixels, max_side)
    return pictures


def check_extra() -> None:
    """Raise :class:`ReportError` if a package of the ``report`` extra is missing."""
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise ReportError(f"a report needs {name}: pip install 'sgid-transforms[report]'") from error


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["fixed"] = lambda value, digits: f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.00
    environment.filters["short"] = lambda text, limit: text if len(text) <= limit else f"{text[: limit - 1]}…"
    return environment.from_string(_own_file("report.html.j2"))


def _printable(value: Any) -> Any:
    """Text as UTF-8 and HTML can hold it: half characters and control characters become U+FFFD."""
    if type(value) is not str or (value.isascii() and value.isprintable()):
        return value
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n" else char for char in value)


def _shown(value: object) -> str:
    if dataclasses.is_dataclass(value):
        return ", ".join(f"{field.name} {_shown(getattr(value, field.name))}" for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return " to ".join(map(str, value))
    return "–" if value is None or value == "" else str(value)


def _own_file(name: str) -> str:
    return resources.files("sgid_transforms.report").joinpath(name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Write a file in one step: a report that is open in a browser is never half there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ReportError(f"the report {path} cannot be written ({error.strerror}); choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
