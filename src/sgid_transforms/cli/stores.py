"""``sgid export``, ``sgid verify``, ``sgid prune`` and ``sgid pack``: work on an existing store."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import PARTIAL, bar, fail, list_skipped, say, say_json, size, table
from sgid_transforms.errors import StoreError
from sgid_transforms.files import show

if TYPE_CHECKING:
    from sgid_transforms.captions.store import CaptionsReport
    from sgid_transforms.recipe.recipe import Recipe
    from sgid_transforms.variants.store import VariantRef, VariantStore

_Texts = Annotated[Path | None, typer.Option("--captions", metavar="FILE", help="Caption store, to find outdated variants.")]
_Checked = Annotated[Path | None, typer.Option("--captions", metavar="FILE", help="Caption store, to check it as well.")]


def export(
    data: options.Data,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new, empty, or from an earlier export.")],
    variants: options.Variants = Path("variants"),
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    captions: options.Captions = Path("captions.sqlite"),
    originals: Annotated[bool, typer.Option("--originals", help="Copy the original images as well.")] = False,
    class_names: options.ClassNames = None,
    json: options.Json = False,
) -> int:
    """Write variants as an ordinary folder of class folders.

    OUT gets the same class folders as DATA, and a metadata.jsonl: torchvision's ImageFolder and Hugging Face's imagefolder
    both read it. Files are copied unchanged. Variants that were made with an outdated caption or label are left out.
    """
    from sgid_transforms.bulk import scan_folder
    from sgid_transforms.bulk.export import export_folder
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.variants.store import VariantStore

    wanted = options.recipe_from(recipe, model)
    scan = scan_folder(data, options.class_names_from(class_names), progress=not json)
    store = VariantStore(variants, readonly=True)
    texts = CaptionStore(captions, readonly=True) if captions.exists() else None
    done = export_folder(scan, wanted, store, out, captions=texts, originals=originals, progress=bar("copying", "img", json))
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
    return PARTIAL if done.skipped else 0


def verify(
    variants: options.Store = Path("variants"),
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged to DIR/quarantine.")] = False,
    captions: _Checked = None,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    json: options.Json = False,
) -> int:
    """Check every file of a variant store, and captions.

    Each is read, decoded, and compared with its digest. After --repair, `sgid generate` makes damaged variants again. With
    --captions, every record is compared with its digest, and variants of the recipe that training no longer finds, because
    their text has changed, are counted. If the caption store itself is damaged, --repair replaces it by what can be read of
    it; the old one stays beside it as FILE.damaged.
    """
    texts = _check_captions(captions, repair) if captions is not None else None
    store = options.variant_store(variants, readonly=not repair)
    try:
        report = store.verify(repair=repair, progress=bar("checking", "file", json))
    except StoreError as error:
        fail(f"could not repair {variants}: {error}" if repair else str(error))
    found = [("damaged", path) for path in report.damaged] + [("foreign", path) for path in report.foreign]
    if repair and any(os.path.lexists(path) for _, path in found):
        again = options.variant_store(variants).verify()  # a training may have made a damaged variant again meanwhile
        if left := len(again.damaged) + len(again.foreign):
            fail(f"could not repair {variants}: {left} files could not be moved; check that the folder can be written")
    outdated = len(_outdated(store, captions, options.recipe_from(recipe, model))) if captions is not None else None
    if json:
        ok = report.ok and (texts is None or texts.ok)
        say_json({"store": variants, "ok": ok, "report": report, "outdated": outdated, "captions": texts})
    else:
        if texts is not None:
            say(f"{texts.checked} captions checked, {len(texts.damaged)} damaged{f'; {texts.broken}' if texts.broken else ''}")
            for key in texts.damaged:
                say(f"  damaged: {show(key)}")
        if outdated is not None:
            say(f"{outdated} outdated variants: their image's caption, label or guidance has changed (sgid prune removes them)")
        say(f"{report.checked} files checked, {len(report.damaged)} damaged, {len(report.foreign)} foreign")
        for kind, path in found:
            say(f"  {kind}: {show(path)}")
        if repair and report.repaired:
            say(f"{report.repaired} moved to {variants / 'quarantine'}")
        elif found:
            say("run `sgid verify --repair` to move them aside, then `sgid generate` to make them again")
    return PARTIAL if len(found) > report.repaired or not (texts is None or texts.ok or repair) else 0


def prune(
    keep: Annotated[
        list[str], typer.Option(metavar="RECIPE", help="To keep: a recipe file, a model, or a fingerprint. Repeatable.")
    ],
    variants: options.Store = Path("variants"),
    captions: _Texts = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it, only list them.")] = False,
    json: options.Json = False,
) -> None:
    """Remove the variants of recipes that you no longer use.

    It removes only files that a store writes. With --captions, it also removes variants of the kept recipes that training no
    longer finds, because the caption, label or guidance of their image has changed.
    """
    store = options.variant_store(variants, readonly=not yes)
    stats = store.stats()
    there = sorted({*stats.variants, *stats.failures})
    kept = {_fingerprint(name, there) for name in keep}
    removed = {name: stats.variants.get(name, 0) for name in there if name not in kept}
    recipes = [_recipe(name) for name in keep if name not in there]  # a bare fingerprint does not tell the texts
    outdated = [ref for recipe in recipes if captions is not None for ref in _outdated(store, captions, recipe)]
    freed = sum(stats.bytes.get(name, 0) for name in removed) + sum(
        ref.path.stat().st_size for ref in outdated if not ref.is_packed
    )
    if yes and removed:
        store.prune(kept, progress=bar("removing", "file", json))
    if yes:
        store.remove(outdated)
    if json:
        kinds = {"kept": sorted(kept), "removed": removed, "outdated": len(outdated), "bytes": freed, "done": yes}
        say_json({"store": variants, **kinds})
        return
    for name in there:
        verdict = "kept" if name in kept else "removed" if yes else "would be removed"
        say(f"{name}  {stats.variants.get(name, 0)} variants, {size(stats.bytes.get(name, 0))}: {verdict}")
    if outdated:
        say(f"{len(outdated)} variants and rejections out of date: {'removed' if yes else 'would be removed'}")
    if (removed or outdated) and not yes:
        say(f"nothing was removed; add --yes to free {size(freed)}")


def pack(
    variants: options.Store = Path("variants"),
    shard_mb: Annotated[
        int, typer.Option("--shard-mb", min=1, metavar="N", help="Size of a tar file, in MB, at which another one begins.")
    ] = 1000,
    json: options.Json = False,
) -> None:
    """Move the variants of a store into few large files.

    File systems that suffer from millions of small files then see some tar files with an index. Training, reports and all
    commands go on as before; new variants are ordinary files until the next `sgid pack`. The tar files are in WebDataset's
    layout. You may run it while others read or write, interrupt it, and run it again.
    """
    store = options.variant_store(variants, readonly=False)
    done = store.pack(shard_bytes=shard_mb * 1_000_000, progress=bar("packing", "file", json))
    stats = store.stats()
    if json:
        say_json({"store": variants, "packed": done, "report": stats})
        return
    say(f"{done} files packed; the store has {sum(stats.variants.values())} variants, {size(sum(stats.bytes.values()))}")


def _fingerprint(name: str, there: Collection[str]) -> str:
    """The fingerprint that a user means. It must be in the store, because a typing error would remove everything."""
    if name in there:
        return name
    recipe = _recipe(name)
    if recipe.fingerprint not in there:
        fail(
            f"--keep {name}: the store has no variants of it (fingerprint {recipe.fingerprint}); "
            f"it has {', '.join(there) or 'none at all'}"
        )
    return recipe.fingerprint


def _recipe(name: str) -> "Recipe":
    from sgid_transforms.recipe.recipe import Recipe

    return Recipe.from_toml(name) if name.endswith(".toml") else Recipe(model=name)


def _check_captions(captions: Path, repair: bool) -> "CaptionsReport":
    from sgid_transforms.captions.store import CaptionStore

    return CaptionStore(captions, readonly=not repair).verify(repair=repair)


def _outdated(store: "VariantStore", captions: Path, recipe: "Recipe") -> "list[VariantRef]":
    """Variants and remembered rejections that no image's current text leads to."""
    from sgid_transforms.building.address import Address
    from sgid_transforms.captions.store import CaptionStore

    address = Address(recipe, CaptionStore(captions, readonly=True))
    both = (one for failures in (False, True) for one in address.current(store, failures=failures))
    return [one.ref for one in both if one.is_current is False]
