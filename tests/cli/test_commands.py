"""What the commands do and print, with fake models."""

import errno
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request

import pytest

from image_folders import BROKEN, GOOD, own_folder, picture, plain_folder
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.cli.output import bar, duration, size, tiny_note
from sgid_transforms.cli.preview import preview
from sgid_transforms.recipe.presets import PRESETS
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore

COMMANDS = ("demo", "caption", "generate", "tune", "preview", "report", "review", "export", "verify", "prune", "pack", "doctor")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_a_screen(sgid, command):
    code, out, err = sgid(*command, "--help")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 42
    assert max(map(len, out.splitlines())) <= 80
    if not command:
        listed = out.partition("Commands:\n")[2].splitlines()[: len(COMMANDS)]
        assert [line.split()[0] for line in listed] == list(COMMANDS)
        assert all(line.endswith(".") and not line.endswith("...") for line in listed)  # no description is cut


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; sys.argv = ['sgid', '--help']\n"
        "from sgid_transforms.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version(sgid):
    assert sgid("--version")[1].startswith("sgid 0.")


def test_generate_lists_what_it_left_out_and_says_so_by_its_exit_code(fake_sgid, tmp_path):
    own_folder(tmp_path / "data")
    code, out, err = fake_sgid("generate", "data", "-k", 2)
    assert code == 3
    for name, reason in BROKEN.items():
        assert any(name in line and reason in line for line in out.splitlines())
    assert "empty_class: it is a class folder without images" in out
    assert f"{2 * GOOD} wanted: {2 * GOOD} made now" in out
    assert "loader=sgid_transforms.images.load_image" in err
    again, out, _ = fake_sgid("generate", "data", "-k", 2)
    assert again == 3
    assert f"0 made now, {2 * GOOD} there already" in out


def test_generate_without_anything_to_complain_of_ends_with_0(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    code, out, err = fake_sgid("generate", "data")
    assert (code, "left out" in out, "note:" in err) == (0, False, False)


def test_json_is_all_of_stdout(fake_sgid, tmp_path):
    own_folder(tmp_path / "data")
    code, out, _ = fake_sgid("generate", "data", "-k", 1, "--json")
    report = json.loads(out)["report"]
    assert code == 3
    assert (report["generated"], report["images"], report["failed"]) == (GOOD, GOOD, [])
    assert {one["path"].rpartition("/")[2] for one in report["captions"]["skipped"]} == {*BROKEN, "empty_class"}
    assert json.loads(fake_sgid("caption", "data", "--json")[1])["report"]["captioned"] == 0
    assert json.loads(fake_sgid("verify", "--json")[1])["ok"] is True
    code, out, _ = fake_sgid("generate", "data", "-k", 3, "--dry-run", "--json")
    assert json.loads(out)["report"]["missing"] == 2 * GOOD


def test_a_dry_run_estimates_and_writes_nothing(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 10)
    code, out, _ = fake_sgid("generate", "data", "-k", 2, "--dry-run")
    assert code == 0
    assert "40 of 40 to make" in out
    assert "measured on 16" in out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_caption_then_generate(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 3)
    assert "6 written now, 0 there already" in fake_sgid("caption", "data")[1]
    assert "0 written now, 6 there already" in fake_sgid("caption", "data")[1]
    assert "captions  0 written now" in fake_sgid("generate", "data", "-k", 1)[1]


def test_verify_finds_damage_and_repairs_it_and_generate_makes_it_again(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    fake_sgid("generate", "data", "-k", 1)
    assert fake_sgid("verify")[:2] == (0, "4 files checked, 0 damaged, 0 foreign\n")
    victim = next(VariantStore(tmp_path / "variants").iter()).path
    victim.write_bytes(victim.read_bytes()[:-9])
    code, out, _ = fake_sgid("verify")
    assert (code, "1 damaged" in out, victim.name in out) == (3, True, True)
    assert victim.exists()
    code, out, _ = fake_sgid("verify", "variants", "--repair")
    assert (code, victim.exists()) == (0, False)
    assert "1 made now" in fake_sgid("generate", "data", "-k", 1)[1]
    assert fake_sgid("verify")[0] == 0


@pytest.mark.parametrize("marked", [True, False])
def test_a_repair_that_cannot_be_done_is_an_error(fake_sgid, monkeypatch, tmp_path, marked):
    """It once reported damaged files of a store on read-only media as moved."""
    plain_folder(tmp_path / "data", 2)
    fake_sgid("generate", "data", "-k", 1)
    victim = next(VariantStore(tmp_path / "variants").iter()).path
    victim.write_bytes(victim.read_bytes()[:-9])
    if not marked:
        (tmp_path / "variants" / "sgid-variants.json").unlink()

    def refuse(path, *arguments, **named):
        raise OSError(errno.EROFS, "Read-only file system", path)

    for name in ("open", "replace", "rename", "link", "unlink", "mkdir", "makedirs"):
        real = getattr(os, name)
        may_read = lambda path, flags, *rest, real=real: real(path, flags) if not flags & os.O_CREAT else refuse(path)  # noqa: E731
        monkeypatch.setattr(os, name, may_read if name == "open" else refuse)
    code, out, err = fake_sgid("verify", "--repair", *(["--json"] if marked else []))
    monkeypatch.undo()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert "could not repair variants" in errors[0]
    assert victim.exists()


def test_a_damaged_variant_that_a_training_replaces_meanwhile_counts_as_repaired(fake_sgid, monkeypatch, tmp_path):
    plain_folder(tmp_path / "data", 2)
    fake_sgid("generate", "data", "-k", 1)
    victim = next(VariantStore(tmp_path / "variants").iter()).path
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-9])
    verify = VariantStore.verify

    def meanwhile(store, *arguments, **named):
        report = verify(store, *arguments, **named)
        victim.write_bytes(whole)
        return report

    monkeypatch.setattr(VariantStore, "verify", meanwhile)
    code, out, _ = fake_sgid("verify", "--repair")
    assert (code, "1 moved to variants/quarantine" in out) == (0, True)


