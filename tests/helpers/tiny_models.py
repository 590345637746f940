"""Every pipeline family of the native path, tiny and with random weights.

`NATIVE` maps a name to a function that builds the pipeline. Output layers are scaled up, so that a prompt or a guidance
scale that got lost would show in the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

import tiny_text as text
from sgid_transforms.generation.requests import GenerationRequest
from tiny_text import WIDTH

SIZE = 32

XL_CONDITION: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    # six time ids (two sizes and a crop) of 8 each, and the second encoder's pooled embedding
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def kl_vae() -> Any:
    """A variational autoencoder at half resolution: 32 x 32 pixels are 16 x 16 latents."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )
    # Random encoders have a deviation near 1 for any image: a smaller one leaves the image its place beside the noise.
    vae.quant_conv.bias.data[4:] = -3.0
    return vae.eval()


def tiny_vae() -> Any:
    """A deterministic autoencoder of 12 channels at half resolution, as the bundled model has it."""
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        latent_channels=12,
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(0, 1),
        num_decoder_blocks=(1, 0),
        upsampling_scaling_factor=2,
        scaling_factor=1.2,
    ).eval()


def unet(cross: int = WIDTH, **options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": SIZE // 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    model = diffusers.UNet2DConditionModel(**settings | options).eval()
    model.conv_out.weight.data *= 3
    for name, weight in model.named_parameters():  # let the text be heard
        if "attn2.to_out" in name or "attn2.to_v" in name:
            weight.data *= 8
    return model


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**SD_BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | options)


def _sd(model: Any, scheduler: Any, vae: Any = None, cls: str = "StableDiffusionImg2ImgPipeline") -> Any:
    extra = {"image_encoder": None} if cls.startswith("LatentConsistency") else {}
    pipeline = getattr(diffusers, cls)(
        vae=kl_vae() if vae is None else vae,
        text_encoder=text.clip_text_encoder(),
        tokenizer=text.clip_tokenizer(),
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd1() -> Any:
    """Stable Diffusion 1.x: epsilon prediction."""
    return _sd(unet(), ddim())


def sd2() -> Any:
    """Stable Diffusion 2.x at 768: v-prediction and linear projections."""
    return _sd(unet(use_linear_projection=True), ddim(prediction_type="v_prediction"))


def zero_snr() -> Any:
    """v-prediction on a schedule that ends in pure noise (arXiv 2305.08891)."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return _sd(unet(), ddim(**options))


def tiny() -> Any:
    """The bundled model's design: `AutoencoderTiny`, own betas, v-prediction, trailing timesteps."""
    betas = (np.linspace(0.0005**0.5, 0.009**0.5, 1000) ** 2).tolist()
    options = {"trained_betas": betas, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    return _sd(unet(in_channels=12, out_channels=12), ddim(**options), tiny_vae())


def sdxl(*, zeros: bool = True) -> Any:
    """Stable Diffusion XL's base model: two text encoders, pooled embedding and size conditions."""
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=kl_vae(),
        text_encoder=text.clip_text_encoder(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.clip_text_encoder(projection=True),
        tokenizer_2=text.clip_tokenizer(),
        unet=unet(2 * WIDTH, **XL_CONDITION),
        scheduler=ddim(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lcm() -> Any:
    """A latent consistency model: the guidance scale is an input of the UNet."""
    return _sd(unet(time_cond_proj_dim=16), diffusers.LCMScheduler(**SD_BETAS), cls="LatentConsistencyModelImg2ImgPipeline")


def lcm_lora() -> Any:
    """An ordinary pipeline that was given LCM's scheduler, as the LCM-LoRA recipe does."""
    return _sd(unet(), diffusers.LCMScheduler(**SD_BETAS, steps_offset=1))


NATIVE: dict[str, Callable[[], Any]] = {
    "sd1": sd1,
    "sd2": sd2,
    "zero_snr": zero_snr,
    "tiny": tiny,
    "sdxl": sdxl,
    "lcm": lcm,
    "lcm_lora": lcm_lora,
}


def image(seed: int = 0, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """A smooth random picture, uint8 ``(3, height, width)``."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return (large[0] * 255).round().to(torch.uint8)


def request(number: int = 0, **changes: Any) -> GenerationRequest:
    """A request for a variant of `image(number)`."""
    settings: dict[str, Any] = {"prompt": f"a photo of a cat, number {number}", "seed": number, "id": str(number)}
    pixels = changes.pop("image", None)
    return GenerationRequest(image=image(number) if pixels is None else pixels, **settings | changes)
