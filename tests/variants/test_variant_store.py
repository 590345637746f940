"""VariantStore: what is stored where, who is first, what maintenance does."""

import json
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants import IMAGE_FORMATS, Provenance, VariantRef, VariantStore, layout

KEY = "0123456789abcdef0123456789abcdef"
OTHER_KEY = "ff23456789abcdef0123456789abcdef"
PROVENANCE = Provenance("a photo of a cat", seed=7, strength=0.5, guidance_scale=4.0, versions={"torch": "2"})


def _recipe(image_format="png", fingerprint="01aa"):
    return SimpleNamespace(fingerprint=fingerprint, image_format=image_format)


def _image(seed=0, size=(16, 24)):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _files(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


@pytest.fixture
def store(tmp_path):
    return VariantStore(tmp_path / "variants", fsync=False)


def test_nothing_is_made_before_the_first_variant(store):
    assert store.get(_recipe(), KEY, 0) is None
    assert store.get_image(_recipe(), KEY, 0) is None
    assert store.get_pil(_recipe(), KEY, 0) is None
    assert store.failure(_recipe(), KEY, 0) is None
    assert not store.contains(_recipe(), KEY, 0)
    assert store.count() == 0
    assert store.sweep() == 0
    assert store.verify().ok
    assert store.stats().variants == {}
    assert not store.root.exists()


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_put_and_get(store, image_format):
    recipe = _recipe(image_format)
    image = _image() // 8 * 2 + 100
    assert store.put(recipe, KEY, 3, image, PROVENANCE)
    variant = store.get(recipe, KEY, 3)
    if image_format in ("auto", "png", "webp-lossless"):
        assert torch.equal(variant.image, image)
    assert variant.image.shape == image.shape
    assert variant.image.dtype == torch.uint8
    assert variant.provenance == PROVENANCE
    assert torch.equal(store.get_image(recipe, KEY, 3), variant.image)
    picture = store.get_pil(recipe, KEY, 3)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), variant.image.permute(1, 2, 0).numpy())
    assert store.get(recipe, KEY, 2) is None
    assert store.get(recipe, OTHER_KEY, 3) is None
    assert store.get(_recipe(image_format, "01ab"), KEY, 3) is None


def test_the_path_is_fingerprint_two_digits_key_and_number(store):
    store.put(_recipe("jpeg"), KEY, 12, _image(), PROVENANCE)
    assert _files(store.root) == [f"01aa/01/{KEY}-12.jpg", "sgid-variants.json"]
    assert store.get(_recipe("jpeg"), KEY, 12).path == store.root / "01aa" / "01" / f"{KEY}-12.jpg"


def test_any_viewer_opens_the_file(store):
    for image_format in IMAGE_FORMATS:
        recipe = _recipe(image_format, "f" + image_format)
        store.put(recipe, KEY, 0, _image(), PROVENANCE)
        variant = store.get(recipe, KEY, 0)
        with Image.open(variant.path) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), variant.image.permute(1, 2, 0).numpy())


def test_the_file_is_as_the_documented_format_says(store):
    import hashlib

    store.put(_recipe("png"), KEY, 5, _image(), PROVENANCE)
    data = (store.root / "01aa" / "01" / f"{KEY}-5.png").read_bytes()
    body, digest = data[:-32], data[-32:]
    assert hashlib.sha256(f"01aa/01/{KEY}-5".encode() + body).digest() == digest
    assert body[-8:] == b"SGIDvar1"
    length = int.from_bytes(body[-12:-8], "little")
    assert json.loads(body[-12 - length : -12])["prompt"] == PROVENANCE.prompt
    assert body[: -12 - length].endswith(b"IEND\xaeB`\x82")


def test_equal_variants_are_equal_bytes(store, tmp_path):
    other = VariantStore(tmp_path / "other")
    for each in (store, other):
        each.put(_recipe(), KEY, 0, _image(), PROVENANCE)
    (one,), (two,) = store.iter(), other.iter()
    assert one.path.read_bytes() == two.path.read_bytes()


def test_a_real_recipe_and_its_fingerprint_are_the_same_place(store):
    recipe = Recipe(image_format="webp-lossless")
    assert store.put(recipe, KEY, 0, _image(), PROVENANCE)
    assert torch.equal(store.get_image(recipe.fingerprint, KEY, 0), _image())
    assert store.count(recipe) == store.count(recipe.fingerprint) == 1


