"""``sgid tune``: the recipe that suits a folder's images."""

from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.generate import stoppable
from sgid_transforms.cli.output import INTERRUPTED, fail, list_skipped, note, say, say_json, table, tiny_note


def tune(
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("tuned"),
    budget: Annotated[float, typer.Option(min=0, metavar="MINUTES", help="Time for trying recipes.")] = 20.0,
    sample: Annotated[int, typer.Option(min=1, metavar="N", help="Images to try them on.")] = 200,
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=2, metavar="K", help="Variants per image.")] = 4,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    judge: Annotated[
        str, typer.Option(metavar="ID", help="Your own classifier (transformers) to see labels with; auto: the scorer.")
    ] = "auto",
    captioner: options.Captioner = "auto",
    scorer: options.Scorer = "auto",
    class_names: options.ClassNames = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = 32,
    json: options.Json = False,
) -> int:
    """Find the recipe that suits the images of DATA.

    It tries strength, guidance and captions on a sample, and chooses the recipe that adds the most different images without
    losing their labels. Run it again to go on.
    """
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
    except ImportError as error:
        fail(f"tuning needs {error.name}: pip install 'sgid-transforms[tune]'")
    from sgid_transforms.bulk import scan_folder
    from sgid_transforms.models.classifier import ImageClassifier
    from sgid_transforms.report import tuning

    wanted = options.recipe_from(recipe, model)
    models = options.models_from(device, batch_size, captioner, scorer)
    scan = scan_folder(data, options.class_names_from(class_names), progress=not json)
    if wanted.model == "tiny":
        note(tiny_note((image.file.label for image in scan.images), (image.size for image in scan.images)))
    labels = sorted({image.file.label for image in scan.images})
    classifier = None if judge == "auto" else ImageClassifier(judge, labels, device=models.device)
    with stoppable() as stop:
        found = tuning.tune(
            scan,
            wanted,
            out,
            models,
            minutes=budget,
            sample=sample,
            count=count,
            judge=classifier,
            progress=not json,
            stop=stop,
        )
    if found is None:
        say("stopped; run the command again to resume")
        return INTERRUPTED
    for text in found.notes:
        note(text)
    if json:
        points = [
            {"recipe": tuning.describe(point.recipe), "fingerprint": point.recipe.fingerprint}
            | {name: getattr(point, name) for name in ("images", "agreement", "change", "diversity", "value")}
            for point in found.points
        ]
        say_json({"recipe": out / "recipe.toml", "why": found.why, "tried": found.tried, "points": points})
    else:
        say(f"{'label seen':>11}{'change':>9}{'diversity':>11}{'value':>8}")
        for point in found.points[:10]:
            mark = "*" if point == found.chosen else " "
            figures = f"{point.agreement:>10.0%}{point.change:>9.3f}{point.diversity:>11.2f}{point.value:>8.2f}"
            say(f"{mark}{figures}  {tuning.describe(point.recipe)}{'  (yours)' if point == found.base else ''}")
        say()
        say(found.why)
        table([(name, str(out / name)) for name in ("recipe.toml", "front.png", "points.csv")])
        say(f"contact sheets {out}/sheet-*.png")
        list_skipped("left out", scan.skipped, data)
    return INTERRUPTED if found.stopped else 0
