"""From a wish to a stored variant: statuses, merging, captions on demand, and stores that cannot be written."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from augment_fakes import OWN_CAPTIONS, FakeCaptioner, FakeScorer, captioned, picture
from report_fakes import ColourScorer
from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import Builder, BuilderSpec, auto_models
from sgid_transforms.building.wanted import Status, Wanted
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.captions.prepare import Describer
from sgid_transforms.errors import GenerationError, RecipeError, StoreError
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe import Filters, Recipe
from sgid_transforms.variants import VariantStore

RECIPE = OWN_CAPTIONS


class Generate:
    """Inverts images; refuses the variants that it is told to."""

    def __init__(self, refuse: dict[int, GenerationResult] | None = None) -> None:
        self.refuse = refuse or {}
        self.batches: list[list[GenerationRequest]] = []

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        self.batches.append(list(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: GenerationRequest) -> GenerationResult:
        refused = self.refuse.get(int(request.id.rpartition("-")[2]))
        return refused or GenerationResult(255 - request.image, None, request.seed, request.strength)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[CaptionStore, VariantStore]:
    captions = CaptionStore(tmp_path / "captions.sqlite")
    captions.put_many(captioned(*map(picture, range(4))))
    return captions, VariantStore(tmp_path / "variants", fsync=False)


def _wanted(number: int, variant: int = 0, label: str | None = None) -> Wanted:
    return Wanted(image_key(picture(number)), variant, picture(number), label)


def _stored(stores: tuple[CaptionStore, VariantStore], number: int, variant: int = 0) -> Any:
    record = stores[0].get(image_key(picture(number)))
    assert record is not None
    return stores[1].get(RECIPE, Address(RECIPE, stores[0]).key(record, variant) or "", variant)


def test_what_is_made_is_stored_and_made_once(stores: tuple[CaptionStore, VariantStore]) -> None:
    generate = Generate()
    builder = Builder(RECIPE, generate, stores[1], stores[0])
    outcomes = builder([_wanted(0), _wanted(1), _wanted(0)])
    assert [(one.status, one.image) for one in outcomes] == [(Status.STORED, None)] * 3
    assert sum(map(len, generate.batches)) == 2
    assert torch.equal(_stored(stores, 1).image, 255 - picture(1))
    assert _stored(stores, 1).provenance.prompt == "a photo of a cat, a caption"
    assert builder([_wanted(0)])[0].status is Status.STORED
    assert sum(map(len, generate.batches)) == 2


def test_rejections_are_remembered_and_errors_are_not(stores: tuple[CaptionStore, VariantStore]) -> None:
    refused = {
        1: GenerationResult(None, "label", rejected=("black", "label")),
        2: GenerationResult(None, "error: out of luck", failed=True),
    }
    generate = Generate(refused)
    counted: dict[str, int] = {}

    def count(**counts: int) -> None:
        for name, number in counts.items():
            counted[name] = counted.get(name, 0) + number

    builder = Builder(RECIPE, generate, stores[1], stores[0], count=count)
    outcomes = builder([_wanted(0, variant) for variant in range(3)])
    assert [(one.status, one.reason) for one in outcomes] == [
        (Status.STORED, ""),
        (Status.FILTERED, "label"),
        (Status.FAILED, "error: out of luck"),
    ]
    assert counted == {"generated": 1, "filtered": 1, "failed": 1}
    generate.refuse = {}
    again = builder([_wanted(0, variant) for variant in range(3)])
    assert [one.status for one in again] == [Status.STORED, Status.FILTERED, Status.STORED]
    assert again[1].reason == "black, label"


def test_an_image_without_caption_or_label_fails_alone(stores: tuple[CaptionStore, VariantStore]) -> None:
    builder = Builder(RECIPE, Generate(), stores[1], stores[0])
    bad, good = builder([_wanted(7), _wanted(0)])
    assert bad.status is Status.FAILED
    assert "has no caption; call sgid.prepare(dataset)" in bad.reason
    assert good.status is Status.STORED


def test_a_caption_on_demand_is_written_once_with_its_captioner(stores: tuple[CaptionStore, VariantStore]) -> None:
    """It once lost its captioner's name, and was written for each variant anew."""
    captioner = FakeCaptioner()
    describer = Describer(RECIPE.prompt, captioner, FakeScorer())
    builder = Builder(RECIPE, Generate(), stores[1], stores[0], describer=describer)
    outcomes = builder([_wanted(7, variant, "dog") for variant in range(3)])
    assert [one.status for one in outcomes] == [Status.STORED] * 3
    builder([_wanted(7, 3, "dog")])
    assert captioner.seen == 1
    record = stores[0].get(image_key(picture(7)))
    assert (record.captioner, record.label, record.source) == ("fake", "dog", "model")
    assert record.scorer == "FakeScorer"
    assert _stored(stores, 7, 2) is not None


