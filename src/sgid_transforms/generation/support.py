"""Which pipelines the native engine can run, and how their modules are made ready for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sgid_transforms.errors import RecipeError
from sgid_transforms.generation.samplers import PREDICTION_TYPES

_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)


def obstacle(pipeline: Any) -> str | None:
    """``None`` if the native engine can run a diffusers pipeline, else one sentence that says what stands in the way."""
    name = type(pipeline).__name__
    way_out = "run it through the pipeline adapter"
    # Other classes may have the same modules and do more with them (PAG, LEdits++), which would be lost here.
    if not any(base.__name__ in _PIPELINES for base in type(pipeline).__mro__):
        return f"{name} is not one of {', '.join(_PIPELINES)}; {way_out}"
    vae = type(pipeline.vae).__name__
    if vae not in ("AutoencoderKL", "AutoencoderTiny"):
        return f"{name} has a VAE of class {vae}, neither AutoencoderKL nor AutoencoderTiny; {way_out}"
    config = pipeline.unet.config
    if config.in_channels != config.out_channels:
        return f"{name} has a UNet of {config.in_channels} input channels, which reads more than noisy latents; {way_out}"
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type or config.num_class_embeds:
        return f"{name} has a UNet that is conditioned on more than text and size; {way_out}"
    if config.encoder_hid_dim_type is not None:
        return f"{name} has a UNet that projects image or text features ({config.encoder_hid_dim_type}); {way_out}"
    schedule, kind = pipeline.scheduler.config, type(pipeline.scheduler).__name__
    if not hasattr(pipeline.scheduler, "alphas_cumprod") or schedule.get("thresholding", False):
        return f"{name} has a {kind}, for which no native sampler can stand; {way_out}"
    if schedule.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        return f"{name} predicts {schedule['prediction_type']!r}, which the native samplers do not know; {way_out}"
    return None


@dataclass(frozen=True)
class Formats:
    """The memory formats of a pipeline's two networks.

    Args:
        unet: of the UNet's weights and inputs.
        vae: of the VAE's.
    """

    unet: torch.memory_format
    vae: torch.memory_format


def memory_formats(channels_last: bool | None, device: str | torch.device) -> Formats:
    """Channels-last for both networks or for neither; ``None``: what is faster on the device.

    On a CPU that is the VAE alone: PyTorch's group norm is slow in this format (in bfloat16 several times slower), and a
    UNet has one before nearly every convolution.
    """
    if channels_last is None:
        channels_last = torch.device(device).type != "cpu"
        return Formats(torch.channels_last if channels_last else torch.contiguous_format, torch.channels_last)
    both = torch.channels_last if channels_last else torch.contiguous_format
    return Formats(both, both)


def place(pipeline: Any, device: str | torch.device | None, dtype: torch.dtype | None, formats: Formats) -> None:
    """Move a pipeline's modules, each to the dtype that it can run in, and lay out their weights."""
    if device is not None:
        pipeline.to(device)
    unet, vae = pipeline.unet, pipeline.vae
    if dtype is not None and unet.dtype != dtype:
        torch.nn.Module.to(unet, dtype)  # the model's own .to() prints a warning
    overflows = vae.config.get("force_upcast", False) and unet.dtype == torch.float16
    vae_dtype = torch.float32 if overflows else dtype
    if vae_dtype is not None and vae.dtype != vae_dtype:
        torch.nn.Module.to(vae, vae_dtype)
    torch.nn.Module.to(unet, memory_format=formats.unet)
    torch.nn.Module.to(vae, memory_format=formats.vae)
    unet.eval()
    vae.eval()


def native_resolution(unet_config: Any, vae_scale_factor: int) -> int | tuple[int, int]:
    """The size in pixels that a UNet was trained at.

    Raises:
        RecipeError: the UNet's config does not say it.
    """
    size = unet_config.sample_size
    if size is None:
        raise RecipeError("the UNet's config names no sample_size, so the model's own resolution is unknown; set resolution")
    if isinstance(size, (tuple, list)):
        height, width = size
        return int(height) * vae_scale_factor, int(width) * vae_scale_factor
    return int(size) * vae_scale_factor
