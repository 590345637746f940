"""The training code of docs/quick-start.md, run as it stands there behind `sgid generate`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from image_folders import own_folder
from job_fakes import fake_models
from sgid_transforms.bulk import generate_folder, scan_folder
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.cli.app import app
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore

PAGE = Path(__file__).parents[2] / "docs" / "quick-start.md"
README = Path(__file__).parents[2] / "README.md"
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("page", [PAGE, README], ids=lambda page: page.stem)
def test_commands_exist_with_their_options(page):
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    makefile = (README.parent / "Makefile").read_text()
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "sgid":
            options = {name for param in COMMANDS[words[0]].params for name in param.opts}
            assert {word for word in words if word.startswith("-")} <= options, line
        elif program == "make":
            assert f"\n{words[0]}:" in makefile
        else:
            assert program in ("", "pip"), line


def test_the_recipe_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text)
    recipe = Recipe.from_toml(tmp_path / "recipe.toml")
    assert (recipe.model, recipe.strength) == ("stabilityai/sd-turbo", (0.3, 0.6))


def test_what_was_generated_is_what_the_training_reads(tmp_path):
    own_folder(tmp_path / "photos")
    recipe = Recipe(strength=(0.3, 0.6))
    recipe.to_toml(tmp_path / "recipe.toml")
    scan = scan_folder(tmp_path / "photos")
    captions = CaptionStore(tmp_path / "captions.sqlite")
    generate_folder(scan, recipe, captions, VariantStore(tmp_path / "variants"), count=4, models=fake_models())
    captions.close()
    for one in scan.skipped:  # the page says that ImageFolder does not take these
        one.path.rmdir() if one.path.is_dir() else one.path.unlink()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    body = "\n".join("    " + line for line in code.splitlines())
    (tmp_path / "train.py").write_text(
        f"def main():\n{body}\n    print(sgid.stats())\n\nif __name__ == '__main__':\n    main()\n"
    )
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, gated, hits, misses = (
        int(re.search(rf"\b{name}=(\d+)", done.stdout)[1]) for name in ("seen", "gated", "hits", "misses")
    )
    assert (seen, misses) == (10, 0)
    assert hits == gated
