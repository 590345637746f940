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
    for text in ("label", "own", "travelling"):
        for strength in ("0.3", "0.5", "0.7", "0.9", "1"):
            assert f"{100 * metrics[f'{text}_{strength}']['relative']:.1f} %" in card


def test_the_noise_schedule_is_stable_diffusions_and_ends_in_pure_noise():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(TINY / "pipeline" / "scheduler", local_files_only=True)
    kept = scheduler.alphas_cumprod
    assert kept[-1] == 0
    assert scheduler.config.prediction_type == "v_prediction"
    # Stable Diffusion's own signal-to-noise ratio, where the rescaling to zero at the end hardly shows.
    plain = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    assert (kept[:400] - plain[:400]).abs().max() < 0.04


def test_variants_keep_their_label_and_listen_to_a_context_of_another_image():
    metrics = json.loads((TINY / "metrics.json").read_text())
    assert metrics["travelling_1"]["background"] >= 0.6, "colours named in the prompt appear"
    assert metrics["travelling_0.5"]["pixel_difference"] > 0.05
    for strength in ("0.9", "1"):
        assert metrics[f"travelling_{strength}"]["relative"] >= 0.97, "and the label is kept"
