"""``sgid verify``: whether every file of a variant store is what it should be."""

from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import codes, options
from sgid_transforms.cli.output import bar, fail, say, say_json


def command(
    variants: Annotated[Path, typer.Argument(metavar="DIR", help="Variant store.")] = Path("variants"),
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged to DIR/quarantine.")] = False,
    json: options.Json = False,
) -> None:
    """Check every file of a variant store.

    Each is read, decoded, and compared with its digest. After --repair, `sgid generate` makes what was damaged again.
    """
    from sgid_transforms.images.folders import show
    from sgid_transforms.variants.store import VariantStore

    if not variants.is_dir():
        fail(f"there is no variant store at {variants}; give its folder")
    store = VariantStore(variants, readonly=not repair)
    report = store.verify(repair=repair, progress=bar("checking", "file", json))
    if json:
        say_json({"store": variants, "ok": report.ok, "report": report})
    else:
        say(f"{report.checked} files checked, {len(report.damaged)} damaged, {len(report.foreign)} foreign")
        for kind, paths in (("damaged", report.damaged), ("foreign", report.foreign)):
            for path in paths:
                say(f"  {kind}: {show(path)}")
        if repair and report.repaired:
            say(f"{report.repaired} moved to {variants / 'quarantine'}")
        elif not report.ok:
            say("run `sgid verify --repair` to move them aside, then `sgid generate` to make them again")
    if len(report.damaged) + len(report.foreign) > report.repaired:
        raise typer.Exit(codes.PARTIAL)
