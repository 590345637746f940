"""All that runs on a device, on a pretended one: nothing on the wrong device, the CPU's pixels, and few transfers.

The budgets count what costs time on a real device; they only ever go down.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from pretended import PretendedDevice
from sgid_transforms.building.builder import load_generator
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import DeviceLostError
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.generator import Generator
from sgid_transforms.images.keys import image_key
from sgid_transforms.models.captioner import Captioner
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.recipe.recipe import Filters, Recipe
from sgid_transforms.transforms.augment import SGIDAugment
from tiny_models import NATIVE, image, request

STEPS = 3
SIZE = (16, 16)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real device would take the place of the pretended one")


@pytest.fixture(params=["cuda", "npu"])
def device(request: pytest.FixtureRequest) -> Iterator[PretendedDevice]:
    with PretendedDevice(request.param) as entered:
        yield entered


def requests(count: int, **changes: Any) -> list[Any]:
    return [request(n, image=image(n, *SIZE), **{"strength": 0.4 + 0.6 * (n % 7) / 7} | changes) for n in range(count)]


def engine(name: str, device: Any = None, **options: Any) -> NativeEngine:
    return NativeEngine(NATIVE[name](), device=device, **{"num_inference_steps": STEPS, "resolution": SIZE} | options)


@cache
def on_the_cpu(name: str, sampler: str, **changes: Any) -> list[Any]:
    return engine(name, sampler=sampler, batch_size=32).run(requests(32, **changes))


CASES = [
    ("sd1", "ddim", {}),
    ("sd1", "euler", {}),
    ("sd1", "dpmsolver++", {}),
    ("sd1", "ddim", {"guidance_scale": 1.0}),
    ("tiny", "ddim", {}),
    ("zero_snr", "ddim", {}),
    ("sdxl", "euler", {}),
    ("sdxl", "dpmsolver++", {"guidance_scale": 1.0}),
    ("lcm", "lcm", {}),
    ("lcm_lora", "lcm", {"guidance_scale": 1.0}),
]


@pytest.mark.parametrize(("name", "sampler", "changes"), CASES, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_pixels_are_the_cpus_and_the_budgets_hold(device: PretendedDevice, name: str, sampler: str, changes: Any) -> None:
    """32 images: at most 4 copies to start them, one per call of the UNet, and one wait per decoded batch.

    diffusers copies the tokens of each text encoder by itself, and waits; these copies count among the four.
    """
    asked = requests(32, **changes)
    there = engine(name, device.device, sampler=sampler, batch_size=32)
    there.run(requests(2, **changes))  # the negative prompt and the size conditions are kept
    calls, before = there.stats.unet_calls, len(device.events)
    got = there.run(asked)
    for one, other in zip(got, on_the_cpu(name, sampler, **changes), strict=True):
        assert isinstance(one, torch.Tensor), one
        assert isinstance(other, torch.Tensor)
        assert (one.int() - other.int()).abs().max() <= 1
    counts = device.counts(before)
    calls = there.stats.unet_calls - calls
    copies = counts["upload", False] + counts["upload", True]
    assert copies - calls <= 4, device.places(before)
    assert counts["upload", True] <= 2, device.places(before)
    assert (counts["download", True], counts["download", False], counts["item", True]) == (0, 1, 0), device.places(before)
    assert counts["event", True] == 1, device.places(before)


KERNELS = {"ddim": 14, "euler": 20, "dpmsolver++": 22, "lcm": 18}


@pytest.mark.parametrize(("name", "sampler"), [("sd1", "ddim"), ("sd1", "euler"), ("sd1", "dpmsolver++"), ("lcm_lora", "lcm")])
def test_kernels_of_a_step_outside_the_unet(
    device: PretendedDevice, name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = engine(name, device.device, sampler=sampler, batch_size=32)
    denoiser: Any = there._denoiser
    own = denoiser.step
    counts = []

    def step(*arguments: Any) -> Any:
        before = device.kernels
        outcome = own(*arguments)
        counts.append(device.kernels - before)
        return outcome

    output = torch.zeros(64, 4, 8, 8).to(device.device)
    monkeypatch.setattr(there._pipeline.unet, "forward", lambda x, *arguments, **named: (output[: len(x)],))
    monkeypatch.setattr(denoiser, "step", step)
    there.run(requests(32, strength=1.0, guidance_scale=3.0))
    assert counts
    assert max(counts) <= KERNELS[sampler], counts


def test_images_of_many_sizes_go_over_and_come_back_together(device: PretendedDevice) -> None:
    asked = [request(n, image=image(n, 24 + 8 * (n % 3), 40), strength=0.6) for n in range(12)]
    there = engine("sd1", device.device, resolution=(32, 32), batch_size=12)
    there.run(asked[:1])
    calls, before = there.stats.unet_calls, len(device.events)
    got = there.run(asked)
    here = engine("sd1", resolution=(32, 32), batch_size=12).run(asked)
    assert all((one.int() - other.int()).abs().max() <= 1 for one, other in zip(got, here, strict=True))
    counts = device.counts(before)
    assert counts["upload", False] - (there.stats.unet_calls - calls) <= 2, device.places(before)
    assert (counts["download", False], counts["event", True], counts["download", True]) == (1, 1, 0), device.places(before)


def test_images_that_are_on_the_device_already_stay_there(device: PretendedDevice) -> None:
    asked = requests(8)
    moved = [request(n, image=one.image.to(device.device), strength=one.strength) for n, one in enumerate(asked)]
    there = engine("sd1", device.device, batch_size=8)
    here = there.run(asked)
    before = len(device.events)
    got = there.run(moved)
    assert all(torch.equal(one, other) for one, other in zip(got, here, strict=True))
    assert device.counts(before)["item", True] == 0, device.places(before)
    assert device.counts(before)["download", True] == 0, device.places(before)


def test_filters_take_a_batch_at_a_time(device: PretendedDevice) -> None:
    recipe = Recipe.for_model("tiny", filters=Filters("argmax", min_image_similarity=-1.0, max_retries=0))
    there = Generator.from_recipe(recipe, device.device, torch.float32, 16, labels=["cat", "dog"])
    asked = [request(n, label="cat", strength=0.9, guidance_scale=3.0) for n in range(16)]
    there(asked)
    calls, before = there.engine.stats.unet_calls, len(device.events)  # type: ignore[attr-defined]
    got = there(asked)
    here = Generator.from_recipe(recipe, "cpu", torch.float32, 16, labels=["cat", "dog"])(asked)
    assert [one.reason for one in got] == [one.reason for one in here]
    assert [one.label_score for one in got] == pytest.approx([one.label_score for one in here], abs=0.02)  # bfloat16
    calls = there.engine.stats.unet_calls - calls  # type: ignore[attr-defined]
    counts = device.counts(before)
    # The engine: two to start, since the prompts are known, and one per call. The filters: variants and originals.
    assert counts["upload", False] + counts["upload", True] <= calls + 2 + 2, device.places(before)
    assert counts["download", True] <= 2, device.places(before)
    assert counts["item", True] == 0, device.places(before)


def test_captioner_and_scorer_run_there(device: PretendedDevice) -> None:
    pictures = [image(n, 32, 32) for n in range(3)]
    assert Captioner("tiny", device=device.device).caption(pictures) == Captioner("tiny").caption(pictures)
    there = CLIPScorer("tiny", device.device, dtype=torch.float32)
    texts = ["a photo of a cat", "a photo of a dog", "a photo of a ship"]
    torch.testing.assert_close(
        there.image_text(pictures, texts), CLIPScorer("tiny").image_text(pictures, texts), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_transform_takes_batches_of_the_device(device: PretendedDevice, tmp_path: Path, dtype: torch.dtype) -> None:
    recipe = Recipe.for_model("tiny", caption_from="own")
    captions = CaptionStore(tmp_path / "captions.sqlite")
    pictures = [image(n, 32, 32) for n in range(6)]
    captions.put_many(CaptionRecord(image_key(one), "on grass", "cat") for one in pictures)

    def transform(where: Any) -> SGIDAugment:
        model = partial(load_generator, dtype=torch.float32)
        store = tmp_path / str(where).replace(":", "")
        return SGIDAugment(
            recipe=recipe, captions=captions, variants=store, p=1.0, variants_per_image=1, device=str(where), generator=model
        )

    batch = v2.functional.to_dtype(torch.stack(pictures), dtype, scale=True)
    here = transform("cpu")(batch)
    batch = batch.to(device.device)
    there = transform(device.device)
    for turn in ("made", "stored"):
        before = len(device.events)
        got = there(batch)
        assert (got.device, got.dtype, got.shape) == (batch.device, batch.dtype, batch.shape), turn
        step = 1 / 255 if dtype is torch.float32 else 1
        assert (got.cpu().float() - here.float()).abs().max() <= 1.001 * step
        device.events.pop()  # of the line above
    counts = device.counts(before)
    assert (counts["upload", False], counts["upload", True], counts["item", True]) == (1, 0, 0), device.places(before)
    assert (counts["download", False], counts["download", True]) == (1, 0), device.places(before)
    assert there.stats().hits == len(pictures)


@pytest.mark.parametrize("at", range(100))
def test_a_lost_device_ends_the_stream_whenever_it_happens(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a property of a request: nothing is split, tried again, or taken for an answer."""
    pipeline = _PIPELINE.setdefault("sd1", NATIVE["sd1"]())
    generator = Generator(NativeEngine(pipeline, num_inference_steps=STEPS, resolution=SIZE, batch_size=4))
    calls = 0
    forward = pipeline.unet.forward
    fatal = at % 8

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > fatal:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
        return forward(*arguments, **named)

    monkeypatch.setattr(pipeline.unet, "forward", failing)
    answered: list[Any] = []
    waiting = requests(24, seed=at)

    def pull(room: int) -> list[Any]:
        taken, waiting[:] = waiting[:room], waiting[room:]
        return taken

    def run() -> None:
        for group in generator.stream(pull):
            answered.extend(group)

    with pytest.raises(DeviceLostError, match=r"^the device stopped working \(CUDA error: an illegal memory access was encoun"):
        run()
    assert calls == fatal + 1
    assert all(result.ok for _, result in answered)


_PIPELINE: dict[str, Any] = {}
