"""Other pipelines through their own call: every family runs, and grouping changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, wraps
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import to_pil_image

import tiny_families
from sgid_transforms.errors import GenerationError, ModelLoadError, RecipeError
from sgid_transforms.generation.adapters import (
    PipelineAdapter,
    call_traits,
    group_key,
    set_sampler,
)
from sgid_transforms.generation.requests import Engine, GenerationRequest, RejectedImageError
from tiny_families import FAMILIES

# Options that only the miniature needs: short priors, the few layers of its text encoder, no detour over a megapixel.
TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "kandinsky": {"prior_num_inference_steps": 2},
    "kandinsky22": {"prior_num_inference_steps": 2},
    "if": {"clean_caption": False},
    "flux2": {"text_encoder_out_layers": (1,), "max_sequence_length": 96},
    "flux2-klein": {"text_encoder_out_layers": (1,), "max_sequence_length": 96},
    "flux-kontext": {"_auto_resize": False},
}
SIZES = {"flux2": 64, "flux2-klein": 64, "qwenimage-edit": 64, "qwenimage-edit-plus": 64}  # the least that they take
INSTRUCTED = {"flux-kontext", "flux2", "flux2-klein", "qwenimage-edit", "qwenimage-edit-plus"}  # edit without a strength
SINGLE = INSTRUCTED | {"kandinsky", "kandinsky22"}
SLOW = {"qwenimage-edit", "qwenimage-edit-plus"}  # a megapixel through the VAE, whatever size is asked for


def picture(seed: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def request(seed: int, **changes: Any) -> GenerationRequest:
    base = GenerationRequest(picture(seed), f"a photo of thing {seed}", strength=0.9, guidance_scale=3.0, seed=seed)
    return replace(base, **changes)


def build(family: str, **options: Any) -> PipelineAdapter:
    settings: dict[str, Any] = {
        "num_inference_steps": 2,
        "resolution": SIZES.get(family, 32),
        "batch_size": 4,
    }
    return PipelineAdapter(with_options(FAMILIES[family](), TINY_OPTIONS.get(family, {})), **settings | options)


def with_options(pipeline: Any, options: dict[str, Any]) -> Any:
    """The pipeline, with further arguments in every call."""
    kind = type(pipeline)

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs, **options)

    pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipeline


def images(answers: list[torch.Tensor | Exception]) -> list[torch.Tensor]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [answer for answer in answers if isinstance(answer, torch.Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(family: str) -> None:
    adapter = build(family)
    assert isinstance(adapter, Engine)
    asked = [request(1)] if family in SLOW else [request(1), request(2, negative_prompt="blurry"), request(3)]
    answers = images(adapter.run(asked))
    for answer, one in zip(answers, asked, strict=True):
        assert answer.dtype == torch.uint8
        assert answer.shape == one.image.shape
        assert answer.is_contiguous()
        assert int(answer.max()) - int(answer.min()) > 5  # a picture, not a surface
    assert adapter.traits.strength == (family not in INSTRUCTED)
    assert adapter.traits.one_image_per_call == (family in SINGLE)
    assert adapter.max_tokens is not None


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SLOW))
def test_a_batch_equals_its_requests_one_by_one(family: str) -> None:
    """FLUX.2 and the Qwen editors take a list of images for references to one picture, without an error."""
    adapter = build(family)
    # Flow-matching pipelines run ceil(steps * strength), the others int(steps * strength).
    asked = [
        request(1),
        request(2, guidance_scale=1.0),
        request(3),
        request(4, negative_prompt="bad"),
        request(5, strength=0.6),
    ]
    together = images(adapter.run(asked))
    alone = [images(adapter.run([one]))[0] for one in asked]
    for mixed, single in zip(together, alone, strict=True):
        assert int((mixed.int() - single.int()).abs().max()) <= 1
    assert not torch.equal(together[0], together[4])


@pytest.mark.parametrize("family", ["stable-diffusion-pag", "flux", "qwenimage", "kandinsky3", "if"])
def test_equals_the_pipelines_own_call(family: str) -> None:
    asked = request(1, strength=0.7, negative_prompt="blurry")
    [ours] = images(build(family).run([asked]))
    pipeline = FAMILIES[family]()
    pipeline.set_progress_bar_config(disable=True)
    own: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 2, "negative_prompt": "blurry"}
    own["true_cfg_scale" if family == "qwenimage" else "guidance_scale"] = 3.0
    if family in ("flux", "qwenimage"):
        own |= {"height": 32, "width": 32}
    picture_in = to_pil_image(asked.image)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        output = pipeline(asked.prompt, image=picture_in, generator=generator, **own | TINY_OPTIONS.get(family, {})).images[0]
    assert torch.equal(ours, torch.from_numpy(np.array(output)).permute(2, 0, 1))


@cache
def schedulers() -> list[Any]:
    """Pipelines of which only the schedules are used."""
    return [FAMILIES["stable-diffusion-pag"](), FAMILIES["flux"]()]


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1))
def test_strengths_with_equal_keys_run_the_same_timesteps(steps: int, strength: float, other: float) -> None:
    """Both of diffusers' roundings: `int(steps * strength)` of Stable Diffusion, `int(steps - steps * strength)` of FLUX."""
    for pipeline in schedulers():
        traits = call_traits(pipeline)
        keys = {group_key(request(0, strength=s), (8, 8), traits, steps) for s in (strength, other)}
        pipeline.scheduler.set_timesteps(steps)
        runs = [pipeline.get_timesteps(steps, s, "cpu")[0].tolist() for s in (strength, other)]
        assert len(keys) == 2 or runs[0] == runs[1]


