"""One request at a time, the native engine makes the picture that diffusers' own pipeline makes."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

from sgid_transforms.generation import engine as engine_module
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.generation.schedule import SCHEDULERS
from tiny_models import NATIVE, SD_BETAS, request, sd1, sdxl, unet

# of diffusers' schedulers, under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-4  # of pixels in [0, 1], float32

_pipelines: dict[str, Any] = {}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine return its pixels as floats in [0, 1]: rounding to uint8 would hide what is compared."""
    monkeypatch.setattr(engine_module, "to_uint8", lambda images: images)


def pipeline(family: str) -> Any:
    if family not in _pipelines:
        _pipelines[family] = NATIVE[family]()
    return _pipelines[family]


def reference(pipe: Any, request: GenerationRequest, steps: int) -> torch.Tensor:
    """What diffusers makes of a request, float ``(3, H, W)``."""
    return pipe(
        prompt=request.prompt,
        image=request.image[None].float() / 255,
        strength=request.strength,
        guidance_scale=request.guidance_scale,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
        **({"negative_prompt": request.negative_prompt} if request.negative_prompt else {}),
    ).images[0]


def difference(pipe: Any, request: GenerationRequest, steps: int, **settings: Any) -> float:
    engine = NativeEngine(pipe, num_inference_steps=steps, batch_size=1, **settings)
    (ours,) = engine.run([request])
    assert isinstance(ours, torch.Tensor), ours
    return (ours - reference(pipe, request, steps)).abs().max().item()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "zero_snr", "tiny", "sdxl"])
