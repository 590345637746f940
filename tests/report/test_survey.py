import json

import pytest
import torch

from report_fakes import ColourScorer, make_stores, near, plain
from sgid_transforms.captions import CaptionRecord
from sgid_transforms.images.keys import image_key
from sgid_transforms.report import survey, write_report
from sgid_transforms.report.answers import Answer, Answers, beside
from sgid_transforms.report.metrics import cmmd
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.verdicts import Verdict


def test_figures_of_known_stores_come_out_as_worked_out_by_hand(tmp_path):
    captions, variants, recipe = make_stores(tmp_path)
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer())
    assert [one.label for one in facts.classes] == ["blue", "green", "red"]
    for one in (*facts.classes, facts.overall):
        classes = 3 if one is facts.overall else 1
        assert (one.originals, one.variants, one.rejected) == (3 * classes, 9 * classes, classes)
        assert one.reasons == {"label": 2 * classes, "nan": classes}
        assert one.agreement_originals == 1
        assert one.agreement == pytest.approx(2 / 3)  # the variants of strength 0.9 look like the next class
    for one in facts.classes:
        assert one.vendi_originals == pytest.approx(1, abs=0.01)  # shades of one colour
        assert one.distance == pytest.approx(0, abs=0.01)
    assert 2.5 < facts.overall.vendi_originals < 3.001  # three colours
    assert facts.overall.distance_originals == pytest.approx(27 / 36, abs=0.1)  # 27 of 36 pairs are of different colours
    image = facts.images[0]
    similarities = [variant.image_similarity for variant in image.variants if variant.made]
    assert similarities == sorted(similarities, reverse=True)
    assert [variant.answer == image.label for variant in image.variants if variant.made] == [True, True, False]
    assert image.name.startswith(f"{image.label}/")
    assert facts.scorer == "colours"
    assert (facts.originals_in_store, facts.variants_in_store, facts.captions_in_store) == (9, 27, 9)


def test_the_figures_are_plain_values(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=1)
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer())
    assert json.loads(json.dumps(facts.to_dict()))["overall"]["variants"] == 9
    assert len(json.loads(json.dumps(facts.to_dict(images=True)))["images"]) == 3


def test_without_a_scorer_only_what_generation_measured_is_known(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=1)
    original = near("red", 0, 0.0)
    scored = Provenance("a photo of a red", strength=0.5, label="red", label_score=0.7, image_similarity=0.6)
    variants.put(recipe, image_key(original), 9, plain(1, 2, 3), scored)
    facts = survey(captions, variants, recipe, originals=tmp_path / "data")
    assert facts.overall.agreement is None
    assert facts.overall.vendi is None
    assert facts.overall.image_similarity == pytest.approx(0.6)
    last = next(image for image in facts.images if image.label == "red").variants[-1]
    assert (last.label_probability, last.answer) == (0.7, None)


def test_originals_come_from_a_function_too_and_may_be_missing(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=2)
    asked = []

    def image_of(record):
        asked.append(record.key)
        return near(record.label, 0, 0.0) if record.label == "red" else None

    facts = survey(captions, variants, recipe, originals=image_of, scorer=ColourScorer())
    assert sorted(asked) == sorted(image.key for image in facts.images)
    assert {image.label: image.found for image in facts.images} == {"red": True, "green": False, "blue": False}
    red, green = (next(one for one in facts.classes if one.label == label) for label in ("red", "green"))
    assert red.image_similarity is not None
    assert (green.image_similarity, green.vendi_originals, green.agreement_originals) == (None, None, None)
    assert green.vendi is not None
    assert green.agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize("path", ["red/gone.png", "broken.png", "a\0b.png", None])
def test_an_original_that_cannot_be_read_is_missing_not_an_error(tmp_path, path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    (tmp_path / "data" / "broken.png").write_bytes(b"not a picture")
    key = image_key(near("red", 0, 0.0))
    captions.remove([key])
    captions.put(CaptionRecord(key, "a red field", "red", rank=0.5, path=path))
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer(), class_names=["red", "blue"])
    assert [image.found for image in facts.images] == [False]
    assert facts.overall.variants == 3


