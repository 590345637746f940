"""How to run a diffusers pipeline, as read from its parts: with which engine, sizes and memory formats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
_NATIVE_OPTIONS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    "EulerDiscreteScheduler": {"interpolation_type": "linear", "final_sigmas_type": "zero"},
}
"""Scheduler options of which the native samplers support one value only."""

_TEXT_PARTS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "prior_tokenizer": "prior_text_encoder"}
_MAX_ASPECT = 4.0  # beyond it, models that know only near-square images repeat themselves
_BLOCK = 1 << 20  # values held as floats at a time while a photo is resized

UNLIMITED = 10**6  # a tokenizer without a limit has a model_max_length of 10**30


def obstacle(pipeline: Any) -> str | None:
    """``None`` if the native engine can run a diffusers pipeline, else one sentence that says why not."""
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
        return f"{name} has a {kind}, which no native sampler can replace; {way_out}"
    for option, native in _NATIVE_OPTIONS.get(kind, {}).items():
        if schedule.get(option, native) != native:
            return f"{name} has a {kind} with {option}={schedule[option]!r}, which no native sampler can replace; {way_out}"
    if schedule.get("timestep_type") == "continuous" and schedule.get("prediction_type") == "v_prediction":
        return f"{name} has a {kind} with continuous v-prediction, which no native sampler can replace; {way_out}"
    if schedule.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        return f"{name} predicts {schedule['prediction_type']!r}, which the native samplers do not know; {way_out}"
    return None


class Formats(NamedTuple):
    """The memory formats of the weights and inputs of a pipeline's two networks."""

    unet: torch.memory_format
    vae: torch.memory_format


def memory_formats(channels_last: bool | None, device: str | torch.device) -> Formats:
    """Channels-last for both networks or for neither; ``None``: what is faster on the device.

    On a CPU that is the VAE alone: PyTorch's group norm is slow in this format (in bfloat16 several times slower), and a
    UNet has one before nearly every convolution.
    """
    last, first = torch.channels_last, torch.contiguous_format
    if channels_last is None:
        return Formats(first if torch.device(device).type == "cpu" else last, last)
    return Formats(last, last) if channels_last else Formats(first, first)


def place(pipeline: Any, device: str | torch.device | None, dtype: torch.dtype | None, formats: Formats) -> None:
    """Move a pipeline's modules, each to the dtype that it can run in, and set the memory formats of their weights."""
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


def limit_tokenizers(pipeline: Any) -> None:
    """Limit each tokenizer whose checkpoint names no limit to the number of positions of its text encoder.

    Without this, longer texts would fail in the encoder, and diffusers would pad the others to 10**30 tokens.
    """
    for name, encoder in _TEXT_PARTS.items():
        tokenizer, positions = getattr(pipeline, name, None), config_of(pipeline, encoder).get("max_position_embeddings")
        if tokenizer is not None and positions and getattr(tokenizer, "model_max_length", 0) > UNLIMITED:
            tokenizer.model_max_length = int(positions)


def config_of(pipeline: Any, part: str) -> Mapping[str, Any]:
    """The config of one of a pipeline's models, empty where there is no such model."""
    config = getattr(getattr(pipeline, part, None), "config", {})
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return values


def native_resolution(pipeline: Any) -> int | tuple[int, int] | None:
    """The size in pixels that a pipeline's network was trained at, or ``None`` where no config names it."""
    factor = _vae_factor(pipeline)
    sizes = [config_of(pipeline, part).get("sample_size") for part in ("unet", "transformer")]
    for size in (*sizes, getattr(pipeline, "default_sample_size", None)):
        if isinstance(size, int) and size > 0:
            return size * factor
        if isinstance(size, (tuple, list)):
            height, width = size
            return int(height) * factor, int(width) * factor
    return None


def size_multiple(pipeline: Any) -> int:
    """The number of which a pipeline's heights and widths must be multiples."""
    factor = _vae_factor(pipeline)
    unet = config_of(pipeline, "unet")
    if unet:
        levels = len(unet.get("block_out_channels", (0,)))
        movq = getattr(pipeline, "movq", None) is not None
        return int(max(factor * 2 ** (levels - 1), factor**2 if movq else 1))  # Kandinsky rounds to the square of its factor
    patch = config_of(pipeline, "transformer").get("patch_size", 2)
    return int(factor * max(patch if isinstance(patch, int) else 2, 2))  # latents are packed two by two, if not more


def _vae_factor(pipeline: Any) -> int:
    movq = getattr(pipeline, "movq", None)
    if movq is not None:
        return int(2 ** (len(movq.config.block_out_channels) - 1))
    return int(getattr(pipeline, "vae_scale_factor", 1))


def check_resolution(resolution: int | tuple[int, int], multiple: int) -> None:
    """Raise `RecipeError` unless a model whose sizes are multiples of ``multiple`` can work at ``resolution``."""
    if isinstance(resolution, tuple):
        if len(resolution) != 2 or any(side < multiple or side % multiple for side in resolution):
            raise RecipeError(f"resolution {resolution} cannot be used; give height and width as multiples of {multiple}")
    elif resolution < multiple:
        raise RecipeError(f"resolution {resolution} is too small for this model; use at least {multiple}")


def working_size(height: int, width: int, resolution: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width at which a model sees an image.

    A pair is used unchanged. A single number stands for an area, ``resolution ** 2``: the image keeps its aspect ratio (clipped
    to 1:4 and 4:1), rounded to multiples of ``multiple``, so that images fall into few buckets and those of one bucket share a
    batch.
    """
    if isinstance(resolution, tuple):
        return resolution
    aspect = min(max(height / width, 1 / _MAX_ASPECT), _MAX_ASPECT)
    sides = (resolution * math.sqrt(aspect), resolution / math.sqrt(aspect))
    rows, columns = (max(round(side / multiple), 1) * multiple for side in sides)
    return rows, columns


def resized_floats(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image ``(3, H, W)`` as floats ``(1, 3, h, w)`` in [0, 1], by antialiased bicubic interpolation.

    A photo takes a gigabyte as floats, so its rows are narrowed in blocks, with the same result.
    """
    height, width = size
    if tuple(image.shape[-2:]) == size:
        return image[None].float().div_(255)
    rows = min(max(_BLOCK // (3 * image.shape[2]), 1), image.shape[1])
    narrow = image.new_empty(1, 3, image.shape[1], width, dtype=torch.float32)
    block = image.new_empty(1, 3, rows, image.shape[2], dtype=torch.float32)  # one, since the C library would not reuse them
    for source, target in zip(torch.split(image, rows, 1), torch.split(narrow, rows, 2), strict=True):
        floats = block[:, :, : source.shape[1]]
        target.copy_(_interpolate(floats.copy_(source).div_(255), (source.shape[1], width)))
    return _interpolate(narrow, (height, width)).clamp_(0, 1)


def resized_uint8(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A float image ``(3, h, w)`` in [0, 1] as uint8 ``(3, H, W)``; it is enlarged in blocks of columns, too."""
    height, width = size
    if tuple(image.shape[-2:]) == size:
        return to_uint8(image)
    wide = _interpolate(image[None], (image.shape[1], width))
    whole = torch.empty(3, height, width, dtype=torch.uint8, device=image.device)
    columns = max(_BLOCK // (3 * height), 1)
    for source, target in zip(torch.split(wide, columns, 3), torch.split(whole, columns, 2), strict=True):
        target.copy_(_interpolate(source, (height, source.shape[3]))[0].mul_(255).round_().clamp_(0, 255))
    return whole


def _interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8, rounded to the nearest level."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)
