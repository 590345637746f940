"""``sgid report``: one HTML page about what is in the stores."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import bar, fail, say, say_json


def report(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("report.html"),
    variants: options.Variants = Path("variants"),
    captions: options.Captions = Path("captions.sqlite"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    scorer: options.Scorer = "auto",
    title: Annotated[str, typer.Option(metavar="TEXT", help="Heading of the page.")] = "Variants",
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures to embed, worst and best first.")] = 600,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Write one HTML page about the variants of a recipe.

    It shows originals beside their variants, label consistency and diversity by class, and rejects by reason. The page is
    one file that loads nothing else. `--scorer none` leaves out what CLIP measures.
    """
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.errors import ImageError
    from sgid_transforms.images.reading import load_image
    from sgid_transforms.models.clip import CLIPScorer
    from sgid_transforms.report.html import write_report

    wanted = options.recipe_from(recipe, model)
    models = options.models_from(device, 32, scorer=scorer)
    store = options.variant_store(variants)
    if not captions.exists():
        fail(f"there is no caption store at {captions}; give its file with --captions, or run sgid generate first")
    chosen = models.scorer_for(wanted)

    def original(record: Any) -> Any:  # upright, as the variants were made
        try:
            return load_image(record.path) if record.path else None
        except ImageError:
            return None

    with closing(CaptionStore(captions, readonly=True)) as texts:
        facts = write_report(
            out,
            texts,
            store,
            wanted,
            originals=original,
            scorer=None if chosen == "none" else CLIPScorer(chosen, models.device),
            title=title,
            max_images=max_images,
            progress=bar("measuring", "img", json),
        )
    if json:
        say_json({"report": out, "figures": facts.to_dict()})
    else:
        say(f"{len(facts.images)} originals with {facts.variants_in_store} variants: {out}")
