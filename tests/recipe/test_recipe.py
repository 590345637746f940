"""Recipe: validation, fingerprint and presets."""

import dataclasses
import os
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgid_transforms.errors import RecipeError, SGIDError
from sgid_transforms.recipe import presets
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.recipe import IMAGE_FORMATS, SAMPLERS, Filters, Recipe

# All fields written out, so that tuning a default does not change the frozen fingerprint below.
BASE = Recipe(
    model="org/model",
    revision="main",
    prompt="a photo of a {label}, {caption}",
    negative_prompt="blurry",
    strength=(0.3, 0.7),
    guidance=SimilarityGuidance(3.0, 8.0),
    num_inference_steps=20,
    resolution=512,
    sampler="ddim",
    guidance_interval=(0.1, 0.9),
    exact_strength=False,
    seed=7,
    filters=Filters("argmax", 0.5, 0.2, 0.99, True, 2),
    image_format="png",
)
FROZEN = "01e12142795d6c692a6842dd"

# One other valid value for every field. A field that is missing here fails the test: a new one cannot be forgotten.
OTHER: dict[type, dict[str, Any]] = {
    Recipe: {
        "model": "org/other",
        "revision": None,
        "prompt": "a photo of a {label}",
        "negative_prompt": "",
        "strength": (0.3, 0.71),
        "guidance": 5.0,
        "num_inference_steps": 21,
        "resolution": (512, 512),
        "sampler": "euler",
        "guidance_interval": (0.1, 1.0),
        "exact_strength": True,
        "seed": 8,
        "filters": Filters(),
        "image_format": "webp",
        "lora": "org/lora",
        "lora_scale": 0.5,
        "caption_mode": "label",
        "caption_from": "dataset",
        "on_contradiction": "drop",
    },
    Filters: {
        "label_check": "threshold",
        "label_threshold": 0.6,
        "min_image_similarity": None,
        "max_image_similarity": 0.98,
        "reject_nsfw": False,
        "max_retries": 3,
    },
    SimilarityGuidance: {"low": 2.5, "high": 9.0, "reverse": True},
}


IN_THE_ADDRESS = ("caption_mode", "on_contradiction")
"""Fields that decide which caption is used, and nothing else: a variant's address holds that text itself."""


def _parts() -> list[tuple[type, str]]:
    return [(cls, field.name) for cls in OTHER for field in dataclasses.fields(cls)]


def _changed(cls: type, name: str) -> Recipe:
    change = {name: OTHER[cls][name]}
    if name == "lora_scale":  # it means nothing without a LoRA
        change["lora"] = "org/lora"
    if cls is Recipe:
        return BASE.replace(**change)
    owner = "filters" if cls is Filters else "guidance"
    return BASE.replace(**{owner: dataclasses.replace(getattr(BASE, owner), **change)})


