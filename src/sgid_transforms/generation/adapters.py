"""Any diffusers image-to-image pipeline, through its own ``__call__``.

One call of such a pipeline has one strength, one guidance scale and one image size. Requests are therefore grouped by what
a call cannot vary; prompts, negative prompts, images and random generators are given per sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from sgid_transforms.errors import ModelLoadError, RecipeError
from sgid_transforms.generation.batching import BatchLimit, run_isolated
from sgid_transforms.generation.requests import (
    Answers,
    GenerationRequest,
    Pull,
    RejectedImageError,
    check_image,
    check_text,
    in_batches,
    steps_to_run,
)
from sgid_transforms.generation.schedule import SCHEDULERS, check_steps, resolve_sampler
from sgid_transforms.generation.support import (
    UNLIMITED,
    check_resolution,
    config_of,
    limit_tokenizers,
    native_resolution,
    resized_floats,
    resized_uint8,
    size_multiple,
    to_uint8,
    working_size,
)
from sgid_transforms.models.checkpoints import UNSUPPORTED_FAMILIES, check_unet, image_to_image_family
from sgid_transforms.models.loading import quiet

# Kandinsky's combined pipelines hand their list of generators to a prior that doubles the batch, and run out of it.
_ONE_IMAGE_PER_CALL = ("KandinskyImg2ImgCombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline")

# Text lengths that are hard-coded in these pipelines, whatever their tokenizer says.
_FIXED_TOKENS = {"IFImg2ImgPipeline": 77, "Kandinsky3Img2ImgPipeline": 128}

_UNION_TILE = 6  # ControlNet-Union's number for "tile": the control image is the picture itself

_UNSAID_RESOLUTION = 1024  # of pipelines whose config does not name it: Kandinsky 3, Z-Image


@dataclass(frozen=True)
class CallTraits:
    """What one call of a pipeline takes.

    Args:
        strength: It has a ``strength``; without one, it edits by instruction and decides by itself how much to change.
        strength_in_schedule: Strength shapes the list of timesteps (LCM), so that only equal strengths can share a call;
            elsewhere it only says how many steps are run.
        guidance: Name of the argument that is the classifier-free guidance scale, or None.
        distilled_guidance: Guidance is an input of the network, at no extra cost, and 1 does not switch it off.
        negative_prompt: It has a ``negative_prompt``.
        size: It has ``height`` and ``width``; without them the size is that of the image it is given.
        max_area: It rescales images to its own area, unless it is told the area.
        control_image: It needs a control image.
        control_mode: It needs to know the kind of the control image.
        perturbed_attention: It evaluates a third, perturbed row per sample (PAG).
        one_image_per_call: A list of images would be taken as several views of one subject, or is refused.
    """

    strength: bool
    strength_in_schedule: bool
    guidance: str | None
    distilled_guidance: bool
    negative_prompt: bool
    size: bool
    max_area: bool
    control_image: bool
    control_mode: bool
    perturbed_attention: bool
    one_image_per_call: bool


def call_traits(pipeline: Any) -> CallTraits:
    """What one call of a pipeline takes, judged by its signature."""
    names = _parameters(pipeline)
    guidance = next((name for name in ("guidance_scale", "true_cfg_scale") if name in names), None)
    if "true_cfg_scale" in names and names["guidance_scale"].default is None:
        guidance = "true_cfg_scale"  # Qwen-Image: guidance_scale is there for distilled models that do not exist yet
    strength = "strength" in names
    return CallTraits(
        strength=strength,
        strength_in_schedule="strength" in inspect.signature(pipeline.scheduler.set_timesteps).parameters,
        guidance=guidance,
        distilled_guidance=guidance == "guidance_scale" and ("true_cfg_scale" in names or _embeds_guidance(pipeline)),
        negative_prompt="negative_prompt" in names,
        size="height" in names and "width" in names,
        max_area="max_area" in names,
        control_image="control_image" in names,
        control_mode=type(pipeline).__name__ == "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        perturbed_attention="pag_scale" in names,
        # Without a strength it edits by instruction. Most such pipelines read a list of images as references for one
        # picture, without an error: every image of the batch would end up in every variant.
        one_image_per_call=not strength or type(pipeline).__name__ in _ONE_IMAGE_PER_CALL,
    )


def group_key(request: GenerationRequest, size: tuple[int, int], traits: CallTraits, num_inference_steps: int) -> Hashable:
    """Requests with equal keys can share one call of a pipeline.

    Strengths are compared by their steps. diffusers rounds in two ways, and both must agree: ``int(steps * strength)`` and
    ``int(steps - steps * strength)``.
    """
    strength: Hashable = None
    if traits.strength_in_schedule:
        strength = request.strength
    elif traits.strength:
        product = min(num_inference_steps * request.strength, num_inference_steps)
        strength = int(product), int(num_inference_steps - product)
    guidance = request.guidance_scale if traits.guidance else None
    negative = bool(request.negative_prompt) and traits.negative_prompt
    return size, strength, guidance, negative


class PipelineAdapter:
    """Runs requests through a diffusers image-to-image pipeline's own ``__call__``.

    Random numbers are drawn on the CPU from each request's seed, so that they do not depend on the batch. Use it from one
    thread at a time: pipelines and their schedulers keep state.

    Args:
        pipeline: A loaded pipeline.
        sampler: ``"auto"``: the pipeline's own scheduler; another name works if the pipeline's family can exchange schedulers.
        num_inference_steps: Steps at strength 1.
        resolution: Height and width at which the model works, or one number for an area whose aspect ratio follows the
            image; None: the model's own.
        batch_size: Images in one call.
        device: Where to move the pipeline; None leaves it where it is (as CPU offload requires).

    Raises:
        ModelLoadError: The pipeline does not turn images into images.
        RecipeError: A setting cannot work with this pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        sampler: str = "auto",
        num_inference_steps: int = 20,
        resolution: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ) -> None:
        _check_pipeline(pipeline)
        if batch_size < 1:
            raise RecipeError(f"batch_size {batch_size} leaves no room for an image; use at least 1")
        set_sampler(pipeline, sampler)
        check_steps(pipeline.scheduler, num_inference_steps)
        limit_tokenizers(pipeline)
        if device is not None:
            pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        self.traits = call_traits(pipeline)
        self.batch_size = 1 if self.traits.one_image_per_call else batch_size
        self._pipeline = pipeline
        self._steps = num_inference_steps
        self._multiple = size_multiple(pipeline)
        own = native_resolution(pipeline) or _UNSAID_RESOLUTION
        self._resolution = own if resolution is None else resolution
        check_resolution(self._resolution, self._multiple)
        if self.traits.control_mode:
            _check_tile_mode(pipeline)
        self._limit = BatchLimit(self.batch_size)
        self._tokenizer, self._max_tokens = _text_limit(pipeline)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose limit binds prompts, or ``None`` where the pipeline has none."""
        return self._tokenizer

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt in tokens, start and end included, or ``None`` where there is no limit."""
        return self._max_tokens

    def evaluations(self, request: GenerationRequest) -> int:
        """Rows that the network evaluates for a request, by the usual rule: one per step, one more with guidance, one more with
        perturbed attention. The pipeline itself does not tell.

        Raises:
            GenerationError: The strength leaves no step.
        """
        traits = self.traits
        guided = traits.guidance is not None and not traits.distilled_guidance and request.guidance_scale > 1
        return self._steps_of(request) * (1 + guided + traits.perturbed_attention)

    def run(self, requests: Sequence[GenerationRequest]) -> list[Tensor | Exception]:
        """One entry per request, in order: a uint8 ``(3, H, W)`` image on the CPU, or the exception that it raised."""
        results: dict[int, Tensor | Exception] = {}
        groups: dict[Hashable, list[int]] = {}
        sizes: dict[int, tuple[int, int]] = {}
        for index, request in enumerate(requests):
            try:
                sizes[index] = self._accept(request)
            except Exception as error:
                results[index] = error
            else:
                key = group_key(request, sizes[index], self.traits, self._steps)
                groups.setdefault(key, []).append(index)
        for members in groups.values():
            size = sizes[members[0]]
            batch = [requests[index] for index in members]
            outcomes = run_isolated(lambda group, size=size: self._call(group, size), batch, self._limit)  # type: ignore[misc]
            results.update(zip(members, outcomes, strict=True))
        return [results[index] for index in range(len(requests))]

    def stream(self, pull: Pull) -> Iterator[Answers]:
        """Pull a few batches at a time, so that there are requests to group, and yield them when all of them are done."""
        return in_batches(self.run, 4 * self.batch_size, pull)

    def _steps_of(self, request: GenerationRequest) -> int:
        steps = steps_to_run(self._steps, request.strength)  # even where strength is ignored, it must be valid
        return steps if self.traits.strength else self._steps

    def _accept(self, request: GenerationRequest) -> tuple[int, int]:
        check_image(request.image)
        self._steps_of(request)
        if self._tokenizer is not None and self._max_tokens is not None:
            check_text(request.prompt, self._tokenizer, self._max_tokens)
            if self.traits.negative_prompt and request.guidance_scale > 1:
                check_text(request.negative_prompt, self._tokenizer, self._max_tokens, "negative prompt")
        height, width = request.image.shape[-2:]
        return working_size(height, width, self._resolution, self._multiple)

    def _call(self, group: list[GenerationRequest], size: tuple[int, int]) -> list[Tensor | Exception]:
        with torch.no_grad(), quiet():
            output = self._pipeline(**self._arguments(group, size))
        images = np.asarray(output.images)
        if images.shape[0] != len(group) or images.ndim != 4 or images.shape[-1] != 3:
            raise ModelLoadError(
                f"{type(self._pipeline).__name__} answered {len(group)} requests with an array of shape {images.shape}; "
                "it is not an image-to-image pipeline that can be used"
            )
        flags = getattr(output, "nsfw_content_detected", None) or getattr(output, "nsfw_detected", None) or [False] * len(group)
        return [_finish(*item) for item in zip(group, images, flags, strict=True)]

    def _arguments(self, group: list[GenerationRequest], size: tuple[int, int]) -> dict[str, Any]:
        traits, first = self.traits, group[0]

        def each(values: Sequence[Any]) -> Any:
            return values[0] if len(group) == 1 else list(values)  # a fresh list: some pipelines write into theirs

        images = [_to_pil(request.image, size) for request in group]
        arguments: dict[str, Any] = {
            "prompt": each([request.prompt for request in group]),
            "image": each(images),
            "num_inference_steps": self._steps,
            "generator": each([torch.Generator().manual_seed(request.seed) for request in group]),
            "output_type": "np",  # floats, so that NaN can be detected
        }
        if traits.strength:
            arguments["strength"] = first.strength
        if traits.guidance:
            arguments[traits.guidance] = first.guidance_scale
        if traits.negative_prompt and first.negative_prompt:
            arguments["negative_prompt"] = each([request.negative_prompt for request in group])
        elif traits.guidance == "true_cfg_scale" and first.guidance_scale > 1:
            arguments["negative_prompt"] = each([" "] * len(group))  # without a text this kind of guidance stays off
        if traits.size:
            arguments["height"], arguments["width"] = size
        if traits.max_area:
            arguments["max_area"] = size[0] * size[1]
        if traits.control_image:
            arguments["control_image"] = each(images)
        if traits.control_mode:
            arguments["control_mode"] = [_UNION_TILE]
        return arguments


