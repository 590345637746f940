"""The engine's promises beyond equality with diffusers: batches, seeds, failures, sizes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sgid_transforms.errors import GenerationError, ModelLoadError, RecipeError
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import Engine, GenerationRequest, RejectedImageError
from tiny_models import SIZE, image, lcm, request, sd1, sdxl, tiny


@pytest.fixture(scope="module")
def shared() -> Any:
    """A pipeline that no test may change."""
    return sd1()


def images(results: list[torch.Tensor | Exception]) -> list[torch.Tensor]:
    for result in results:
        assert isinstance(result, torch.Tensor), result
    return [result for result in results if isinstance(result, torch.Tensor)]


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> int:
    return max((a.int() - b.int()).abs().max().item() for a, b in zip(one, other, strict=True))


def mixed(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Requests of strengths 0.2-0.8 and guidance scales 1-9, some of them without guidance."""
    draw = random.Random(seed)
    return [
        request(
            i,
            strength=draw.uniform(0.2, 0.8),
            guidance_scale=draw.choice([1.0, draw.uniform(1, 9)]),
            negative_prompt=draw.choice(["", "dark"]),
        )
        for i in range(count)
    ]


@contextmanager
def watch(module: torch.nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call ``hook(args, kwargs)`` before each call of a module; an exception that it raises is the module's own."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: hook(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "sampler"), [(tiny, "dpmsolver++"), (sdxl, "lcm")])
def test_results_do_not_depend_on_the_batch(family: Callable[[], Any], sampler: str) -> None:
    """64 mixed requests in any order, grouping and batch size; these two samplers carry history and fresh noise."""
    requests = mixed(64)
    pipeline = family()

    def run(batch_size: int, order: list[int], groups: int = 1) -> list[torch.Tensor]:
        engine = NativeEngine(pipeline, sampler=sampler, num_inference_steps=5, batch_size=batch_size)
        found: dict[int, torch.Tensor] = {}
        for group in (order[i::groups] for i in range(groups)):
            found.update(zip(group, images(engine.run([requests[i] for i in group])), strict=True))
        return [found[i] for i in range(len(requests))]

    order = list(range(64))
    expected = run(16, order)
    shuffled = random.Random(1).sample(order, 64)
    assert largest_difference(run(5, shuffled), expected) <= 2
    assert largest_difference(run(1, shuffled, groups=7), expected) <= 2
    assert len({tuple(picture.flatten().tolist()) for picture in expected}) == 64


def test_a_mixed_batch_costs_what_its_requests_need(shared: Any) -> None:
    requests = mixed(64)
    engine = NativeEngine(shared, num_inference_steps=12, batch_size=8)
    rows: list[int] = []
    with watch(shared.unet, lambda args, kwargs: rows.append(len(args[0]))):
        images(engine.run(requests))
    needed = sum(int(12 * r.strength) * (2 if r.guidance_scale > 1 else 1) for r in requests)
    assert sum(engine.evaluations(r) for r in requests) == needed
    assert sum(rows) == needed == engine.stats.unet_rows
    assert max(rows) <= 16
    assert len(rows) <= 1.1 * needed / 16, "the batches are not full"
    assert len(rows) == engine.stats.unet_calls
    assert engine.stats.fill > 0.9


def test_a_scale_of_one_skips_the_unconditional_half(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=4)
    for scale, rows in ((0.0, 2), (1.0, 2), (1.5, 4)):
        before = engine.stats.unet_rows
        images(engine.run([request(1, guidance_scale=scale)]))
        assert engine.stats.unet_rows - before == rows == engine.evaluations(request(1, guidance_scale=scale))


def test_guidance_acts_within_its_interval_only(shared: Any) -> None:
    asked = request(2, strength=1.0, guidance_scale=6.0)
    plain = request(2, strength=1.0, guidance_scale=1.0)

    def run(one: GenerationRequest, interval: tuple[float, float]) -> tuple[torch.Tensor, int]:
        engine = NativeEngine(shared, num_inference_steps=10, guidance_interval=interval)
        (picture,) = images(engine.run([one]))
        assert engine.stats.unet_rows == engine.evaluations(one)
        return picture, engine.stats.unet_rows

    everywhere, inside = run(asked, (0.0, 1.0)), run(asked, (0.25, 0.65))
    assert (everywhere[1], inside[1]) == (20, 14)
    assert largest_difference([everywhere[0]], [inside[0]]) > 2
    outside = run(asked, (0.95, 1.0))  # leading timesteps end at 901 of 999
    assert outside[1] == 10
    assert torch.equal(outside[0], run(plain, (0.0, 1.0))[0])


def test_distilled_guidance_is_an_input_not_a_second_half() -> None:
    engine = NativeEngine(lcm(), num_inference_steps=3)
    assert engine.sampler == "lcm"
    low, high = images(engine.run([request(1, guidance_scale=1.5), request(1, guidance_scale=12.0)]))
    assert engine.stats.unet_rows == 6
    assert largest_difference([low], [high]) > 2


def test_seed_decides_and_global_randomness_is_left_alone(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=4)
    state = torch.get_rng_state()
    one, other, again = images(engine.run([request(1, seed=1), request(1, seed=2), request(1, seed=1)]))
    assert torch.equal(torch.get_rng_state(), state)
    assert largest_difference([one], [again]) <= 2
    assert largest_difference([one], [other]) > 2


def test_inputs_are_left_alone_and_results_own_their_memory(shared: Any) -> None:
    requests = [request(i, image=image(i, *size)) for i, size in enumerate([(SIZE, SIZE), (SIZE, SIZE), (20, 40)])]
    before = [(r.image._version, r.image.clone()) for r in requests]
    results = images(NativeEngine(shared, num_inference_steps=2).run(requests))
    for asked, (version, pixels), result in zip(requests, before, results, strict=True):
        assert asked.image._version == version
        assert torch.equal(asked.image, pixels)
        assert result.dtype == torch.uint8
        assert result.is_contiguous()
        assert result.untyped_storage().nbytes() == result.numel()
        assert not result.is_inference()


@pytest.mark.parametrize("size", [(32, 32), (17, 50), (70, 30), (1, 1)])
def test_a_result_has_the_size_of_its_image(shared: Any, size: tuple[int, int]) -> None:
    (result,) = images(NativeEngine(shared, num_inference_steps=2).run([request(1, image=image(1, *size))]))
    assert result.shape == (3, *size)


def test_images_of_one_bucket_share_batches(shared: Any) -> None:
    sizes: list[tuple[int, ...]] = []
    requests = [request(i, image=image(i, *size)) for i, size in enumerate([(32, 32), (60, 62), (20, 40), (30, 60)])]
    with watch(shared.unet, lambda args, kwargs: sizes.append(tuple(args[0].shape))):
        images(NativeEngine(shared, num_inference_steps=2, resolution=32).run(requests))
    assert sizes == [(4, 4, 16, 16), (4, 4, 12, 22)]


def test_resolution_may_be_fixed(shared: Any) -> None:
    sizes: list[tuple[int, ...]] = []
    with watch(shared.unet, lambda args, kwargs: sizes.append(tuple(args[0].shape[-2:]))):
        images(NativeEngine(shared, num_inference_steps=2, resolution=(16, 24)).run([request(1)]))
    assert sizes == [(8, 12)]


def test_calls_are_padded_to_the_given_sizes(shared: Any) -> None:
    requests = mixed(11)
    expected = images(NativeEngine(shared, num_inference_steps=5).run(requests))
    engine = NativeEngine(shared, num_inference_steps=5, batch_size=4, row_sizes=(8, 2, 4))
    rows: set[int] = set()
    with watch(shared.unet, lambda args, kwargs: rows.add(len(args[0]))):
        padded = images(engine.run(requests))
    assert rows <= {2, 4, 8}
    assert largest_difference(padded, expected) <= 2


def test_the_vae_may_take_smaller_batches(shared: Any) -> None:
    requests = mixed(8)
    expected = images(NativeEngine(shared, num_inference_steps=3, batch_size=8).run(requests))
    engine = NativeEngine(shared, num_inference_steps=3, batch_size=8, vae_batch_size=3)
    encoded: list[int] = []
    decoded: list[int] = []
    rows: list[int] = []
    with (
        watch(shared.vae.encoder, lambda args, kwargs: encoded.append(len(args[0]))),
        watch(shared.vae.decoder, lambda args, kwargs: decoded.append(len(args[0]))),
        watch(shared.unet, lambda args, kwargs: rows.append(len(args[0]))),
    ):
        sliced = images(engine.run(requests))
    assert (max(encoded), max(decoded)) == (3, 3)
    assert max(rows) > 8
    assert largest_difference(sliced, expected) <= 1


def test_autocast_around_a_run_changes_nothing(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=3)
    expected = images(engine.run([request(1)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images(engine.run([request(1)]))[0], expected[0])


def test_bfloat16_stays_close_and_the_noise_is_the_same() -> None:
    pipeline, requests = tiny(), mixed(8)
    exact = images(NativeEngine(pipeline, num_inference_steps=5).run(requests))
    engine = NativeEngine(pipeline, num_inference_steps=5, dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    rough = images(engine.run(requests))
    mean = torch.stack([(a.float() - b.float()).abs().mean() for a, b in zip(rough, exact, strict=True)]).mean()
    assert 0 < mean < 4


def test_a_vae_that_overflows_in_float16_stays_in_float32() -> None:
    pipeline = sdxl()
    pipeline.vae.register_to_config(force_upcast=True)
    NativeEngine(pipeline, dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    assert pipeline.vae.dtype == torch.float32


def test_latent_cache_saves_the_encoder_and_changes_nothing(shared: Any, tmp_path: Path) -> None:
    requests = [request(i % 3, seed=i) for i in range(6)]
    expected = images(NativeEngine(shared, num_inference_steps=3).run(requests))
    encoded: list[int] = []
    with watch(shared.vae.encoder, lambda args, kwargs: encoded.append(len(args[0]))):
        for _ in range(2):
            engine = NativeEngine(shared, num_inference_steps=3, latent_cache=tmp_path, batch_size=3)
            assert largest_difference(images(engine.run(requests)), expected) <= 2
            assert encoded == [3]


def test_prompts_are_encoded_once(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=2)
    requests = [request(i, prompt=f"a photo of a {'cat' if i % 2 else 'dog'}") for i in range(20)]
    texts: list[int] = []
    with watch(shared.text_encoder, lambda args, kwargs: texts.append(len(args[0]))):
        images(engine.run(requests))
        images(engine.run(requests))
        assert sum(texts) == 3  # two prompts and the empty negative one
        engine.forget_prompts()
        images(engine.run(requests[:1]))
        assert sum(texts) == 5


def test_requests_that_cannot_run_leave_the_others_alone(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=4)
    good = [request(i) for i in range(3)]
    expected = images(engine.run(good))
    bad = {
        "runs int(0.8) = 0 steps; raise num_inference_steps to at least 5": request(7, strength=0.2),
        "strength 1.5 is outside (0, 1]": request(7, strength=1.5),
        "pass a uint8 tensor of shape (3, H, W)": request(7, image=torch.zeros(3, 8, 8)),
        "the text encoder reads 77": request(7, prompt="x" * 100),
        "text encoder reads 77; shorten": request(7, negative_prompt="y" * 100),
    }
    results = engine.run([good[0], *bad.values(), *good[1:]])
    assert largest_difference(images([results[0], *results[-2:]]), expected) <= 2
    for result, message in zip(results[1:-2], bad, strict=True):
        assert isinstance(result, GenerationError)
        assert message in str(result)


def test_a_sample_that_breaks_the_unet_fails_alone() -> None:
    pipeline = sd1()
    engine = NativeEngine(pipeline, num_inference_steps=4, batch_size=4)
    requests = mixed(12)
    expected = images(engine.run(requests))
    poison = pipeline.encode_prompt(requests[5].prompt, "cpu", 1, False)[0][0]

    def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(torch.allclose(row, poison) for row in kwargs["encoder_hidden_states"]):
            raise ValueError("this row is poison")

    with watch(pipeline.unet, refuse):
        results = engine.run(requests)
    assert str(results.pop(5)) == "this row is poison"
    del expected[5]
    assert largest_difference(images(results), expected) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_one_image_is_its_own_failure(value: float) -> None:
    pipeline = sd1()
    engine = NativeEngine(pipeline, num_inference_steps=3)
    requests = mixed(6)
    expected = images(engine.run(requests))
    spoiled = pipeline.encode_prompt(requests[2].prompt, "cpu", 1, False)[0][0]

    def spoil(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        rows = [torch.allclose(row, spoiled) for row in kwargs["encoder_hidden_states"]]
        return (output[0].masked_fill(torch.tensor(rows).view(-1, 1, 1, 1), value),)

    pipeline.unet.register_forward_hook(spoil, with_kwargs=True)
    results = engine.run(requests)
    failure = results.pop(2)
    assert isinstance(failure, RejectedImageError)
    assert failure.reason == "nan"
    del expected[2]
    assert largest_difference(images(results), expected) <= 2


def limited(rows: int, refused: list[int] | None = None) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args[0]) > rows:
            if refused is not None:
                refused.append(len(args[0]))
            raise torch.OutOfMemoryError(f"CUDA out of memory at {len(args[0])} rows")

    return refuse


@pytest.mark.parametrize("sampler", ["dpmsolver++", "lcm"])
def test_memory_that_runs_out_halves_the_batch_for_good(sampler: str) -> None:
    pipeline, requests = sd1(), mixed(20)
    expected = images(NativeEngine(pipeline, sampler=sampler, num_inference_steps=5, batch_size=8).run(requests))
    engine = NativeEngine(pipeline, sampler=sampler, num_inference_steps=5, batch_size=8)
    refused: list[int] = []
    with watch(pipeline.unet, limited(6, refused)), watch(pipeline.vae.decoder, limited(3, refused)):
        assert largest_difference(images(engine.run(requests)), expected) <= 2
        assert len(refused) >= 3
        refused.clear()
        images(engine.run(requests))
    assert not refused, "the smaller batch was not remembered"


def test_memory_that_does_not_do_for_one_sample(shared: Any) -> None:
    engine = NativeEngine(shared, num_inference_steps=3, batch_size=4)
    requests = [request(i, guidance_scale=scale) for i, scale in enumerate([5.0, 1.0, 5.0])]
    with watch(shared.unet, limited(1)):
        results = engine.run(requests)
    assert isinstance(results[1], torch.Tensor)
    for result in (results[0], results[2]):
        assert isinstance(result, GenerationError)
        assert str(result).startswith("out of memory at a batch of one (CUDA out of memory at 2 rows)")


def test_exact_strength_tells_close_strengths_apart(shared: Any) -> None:
    pair = [request(1, strength=0.5), request(1, strength=0.6)]
    coarse = images(NativeEngine(shared, num_inference_steps=4).run(pair))
    assert largest_difference(coarse[:1], coarse[1:]) <= 2
    fine = NativeEngine(shared, num_inference_steps=4, exact_strength=True)
    made = images(fine.run(pair))
    assert largest_difference(made[:1], made[1:]) > 2
    assert fine.stats.unet_rows == sum(fine.evaluations(r) for r in pair) == 8


def test_no_requests_are_no_work(shared: Any) -> None:
    engine = NativeEngine(shared)
    assert engine.run([]) == []
    assert engine.stats.fill == 0


def test_modules_get_their_memory_formats() -> None:
    last, first = torch.channels_last, torch.contiguous_format
    pipeline = sd1()
    for choice, unet, vae in ((None, first, last), (True, last, last), (False, first, first)):
        NativeEngine(pipeline, channels_last=choice)
        assert pipeline.unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=unet)
        assert pipeline.vae.decoder.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=vae)


def test_the_engine_keeps_the_protocol(shared: Any) -> None:
    engine = NativeEngine(shared, sampler="euler")
    assert isinstance(engine, Engine)
    assert engine.max_tokens == 77
    assert engine.tokenizer is shared.tokenizer
    assert engine.sampler == "euler"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "plms"}, "sampler 'plms' is not known; use 'auto' or one of 'ddim', 'euler', 'dpmsolver++', 'lcm'"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 does not fit the schedule; use 1 to 1000 steps"),
        (
            {"guidance_interval": (0.8, 0.2)},
            "guidance_interval (0.8, 0.2) is not a range within [0, 1]; use for example (0.2, 0.8)",
        ),
        ({"batch_size": 0}, "batch_size 0 leaves no room for a sample; use at least 1"),
        ({"vae_batch_size": 0}, "vae_batch_size 0 leaves no room for a sample; use at least 1"),
        ({"resolution": 2}, "resolution 2 is too small for this model; use at least 4"),
        ({"resolution": (30, 32)}, "resolution (30, 32) cannot be used; give height and width as multiples of 4"),
    ],
)
def test_settings_that_cannot_work(shared: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        NativeEngine(shared, **settings)
    assert str(caught.value) == message


def test_models_without_a_size_need_a_resolution() -> None:
    pipeline = sd1()
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(RecipeError, match="set resolution"):
        NativeEngine(pipeline)
    pipeline.unet.register_to_config(sample_size=[8, 16])
    sizes: list[tuple[int, ...]] = []
    with watch(pipeline.unet, lambda args, kwargs: sizes.append(tuple(args[0].shape[-2:]))):
        images(NativeEngine(pipeline, num_inference_steps=2).run([request(1)]))
    assert sizes == [(8, 16)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unet.register_to_config(in_channels=9), "has a UNet of 9 input channels"),
        (lambda p: p.unet.register_to_config(addition_embed_type="image"), "conditioned on more than text and size"),
        (lambda p: p.unet.register_to_config(class_embed_type="timestep"), "conditioned on more than text and size"),
        (
            lambda p: p.unet.register_to_config(encoder_hid_dim_type="ip_image_proj"),
            r"text features \(ip_image_proj\)",
        ),
        (lambda p: p.scheduler.register_to_config(thresholding=True), "has a DDIMScheduler, which no native sampler"),
        (lambda p: p.scheduler.register_to_config(prediction_type="flow_prediction"), "predicts 'flow_prediction'"),
    ],
)
def test_pipelines_that_need_the_adapter(change: Callable[[Any], None], message: str) -> None:
    pipeline = sd1()
    assert NativeEngine.supports(pipeline) is None
    change(pipeline)
    with pytest.raises(ModelLoadError, match=message) as caught:
        NativeEngine(pipeline)
    assert str(caught.value).endswith("; run it through the pipeline adapter")


def test_a_pipeline_of_another_class_needs_the_adapter() -> None:
    """The perturbed-attention pipeline has the same modules and does more with them."""
    import diffusers

    pipeline = sd1()
    other = diffusers.StableDiffusionPAGImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert str(NativeEngine.supports(other)).startswith("StableDiffusionPAGImg2ImgPipeline is not one of")