class TestFingerprint:
    def test_is_frozen(self) -> None:
        """If this fails, every store of every user misses: raise FINGERPRINT_VERSION only when pixels really change."""
        assert BASE.fingerprint == FROZEN

    def test_is_hex_with_its_version_first(self) -> None:
        assert re.fullmatch("01[0-9a-f]{22}", Recipe().fingerprint)

    @pytest.mark.parametrize(("cls", "name"), _parts(), ids=lambda value: getattr(value, "__name__", value))
    def test_changes_with_every_field(self, cls: type, name: str) -> None:
        changes = _changed(cls, name).fingerprint != BASE.fingerprint
        assert changes == (name not in IN_THE_ADDRESS)

    def test_single_changes_all_differ(self) -> None:
        parts = [part for part in _parts() if part[1] not in IN_THE_ADDRESS]
        assert len({_changed(*part).fingerprint for part in parts}) == len(parts)

    def test_is_the_same_for_the_same_values_in_other_types(self) -> None:
        same = BASE.replace(
            model=pathlib.PurePosixPath("org/model"),
            strength=[0.3, np.float64(0.7)],
            guidance=SimilarityGuidance(3, 8),
            num_inference_steps=20.0,
            resolution=np.int64(512),
            guidance_interval=[0.1, 0.9],
            seed=7.0,
        )
        assert same == BASE
        assert same.fingerprint == BASE.fingerprint
        assert BASE.replace(guidance=5).fingerprint == BASE.replace(guidance=5.0).fingerprint
        assert BASE.replace(guidance=-0.0).fingerprint == BASE.replace(guidance=0).fingerprint

    def test_is_the_same_in_another_process(self) -> None:
        """Sets and hashes of strings differ by process; nothing of that may reach the fingerprint."""
        code = "import sys, pickle; print(pickle.loads(bytes.fromhex(sys.argv[1])).replace(seed=7).fingerprint)"
        command = [sys.executable, "-c", code, pickle.dumps(BASE).hex()]
        environment = os.environ | {"PYTHONHASHSEED": "12345"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, env=environment)
        assert output.stdout.strip() == FROZEN

    def test_follows_the_edition_of_the_bundled_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = Recipe(model="tiny").fingerprint
        monkeypatch.setattr("sgid_transforms.recipe.recipe.TINY_EDITION", presets.TINY_EDITION + 1)
        assert Recipe(model="tiny").fingerprint != before
        assert BASE.replace().fingerprint == FROZEN

    def test_survives_pickling_and_hashing(self) -> None:
        copy = pickle.loads(pickle.dumps(BASE))  # noqa: S301
        assert copy == BASE
        assert copy.fingerprint == FROZEN
        assert {BASE: 1}[copy] == 1

    @given(
        st.floats(0.1, 0.9),
        st.floats(0, 30),
        st.integers(0, 2**63 - 1),
        st.text(st.characters(exclude_categories=["Cs"])),
    )
    def test_depends_on_values_alone(self, strength: float, guidance: float, seed: int, negative: str) -> None:
        changes: dict[str, Any] = {"strength": strength, "guidance": guidance, "seed": seed, "negative_prompt": negative}
        one, two = BASE.replace(**changes), Recipe(**(_fields(BASE) | changes))
        assert one.fingerprint == two.fingerprint
        assert (one == BASE) == (one.fingerprint == FROZEN)


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


