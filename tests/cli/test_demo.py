"""`sgid demo`, with the bundled models, on fewer images and for fewer steps."""

import json
import shutil
import sys

import pytest

from sgid_transforms.cli import demo, demo_training

CLASSES = ("frog", "ship", "truck")


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """Four pictures of three classes."""
    for name in CLASSES:
        shutil.copytree(demo.SAMPLES / name, tmp_path / "samples" / name, ignore=lambda _, names: sorted(names)[4:])
    monkeypatch.setattr(demo, "SAMPLES", tmp_path / "samples")
    return tmp_path / "samples"


def test_the_whole_way_and_a_second_call_that_has_nothing_to_do(sgid, tmp_path, samples):
    code, out, err = sgid("demo", "--out", "here", "-k", 2, "--steps", 2)
    assert (code, "Traceback" in err) == (0, False)
    assert "6 captions and 12 variants made, 0 variants were there" in out
    named = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if " here/" in line and ";" not in line)
    assert set(named) == {"captions", "variants", "contact sheet", "report", "training"}
    assert all((tmp_path / path).exists() for path in named.values())
    page = (tmp_path / "here" / "report.html").read_text()
    assert page.count("<article") == 6
    results = json.loads((tmp_path / "here" / "training.json").read_text())
    for name in ("without", "with"):
        assert len(results[name]["accuracy"]) == 3
        assert all(0 <= accuracy <= 1 for accuracy in results[name]["accuracy"])
    assert results["with"]["loss"] != results["without"]["loss"]  # variants really reached the training
    assert "no benchmark" in out
    code, out, _ = sgid("demo", "--out", "here", "-k", 2, "--steps", 2)
    assert code == 0
    assert "0 captions and 0 variants made, 12 variants were there" in out
    assert "done before" in out


def test_a_missing_package_is_known_before_the_work(sgid, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = sgid("demo", "--out", "here")
    assert (code, "pip install 'sgid-transforms[report]'" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_the_images_that_test_are_never_trained_on(samples):
    train, test = demo_training.split(samples)
    assert len(train) == len(test) == 6
    assert not set(train) & set(test)
    scan = demo._only(demo_scan(samples), train)
    assert [image.file.label for image in scan.images] == ["frog", "frog", "ship", "ship", "truck", "truck"]


def demo_scan(samples):
    from sgid_transforms.bulk import scan_folder

    return scan_folder(samples)


def test_the_small_network_learns(samples):
    """Six images by heart: what the demo compares is a training that works."""
    train, _ = demo_training.split(samples)
    done = demo_training.train_and_test(samples, train, train, None, steps=40)
    assert done["accuracy"] == 1.0
