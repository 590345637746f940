import json
import os

import pytest
import torch
from torchvision.datasets import ImageFolder

from image_folders import BROKEN, GOOD, own_folder, picture, plain_folder
from sgid_transforms.errors import FolderError, RecipeError
from sgid_transforms.images.folders import lies_in_ours, list_folder, scan_files, show
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image
from sgid_transforms.variants import Provenance, VariantStore


def scan(root, names=None):
    return scan_files(list_folder(root, names))


def test_everything_valid_is_found_and_everything_else_is_listed_with_its_reason(tmp_path):
    found = scan(own_folder(tmp_path))
    assert len(found.images) == GOOD
    assert found.duplicates == 1
    assert {image.file.label for image in found.images} == {"tabby cat", "dog"}
    assert [image.file.path.name for image in found.images if image.turned] == ["turned.jpg"]
    assert next(image.size for image in found.images if image.turned) == (90, 60)
    reasons = {one.path.name: one.reason for one in found.skipped}
    assert set(reasons) == {*BROKEN, "empty_class"}
    for name, word in BROKEN.items():
        assert word in reasons[name]
    assert "without images" in reasons["empty_class"]


def test_the_same_files_as_torchvisions_image_folder(tmp_path):
    root = plain_folder(tmp_path, 4, ("b", "a", "c"))
    (root / "a" / "deeper").mkdir()
    picture(99).save(root / "a" / "deeper" / "x.png")
    theirs = ImageFolder(str(root), loader=load_image)
    ours = scan(root)
    assert ours.classes == tuple(theirs.classes)
    assert {str(image.file.path) for image in ours.images} == {path for path, _ in theirs.samples}
    assert {image.key for image in ours.images} == {image_key(image) for image, _ in theirs}


def test_one_picture_cannot_have_two_labels(tmp_path):
    root = plain_folder(tmp_path, 2)
    picture(0).save(root / "dog" / "a_cat.png")
    found = scan(root)
    assert [one.path.name for one in found.skipped] == ["a_cat.png"]
    assert "another label" in found.skipped[0].reason


def test_class_names_replace_folder_names(tmp_path):
    root = plain_folder(tmp_path, 1, ("n01", "n02"))
    assert [image.file.label for image in scan(root, {"n01": "tabby cat"}).images] == ["tabby cat", "n02"]
    with pytest.raises(RecipeError, match="'n99'"):
        list_folder(root, {"n99": "tabby cat"})


def test_images_outside_of_class_folders_are_listed(tmp_path):
    root = plain_folder(tmp_path, 1)
    picture(50).save(root / "loose.png")
    (root / "metadata.jsonl").touch()
    listing = list_folder(root)
    assert [one.path.name for one in listing.skipped] == ["loose.png"]
    assert listing.ignored == 1


def test_hidden_images_count_as_for_image_folder_or_are_listed(tmp_path):
    """`.ipynb_checkpoints` of a class is read by ImageFolder; such images were neither used nor listed."""
    root = plain_folder(tmp_path, 1)
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    picture(2).save(root / "cat" / ".ipynb_checkpoints" / "x.png")
    (root / "cat" / ".DS_Store").touch()
    listing = list_folder(root)
    assert len(listing.files) == len(ImageFolder(root)) == 3
    assert (listing.skipped, listing.ignored) == ((), 0)
    (root / ".cache").mkdir()
    assert list_folder(root).skipped == ()  # ImageFolder refuses it, as it does every folder without images
    picture(1).save(root / ".cache" / "x.png")
    assert [one.path.name for one in list_folder(root).skipped] == [".cache"]


def _store(place):
    VariantStore(place).put("01aa", "ab" * 16, 0, torch.zeros(3, 8, 8, dtype=torch.uint8), Provenance("x"))


def _export(place):
    (place / "cat").mkdir(parents=True)
    picture(9).save(place / "cat" / "x.png")
    line = {"file_name": "cat/x.png", "key": "ab", "recipe": "01aa", "text": "a cat"}
    (place / "metadata.jsonl").write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("where", ["variants", "cat/variants", "dog/deep/er/anything", ".hidden"])
