"""Write the bundle: three ordinary Hugging Face folders in fp16 safetensors, from the stages' averaged weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
)

import captioner as captioner_stage
import clip as clip_stage
import distil as distil_stage
import tokenizer as tokenizer_stage
import unet as unet_stage
import vae as vae_stage
from common import averaged

PIXELS = {"image_mean": list(clip_stage.MEAN), "image_std": list(clip_stage.STD), "do_convert_rgb": True}


def load_or_random(module: torch.nn.Module, work: Path, stage: str, name: str, allow_missing: bool) -> torch.nn.Module:
    """Averaged weights of a stage; random ones only when asked for, to try the format before the training is through."""
    try:
        module.load_state_dict(averaged(work, stage)[name])
    except FileNotFoundError:
        if not allow_missing:
            raise
        print(f"{stage}: no checkpoint, random weights")
    return module.eval().half()


def pipeline(work: Path, allow_missing: bool) -> StableDiffusionImg2ImgPipeline:
    tokenizer = tokenizer_stage.load(work / "tokenizer")
    scale_file = work / "latent_scale.txt"
    scale = float(scale_file.read_text()) if scale_file.exists() else 1.0
    vae = load_or_random(AutoencoderTiny(**vae_stage.CONFIG), work, "vae", "vae", allow_missing)
    vae.register_to_config(scaling_factor=scale)
    unet = load_or_random(UNet2DConditionModel(**distil_stage.CONFIG), work, "distil", "unet", allow_missing)
    text = CLIPTextModel(unet_stage.text_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id))
    text = load_or_random(text, work, "unet", "text_encoder", allow_missing)
    return StableDiffusionImg2ImgPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=unet_stage.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", required=True, type=Path, help="folder of the stages' checkpoints")
    p.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "src" / "sgid_transforms" / "assets" / "tiny")
    p.add_argument("--allow-missing", action="store_true", help="random weights for stages without a checkpoint")
    p.add_argument("--judge", type=Path, help="also write the judge's weights to this safetensors file")
    p.add_argument("--teacher", type=Path, help="also write the UNet before distillation to this safetensors file")
    args = p.parse_args()

    for folder in ("pipeline", "clip", "captioner"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    pipeline(args.work, args.allow_missing).save_pretrained(args.out / "pipeline", safe_serialization=True)
    # diffusers writes this derived entry and then warns about it at every load: it is derived again there.
    config = args.out / "pipeline" / "vae" / "config.json"
    entries = json.loads(config.read_text())
    del entries["block_out_channels"]
    config.write_text(json.dumps(entries, indent=2))

    tokenizer = tokenizer_stage.load(args.work / "tokenizer")
    clip = load_or_random(CLIPModel(clip_stage.config(tokenizer)), args.work, "clip", "clip", args.allow_missing)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    clip.save_pretrained(args.out / "clip")
    CLIPProcessor(CLIPImageProcessor(**size, **PIXELS), tokenizer).save_pretrained(args.out / "clip")

    words = args.work / "captioner_tokenizer"
    if not (words / "vocab.txt").exists():
        words.mkdir(parents=True, exist_ok=True)
        (words / "vocab.txt").write_text("\n".join(captioner_stage.vocabulary([])) + "\n")
    bert = captioner_stage.tokenizer_from(words)
    blip = BlipForConditionalGeneration(captioner_stage.config(bert))
    blip = load_or_random(blip, args.work, "captioner", "captioner", args.allow_missing)
    blip.save_pretrained(args.out / "captioner")
    images = BlipImageProcessor(size={"height": 32, "width": 32}, **PIXELS)
    BlipProcessor(images, bert).save_pretrained(args.out / "captioner")

    if args.judge:
        save_file({key: value.contiguous() for key, value in averaged(args.work, "judge")["model"].items()}, args.judge)

    if args.teacher:
        teacher = averaged(args.work, "unet")["unet"]
        save_file({key: value.half().contiguous() for key, value in teacher.items()}, args.teacher)

    total = 0
    for file in sorted(args.out.rglob("*.safetensors")):
        total += file.stat().st_size
        print(f"{file.relative_to(args.out)}: {file.stat().st_size / 1e6:.1f} MB")
    print(f"together {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
