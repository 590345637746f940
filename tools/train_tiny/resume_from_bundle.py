"""Turn an exported bundle back into checkpoints, so that training goes on where the published weights ended.

The optimizer's state is not part of a bundle: it starts anew, under the schedule's warm-up. The bundle's UNet is the student of
`distil.py`. Its teacher, the UNet that can be trained further, comes from ``teacher.safetensors`` beside this file, and the
judge's weights from ``judge.safetensors``. A checkpoint that exists already is left alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import captioner as captioner_stage
from tokenizer import extend
from words import PLACES

HERE = Path(__file__).parent
BUNDLE = HERE.parents[1] / "src" / "sgid_transforms" / "assets" / "tiny"


def checkpoint(path: Path, modules: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write a checkpoint at step 0 whose weights and averages are ``modules``."""
    if path.exists():
        print(f"{path}: exists, left alone")
        return
    state = {name: {k: v.float() if v.is_floating_point() else v for k, v in m.items()} for name, m in modules.items()}
    torch.save({"modules": state, "ema": state, "optimizer": None, "step": 0, "seconds": 0.0}, path)
    print(f"{path}: written")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--bundle", type=Path, default=BUNDLE)
    p.add_argument("--work", required=True, type=Path, help="folder for the checkpoints")
    p.add_argument("--teacher", type=Path, default=HERE / "teacher.safetensors", help="weights of the UNet before distillation")
    args = p.parse_args()
    work, pipeline = args.work, args.bundle / "pipeline"
    (work / "tokenizer").mkdir(parents=True, exist_ok=True)
    model = json.loads((pipeline / "tokenizer" / "tokenizer.json").read_text())["model"]
    (work / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (work / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    words = json.loads((args.bundle / "captioner" / "tokenizer.json").read_text())["model"]["vocab"]
    (work / "captioner_tokenizer").mkdir(exist_ok=True)
    (work / "captioner_tokenizer" / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    scale = json.loads((pipeline / "vae" / "config.json").read_text())["scaling_factor"]
    (work / "latent_scale.txt").write_text(repr(scale))

    checkpoint(work / "vae.pt", {"vae": load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")})
    student = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(pipeline / "text_encoder" / "model.safetensors")
    clip = load_file(args.bundle / "clip" / "model.safetensors")
    if added := extend(work / "tokenizer", PLACES):  # words that came later than the bundle, yet to be learnt
        for state in (text, clip):
            name = next(key for key in state if key.endswith("token_embedding.weight"))
            weight = state[name].float()
            state[name] = torch.cat([weight, weight.mean(0, keepdim=True).expand(added, -1)])
    checkpoint(work / "unet.pt", {"unet": load_file(args.teacher), "text_encoder": text})
    checkpoint(work / "distil.pt", {"unet": student})
    checkpoint(work / "clip.pt", {"clip": clip})
    # Weights that are tied are stored once: a model with these weights knows them all.
    blip = captioner_stage.BlipForConditionalGeneration.from_pretrained(args.bundle / "captioner", dtype=torch.float32)
    checkpoint(work / "captioner.pt", {"captioner": blip.state_dict()})
    if (HERE / "judge.safetensors").exists():
        checkpoint(work / "judge.pt", {"model": load_file(HERE / "judge.safetensors")})


if __name__ == "__main__":
    main()
