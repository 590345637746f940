import importlib.util
import re

import pytest
import torch
from example_run import EXAMPLES, run

from image_folders import BROKEN, GOOD, own_folder, picture, plain_folder
from sgid_transforms.errors import SGIDError
from sgid_transforms.variants.store import VariantStore

SMALL = ("--arch", "mobilenet_v3_small", "--epochs", 1, "--batch-size", 4, "--workers", 1)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A training on images of every size and kind, with broken files among them; every image is to be replaced."""
    folder = tmp_path_factory.mktemp("own")
    own_folder(folder / "data")
    return folder, run("train_classifier.py", folder, "--data", "data", "-p", 1, "-k", 1, "--mix", *SMALL)


def test_an_own_folder_trains_and_what_cannot_be_used_is_listed(own_run):
    _, done = own_run
    assert done.returncode == 3, done.stderr
    for name, reason in BROKEN.items():
        assert any(name in line and reason in line for line in done.stderr.splitlines())
    assert "empty_class: it is a class folder without images" in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"epoch 1/1: loss \d+\.\d{3}, accuracy \d+\.\d% on 2 images", done.stdout)


def test_the_workers_got_variants_from_the_service(own_run):
    folder, done = own_run
    # Ten files, one of them a duplicate; every fourth is kept for testing, and the last batch may be dropped.
    trained = re.search(r"SGID: (\d+) seen, (\d+) gated, (\d+) hits, (\d+) misses", done.stdout)
    seen, gated, hits, misses = map(int, trained.groups())
    assert seen == gated == hits + misses >= 4
    assert 0 < VariantStore(folder / "variants", readonly=True).count() == misses <= GOOD


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The program's ``main``, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("train_classifier", EXAMPLES / "train_classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(example, *arguments):
    return example.main([str(one) for one in (*arguments, *SMALL[:-2], "--workers", 0)])


@pytest.mark.parametrize(("size", "stride"), [(32, 1), (224, 2)])
def test_small_images_get_a_stem_that_leaves_something_of_them(example, size, stride):
    model = example.model_for("resnet18", 3, size).eval()
    assert model.conv1.stride == (stride, stride)
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


def test_without_variants_no_model_and_no_store_is_touched(example, tmp_path, capsys):
    plain_folder(tmp_path / "data", 4)
    plain_folder(tmp_path / "test", 1)
    assert main(example, "--data", "data", "--test", "test", "-p", 0) == 0
    out, err = capsys.readouterr()
    assert "accuracy" in out
    assert err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "test"]


def test_mistakes_are_answered_in_a_sentence(example, tmp_path):
    with pytest.raises(SGIDError, match="nowhere does not exist"):
        main(example, "--data", "nowhere")
    plain_folder(tmp_path / "data", 2)
    (tmp_path / "test" / "bird").mkdir(parents=True)
    picture(1).save(tmp_path / "test" / "bird" / "1.png")
    with pytest.raises(SystemExit, match="other classes"):
        main(example, "--data", "data", "--test", "test", "-p", 0)
