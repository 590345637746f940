"""The training-loop benchmark: every way runs, and what it says about replaced images is so."""

import json

import loader
import pytest

from image_folders import picture


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    for number, name in enumerate(("cat", "frog")):
        (folder / "train" / name).mkdir(parents=True)
        for other in range(2):
            picture(2 * number + other, 32, 32).save(folder / "train" / name / f"{other}.png")
    settings = "--steps 3 --warmup 1 --batch-size 4 --workers 0 --p 1 --k 1 --strength 0.3 0.4 --device cpu"
    loader.main(["--data", str(folder / "train"), "--json", str(folder / "loader.json"), *settings.split()])
    report = json.loads((folder / "loader.json").read_text())
    assert report["settings"]["k"] == 1
    return {row["way"]: row for row in report["rows"]}


def test_every_way_has_a_rate(rows):
    assert list(rows) == list(loader.WAYS)
    assert all(row["samples/s"] > 0 for row in rows.values())
    assert all("idle" not in row for row in rows.values())  # there is no CUDA device to be idle


def test_images_are_replaced_as_each_way_says(rows):
    assert "replaced" not in rows["none"]
    assert (rows["sgid cold"]["replaced"], rows["sgid warm"]["replaced"]) == (1.0, 1.0)
    assert 1 <= rows["sgid cold"]["generated"] <= 4  # four pictures with one variant each, as far as they were drawn
    assert rows["sgid warm"]["generated"] == 0
    assert rows["sgid queue"]["replaced"] <= 1.0


def test_the_table_compares_with_the_first_way(rows):
    lines = loader.table([{"way": "none", "samples/s": 200.0}, {"way": "sgid warm", "samples/s": 150.0, "replaced": 0.5}])
    assert lines.splitlines()[2:] == ["| none | 200.0 | 100% |  |  |  |", "| sgid warm | 150.0 | 75% |  | 50% |  |"]
