"""``sgid caption``: captions and similarities of a folder's images."""

from contextlib import closing
from pathlib import Path

import typer

from sgid_transforms.cli import codes, options
from sgid_transforms.cli.notes import tiny_note, turned_note
from sgid_transforms.cli.output import list_skipped, note, say_json, table
from sgid_transforms.cli.stopping import stoppable


def command(
    data: options.Data,
    captions: options.Captions = Path("captions.sqlite"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    captioner: options.Captioner = "auto",
    scorer: options.Scorer = "auto",
    class_names: options.ClassNames = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = 32,
    json: options.Json = False,
) -> None:
    """Caption the images of DATA, once.

    It also measures how well label and caption describe each image. What is known already is left alone; `sgid generate`
    does all this first, too.
    """
    from sgid_transforms.bulk import caption_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore

    wanted = options.recipe_from(recipe, model)
    names = options.class_names_from(class_names)
    models = options.models_from(device, batch_size, captioner, scorer)
    scan = scan_folder(data, names, progress=not json)
    if models.captioner_for(wanted) == "tiny":
        about = tiny_note((image.file.label for image in scan.images), (image.size for image in scan.images))
        if about:
            note(about)
    with closing(CaptionStore(captions)) as store, stoppable() as stop:
        done = caption_folder(scan, wanted, store, models, progress=not json, stop=stop)
    if turned := turned_note(done.turned):
        note(turned)
    if json:
        say_json({"store": captions, "report": done})
    else:
        table(
            [
                ("images", f"{done.images} in {len(scan.classes)} classes ({done.duplicates} duplicates)"),
                ("captions", f"{done.captioned} written now, {done.images - done.captioned} there already"),
                ("store", str(captions)),
            ]
        )
        list_skipped("left out", done.skipped, data)
    if done.stopped:
        raise typer.Exit(codes.INTERRUPTED)
    if done.skipped:
        raise typer.Exit(codes.PARTIAL)
