"""Recipes in TOML files."""

import dataclasses
import os
import pathlib
import tomllib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgid_transforms.errors import RecipeError
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.recipe import IMAGE_FORMATS, SAMPLERS, Filters, Recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
UNIT = st.floats(0, 1)
COSINE = st.floats(-1, 1) | st.none()


def _ordered(values: st.SearchStrategy[float], *, strict: bool = False) -> st.SearchStrategy[tuple[float, float]]:
    pairs = st.tuples(values, values).map(lambda ends: (min(ends), max(ends)))
    return pairs.filter(lambda ends: ends[0] < ends[1]) if strict else pairs


FILTERS = st.builds(
    lambda check, threshold, ends, nsfw, retries: Filters(check, threshold, *ends, nsfw, retries),
    st.sampled_from(["none", "argmax", "threshold"]),
    UNIT,
    st.tuples(COSINE, COSINE).filter(lambda ends: None in ends or ends[0] < ends[1]),
    st.booleans(),
    st.integers(0, 100),
)
GUIDANCE = st.floats(0, 1e300) | st.builds(
    lambda ends, reverse: SimilarityGuidance(*ends, reverse), _ordered(st.floats(0, 100)), st.booleans()
)
RECIPES = st.builds(
    Recipe,
    model=TEXT.filter(str.strip),
    revision=st.none() | TEXT.filter(str.strip),
    prompt=TEXT.map(lambda text: text.replace("{", "{{").replace("}", "}}") + " {label}"),
    negative_prompt=TEXT,
    strength=st.floats(0.01, 1) | _ordered(st.floats(0.01, 1)),
    guidance=GUIDANCE,
    num_inference_steps=st.integers(100, 1000),
    resolution=st.none() | st.integers(8, 8192) | st.tuples(st.integers(8, 8192), st.integers(8, 8192)),
    sampler=st.sampled_from(SAMPLERS),
    guidance_interval=_ordered(UNIT, strict=True),
    exact_strength=st.none() | st.just(False),
    seed=st.integers(0, 2**63 - 1),
    filters=FILTERS,
    image_format=st.sampled_from(IMAGE_FORMATS),
    lora=st.none() | st.from_regex(r"[a-z]{1,9}/[a-z]{1,9}", fullmatch=True),
    lora_scale=st.floats(-2, 2),
)


@given(RECIPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_round_trip_of_any_recipe(tmp_path: pathlib.Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.toml"
    recipe.to_toml(path)
    copy = Recipe.from_toml(path)
    assert copy == recipe
    assert copy.fingerprint == recipe.fingerprint


def test_fields_that_may_be_none_have_none_as_default() -> None:
    """TOML has no None, so the writer leaves it out: the reader must then find the same None as the default."""
    for cls in (Recipe, Filters):
        for field in dataclasses.fields(cls):
            if "None" in str(field.type):
                assert field.default is None, f"{cls.__name__}.{field.name}"


def test_is_readable(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.toml"
    recipe = Recipe.for_model("org/model", guidance=SimilarityGuidance(3, 8), strength=(0.3, 0.7), resolution=512)
    recipe.to_toml(path)
    lines = path.read_text().splitlines()
    assert lines[0] == 'model = "org/model"'
    assert tomllib.loads(path.read_text())["strength"] == [0.3, 0.7]
    at = lines.index("[guidance]")
    assert lines[at - 1 : at + 4] == ["", "[guidance]", "low = 3.0", "high = 8.0", "reverse = false"]
    assert not any(line.startswith("revision") for line in lines)
    assert "exact_strength = false" in lines
    Recipe.for_model("org/model", exact_strength=True).to_toml(path)
    assert "exact_strength = true" in path.read_text().splitlines()
    assert Recipe.from_toml(path).exact_strength is True


def test_left_out_fields_keep_defaults_or_the_preset(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("seed = 3")
    assert Recipe.from_toml(path) == Recipe(seed=3)
    path.write_text('preset = "sd-turbo"\nstrength = [0.5, 0.6]\n[filters]\nlabel_check = "argmax"\n')
    assert Recipe.from_toml(path) == Recipe.preset("sd-turbo", strength=(0.5, 0.6), filters=Filters(label_check="argmax"))
    path.write_text('preset = "fine_grained"\nmodel = "sd15"')
    assert Recipe.from_toml(path) == Recipe.preset("fine_grained", model="sd15")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("strenght = 0.5", r"a recipe has no field 'strenght' \(did you mean 'strength'\?\)"),
        ("filter = 3", r"no field 'filter' \(did you mean 'filters'\?\)"),
        ("[filters]\nlabel_chek = 'argmax'", r"\[filters\] has no field 'label_chek' \(did you mean 'label_check'\?\)"),
        ("[guidance]\nlo = 3\nhigh = 4", r"\[guidance\] has no field 'lo' \(did you mean 'low'\?\)"),
        ("[guidance]\nlow = 3", r"\[guidance\] has no high; give both low and high"),
        ("[guidance]\nlow = 5\nhigh = 4", "guidance.low 5.0 is above guidance.high 4.0"),
        ("guidance = 'high'", "guidance is 'high'; it must be a number"),
        ("strength = true", "strength is True; it must be a number"),
        ("strength = [0.1]", "must be a pair"),
        ("model = 3", "model is 3; it must be a string"),
        ("filters = 3", "filters is 3; it must be a Filters object"),
        ("[model]\nname = 'x'", "model is {'name': 'x'}; it must be a string"),
        ("preset = 3", "preset 3 is unknown"),
        ("preset = 'sd5'", "did you mean 'sd15'"),
        ("seed = x", "is not valid TOML: .*line 1"),
        ("seed = 1\nseed = 2", "is not valid TOML"),
        ("seed = 1979-05-27", "seed is .* must be a whole number"),
        (b"\xff\xfe", "is not valid TOML"),
        ("seed = " + "9" * 5000, "is not valid TOML"),
        ("a = " + "[" * 3000 + "]" * 3000, "is not valid TOML: it is nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_files_are_refused_in_a_sentence_with_their_path(
    tmp_path: pathlib.Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_toml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nothing.toml: No such file"):
        Recipe.from_toml(tmp_path / "nothing.toml")


class TestAtomicWrite:
    def test_failure_leaves_the_old_file_and_no_rubbish(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "recipe.toml"
        Recipe(seed=1).to_toml(path)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RecipeError, match=r"cannot write the recipe .*No space left on device"):
            Recipe(seed=2).to_toml(path)
        monkeypatch.undo()
        assert Recipe.from_toml(path).seed == 1
        assert os.listdir(tmp_path) == ["recipe.toml"]

    def test_the_file_never_exists_unfinished(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "recipe.toml"
        seen: list[Any] = []
        replace = os.replace

        def watched(source: str, target: str) -> None:
            seen.append((path.exists(), tomllib.loads(pathlib.Path(source).read_text())["seed"]))
            replace(source, target)

        monkeypatch.setattr(os, "replace", watched)
        Recipe(seed=5).to_toml(path)
        assert seen == [(False, 5)]
        assert os.listdir(tmp_path) == ["recipe.toml"]

    def test_missing_folder(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(RecipeError, match="cannot write the recipe"):
            Recipe().to_toml(tmp_path / "none" / "recipe.toml")
