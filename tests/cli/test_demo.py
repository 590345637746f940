"""`sgid demo`, with the bundled models, on fewer images and for fewer steps."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from sgid_transforms.bulk import scan_folder
from sgid_transforms.cli import demo
from sgid_transforms.report import contact_sheet

CLASSES = ("frog", "ship", "truck")


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """Four pictures of three classes."""
    for name in CLASSES:
        shutil.copytree(demo.SAMPLES / name, tmp_path / "samples" / name, ignore=lambda _, names: sorted(names)[4:])
    monkeypatch.setattr(demo, "SAMPLES", tmp_path / "samples")
    return tmp_path / "samples"


def test_the_whole_way_and_a_second_call_that_has_nothing_to_do(sgid, monkeypatch, tmp_path, samples):
    cells = []

    def sheet(rows, **titles):
        cells.extend(cell for row in rows for cell in row)
        return contact_sheet(rows, **titles)

    monkeypatch.setattr("sgid_transforms.report.contact_sheet", sheet)
    code, out, err = sgid("demo", "--out", "here", "-k", 2, "--steps", 2)
    assert (code, "Traceback" in err) == (0, False)
    assert "6 captions and 12 variants made, 0 variants were there" in out
    named = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if " here/" in line and ";" not in line)
    assert set(named) == {"captions", "variants", "contact sheet", "report", "training"}
    assert all((tmp_path / path).exists() for path in named.values())
    assert len(cells) == 6 * 3
    assert None not in cells
    page = (tmp_path / "here" / "report.html").read_text()
    assert page.count("<article") == 6
    results = json.loads((tmp_path / "here" / "training.json").read_text())
    for name in ("without", "with"):
        assert len(results[name]["accuracy"]) == 3
        assert all(0 <= accuracy <= 1 for accuracy in results[name]["accuracy"])
    assert results["with"]["loss"] != results["without"]["loss"]  # variants really reached the training
    assert "not a benchmark" in out
    code, out, _ = sgid("demo", "--out", "here", "-k", 2, "--steps", 2)
    assert code == 0
    assert "0 captions and 0 variants made, 12 variants were there" in out
    assert "already done" in out


def test_without_the_report_extra_all_but_the_report_is_made(sgid, tmp_path, monkeypatch, samples):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, _ = sgid("demo", "--out", "here", "-k", 1, "--steps", 2)
    assert code == 0
    assert "report: left out; a report needs matplotlib: pip install 'sgid-transforms[report]'" in out
    assert "open here/contact-sheet.png" in out
    made = {path.name for path in (tmp_path / "here").iterdir()}
    assert {"contact-sheet.png", "training.json", "variants"} <= made
    assert "report.html" not in made


def test_the_images_that_test_are_never_trained_on(samples):
    train, test = demo.split(scan_folder(samples))
    assert not train & test
    for part in (train, test):
        assert sorted(Path(path).parent.name for path in part) == ["frog", "frog", "ship", "ship", "truck", "truck"]


def test_the_small_network_learns(samples):
    """Six images by heart: what the demo compares is a training that works."""
    train, _ = demo.split(scan_folder(samples))
    done = demo.train_and_test(train, train, [], steps=40)
    assert done["accuracy"] == 1.0
