"""The bundle's model card, written from the measured figures and the stages' logs: no figure is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAGES = ("vae", "unet", "distil", "clip", "captioner", "judge")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _verdict(value: float, least: float) -> str:
    return "yes" if value >= least else "**no**"


def _row(what: str, value: float, least: float, unit: str = "%") -> str:
    shown = _percent(value) if unit == "%" else f"{value:.2f} {unit}"
    wanted = _percent(least) if unit == "%" else f"{least:g} {unit}"
    return f"| {what} | {shown} | {wanted} | {_verdict(value, least)} |"


def figures(parts: dict[str, Any]) -> list[str]:
    """Table rows for what was measured; parts that were not are left out."""
    rows = []
    if vae := parts.get("vae"):
        lost = vae["judge_on_originals"] - vae["judge_on_reconstructions"]
        rows.append(_row("autoencoder, PSNR of reconstructions", vae["psnr"], 36, "dB"))
        rows.append(
            f"| judge's accuracy, originals / reconstructions | {_percent(vae['judge_on_originals'])} / "
            f"{_percent(vae['judge_on_reconstructions'])} | at most 2 points lost | {_verdict(-lost, -0.02)} |"
        )
    if clip := parts.get("clip"):
        rows.append(_row("CLIP, zero-shot label accuracy (10 prompts)", clip["zero_shot"], 0.75))
    if captions := parts.get("captioner"):
        rows.append(_row("captioner, sub-category words of the right class", captions["class"], 0.65))
        rows.append(_row("captioner, first colour is one of the object's", captions["colour"], 0.70))
    for strength in ("0.3", "0.5", "0.7", "0.9", "1"):
        made = [parts.get(f"{text}_{strength}") for text in ("label", "own", "travelling")]
        if all(made):
            relative = [one["relative"] for one in made]
            rows.append(
                f"| variants at strength {strength}: label agreement relative to the originals', by prompts of label / label and own "
                f"context / label and another image's context | {' / '.join(map(_percent, relative))} | "
                f"97.0 % each | {_verdict(min(relative), 0.97)} |"
            )
            background, change = made[2]["background"], [one["pixel_difference"] for one in made]
            rows.append(
                f"| the same: background colour of the other image's context found / mean change of a pixel's value, by prompt | "
                f"{_percent(background)} / {' / '.join(map(_percent, change))} | "
                f"{'60.0 % found' if strength == '1' else ''} | {_verdict(background, 0.6) if strength == '1' else ''} |"
            )
    return rows


def training(work: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Length and last loss of each stage by its log, or, where ``work`` has none, what is ``known`` of an earlier run."""
    stages = {}
    for stage in STAGES:
        log = work / f"{stage}.jsonl"
        if log.exists():
            last = json.loads(log.read_text().splitlines()[-1])
            stages[stage] = {"steps": last["step"], "minutes": round(last["seconds"] / 60), "loss": last["loss"]}
        elif stage in known:
            stages[stage] = known[stage]
    return stages


def _training_rows(stages: dict[str, Any]) -> list[str]:
    return [
        f"| {stage} | {stages[stage]['steps']} | {stages[stage]['minutes']} min | {stages[stage]['loss']:.4f} |"
        if stage in stages
        else f"| {stage} | taken over from an earlier bundle; no log | | |"
        for stage in STAGES
    ]


def sizes(bundle: Path) -> list[str]:
    files = sorted(bundle.rglob("*.safetensors"))
    rows = [f"| `{file.relative_to(bundle)}` | {file.stat().st_size / 1e6:.1f} MB |" for file in files]
    return [*rows, f"| together | {sum(f.stat().st_size for f in files) / 1e6:.1f} MB |"]


