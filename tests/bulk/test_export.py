import json
import os

import pytest
from torchvision.datasets import ImageFolder

from image_folders import own_folder, picture, plain_folder
from job_fakes import fake_models
from sgid_transforms.bulk import generate_folder, scan_folder
from sgid_transforms.bulk.export import export_folder
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import FolderError
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore
from sgid_transforms.variants.verdicts import Verdict

RECIPE = Recipe(caption_from="own")


@pytest.fixture
def made(tmp_path):
    """A scan and a store with two variants of each image."""

    def make(folder):
        scan = scan_folder(folder)
        captions, variants = CaptionStore(tmp_path / "captions.sqlite"), VariantStore(tmp_path / "variants")
        generate_folder(scan, RECIPE, captions, variants, count=2, models=fake_models())
        captions.close()
        return scan, variants

    return make


def lines(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_torchvision_reads_the_export_as_classes_of_the_same_names(tmp_path, made):
    scan, variants = made(plain_folder(tmp_path / "data", 3))
    done = export_folder(scan, RECIPE, variants, tmp_path / "out")
    assert (done.variants, done.images_with_variants, done.originals) == (12, 6, 0)
    folder = ImageFolder(str(tmp_path / "out"))
    assert folder.classes == ["cat", "dog"]
    assert folder.targets == [0] * 6 + [1] * 6
    known = {line["file_name"]: line for line in lines(tmp_path / "out")}
    assert len(known) == 12
    for name, line in known.items():
        (place,) = {ref.key for ref in variants.iter(RECIPE) if ref.image_key == line["key"]}
        stored = variants.get_image(RECIPE, place, line["variant"])
        assert to_uint8_chw(load_image(tmp_path / "out" / name)).equal(stored)
        assert name.startswith(line["label"])
        assert line["text"].startswith(f"a photo of a {line['label']}, a thing of colour")


def test_hugging_face_reads_the_export(tmp_path, made):
    datasets = pytest.importorskip("datasets")
    scan, variants = made(plain_folder(tmp_path / "data", 2))
    export_folder(scan, RECIPE, variants, tmp_path / "out")
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 8
    assert {row["label"] for row in rows} == {"cat", "dog"}


def test_originals_come_along_when_they_are_asked_for(tmp_path, made):
    scan, variants = made(own_folder(tmp_path / "data"))
    done = export_folder(scan, RECIPE, variants, tmp_path / "out", originals=True)
    assert done.originals == len(scan.images)
    assert {one.path.name for one in done.skipped} == {one.path.name for one in scan.skipped}
    copied = {line["key"]: tmp_path / "out" / line["file_name"] for line in lines(tmp_path / "out") if "variant" not in line}
    for image in scan.images:
        assert copied[image.key].read_bytes() == image.file.path.read_bytes()


def test_a_second_export_adds_what_is_new(tmp_path, made):
    folder = plain_folder(tmp_path / "data", 1)
    export_folder(*_swap(made(folder)), tmp_path / "out")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    picture(88).save(folder / "cat" / "new.png")
    done = export_folder(*_swap(made(folder)), tmp_path / "out")
    assert done.variants == len(lines(tmp_path / "out")) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())


def _swap(made):
    scan, variants = made
    return scan, RECIPE, variants


def test_images_without_variants_are_listed(tmp_path, made):
    folder = plain_folder(tmp_path / "data", 1)
    _, variants = made(folder)
    picture(88).save(folder / "cat" / "new.png")
    done = export_folder(scan_folder(folder), RECIPE, variants, tmp_path / "out")
    assert [one.path.name for one in done.skipped] == ["new.png"]


@pytest.mark.parametrize("out", ["data/export", "data", "data/cat", "data/dog/out", "data/new/deep", "."])
def test_an_export_that_would_lie_among_the_originals_is_refused(tmp_path, made, out):
    scan, variants = made(plain_folder(tmp_path / "data", 1))
    with pytest.raises(FolderError):
        export_folder(scan, RECIPE, variants, tmp_path / out)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 240 + b".png",
        b"caf\xe9.png",
        "\u732b\U0001f408.png".encode(),
        b"two\nlines.png",
        b'-dash "quoted".png',
        b"a;b&c.png",
    ],
)
def test_odd_file_names_end_no_export_and_leave_metadata_that_can_be_read(tmp_path, made, name):
    folder = plain_folder(tmp_path / "data", 1)
    picture(50).save(folder / "cat" / "plain.png")
    os.rename(folder / "cat" / "plain.png", os.path.join(os.fsencode(folder), b"cat", name))
    scan, variants = made(folder)
    done = export_folder(scan, RECIPE, variants, tmp_path / "out")
    assert (done.variants, done.skipped) == (6, ())
    written = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all((tmp_path / "out" / line["file_name"]).is_file() for line in written)
    assert len(ImageFolder(str(tmp_path / "out"))) == len(written) == 6


def test_nothing_else_is_overwritten(tmp_path, made):
    scan, variants = made(plain_folder(tmp_path / "data", 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for out in (tmp_path / "mine", tmp_path / "data", tmp_path / "data" / "cat", tmp_path / "data" / "cat" / "0.png"):
        with pytest.raises(FolderError):
            export_folder(scan, RECIPE, variants, out)
    export_folder(scan, RECIPE, variants, tmp_path / "out")
    with pytest.raises(FolderError, match="holds something else"):
        export_folder(scan, Recipe(seed=1), variants, tmp_path / "out")


def test_rejected_variants_leave_the_export_and_verdicts_are_in_its_metadata(tmp_path, made):
    scan, variants = made(plain_folder(tmp_path / "data", 2))
    out = tmp_path / "out"
    export_folder(scan, RECIPE, variants, out)
    refs = {ref.variant: ref for ref in variants.iter(RECIPE) if ref.image_key == scan.images[0].key}
    variants.judge(
        Verdict(RECIPE.fingerprint, refs[number].key, number, decision, "anna", 1.0, why)
        for number, decision, why in ((0, "reject", "not a cat"), (1, "keep", ""))
    )
    done = export_folder(scan, RECIPE, variants, out)
    assert done.variants == 7
    known = {(line["key"], line["variant"]): line for line in lines(out)}
    assert (scan.images[0].key, 0) not in known
    assert known[scan.images[0].key, 1]["verdict"] == "keep"
    assert known[scan.images[0].key, 1]["verdict_by"] == "anna"
    assert "verdict" not in known[scan.images[1].key, 0]
    assert {path.relative_to(out).as_posix() for path in out.glob("*/*")} == {line["file_name"] for line in known.values()}


def test_a_later_export_has_the_pictures_of_edited_captions(tmp_path, made):
    """The file of the same number was left as it was, under the new prompt."""
    scan, variants = made(plain_folder(tmp_path / "data", 1))
    captions, out = CaptionStore(tmp_path / "captions.sqlite"), tmp_path / "out"
    export_folder(scan, RECIPE, variants, out, captions=captions)
    captions.put(CaptionRecord(scan.images[0].key, "my own words", source="human"))
    generate_folder(scan, RECIPE, captions, variants, count=2, models=fake_models())
    export_folder(scan, RECIPE, variants, out, captions=captions)
    for line in lines(out):
        (stored,) = (
            variant
            for ref in variants.find(RECIPE, line["key"])
            if ref.variant == line["variant"]
            and (variant := variants.get(RECIPE, ref.key, ref.variant)).provenance.prompt == line["text"]
        )
        assert to_uint8_chw(load_image(out / line["file_name"])).equal(stored.image)
    captions.close()
