"""The bundled models are ordinary Hugging Face folders: plain diffusers and transformers load and run them, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import sgid_transforms

TINY = Path(sgid_transforms.__file__).parent / "assets" / "tiny"
SAMPLE = next((TINY.parent / "samples" / "frog").iterdir())

RUN = {
    "pipeline": """
from diffusers import StableDiffusionImg2ImgPipeline
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
out = pipe("a photo of a frog", image=image, strength=0.5, guidance_scale=3.0, num_inference_steps=4).images[0]
assert out.size == (32, 32) and pipe.safety_checker is None
""",
    "clip": """
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
batch = CLIPProcessor.from_pretrained(folder, local_files_only=True)(
    text=["a photo of a frog", "a photo of a ship"], images=image, return_tensors="pt", padding=True)
assert model(**batch).logits_per_image.shape == (1, 2)
""",
    "captioner": """
from transformers import BlipForConditionalGeneration, BlipProcessor
model = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
ids = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=20)
assert "background" in processor.decode(ids[0], skip_special_tokens=True)
""",
}


@pytest.mark.parametrize("name", RUN)
def test_a_fresh_offline_process_loads_and_runs_the_folder_with_plain_classes(name):
    head = f"import torch; from PIL import Image; image = Image.open({str(SAMPLE)!r}); folder = {str(TINY / name)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + RUN[name]], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_weights_are_half_precision_safetensors_of_45_megabytes_at_most():
    files = sorted(TINY.rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 45e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            floats = {tensors.get_slice(k).get_dtype() for k in tensors.keys()} - {"I64", "BOOL"}  # noqa: SIM118
        assert floats == {"F16"}, file
    assert not [f for f in TINY.rglob("*") if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_the_model_card_states_the_figures_that_were_measured_on_these_weights():
    metrics = json.loads((TINY / "metrics.json").read_text())
    card = (TINY / "README.md").read_text()
    assert f"{metrics['vae']['psnr']:.2f} dB" in card
    assert f"{100 * metrics['clip']['zero_shot']:.1f} %" in card
    for strength in ("0.3", "0.5", "0.7"):
        assert f"{100 * metrics[f'variants_{strength}']['relative']:.1f} %" in card


def test_a_strength_means_on_16x16_latents_what_it_means_for_stable_diffusion_on_64x64():
    config = json.loads((TINY / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    kept = 1.0
    for beta in config["trained_betas"][:700]:
        kept *= 1 - beta
    # Stable Diffusion's sigma at t = 700 is 3.3 (scaled-linear betas 0.00085 to 0.012).
    assert ((1 - kept) / kept) ** 0.5 == pytest.approx(3.3 / 4, rel=0.02)
    assert config["prediction_type"] == "v_prediction"