def test_strength_groups_by_the_steps_that_are_run() -> None:
    adapter = build("flux", num_inference_steps=4)
    calls = count_calls(adapter)
    asked = [request(i, strength=s) for i, s in enumerate((0.51, 0.6, 0.74, 0.9, 0.76, 1.0))]
    together = images(adapter.run(asked))
    assert calls == [3, 2, 1]  # three steps' worth, four steps' worth, and all of them
    for one, mixed in zip(asked, together, strict=True):
        assert int((images(adapter.run([one]))[0].int() - mixed.int()).abs().max()) <= 1


def test_group_key_separates_what_one_call_cannot_vary() -> None:
    traits = call_traits(FAMILIES["stable-diffusion-pag"]())
    base = request(0, strength=0.5)

    def key(size: tuple[int, int] = (32, 32), **changes: Any) -> Any:
        return group_key(replace(base, **changes), size, traits, 10)

    assert key() == key(prompt="another", seed=9, strength=0.5)
    assert key(strength=0.5) != key(strength=0.59)  # int(5) and int(5.9) agree, int(10 - 5) and int(10 - 5.9) do not
    assert key(strength=0.52) == key(strength=0.58)
    assert key() != key(guidance_scale=2.0)
    assert key() != key(size=(32, 64))
    assert key() != key(negative_prompt="blurry")
    scheduled = replace(traits, strength_in_schedule=True)
    assert group_key(request(0, strength=0.52), (8, 8), scheduled, 10) != group_key(
        request(0, strength=0.58), (8, 8), scheduled, 10
    )
    unguided = replace(traits, guidance=None)
    assert group_key(request(0, guidance_scale=1.0), (8, 8), unguided, 10) == group_key(request(0), (8, 8), unguided, 10)


