import dataclasses

import pytest
import torch

from image_folders import BROKEN, GOOD, own_folder, picture, plain_folder
from job_fakes import FakeCaptioner, FakeGenerator, FakeScorer, fake_models
from sgid_transforms.bulk import Models, Shard, caption_folder, estimate_folder, generate_folder, scan_folder
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import GenerationError, RecipeError, StoreError
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore
from sgid_transforms.variants.verdicts import Verdict

RECIPE = Recipe(guidance=SimilarityGuidance(2.0, 6.0), caption_from="own")


class Stores:
    def __init__(self, folder):
        self.captions = CaptionStore(folder / "captions.sqlite")
        self.variants = VariantStore(folder / "variants", fsync=False)

    def content(self):
        return {
            (ref.key, ref.variant): self.variants.get_image(RECIPE, ref.key, ref.variant).numpy().tobytes()
            for ref in self.variants.iter(RECIPE)
        }

    def records(self):
        return {record.key: (record.caption, record.label, record.similarity, record.rank) for record in self.captions}


@pytest.fixture
def stores(tmp_path):
    made = Stores(tmp_path / "stores")
    yield made
    made.captions.close()


def generate(folder, stores, models=None, **options):
    models = models or fake_models()
    return generate_folder(scan_folder(folder), RECIPE, stores.captions, stores.variants, models=models, **options)


def test_every_valid_image_gets_its_variants_and_the_rest_is_reported(tmp_path, stores):
    done = generate(own_folder(tmp_path / "data"), stores, count=3)
    assert (done.images, done.wanted, done.generated, done.present, done.failed) == (GOOD, 3 * GOOD, 3 * GOOD, 0, ())
    assert (done.captions.captioned, done.captions.scored, done.captions.turned) == (GOOD, GOOD, 1)
    assert {one.path.name for one in done.captions.skipped} == {*BROKEN, "empty_class"}
    assert stores.variants.count(RECIPE) == 3 * GOOD
    assert all(rank is not None for *_, rank in stores.records().values())


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("bad"), AssertionError(), ZeroDivisionError("0")])
def test_a_model_that_fails_is_a_generation_error_and_what_was_made_stays(tmp_path, stores, error):
    calls = []

    def generator(recipe, device, **options):
        def run(requests):
            calls.append(len(requests))
            if len(calls) > 1:
                raise error
            return FakeGenerator()(requests)

        return run

    models = dataclasses.replace(fake_models(), generator=generator, batch_size=2)
    with pytest.raises(GenerationError, match=f"the model failed: {type(error).__name__}"):
        generate(plain_folder(tmp_path / "data", 3), stores, models, count=1)
    assert stores.variants.count(RECIPE) == 2


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no room")])
def test_no_memory_is_told_as_such(tmp_path, stores, error):
    """The command line then says what to lower."""

    def generator(recipe, device, **options):
        def run(requests):
            raise error

        return run

    with pytest.raises(type(error)):
        generate(plain_folder(tmp_path / "data", 1), stores, dataclasses.replace(fake_models(), generator=generator))


def test_variants_have_the_upright_size_of_their_original(tmp_path, stores):
    generate(own_folder(tmp_path / "data"), stores, count=1)
    sizes = sorted(tuple(stores.variants.get_image(RECIPE, ref.key, 0).shape[1:]) for ref in stores.variants.iter(RECIPE))
    images = scan_folder(tmp_path / "data").images
    assert sizes == sorted(image.size for image in images)
    assert (90, 60) in sizes


def test_a_second_run_loads_no_model_and_makes_nothing(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 5)
    generate(folder, stores, count=2)

    def explode(recipe, device, **options):
        raise AssertionError("a model was loaded")

    class Exploding(FakeCaptioner):
        def caption(self, images):
            raise AssertionError("a model was asked")

    idle = Models(captioner=Exploding(), scorer=FakeScorer(), generator=explode)
    done = generate(folder, stores, idle, count=2)
    assert (done.generated, done.present, done.captions.captioned) == (0, 20, 0)


def test_new_images_and_more_variants_are_added_to_what_is_there(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 4)
    generate(folder, stores, count=1)
    before = stores.content()
    picture(5000).save(folder / "cat" / "new.png")
    captioner = FakeCaptioner()
    done = generate(folder, stores, fake_models(captioner=captioner), count=2)
    assert captioner.captioned == 1
    assert (done.generated, done.present) == (10, 8)
    assert before.items() <= stores.content().items()


