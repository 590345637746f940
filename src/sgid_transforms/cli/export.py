"""``sgid export``: variants as an ordinary ``ImageFolder``."""

from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import codes, options
from sgid_transforms.cli.output import bar, list_skipped, say_json, table


def command(
    data: options.Data,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new, empty, or of an earlier export.")],
    variants: options.Variants = Path("variants"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    originals: Annotated[bool, typer.Option("--originals", help="Copy the original images as well.")] = False,
    class_names: options.ClassNames = None,
    json: options.Json = False,
) -> None:
    """Write variants as an ordinary folder of class folders.

    OUT gets class folders named as DATA's, and a metadata.jsonl: torchvision's ImageFolder and Hugging Face's imagefolder
    both read it. Files are copied as they are.
    """
    from sgid_transforms.bulk import scan_folder
    from sgid_transforms.variants.export import export_folder
    from sgid_transforms.variants.store import VariantStore

    wanted = options.recipe_from(recipe, model)
    names = options.class_names_from(class_names)
    store = VariantStore(variants, readonly=True)
    scan = scan_folder(data, names, progress=not json)
    done = export_folder(scan, wanted, store, out, originals=originals, progress=bar("copying", "img", json))
    if json:
        say_json({"out": out, "report": done})
    else:
        table(
            [
                ("variants", f"{done.variants} of {done.images_with_variants} images"),
                ("originals", f"{done.originals} copied"),
                ("folder", str(out)),
            ]
        )
        list_skipped("left out", done.skipped, data)
    if done.skipped:
        raise typer.Exit(codes.PARTIAL)
