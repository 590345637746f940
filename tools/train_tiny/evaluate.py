"""Measure the exported bundle on the 5,000 ``test`` images and write ``metrics.json`` and the model card beside it.

CLIP and autoencoder are loaded as a user of plain diffusers and transformers would, and variants are made by the package's own
generator with the sampler and the steps of the `tiny` preset. Parts already measured for the same weights are read back, so
that an interrupted run resumes; ``--limit`` measures on fewer images and says so in the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch.nn import functional as F
from tqdm import tqdm

import classifier
from data import CLASSES, Split, load_split
from sgid_transforms.generation.generator import Generator
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Filters, Recipe
from words import COLOURS, describe

STRENGTHS = (0.3, 0.5, 0.7, 0.9, 1.0)
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.0)


def digest(bundle: Path, *folders: str) -> str:
    """Short hash of the weights that a figure depends on."""
    sha = hashlib.sha256()
    for folder in folders:
        for file in sorted((bundle / folder).rglob("*.safetensors")):
            sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def accuracy(judge: classifier.Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (classifier.predict(judge, images).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def measure_vae(bundle: Path, data: Split, judge: classifier.Classifier) -> dict[str, float]:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(bundle / "pipeline", subfolder="vae", dtype=torch.float32, use_safetensors=True)
    out = [vae.decode(vae.encode(x.float() / 127.5 - 1).latents).sample.clamp(-1, 1) for x in data.images.split(250)]
    rebuilt = ((torch.cat(out) + 1) * 127.5).round().to(torch.uint8)
    mse = ((rebuilt.float() - data.images.float()) / 255).pow(2).mean((1, 2, 3))
    return {
        "psnr": (-10 * mse.log10()).mean().item(),
        "judge_on_originals": accuracy(judge, data.images, data.labels),
        "judge_on_reconstructions": accuracy(judge, rebuilt, data.labels),
    }


class Clip:
    """The bundled CLIP, by plain transformers."""

    def __init__(self, bundle: Path) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(bundle / "clip", dtype=torch.float32, local_files_only=True).eval()
        self.processor = CLIPProcessor.from_pretrained(bundle / "clip", local_files_only=True)

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        out = []
        for x in images.split(500):
            pixels = self.processor.image_processor(list(x), return_tensors="pt").pixel_values
            out.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(out), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        ids = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.text_projection(self.model.text_model(**ids).pooler_output), dim=-1)


def measure_clip(bundle: Path, data: Split) -> dict[str, float]:
    clip = Clip(bundle)
    text = clip.texts([f"a photo of a {name}" for name in CLASSES])
    right = (clip.images(data.images) @ text.T).argmax(1) == data.labels
    return {"zero_shot": right.float().mean().item()}


def write_captions(bundle: Path, images: torch.Tensor, labels: list[str] | None = None) -> list[str]:
    """Captions from the pixels alone or, with labels, contexts."""
    from sgid_transforms.models.captioner import Captioner

    captioner = Captioner(str(bundle / "captioner"), batch_size=250, mode="free" if labels is None else "context")
    return captioner.caption(list(images), labels)


def measure_captions(captions: list[str], data: Split, classes_of: dict[str, int]) -> dict[str, Any]:
    """Class of the sub-category words, and whether the first object colour is one that the pixels show."""
    looks = describe(data.images)
    right_class = right_colour = 0
    for text, label, look in zip(captions, data.labels.tolist(), looks, strict=True):
        parts = [part.strip() for part in text.split(",")]
        noun = parts[0].split(" ", 1)[-1]
        right_class += classes_of.get(noun) == label
        said = next((word for part in parts[1:] for word in part.split() if word in COLOURS), None)
        right_colour += said in look["object"]
    return {"class": right_class / len(captions), "colour": right_colour / len(captions), "examples": captions[:8]}


def make_variants(
    generator: Generator, images: torch.Tensor, prompts: list[str], strength: float, guidance: float, seed: int = 0
) -> torch.Tensor:
    """uint8 variants of uint8 images."""
    requests = [
        GenerationRequest(image, prompt, strength=strength, guidance_scale=guidance, seed=seed + number)
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
    made = [
        result.image for result in tqdm(generator(requests), desc=f"strength {strength} guidance {guidance}", mininterval=10)
    ]
    return torch.stack([original if image is None else image for original, image in zip(images, made, strict=True)])


def load_generator(bundle: Path) -> Generator:
    """The bundle under the settings of the preset, without filters."""
    recipe = Recipe.for_model("tiny").replace(revision=str(bundle), filters=Filters(max_retries=0))
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        bundle / "pipeline", dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return Generator.from_recipe(recipe, device="cpu", batch_size=50, pipeline=pipeline)


def has_background(images: torch.Tensor, looks: list[dict[str, Any]]) -> float:
    """Share of the images whose background has the colour that their prompts named."""
    return sum(a["background"] == b["background"] for a, b in zip(describe(images), looks, strict=True)) / len(looks)


class Results:
    """``metrics.json``, where each part carries the digest of the weights that it was measured on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def part(self, name: str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.parts.get(name, {}).get("weights") != key:
            began = time.monotonic()
            self.parts[name] = {"weights": key, **measure()}
            self.parts[name]["seconds"] = round(time.monotonic() - began, 1)
            self.write()
            print(name, json.dumps(self.parts[name]))
        return self.parts[name]

    def write(self) -> None:
        self.path.write_text(json.dumps(self.parts, indent=1, sort_keys=True) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--work", required=True, type=Path, help="the stages' folder: the judge's weights and the training logs")
    p.add_argument("--bundle", type=Path, default=Path(__file__).parents[2] / "src" / "sgid_transforms" / "assets" / "tiny")
    p.add_argument("--limit", type=int, default=5000, help="images for the variants")
    p.add_argument("--search", type=int, default=500, help="images on which the best guidance scale is chosen")
    p.add_argument("--only", nargs="*", choices=("vae", "clip", "captioner", "variants"), help="parts to measure (all)")
    args = p.parse_args()
    wanted = args.only or ["vae", "clip", "captioner", "variants"]

    data = load_split(args.data, "test")
    judge = classifier.load(args.work, "judge")
    results = Results(args.bundle / "metrics.json")
    if "vae" in wanted:
        results.part("vae", digest(args.bundle, "pipeline/vae"), lambda: measure_vae(args.bundle, data, judge))
    if "clip" in wanted:
        results.part("clip", digest(args.bundle, "clip"), lambda: measure_clip(args.bundle, data))
    if "captioner" in wanted:
        captions = write_captions(args.bundle, data.images)
        pretrain = load_split(args.data, "pretrain")
        classes_of = dict(zip(pretrain.subnames, pretrain.labels.tolist(), strict=True))
        key = digest(args.bundle, "captioner")
        results.part("captioner", key, lambda: measure_captions(captions, data, classes_of))
    if "variants" in wanted:
        measure_all_variants(args, data, judge, results)

    from card import training, write_card

    results.parts["training"] = training(args.work, results.parts.get("training", {}))
    results.write()
    write_card(args.bundle, results.parts)


def measure_all_variants(args: argparse.Namespace, data: Split, judge: classifier.Classifier, results: Results) -> None:
    weights = f"{digest(args.bundle, 'pipeline', 'captioner')}-{args.limit}"
    generator, clip = load_generator(args.bundle), Clip(args.bundle)

    def labels_of(split: Split) -> list[str]:
        return [CLASSES[label] for label in split.labels.tolist()]

    def prompts_of(labels: list[str], contexts: list[str]) -> list[str]:
        return [build_prompt("a photo of a {label}, {caption}", *pair) for pair in zip(labels, contexts, strict=True)]

    n = args.limit
    test = Split(data.images[:n], data.labels[:n], data.subnames[:n], data.names[:n])
    labels = labels_of(test)
    contexts = write_captions(args.bundle, test.images, labels)
    lenders = [(7 * number + 3) % len(labels) for number in range(len(labels))]  # of other images, mostly of other classes
    described = describe(test.images)
    looks = [described[number] for number in lenders]
    prompts = {
        "own": prompts_of(labels, contexts),
        "label": prompts_of(labels, [""] * len(labels)),
        "travelling": prompts_of(labels, [contexts[number] for number in lenders]),
    }
    originals = accuracy(judge, test.images, test.labels)
    features = clip.images(test.images)

    def measure(text: str, strength: float, guidance: float) -> dict[str, Any]:
        made = make_variants(generator, test.images, prompts[text], strength, guidance)
        agreement = accuracy(judge, made, test.labels)
        return {
            "strength": strength, "guidance": guidance, "images": n, "agreement": agreement, "relative": agreement / originals,
            "image_similarity": (clip.images(made) * features).sum(1).mean().item(),
            "pixel_difference": (made.float() - test.images.float()).abs().mean().item() / 255,
            "background": has_background(made, looks) if text == "travelling" else None,
        }  # fmt: skip

    # The guidance scale is chosen on the last images of `pretrain`, so that `test` only measures.
    tune = load_split(args.data, "pretrain")
    tune = Split(*(part[-args.search :] for part in (tune.images, tune.labels, tune.subnames, tune.names)))
    tune_contexts = write_captions(args.bundle, tune.images, labels_of(tune))
    tune_prompts = prompts_of(labels_of(tune), [*tune_contexts[1:], tune_contexts[0]])

    def search() -> dict[str, Any]:
        table = []
        for guidance in GUIDANCE:
            made = make_variants(generator, tune.images, tune_prompts, 0.9, guidance)
            table.append({"guidance": guidance, "agreement": accuracy(judge, made, tune.labels)})
        return {"strength": 0.9, "images": len(tune), "table": table}

    table = results.part("guidance_search", weights, search)["table"]
    best = max(table, key=lambda row: row["agreement"])["guidance"]
    for strength in STRENGTHS:
        for text in prompts:
            results.part(f"{text}_{strength:g}", weights, lambda t=text, s=strength: measure(t, s, best))
    results.part("originals", weights, lambda: {"agreement": originals, "images": n})


if __name__ == "__main__":
    main()