def test_equals_diffusers(family: str, sampler: str, guidance_scale: float) -> None:
    pipe = pipeline(family)
    kept = pipe.scheduler
    try:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(kept.config)
        asked = request(3, strength=0.6, guidance_scale=guidance_scale)
        assert difference(pipe, asked, steps=7) < TOLERANCE
    finally:
        pipe.scheduler = kept


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("family", ["lcm", "lcm_lora"])
def test_lcm_equals_diffusers(family: str, strength: float) -> None:
    """The consistency pipeline lets strength shorten the range and runs all steps; the ordinary one drops steps."""
    asked = request(4, strength=strength, guidance_scale=4.0)
    assert difference(pipeline(family), asked, steps=4) < TOLERANCE


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"timestep_spacing": "linspace"}),
        ("ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        ("ddim", {"steps_offset": 0, "clip_sample": True, "clip_sample_range": 1.5}),
        ("ddim", {"prediction_type": "sample"}),
        ("euler", {"timestep_spacing": "linspace"}),
        ("euler", {"timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
        ("euler", {"beta_schedule": "linear"}),
        ("dpmsolver++", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
        ("dpmsolver++", {"timestep_spacing": "trailing"}),
        ("dpmsolver++", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmsolver++", {"timestep_spacing": "leading", "beta_schedule": "squaredcos_cap_v2"}),
        ("lcm", {"clip_sample": True, "prediction_type": "v_prediction", "original_inference_steps": 40}),
    ],
    ids=str,
)
def test_scheduler_options_equal_diffusers(sampler: str, options: dict[str, Any]) -> None:
    pipe = pipeline("sd1")
    kept = pipe.scheduler
    try:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler])(**SD_BETAS | options)
        assert difference(pipe, request(5, strength=0.7, guidance_scale=3.0), steps=6) < TOLERANCE
    finally:
        pipe.scheduler = kept


def _values(sampler: str) -> list[dict[str, Any]]:
    """Every option of a scheduler in other values than its own."""
    common: list[dict[str, Any]] = [
        {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True}, {"steps_offset": 0}, {"steps_offset": 3}, {"num_train_timesteps": 500},
        {"trained_betas": [0.001 + 0.00001 * step for step in range(1000)]},
    ]  # fmt: skip
    own: dict[str, list[dict[str, Any]]] = {
        "ddim": [
            {"set_alpha_to_one": True}, {"thresholding": True}, {"thresholding": True, "sample_max_value": 2.0},
            {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ],
        "euler": [
            {"interpolation_type": "log_linear"}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
            {"sigma_min": 0.1}, {"sigma_max": 5.0}, {"sigma_min": 0.1, "sigma_max": 5.0, "use_karras_sigmas": True},
            {"timestep_type": "continuous"}, {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            {"final_sigmas_type": "sigma_min"},
        ],
        "dpmsolver++": [
            {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"},
            {"lower_order_final": False}, {"euler_at_final": True}, {"use_karras_sigmas": True},
            {"use_exponential_sigmas": True}, {"use_lu_lambdas": True}, {"final_sigmas_type": "sigma_min"},
            {"lambda_min_clipped": -5.1}, {"thresholding": True}, {"use_dynamic_shifting": True}, {"flow_shift": 3.0},
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ],
    }  # fmt: skip
    return common + own[sampler]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_every_scheduler_option_equals_diffusers_or_is_left_to_it(sampler: str) -> None:
    pipe = pipeline("sd1")
    kept, wrong, left = pipe.scheduler, {}, 0
    known = inspect.signature(getattr(diffusers, SCHEDULERS[sampler])).parameters
    try:
        for options in _values(sampler):
            if not set(options) <= set(known):
                continue
            pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler])(**SD_BETAS | options)
            if NativeEngine.supports(pipe) is not None:  # the pipeline adapter then runs diffusers itself
                left += 1
            elif not (found := difference(pipe, request(5, strength=0.7, guidance_scale=3.0), steps=6)) < TOLERANCE:
                wrong[str(options)] = found
    finally:
        pipe.scheduler = kept
    assert not wrong
    assert left >= 2


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_empty_negative_prompt_is_what_the_model_was_trained_with(zeros: bool) -> None:
    assert difference(sdxl(zeros=zeros), request(1, guidance_scale=8.0), steps=4) < TOLERANCE


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_negative_prompt_equals_diffusers(family: str) -> None:
    pipe = pipeline(family)
    asked = request(6, guidance_scale=7.0, negative_prompt="blurry, dark")
    assert difference(pipe, asked, steps=4) < TOLERANCE
    plain = reference(pipe, request(6, guidance_scale=7.0), 4)
    assert (reference(pipe, asked, 4) - plain).abs().max() > 100 * TOLERANCE, "the negative prompt has no effect to compare"


@pytest.mark.usefixtures("exact")
def test_prompt_and_guidance_matter_in_these_models() -> None:
    """If the random models ignored their text, every comparison here would pass with the text lost."""
    pipe = pipeline("sd1")
    base = reference(pipe, request(1, guidance_scale=6.0), 4)
    for other in (request(1, guidance_scale=1.0), request(1, guidance_scale=6.0, prompt="9876 xyz")):
        assert (reference(pipe, other, 4) - base).abs().max() > 100 * TOLERANCE


@pytest.mark.usefixtures("exact")
def test_sdxl_refiner_equals_diffusers() -> None:
    """A refiner has one text encoder, and an aesthetic score in the place of the target size."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    base = sdxl()
    width = base.text_encoder_2.config.projection_dim
    model = unet(
        width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + width,
    )
    parts = base.components | {"unet": model, "text_encoder": None, "tokenizer": None}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert difference(pipe, request(2, guidance_scale=5.0), steps=4) < TOLERANCE


@pytest.mark.usefixtures("exact")
def test_vae_with_latent_statistics_equals_diffusers() -> None:
    pipe = sdxl()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8])
    assert difference(pipe, request(2), steps=4) < TOLERANCE


@pytest.mark.usefixtures("exact")
def test_channels_last_changes_nothing() -> None:
    pipe = sd1()
    for layout in (True, False, None):
        assert difference(pipe, request(7), steps=4, channels_last=layout) < TOLERANCE
