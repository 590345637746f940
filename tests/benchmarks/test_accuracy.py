"""The accuracy benchmark from its command line: rows, tables, and what a second call, or one after a kill, still does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import accuracy
import pytest
from classification.results import Rows, digest

from sgid_transforms import VariantStore

SCRIPT = Path(accuracy.__file__)
SMALL = ["--steps", "2", "--batch-size", "4", "--threads", "1"]
QUICK = ["--generator-steps", "4", "--strength", "0.3", "0.6", "--filter", "none", "--k", "2"]


def arguments(task, out, *more):
    return ["--data", str(task), "--out", str(out), "--n", "2", *SMALL, *more]


def read(out):
    return Rows(out / "runs.csv", accuracy.FIELDS).read()


@pytest.fixture(scope="module")
def finished(task_folder, tmp_path_factory):
    """Three methods, one of them with variants of the bundled model, judged."""
    out = tmp_path_factory.mktemp("finished")
    more = ["--seeds", "0", "--methods", "none", "cutmix", "sgid:p=1", "--judge", "clip:tiny", *QUICK]
    accuracy.main(arguments(task_folder, out, *more))
    return out, more


def test_a_row_says_what_was_done(finished):
    rows = {row["method"]: row for row in read(finished[0])}
    assert list(rows) == ["none", "cutmix", "sgid:p=1"]
    for row in rows.values():
        assert (row["n"], row["seed"], row["steps"], row["batch_size"], row["measured_on"]) == ("2", "0", "2", "4", "test")
        assert row["images"] == "9"
        assert float(row["accuracy"]) * 9 / 100 == pytest.approx(round(float(row["accuracy"]) * 9 / 100), abs=1e-3)
        assert float(row["seconds"]) > 0
    assert rows["none"]["recipe"] == rows["none"]["replaced"] == ""
    sgid = rows["sgid:p=1"]
    assert (sgid["p"], sgid["k"], sgid["rejected"]) == ("1.0", "2", "0")
    assert float(sgid["replaced"]) == 1.0  # every image of every step was a stored variant
    assert len({row["run"] for row in rows.values()}) == 3


def test_variants_are_made_once_for_each_image(finished):
    stores = list((finished[0] / "subsets").glob("*/variants"))
    assert [store.parent.name.split("-", 1)[1] for store in stores] == ["n2-s0-auto"]
    recipe = next(row["recipe"] for row in read(finished[0]) if row["recipe"])
    assert VariantStore(stores[0]).count(recipe) == 3 * 2 * 2  # classes, images of each, variants of each


def test_variants_are_judged_beside_randaugment(finished):
    (row,) = Rows(finished[0] / "views.csv", accuracy.VIEW_FIELDS).read()
    assert (row["originals"], row["each"], row["judge"]) == ("6", "2", "clip:tiny")
    assert 0 <= float(row["agreement_variants"]) <= 1
    assert 0 < float(row["distance_variants"]) <= 2
    assert 0 < float(row["distance_randaugment"]) <= 2
    assert 1 <= float(row["vendi_variants"]) <= 6


def test_tables_and_plot_are_written(finished):
    text = (finished[0] / "summary.md").read_text()
    assert "| sgid:p=1 | 1 |" in text
    assert "| 2 | sgid:p=1 | 1 |" in text  # what the judge says of its variants
    assert (finished[0] / "summary.png").stat().st_size > 1000


def test_a_second_call_does_nothing_again(finished, task_folder, monkeypatch, capsys):
    out, more = finished
    before = {path: path.read_bytes() for path in out.glob("*.csv")}

    def never(*_, **__):
        raise AssertionError("there is nothing left to do")

    for name in ("train", "make_variants", "judge_views"):
        monkeypatch.setattr(accuracy, name, never)
    accuracy.main(arguments(task_folder, out, *more))
    assert "0 runs done, 3 were there already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.glob("*.csv")} == before


def test_another_setting_is_another_run(finished, task_folder):
    names = {row["run"] for row in read(finished[0])}
    for more in (["--lr", "0.2"], ["--steps", "3"], ["--measure", "rest"], ["--seeds", "1"]):
        parsed = accuracy._parser().parse_args(arguments(task_folder, finished[0], "--methods", "none", *more))
        assert accuracy.run_name(*experiment_of(parsed)) not in names
    parsed = accuracy._parser().parse_args(arguments(task_folder, finished[0], "--methods", "none"))
    assert accuracy.run_name(*experiment_of(parsed)) in names


def experiment_of(parsed):
    """The first run of parsed arguments."""
    experiment, runs = accuracy.plan(parsed)
    return experiment, runs[0]


def test_the_rest_of_the_training_images_can_be_measured(task_folder, tmp_path):
    accuracy.main(arguments(task_folder, tmp_path, "--seeds", "0", "--methods", "none", "--measure", "rest"))
    (row,) = read(tmp_path)
    assert (row["measured_on"], row["images"]) == ("rest", "6")  # 12 images, 2 of each of 3 classes were drawn


def test_a_killed_benchmark_goes_on_with_the_runs_that_are_missing(task_folder, tmp_path, capsys):
    more = ["--seeds", *map(str, range(40)), "--methods", "none", "mixup"]
    command = [sys.executable, str(SCRIPT), *arguments(task_folder, tmp_path, *more)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # the first run is done, the second one is under way
        process.send_signal(signal.SIGKILL)
    assert line.startswith("1/80 n=2 seed=0 none:")
    done = read(tmp_path)
    assert 1 <= len(done) < 80
    few = [*arguments(task_folder, tmp_path), "--seeds", "0", "1", "--methods", "none", "mixup"]
    there = sum(row["seed"] in ("0", "1") for row in done)
    accuracy.main(few)
    assert f"{4 - there} runs done, {there} were there already" in capsys.readouterr().out
    rows = read(tmp_path)
    assert rows[: len(done)] == done
    assert len({row["run"] for row in rows}) == len(rows)


def test_several_processes_give_the_same_results(task_folder, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    more = ["--seeds", "0", "--methods", "none", "randaugment", "--dtype", "float32"]
    accuracy.main(arguments(task_folder, alone, *more))
    accuracy.main(arguments(task_folder, together, *more, "--jobs", "2"))
    assert {(row["run"], row["accuracy"]) for row in read(alone)} == {(row["run"], row["accuracy"]) for row in read(together)}


def test_a_killed_benchmark_takes_its_processes_along(task_folder, tmp_path):
    more = ["--seeds", *map(str, range(40)), "--methods", "none", "mixup", "--jobs", "2"]
    command = [sys.executable, str(SCRIPT), *arguments(task_folder, tmp_path, *more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"1/80 ")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # ends with the last process that holds the pipe


def test_an_unknown_method_ends_with_a_sentence(task_folder, tmp_path):
    with pytest.raises(SystemExit, match="method 'magic' is unknown"):
        accuracy.main(arguments(task_folder, tmp_path, "--methods", "magic"))


# --- the file of rows


def test_rows_are_added_once_and_read_back(tmp_path):
    rows = Rows(tmp_path / "deep" / "rows.csv", ("name", "note"))
    assert rows.read() == []
    rows.append({"name": "a", "note": 'with, comma and "quotes"'})
    rows.append({"name": "b", "note": ""})
    rows.append({"name": "a", "note": "again"})
    assert rows.read() == [{"name": "a", "note": 'with, comma and "quotes"'}, {"name": "b", "note": ""}]


@pytest.mark.parametrize("left", ["nam", "name,note\na,1\nb,", "name,note\na,1\nb,2"])
def test_what_a_killed_writer_left_of_a_line_is_no_row(tmp_path, left):
    path = tmp_path / "rows.csv"
    path.write_text(left)
    rows = Rows(path, ("name", "note"))
    before = rows.read()
    assert all(row["name"] == "a" for row in before)
    rows.append({"name": "c", "note": "3"})
    assert rows.read() == [*before, {"name": "c", "note": "3"}]


def test_a_file_of_another_kind_is_not_written_to(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Rows(path, ("name", "note")).append({"name": "c", "note": "3"})
    assert path.read_text() == "other,columns\n1,2\n"


def test_equal_settings_have_equal_digests():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
