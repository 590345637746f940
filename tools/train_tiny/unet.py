"""Stage 3: the text-conditional UNet and its CLIP text encoder, by v-prediction on the autoencoder's latents.

Prompts are drawn as users write them: label and context (what is seen beside the object) mostly, each alone at times, and
nothing for a tenth of the images (classifier-free guidance). A captioner errs, and what it says then must not outweigh the
label: part of the captions that stand behind a label name another image's subject.

The loss is that of v-prediction without further weights, and timesteps are drawn more often the noisier they are. At high
strength a variant is decided at high noise levels, which min-SNR weights all but leave out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

import vae as vae_stage
from common import Stage, averaged, parser, to_float
from data import CLASSES, Split, load_split
from tokenizer import MAX_LENGTH, load
from words import PARTS, article, context, describe

TEXT_WIDTH = 128
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": vae_stage.CONFIG["latent_channels"],
    "out_channels": vae_stage.CONFIG["latent_channels"],
    "block_out_channels": (48, 96, 160),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}


def text_config(vocabulary: int, bos: int, eos: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=512, projection_dim=TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, rescaled until its end is pure noise.

    The end of the schedule as published is not, so that the original shines through at strength 1; the rescaling to zero
    terminal SNR is that of Lin et al. 2024 (arXiv 2305.08891), and needs v-prediction.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True,
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1,
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


@torch.no_grad()
def encode_all(work: Path, images: torch.Tensor) -> torch.Tensor:
    """Latents (2, N, 12, 16, 16) in float16 of uint8 images and of their mirror images, kept in ``work`` for a resumed run.

    Both mirror images are encoded once: the encoder then costs nothing for the hours that follow.
    """
    vae = AutoencoderTiny(**vae_stage.CONFIG)
    vae.load_state_dict(averaged(work, "vae")["vae"])
    vae.eval().to(memory_format=torch.channels_last)
    path = work / "latents.safetensors"
    key = hashlib.sha256(vae.encoder.layers[0].weight.numpy().tobytes() + images[:100].numpy().tobytes()).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("latents")
    both = torch.cat([images, images.flip(-1)])
    batches = tqdm(both.split(500), desc="latents", mininterval=10)
    latents = torch.cat([vae.encode(to_float(batch)).latents.half() for batch in batches])
    latents = latents.contiguous().view(2, len(images), *latents.shape[1:])
    save_file({"latents": latents}, path, {"key": key})
    return latents


def draw_prompts(
    data: Split,
    looks: list[dict[str, Any]],
    index: torch.Tensor,
    mirror: torch.Tensor,
    wrong: float,
    g: torch.Generator,
    lender: torch.Tensor | None = None,
) -> list[str]:
    """Prompts as users write them, for the images ``index`` (B,), of which ``mirror`` (B,) says whether they are mirrored.

    ``lender`` (B,) names the images whose contexts they have, where these are not their own.
    """
    kinds = torch.rand(len(index), generator=g).tolist()
    draws = torch.rand(len(index), len(PARTS), generator=g).tolist()
    others = torch.randint(len(data), (len(index),), generator=g).tolist()

    def prompt(own: int, lends: int, mirrored: int, kind: float, other: int, draws: list[float]) -> str:
        label = f"a photo of a {CLASSES[int(data.labels[own])]}"
        if kind < 0.25:
            return "" if kind < 0.1 else label
        # Each part is left out at times, so that each is listened to on its own, and a short context is as good as a long one.
        kept = dict(zip(PARTS, draws, strict=True))
        said = context(looks[lends], mirrored=bool(mirrored), keep=lambda name: kept[name] < 0.75)
        if kind < 0.35:
            label = article(data.subnames[own])
        elif kind < 0.5:  # a captioner errs, and its subject must not outweigh the label
            label = f"{label}, {article(data.subnames[other if kind < 0.35 + 0.15 * wrong else own])}"
        return f"{label}, {said}" if said else label

    lenders = (index if lender is None else lender).tolist()
    return [prompt(*one) for one in zip(index.tolist(), lenders, mirror.tolist(), kinds, others, draws, strict=True)]


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=10000, batch_size=64, lr=7e-4, decay=0.4)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arithmetic, by autocast")
    p.add_argument("--wrong", type=float, default=0.3, help="share of the captions behind a label whose subject is exchanged")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load_split(args.data, "pretrain")
    looks = describe(data.images)

    args.work.mkdir(parents=True, exist_ok=True)
    latents = encode_all(args.work, data.images)
    scale = 1 / latents[0].float().std().item()

    tokenizer = load(args.work / "tokenizer")
    unet = UNet2DConditionModel(**UNET_CONFIG)
    # Plain matrix products: with 16 positions, the backward pass of the fused attention costs a fifth of a step on a CPU.
    unet.set_attn_processor(AttnProcessor())
    text = CLIPTextModel(text_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id))
    alphas = scheduler().alphas_cumprod

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(data), (args.batch_size,), generator=g)
        mirror = torch.randint(0, 2, (args.batch_size,), generator=g)
        x = latents[mirror, index].float() * scale
        prompts = draw_prompts(data, looks, index, mirror, args.wrong, g)
        ids = tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        # Stratified timesteps: each batch covers the noise levels evenly, which lowers the variance of the gradient. The
        # exponent leans towards high noise, where the text decides.
        u = (torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=g)) / args.batch_size
        t = (u**0.85 * len(alphas)).long().clamp(max=len(alphas) - 1)
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=g)
        target = a.sqrt() * noise - (1 - a).sqrt() * x
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            condition = text(ids).last_hidden_state
            out = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, encoder_hidden_states=condition).sample
        error = (out.float() - target).pow(2).mean((1, 2, 3))
        return error.mean(), {"high_noise": error[-len(error) // 4 :].mean().item()}

    optimizer = torch.optim.AdamW([*unet.parameters(), *text.parameters()], args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    # The export divides by the spread of the latents that the UNet was trained on.
    (args.work / "latent_scale.txt").write_text(repr(scale))
    Stage("unet", {"unet": unet, "text_encoder": text}, loss, optimizer, ema_decay=0.999).run(args)


if __name__ == "__main__":
    main()