@pytest.mark.parametrize("write", [_store, _export])
def test_what_this_package_wrote_is_never_taken_for_originals(tmp_path, where, write):
    """`cd photos && sgid generate .` twice: the store became a class, whose variants got variants at every resume."""
    root = plain_folder(tmp_path, 2)
    before = list_folder(root)
    write(root / where)
    after = list_folder(root)
    assert (after.files, after.classes, after.skipped) == (before.files, before.classes, ())


@pytest.mark.parametrize("write", [_store, _export])
def test_data_that_is_a_store_or_an_export_itself_is_refused(tmp_path, write):
    root = tmp_path / "d"
    write(root)
    plain_folder(root, 2, ("frog",))
    with pytest.raises(FolderError, match="is a store of variants or an export, and holds no originals"):
        list_folder(root)


@pytest.mark.parametrize("write", [_store, _export])
def test_originals_in_a_class_folder_that_is_a_store_are_listed(tmp_path, write):
    root = plain_folder(tmp_path / "d", 2)
    write(root / "cat")
    listing = list_folder(root)
    assert listing.classes == ("dog",)
    assert [(one.path.name, one.reason) for one in listing.skipped] == [
        ("cat", "it is a store of variants or an export; move the originals in it elsewhere")
    ]


@pytest.mark.parametrize(
    ("below", "ours"),
    [
        ("", False),  # files beside the marker
        ("train/cat", False),  # a class folder whose name could be that of a recipe
        ("train/cat/00", False),
        ("quarantine", True),
        ("tmp/x", True),
        ("0123456789abcdef/7f", True),
    ],
)
def test_a_store_may_have_originals_beside_its_own_folders(tmp_path, below, ours):
    _store(tmp_path)
    assert lies_in_ours(tmp_path / below) is ours


def test_some_class_names_that_name_no_folder_are_told(tmp_path, caplog):
    list_folder(plain_folder(tmp_path, 1), {"cat": "tabby cat", "bird": "robin"})
    assert "1 class names match no class folder, such as 'bird'" in caplog.text


@pytest.mark.parametrize("name", ["---", "\u200b", "+++", "__-__"])
def test_a_class_folder_without_words_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="has no words in its name"):
        list_folder(plain_folder(tmp_path, 1, (name,)))


def test_somebody_elses_metadata_makes_no_export(tmp_path):
    root = plain_folder(tmp_path, 1)
    (root / "cat" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    (root / "dog" / "metadata.jsonl").write_text("[" * 100_000)
    assert list_folder(root).classes == ("cat", "dog")


def test_a_link_in_a_circle_ends(tmp_path):
    root = plain_folder(tmp_path, 2)
    os.symlink(root / "cat", root / "cat" / "again")
    assert len(list_folder(root).files) == 4


def test_linked_class_folders_count(tmp_path):
    plain_folder(tmp_path / "real", 1)
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        os.symlink(tmp_path / "real" / name, tmp_path / "linked" / name)
    assert list_folder(tmp_path / "linked").classes == ("cat", "dog")


def test_a_wrong_folder_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FolderError, match="does not exist"):
        list_folder(tmp_path / "no")
    picture(0).save(tmp_path / "x.png")
    with pytest.raises(FolderError, match="is a file"):
        list_folder(tmp_path / "x.png")
    with pytest.raises(FolderError, match="images, but no class folders"):
        list_folder(tmp_path)
    (tmp_path / "___").mkdir()
    picture(0).save(tmp_path / "___" / "x.png")
    with pytest.raises(RecipeError, match="no words in its name"):
        list_folder(tmp_path)


def test_a_file_name_that_is_no_text_can_be_read_and_shown(tmp_path):
    root = plain_folder(tmp_path, 1)
    odd = os.fsencode(root / "cat") + b"/caf\xe9\n.png"
    picture(77).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", odd)
    paths = [image.file.path for image in scan(root).images]
    assert len(paths) == 3
    assert any(show(path).endswith("caf\\udce9\\n.png") for path in paths)
