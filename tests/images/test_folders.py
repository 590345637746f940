import os

import pytest
from torchvision.datasets import ImageFolder

from image_folders import BROKEN, GOOD, own_folder, picture, plain_folder
from sgid_transforms.errors import FolderError, RecipeError
from sgid_transforms.images.folders import list_folder, scan_files, show
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image


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


def test_hidden_files_and_folders_do_not_count(tmp_path):
    root = plain_folder(tmp_path, 1)
    (root / ".cache").mkdir()
    picture(1).save(root / ".cache" / "x.png")
    (root / "cat" / ".hidden").mkdir()
    picture(2).save(root / "cat" / ".hidden" / "x.png")
    (root / "cat" / ".DS_Store").touch()
    listing = list_folder(root)
    assert len(listing.files) == 2
    assert (listing.skipped, listing.ignored) == ((), 0)


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
