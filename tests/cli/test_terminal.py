"""Nothing that data or arguments hold can command the terminal: control characters are escaped wherever they are printed."""

import json
import subprocess
import sys

import pytest

from image_folders import picture, plain_folder
from sgid_transforms.cli.output import note, printable, say, say_json
from sgid_transforms.variants.store import VariantStore

EVIL = "\x1b[31m\x07"


def escaped(*texts):
    """Whether these texts hold no control characters but those of our own lines and bars."""
    return all(char.isprintable() or char in "\n\r" for text in texts for char in text)


def test_names_of_files_and_class_folders(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 1, (f"cat{EVIL}", "dog"))
    (tmp_path / "data" / "dog" / f"letter{EVIL}\n.png").write_text("Dear reader")
    (tmp_path / "data" / f"empty{EVIL}").mkdir()
    for command in (
        ("caption", "data"),
        ("generate", "data", "-k", 1),
        ("generate", "data", "-k", 2, "--dry-run"),
        ("export", "data", f"out{EVIL}"),
        ("export", "data", "out", "--json"),
    ):
        code, out, err = fake_sgid(*command)
        assert code == 3
        assert escaped(out, err), command
        assert "\\x1b[31m" in out or json.loads(out)["report"]["skipped"]
    recipe = next(VariantStore(tmp_path / "variants").iter()).path.parents[1]
    (recipe / f"foreign{EVIL}").touch()
    for command in (("verify",), ("verify", "--json"), ("verify", "--repair")):
        code, out, err = fake_sgid(*command)
        assert (code, escaped(out, err), "foreign" in out) == (0 if "--repair" in command else 3, True, True)


def test_a_caption_and_a_label(sgid, tmp_path):
    picture(1).save(tmp_path / f"a{EVIL}.png")
    arguments = ("--label", f"frog{EVIL}", "--caption", f"green{EVIL}", "--strengths", "0.5", "--guidances", "1")
    code, out, err = sgid("preview", f"a{EVIL}.png", *arguments, "--out", f"{EVIL}.png")
    assert (code, escaped(out, err)) == (0, True)
    assert "green" in out
    assert "\\x1b[31m" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (EVIL,),
        ("generate", "data", f"--{EVIL}"),
        ("generate", "data", "--batch-size", EVIL),
        ("generate", "data", "-k", EVIL),
        ("generate", "data", "--shard", EVIL),
        ("generate", "data", "--device", EVIL),
        ("generate", "data", "--class-names", EVIL),
        ("generate", "data", "--recipe", EVIL),
        ("generate", "data", "--model", f"./{EVIL}"),
        ("generate", EVIL),
        ("preview", EVIL, "--label", "cat"),
        ("preview", "data", "--label", "cat", "--strengths", EVIL),
        ("preview", "data", "--label", "cat", "--out", EVIL),
        ("verify", EVIL),
        ("report", "--variants", EVIL),
        ("doctor", EVIL),
    ],
)
def test_a_bad_value(sgid, tmp_path, monkeypatch, arguments):
    plain_folder(tmp_path / "data", 1)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as at a terminal, typer then takes no colours out
    code, out, err = sgid(*arguments)
    assert code in (1, 2)
    assert escaped(out, err)
    assert err


def test_what_is_logged(tmp_path):
    """Logging is set up in a process of its own, since pytest's handlers stand in this one."""
    (tmp_path / "variants" / "0123456789abcdef01234567" / f"ab{EVIL}").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "sgid_transforms.cli", "verify", "--repair"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "not a usable variant" in done.stderr
    assert escaped(done.stdout, done.stderr)


def test_our_own_newlines_stay_and_what_cannot_be_encoded_is_escaped(capsys):
    assert printable("two\nlines\t\r\x7f\x9b \u202e 猫", "utf-8") == "two\nlines\\t\\r\\x7f\\x9b \\u202e 猫"
    assert printable("猫\udcff", "ascii") == "\\u732b\\udcff"
    say("a\nb")
    note("c")
    note(None)
    assert capsys.readouterr() == ("a\nb\n", "note: c\n")
    say_json({"text": "\x1b\x7f\x9b\u202e猫\n"})
    out = capsys.readouterr().out
    assert escaped(out)
    assert json.loads(out) == {"text": "\x1b\x7f\x9b\u202e猫\n"}
