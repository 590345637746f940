import csv
import multiprocessing
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from report_fakes import ColourScorer, near
from sgid_transforms.bulk import Models, scan_folder
from sgid_transforms.errors import ModelLoadError, RecipeError
from sgid_transforms.generation.requests import GenerationResult
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report import tuning
from sgid_transforms.report.metrics import vendi_score
from sgid_transforms.report.tuning import Point, Tuner, describe, spread, tune

LABELS = ("red", "green", "blue")


class WordCaptioner:
    """Captions every image alike, and takes labels."""

    id = "words"

    def caption(self, images, labels=None):
        return ["bright, on a table"] * len(images)


class Mixer:
    """Makes variants whose colours tell their request: mixed with the next class's colour by the strength, and a little by the
    guidance and the seed. What `refuse` says is rejected."""

    tokenizer = None

    def __init__(self, recipe, made=None, refuse=lambda request: None):
        self.made, self.refuse = made, refuse

    def __call__(self, requests):
        results = []
        for request in requests:
            if self.made is not None:
                self.made.append(request)
            reason = self.refuse(request)
            image = near(request.label, request.seed % 40, max(0.0, request.strength - request.guidance_scale / 20))
            results.append(GenerationResult(None if reason else image, reason, request.seed, request.strength))
        return results


class Scorer(ColourScorer):
    def image_text(self, images, texts):
        return (self.image_features(images) * self.text_features(texts)).sum(1)


def models(made=None, refuse=lambda request: None, captioner=None):
    return Models(
        captioner=captioner or WordCaptioner(),
        scorer=Scorer(),
        generator=lambda recipe, device, **options: Mixer(recipe, made, refuse),
        batch_size=4,
    )


@pytest.fixture
def scan(tmp_path):
    return folder(tmp_path / "data")


def folder(root, per_class=6):
    for label in LABELS:
        for number in range(per_class):
            path = root / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(near(label, number, 0.0).permute(1, 2, 0).contiguous().numpy()).save(path)
    return scan_folder(root)


BASE = Recipe(strength=(0.3, 0.5), guidance=3.0)


def test_the_figures_are_as_worked_out_by_hand(scan, tmp_path):
    """Of four variants of each image, one is rejected, and one shows another class."""
    colours = [near("red", 0, 0.0), near("red", 0, 0.2), near("red", 0, 1.0)]  # the last one is green

    class Fixed:
        tokenizer = None

        def __call__(self, requests):
            given = [int(request.id.rpartition("-")[2]) for request in requests]
            return [GenerationResult(colours[n] if n < 3 else None, None if n < 3 else "label", 1, 0.5) for n in given]

    only_red = scan_folder(tmp_path / "data")
    reds = tuple(image for image in only_red.images if image.file.label == "red")
    tuner = Tuner(scan, BASE, tmp_path / "out", Models("cpu", WordCaptioner(), Scorer(), lambda *a, **k: Fixed(), 4))
    tuner.scan = tuning.replace(tuner.scan, images=reds)
    assert tuner.caption(BASE)
    point = tuner.measure(BASE, len(reds))
    features = Scorer().image_features(colours)
    originals = Scorer().image_features([near("red", number, 0.0) for number in range(6)])
    assert point.images == 6
    assert point.agreement == pytest.approx(2 / 4)
    assert point.change == pytest.approx(float((1 - originals @ features.T).mean()), abs=1e-5)
    assert point.diversity == pytest.approx(vendi_score(torch.cat([originals, features.repeat(6, 1)])), abs=1e-4)
    assert point.value == pytest.approx(vendi_score(torch.cat([originals, features[:2].repeat(6, 1)])), abs=1e-4)
    share, value = tuner.originals()
    assert (share, value) == (1.0, pytest.approx(vendi_score(originals), abs=1e-4))