def test_shards_share_all_the_work_and_give_what_one_run_gives(tmp_path):
    folder = plain_folder(tmp_path / "data", 15)
    whole, shared = Stores(tmp_path / "whole"), Stores(tmp_path / "shared")
    generate(folder, whole, count=2)
    made = [generate(folder, shared, count=2, shard=Shard(number, 3)).generated for number in (1, 2, 3)]
    assert sum(made) == 60
    assert min(made) > 0
    assert shared.content() == whole.content()
    assert shared.records() == whole.records()


@pytest.mark.parametrize(("number", "count"), [(0, 2), (3, 2), (1, 0), (-1, -1)])
def test_a_shard_that_does_not_exist_is_refused(number, count):
    with pytest.raises(RecipeError, match="does not exist"):
        Shard(number, count)


def test_a_stop_keeps_what_was_made_and_the_next_run_makes_the_rest(tmp_path):
    folder = plain_folder(tmp_path / "data", 6)
    whole, parts = Stores(tmp_path / "whole"), Stores(tmp_path / "parts")
    generate(folder, whole, count=2)
    generator = FakeGenerator()
    while True:
        limit = len(generator.made) + 8
        done = generate(folder, parts, fake_models(generator), count=2, stop=lambda limit=limit: len(generator.made) >= limit)
        assert parts.variants.count(RECIPE) == len(generator.made)
        if not done.stopped:
            break
    assert len(generator.made) == len(set(generator.made)) == 24
    assert parts.content() == whole.content()


def test_a_stop_while_captioning_goes_on_later(tmp_path, stores):
    scan = scan_folder(plain_folder(tmp_path / "data", 10))
    asked = iter([False] * 9 + [True] * 1000)
    stop = asked.__next__
    first = caption_folder(scan, RECIPE, stores.captions, fake_models(), stop=stop)
    assert first.stopped
    known = len(stores.captions)
    assert 0 < known < 20
    second = caption_folder(scan, RECIPE, stores.captions, fake_models())
    assert not second.stopped
    assert second.captioned == 20 - known
    assert all(rank is not None for *_, rank in stores.records().values())


def test_ranks_are_made_up_for_if_a_run_was_killed_before_it_ranked(tmp_path, stores):
    """Killed between the last similarity and the ranks, `prepare` finds nothing to do when it is called again."""
    scan = scan_folder(plain_folder(tmp_path / "data", 4))
    caption_folder(scan, RECIPE, stores.captions, fake_models())
    whole = stores.records()
    stores.captions.set_similarities({key: similarity for key, (_, _, similarity, _) in whole.items()})
    assert all(rank is None for *_, rank in stores.records().values())
    caption_folder(scan, RECIPE, stores.captions, fake_models())
    assert stores.records() == whole


def test_filtered_variants_are_remembered_and_failed_ones_tried_again(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 3)

    def verdict(name):
        return {"0": "label", "1": "error: out of luck"}.get(name[-1])

    generator = FakeGenerator(verdict=verdict)
    first = generate(folder, stores, fake_models(generator), count=3)
    assert (first.generated, first.filtered, len(first.failed)) == (6, 6, 6)
    assert "out of luck" in first.failed[0].reason
    generator.verdict = None
    second = generate(folder, stores, fake_models(generator), count=3)
    assert (second.generated, second.filtered, second.present, second.failed) == (6, 6, 6, ())


def test_a_renamed_class_is_scored_again_under_its_new_name(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 2)
    caption_folder(scan_folder(folder), RECIPE, stores.captions, fake_models())
    (folder / "cat").rename(folder / "tabby_cat")
    done = caption_folder(scan_folder(folder), RECIPE, stores.captions, fake_models())
    assert (done.captioned, done.scored) == (0, 2)
    assert {label for _, label, *_ in stores.records().values()} == {"tabby cat", "dog"}
    assert all(rank is not None for *_, rank in stores.records().values())


