"""``sgid doctor``: what works here, what does not, and what to do about it."""

from pathlib import Path

import typer

from sgid_transforms.cli import checks, codes, options
from sgid_transforms.cli.output import say, say_json


def command(
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    captions: options.Captions = Path("captions.sqlite"),
    variants: options.Variants = Path("variants"),
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Check what works here, and what to do about the rest.

    Versions, devices, attention kernels, disk, stores, and whether the model loads. Exit code 1 if something will not
    work. Nothing is written or fetched.
    """
    wanted = options.recipe_from(recipe, model)
    where = options.resolve_device(device)
    found: list[checks.Check] = []
    for part in (
        checks.versions(),
        checks.devices(),
        checks.attention(where),
        checks.disk(variants),
        checks.network(wanted.model),
        checks.stores(captions, variants),
        checks.model(wanted, where),
    ):
        for check in part:
            found.append(check)
            if not json:
                _say(check)
    problems = [check for check in found if check.status == "problem"]
    if json:
        say_json({"ok": not problems, "checks": found})
    else:
        say(f"\n{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    if problems:
        raise typer.Exit(codes.ERROR)


def _say(check: checks.Check) -> None:
    say(f"{check.status:<8} {check.name}: {check.detail}")
    if check.advice:
        say(f"{'':<8} -> {check.advice}")
