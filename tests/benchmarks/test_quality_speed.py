"""Time to quality: the statistics on figures made by hand, and one small run from images to table and plot."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quality_speed
from PIL import Image
from quality_speed import Measured, compare, may_be_equal


def measured(correct: list[int], distance: list[float], seconds: float = 1.0) -> Measured:
    return Measured(correct, distance, [5.0] * len(correct), seconds)


def test_differences_are_taken_image_by_image() -> None:
    """Both lose one variant of the same image: the difference is exactly 0, however noisy the two means are."""
    one, other = measured([1, 0, 1, 1], [10.0, 30.0]), measured([0, 1, 1, 1], [11.0, 31.0, 99.0])
    row = compare(one, other)
    assert row["images"] == 2  # those that both have
    assert (row["agreement"], row["agreement_difference"], row["agreement_error"]) == (75.0, 0.0, 0.0)
    assert (row["diversity"], row["diversity_difference"], row["diversity_error"]) == (20.0, -1.0, 0.0)
    assert row["change"] == 5.0
    assert compare(measured([1, 1, 0, 0], [0.0, 0.0]), other)["agreement_error"] == pytest.approx(75.0)
    assert compare(measured([1, 1], [1.0]), measured([1, 1], [1.0]))["agreement_error"] == math.inf


@pytest.mark.parametrize(
    ("agreement", "diversity", "errors", "equal"),
    [
        (-1.0, -1.0, 0.0, True),
        (-1.1, 5.0, 0.0, False),
        (5.0, -1.1, 0.0, False),
        (-1.4, 0.0, 1.0, True),
        (-1.6, 0.0, 1.0, False),
    ],
)
def test_a_point_may_be_lost_in_both(agreement: float, diversity: float, errors: float, equal: bool) -> None:
    row = {"agreement_difference": agreement, "agreement_error": 0.5, "diversity_difference": diversity, "diversity_error": 0.5}
    assert may_be_equal(row, errors) is equal


def test_more_images_continue_a_measurement() -> None:
    both = measured([1, 0], [10.0], 2.0) + measured([1, 1], [20.0], 3.0)
    assert (both.correct, both.distance, both.seconds) == ([1, 0, 1, 1], [10.0, 20.0], 5.0)


def test_the_space_has_no_configuration_twice_and_none_that_cannot_run() -> None:
    space = quality_speed.search_space("bfloat16")
    assert len(set(space)) == len(space)
    assert {configuration.sampler for configuration in space} == {"dpmsolver++", "ddim", "euler", "lcm"}
    assert {configuration.dtype for configuration in space} == {"bfloat16"}
    assert all(quality_speed.runs_all(configuration, (0.25, 0.75)) for configuration in space)
    assert not quality_speed.runs_all(quality_speed.Configuration("ddim", 3), (0.25, 0.75))


@pytest.fixture(scope="module")
def run(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """A judge that knows nothing, and a margin that everything passes: what is tested is the way through the script."""
    import torch
    from safetensors.torch import save_file

    import classifier

    out = tmp_path_factory.mktemp("quality_speed")
    torch.manual_seed(0)
    save_file(classifier.Classifier().state_dict(), out / "judge.safetensors")
    settings = "--images 2 --final 3 --finalists 1 --timed 4 --rounds 2 --batch-size 4 --threads 1 --dtypes float32"
    paths = ["--data", str(task_folder), "--judge", str(out / "judge.safetensors"), "--out", str(out)]
    arguments = [*settings.split(), "--only", "dpmsolver++ 4 exact", *paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_speed, "MARGIN", 101.0)
        assert quality_speed.main(arguments) == 0
    return out, json.loads((out / "quality_speed.json").read_text()), arguments


def test_one_run_from_images_to_a_winner(run: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, report, _ = run
    result = report["result"]
    assert [row["name"] for row in result["rows"]] == ["ddim 20 float32", "dpmsolver++ 4 exact float32"]
    winner = result["winner"]
    assert winner["name"] == "dpmsolver++ 4 exact float32"
    assert winner["images"] == 3
    assert 0 < winner["unet_rows"] < result["rows"][0]["unet_rows"]
    assert winner["speedup"] > 0  # how fast this machine is, is not tested
    assert min(result["diffusers_ms"], winner["ms"]) > 0
    assert all(0 <= row["agreement"] <= 100 and row["diversity"] > 0 and row["change"] > 0 for row in result["rows"])
    assert quality_speed.recipe_fields(winner) == {
        "sampler": "dpmsolver++",
        "num_inference_steps": 4,
        "guidance_interval": (0.0, 1.0),
        "exact_strength": True,
    }
    assert "dpmsolver++ 4 exact float32 **winner**" in (out / "quality_speed.md").read_text()
    with Image.open(out / "quality_speed.png") as picture:
        assert picture.width > 500


def test_what_is_known_is_not_made_again(run: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run judges nothing; a margin that nothing passes leaves no winner, and says so by its exit code."""
    _, report, arguments = run
    monkeypatch.setattr(quality_speed, "judge_variants", lambda *args: pytest.fail("judged again"))
    monkeypatch.setattr(quality_speed, "MARGIN", -101.0)
    assert quality_speed.main(arguments) == 1
    again = json.loads((Path(arguments[-1]) / "quality_speed.json").read_text())
    assert again["measured"] == report["measured"]
    assert again["result"]["winner"] is None


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality_speed.main(["--data", str(tmp_path), "--judge", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "none does not exist; give --judge" in capsys.readouterr().err