def set_sampler(pipeline: Any, sampler: str) -> None:
    """Replace a pipeline's scheduler by the one that a sampler's name stands for.

    Raises:
        RecipeError: The name is unknown, or the pipeline's family is bound to its own scheduler.
    """
    if sampler == "auto":
        return
    import diffusers

    own, wanted = type(pipeline.scheduler).__name__, SCHEDULERS[resolve_sampler(sampler, pipeline.scheduler)]
    if own == wanted or (sampler == "euler" and own == "FlowMatchEulerDiscreteScheduler"):
        return
    expected = inspect.signature(type(pipeline).__init__).parameters["scheduler"].annotation
    if "KarrasDiffusionSchedulers" not in str(expected):
        raise RecipeError(f"{type(pipeline).__name__} runs with its own {own} only, not with sampler {sampler!r}; use 'auto'")
    pipeline.scheduler = getattr(diffusers, wanted).from_config(pipeline.scheduler.config)


def _embeds_guidance(pipeline: Any) -> bool:
    transformer = config_of(pipeline, "transformer")
    # FLUX and FLUX.2 pipelines have no unconditional branch, whether their weights read the guidance (dev) or not (schnell)
    return "guidance_embeds" in transformer and "negative_prompt_embeds" not in _parameters(pipeline)


