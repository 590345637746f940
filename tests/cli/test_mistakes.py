"""What users get wrong: each mistake ends in a sentence that says what is wrong, never in a traceback."""

import json

import pytest

from image_folders import picture, plain_folder
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants import layout


def nothing(folder):
    pass


def bad_toml(folder):
    (folder / "r.toml").write_text("strength = [0.2,")


def unknown_field(folder):
    (folder / "r.toml").write_text("strenght = 0.5")


def impossible_steps(folder):
    (folder / "r.toml").write_text("strength = 0.01\nnum_inference_steps = 10\nexact_strength = false")


def text_store(folder):
    (folder / "captions.sqlite").write_text("this is no SQLite file, and long enough to look at" * 100)


def store_is_folder(folder):
    (folder / "captions.sqlite").mkdir()


def variants_is_file(folder):
    (folder / "variants").write_text("x")


def newer_store(folder):
    (folder / "variants").mkdir()
    marker = {"format": 999, "check": layout._marker_check(999)}
    (folder / "variants" / "sgid-variants.json").write_text(json.dumps(marker))


def empty(folder):
    (folder / "nothing").mkdir()


def loose_images(folder):
    (folder / "loose").mkdir()
    picture(1).save(folder / "loose" / "a.png")


def nameless_class(folder):
    plain_folder(folder / "nameless", 1, ("___",))


def names_are_a_list(folder):
    (folder / "names.json").write_text('["cat", "dog"]')


def names_are_broken(folder):
    (folder / "names.json").write_text("{")


def names_twice(folder):
    (folder / "names.json").write_text('{"cat": "tabby", "dog": "hound", "cat": "lynx"}')


def names_in_utf16(folder):
    (folder / "names.json").write_text('{"cat": "tabby"}', encoding="utf-16")


def names_in_toml(folder):
    (folder / "names.TOML").write_text('{"cat": "tabby"}')


def deeper(folder):
    (folder / "data" / "cat" / "deep" / "er").mkdir(parents=True)
    picture(77).save(folder / "data" / "cat" / "deep" / "er" / "a.png")


def names_fit_nothing(folder):
    (folder / "names.json").write_text('{"n01440764": "tench"}')


def letter(folder):
    (folder / "letter.jpg").write_text("Dear reader")


