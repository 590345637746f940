"""A variant's key: what changes it, what does not, and which stored variants it makes out of date."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augment_fakes import picture
from sgid_transforms.building.address import Address
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.errors import MissingCaptionError
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe import Filters, Recipe, SimilarityGuidance
from sgid_transforms.variants import Provenance, VariantStore
from sgid_transforms.variants.layout import image_key_of

RECORD = CaptionRecord(
    "ab" * 16, "a brown cat", "cat", 0.3, 0.5, captioner="blip", path="a.png", scorer="clip", prompt="a photo of a cat"
)
RECIPE = Recipe(guidance=SimilarityGuidance(2, 4), caption_from="own")
UNUSED = CaptionStore("unused.sqlite")  # opened only for contexts


@pytest.mark.parametrize(
    "change",
    [{"label": "kat"}, {"caption": "a black cat"}, {"rank": 0.6}, {"scorer": "another clip"}, {"key": "cd" * 16}],
    ids=str,
)
def test_what_decides_pixels_is_in_the_key(change: dict[str, object]) -> None:
    address = Address(RECIPE, UNUSED)
    assert address.key(replace(RECORD, **change), 0) != address.key(RECORD, 0)


@pytest.mark.parametrize(
    "change", [{"captioner": "me"}, {"source": "human"}, {"path": None}, {"similarity": 0.4}, {"prompt": "x"}], ids=str
)
def test_what_decides_no_pixel_is_not(change: dict[str, object]) -> None:
    address = Address(RECIPE, UNUSED)
    assert address.key(replace(RECORD, **change), 0) == address.key(RECORD, 0)


def test_only_what_the_recipe_uses_counts() -> None:
    fixed = Address(RECIPE.replace(prompt="a photo of a {label}", guidance=3.0), UNUSED)
    for change in ({"caption": "x"}, {"rank": 0.1}, {"scorer": "y"}):
        assert fixed.key(replace(RECORD, **change), 0) == fixed.key(RECORD, 0)
    free = Address(RECIPE.replace(prompt="{caption}", guidance=3.0), UNUSED)
    assert free.key(replace(RECORD, label="x"), 0) == free.key(replace(RECORD, label=None), 0) == free.key(RECORD, 0)
    checked = Address(RECIPE.replace(prompt="{caption}", guidance=3.0, filters=Filters("argmax")), UNUSED)
    assert checked.key(replace(RECORD, label="x"), 0) != checked.key(RECORD, 0)
    assert checked.key(replace(RECORD, scorer="y"), 0) != checked.key(RECORD, 0)


def test_a_prompt_that_needs_a_label_has_no_key_without_one() -> None:
    bare = replace(RECORD, label=None)
    assert Address(RECIPE, UNUSED).key(bare, 0) is None
    assert Address(RECIPE, UNUSED).key(bare, 0, "cat") == Address(RECIPE, UNUSED).key(RECORD, 0)


@given(st.text("0123456789abcdef", min_size=8, max_size=64), st.text(), st.text())
def test_every_key_and_text_can_be_stored(key: str, label: str, caption: str) -> None:
    found = Address(RECIPE, UNUSED).key(CaptionRecord(key, caption, label or "x"), 0)
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
        address = Address(RECIPE, UNUSED)
        key = address.key(RECORD, 0)
        assert key is not None
        assert address.find(old, RECORD, key, 0, pil=False).equal(picture(1))
        assert address.find(old, RECORD, key, 0, pil=True).size == (32, 32)
        assert address.find(old, RECORD, key, 1, pil=False) is None

    @pytest.mark.parametrize("change", [{"label": "kat"}, {"caption": "a black cat"}, {"rank": 0.6}], ids=str)
    def test_one_made_under_another_is_not(self, old: VariantStore, change: dict[str, object]) -> None:
        address, record = Address(RECIPE, UNUSED), replace(RECORD, **change)
        key = address.key(record, 0)
        assert key is not None
        assert address.find(old, record, key, 0, pil=False) is None

    def test_nothing_of_them_is_deleted(self, old: VariantStore) -> None:
        old.put(RECIPE, Address(RECIPE, UNUSED).key(RECORD, 0) or "", 1, picture(2), _provenance(RECORD))
        assert old.count(RECIPE) == 2


def test_stored_variants_are_told_current_from_outdated(stores: tuple[CaptionStore, VariantStore]) -> None:
    captions, variants = stores
    address = Address(RECIPE, captions)
    records = [replace(RECORD, key=image_key(picture(number))) for number in range(3)]
    captions.put_many(records[:2])
    for record in records:
        variants.put(RECIPE, address.key(record, 0) or "", 0, picture(9), _provenance(record))
    captions.put(replace(records[0], caption="edited", source="human"))
    states = {one.image_key: one.is_current for one in address.current(variants)}
    assert states == {records[0].key: False, records[1].key: True, records[2].key: None}


class TestContextsThatTravel:
    """``caption_from``: the caption of a variant is the context of an image that is drawn by the variant's name."""

    TRAVELLING = RECIPE.replace(caption_from="dataset")

    @pytest.fixture
    def captions(self, tmp_path: Path) -> CaptionStore:
        captions = CaptionStore(tmp_path / "captions.sqlite")
        captions.put_many(_lending(range(60)))
        return captions

    def test_the_context_of_a_variant_follows_from_its_name(self, captions: CaptionStore) -> None:
        drawn = [Address(self.TRAVELLING, captions).caption(RECORD, variant) for variant in range(400)]
        again = Address(self.TRAVELLING, CaptionStore(captions.path, readonly=True))
        assert drawn == [again.caption(RECORD, variant) for variant in range(400)]
        records = {record.key: record for record in captions}
        assert all(records[key].context == text for text, key in drawn)
        assert len({key for _, key in drawn}) > 40
        assert Address(self.TRAVELLING.replace(seed=1), captions).caption(RECORD, 0) != drawn[0]

    def test_contexts_may_be_those_of_the_class(self, captions: CaptionStore) -> None:
        address = Address(RECIPE.replace(caption_from="class"), captions)
        assert {address.caption(RECORD, n)[0][:6] for n in range(100)} == {"near a"}
        stranger = replace(RECORD, label="zebra")
        assert address.caption(stranger, 0) == (RECORD.caption, RECORD.key), "a class without contexts keeps its own captions"

    def test_it_is_in_the_key_but_not_for_own_captions(self, captions: CaptionStore) -> None:
        travelling, own = Address(self.TRAVELLING, captions), Address(RECIPE, captions)
        assert len({travelling.key(RECORD, number) for number in range(20)}) > 10
        assert len({own.key(RECORD, number) for number in range(20)}) == 1

    def test_later_images_and_captions_change_no_key(self, captions: CaptionStore) -> None:
        before = [Address(self.TRAVELLING, captions).key(RECORD, number) for number in range(100)]
        captions.put_many(replace(record, context=None) for record in _lending(range(60, 120)))
        captions.put_many(replace(record, caption="other words", source="human", context=None) for record in _lending(range(9)))
        assert [Address(self.TRAVELLING, captions).key(RECORD, number) for number in range(100)] == before

    def test_a_lost_record_changes_only_what_it_lent(self, captions: CaptionStore) -> None:
        before = [Address(self.TRAVELLING, captions).caption(RECORD, number) for number in range(300)]
        lost = before[0][1]
        captions.remove([lost])
        after = [Address(self.TRAVELLING, captions).caption(RECORD, number) for number in range(300)]
        assert all((old != new) == (old[1] == lost) for old, new in zip(before, after, strict=True))

    def test_without_contexts_there_is_one_sentence(self, tmp_path: Path) -> None:
        captions = CaptionStore(tmp_path / "empty.sqlite")
        address = Address(self.TRAVELLING, captions)
        with pytest.raises(
            MissingCaptionError, match=r"^caption_from='dataset' takes .* has none; call sgid.prepare\(dataset\)"
        ):
            address.key(RECORD, 0)
        captions.put_many(_lending(range(3)))
        assert address.key(RECORD, 0) is not None, "they are looked for again"

    def test_a_prompt_without_a_caption_needs_none(self, tmp_path: Path) -> None:
        recipe = self.TRAVELLING.replace(prompt="a photo of a {label}")
        assert Address(recipe, CaptionStore(tmp_path / "empty.sqlite")).key(RECORD, 0) is not None


@pytest.mark.parametrize(("policy", "used"), [("context", "on a mat"), ("drop", ""), ("keep", "a dog on a mat")])
def test_what_is_used_of_a_caption_that_contradicts_its_label(policy: str, used: str) -> None:
    record = replace(RECORD, caption="a dog on a mat", contradiction="words")
    address = Address(RECIPE.replace(on_contradiction=policy), UNUSED)
    assert address.caption(record, 0) == (used, record.key)
    assert address.caption(replace(record, contradiction=None), 0)[0] == record.caption
    assert address.key(record, 0) == address.key(replace(record, caption=used, contradiction=None), 0)


def _lending(numbers: range) -> list[CaptionRecord]:
    """Records of cats, whose contexts begin with "near", and of dogs."""
    return [
        CaptionRecord(
            image_key(picture(number)), f"a thing {number}", ("cat", "dog")[number % 2],
            context=f"{('near', 'behind')[number % 2]} a thing {number}",
        )
        for number in numbers
    ]  # fmt: skip