def _parameters(pipeline: Any) -> Mapping[str, Any]:
    return inspect.signature(type(pipeline).__call__).parameters


def _check_pipeline(pipeline: Any) -> None:
    name = type(pipeline).__name__
    family = image_to_image_family(name)
    if family in UNSUPPORTED_FAMILIES:
        raise ModelLoadError(f"{name} is not supported: {UNSUPPORTED_FAMILIES[family]}")
    parameters = set(_parameters(pipeline))
    if not {"image", "prompt", "generator", "output_type", "num_inference_steps"} <= parameters or "mask_image" in parameters:
        raise ModelLoadError(
            f"{name} does not turn an image and a prompt into an image; load it with AutoPipelineForImage2Image"
        )
    if family is not None:  # other pipelines, such as InstructPix2Pix, know how to feed their UNet
        check_unet(config_of(pipeline, "unet"), name)


def _check_tile_mode(pipeline: Any) -> None:
    kinds = pipeline.controlnet.config.num_control_type
    if kinds <= _UNION_TILE:
        raise RecipeError(
            f"the ControlNet-Union has {kinds} kinds of control images and none for the picture itself (tile, number "
            f"{_UNION_TILE}); use its ProMax edition"
        )


def _text_limit(pipeline: Any) -> tuple[Any, int | None]:
    """The tokenizer that reads the whole prompt, and how many tokens of it the pipeline keeps."""
    default = _parameters(pipeline).get("max_sequence_length")
    if default is not None:
        # Of several encoders the last one (T5) gives the sequence; the others give one pooled vector and cut at 77.
        names = ("tokenizer_3", "tokenizer_2", "tokenizer")
        present = [name for name in names if getattr(pipeline, name, None) is not None]
        length = default.default
        if hasattr(pipeline, "tokenizer_3") and pipeline.tokenizer_3 is None:
            present, length = ["tokenizer"], pipeline.tokenizer.model_max_length  # SD3 without T5: CLIP gives the sequence
        tokenizer = getattr(pipeline, present[0])
        return getattr(tokenizer, "tokenizer", tokenizer), int(length)
    tokenizer = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "prior_tokenizer", None)
    if tokenizer is None:
        return None, None
    length = _FIXED_TOKENS.get(type(pipeline).__name__, tokenizer.model_max_length)
    return tokenizer, int(length) if length < UNLIMITED else None


def _to_pil(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """A uint8 ``(3, H, W)`` image at another size; pipelines differ in what they take, but all take PIL."""
    if tuple(image.shape[-2:]) != size:
        image = to_uint8(resized_floats(image, size))[0]
    picture: Image.Image = to_pil_image(image)
    return picture


def _finish(request: GenerationRequest, image: np.ndarray[Any, Any], flagged: bool) -> Tensor | Exception:
    """A pipeline's float ``(H, W, 3)`` output as uint8 at the request's own size."""
    if flagged:
        return RejectedImageError("nsfw", "the pipeline's safety checker flagged the image")
    pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
    if not bool(pixels.isfinite().all()):
        return RejectedImageError.not_finite(request)
    height, width = request.image.shape[-2:]
    return resized_uint8(pixels[0].clamp(0, 1), (height, width)).cpu().contiguous()