def somebody_elses(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("precious")


def no_pipeline(folder):
    (folder / "model").mkdir()


def real_store(folder):
    (folder / "variants").mkdir()


MISTAKES = [
    # what the user did, how it came about, the command line, a part of the answer
    ("a folder that does not exist", nothing, "generate no-such-folder", "does not exist"),
    ("a file for a folder", nothing, "generate data/cat/0.png", "is a file"),
    ("an empty folder", empty, "generate nothing", "no class folders"),
    ("images without class folders", loose_images, "caption loose", "images, but no class folders"),
    ("a class folder without words in its name", nameless_class, "generate nameless", "no words in its name"),
    ("no folder at all", nothing, "generate", "DATA"),
    ("no variants", nothing, "generate data -k 0", "--variants-per-image"),
    ("a shard past the last", nothing, "generate data --shard 3/2", "shard 3/2 does not exist"),
    ("a shard in words", nothing, "generate data --shard first", "not a share"),
    ("a batch of none", nothing, "generate data --batch-size 0", "--batch-size"),
    ("a recipe that is not there", nothing, "generate data --recipe r.toml", "r.toml"),
    ("a recipe that is no TOML", bad_toml, "generate data --recipe r.toml", "r.toml"),
    ("a slip in a recipe", unknown_field, "generate data --recipe r.toml", "did you mean 'strength'?"),
    ("a recipe that would run no step", impossible_steps, "generate data --recipe r.toml", "raise num_inference_steps"),
    ("recipe and model", bad_toml, "generate data --recipe r.toml --model tiny", "not both"),
    ("a model's folder that is not there", nothing, "generate data --model ./no/such/model", "does not exist"),
    ("a folder that is no model", no_pipeline, "generate data --model ./model", "model_index.json"),
    ("a device that does not exist", nothing, "generate data --device gpu", "is not a device"),
    ("a device that is not here", nothing, "generate data --device cuda:77", "CUDA device"),
    ("a device that cannot compute", nothing, "generate data --device meta", "cannot run"),
    ("class names as a list", names_are_a_list, "generate data --class-names names.json", "not a table of names"),
    ("class names that are no JSON", names_are_broken, "caption data --class-names names.json", "is not JSON"),
    ("two names for a class", names_twice, "caption data --class-names names.json", "names the class 'cat' twice"),
    ("class names that are no UTF-8", names_in_utf16, "caption data --class-names names.json", "is not UTF-8"),
    ("class names in a file that shouts", names_in_toml, "caption data --class-names names.TOML", "is not TOML"),
    ("a model without a name", nothing, "generate data --model=", "model"),
    ("variants among the originals", nothing, "generate data --variants data", "would lie among the originals"),
    ("variants in a class folder", nothing, "generate data --variants data/cat", "would lie among the originals"),
    (
        "variants above a class folder's images",
        deeper,
        "generate data --variants data/cat/deep",
        "would lie among the originals",
    ),
    ("class names of another data set", names_fit_nothing, "caption data --class-names names.json", "is a class folder"),
    ("a text file as caption store", text_store, "caption data", "captions.sqlite"),
    ("a folder as caption store", store_is_folder, "caption data", "captions.sqlite"),
    ("a file as variant store", variants_is_file, "generate data", "File exists"),
    ("a store of a later version", newer_store, "verify", "variants"),
    ("a command that does not exist", nothing, "genrate data", "genrate"),
    ("an option that does not exist", nothing, "generate data --variants-per-picture 3", "--variants-per-picture"),
    ("a preview of a text file", letter, "preview letter.jpg --label cat", "none of the images"),
    ("a preview without a label", nothing, "preview data/cat/0.png", "--label"),
    ("strengths in words", nothing, "preview data/cat/0.png --label cat --strengths low,high", "a list of 1 to 16 numbers"),
    ("a strength above 1", nothing, "preview data/cat/0.png --label cat --strengths 0.5,1.5", "1.5"),
    ("a preview without an ending", nothing, "preview data/cat/0.png --label cat --out sheet", "has no image file ending"),
    ("a store that is not there", nothing, "verify", "no variant store"),
    ("prune without --keep", real_store, "prune", "--keep"),
    ("prune with a recipe that the store does not have", real_store, "prune --keep tiny --yes", "has no variants of it"),
    ("an export over the images", nothing, "export data data", "overlaps"),
    ("an export into somebody else's folder", somebody_elses, "export data out", "holds something else"),
    ("a report without stores", nothing, "report", "no variant store"),
    ("a report without captions", real_store, "report", "no caption store"),
    ("a review without stores", nothing, "review", "no variant store"),
    ("a review without captions", real_store, "review", "no caption store"),
    ("a review of no folder", nothing, "review nowhere", "nowhere is not a folder"),
]


@pytest.mark.parametrize(("prepare", "command", "answer"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_answered_in_a_sentence(sgid, tmp_path, monkeypatch, prepare, command, answer):
    plain_folder(tmp_path / "data", 2)
    prepare(tmp_path)
    code, out, err = sgid(*command.split())
    assert code in (1, 2), out + err
    message = " ".join(err.split("note:")[-1].split())
    assert answer in message.replace("│ ", ""), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 6
    assert not list(tmp_path.glob("data/*/*.tmp"))


def test_nothing_of_somebody_elses_is_touched(sgid, tmp_path):
    plain_folder(tmp_path / "data", 1)
    somebody_elses(tmp_path)
    sgid("export", "data", "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_prune_without_a_match_removes_nothing(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 1)
    fake_sgid("generate", "data", "-k", 1)
    assert fake_sgid("prune", "--keep", "sd-turbo", "--yes")[0] == 1
    assert len(list((tmp_path / "variants" / Recipe().fingerprint).glob("*/*.png"))) == 2
