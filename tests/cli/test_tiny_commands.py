"""Commands that need real models, with the bundled ones; what these models make of a picture does not matter here."""

import json

import pytest
from PIL import Image

from image_folders import BROKEN, GOOD, own_folder, plain_folder
from sgid_transforms.cli import doctor
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe

SMALL = ("-k", 1, "--batch-size", 4)


def checks_by_name(out):
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_generate_report_and_preview(sgid, tmp_path):
    plain_folder(tmp_path / "data", 2, ("frog", "ship"))
    Recipe(strength=0.4, num_inference_steps=5).to_toml(tmp_path / "r.toml")
    code, out, err = sgid("generate", "data", "--recipe", "r.toml", *SMALL)
    assert (code, "4 wanted: 4 made now" in out, "note:" in err) == (0, True, False)

    code, out, _ = sgid("report", "--recipe", "r.toml", "--json", "--title", "Mine", "--out", "pages/mine.html")
    figures = json.loads(out)["figures"]
    assert (code, figures["originals_in_store"], figures["variants_in_store"], figures["scorer"]) == (0, 4, 4, "tiny")
    assert 0 <= figures["overall"]["agreement"] <= 1
    page = (tmp_path / "pages" / "mine.html").read_text()
    assert page.count("<article") == 4
    assert "<title>Mine</title>" in page
    code, out, _ = sgid("report", "--recipe", "r.toml", "--scorer", "none")
    assert (code, out) == (0, "4 originals with 4 variants: report.html\n")

    picture = "data/frog/0.png"
    code, out, _ = sgid("preview", picture, "--label", "frog", "--recipe", "r.toml", "--strengths", "0.4,1", "--guidances", "3")
    assert (code, "prompt: a photo of a frog" in out) == (0, True)
    with Image.open(tmp_path / "preview.png") as sheet:
        assert sheet.width == 3 * 134 + 6  # the original and two strengths
        assert 134 < sheet.height < 2 * 134  # one row
    code, out, _ = sgid("preview", picture, "--label", "frog", "--caption", "green on a leaf", "--out", "new/sheet.webp")
    assert (code, "prompt: a photo of a frog, green on a leaf" in out) == (0, True)
    with Image.open(tmp_path / "new" / "sheet.webp") as sheet:
        assert sheet.width == 5 * 134 + 6


def test_tune_chooses_a_recipe_that_generate_takes(sgid, tmp_path):
    plain_folder(tmp_path / "data", 2, ("frog", "ship"))
    code, out, err = sgid("tune", "data", "--budget", 0, "--sample", 2, "-k", 2, "--batch-size", 4)
    assert (code, "Your recipe stays" in out, "(yours)" in out) == (0, True, True)
    assert sorted(path.name for path in (tmp_path / "tuned").glob("*.png")) == ["front.png", "sheet-1-chosen.png"]
    assert Recipe.from_toml(tmp_path / "tuned" / "recipe.toml") == Recipe.for_model("tiny")
    code, out, _ = sgid("tune", "data", "--budget", 0, "--sample", 2, "-k", 2, "--json")
    found = json.loads(out)
    assert (code, found["tried"], len(found["points"])) == (0, 0, 1)
    assert found["points"][0]["fingerprint"] == Recipe.for_model("tiny").fingerprint
    assert sgid("tune", "data", "-k", 1)[0] == 2
    code, _, err = sgid("tune", "data", "--judge", "data")
    assert (code, "the classifier 'data' cannot be loaded" in err) == (1, True)


def test_a_new_users_path_with_files_of_every_kind(sgid, tmp_path):
    own_folder(tmp_path / "data")
    code, out, err = sgid("generate", "data", *SMALL)
    assert code == 3
    assert f"{GOOD} wanted: {GOOD} made now" in out
    for name, reason in BROKEN.items():
        assert any(name in line and reason in line for line in out.splitlines())
    assert "empty_class" in out
    assert err.count("the bundled model 'tiny' knows") == 1
    assert "600 x 400 pixels" in err
    code, out, _ = sgid("report", "--json", "--out", "own.html")
    figures = json.loads(out)["figures"]
    assert (code, figures["variants_in_store"], figures["overall"]["originals"]) == (0, GOOD, GOOD)
    assert "original not found" not in (tmp_path / "own.html").read_text()
    code, out, _ = sgid("export", "data", "out", "--originals", "--json")
    assert (code, json.loads(out)["report"]["variants"]) == (3, GOOD)
    for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines():
        assert load_image(tmp_path / "out" / json.loads(line)["file_name"]).mode == "RGB"


def test_doctor_finds_everything_in_order_here(sgid, tmp_path):
    code, out, _ = sgid("doctor", "--json")
    found = checks_by_name(out)
    assert {"python", "torch", "diffusers", "typer", "cpu", "cuda", "attention", "xformers", "disk", "hub", "model"} <= set(
        found
    )
    assert "loads and makes a picture" in found["model"]["detail"]
    assert "kernel" in found["attention"]["detail"]
    problems = [check for check in json.loads(out)["checks"] if check["status"] == "problem"]
    assert (code == 0) == json.loads(out)["ok"] == (not problems)
    assert all(check["advice"] for check in problems)
    assert list(tmp_path.iterdir()) == []  # it writes nothing


def test_doctor_says_what_to_do_about_each_problem(sgid, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 10**6)
    (tmp_path / "captions.sqlite").write_text("no database, but long enough to be looked at " * 100)
    code, out, _ = sgid("doctor", "--model", "./no/such/model")
    assert code == 1
    lines = out.splitlines()
    for name, advice in (("disk:", "make room"), ("captions:", "--captions"), ("model:", "check the name")):
        index = next(number for number, line in enumerate(lines) if line.startswith(f"problem  {name}"))
        assert advice in lines[index + 1]
    assert lines[-1] == "5 problems"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ("2.14.1+cu130", "ok"),
        ("2.7.0a0+git1234", "ok"),
        ("10.0", "ok"),
        ("2.5.9", "problem"),
        ("0.15", "problem"),
        (None, "problem"),
    ],
)
def test_doctor_compares_versions(monkeypatch, found, status):
    monkeypatch.setattr(doctor, "_version", {"torch": found, "jinja2": "2.0"}.get)
    checks = {check.name: check for check in doctor.check_versions()}
    assert checks["torch"].status == status
    assert checks["torch"].advice == ("" if status == "ok" else "pip install 'torch>=2.6'")
    assert checks["jinja2"].detail.startswith("2.0 is installed, >=3.1 is needed")
    assert (checks["peft"].status, checks["peft"].advice) == ("note", "pip install 'sgid-transforms[lora]'")
    assert "pytest" not in checks  # what only developers need