def test_a_failing_request_does_not_take_its_batch_down() -> None:
    adapter = build("z-image")
    own_call = type(adapter._pipeline).__call__

    class Fragile(type(adapter._pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any, prompt: Any = None, **kwargs: Any) -> Any:
            if any("poison" in text for text in ([prompt] if isinstance(prompt, str) else prompt)):
                raise ValueError("cannot read this")
            return own_call(self, *args, prompt=prompt, **kwargs)

    adapter._pipeline.__class__ = Fragile
    answers = adapter.run([request(1), request(2, prompt="poison"), request(3)])
    assert isinstance(answers[1], ValueError)
    assert torch.is_tensor(answers[0])
    assert torch.is_tensor(answers[2])


def test_out_of_memory_halves_the_batch_and_remembers() -> None:
    adapter = build("stable-diffusion-pag")
    calls = count_calls(adapter, most=2)
    images(adapter.run([request(i) for i in range(4)]))
    images(adapter.run([request(i) for i in range(4)]))
    assert calls == [4, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.2}, r"^strength 0.2 with 2 steps runs int\(0.4\) = 0 steps; raise num_inference_steps to at least 5$"),
        ({"strength": 1.5}, r"^strength 1.5 is outside \(0, 1\]; use a strength above 0 and at most 1$"),
        ({"prompt": "word " * 60}, r"^the prompt 'word .*' takes \d+ tokens, the text encoder reads 77; shorten it$"),
        (
            {"negative_prompt": "word " * 60},
            r"^the negative prompt 'word .*' takes \d+ tokens, the text encoder reads 77; shorten it$",
        ),
        ({"image": torch.zeros(1, 8, 8, dtype=torch.uint8)}, r"^a request's image has shape \(1, 8, 8\) .*pass a uint8 tensor"),
    ],
)
def test_bad_requests_get_one_sentence_each(changes: dict[str, Any], message: str) -> None:
    adapter = build("stable-diffusion-pag")
    good, bad = adapter.run([request(1), request(2, **changes)])
    assert torch.is_tensor(good)
    with pytest.raises(GenerationError, match=message):
        raise bad  # type: ignore[misc]