def test_captions_on_demand_are_those_of_prepare_also_for_a_photo(stores: tuple[CaptionStore, VariantStore]) -> None:
    """Both look at a photo that was shrunk first."""
    sizes = []

    class Sizes(FakeCaptioner):
        def caption(self, images: Any) -> list[str]:
            sizes.extend(tuple(image.shape[1:]) for image in images)
            return super().caption(images)

    describer = Describer(RECIPE.prompt, Sizes(), FakeScorer())
    photo = torch.zeros(3, 2048, 3072, dtype=torch.uint8)
    Builder(RECIPE, Generate(), stores[1], stores[0], describer=describer)([Wanted("ab" * 16, 0, photo, "dog")])
    assert sizes == [(1024, 1536)]


def test_an_image_without_a_label_is_not_captioned_on_demand(stores: tuple[CaptionStore, VariantStore]) -> None:
    captioner = FakeCaptioner()
    describer = Describer(RECIPE.prompt, captioner, FakeScorer())
    outcomes = Builder(RECIPE, Generate(), stores[1], stores[0], describer=describer)([_wanted(7), _wanted(8, 0, "dog")])
    assert [one.status for one in outcomes] == [Status.FAILED, Status.STORED]
    assert captioner.seen == 1


def test_on_demand_a_caption_by_a_person_is_left_alone(stores: tuple[CaptionStore, VariantStore]) -> None:
    key = image_key(picture(7))
    stores[0].put(CaptionRecord(key, "my own words", label="dog", source="human"))
    captioner = FakeCaptioner()
    describer = Describer(RECIPE.prompt, captioner, FakeScorer())
    Builder(RECIPE, Generate(), stores[1], stores[0], describer=describer)([_wanted(7)])
    assert captioner.seen == 0
    assert _stored(stores, 7).provenance.caption == "my own words"


@pytest.mark.parametrize(("fit", "sizes"), [(1, [1] * 6), (2, [2] * 3), (3.9, [3, 3]), (0.1, [1] * 6), (9, [6])])
def test_few_large_originals_are_in_work_at_once(
    stores: tuple[CaptionStore, VariantStore], monkeypatch: pytest.MonkeyPatch, fit: float, sizes: list[int]
) -> None:
    monkeypatch.setattr("sgid_transforms.building.builder._MAX_BYTES", int(fit * picture(0).numel()))
    generate = Generate()
    outcomes = Builder(RECIPE, generate, stores[1], stores[0])([_wanted(n % 3, n) for n in range(6)])
    assert [one.status for one in outcomes] == [Status.STORED] * 6
    assert [len(batch) for batch in generate.batches] == sizes