def test_the_first_writer_wins_even_with_another_format(store):
    assert store.put(_recipe("png"), KEY, 0, _image(1), PROVENANCE)
    for image_format in IMAGE_FORMATS:
        assert not store.put(_recipe(image_format), KEY, 0, _image(2), PROVENANCE)
    assert torch.equal(store.get_image(_recipe("jpeg"), KEY, 0), _image(1))
    assert store.count() == 1


def test_of_many_threads_one_is_first(store):
    start = threading.Barrier(8)
    won = []

    def write(seed):
        start.wait()
        if store.put(_recipe(), KEY, 0, _image(seed), PROVENANCE):
            won.append(seed)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert torch.equal(store.get_image(_recipe(), KEY, 0), _image(won[0]))
    assert store.stats().temporary == 0


def test_variants_of_one_recipe_in_several_formats_are_all_found(store):
    for number, image_format in enumerate(("png", "jpeg", "webp", "png")):
        store.put(_recipe(image_format), KEY, number, _image(), PROVENANCE)
    for _ in range(2):
        assert all(store.get_image("01aa", KEY, number) is not None for number in range(4))


def test_the_image_is_the_callers_to_change(store):
    store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
    store.get_image(_recipe(), KEY, 0).zero_()
    assert torch.equal(store.get_image(_recipe(), KEY, 0), _image())


def test_without_hard_links_files_are_renamed_and_the_first_still_wins(store, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert store.put(_recipe(), KEY, 0, _image(1), PROVENANCE)
    assert not store.put(_recipe(), KEY, 0, _image(2), PROVENANCE)
    assert torch.equal(store.get_image(_recipe(), KEY, 0), _image(1))
    assert store.stats().temporary == 0


def test_a_temporary_file_swept_away_by_another_container_is_written_again(store, monkeypatch):
    link = os.link
    calls = []

    def sweep_first(source, target):
        if not calls:
            os.unlink(source)
        calls.append(source)
        link(source, target)

    store.put(_recipe(), OTHER_KEY, 0, _image(), PROVENANCE)
    monkeypatch.setattr(os, "link", sweep_first)
    assert store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
    assert len(calls) >= 2
    assert store.get(_recipe(), KEY, 0) is not None


def test_iter_and_count(store):
    for fingerprint, key, number in (("01aa", KEY, 0), ("01aa", KEY, 10), ("01bb", OTHER_KEY, 0)):
        store.put(_recipe("png", fingerprint), key, number, _image(), PROVENANCE)
    store.put_failure("01bb", KEY, 0, ["black"])
    assert (store.count(), store.count("01aa"), store.count("01bb"), store.count("01cc")) == (3, 2, 1, 0)
    expected = VariantRef("01bb", OTHER_KEY, 0, store.root / "01bb" / "ff" / f"{OTHER_KEY}-0.png")
    assert list(store.iter("01bb")) == [expected]
    assert len(set(store.iter())) == 3
    stats = store.stats()
    assert stats.variants == {"01aa": 2, "01bb": 1}
    assert stats.failures == {"01bb": 1}
    assert stats.bytes["01bb"] == expected.path.stat().st_size
    assert (stats.quarantined, stats.temporary) == (0, 0)


class TestFailures:
    def test_reasons_are_remembered(self, store):
        assert store.put_failure(_recipe(), KEY, 0, ["nsfw", "label"])
        assert store.failure(_recipe(), KEY, 0) == ("nsfw", "label")
        assert store.failure(_recipe(), KEY, 1) is None
        assert not store.contains(_recipe(), KEY, 0)
        assert store.get(_recipe(), KEY, 0) is None
        assert store.count() == 0

    def test_the_first_failure_stays(self, store):
        assert store.put_failure(_recipe(), KEY, 0, ["nsfw"])
        assert not store.put_failure(_recipe(), KEY, 0, ["black"])
        assert store.failure(_recipe(), KEY, 0) == ("nsfw",)

    def test_a_variant_can_still_be_stored(self, store):
        store.put_failure(_recipe(), KEY, 0, ["nsfw"])
        assert store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        assert store.get(_recipe(), KEY, 0) is not None

    def test_they_can_be_forgotten(self, store):
        for fingerprint in ("01aa", "01bb"):
            store.put_failure(fingerprint, KEY, 0, ["nsfw"])
            store.put(_recipe("png", fingerprint), KEY, 1, _image(), PROVENANCE)
        assert store.forget_failures("01aa") == 1
        assert store.failure("01aa", KEY, 0) is None
        assert store.failure("01bb", KEY, 0) == ("nsfw",)
        assert store.forget_failures() == 1
        assert store.count() == 2

    def test_long_and_odd_reasons_stay_small_files(self, store):
        store.put_failure(_recipe(), KEY, 0, ["x" * 10**6, "\udcff\0"] + ["y"] * 100)
        reasons = store.failure(_recipe(), KEY, 0)
        assert len(reasons) == 32
        assert len(reasons[0]) == 1000
        assert reasons[1] == "\udcff\0"
        store.put_failure(_recipe(), KEY, 1, "label")
        assert store.failure(_recipe(), KEY, 1) == ("label",)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b'{"reasons": 5}', b'{"reasons": [5]}', b"\xff" * 99, b"[" * 100_000]
    )
    def test_a_damaged_one_is_forgotten(self, store, content):
        store.put_failure(_recipe(), KEY, 0, ["nsfw"])
        (store.root / "01aa" / "01" / f"{KEY}-0.failed.json").write_bytes(content)
        assert not store.verify().ok
        assert store.failure(_recipe(), KEY, 0) is None
        assert store.quarantined == 1
        assert store.put_failure(_recipe(), KEY, 0, ["again"])


