"""``sgid demo``: the whole way on the bundled samples, from captions to a trained classifier."""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sgid_transforms.cli import codes
from sgid_transforms.cli.output import duration, say
from sgid_transforms.cli.stopping import stoppable

if TYPE_CHECKING:
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.images.folders import Scan
    from sgid_transforms.recipe.recipe import Recipe
    from sgid_transforms.variants.store import VariantStore

SAMPLES: Final = Path(__file__).resolve().parent.parent / "assets" / "samples"
_SHOWN: Final = 12  # rows of the contact sheet
_SEEDS: Final = 3  # of either training


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("sgid-demo"),
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=1, metavar="K", help="Variants per image.")] = 4,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of each training run.")] = 150,
) -> None:
    """Try everything on bundled pictures, without a download.

    On 200 CIFAR-10 images: captions, variants, a contact sheet, an HTML report, and short trainings with and without
    variants, in a few minutes on a CPU. What is done already is skipped.
    """
    start = time.perf_counter()
    say("loading PyTorch ...")
    from sgid_transforms.bulk import generate_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.cli.demo_training import split
    from sgid_transforms.recipe.recipe import Recipe
    from sgid_transforms.report.html import check_extra
    from sgid_transforms.variants.store import VariantStore

    check_extra()  # before the work rather than in the middle of it
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.for_model("tiny")
    captions, variants = CaptionStore(out / "captions.sqlite"), VariantStore(out / "variants")
    train, test = split(SAMPLES)
    scan = _only(scan_folder(SAMPLES), train)

    say(f"1/4  captions and {count} variants of {len(scan.images)} training images")
    with stoppable() as stop:
        done = generate_folder(scan, recipe, captions, variants, count=count, progress=True, stop=stop)
    if done.stopped:
        say("stopped; call it again to go on")
        raise typer.Exit(codes.INTERRUPTED)
    say(f"     {done.captions.captioned} captions and {done.generated} variants made, {done.present} variants were there")

    say("2/4  contact sheet")
    sheet = _sheet(out / "contact-sheet.png", scan, recipe, captions, variants, count)
    say("3/4  report")
    report = _report(out / "report.html", recipe, captions, variants)
    say(f"4/4  training a small ResNet without and with variants: {len(train)} images, {_SEEDS} seeds, {steps} steps of 32")
    results = _training(out / "training.json", recipe, captions, variants, train, test, count, steps)

    say()
    say(f"accuracy on {len(test)} held-out images, mean of the seeds:")
    for name in ("without", "with"):
        each = ", ".join(f"{100 * one:.0f}" for one in results[name]["accuracy"])
        say(f"  {name + ' variants':<17}{100 * sum(results[name]['accuracy']) / _SEEDS:.1f} %  ({each})")
    say(f"This shows the mechanics and is no benchmark: on {len(test)} test images, some points are chance.")
    say("What variants bring is measured by benchmarks/accuracy.py of the repository, beside classic augmentation.")
    captions.close()
    say()
    for name, path in (
        ("captions", out / "captions.sqlite"),
        ("variants", out / "variants"),
        ("contact sheet", sheet),
        ("report", report),
        ("training", out / "training.json"),
    ):
        say(f"{name:<14} {path}")
    say(f"\ndone in {duration(time.perf_counter() - start)}; open {report} in a browser")
    say("next: sgid generate YOUR_FOLDER --dry-run")


def _only(scan: "Scan", indices: list[int]) -> "Scan":
    """Those images of a scan that have these numbers in the ``ImageFolder``."""
    from torchvision.datasets import ImageFolder

    samples = ImageFolder(str(SAMPLES)).samples
    wanted = {Path(samples[index][0]) for index in indices}
    return dataclasses.replace(scan, images=tuple(image for image in scan.images if image.file.path in wanted))


def _sheet(path: Path, scan: "Scan", recipe: "Recipe", captions: "CaptionStore", variants: "VariantStore", count: int) -> Path:
    from sgid_transforms.images.reading import load_image
    from sgid_transforms.report import contact_sheet

    images = scan.images[:: max(1, len(scan.images) // _SHOWN)][:_SHOWN]
    records = captions.get_many([image.key for image in images])
    rows = [
        [load_image(image.file.path), *(variants.get_image(recipe, image.key, number) for number in range(count))]
        for image in images
    ]
    titles = [f"{image.file.label}: {records[image.key].caption}" for image in images]
    columns = ["original", *(f"variant {number}" for number in range(count))]
    contact_sheet(rows, row_titles=titles, column_titles=columns).save(path)
    return path


def _report(path: Path, recipe: "Recipe", captions: "CaptionStore", variants: "VariantStore") -> Path:
    from sgid_transforms.models.clip import CLIPScorer
    from sgid_transforms.report.html import write_report

    write_report(path, captions, variants, recipe, scorer=CLIPScorer("tiny"), title="Demo: variants of CIFAR-10 images")
    return path


def _training(
    path: Path,
    recipe: "Recipe",
    captions: "CaptionStore",
    variants: "VariantStore",
    train: list[int],
    test: list[int],
    count: int,
    steps: int,
) -> dict[str, Any]:
    """Both runs, or what an earlier call with the same settings found."""
    from sgid_transforms.cli.demo_training import train_and_test
    from sgid_transforms.transforms.augment import SGIDAugment

    settings = {"recipe": recipe.fingerprint, "variants_per_image": count, "steps": steps, "seeds": _SEEDS}
    try:
        known: dict[str, Any] = json.loads(path.read_text())
        if known["settings"] == settings:
            say("     done before; see training.json")
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sgid = SGIDAugment(recipe=recipe, captions=captions, variants=variants, p=0.5, variants_per_image=count, on_miss="original")
    results: dict[str, Any] = {"settings": settings}
    for name, transform in (("without", None), ("with", sgid)):
        runs = [train_and_test(SAMPLES, train, test, transform, steps=steps, seed=seed) for seed in range(_SEEDS)]
        results[name] = {measure: [run[measure] for run in runs] for measure in ("accuracy", "loss", "seconds")}
        say(f"     {name} variants: {duration(sum(results[name]['seconds']))}")
    say(f"     {sgid.epoch_summary()}")
    path.write_text(json.dumps(results, indent=2) + "\n")
    return results