def test_variants_without_a_caption_record_have_the_label_of_their_provenance(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    captions.remove([image_key(near("red", 0, 0.0))])
    [image] = survey(captions, variants, recipe, scorer=ColourScorer(), class_names=["red", "blue"]).images
    assert (image.label, image.caption, image.found) == ("red", "a red field", False)


def test_one_class_has_no_label_agreement(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",))
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer())
    assert facts.overall.agreement is None
    assert facts.overall.image_similarity is not None


def test_a_sample_is_the_same_every_time_and_says_what_it_is_a_sample_of(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=4)
    some = [survey(captions, variants, recipe, max_originals=5) for _ in range(2)]
    everything = survey(captions, variants, recipe)
    assert some[0].images == some[1].images == everything.images[:5]
    assert (some[0].overall.originals, some[0].originals_in_store, some[0].variants_in_store) == (5, 12, 36)


def test_only_the_variants_of_the_recipe_count(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=1)
    other = recipe.replace(seed=1)
    assert survey(captions, variants, other).images == ()
    variants.put_failure(other, image_key(near("red", 0, 0.0)), 0, ("nan",))
    facts = survey(captions, variants, other)
    assert (facts.overall.variants, facts.overall.rejected, facts.overall.originals) == (0, 1, 1)


def test_a_damaged_variant_is_left_out(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, labels=("red",), per_class=1)
    next(iter(variants.iter(recipe))).path.write_bytes(b"damaged")
    assert survey(captions, variants, recipe).overall.variants == 2


def test_cmmd_compares_unlike_originals_and_is_given_with_its_floor_once_there_are_enough(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=6)
    scorer = ColourScorer()
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=scorer)
    numbers = [(image.label, int(image.name.split("/")[1].removesuffix(".png"))) for image in facts.images]
    original, first = (scorer.image_features([near(*number, strength) for number in numbers]) for strength in (0.0, 0.1))
    assert facts.cmmd == pytest.approx(cmmd(original[:9], first[9:]), rel=1e-3)
    assert facts.cmmd_floor == pytest.approx(cmmd(original[:9], original[9:]), rel=1e-3)
    few = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=ColourScorer(), max_originals=15)
    assert (few.cmmd, few.cmmd_floor) == (None, None)


def test_progress_sees_every_key_and_a_bad_limit_is_refused(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=1)
    seen = []
    survey(captions, variants, recipe, progress=lambda keys: [seen.append(key) or key for key in keys])
    assert len(seen) == 3
    with pytest.raises(ValueError, match="max_originals is 0"):
        survey(captions, variants, recipe, max_originals=0)


def test_images_of_many_chunks_keep_their_own_scores(tmp_path):
    captions, variants, recipe = make_stores(tmp_path, per_class=12)
    scorer = ColourScorer()
    facts = survey(captions, variants, recipe, originals=tmp_path / "data", scorer=scorer)
    assert len(facts.images) == 36
    for image in facts.images:
        number = int(image.name.split("/")[1].removesuffix(".png"))
        pictures = [near(image.label, number, strength) for strength in (0.0, 0.1, 0.3, 0.9)]
        features = scorer.image_features(pictures)
        expected = (features[1:] @ features[0]).tolist()
        assert [v.image_similarity for v in image.variants if v.made] == pytest.approx(expected, abs=1e-5)
        assert image.label_probability == pytest.approx(
            float(scorer.probabilities(features[:1], ["blue", "green", "red"])[0, ["blue", "green", "red"].index(image.label)])
        )
    assert torch.is_tensor(features)


def test_what_people_said_is_in_the_figures(tmp_path):
    captions, variants, recipe = make_stores(tmp_path)
    refs = sorted(variants.iter(recipe))[:3]
    decisions = ("reject", "keep", "none")
    variants.judge(
        Verdict(ref.fingerprint, ref.key, ref.variant, decision, "anna", 1.0)
        for ref, decision in zip(refs, decisions, strict=True)
    )
    answers = Answers(beside(captions.path))
    for number, (arm, answer) in enumerate([(recipe.fingerprint, "red"), (recipe.fingerprint, "blue"), ("originals", "red")]):
        answers.add(Answer(str(number), "anna", "class", arm, "ab", "red", answer, 1.0))
    facts = survey(captions, variants, recipe, originals=tmp_path / "data")
    assert (facts.overall.judged, facts.overall.refused) == (2, 1)
    assert facts.human_answers == 2
    assert facts.human_consistency == pytest.approx((0.5, 0.0945, 0.9055), abs=1e-4)
    judged = {variant.verdict: variant.judge for image in facts.images for variant in image.variants}
    assert judged == {"reject": "anna", "keep": "anna", None: ""}
    write_report(tmp_path / "report.html", captions, variants, recipe, originals=tmp_path / "data")
    page = (tmp_path / "report.html").read_text()
    assert "rejected by <bdi>anna</bdi>" in page
    assert "Seen by people" in page
    assert "<code>sgid review</code>" in page
