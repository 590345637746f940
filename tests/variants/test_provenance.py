"""Provenance: JSON out and in."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import Provenance

FULL = Provenance(
    prompt="a photo of a cat, on a mat",
    negative_prompt="blurry",
    seed=2**63 - 1,
    strength=0.5,
    guidance_scale=7.5,
    similarity=0.25,
    label_score=0.9,
    image_similarity=0.8,
    model="stabilityai/sd-turbo",
    revision="abc",
    sampler="euler",
    num_inference_steps=4,
    attempt=1,
    label="cat",
    caption="on a mat",
    versions={"diffusers": "0.42.0"},
    extra={"unet_evaluations": 4},
)


@pytest.mark.parametrize("provenance", [FULL, Provenance("")])
def test_round_trip(provenance):
    assert Provenance.from_json(provenance.to_json()) == provenance
    assert Provenance.from_json(provenance.to_json().encode()) == provenance


@given(text=st.text(st.characters(exclude_categories=())), seed=st.integers(), strength=st.floats(0, 1))
@settings(deadline=None)
def test_any_text_survives_as_ascii(text, seed, strength):
    provenance = Provenance(text, text, seed, strength, label=text, versions={"x": text})
    encoded = provenance.to_json()
    assert encoded.isascii()
    assert "\n" not in encoded
    assert Provenance.from_json(encoded) == provenance


def test_equal_provenances_have_equal_json():
    one = Provenance("x", versions={"a": "1", "b": "2"})
    two = Provenance("x", versions={"b": "2", "a": "1"})
    assert one.to_json() == two.to_json()


def test_a_score_that_is_not_finite_is_none_but_a_setting_must_be_finite():
    nan = float("nan")
    assert Provenance.from_json(Provenance("x", similarity=nan, label_score=float("inf")).to_json()) == Provenance("x")
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        Provenance("x", strength=nan).to_json()


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": {1, 2}}, {"x": b"bytes"}])
def test_what_json_cannot_hold_is_refused(extra):
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        Provenance("x", extra=extra).to_json()


def test_fields_of_later_versions_are_ignored():
    values = json.loads(FULL.to_json()) | {"something_new": [1, 2]}
    assert Provenance.from_json(json.dumps(values)) == FULL


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '"x"', "{}", '{"prompt": 5}', '{"prompt": "x", "seed": 1.5}', '{"prompt": "x", "seed": true}'),
        *('{"prompt": "x", "versions": []}', b"\xff\xfe", "[" * 100_000, '{"prompt": null}'),
    ],
    ids=range(13),
)
def test_what_is_no_provenance_is_a_value_error(text):
    with pytest.raises(ValueError):
        Provenance.from_json(text)
