"""Stage 4: the UNet in few steps and without an unconditional half.

A student takes one deterministic step (DDIM) where its teacher, the UNet of the stage before, takes several under guidance.
Both share the text encoder. The student is told the guidance scale, as latent consistency models are (Luo et al. 2023, arXiv
2310.04378), and its steps are those that `Schedule` lays out for four steps at any strength. It is progressive distillation
(Salimans and Ho 2022, arXiv 2202.00512) in a single round; the weight, SNR + 1, is that of v-prediction.

The teacher's guidance has two parts: towards what stands before the prompt's first comma, by the scale itself, and from there
towards the whole prompt, by a scale that grows a quarter as fast. One scale for both lets a context that was lent by another
picture outweigh the label.
"""

from __future__ import annotations

import torch
from diffusers import LatentConsistencyModelImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

import unet as unet_stage
from common import Stage, averaged, coin, parser
from data import load_split
from tokenizer import MAX_LENGTH, load
from words import describe

GUIDANCE_WIDTH = 64
CONFIG = {**unet_stage.UNET_CONFIG, "time_cond_proj_dim": GUIDANCE_WIDTH}
SCALES = (1.0, 7.0)
STEPS = 4


def context_scale(scale: torch.Tensor) -> torch.Tensor:
    """Guidance from the label towards the whole prompt, where ``scale`` is that towards the label."""
    return 1 + (scale - 1) / 4


def steps_of(strength: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last timestep of the step that holds a share, in [0, 1), of the steps of a strength, all (B,); -1 is clean."""
    steps = (strength * STEPS).round().clamp(min=1)
    at = (share * steps).floor()
    top = (strength * unet_stage.scheduler().config.num_train_timesteps).round()
    return (top * (1 - at / steps)).round().long() - 1, (top * (1 - (at + 1) / steps)).round().long() - 1


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=4000, batch_size=64, lr=3e-4, decay=0.6)
    p.add_argument("--substeps", type=int, default=3, help="steps of the teacher in place of one of the student")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load_split(args.data, "pretrain")
    looks = describe(data.images)
    latents = unet_stage.encode_all(args.work, data.images)
    latent_scale = float((args.work / "latent_scale.txt").read_text())
    tokenizer = load(args.work / "tokenizer")
    trained = averaged(args.work, "unet")
    teacher = UNet2DConditionModel(**unet_stage.UNET_CONFIG)
    teacher.load_state_dict(trained["unet"])
    text = CLIPTextModel(unet_stage.text_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id))
    text.load_state_dict(trained["text_encoder"])
    teacher.eval()
    text.eval()
    student = UNet2DConditionModel(**CONFIG)
    student.load_state_dict(trained["unet"], strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)  # it starts as the teacher, whatever scale it is told
    alphas = torch.cat([unet_stage.scheduler().alphas_cumprod, torch.ones(1)])  # the last entry, -1, is the clean picture

    def level(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = alphas[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def encode(prompts: list[str]) -> torch.Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        return text(ids).last_hidden_state

    def taught(
        x: torch.Tensor, start: torch.Tensor, end: torch.Tensor, scale: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """The v that leads from ``x`` at timestep ``start`` to where the teacher's guided steps end."""
        labels = [prompt.partition(",")[0] for prompt in prompts]
        condition = torch.cat([encode([""]).expand(len(x), -1, -1), encode(labels), encode(prompts)])
        towards_label, towards_all = scale.view(-1, 1, 1, 1), context_scale(scale).view(-1, 1, 1, 1)
        noisy, here = x, start
        for substep in range(1, args.substeps + 1):
            there = start + ((end - start) * substep / args.substeps).round().long()
            nothing, label, whole = teacher(noisy.repeat(3, 1, 1, 1), here.repeat(3), condition).sample.float().chunk(3)
            v = nothing + towards_label * (label - nothing) + towards_all * (whole - label)
            (a, s), (next_a, next_s) = level(here), level(there)
            noisy, here = next_a * (a * noisy - s * v) + next_s * (a * v + s * noisy), there
        (a, s), (next_a, next_s) = level(start), level(end)
        # DDIM with v: next = (next_a * a + next_s * s) * x + (next_s * a - next_a * s) * v
        return (noisy - (next_a * a + next_s * s) * x) / (next_s * a - next_a * s)

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        count = args.batch_size
        index = torch.randint(len(data), (count,), generator=g)
        mirror = torch.randint(0, 2, (count,), generator=g)
        # Half of the prompts have the context of another picture, as contexts that travel do.
        lender = torch.where(coin(count, g), index, torch.randint(len(data), (count,), generator=g))
        prompts = unet_stage.draw_prompts(data, looks, index, mirror, 0.0, g, lender=lender)
        strength = torch.where(torch.rand(count, generator=g) < 0.15, 1.0, 0.3 + 0.7 * torch.rand(count, generator=g))
        start, end = steps_of(strength, torch.rand(count, generator=g))
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(count, generator=g)
        clean = latents[mirror, index].float() * latent_scale
        a, s = level(start)
        x = a * clean + s * torch.randn(clean.shape, generator=g)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = taught(x, start, end, scale, prompts)
                condition = encode(prompts)
            told = LatentConsistencyModelImg2ImgPipeline.get_guidance_scale_embedding(None, scale - 1, GUIDANCE_WIDTH)
            out = student(x, start, encoder_hidden_states=condition, timestep_cond=told).sample
        error = (out.float() - target).pow(2).mean((1, 2, 3))
        return error.mean(), {"at_strength_1": error[start == len(alphas) - 2].mean().nan_to_num().item()}

    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    Stage("distil", {"unet": student}, loss, optimizer, ema_decay=0.999).run(args)


if __name__ == "__main__":
    main()