def test_nan_and_flagged_images_are_rejected() -> None:
    adapter = build("stable-diffusion-pag")
    broken = np.full((3, 32, 32, 3), 0.5, dtype=np.float32)
    broken[0, 4, 4, 1] = np.nan

    class Output:
        images = broken
        nsfw_content_detected = (False, True, False)

    class Fixed(type(adapter._pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return Output()

    adapter._pipeline.__class__ = Fixed
    nan, flagged, fine = adapter.run([request(1, id="first"), request(2), request(3)])
    assert isinstance(nan, RejectedImageError)
    assert nan.reason == "nan"
    assert isinstance(flagged, RejectedImageError)
    assert flagged.reason == "nsfw"
    assert torch.is_tensor(fine)


def test_images_come_back_in_their_own_size() -> None:
    adapter = build("stable-diffusion-controlnet")
    asked = [request(1, image=picture(1, 20, 36)), request(2, image=picture(2, 40, 16)), request(3)]
    assert [tuple(answer.shape) for answer in images(adapter.run(asked))] == [(3, 20, 36), (3, 40, 16), (3, 32, 32)]


def test_negative_prompts_of_flux_have_no_effect() -> None:
    adapter = build("flux")
    assert torch.equal(*images(adapter.run([request(1), request(1, negative_prompt="blurry")])))


def test_the_control_image_is_the_picture() -> None:
    for family in ("flux-control", "stable-diffusion-xl-controlnet-union"):
        adapter = build(family)
        arguments = adapter._arguments([request(1), request(2)], (32, 32))
        assert arguments["control_image"] == arguments["image"] == [to_pil_image(picture(1)), to_pil_image(picture(2))]
        assert arguments.get("control_mode", [6]) == [6]  # tile


def test_a_union_without_a_tile_mode_is_refused() -> None:
    pipeline = FAMILIES["stable-diffusion-xl-controlnet-union"]()
    pipeline.controlnet.register_to_config(num_control_type=6)  # the first edition has no tile mode
    with pytest.raises(RecipeError, match=r"has 6 kinds of control images and none for the picture itself \(tile, number 6\)"):
        PipelineAdapter(pipeline, resolution=32)


def test_guidance_reaches_every_kind_of_pipeline() -> None:
    for family in ("flux", "qwenimage", "z-image", "kandinsky3"):
        adapter = build(family)
        weak, strong = images(adapter.run([request(1, guidance_scale=1.5), request(1, guidance_scale=30.0)]))
        assert not torch.equal(weak, strong), family


def test_evaluations_count_rows() -> None:
    plain, pag, flux = build("stable-diffusion-controlnet"), build("stable-diffusion-pag"), build("flux")
    for adapter in (plain, pag, flux):
        adapter._steps = 10
    half = request(1, strength=0.5)
    unguided = replace(half, guidance_scale=1.0)
    assert [adapter.evaluations(half) for adapter in (plain, pag, flux)] == [10, 15, 5]
    assert [adapter.evaluations(unguided) for adapter in (plain, pag, flux)] == [5, 10, 5]
    assert build("flux-kontext").evaluations(half) == 2  # all of its steps


def test_samplers_are_exchanged_where_the_family_can() -> None:
    pipeline = FAMILIES["stable-diffusion-pag"]()
    set_sampler(pipeline, "dpmsolver++")
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    flux = FAMILIES["flux"]()
    for name in ("auto", "euler"):  # flow matching is Euler already
        set_sampler(flux, name)
        assert type(flux.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(RecipeError, match=r"runs with its own .* only, not with sampler 'ddim'; use 'auto'$"):
        set_sampler(flux, "ddim")
    with pytest.raises(RecipeError, match=r"^sampler 'heun' is not known; use 'auto' or one of 'ddim'"):
        PipelineAdapter(pipeline, sampler="heun")


def test_what_is_not_an_image_to_image_pipeline_is_refused() -> None:
    from diffusers import (
        QwenImageLayeredPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
    )

    for kind in (StableDiffusionPipeline, StableDiffusionInpaintPipeline):
        with pytest.raises(ModelLoadError, match=rf"^{kind.__name__} does not turn an image and a prompt into an"):
            PipelineAdapter(kind(**tiny_families._sd_parts()))
    inpainting = StableDiffusionImg2ImgPipeline(**tiny_families._sd_parts(in_channels=9))
    with pytest.raises(ModelLoadError, match=r"^StableDiffusionImg2ImgPipeline is an inpainting checkpoint \(its UNet reads 9"):
        PipelineAdapter(inpainting)
    parts = tiny_families._qwen_parts(5)
    with pytest.raises(ModelLoadError, match=r"^QwenImageLayeredPipeline is not supported: it splits an image"):
        PipelineAdapter(QwenImageLayeredPipeline(**parts, processor=tiny_families.text.qwen_vl_processor()))


def test_instruct_pix2pix_runs_where_it_was_loaded_as_such() -> None:
    """AutoPipeline does not know it, so it cannot be named in a recipe."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline(**tiny_families._sd_parts(in_channels=8))
    adapter = PipelineAdapter(pipeline, num_inference_steps=2, resolution=32)
    assert not adapter.traits.strength
    assert [tuple(image.shape) for image in images(adapter.run([request(1), request(2)]))] == [(3, 32, 32)] * 2


def test_bad_settings() -> None:
    pipeline = FAMILIES["flux"]()
    with pytest.raises(RecipeError, match="batch_size 0 leaves no room"):
        PipelineAdapter(pipeline, batch_size=0)
    with pytest.raises(RecipeError, match="num_inference_steps 0 does not fit the schedule"):
        PipelineAdapter(pipeline, num_inference_steps=0)
    with pytest.raises(RecipeError, match=r"resolution \(33, 32\) cannot be used"):
        PipelineAdapter(pipeline, resolution=(33, 32))


def count_calls(adapter: PipelineAdapter, most: int | None = None) -> list[int]:
    """The sizes of all calls to come; above ``most`` they run out of memory."""
    calls: list[int] = []
    kind = type(adapter._pipeline)
    own_call = kind.__call__

    class Counting(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1 if isinstance(kwargs["prompt"], str) else len(kwargs["prompt"]))
            if most is not None and calls[-1] > most:
                raise torch.OutOfMemoryError("no memory")
            return own_call(self, *args, **kwargs)

    adapter._pipeline.__class__ = Counting
    return calls
