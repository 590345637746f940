"""``sgid generate``: variants of a folder's images."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sgid_transforms.cli import codes, options
from sgid_transforms.cli.notes import tiny_note, turned_note
from sgid_transforms.cli.output import duration, list_skipped, note, say, say_json, size, table
from sgid_transforms.cli.stopping import stoppable

if TYPE_CHECKING:
    from sgid_transforms.bulk import Estimate, GenerateReport


def command(
    data: options.Data,
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=1, metavar="K", help="Variants per image.")] = 4,
    variants: options.Variants = Path("variants"),
    captions: options.Captions = Path("captions.sqlite"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Make only the I-th of N shares; all share one store.")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time and disk, from a measured sample.")] = False,
    retry_filtered: Annotated[bool, typer.Option("--retry-filtered", help="Try again what the filters rejected.")] = False,
    captioner: options.Captioner = "auto",
    scorer: options.Scorer = "auto",
    class_names: options.ClassNames = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = 32,
    json: options.Json = False,
) -> None:
    """Make K variants of every image of DATA.

    Captions are written first where there are none. What is there is left alone: after Ctrl-C, a crash, or with new
    images, call it again.
    """
    from sgid_transforms.bulk import estimate_folder, generate_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.variants.store import VariantStore

    wanted = options.recipe_from(recipe, model)
    share = options.shard_from(shard)
    names = options.class_names_from(class_names)
    models = options.models_from(device, batch_size, captioner, scorer)
    store = VariantStore(variants)
    scan = scan_folder(data, names, progress=not json)
    if wanted.model == "tiny":
        about = tiny_note((image.file.label for image in scan.images), (image.size for image in scan.images))
        if about:
            note(about)
    if dry_run:
        with closing(CaptionStore(captions)) as texts:
            estimate = estimate_folder(scan, wanted, texts, store, count=count, shard=share, models=models)
        if json:
            say_json({"report": estimate, "seconds": estimate.seconds, "bytes": estimate.bytes})
        else:
            _say_estimate(estimate, data)
        raise typer.Exit(codes.PARTIAL if estimate.skipped or estimate.bytes > estimate.free_bytes else 0)
    variants.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known before the work than after it
    if retry_filtered:
        store.forget_failures(wanted)
    with closing(CaptionStore(captions)) as texts, stoppable() as stop:
        done = generate_folder(
            scan, wanted, texts, store, count=count, shard=share, models=models, progress=not json, stop=stop
        )
    if turned := turned_note(done.captions.turned):
        note(turned)
    if json:
        say_json({"recipe": wanted.fingerprint, "store": variants, "report": done})
    else:
        _say_report(done, len(scan.classes), variants, data)
    if done.stopped:
        raise typer.Exit(codes.INTERRUPTED)
    if done.captions.skipped or done.failed:
        raise typer.Exit(codes.PARTIAL)


def _say_report(done: "GenerateReport", classes: int, variants: Path, data: Path) -> None:
    captions = done.captions
    speed = f" in {duration(done.seconds)} ({done.generated / done.seconds:.1f} a second)" if done.generated else ""
    parts = [f"{done.generated} made now{speed}", f"{done.present} there already"]
    parts += [f"{done.filtered} rejected by the filters"] if done.filtered else []
    parts += [f"{len(done.failed)} failed"] if done.failed else []
    left = done.wanted - done.generated - done.present - done.filtered - len(done.failed)
    parts += [f"{left} still to make (run the command again)"] if left else []
    table(
        [
            ("images", f"{done.images} in {classes} classes ({captions.duplicates} duplicates)"),
            ("captions", f"{captions.captioned} written now"),
            ("variants", f"{done.wanted} wanted: {', '.join(parts)}"),
            ("store", str(variants)),
        ]
    )
    list_skipped("left out", captions.skipped, data)
    list_skipped("failed", done.failed, data)


def _say_estimate(estimate: "Estimate", data: Path) -> None:
    each_caption, each = duration(estimate.seconds_per_caption), duration(estimate.seconds_per_variant)
    table(
        [
            ("images", str(estimate.images)),
            ("captions", f"{estimate.captions_missing} to write, {each_caption} each"),
            ("variants", f"{estimate.missing} of {estimate.wanted} to make, {each} each (measured on {estimate.sampled})"),
            ("time", f"about {duration(estimate.seconds)} on this device, loading of the models not counted"),
            ("disk", f"about {size(estimate.bytes)} of {size(estimate.free_bytes)} that are free"),
        ]
    )
    if estimate.bytes > estimate.free_bytes:
        say("That does not fit on the disk: ask for fewer variants, or store them elsewhere with --variants.")
    list_skipped("would be left out", estimate.skipped, data)
