"""A variant's key: what changes it, what does not, and which stored variants it makes out of date."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augment_fakes import picture
from sgid_transforms.building.address import Address
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe import Filters, Recipe, SimilarityGuidance
from sgid_transforms.variants import Provenance, VariantStore
from sgid_transforms.variants.layout import image_key_of

RECORD = CaptionRecord(
    "ab" * 16, "a brown cat", "cat", 0.3, 0.5, captioner="blip", path="a.png", scorer="clip", prompt="a photo of a cat"
)
RECIPE = Recipe(guidance=SimilarityGuidance(2, 4))


@pytest.mark.parametrize(
    "change",
    [{"label": "kat"}, {"caption": "a black cat"}, {"rank": 0.6}, {"scorer": "another clip"}, {"key": "cd" * 16}],
    ids=str,
)
def test_what_decides_pixels_is_in_the_key(change: dict[str, object]) -> None:
    address = Address(RECIPE)
    assert address.key(replace(RECORD, **change)) != address.key(RECORD)


@pytest.mark.parametrize(
    "change", [{"captioner": "me"}, {"source": "human"}, {"path": None}, {"similarity": 0.4}, {"prompt": "x"}], ids=str
)
def test_what_decides_no_pixel_is_not(change: dict[str, object]) -> None:
    address = Address(RECIPE)
    assert address.key(replace(RECORD, **change)) == address.key(RECORD)


def test_only_what_the_recipe_uses_counts() -> None:
    fixed = Address(RECIPE.replace(prompt="a photo of a {label}", guidance=3.0))
    for change in ({"caption": "x"}, {"rank": 0.1}, {"scorer": "y"}):
        assert fixed.key(replace(RECORD, **change)) == fixed.key(RECORD)
    free = Address(RECIPE.replace(prompt="{caption}", guidance=3.0))
    assert free.key(replace(RECORD, label="x")) == free.key(replace(RECORD, label=None)) == free.key(RECORD)
    checked = Address(RECIPE.replace(prompt="{caption}", guidance=3.0, filters=Filters("argmax")))
    assert checked.key(replace(RECORD, label="x")) != checked.key(RECORD)
    assert checked.key(replace(RECORD, scorer="y")) != checked.key(RECORD)


def test_a_prompt_that_needs_a_label_has_no_key_without_one() -> None:
    bare = replace(RECORD, label=None)
    assert Address(RECIPE).key(bare) is None
    assert Address(RECIPE).key(bare, "cat") == Address(RECIPE).key(RECORD)


@given(st.text("0123456789abcdef", min_size=8, max_size=64), st.text(), st.text())
def test_every_key_and_text_can_be_stored(key: str, label: str, caption: str) -> None:
    found = Address(RECIPE).key(CaptionRecord(key, caption, label or "x"))
    assert found is not None
    assert 24 <= len(found) <= 64
    assert set(found) <= set("0123456789abcdef")
    assert len(key) > 48 or image_key_of(found) == key


@pytest.fixture
def stores(tmp_path: Path) -> tuple[CaptionStore, VariantStore]:
    return CaptionStore(tmp_path / "captions.sqlite"), VariantStore(tmp_path / "variants", fsync=False)


def _provenance(record: CaptionRecord, scale: float = 3.0) -> Provenance:
    return Provenance("a photo", label=record.label, caption=record.caption, guidance_scale=scale)


class TestStoresOfVersion01:
    """Their keys named the image alone."""

    @pytest.fixture
    def old(self, stores: tuple[CaptionStore, VariantStore]) -> VariantStore:
        variants = stores[1]
        variants.put(RECIPE, RECORD.key, 0, picture(1), _provenance(RECORD))
        (variants.root / "sgid-variants.json").write_text('{"format": 1}')
        return VariantStore(variants.root)

    def test_a_variant_made_under_the_present_record_is_found(self, old: VariantStore) -> None:
        address = Address(RECIPE)
        key = address.key(RECORD)
        assert key is not None
        assert address.find(old, RECORD, key, 0, pil=False).equal(picture(1))
        assert address.find(old, RECORD, key, 0, pil=True).size == (32, 32)
        assert address.find(old, RECORD, key, 1, pil=False) is None

    @pytest.mark.parametrize("change", [{"label": "kat"}, {"caption": "a black cat"}, {"rank": 0.6}], ids=str)
    def test_one_made_under_another_is_not(self, old: VariantStore, change: dict[str, object]) -> None:
        address, record = Address(RECIPE), replace(RECORD, **change)
        key = address.key(record)
        assert key is not None
        assert address.find(old, record, key, 0, pil=False) is None

    def test_nothing_of_them_is_deleted(self, old: VariantStore) -> None:
        old.put(RECIPE, Address(RECIPE).key(RECORD) or "", 1, picture(2), _provenance(RECORD))
        assert old.count(RECIPE) == 2


def test_stored_variants_are_told_current_from_outdated(stores: tuple[CaptionStore, VariantStore]) -> None:
    captions, variants = stores
    address = Address(RECIPE)
    records = [replace(RECORD, key=image_key(picture(number))) for number in range(3)]
    captions.put_many(records[:2])
    for record in records:
        variants.put(RECIPE, address.key(record) or "", 0, picture(9), _provenance(record))
    captions.put(replace(records[0], caption="edited", source="human"))
    states = {one.image_key: one.is_current for one in address.current(variants, captions)}
    assert states == {records[0].key: False, records[1].key: True, records[2].key: None}