TEMPLATE = """# The bundled `tiny` models

Three real, small, trained models, so that a first run, every test and every example need no download. They know the ten
classes of CIFAR-10 at 32x32 pixels and nothing else: for any other data, name a real checkpoint.

| folder | what | class |
| --- | --- | --- |
| `pipeline/` | label- and caption-guided image-to-image | `diffusers.StableDiffusionImg2ImgPipeline` (`AutoencoderTiny`, 12 channels at half resolution; v-prediction) |
| `clip/` | image-text similarity | `transformers.CLIPModel` + `CLIPProcessor` |
| `captioner/` | captions from pixels | `transformers.BlipForConditionalGeneration` + `BlipProcessor` |

All weights are fp16 safetensors and load with `from_pretrained(folder, local_files_only=True, use_safetensors=True)`.

## Data and licence
Trained on 45,000 of the 50,000 CIFAR-10 training images (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*,
2009; https://www.cs.toronto.edu/~kriz/cifar.html, which asks for that citation and states no licence). The other 5,000 training
images (`fewshot`) and the test images were not trained on. Texts come from the class labels, from the words in CIFAR-10's own
file names and from colour words computed from the pixels. The weights are released under the package's Apache-2.0 licence;
what the images' unstated licence means for your use is for you to judge.

## Measured
By `tools/train_tiny/evaluate.py` on the 5,000 `test` images ({machine}). The judge is a small convnet trained on the same
45,000 images, which touched no other model. Variants: by the package's generator with the preset's sampler and steps, prompt
`a photo of a {{label}}, {{caption}}` with contexts of the bundled captioner, guidance {best}, which was chosen on {search} images of the
training split, of the first {images} images (the judge knows {originals} of these originals).

| what | measured | wanted | reached |
| --- | --- | --- | --- |
{figures}

Guidance scales tried at strength {search_strength} (label agreement): {guidance}.

## Size
| file | size |
| --- | --- |
{sizes}

## Training
On 2 CPU cores, other work beside it, by `tools/train_tiny` (one command a stage, seeded, resumable). The last run of each stage. The UNet
comes from three earlier editions; its schedule became Stable Diffusion's own, rescaled to end in pure noise (zero terminal SNR), which
took 8,400 steps more: half of them under a schedule of half its sigmas. `distil` then taught a student to do in four steps what
twelve do under guidance.

| stage | steps | time | last training loss |
| --- | --- | --- | --- |
{training}

CLIP's and the captioner's lengths were chosen with figures on `test` in view, in an earlier edition, so those are slightly favourable.

## Known weaknesses
- 32x32 pixels, ten classes; words outside CIFAR-10's captions are spelt in pieces and mean nothing to the models.
- The student is told its guidance scale (1 to 7), so guidance costs no second pass; a negative prompt has no effect, nor has
  `guidance_interval`. It was taught four steps: with more it gets no better.
- Guidance has two parts: towards what stands before the prompt's first comma by the scale itself, and from there towards the whole
  prompt by a scale that grows a quarter as fast. Otherwise a context that was lent by another picture outweighs the label.
- Trained for a few hours on a CPU: textures are softer than the data's, and shapes at high strength are those of a sketch. Where
  labels matter, set `Filters(label_check="argmax")`.
- The captioner names the nearest common sub-category; colours are those of a fixed table, read off the centre and border.
"""


def write_card(bundle: Path, parts: dict[str, Any]) -> None:
    """Write ``README.md`` beside the weights."""
    search = parts.get("guidance_search", {})
    tried = ", ".join(f"{row['guidance']:g}: {_percent(row['agreement'])}" for row in search.get("table", [])) or "not measured"
    table = search.get("table", [])
    best = f"{max(table, key=lambda row: row['agreement'])['guidance']:g}" if table else "not measured"
    known = parts.get("originals", {})
    text = TEMPLATE.format(
        machine="2 CPU cores, fp32", search=search.get("images", 0), search_strength=search.get("strength", "-"), best=best,
        images=known.get("images", 0), originals=_percent(known.get("agreement", 0.0)), guidance=tried,
        figures="\n".join(figures(parts)), sizes="\n".join(sizes(bundle)), training="\n".join(_training_rows(parts.get("training", {}))),
    )  # fmt: skip
    (bundle / "README.md").write_text(text)