def test_prune_keeps_what_is_to_be_kept_and_removes_only_when_told(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    Recipe(seed=7).to_toml(tmp_path / "old.toml")
    fake_sgid("generate", "data", "-k", 1)
    fake_sgid("generate", "data", "-k", 2, "--recipe", "old.toml")
    store = VariantStore(tmp_path / "variants")
    code, out, _ = fake_sgid("prune", "--keep", "tiny")
    assert (code, "would be removed" in out, "--yes" in out, store.count()) == (0, True, True, 12)
    code, out, _ = fake_sgid("prune", "variants", "--keep", "tiny", "--keep", "old.toml", "--yes")
    assert (code, store.count()) == (0, 12)
    code, out, _ = fake_sgid("prune", "--keep", Recipe().fingerprint, "--yes", "--json")
    assert json.loads(out)["removed"] == {Recipe(seed=7).fingerprint: 8}
    assert (store.count(Recipe()), store.count(Recipe(seed=7))) == (4, 0)


def test_export_writes_class_folders(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    fake_sgid("generate", "data", "-k", 2)
    code, out, _ = fake_sgid("export", "data", "out", "--originals")
    assert code == 0
    assert "8 of 4 images" in out
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 12
    picture(9).save(tmp_path / "data" / "cat" / "new.png")
    code, out, _ = fake_sgid("export", "data", "out")
    assert (code, "cat/new.png: it has no variants" in out) == (3, True)


def test_class_names_reach_the_prompts(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 1, ("n01", "n02"))
    (tmp_path / "names.toml").write_text('n01 = "tabby cat"\nn02 = "bullfrog"\n')
    fake_sgid("generate", "data", "-k", 1, "--class-names", "names.toml")
    store = VariantStore(tmp_path / "variants")
    prompts = {store.get(ref.fingerprint, ref.key, ref.variant).provenance.prompt.partition(",")[0] for ref in store.iter()}
    assert prompts == {"a photo of a tabby cat", "a photo of a bullfrog"}


def test_retry_filtered_forgets_the_rejections(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 1)
    store, recipe = VariantStore(tmp_path / "variants"), Recipe()
    fake_sgid("generate", "data", "-k", 1)
    key = next(store.iter()).key
    store.put_failure(recipe, key, 1, ["label"])
    assert "1 rejected by the filters" in fake_sgid("generate", "data", "-k", 2)[1]
    assert "1 made now" in fake_sgid("generate", "data", "-k", 2, "--retry-filtered")[1]


def test_tiny_says_once_what_it_is_not_made_for(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2, ("tabby", "bulldog"))
    _, _, err = fake_sgid("generate", "data", "-k", 1)
    assert err.count("the bundled model 'tiny' knows the ten classes") == 1
    assert "stabilityai/sd-turbo" in err
    assert "tiny" not in fake_sgid("generate", "data", "-k", 1, "--model", "sd-turbo", "--dry-run")[2]


def test_the_note_names_what_is_strange_and_nothing_else():
    assert tiny_note(["cat", "Dog"], [(32, 32), (24, 20)]) is None
    assert tiny_note([], []) is None
    assert "'sofa' and 1 more" in tiny_note(["tabby", "sofa", "cat"], [])
    large = tiny_note(["cat"], [(32, 32), (400, 600)])
    assert "up to 600 x 400 pixels" in large
    assert "but your data has images" in large


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0314, "31 ms"), (4.25, "4.2 s"), (59.4, "59 s"), (190, "3 min 10 s"), (7500, "2 h 5 min"), (400_000, "4.6 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (12_345_678, "12.3 MB"), (5e15, "5000.0 TB")])
def test_sizes(count, text):
    assert size(count) == text


def test_pack_moves_all_variants_and_nothing_is_made_again(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    assert fake_sgid("generate", "data", "-k", "2")[0] == 0
    code, out, _ = fake_sgid("pack", "--json")
    assert (code, json.loads(out)["packed"]) == (0, 8)
    assert not list((tmp_path / "variants").rglob("*.png"))
    code, out, _ = fake_sgid("generate", "data", "-k", "2", "--json")
    assert (code, json.loads(out)["report"]["generated"], json.loads(out)["report"]["present"]) == (0, 0, 8)
    assert "8 files checked, 0 damaged, 0 foreign" in fake_sgid("verify")[1]
    assert fake_sgid("export", "data", "out")[0] == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8
    code, out, _ = fake_sgid("pack")
    assert (code, out.splitlines()[0][:34]) == (0, "0 files packed; the store has 8 va")


def test_a_changed_text_puts_variants_out_of_date_and_prune_removes_them(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    assert fake_sgid("generate", "data", "-k", "2")[0] == 0
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "tabby_cat")
    assert fake_sgid("generate", "data", "-k", "2")[0] == 0
    _, out, _ = fake_sgid("verify", "variants", "--captions", "captions.sqlite", "--json")
    assert json.loads(out)["outdated"] == 4
    _, out, _ = fake_sgid("prune", "variants", "--keep", "tiny", "--captions", "captions.sqlite", "--json")
    assert (json.loads(out)["outdated"], json.loads(out)["done"]) == (4, False)
    fake_sgid("prune", "variants", "--keep", "tiny", "--captions", "captions.sqlite", "--yes")
    _, out, _ = fake_sgid("verify", "variants", "--captions", "captions.sqlite", "--json")
    assert (json.loads(out)["outdated"], json.loads(out)["report"]["checked"]) == (0, 8)
    _, out, _ = fake_sgid("export", "data", "out", "--json")
    assert json.loads(out)["report"]["variants"] == 8


def test_verify_finds_a_damaged_caption_and_generate_writes_it_again(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 2)
    assert fake_sgid("generate", "data", "-k", "1")[0] == 0
    raw = sqlite3.connect(tmp_path / "captions.sqlite")
    with raw:  # an edit would be welcome, but not with the digest of the old text
        raw.execute("UPDATE captions SET digest = digest + 1 WHERE key = (SELECT min(key) FROM captions)")
    raw.close()
    code, out, _ = fake_sgid("verify", "--captions", "captions.sqlite")
    assert (code, out.splitlines()[0]) == (3, "4 captions checked, 1 damaged")
    code, out, _ = fake_sgid("verify", "--captions", "captions.sqlite", "--json")
    assert (code, json.loads(out)["ok"], len(json.loads(out)["captions"]["damaged"])) == (3, False, 1)
    assert fake_sgid("verify", "--captions", "captions.sqlite", "--repair")[0] == 0
    assert "1 written now" in fake_sgid("generate", "data", "-k", "1")[1]
    code, out, _ = fake_sgid("verify", "--captions", "captions.sqlite")
    assert (code, out.splitlines()[0]) == (0, "4 captions checked, 0 damaged")


@pytest.mark.parametrize("name", ["names.json", "names.toml", "names.TOML"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_files_of_names_may_start_with_a_mark(fake_sgid, tmp_path, name, start):
    plain_folder(tmp_path / "data", 1)
    text = '{"cat": "tabby"}' if name.endswith("json") else 'cat = "tabby"\r\n'
    (tmp_path / name).write_bytes((start + text).encode())
    assert fake_sgid("caption", "data", "--class-names", name)[0] == 0
    assert {record.label for record in CaptionStore(tmp_path / "captions.sqlite")} == {"tabby", "dog"}


def test_a_recipe_may_start_with_a_mark(fake_sgid, tmp_path):
    plain_folder(tmp_path / "data", 1)
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert fake_sgid("generate", "data", "-k", "1", "--recipe", "r.toml")[0] == 0


@pytest.mark.parametrize("option", ["--captions", "--variants", "--recipe", "--class-names"])
def test_a_tilde_means_the_home_folder(fake_sgid, tmp_path, monkeypatch, option):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x").write_text("seed = 3") if option == "--recipe" else None
    (tmp_path / "home" / "x").write_text('{"cat": "tabby"}') if option == "--class-names" else None
    plain_folder(tmp_path / "data", 1)
    assert fake_sgid("generate", "data", "-k", "1", option, "~/x")[0] == 0
    assert (tmp_path / "home" / "x").exists()
    assert not (tmp_path / "~").exists()


def test_ctrl_c_where_nothing_is_at_stake_ends_without_a_traceback(fake_sgid, monkeypatch, tmp_path):
    plain_folder(tmp_path / "data", 1)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("sgid_transforms.bulk.scan_folder", interrupted)
    code, _, err = fake_sgid("export", "data", "out")
    assert (code, "Traceback" in err) == (130, False)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_shows_only_where_something_takes_longer_than_a_second(capsys, monkeypatch, quiet):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    assert list(bar("checking", "file", quiet)(range(3))) == [0, 1, 2]
    assert "checking" not in capsys.readouterr().err
    for _ in bar("checking", "file", quiet)(range(3)):
        now[0] += 2.0
    assert ("checking" in capsys.readouterr().err) == (not quiet)


def test_a_bug_keeps_its_traceback(fake_sgid, monkeypatch, tmp_path):
    plain_folder(tmp_path / "data", 1)
    monkeypatch.setattr("sgid_transforms.bulk.scan_folder", lambda *arguments, **named: 1 / 0)
    monkeypatch.setattr("sys.argv", ["sgid", "generate", "data"])
    from sgid_transforms.cli import main

    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_previewed_at_the_default_strengths(name):
    """The first of them once ran no step of four, so that the documented command failed."""
    default = inspect.signature(preview).parameters["strengths"].default
    for strength in map(float, default.split(",")):
        Recipe.preset(name).replace(strength=strength)


def test_the_review_prints_its_address_and_ends_with_ctrl_c(tmp_path):
    """The real command, its real server, and the signal that a terminal sends."""
    pytest.importorskip("fastapi", reason="the review extra is not installed")
    captions = CaptionStore(tmp_path / "captions.sqlite")
    captions.put(CaptionRecord("ab" * 16, "a cat on a sofa", "cat"))
    captions.close()
    (tmp_path / "variants").mkdir()
    command = [sys.executable, "-m", "sgid_transforms.cli", "review", "--scorer", "none", "--name", "anna"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().removeprefix("1 originals: ").strip()
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            assert b"<h1>Review</h1>" in opener.open(address, timeout=20).read()
            page = address.partition("?")[0]
            assert json.load(opener.open(f"{page}api/start", timeout=20))["who"] == "anna"
            assert page.startswith("http://127.0.0.1:")
        finally:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out.splitlines()[-1], err) == (0, "stopped", "")


def test_the_shares_of_a_slurm_array_make_what_one_command_makes(fake_sgid, tmp_path, monkeypatch):
    plain_folder(tmp_path / "data", 8)
    assert fake_sgid("generate", "data", "-k", 1, "--variants", "whole")[0] == 0
    for task in range(3):
        for name, value in (("ID", task), ("MIN", 0), ("MAX", 2), ("COUNT", 3)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert fake_sgid("generate", "data", "-k", 1, "--variants", "shares", "--shard", "auto")[0] == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / store).rglob("*.png")} for store in ("whole", "shares")]
    assert len(files[0]) == 16
    assert files[0] == files[1]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    code, _, err = fake_sgid("generate", "data", "--shard", "auto")
    assert (code, "has gaps" in err) == (2, True)