class TestPrune:
    def test_only_the_recipes_to_keep_stay(self, store):
        for fingerprint in ("01aa", "01bb", "01cc"):
            store.put(_recipe("png", fingerprint), KEY, 0, _image(), PROVENANCE)
            store.put_failure(fingerprint, KEY, 1, ["nsfw"])
        assert store.prune(["01aa", _recipe("png", "01bb")]) == 2
        assert sorted({ref.fingerprint for ref in store.iter()}) == ["01aa", "01bb"]
        assert not (store.root / "01cc").exists()
        assert store.prune(_recipe()) == 2
        assert store.prune("01aa") == 0
        assert store.count() == 1

    def test_what_no_store_wrote_is_never_removed(self, store):
        store.put(_recipe("png", "01cc"), KEY, 0, _image(), PROVENANCE)
        (store.root / "01cc" / "notes.txt").write_text("mine")
        (store.root / "my-photos").mkdir()
        (store.root / "my-photos" / "a.png").write_text("mine")
        (store.root / "README").write_text("mine")
        store.prune("01aa")
        assert _files(store.root) == ["01cc/notes.txt", "README", "my-photos/a.png", "sgid-variants.json"]

    def test_a_wrong_fingerprint_or_none_removes_nothing(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        with pytest.raises(StoreError, match="no recipe to keep"):
            store.prune(iter(()))
        with pytest.raises(StoreError):
            store.prune(["01aa", "../x"])
        assert store.count() == 1


class TestRemove:
    def test_the_named_variants_and_failures_go_and_no_others(self, store):
        for number in range(4):
            store.put(_recipe(("png", "jpeg", "webp", "png")[number]), KEY, number, _image(), PROVENANCE)
        store.put(_recipe("png", "01bb"), OTHER_KEY, 0, _image(), PROVENANCE)
        store.put_failure("01aa", KEY, 3, ["nsfw"])  # beside a variant of the same number
        assert store.remove(ref for ref in store.iter("01aa") if ref.variant < 3) == 3
        assert [ref.variant for ref in store.iter("01aa")] == [3]
        assert store.remove(list(store.iter_failures())) == 1
        assert store.contains("01aa", KEY, 3)
        refs = list(store.iter("01bb"))
        assert store.remove(refs) == 1
        assert store.remove(refs) == store.remove([]) == 0
        assert sorted(path.name for path in store.root.iterdir()) == ["01aa", "sgid-variants.json", "tmp"]

    def test_a_foreign_file_keeps_its_folder(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        (store.root / "01aa" / "01" / "notes.txt").write_text("mine")
        assert store.remove(store.iter()) == 1
        assert _files(store.root) == ["01aa/01/notes.txt", "sgid-variants.json"]

    @pytest.mark.parametrize(
        "changes",
        [
            *({"fingerprint": ".."}, {"fingerprint": "quarantine"}, {"key": "../../x"}, {"key": OTHER_KEY}, {"variant": -1}),
            *({"variant": 7}, {"path": Path("notes.txt")}, {"path": Path(f"{KEY}-0.txt")}, {"path": Path(f"{KEY}-0.png/..")}),
        ],
        ids=str,
    )
    def test_what_no_store_writes_is_refused(self, store, tmp_path, changes):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        for name in ("notes.txt", f"{KEY}-0.txt"):
            (store.root / "01aa" / "01" / name).write_text("mine")
        before = _files(tmp_path)
        with pytest.raises(StoreError):
            store.remove([next(store.iter())._replace(**changes)])
        assert _files(tmp_path) == before

    def test_only_the_files_of_this_store_are_removed(self, store, tmp_path):
        """The path of a ref says of which kind the file is, not where it lies."""
        other = VariantStore(tmp_path / "other", fsync=False)
        for each in (store, other):
            each.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        assert store.remove(other.iter()) == 1
        assert (store.count(), other.count()) == (0, 1)


class TestMerge:
    @pytest.fixture
    def other(self, tmp_path):
        other = VariantStore(tmp_path / "other", fsync=False)
        other.put(_recipe(), KEY, 0, _image(10), PROVENANCE)
        other.put(_recipe("jpeg"), KEY, 1, _image(11), PROVENANCE)
        other.put_failure(_recipe(), KEY, 2, ["nsfw"])
        return other

    def test_what_is_missing_is_copied(self, store, other):
        store.put(_recipe("webp-lossless"), KEY, 0, _image(1), PROVENANCE)
        assert store.merge(other) == 2
        assert torch.equal(store.get_image(_recipe(), KEY, 0), _image(1))
        assert torch.equal(store.get_image(_recipe(), KEY, 1), other.get_image(_recipe(), KEY, 1))
        assert store.failure(_recipe(), KEY, 2) == ("nsfw",)
        assert store.merge(other.root) == 0
        assert store.verify().ok

    def test_damaged_ones_are_left_behind(self, store, other, caplog):
        path = other.root / "01aa" / "01" / f"{KEY}-0.png"
        path.write_bytes(path.read_bytes()[:-50])
        before = _files(other.root)
        assert store.merge(other) == 2
        assert store.get(_recipe(), KEY, 0) is None
        assert _files(other.root) == before
        assert "stays where it is" in caplog.text

    def test_copying_folders_does_the_same(self, store, other):
        shutil.copytree(other.root, store.root)
        assert torch.equal(store.get_image(_recipe(), KEY, 0), _image(10))
        assert store.verify().checked == 3
        assert store.verify().ok

    def test_a_missing_store_is_an_error(self, store, tmp_path):
        with pytest.raises(StoreError, match="there is no variant store at"):
            store.merge(tmp_path / "nowhere")


class TestVerify:
    def test_damage_is_found_and_repaired(self, store):
        for number in range(4):
            store.put(_recipe(), KEY, number, _image(), PROVENANCE)
        folder = store.root / "01aa" / "01"
        (folder / f"{KEY}-0.png").write_bytes(b"")
        (folder / f"{KEY}-1.png").rename(folder / f"{KEY}-7.png")
        (folder / "thumbs.db").write_text("x")
        (store.root / "01aa" / "zz").mkdir()
        report = store.verify()
        assert report.checked == 4
        assert sorted(path.name for path in report.damaged) == [f"{KEY}-0.png", f"{KEY}-7.png"]
        assert sorted(path.name for path in report.foreign) == ["thumbs.db", "zz"]
        assert not report.ok
        assert report.repaired == 0
        assert store.stats().quarantined == 0
        assert store.verify(repair=True).repaired == 4
        assert store.verify().ok
        assert store.verify().checked == 2
        assert store.stats().quarantined == 4

    def test_a_readonly_store_can_be_verified_but_not_repaired(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        reader = VariantStore(store.root, readonly=True)
        assert reader.verify().ok
        with pytest.raises(StoreError, match="readonly=True"):
            reader.verify(repair=True)


class TestSweep:
    def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        from sgid_transforms.variants import folder as folders

        host = folders._host()
        folder = store.root / "tmp"
        dead = folder / f"{host}_{2**22 + 1}_1_0.tmp"  # above Linux's largest process id
        mine = folder / f"{host}_{os.getpid()}_1_0.tmp"
        away = folder / "elsewhere_1_1_0.tmp"
        old = folder / "elsewhere_2_1_0.tmp"
        foreign = folder / "notes.txt"
        for path in (dead, mine, away, old, foreign):
            path.write_text("x")
        os.utime(old, (1, 1))
        assert store.sweep() == 2
        assert sorted(folder.iterdir()) == sorted([mine, away, foreign])

    def test_the_first_write_of_a_process_sweeps(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        (store.root / "tmp" / "elsewhere_2_1_0.tmp").touch()
        os.utime(store.root / "tmp" / "elsewhere_2_1_0.tmp", (1, 1))
        store.put(_recipe(), KEY, 1, _image(), PROVENANCE)
        assert store.stats().temporary == 1
        VariantStore(store.root).put(_recipe(), KEY, 2, _image(), PROVENANCE)
        assert store.stats().temporary == 0


class TestObject:
    def test_pickle_is_small_and_keeps_the_settings(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        data = pickle.dumps(store)
        assert len(data) < 500
        again = pickle.loads(data)  # noqa: S301
        assert torch.equal(again.get_image(_recipe(), KEY, 0), _image())
        assert repr(again) == f"VariantStore({str(store.root)!r})"
        assert pickle.loads(pickle.dumps(VariantStore("x", readonly=True))).readonly  # noqa: S301

    def test_a_relative_root_and_one_with_odd_characters_work(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for root in ("here", "./below/there", "space ü %s", Path("x") / ".." / "y"):
            store = VariantStore(root, fsync=False)
            store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
            assert store.get(_recipe(), KEY, 0) is not None
        assert VariantStore(tmp_path / "here").get(_recipe(), KEY, 0) is not None

    @pytest.mark.parametrize("root", ["", "a\0b", b"bytes"])
    def test_impossible_roots_are_refused(self, root):
        with pytest.raises(StoreError, match="choose another name"):
            VariantStore(root)

    def test_readonly_never_writes(self, store, caplog):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        (store.root / "01aa" / "01" / f"{KEY}-1.png").write_bytes(b"damaged")
        before = _files(store.root)
        reader = VariantStore(store.root, readonly=True)
        assert reader.get(_recipe(), KEY, 0) is not None
        assert reader.get(_recipe(), KEY, 1) is None
        assert reader.quarantined == 1
        for write in (
            lambda: reader.put(_recipe(), KEY, 2, _image(), PROVENANCE),
            lambda: reader.put_failure(_recipe(), KEY, 2, ["x"]),
            lambda: reader.prune("01aa"),
            lambda: reader.merge(store),
            lambda: reader.forget_failures(),
            lambda: reader.remove(reader.iter()),
        ):
            with pytest.raises(StoreError, match="opened with readonly=True"):
                write()
        assert reader.sweep() == 0
        assert _files(store.root) == before

    def test_a_newer_store_is_refused_with_the_way_out(self, store):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        (store.root / "sgid-variants.json").write_text(json.dumps({"format": 3, "check": layout._marker_check(3)}))
        newer = VariantStore(store.root)
        for call in (
            lambda: newer.get(_recipe(), KEY, 0),
            lambda: newer.put(_recipe(), KEY, 1, _image(), PROVENANCE),
            lambda: newer.verify(repair=True),
            lambda: newer.count(),
            lambda: newer.stats(),
        ):
            with pytest.raises(StoreError, match="format 3, this version knows up to 2; upgrade sgid-transforms"):
                call()

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"format": "x"}', "\0", "[" * 4000, '{"format": 3}', '{"format": 3, "check": "x"}']
    )
    def test_a_damaged_marker_does_not_matter(self, store, content):
        store.put(_recipe(), KEY, 0, _image(), PROVENANCE)
        (store.root / "sgid-variants.json").write_text(content)
        assert VariantStore(store.root).get(_recipe(), KEY, 0) is not None

    def test_each_cause_is_logged_once(self, store, caplog):
        for number in range(4):
            store.put(_recipe(), KEY, number, _image(), PROVENANCE)
            (store.root / "01aa" / "01" / f"{KEY}-{number}.png").write_bytes(b"short" if number < 2 else bytes(1000))
        with caplog.at_level(logging.WARNING, logger="sgid_transforms.variants"):
            assert [store.get(_recipe(), KEY, number) for number in range(4)] == [None] * 4
        assert len(caplog.records) == 2
        assert store.quarantined == 4