def test_human_captions_are_kept_and_scored(tmp_path, stores):
    scan = scan_folder(plain_folder(tmp_path / "data", 2))
    key = scan.images[0].key
    stores.captions.put(CaptionRecord(key, "my own words", source="human"))
    done = caption_folder(scan, RECIPE, stores.captions, fake_models())
    assert (done.captioned, done.scored) == (3, 4)
    assert stores.captions.get(key).caption == "my own words"
    assert stores.captions.get(key).label == "cat"


def test_a_store_that_cannot_be_written_ends_the_job(tmp_path, monkeypatch):
    folder = plain_folder(tmp_path / "data", 2)
    stores = Stores(tmp_path)
    generator = FakeGenerator()

    def full(*arguments):
        raise StoreError("no space left")

    monkeypatch.setattr(VariantStore, "put", full)
    with pytest.raises(StoreError, match="cannot be stored"):
        generate(folder, stores, fake_models(generator), count=4)
    assert len(generator.made) == 4  # one batch, not the whole night


def test_a_file_that_changes_meanwhile_gets_no_variants_of_its_old_picture(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 2)
    scan = scan_folder(folder)
    caption_folder(scan, RECIPE, stores.captions, fake_models())
    picture(4711).save(scan.images[0].file.path)
    done = generate_folder(scan, RECIPE, stores.captions, stores.variants, count=1, models=fake_models())
    assert done.generated == 3
    assert [one.path for one in done.failed] == [scan.images[0].file.path]
    assert "changed" in done.failed[0].reason


def test_an_estimate_writes_nothing_and_counts_what_is_missing(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 20)
    scan = scan_folder(folder)
    found = estimate_folder(scan, RECIPE, stores.captions, stores.variants, count=3, models=fake_models(), sample=10)
    assert (found.images, found.captions_missing, found.wanted, found.missing, found.sampled) == (40, 40, 120, 120, 10)
    assert found.seconds_per_variant > 0
    assert found.seconds_per_caption > 0
    assert found.seconds == pytest.approx(40 * found.seconds_per_caption + 120 * found.seconds_per_variant)
    assert not stores.captions.path.exists()
    assert not stores.variants.root.exists()
    generate(folder, stores, count=2)
    sizes = [ref.path.stat().st_size for ref in stores.variants.iter(RECIPE)]
    assert found.bytes_per_variant == pytest.approx(sum(sizes) / len(sizes), rel=0.1)
    later = estimate_folder(scan, RECIPE, stores.captions, stores.variants, count=3, models=fake_models())
    assert (later.captions_missing, later.missing, later.seconds_per_caption) == (0, 40, 0.0)
    assert stores.variants.count(RECIPE) == 80


def test_the_model_decides_on_captioner_and_scorer_unless_the_user_does():
    assert (Models().captioner_for(Recipe()), Models().scorer_for(Recipe())) == ("tiny", "tiny")
    real = Recipe.preset("sd-turbo")
    assert Models().captioner_for(real).startswith("Salesforce/blip")
    assert Models().scorer_for(real).startswith("openai/clip")
    assert Models(captioner="mine").captioner_for(real) == "mine"


def test_a_variant_follows_from_its_own_name_alone(tmp_path, stores):
    """Batch size and order must not show in the pixels."""
    folder = plain_folder(tmp_path / "data", 5)
    other = Stores(tmp_path / "other")
    generate(folder, stores, fake_models(batch_size=3), count=2)
    generate(folder, other, fake_models(batch_size=32), count=2)
    assert stores.content() == other.content()


def _reject(stores, *numbers):
    """Reject these variants of every image."""
    stores.variants.judge(
        Verdict(ref.fingerprint, ref.key, ref.variant, "reject", "anna", 1.0)
        for ref in stores.variants.iter(RECIPE)
        if ref.variant in numbers
    )


def test_rejected_variants_are_replaced_when_asked_and_only_then(tmp_path, stores):
    folder = plain_folder(tmp_path / "data", 3)
    generate(folder, stores, count=2)
    _reject(stores, 0)
    assert generate(folder, stores, count=2).generated == 0
    done = generate(folder, stores, count=2, replace_rejected=True)
    assert (done.wanted, done.present, done.generated) == (12, 6, 6)
    assert {ref.variant for ref in stores.variants.iter(RECIPE)} == {0, 1, 2}
    assert generate(folder, stores, count=2, replace_rejected=True).generated == 0
    _reject(stores, 2)
    assert generate(folder, stores, count=2, replace_rejected=True).generated == 6
