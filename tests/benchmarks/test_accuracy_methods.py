"""Names of methods, and the recipes and transforms that they stand for."""

import pytest
import torch
from classification.generated import RankedStrength
from classification.methods import CLASSIC, GROUPS, Variants, batch_policy, expand, image_policy, parse_method
from torchvision.transforms import v2

from sgid_transforms import Recipe, SimilarityGuidance
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult

DEFAULTS = Variants(guidance=(2.0, 6.0), strength=(0.3, 0.7), k=5, p=0.6)


def test_a_name_with_options_changes_those_alone():
    method = parse_method("sgid:k=4,p=0.3,strength=0.2-0.5,filter=none+cutmix", DEFAULTS)
    assert method.classic == "cutmix"
    assert method.variants == Variants(guidance=(2.0, 6.0), strength=(0.2, 0.5), filter="none", k=4, p=0.3)
    assert parse_method("mixup", DEFAULTS).variants is None


def test_recipes_say_what_the_names_say():
    def recipe(name):
        return parse_method(name, DEFAULTS).variants.recipe("tiny", seed=3)

    sgid = recipe("sgid")
    assert sgid.guidance == SimilarityGuidance(2.0, 6.0)
    assert (sgid.prompt, sgid.strength, sgid.seed) == ("a photo of a {label}, {caption}", (0.3, 0.7), 3)
    assert sgid.filters.label_check == "argmax"
    strict = recipe("sgid:filter=0.8").filters
    assert (strict.label_check, strict.label_threshold) == ("threshold", 0.8)
    assert recipe("sgid:guidance=reverse").guidance == SimilarityGuidance(2.0, 6.0, reverse=True)
    assert recipe("sgid:guidance=fixed").guidance == 4.0
    assert recipe("sgid:guidance=1").guidance == 1.0
    assert recipe("sgid:prompt=caption").prompt == "{caption}"
    real = recipe("real-guidance")
    assert (real.prompt, real.guidance) == ("a photo of a {label}", 4.0)
    assert real == recipe("sgid:prompt=label,guidance=fixed")


@pytest.mark.parametrize("model", ["tiny", "stabilityai/sd-turbo"])
def test_without_settings_variants_are_those_of_the_models_preset(model):
    preset = Recipe.for_model(model)
    recipe = parse_method("sgid:filter=none", Variants.for_model(model)).variants.recipe(model, seed=0)
    assert (recipe.strength, recipe.guidance) == (preset.strength, preset.guidance)


def test_each_ablation_is_another_experiment():
    methods = [parse_method(name, Variants.for_model("tiny")) for name in GROUPS["ablations"]]
    settings = {(m.variants.recipe("tiny", 0).fingerprint, m.variants.k, m.variants.p) for m in methods}
    sgid = parse_method("sgid", Variants.for_model("tiny")).variants
    assert len(settings) == len(methods)
    assert (sgid.recipe("tiny", 0).fingerprint, sgid.k, sgid.p) not in settings


def test_groups_are_expanded_once():
    assert expand(["none", "classic", "sgid", "generated"]) == [*CLASSIC, "sgid", "real-guidance"]
    assert all(parse_method(name, DEFAULTS).classic != "none" for name in expand(["combined"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("magic", "method 'magic' is unknown"),
        ("none+mixup", "unknown"),
        ("sgid+none", "unknown"),
        ("sgid:size=3", "option 'size=3'"),
        ("sgid:k=0", "cannot be read"),
        ("sgid:p=1.5", "cannot be read"),
        ("sgid:prompt=poem", "cannot be read"),
        ("sgid:filter=some", "cannot be read"),
        ("sgid:filter=1.5", "cannot be read"),
    ],
)
def test_a_wrong_name_is_refused_with_its_reason(name, words):
    with pytest.raises(ValueError, match=words):
        parse_method(name, DEFAULTS)


def test_classic_methods_are_torchvisions():
    kinds = {
        "autoaugment": v2.AutoAugment,
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
    }
    for name in CLASSIC:
        policy = image_policy(name, small=True)
        assert type(policy) is kinds.get(name, type(None))
    assert image_policy("autoaugment", small=True).policy == v2.AutoAugmentPolicy.CIFAR10
    assert image_policy("autoaugment", small=False).policy == v2.AutoAugmentPolicy.IMAGENET
    for name, kind in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
        mix = batch_policy(name, 3)
        assert type(mix) is kind
        _, labels = mix(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert batch_policy("randaugment", 3) is None


def test_strength_follows_the_rank_under_one_scale():
    """The recipe's guidance carries the rank to the generator, which gets a strength and a fixed scale instead."""
    variants = parse_method("sgid:varies=strength,guidance=1-3,strength=0.8-1", DEFAULTS).variants
    assert variants.ranked_scale == 2
    recipe = variants.recipe("tiny", 0)
    assert (recipe.guidance.scale(0.25), recipe.strength) == (0.25, (0.8, 1.0))
    asked = [GenerationRequest(torch.zeros(3, 8, 8, dtype=torch.uint8), "a cat", guidance_scale=rank) for rank in (0.0, 0.25)]
    seen: list[GenerationRequest] = []

    class Generate:
        tokenizer = "the generator's own"

        def stream(self, pull):
            seen.extend(pull(8))
            yield [(request, GenerationResult(None, "black")) for request in seen]

    ranked = RankedStrength(Generate(), (0.8, 1.0), 2.0)
    (answers,) = ranked.stream(lambda room: asked)
    assert [request for request, _ in answers] == asked
    assert [(request.strength, request.guidance_scale) for request in seen] == [(0.8, 2.0), (pytest.approx(0.85), 2.0)]
    assert ranked.tokenizer == "the generator's own"
