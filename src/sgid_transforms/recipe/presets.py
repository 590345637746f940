"""Settings that are known to suit a model, or a kind of images, each with its source. Data only; `Recipe` reads it."""

from typing import Final, TypedDict

from sgid_transforms.recipe.guidance import SimilarityGuidance


class Preset(TypedDict):
    """What a preset sets; every other field of the recipe keeps its default."""

    model: str
    strength: float | tuple[float, float]
    guidance: float | SimilarityGuidance
    guidance_interval: tuple[float, float]
    num_inference_steps: int
    sampler: str
    exact_strength: bool
    resolution: int | tuple[int, int] | None
    caption_mode: str
    caption_from: str


# The bundled model. These numbers are written nowhere else: tune them here. Its UNet was distilled to four DDIM steps and takes
# its guidance scale, from 1 to 7, as an input. Strength: below 0.7, a variant still looks like its original. Contexts
# and guidance: docs/results.md, where none that follows the similarity beat a fixed one; with a label check, use 2.
TINY: Final[Preset] = {
    "model": "tiny",
    "strength": (0.9, 1.0),
    "guidance": 3.0,
    "guidance_interval": (0.0, 1.0),
    "num_inference_steps": 4,
    "sampler": "ddim",
    "exact_strength": True,
    "resolution": None,
    "caption_mode": "free",
    "caption_from": "dataset",
}

# Edition of the bundled weights. It is part of the fingerprint of every `tiny` recipe, so that images of older weights are
# not mistaken for images of newer ones: raise it whenever the weights in `sgid_transforms/assets/tiny/pipeline` change.
TINY_EDITION: Final = 4

PRESETS: Final[dict[str, Preset]] = {
    "tiny": TINY,
    # Model card of stabilityai/sd-turbo: 1 to 4 steps, 512x512, "does not make use of guidance_scale or negative_prompt, we
    # disable it with guidance_scale=0.0", and steps * strength >= 1. With 4 steps these strengths run 1, 2 or 3 of them.
    # Sampler: the Euler scheduler of the checkpoint (trailing timesteps).
    "sd-turbo": {
        "model": "stabilityai/sd-turbo",
        "strength": (0.3, 0.8),
        "guidance": 0.0,
        "guidance_interval": (0.0, 1.0),
        "num_inference_steps": 4,
        "sampler": "euler",
        "exact_strength": False,
        "resolution": 512,
        "caption_mode": "free",
        "caption_from": "own",
    },
    # Model card of stabilityai/sdxl-turbo, and diffusers' guide "Stable Diffusion XL Turbo": as sd-turbo, also at 512x512.
    # The checkpoint's own scheduler is ancestral Euler; plain Euler adds no noise of its own between the steps.
    "sdxl-turbo": {
        "model": "stabilityai/sdxl-turbo",
        "strength": (0.3, 0.8),
        "guidance": 0.0,
        "guidance_interval": (0.0, 1.0),
        "num_inference_steps": 4,
        "sampler": "euler",
        "exact_strength": False,
        "resolution": 512,
        "caption_mode": "free",
        "caption_from": "own",
    },
    # Steps and sampler: Real Guidance as rerun by DiffDA-Eval (IJCV 2026): SD 1.5, DPM-Solver++, 25 steps. Guidance: around the
    # 7.5 that diffusers and DistDiff use, DISEF has 8. Strength: around DistDiff's 0.5; the range is the project's own choice.
    # The repository is the mirror that diffusers' documentation names since runwayml's was removed.
    "sd15": {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "strength": (0.25, 0.75),
        "guidance": SimilarityGuidance(5.0, 10.0),
        "guidance_interval": (0.0, 1.0),
        "num_inference_steps": 25,
        "sampler": "dpmsolver++",
        "exact_strength": False,
        "resolution": 512,
        "caption_mode": "free",
        "caption_from": "own",
    },
    # Model card of SimianLuo/LCM_Dreamshaper_v7: guidance 8, 1 to 8 steps recommended, 4 in diffusers' image-to-image example.
    # It runs all its steps at any strength, and takes its guidance scale as an input, so that guidance costs no second
    # pass. The spread around 8 is the project's own choice.
    "lcm": {
        "model": "SimianLuo/LCM_Dreamshaper_v7",
        "strength": (0.3, 0.8),
        "guidance": SimilarityGuidance(6.0, 10.0),
        "guidance_interval": (0.0, 1.0),
        "num_inference_steps": 4,
        "sampler": "lcm",
        "exact_strength": False,
        "resolution": 512,
        "caption_mode": "free",
        "caption_from": "own",
    },
}

# Strength by kind of images, for any model. Source: Real Guidance as tuned by DiffDA-Eval (IJCV 2026), 0.1 on CUB and Aircraft
# (fine-grained), 0.9 on Caltech101 and CIFAR-100 (coarse). The far end of each range is the project's own choice.
STRENGTH_RANGES: Final[dict[str, tuple[float, float]]] = {
    "fine_grained": (0.1, 0.35),
    "coarse": (0.5, 0.9),
}


def preset_for_model(model: str) -> Preset:
    """The preset for a preset name, a checkpoint id or a folder, by the last part of its name.

    ``.../sdxl-turbo`` -> ``sdxl-turbo``, ``.../sd-turbo`` -> ``sd-turbo``, any other name with ``lcm`` in it -> ``lcm``,
    ``tiny`` -> ``tiny``, and everything else -> ``sd15``, whose 25 steps with guidance suit an undistilled model, but at the
    model's own resolution.
    """
    if model in PRESETS:
        return PRESETS[model]
    known = next((preset for preset in PRESETS.values() if preset["model"] == model), None)
    if known is not None:
        return known
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    for part, preset in (("sdxl-turbo", "sdxl-turbo"), ("sd-turbo", "sd-turbo"), ("lcm", "lcm")):
        if part in name:
            return {**PRESETS[preset], "model": model}
    return {**PRESETS["sd15"], "model": model, "resolution": None}
