"""``sgid prune``: remove the variants of recipes that are not used any more."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import bar, fail, say, say_json, size


def command(
    keep: Annotated[
        list[str], typer.Option(metavar="RECIPE", help="To keep: a recipe file, a model, or a fingerprint. Repeatable.")
    ],
    variants: Annotated[Path, typer.Argument(metavar="DIR", help="Variant store.")] = Path("variants"),
    yes: Annotated[bool, typer.Option("--yes", help="Really remove; otherwise only say what would be removed.")] = False,
    json: options.Json = False,
) -> None:
    """Remove the variants of recipes that are not used any more.

    Only files that a store writes are ever removed.
    """
    from sgid_transforms.variants.store import VariantStore

    if not variants.is_dir():
        fail(f"there is no variant store at {variants}; give its folder")
    store = VariantStore(variants)
    stats = store.stats()
    there = sorted({*stats.variants, *stats.failures})
    kept = {_fingerprint(name, there) for name in keep}
    removed = {name: stats.variants.get(name, 0) for name in there if name not in kept}
    freed = sum(stats.bytes.get(name, 0) for name in removed)
    if yes and removed:
        store.prune(kept, progress=bar("removing", "file", json))
    if json:
        say_json({"store": variants, "kept": sorted(kept), "removed": removed, "bytes": freed, "done": yes})
        return
    for name in there:
        verdict = "kept" if name in kept else "removed" if yes else "would be removed"
        say(f"{name}  {stats.variants.get(name, 0)} variants, {size(stats.bytes.get(name, 0))}: {verdict}")
    if removed and not yes:
        say(f"nothing was removed; add --yes to free {size(freed)}")


def _fingerprint(name: str, there: Iterable[str]) -> str:
    """The fingerprint that a user means, which must be in the store: a slip would remove everything."""
    from sgid_transforms.recipe.recipe import Recipe

    known = list(there)
    if name in known:
        return name
    recipe = Recipe.from_toml(name) if name.endswith(".toml") else Recipe.for_model(name)
    if recipe.fingerprint not in known:
        fail(
            f"--keep {name}: the store has no variants of it (fingerprint {recipe.fingerprint}); "
            f"it has {', '.join(known) or 'none at all'}"
        )
    return recipe.fingerprint