def test_the_choice_has_the_highest_value_and_is_what_the_files_say(scan, tmp_path):
    found = tune(scan, BASE, tmp_path / "out", models(), trials=12, sample=9)
    assert found.tried == 12
    assert not found.stopped
    assert found.agreement_originals == 1.0
    assert found.chosen.value == max(point.value for point in found.points)
    assert set(found.front) <= set(found.points)
    assert {point.images for point in found.points} == {9}
    assert found.base in found.points
    assert Recipe.from_toml(tmp_path / "out" / "recipe.toml") == found.chosen.recipe
    with open(tmp_path / "out" / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == [describe(point.recipe) for point in found.points]
    assert [row["chosen"] for row in rows].count("True") == 1
    assert f"with its variants {found.chosen.value:.1f}" in found.why
    assert f"yours: {found.base.value:.1f}" in found.why
    assert len(list((tmp_path / "out").glob("sheet-*-chosen.png"))) == 1
    with Image.open(tmp_path / "out" / "front.png") as picture:
        assert min(picture.size) > 400


def test_most_recipes_see_only_a_part_of_the_sample(scan, tmp_path):
    found = tune(scan, BASE, tmp_path / "out", models(), trials=15, sample=18)
    assert found.tried == 15
    assert 1 < len(found.points) < 15


def test_a_second_call_goes_on_with_other_recipes_and_makes_nothing_twice(scan, tmp_path):
    made = []
    first = tune(scan, BASE, tmp_path / "out", models(made), trials=5, sample=9)
    count = len(made)
    again = tune(scan, BASE, tmp_path / "out", models(made), trials=5, sample=9)
    assert (again.tried, len(made)) == (5, count)
    assert again.points == first.points
    more = tune(scan, BASE, tmp_path / "out", models(made), trials=9, sample=9)
    assert more.tried == 9
    assert len(made) > count
    assert len(made) == len({(request.seed, request.prompt, request.guidance_scale, request.strength) for request in made})


def test_other_images_or_another_recipe_begin_a_search_of_their_own(scan, tmp_path):
    tune(scan, BASE, tmp_path / "out", models(), trials=3, sample=9)
    assert tune(scan, BASE.replace(seed=1), tmp_path / "out", models(), trials=2, sample=9).tried == 2
    assert tune(scan, BASE, tmp_path / "out", models(), trials=4, sample=6).tried == 4


def test_without_time_your_recipe_stays_and_the_sentence_says_so(scan, tmp_path):
    found = tune(scan, BASE, tmp_path / "out", models(), minutes=0, sample=9)
    assert (found.tried, found.chosen, found.points) == (0, found.base, (found.base,))
    assert found.why.startswith("Your recipe stays")
    assert Recipe.from_toml(tmp_path / "out" / "recipe.toml") == BASE


def test_a_recipe_whose_variants_are_all_rejected_adds_nothing_and_is_not_chosen(scan, tmp_path):
    def refuse(request):
        return "label" if request.strength > 0.5 else None

    found = tune(scan, BASE, tmp_path / "out", models(refuse=refuse), trials=12, sample=9)
    assert found.chosen.agreement > 0.5
    assert all(point.value == found.value_originals for point in found.points if point.recipe.strength[0] > 0.5)


def test_a_stop_keeps_what_is_known(scan, tmp_path):
    made = []
    whole = 9 * 4

    def stop():
        return len(made) >= whole + 8

    found = tune(scan, BASE, tmp_path / "out", models(made), sample=9, stop=stop)
    assert found.stopped
    assert found.base in found.points
    assert tune(scan, BASE, tmp_path / "new", models(), sample=9, stop=lambda: True) is None


def test_models_without_guidance_keep_theirs_and_strengths_that_run_no_step_are_left_out(scan, tmp_path):
    turbo = Recipe(model="some/sd-turbo", num_inference_steps=4, strength=0.5)
    made = []
    tune(scan, turbo, tmp_path / "out", models(made), trials=12, sample=3)
    assert {request.guidance_scale for request in made} == {0.0}
    assert min(request.strength for request in made) >= 0.25
    made.clear()
    tune(scan, BASE, tmp_path / "guided", models(made), trials=12, sample=3)
    assert len({request.guidance_scale for request in made}) > 2


def test_a_captioner_without_a_mode_is_used_in_the_others(scan, tmp_path, monkeypatch):
    whole = Tuner.caption

    def caption(self, recipe, stop=lambda: False):
        if recipe.caption_mode == "context" and "{caption}" in recipe.prompt:
            raise ModelLoadError("it takes no text")
        return whole(self, recipe, stop)

    monkeypatch.setattr(Tuner, "caption", caption)
    found = tune(scan, BASE, tmp_path / "out", models(), trials=8, sample=3)
    assert found.notes == ("captions of mode 'context' were left out: it takes no text",)
    assert "context" not in {point.recipe.caption_mode for point in found.points}
    with pytest.raises(ModelLoadError, match="it takes no text"):
        tune(scan, BASE.replace(caption_mode="context"), tmp_path / "other", models(), trials=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": 1}, "1 variants per image have no diversity"), ({}, "all images are of one class, 'red'")],
)
def test_bad_input_is_refused_in_a_sentence(scan, tmp_path, options, message):
    if not options:
        scan = tuning.replace(scan, images=tuple(image for image in scan.images if image.file.label == "red"))
    with pytest.raises(RecipeError, match=message):
        tune(scan, BASE, tmp_path / "out", models(), **options)


def test_every_beginning_of_the_sample_has_all_classes_and_names_do_not_matter(scan, tmp_path):
    order = list(spread(scan.images))
    assert sorted(image.key for image in order) == sorted(image.key for image in scan.images)
    for end in range(3, len(order), 3):
        assert {image.file.label for image in order[end - 3 : end]} == set(LABELS)
    assert list(spread(scan.images[::-1])) == order


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from([0.1, 0.4, 0.8])), min_size=1, max_size=12))
def test_nothing_on_the_front_is_beaten_and_everything_else_is(figures):
    points = [
        Point(BASE.replace(seed=n), 9, agreement, 0.1, diversity, 0.1) for n, (agreement, diversity) in enumerate(figures)
    ]
    front = list(tuning._front(points))

    def beats(one, other):
        at_least = one.agreement >= other.agreement and one.diversity >= other.diversity
        return at_least and (one.agreement, one.diversity) != (other.agreement, other.diversity)

    assert front
    for point in points:
        assert (point in front) != any(beats(other, point) for other in points)


