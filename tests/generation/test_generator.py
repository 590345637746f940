"""The generator: filters, retries, and failures that stay with their request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_families
import tiny_models
import tiny_text
from sgid_transforms.errors import GenerationError, ModelLoadError, RecipeError
from sgid_transforms.generation.adapters import PipelineAdapter
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.filters import retry_seed
from sgid_transforms.generation.generator import Generator, GeneratorStats, choose_batch_size
from sgid_transforms.generation.requests import Answers, GenerationRequest, Pull, RejectedImageError, in_batches, steps_to_run
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.recipe.recipe import Filters, Recipe

BLACK = torch.zeros(3, 32, 32, dtype=torch.uint8)


class Scripted:
    """An engine that answers as it is told, by the request and the number of its earlier attempts."""

    tokenizer = None
    max_tokens = None

    def __init__(self, answer: Callable[[GenerationRequest, int], torch.Tensor | Exception]) -> None:
        self.batch_size = 8
        self.answer = answer
        self.calls: list[list[GenerationRequest]] = []

    def run(self, requests: Sequence[GenerationRequest]) -> list[torch.Tensor | Exception]:
        self.calls.append(list(requests))
        return [self.answer(request, len(self.calls) - 1) for request in requests]

    def stream(self, pull: Pull) -> Iterator[Answers]:
        return in_batches(self.run, self.batch_size, pull)

    def evaluations(self, request: GenerationRequest) -> int:
        return 2 * steps_to_run(10, request.strength)


def requests(count: int, **changes: Any) -> list[GenerationRequest]:
    return [tiny_models.request(i, **changes) for i in range(count)]


def test_results_come_in_order_with_their_facts() -> None:
    engine = Scripted(lambda request, attempt: request.image.flip(0))
    generator = Generator(engine)
    asked = requests(3)
    for result, request in zip(generator(asked), asked, strict=True):
        assert result.ok
        assert result.image is not None
        assert torch.equal(result.image, request.image.flip(0))
        assert (result.reason, result.seed, result.strength, result.attempt) == (None, request.seed, 0.5, 0)
        assert result.unet_evaluations == 10
        assert result.rejected == ()
    assert generator.stats() == GeneratorStats(requests=3, images=3, attempts=3, evaluations=30)
    assert generator([]) == []


def test_rejected_requests_alone_are_tried_again_with_a_new_seed_and_lower_strength() -> None:
    def answer(request: GenerationRequest, attempt: int) -> torch.Tensor | Exception:
        if request.id == "1" and attempt == 0:
            return RejectedImageError("nan", "NaN")
        return BLACK if request.id == "1" and attempt == 1 else request.image

    engine = Scripted(answer)
    generator = Generator(engine, strength_range=(0.2, 0.8))
    results = generator(requests(3, strength=0.6))
    assert [len(call) for call in engine.calls] == [3, 1, 1]
    retried = results[1]
    assert retried.ok
    assert retried.rejected == ("nan", "black")
    assert retried.attempt == 2
    assert retried.seed == retry_seed(1, 2)
    assert retried.strength == pytest.approx(0.3)  # half-way to 0.2, twice
    assert retried.unet_evaluations == 12 + 8 + 6
    stats = generator.stats()
    assert stats.rejected == {"nan": 1, "black": 1}
    assert (stats.requests, stats.images, stats.attempts, stats.retries, stats.filtered) == (3, 3, 5, 2, 0)


def test_retries_are_bounded() -> None:
    """A published generator loops until its safety checker is content, which may be never."""
    engine = Scripted(lambda request, attempt: BLACK)
    generator = Generator(engine, filters=Filters(max_retries=3))
    [result] = generator(requests(1))
    assert not result.ok
    assert result.image is None
    assert result.reason == "black"
    assert result.rejected == ("black",) * 4
    assert result.attempt == 3
    assert len(engine.calls) == 4
    assert generator.stats().filtered == 1
    once = Scripted(lambda request, attempt: BLACK)
    assert Generator(once, filters=Filters(max_retries=0))(requests(1))[0].rejected == ("black",)
    assert len(once.calls) == 1


def test_a_retry_keeps_a_strength_below_which_nothing_would_run() -> None:
    engine = Scripted(lambda request, attempt: BLACK)
    [result] = Generator(engine)(requests(1, strength=0.1))
    assert result.reason == "black"  # not an error about zero steps
    assert {call[0].strength for call in engine.calls} == {0.1}


def test_errors_are_final_and_stay_with_their_request() -> None:
    def answer(request: GenerationRequest, attempt: int) -> torch.Tensor | Exception:
        return GenerationError("strength 0.01 runs 0 steps") if request.id == "1" else request.image

    engine = Scripted(answer)
    generator = Generator(engine)
    good, bad, other = generator(requests(3))
    assert good.ok
    assert other.ok
    assert bad.reason == "error: strength 0.01 runs 0 steps"
    assert len(engine.calls) == 1
    assert generator.stats().errors == 1
    assert generator.stats().retries == 0


def test_a_variant_depends_neither_on_its_batch_nor_on_the_retries_of_others() -> None:
    def answer(request: GenerationRequest, attempt: int) -> torch.Tensor | Exception:
        return BLACK if request.seed % 2 else request.image + request.seed % 7

    alone = [Generator(Scripted(answer))([request])[0] for request in requests(6)]
    together = Generator(Scripted(answer))(requests(6))
    for one, other in zip(alone, together, strict=True):
        assert (one.seed, one.strength, one.rejected, one.reason) == (other.seed, other.strength, other.rejected, other.reason)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    tiny_models.tiny().save_pretrained(folder / "native")
    tiny_families.FAMILIES["flux"]().save_pretrained(folder / "flux")
    tiny_text.clip_model().save_pretrained(folder / "clip")
    tiny_text.clip_processor().save_pretrained(folder / "clip")
    return {name: str(folder / name) for name in ("native", "flux", "clip")}


def recipe(model: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"num_inference_steps": 4, "strength": (0.5, 1.0), "resolution": 32, "sampler": "auto"}
    return Recipe(model=model, **settings | {"guidance": 3.0} | changes)


def test_a_recipe_of_the_native_family(checkpoints: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    generator = Generator.from_recipe(recipe(checkpoints["native"]), batch_size=3)
    assert isinstance(generator.engine, NativeEngine)
    assert generator.engine.batch_size == 3
    assert generator.max_tokens == 77
    assert generator.tokenizer is not None
    bad = tiny_models.request(9, prompt="word " * 60)
    results = generator([*requests(4), bad])
    assert [result.ok for result in results] == [True] * 4 + [False]
    assert str(results[4].reason).startswith("error: the prompt 'word word")
    assert all(result.unet_evaluations == 4 for result in results[:4])  # two steps, guided
    assert capfd.readouterr() == ("", "")


def test_a_recipe_of_another_family(checkpoints: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    generator = Generator.from_recipe(recipe(checkpoints["flux"]), device="cpu")
    assert isinstance(generator.engine, PipelineAdapter)
    results = generator(requests(2, guidance_scale=2.0))
    assert all(result.ok for result in results)
    with pytest.raises(RecipeError, match=r"^guidance_interval \(0.2, 0.8\) needs the native path, and FluxImg2Img"):
        Generator.from_recipe(recipe(checkpoints["flux"], guidance_interval=(0.2, 0.8)))
    with pytest.raises(RecipeError, match=r"^exact_strength needs the native path, and FluxImg2ImgPipeline runs its own call"):
        Generator.from_recipe(recipe(checkpoints["flux"], exact_strength=True))
    with pytest.raises(RecipeError, match=r"^FluxImg2ImgPipeline runs with its own FlowMatchEulerDiscreteScheduler only"):
        Generator.from_recipe(recipe(checkpoints["flux"], sampler="ddim"))
    assert capfd.readouterr() == ("", "")


def test_exact_strength_from_a_recipe() -> None:
    pipeline = tiny_models.sd1()
    asked = [tiny_models.request(0, strength=strength) for strength in (0.5, 0.7)]
    for exact, different in ((False, False), (True, True)):
        generator = Generator.from_recipe(recipe("somewhere/else", revision="mine, 1", exact_strength=exact), pipeline=pipeline)
        one, other = (result.image for result in generator(asked))
        assert one is not None
        assert other is not None
        assert torch.equal(one, other) is not different


def test_filters_with_clip_from_a_recipe(checkpoints: dict[str, str]) -> None:
    filters = Filters(label_check="argmax", max_retries=1)
    labels = ["cat", "dog", "ship"]
    options: dict[str, Any] = {"labels": labels, "clip": checkpoints["clip"]}
    generator = Generator.from_recipe(recipe(checkpoints["native"], filters=filters), **options)
    results = generator([tiny_models.request(i, label=label) for i in range(2) for label in labels])
    scorer = CLIPScorer(checkpoints["clip"])
    for result, label in zip(results, labels * 2, strict=True):
        assert result.label_score is not None
        if result.image is not None:
            probabilities = scorer.label_probabilities([result.image], labels)[0]
            assert labels[int(probabilities.argmax())] == label
            assert result.label_score == pytest.approx(float(probabilities.max()), abs=1e-5)
        else:
            assert result.rejected == ("label", "label")
    stats = generator.stats()
    assert stats.images + stats.filtered == 6
    assert 0 < stats.rejected["label"] <= 12
    with pytest.raises(RecipeError, match="pass the class names of the data set as labels"):
        Generator.from_recipe(recipe(checkpoints["native"], filters=filters), clip=checkpoints["clip"])
    with pytest.raises(ModelLoadError, match="the CLIP model 'no/clip' cannot be loaded"):
        Generator.from_recipe(recipe(checkpoints["native"], filters=filters), labels=labels, clip="no/clip")


def test_the_bundled_models(capfd: pytest.CaptureFixture[str]) -> None:
    """What a new user has: no download, no remarks, pictures of the right size, and scores from the bundled CLIP."""
    filters = Filters(label_check="threshold", label_threshold=0.0, min_image_similarity=-1.0)
    generator = Generator.from_recipe(Recipe(filters=filters), labels=["cat", "dog"])
    asked = [tiny_models.request(i, prompt="a photo of a cat", label="cat", strength=0.5) for i in range(2)]
    for result in generator([*asked, tiny_models.request(2, image=tiny_models.image(2, 40, 24), label="dog", strength=0.5)]):
        assert result.ok
        assert result.label_score is not None
        assert result.image_similarity is not None
    assert result.image is not None
    assert result.image.shape == (3, 40, 24)
    assert generator.max_tokens == 32
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("how", "size"), [(True, 6), ("max-autotune-no-cudagraphs", 6), ("reduce-overhead", 8)])
def test_compiled_and_padded_where_graphs_are_recorded(
    how: bool | str, size: int, checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgid_transforms.generation import generator as module

    own = module.compile_pipeline
    monkeypatch.setattr(module, "compile_pipeline", lambda pipeline, mode: own(pipeline, backend="eager"))
    plain = Generator.from_recipe(recipe(checkpoints["native"]), batch_size=4)
    compiled = Generator.from_recipe(recipe(checkpoints["native"]), batch_size=4, compile=how)
    rows: set[int] = set()
    compiled.engine._pipeline.unet.register_forward_pre_hook(lambda _, args: rows.add(len(args[0])))  # type: ignore[attr-defined]
    for one, other in zip(plain(requests(3)), compiled(requests(3)), strict=True):
        assert one.image is not None
        assert other.image is not None
        assert int((one.image.int() - other.image.int()).abs().max()) <= 1
    assert rows == {size}  # the six of three guided samples


def test_a_given_pipeline_is_used_as_it_is() -> None:
    pipeline = tiny_models.sd1()
    generator = Generator.from_recipe(recipe("somewhere/else", revision="mine, 1"), pipeline=pipeline)
    assert generator(requests(1))[0].ok
    with pytest.raises(RecipeError, match=r"^lora says how to load a model, but a loaded pipeline was given; leave one out$"):
        Generator.from_recipe(recipe("somewhere/else", revision="mine, 1"), pipeline=pipeline, lora="x")


@pytest.mark.parametrize(("flags", "reject", "reason"), [(True, True, "nsfw"), (True, False, None), (False, True, None)])
def test_the_safety_checker_of_a_native_pipeline(flags: bool, reject: bool, reason: str | None) -> None:
    pipeline = tiny_models.sd1()
    pipeline.register_modules(safety_checker=tiny_text.safety_checker(flags=flags))
    pipeline.register_modules(feature_extractor=tiny_text.clip_image_processor())
    chosen = recipe("x", revision="mine", filters=Filters(reject_nsfw=reject, max_retries=0))
    results = Generator.from_recipe(chosen, pipeline=pipeline)(requests(2))
    assert [result.reason for result in results] == [reason, reason]


@pytest.mark.parametrize(("reject", "reason"), [(True, "nsfw"), (False, None)])
def test_the_safety_checker_of_another_pipeline(reject: bool, reason: str | None) -> None:
    """Its own call blackens what it flags: without the filter, the image must come back as it is."""
    pipeline = tiny_families.FAMILIES["stable-diffusion-pag"]()
    pipeline.register_modules(safety_checker=tiny_text.safety_checker(flags=True))
    pipeline.register_modules(feature_extractor=tiny_text.clip_image_processor())
    chosen = recipe("x", revision="mine", filters=Filters(reject_nsfw=reject, max_retries=0))
    results = Generator.from_recipe(chosen, pipeline=pipeline)(requests(2))
    assert [result.reason for result in results] == [reason, reason]


NATIVE_AND_ADAPTER = pytest.mark.parametrize("family", [tiny_models.sd1, tiny_families.FAMILIES["stable-diffusion-pag"]])


@NATIVE_AND_ADAPTER
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_inference_steps": 1000},
            r"^num_inference_steps 1000 with the checkpoint's steps_offset 1 starts at timestep 1000, and the schedule ends at "
            r"999; use at most 999 steps$",
        ),
        (
            {"negative_prompt": "blurry, " * 40},
            r"^the negative prompt 'blurry, .*' takes \d+ tokens, the text encoder reads 77; shorten it$",
        ),
        (
            {"prompt": "word " * 60 + "{label}"},
            r"^the prompt 'word .*' takes \d+ tokens, the text encoder reads 77; shorten it$",
        ),
    ],
    ids=["steps", "negative prompt", "template"],
)
def test_settings_that_can_never_work(family: Callable[[], Any], changes: dict[str, Any], message: str) -> None:
    """They once failed at every image, the first as an IndexError."""
    with pytest.raises(RecipeError, match=message):
        Generator.from_recipe(recipe("x", revision="mine", **{"sampler": "ddim"} | changes), pipeline=family())


def test_a_strength_that_an_lcm_cannot_run() -> None:
    with pytest.raises(RecipeError, match=r"^strength 0.05 leaves int\(2.5\) = 2 of the 50 steps .* 4 are asked for"):
        Generator.from_recipe(recipe("x", revision="mine", sampler="lcm", strength=(0.05, 1.0)), pipeline=tiny_models.lcm())


@NATIVE_AND_ADAPTER
def test_a_long_negative_prompt_does_no_harm_without_guidance(family: Callable[[], Any]) -> None:
    unguided = recipe("x", revision="mine", guidance=1.0, negative_prompt="blurry, " * 40)
    generator = Generator.from_recipe(unguided, pipeline=family())
    assert generator(requests(1, guidance_scale=1.0, negative_prompt=unguided.negative_prompt))[0].ok


@NATIVE_AND_ADAPTER
def test_a_tokenizer_without_a_limit_has_that_of_its_encoder(family: Callable[[], Any]) -> None:
    """transformers gives such a tokenizer 10**30, to which diffusers would pad; that failed at every image."""
    pipeline = family()
    pipeline.tokenizer.model_max_length = 10**30
    generator = Generator.from_recipe(recipe("x", revision="mine"), pipeline=pipeline)
    assert generator.max_tokens == 77
    assert generator(requests(1))[0].ok


def test_batch_sizes() -> None:
    cpu = torch.device("cpu")
    assert choose_batch_size("auto", cpu) == 16
    assert choose_batch_size(3, cpu) == 3
    for wrong in (0, -1, True, 2.0, "many"):
        with pytest.raises(RecipeError, match=r"^batch_size .* is neither 'auto' nor a number from 1 up; use for example 8$"):
            choose_batch_size(wrong, cpu)  # type: ignore[arg-type]


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(RecipeError, match=r"sampler.*heun"):
        recipe("x", sampler="heun")