def test_pixels_come_back_where_the_store_cannot_be_written(
    stores: tuple[CaptionStore, VariantStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> bool:
        raise StoreError("no space left")

    monkeypatch.setattr(VariantStore, "put", full)
    with caplog.at_level(logging.WARNING, logger="sgid_transforms"):
        outcomes = Builder(RECIPE, Generate(), stores[1], stores[0])([_wanted(0), _wanted(1)])
    assert [torch.equal(one.image, 255 - picture(n)) for n, one in enumerate(outcomes)] == [True, True]
    assert len(caplog.records) == 1
    assert "variants cannot be stored and are made again every time: no space left" in caplog.text


def test_a_generator_that_answers_too_little_is_found_out(stores: tuple[CaptionStore, VariantStore]) -> None:
    with pytest.raises(GenerationError, match="2 requests got 1 answers"):
        Builder(RECIPE, lambda requests: [GenerationResult(None, "x")], stores[1], stores[0])([_wanted(0), _wanted(1)])


def test_a_scorer_object_without_features_is_refused_for_a_label_check(stores: tuple[CaptionStore, VariantStore]) -> None:
    """It once fell back to the bundled 32-pixel CLIP without a word."""
    recipe = RECIPE.replace(filters=Filters("argmax"))
    with pytest.raises(RecipeError, match="the scorer is a FakeScorer without image_features and probabilities"):
        BuilderSpec(recipe, stores[1], stores[0], scorer=FakeScorer(), labels=["cat", "dog"]).build()


@pytest.mark.parametrize("filters", [Filters("argmax"), Filters("threshold"), Filters(min_image_similarity=0.1)])
def test_a_scorer_object_is_the_one_that_every_filter_asks(stores: tuple[CaptionStore, VariantStore], filters: Filters) -> None:
    scorer = Scorer()
    spec = BuilderSpec(RECIPE.replace(filters=filters), stores[1], stores[0], scorer=scorer, labels=["cat", "dog"])
    [outcome] = spec.build()([_wanted(0)])
    assert outcome.status in (Status.STORED, Status.FILTERED)
    assert scorer.asked > 0


class Scorer(ColourScorer):
    asked = 0

    def image_features(self, images: Any) -> torch.Tensor:
        self.asked += len(images)
        return super().image_features(images)


def test_the_model_decides_on_captioner_and_scorer_unless_the_user_does() -> None:
    assert auto_models(Recipe()) == ("tiny", "tiny")
    captioner, scorer = auto_models(Recipe(model="sd-turbo"))
    assert captioner.startswith("Salesforce/blip")
    assert scorer.startswith("openai/clip")
    assert auto_models(Recipe(model="sd-turbo"), "mine", None) == ("mine", None)


class Steps(Generate):
    """A stream that hands over after each step, with or without results, and may break off."""

    def __init__(self, held: threading.Event | None = None, fail: bool = False) -> None:
        super().__init__()
        self.held, self.fail, self.steps = held, fail, 0

    def stream(self, pull: Any) -> Any:
        while requests := pull(2):
            yield []
            self.steps += 1
            yield list(zip(requests, self(requests), strict=True))
            if self.held is not None and self.steps == 2:
                self.held.set()  # the second step is done, while the first one's variants still wait to be stored
            if self.fail:
                raise RuntimeError("the device is gone")


def test_the_model_goes_on_while_variants_are_stored(
    stores: tuple[CaptionStore, VariantStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    put = stores[1].put

    def slow(*arguments: Any) -> Any:
        assert held.wait(20), "the model waited for the disk"
        return put(*arguments)

    monkeypatch.setattr(stores[1], "put", slow)
    outcomes = Builder(RECIPE, Steps(held), stores[1], stores[0])([_wanted(number) for number in range(4)])
    assert [one.status for one in outcomes] == [Status.STORED] * 4
    assert all(torch.equal(_stored(stores, number).image, 255 - picture(number)) for number in range(4))


def test_what_was_made_before_a_stream_broke_off_is_stored_and_told(stores: tuple[CaptionStore, VariantStore]) -> None:
    builder = Builder(RECIPE, Steps(fail=True), stores[1], stores[0])
    told: list[Any] = []

    def run() -> None:
        waiting = [_wanted(number) for number in range(4)]
        for group in builder.stream(lambda room: [waiting.pop(0) for _ in range(min(room, len(waiting)))]):
            told.extend(group)

    with pytest.raises(RuntimeError, match="the device is gone"):
        run()
    assert [(one.key, outcome.status) for one, outcome in told] == [(_wanted(n).key, Status.STORED) for n in (0, 1)]
    assert _stored(stores, 0) is not None
    assert _stored(stores, 2) is None