class TestValidation:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": ""}, "model is empty"),
            ({"model": 3}, "model is 3; it must be a string"),
            ({"revision": " "}, "revision is empty; leave it out"),
            ({"prompt": "a {lable}"}, r"has {lable} \(did you mean 'label'\?\)"),
            ({"prompt": "\udc80 {label}"}, "lone surrogate"),
            ({"negative_prompt": None}, "negative_prompt is None; it must be a string"),
            ({"strength": 0}, "strength 0.0 is outside 0.001 to 1"),
            ({"strength": 1.5}, "strength 1.5 is outside 0.001 to 1"),
            ({"strength": "0.5"}, "strength is '0.5'; it must be a number"),
            ({"strength": float("nan")}, "strength nan is outside"),
            ({"strength": (0.7, 0.3)}, r"strength \(0.7, 0.3\) has its ends swapped; write \(0.3, 0.7\)"),
            ({"strength": (0.1, 0.2, 0.3)}, "must be a pair"),
            ({"guidance": -1}, "guidance -1.0 is outside the finite numbers >= 0"),
            ({"guidance": float("inf")}, "guidance inf is outside"),
            ({"guidance": 10**400}, "guidance inf is outside"),
            ({"guidance": True}, "guidance is True; it must be a number"),
            ({"num_inference_steps": 0}, "num_inference_steps 0 is outside 1 to 1000"),
            ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
            ({"num_inference_steps": float("nan")}, "must be a whole number"),
            ({"resolution": (512,)}, "resolution is .* must be a pair"),
            ({"resolution": 4}, "resolution 4 is outside 8 to 8192"),
            ({"sampler": "dpmsolver"}, r"sampler 'dpmsolver' is unknown \(did you mean 'dpmsolver\+\+'\?\)"),
            ({"guidance_interval": (0.5, 0.5)}, "guidance_interval .* is empty"),
            ({"guidance_interval": 0.5}, "must be a pair"),
            ({"exact_strength": 1}, "exact_strength is 1; it must be true or false"),
            (
                {"exact_strength": True, "sampler": "lcm"},
                "exact_strength has no meaning for sampler 'lcm', .*; set it to false",
            ),
            ({"seed": -1}, "seed -1 is outside"),
            ({"seed": 2**63}, "seed 9223372036854775808 is outside"),
            ({"filters": None}, "must be a Filters object"),
            ({"image_format": "webp-lossles"}, "did you mean 'webp-lossless'"),
            ({"image_format": ["png"]}, "image_format .* is unknown"),
        ],
        ids=str,
    )
    def test_refuses_wrong_values_in_a_sentence(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            BASE.replace(**changes)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"label_check": "arg-max"}, "did you mean 'argmax'"),
            ({"label_threshold": 1.5}, "filters.label_threshold 1.5 is outside 0 to 1"),
            ({"min_image_similarity": -2}, "filters.min_image_similarity -2.0 is outside -1 to 1"),
            ({"min_image_similarity": 0.9, "max_image_similarity": 0.9}, "nothing could pass"),
            ({"reject_nsfw": 1}, "filters.reject_nsfw is 1; it must be true or false"),
            ({"max_retries": 101}, "filters.max_retries 101 is outside 0 to 100"),
        ],
        ids=str,
    )
    def test_refuses_wrong_filters(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Filters(**settings)

    def test_no_step_at_all_is_refused_with_the_way_out(self) -> None:
        with pytest.raises(RecipeError) as caught:
            BASE.replace(strength=0.1, num_inference_steps=4)
        assert str(caught.value) == (
            "strength 0.1 with 4 steps runs int(0.4) = 0 steps; raise num_inference_steps to at least 10"
        )
        with pytest.raises(RecipeError, match=r"int\(0.4\) = 0"):  # the low end of a range counts
            BASE.replace(strength=(0.1, 0.9), num_inference_steps=4)

    @given(st.floats(0.001, 1.0))
    def test_the_number_of_steps_in_the_message_is_the_smallest_that_works(self, strength: float) -> None:
        try:
            BASE.replace(strength=strength, num_inference_steps=1)
            needed = 1
        except RecipeError as error:
            needed = int(str(error).rpartition(" ")[2])
            with pytest.raises(RecipeError):
                BASE.replace(strength=strength, num_inference_steps=needed - 1)
        assert int(needed * strength) == 1
        BASE.replace(strength=strength, num_inference_steps=needed)

    def test_latent_consistency_models_run_all_steps_at_any_strength(self) -> None:
        assert Recipe(strength=0.1, num_inference_steps=4, sampler="lcm").num_inference_steps == 4

    def test_an_exact_strength_always_runs_a_step(self) -> None:
        assert BASE.replace(strength=0.01, num_inference_steps=4, exact_strength=True).strength == 0.01

    def test_errors_are_value_errors_of_this_package(self) -> None:
        with pytest.raises(ValueError) as caught:
            Recipe(seed="x")  # type: ignore[arg-type]
        assert isinstance(caught.value, SGIDError)

    def test_is_immutable(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            BASE.seed = 1  # type: ignore[misc]

    def test_replace_names_the_nearest_field(self) -> None:
        with pytest.raises(RecipeError, match=r"no field 'strenght' \(did you mean 'strength'\?\)"):
            BASE.replace(strenght=0.5)


class TestDefaultsFollowTheModel:
    """A recipe written by hand once took the bundled model's three steps for any checkpoint."""

    @pytest.mark.parametrize("model", ["stabilityai/sd-turbo", "org/some-lcm", "./my-finetuned-sd", "tiny"])
    def test_left_out(self, model: str) -> None:
        suitable = Recipe.for_model(model)
        assert Recipe(model=model, resolution=suitable.resolution) == suitable

    def test_what_is_given_stays(self) -> None:
        recipe = Recipe(model="stabilityai/sd-turbo", guidance=2.0, num_inference_steps=9)
        assert (recipe.guidance, recipe.num_inference_steps, recipe.sampler) == (2.0, 9, "euler")

    @pytest.mark.parametrize("model", ["stabilityai/sd-turbo", "stable-diffusion-v1-5/stable-diffusion-v1-5", "org/some-lcm"])
    def test_every_spelling_is_one_recipe(self, model: str) -> None:
        """`Recipe(model=m)` and the command line's `--model m` once had two fingerprints: what one made, the other missed."""
        spellings = [Recipe(model=model), Recipe.for_model(model), Recipe().replace(model=model)]
        spellings += [Recipe.preset(name) for name, preset in presets.PRESETS.items() if preset["model"] == model]
        assert len({recipe.fingerprint for recipe in spellings}) == 1
        assert len(set(spellings)) == 1

    @pytest.mark.parametrize("folder", [pathlib.PurePosixPath("sd-turbo"), "./sd-turbo", "sd-turbo/", "./sd-turbo/"], ids=repr)
    def test_a_folder_that_is_called_as_a_preset_is_told_from_it(self, folder: Any) -> None:
        """`git clone .../sd-turbo`, and the hub's checkpoint was used; with a slash it had another fingerprint."""
        recipe = Recipe(model=folder)
        assert recipe.model == "./sd-turbo"
        assert recipe.fingerprint == Recipe(model="./sd-turbo").fingerprint != Recipe(model="sd-turbo").fingerprint
        assert recipe.num_inference_steps == Recipe(model="sd-turbo").num_inference_steps

    def test_a_presets_name_is_its_model(self) -> None:
        assert Recipe(model="sd-turbo") == Recipe(model="stabilityai/sd-turbo")

    def test_a_copy_for_another_model_keeps_what_was_chosen(self) -> None:
        """`Recipe().replace(model=...)` once kept the bundled model's three steps."""
        copy = Recipe(strength=0.4, seed=3).replace(model="org/model")
        assert copy == Recipe(model="org/model", strength=0.4, seed=3)


class TestLora:
    def test_a_local_file_counts_by_its_content(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a").mkdir()
        first, second = tmp_path / "a" / "style.safetensors", tmp_path / "other-name.safetensors"
        first.write_bytes(b"one")
        second.write_bytes(b"one")
        prints = {BASE.replace(lora=path).fingerprint for path in (first, first.parent, str(second))}
        assert len(prints) == 1
        second.write_bytes(b"two")
        assert BASE.replace(lora=second).fingerprint not in prints

    @pytest.mark.parametrize(
        "lora", ["./missing.safetensors", "missing.safetensors", "/no/such/folder", "~/nothing", "no-owner"]
    )
    def test_one_that_is_not_there_is_refused_in_a_sentence(self, lora: str) -> None:
        with pytest.raises(RecipeError, match=r"does not exist; give a \.safetensors file, a folder with one, or a hub id"):
            _ = BASE.replace(lora=lora).fingerprint

    def test_a_folder_with_two_files_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a.safetensors").touch()
        (tmp_path / "b.safetensors").touch()
        with pytest.raises(RecipeError, match=r"holds 2 \.safetensors files; give the path of one"):
            _ = BASE.replace(lora=tmp_path).fingerprint


class TestToml:
    def test_in_toml(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "recipe.toml").write_text('model = "stabilityai/sd-turbo"\n')
        assert Recipe.from_toml(tmp_path / "recipe.toml") == Recipe(model="stabilityai/sd-turbo")
        assert Recipe(model="stabilityai/sd-turbo").num_inference_steps == presets.PRESETS["sd-turbo"]["num_inference_steps"]


class TestExactStrength:
    """Left out, it is the bundled model's own setting, and off for every other model."""

    @pytest.mark.parametrize("tiny", [True, False])
    def test_left_out(self, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(presets.TINY, "exact_strength", tiny)  # type: ignore[misc]
        assert Recipe().exact_strength is tiny
        assert Recipe(model="tiny", num_inference_steps=20).exact_strength is tiny
        assert Recipe(sampler="lcm").exact_strength is False
        assert Recipe(model="org/model").exact_strength is False
        assert Recipe.for_model("org/model").exact_strength is False
        assert Recipe() == Recipe.preset("tiny") == Recipe.for_model("tiny")
        assert Recipe.preset("fine_grained").strength == presets.STRENGTH_RANGES["fine_grained"]
        other = Recipe.preset("tiny", exact_strength=not tiny, num_inference_steps=20)
        assert other.exact_strength is not tiny
        assert other.fingerprint != other.replace(exact_strength=tiny).fingerprint

    def test_on_has_a_frozen_fingerprint_too(self) -> None:
        assert BASE.replace(exact_strength=True).fingerprint == "010d5fa270c886e69206b745"


class TestPresets:
    def test_default_is_the_tiny_preset(self) -> None:
        assert Recipe() == Recipe.preset("tiny") == Recipe.for_model("tiny")

    @pytest.mark.parametrize("name", presets.PRESETS)
    def test_sets_what_it_says(self, name: str) -> None:
        recipe = Recipe.preset(name)
        for field, value in presets.PRESETS[name].items():
            assert getattr(recipe, field) == (Filters(**value) if isinstance(value, dict) else value)  # type: ignore[arg-type]

    def test_turbo_models_run_without_guidance(self) -> None:
        for name in ("sd-turbo", "sdxl-turbo"):
            assert Recipe.preset(name).guidance == 0.0
            assert 1 <= Recipe.preset(name).num_inference_steps <= 4

    def test_overrides_win(self) -> None:
        recipe = Recipe.preset("sd15", strength=0.4, model="me/tuned")
        assert (recipe.strength, recipe.model, recipe.num_inference_steps) == (0.4, "me/tuned", 25)

    @pytest.mark.parametrize("kind", presets.STRENGTH_RANGES)
    @pytest.mark.parametrize("model", [*presets.PRESETS, "someone/checkpoint"])
    def test_strength_ranges_apply_to_any_model(self, kind: str, model: str) -> None:
        recipe = Recipe.preset(kind, model=model)
        base = Recipe.for_model(model)
        assert recipe.strength == presets.STRENGTH_RANGES[kind]
        assert recipe.num_inference_steps >= base.num_inference_steps
        assert recipe.replace(strength=base.strength, num_inference_steps=base.num_inference_steps) == base

    def test_strength_range_raises_the_steps_of_a_distilled_model(self) -> None:
        assert Recipe.preset("fine_grained", model="sd-turbo").num_inference_steps == 10
        assert Recipe.preset("fine_grained", model="sd-turbo", num_inference_steps=20).num_inference_steps == 20
        assert Recipe.preset("coarse").model == "tiny"

    @pytest.mark.parametrize(
        ("model", "preset"),
        [
            ("stabilityai/sd-turbo", "sd-turbo"),
            ("C:\\models\\SDXL_Turbo\\", "sdxl-turbo"),
            ("./lcm-dreamshaper/", "lcm"),
            ("tiny", "tiny"),
            ("models/sd-turbo/my-own", "sd15"),
            ("CompVis/stable-diffusion-v1-4", "sd15"),
        ],
    )
    def test_settings_follow_the_name_of_a_checkpoint(self, model: str, preset: str) -> None:
        recipe, expected = Recipe.for_model(model), Recipe.preset(preset)
        assert recipe.model == model.rstrip("/")
        assert (recipe.num_inference_steps, recipe.guidance) == (expected.num_inference_steps, expected.guidance)

    def test_unknown_names_are_refused_with_the_nearest(self) -> None:
        with pytest.raises(RecipeError, match=r"preset 'sdturbo' is unknown \(did you mean 'sd-turbo'\?\)"):
            Recipe.preset("sdturbo")
        with pytest.raises(RecipeError, match="no field 'guidence'"):
            Recipe.preset("sd15", guidence=3)
        with pytest.raises(RecipeError, match="no field 'steps'"):
            Recipe.for_model("tiny", steps=3)


def test_choices_are_those_of_the_engine_and_the_store() -> None:
    """The lists are written twice, so that a recipe needs neither; here they meet."""
    from sgid_transforms.generation.schedule import SAMPLERS as engine_samplers
    from sgid_transforms.variants.codec import IMAGE_FORMATS as store_formats

    assert set(SAMPLERS) == {"auto", *engine_samplers}
    assert set(IMAGE_FORMATS) == set(store_formats)
