"""``sgid preview``: what strength and guidance do to one image."""

from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import PARTIAL, bar, fail, note, say, tiny_note


def preview(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    label: Annotated[str, typer.Option(metavar="NAME", help="Its class in words.")],
    caption: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it shows; by default, the captioner writes it.")
    ] = None,
    strengths: Annotated[str, typer.Option(metavar="LIST", help="Columns of the sheet.")] = "0.25,0.5,0.75,1",
    guidances: Annotated[str | None, typer.Option(metavar="LIST", help="Rows; by default around the recipe's.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the sheet goes.")] = Path("preview.png"),
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all variants.")] = 0,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    captioner: options.Captioner = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = 8,
) -> int:
    """Draw variants of one IMAGE over strengths and guidances.

    The contact sheet shows what the recipe's two main settings do, so that you can choose them.
    """
    from sgid_transforms.building.builder import load_generator
    from sgid_transforms.captions.prepare import Describer
    from sgid_transforms.errors import ImageError
    from sgid_transforms.generation.requests import GenerationRequest, GenerationResult
    from sgid_transforms.images.keys import to_uint8_chw
    from sgid_transforms.images.reading import load_image
    from sgid_transforms.recipe.prompts import build_prompt, clean_label
    from sgid_transforms.recipe.recipe import Filters
    from sgid_transforms.report import contact_sheet

    wanted = options.recipe_from(recipe, model).replace(filters=Filters(max_retries=0))
    models = options.models_from(device, batch_size, captioner)
    columns = _numbers(strengths, "--strengths")
    rows = _numbers(guidances, "--guidances") if guidances is not None else _around(wanted.guidance)
    for strength in columns:
        wanted.replace(strength=strength)  # raises an error if the recipe has too few steps for it
    for guidance in rows:
        wanted.replace(guidance=guidance)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise typer.BadParameter(f"{out} has no image file ending; name it, for example, preview.png", param_hint="--out")
    words = clean_label(label)
    try:
        original = to_uint8_chw(load_image(image))
    except ImageError as error:
        fail(f"{image}: {error}")
    if wanted.model == "tiny":
        note(tiny_note([words], [(original.shape[1], original.shape[2])]))
    if caption is None:
        describer = Describer(wanted.prompt, models.captioner_for(wanted), None, models.device, mode=wanted.caption_mode)
        caption = describer.caption([original], [words])[0]
    generate = load_generator(wanted, models.device, batch_size=batch_size)
    tokenizer = getattr(generate, "tokenizer", None)
    limit = getattr(generate, "max_tokens", None) if tokenizer is not None else None
    prompt = build_prompt(wanted.prompt, words, caption, tokenizer=tokenizer, max_tokens=limit)
    results: list[GenerationResult] = []
    for guidance in bar("drawing", "row", False)(rows):
        results += generate(
            [
                GenerationRequest(
                    original, prompt, wanted.negative_prompt, strength, guidance, seed, words, f"{strength:g}/{guidance:g}"
                )
                for strength in columns
            ]
        )
    width = len(columns)
    sheet = contact_sheet(
        [[original, *(result.image for result in results[row * width : (row + 1) * width])] for row in range(len(rows))],
        row_titles=[f"guidance {guidance:g}" for guidance in rows],
        column_titles=["original", *(f"strength {strength:g}" for strength in columns)],
        cell=128,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    say(f"prompt: {prompt}")
    say(f"sheet:  {out}")
    missing = [f"{result.reason}" for result in results if result.image is None]
    if missing:
        say(f"{len(missing)} of {len(results)} cells are empty: {', '.join(sorted(set(missing)))}")
    return PARTIAL if missing else 0


def _numbers(text: str, option: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 16:
        raise typer.BadParameter(
            f"{text!r} is not a list of 1 to 16 numbers; write them with commas: 0.3,0.6", param_hint=option
        )
    return numbers


def _around(guidance: object) -> list[float]:
    """Rows around a recipe's guidance: none, its own, and stronger."""
    low = float(getattr(guidance, "low", guidance))  # type: ignore[arg-type]
    high = float(getattr(guidance, "high", guidance))  # type: ignore[arg-type]
    if high <= 1:  # a distilled model, which takes no guidance
        return [high]
    return sorted({1.0, low, high, 2 * high - 1})
