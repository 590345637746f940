"""Well-known architectures with random weights: their speed without their download.

The numbers are those of the published configurations; `PARAMETERS` holds how many weights each part then has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NAMES = ("sd15", "sd-turbo", "sdxl")

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd-turbo": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
"""Weights of each part, as the published checkpoints have them."""

BLIP_TOKENS = 12
"""Length of a usual caption; a random captioner never ends one by itself."""

_TINY = Path(__file__).parents[1] / "src" / "sgid_transforms" / "assets" / "tiny"
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def random_pipeline(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A diffusers image-to-image pipeline of ``sd15``, ``sd-turbo`` or ``sdxl`` with random weights.

    On the ``meta`` device it has shapes and no weights.
    """
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
    from transformers import AutoTokenizer

    parts = random_parts(name, dtype, device)
    # The bundled model's words with the real models' length: which words they are does not matter here.
    tokenizer = AutoTokenizer.from_pretrained(_TINY / "pipeline" / "tokenizer", model_max_length=77)
    for encoder in ("text_encoder", "text_encoder_2"):
        if encoder in parts:
            parts[encoder].config.eos_token_id = tokenizer.eos_token_id
    if name == "sdxl":
        pipeline: Any = StableDiffusionXLImg2ImgPipeline(
            **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=_scheduler(name), add_watermarker=False
        )
    else:
        pipeline = StableDiffusionImg2ImgPipeline(
            **parts, tokenizer=tokenizer, scheduler=_scheduler(name), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_parts(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The networks of a pipeline, by their names in it.

    Raises:
        ValueError: the architecture is unknown.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name not in NAMES:
        raise ValueError(f"architecture {name!r} is unknown; use one of {', '.join(NAMES)}")
    with _made_on(device, dtype):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**_unet(name)),
            "vae": AutoencoderKL(**_vae(name)),
        }
        first = CLIPTextConfig(**_text(name))
        parts["text_encoder"] = CLIPTextModel(first)
        if name == "sdxl":
            second = CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
                projection_dim=1280,
            )  # fmt: skip
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    for part in parts.values():
        part.eval().requires_grad_(False)
    if parts["unet"].device.type != "meta":
        parts["unet"].conv_out.weight.mul_(0.1)  # what a random network predicts must not blow up over the steps
    return parts


def save_random_captioner(folder: Path) -> str:
    """BLIP's base captioner (vision transformer B/16 at 384 pixels) with random weights, as a folder."""
    from transformers import AutoTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config={"num_attention_heads": 12}))
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(_TINY / "captioner")
    BlipProcessor(BlipImageProcessor(size={"height": 384, "width": 384}), tokenizer).save_pretrained(folder)
    return str(folder)


def save_random_clip(folder: Path) -> str:
    """CLIP with a vision transformer B/32 and random weights, as a folder."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_TINY / "clip", model_max_length=77)
    CLIPModel(CLIPConfig(text_config={"eos_token_id": tokenizer.eos_token_id})).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return str(folder)


def _unet(name: str) -> dict[str, Any]:
    if name == "sdxl":
        return {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    if name == "sd-turbo":
        options = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        return {"sample_size": 64, **options}
    return {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def _vae(name: str) -> dict[str, Any]:
    large = name == "sdxl"
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024 if large else 768 if name == "sd-turbo" else 512,
        "scaling_factor": 0.13025 if large else 0.18215,
        "force_upcast": large,
    }


def _text(name: str) -> dict[str, Any]:
    if name == "sd-turbo":
        return {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        }
    return {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def _scheduler(name: str) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    if name == "sd15":
        return DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return EulerDiscreteScheduler(**_BETAS, timestep_spacing="trailing" if name == "sd-turbo" else "leading", steps_offset=1)


@contextmanager
def _made_on(device: str | torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules are made where and as what they will be used: no copy in float32 passes through main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)