def test_recipes_are_described_in_words():
    assert describe(BASE) == "strength 0.3-0.5, guidance 3, free captions of other images"
    fixed = Recipe(strength=0.5, guidance=SimilarityGuidance(2, 4), prompt="a {label}")
    assert describe(fixed) == "strength 0.5, guidance 2-4 by similarity, label alone"


def _tune_and_die(data, out, after):
    made = []

    def refuse(request):
        if len(made) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    tune(scan_folder(data), BASE, out, models(made, refuse), trials=6, sample=9)


@pytest.mark.parametrize("after", [10, 60, 100])
def test_a_killed_search_goes_on(scan, tmp_path, after):
    """At 10, the recipe at the start is being measured; later, a trial runs."""
    process = multiprocessing.get_context("spawn").Process(
        target=_tune_and_die, args=(tmp_path / "data", tmp_path / "out", after)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    made = []
    found = tune(scan, BASE, tmp_path / "out", models(made), trials=6, sample=9)
    assert found.tried == 6
    assert found.base in found.points
    keys = {image_key(near(label, number, 0.0)) for label in LABELS for number in range(6)}
    assert {request.id.rpartition("-")[0] for request in made} <= keys
    assert (tmp_path / "out" / "recipe.toml").exists()


def test_the_bundled_models_share_one_pipeline(tmp_path):
    """Recipes of the real model; the sample is small, so what is chosen does not matter."""
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "ship"):
        for number in range(2):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(path)
    found = tune(scan_folder(tmp_path / "data"), Recipe.for_model("tiny"), tmp_path / "out", trials=2, sample=4, count=2)
    assert found.tried == 2
    assert all(0 <= point.agreement <= 1 and 1 < point.diversity < 6 for point in found.points)
