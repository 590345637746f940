"""``sgid caption`` and ``sgid generate``: captions and variants of a folder's images."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import (
    INTERRUPTED,
    PARTIAL,
    duration,
    list_skipped,
    note,
    say,
    say_json,
    size,
    table,
    tiny_note,
    turned_note,
)

if TYPE_CHECKING:
    from sgid_transforms.bulk import CaptionReport, Estimate, GenerateReport


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside it, SIGINT and SIGTERM (which batch systems send before they kill) request a stop; a second Ctrl-C stops at once.

    Yields:
        A function that says whether a stop was requested.
    """
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (asked or _loads(frame)):
            raise KeyboardInterrupt
        asked.append(number)
        with suppress(OSError):  # no print: the signal may have interrupted another one
            os.write(2, b"\nstopping after the current batch; press Ctrl-C again to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loads(frame: FrameType | None) -> bool:
    """Whether a model is being downloaded or loaded, so that there is no work to finish first."""
    while frame is not None:
        where, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if where == "sgid_transforms.building.builder" and name == "build":
            return True
        if where.startswith("sgid_transforms.models.") and name in ("__init__", "load"):
            return True
        frame = frame.f_back
    return False


def caption(
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
) -> int:
    """Caption the images of DATA, once.

    It also measures how well label and caption describe each image, and skips what is already known. `sgid generate` does
    all this first.
    """
    from sgid_transforms.bulk import caption_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore

    wanted = options.recipe_from(recipe, model)
    models = options.models_from(device, batch_size, captioner, scorer)
    scan = scan_folder(data, options.class_names_from(class_names), progress=not json)
    if models.captioner_for(wanted) == "tiny":
        note(tiny_note((image.file.label for image in scan.images), (image.size for image in scan.images)))
    with closing(CaptionStore(captions)) as store, stoppable() as stop:
        done = caption_folder(scan, wanted, store, models, progress=not json, stop=stop)
    note(turned_note(done.turned))
    if json:
        say_json({"store": captions, "report": done})
    else:
        table(
            [
                ("images", f"{done.images} in {len(scan.classes)} classes ({done.duplicates} duplicates)"),
                ("captions", f"{done.captioned} written now, {done.images - done.captioned} there already{_against(done)}"),
                ("store", str(captions)),
            ]
        )
        list_skipped("left out", done.skipped, data)
    return INTERRUPTED if done.stopped else PARTIAL if done.skipped else 0


def generate(
    data: options.Data,
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=1, metavar="K", help="Variants per image.")] = 4,
    variants: options.Variants = Path("variants"),
    captions: options.Captions = Path("captions.sqlite"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Make only the I-th of N shares; auto: as SLURM or torchrun say.")
    ] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time and disk, from a measured sample.")] = False,
    retry_filtered: Annotated[bool, typer.Option("--retry-filtered", help="Try again what the filters rejected.")] = False,
    replace_rejected: Annotated[
        bool, typer.Option("--replace-rejected", help="Make others in place of those that people rejected (sgid review).")
    ] = False,
    captioner: options.Captioner = "auto",
    scorer: options.Scorer = "auto",
    class_names: options.ClassNames = None,
    device: options.Devices = "auto",
    batch_size: options.BatchSize = 32,
    json: options.Json = False,
) -> int:
    """Make K variants of every image of DATA.

    It first writes missing captions, and skips what is already there. Run it again after Ctrl-C or a crash, or with new
    images.
    """
    from sgid_transforms.bulk import estimate_folder, generate_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.variants.store import VariantStore

    wanted = options.recipe_from(recipe, model)
    share = options.shard_from(shard)
    devices = options.resolve_devices(device)
    models = replace(options.models_from(devices[0], batch_size, captioner, scorer), devices=devices)
    store = VariantStore(variants)
    scan = scan_folder(data, options.class_names_from(class_names), progress=not json)
    if wanted.model == "tiny":
        note(tiny_note((image.file.label for image in scan.images), (image.size for image in scan.images)))
    if dry_run:
        with closing(CaptionStore(captions)) as texts:
            estimate = estimate_folder(scan, wanted, texts, store, count=count, shard=share, models=models)
        if json:
            say_json({"report": estimate, "seconds": estimate.seconds, "bytes": estimate.bytes})
        else:
            _say_estimate(estimate, data)
        return PARTIAL if estimate.skipped or estimate.bytes > estimate.free_bytes else 0
    variants.mkdir(parents=True, exist_ok=True)  # fails before the work rather than after it
    if retry_filtered:
        store.forget_failures(wanted)
    with closing(CaptionStore(captions)) as texts, stoppable() as stop:
        done = generate_folder(
            scan, wanted, texts, store, count=count, shard=share, models=models, progress=not json, stop=stop,
            replace_rejected=replace_rejected,
        )  # fmt: skip
    note(turned_note(done.captions.turned))
    if json:
        say_json({"recipe": wanted.fingerprint, "store": variants, "report": done})
    else:
        _say_report(done, len(scan.classes), variants, data)
    return INTERRUPTED if done.stopped else PARTIAL if done.captions.skipped or done.failed else 0


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
            ("captions", f"{captions.captioned} written now{_against(captions)}"),
            ("variants", f"{done.wanted} wanted: {', '.join(parts)}"),
            ("store", str(variants)),
        ]
    )
    list_skipped("left out", captions.skipped, data)
    list_skipped("failed", done.failed, data)


def _against(captions: "CaptionReport") -> str:
    return f", {captions.contradictions} contradict their label" if captions.contradictions else ""


def _say_estimate(estimate: "Estimate", data: Path) -> None:
    each_caption, each = duration(estimate.seconds_per_caption), duration(estimate.seconds_per_variant)
    table(
        [
            ("images", str(estimate.images)),
            ("captions", f"{estimate.captions_missing} to write, {each_caption} each"),
            ("variants", f"{estimate.missing} of {estimate.wanted} to make, {each} each (measured on {estimate.sampled})"),
            ("time", f"about {duration(estimate.seconds)} on this device, without loading the models"),
            ("disk", f"about {size(estimate.bytes)} of {size(estimate.free_bytes)} free"),
        ]
    )
    if estimate.bytes > estimate.free_bytes:
        say("That does not fit on the disk: ask for fewer variants, or store them elsewhere with --variants.")
    list_skipped("would be left out", estimate.skipped, data)
