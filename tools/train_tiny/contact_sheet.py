"""Draw the README's picture: originals of the package's samples, and variants by the bundled model at growing strength."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from sgid_transforms.captions.prepare import Describer
from sgid_transforms.generation.generator import Generator
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.images.folders import list_folder
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.guidance import guidance_scale
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Filters, Recipe
from sgid_transforms.report import contact_sheet

ROOT = Path(__file__).parents[2]
STRENGTHS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)


def originals(folder: Path, rows: int, skip: int) -> list[tuple[str, torch.Tensor]]:
    """Labels and images, from all classes in turn; the choice depends on file names alone."""
    files = list_folder(folder).files
    by_class = [[file for file in files if file.label == label] for label in sorted({file.label for file in files})]
    turns = [of_class[skip + turn] for turn in range(min(map(len, by_class)) - skip) for of_class in by_class]
    chosen = sorted(turns[:rows], key=lambda file: file.label)
    return [(file.label, to_uint8_chw(load_image(file.path))) for file in chosen]


def beside(left: Image.Image, right: Image.Image, gap: int = 24) -> Image.Image:
    """Two sheets as one."""
    sheet = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--samples", type=Path, default=ROOT / "src" / "sgid_transforms" / "assets" / "samples")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "tiny-contact-sheet.png")
    p.add_argument("--rows", type=int, default=16, help="originals; shown in two columns of half as many")
    p.add_argument("--skip", type=int, default=0, help="of each class, begin with this image")
    p.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cell", type=int, default=96, help="side of an image on the sheet in pixels")
    args = p.parse_args()

    recipe = Recipe.for_model("tiny").replace(filters=Filters(max_retries=0))
    generator = Generator.from_recipe(recipe, device="cpu")
    chosen = originals(args.samples, args.rows, args.skip)
    describer = Describer(recipe.prompt, "tiny", None, "cpu", mode=recipe.caption_mode)
    captions = describer.caption([image for _, image in chosen], [label for label, _ in chosen])
    tokens = {"tokenizer": generator.tokenizer, "max_tokens": generator.max_tokens}
    requests = [
        GenerationRequest(
            image,
            build_prompt(recipe.prompt, label, caption, **tokens),
            strength=strength,
            guidance_scale=guidance_scale(recipe.guidance, None),
            seed=args.seed + row,
        )
        for row, ((label, image), caption) in enumerate(zip(chosen, captions, strict=True))
        for strength in args.strengths
    ]
    variants = [result.image for result in generator(requests)]
    width = len(args.strengths)
    rows = [[image, *variants[row * width : (row + 1) * width]] for row, (_, image) in enumerate(chosen)]
    labels = [label for label, _ in chosen]
    columns = ["original", *(f"strength {strength:g}" for strength in args.strengths)]
    half = (len(rows) + 1) // 2
    parts = [
        contact_sheet(rows[part], row_titles=labels[part], column_titles=columns, cell=args.cell)
        for part in (slice(None, half), slice(half, None))
        if rows[part]
    ]
    sheet = parts[0] if len(parts) == 1 else beside(parts[0], parts[1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, optimize=True)
    print(f"{args.out}: {sheet.width} x {sheet.height} pixels, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
