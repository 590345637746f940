"""The recipes of docs/cookbook.md: each runs as printed, in a process and a folder of its own.

Importing torch and diffusers takes longer than a recipe. So one process imports them once, and forks for each recipe.
"""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import typer

import sgid_transforms
from sgid_transforms.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
IMAGES = {"frog": 6, "ship": 2}
LIBRARIES = ("albumentations", "datasets", "kornia", "lightning", "peft", "timm", "webdataset")
COMMANDS = typer.main.get_command(app).commands
# What Lightning's own code does with torch, and its advice for real trainings.
IGNORED = (
    ".*LeafSpec.*is deprecated",
    "The 'train_dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
)


class Cooked(NamedTuple):
    """A recipe: its heading, its program, and the shell commands around it."""

    heading: str
    program: str
    commands: list[str]


def cookbook() -> list[Cooked]:
    sections = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    cooked = []
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(programs) == 1, heading
        shell = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
        cooked.append(Cooked(heading, programs[0], shell.splitlines()))
    return cooked


RECIPES = cookbook()


def words(command: str) -> list[str]:
    """A shell command without variables before it, ``&`` behind it, and comments."""
    parts = shlex.split(command, comments=True)
    return [part for number, part in enumerate(parts) if part != "&" and not ("=" in part and number == 0)]


class Kitchen:
    """A process that has imported what is slow, and runs each program in a fork of itself."""

    _process: "subprocess.Popen[str] | None" = None

    def run(self, folder: Path, *argv: str) -> str:
        """Run ``sgid ...`` or a Python file in a folder; returns what it printed."""
        try:
            code = self._order(json.dumps([str(folder), *argv]))
        except BaseException:  # a time-out, for instance: what still runs must not answer the next recipe
            self.close(seconds=0)
            raise
        printed = (folder / "printed").read_text()
        assert code == "0", printed
        return printed

    def close(self, seconds: float = 10) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with process.stdin, process.stdout:  # type: ignore[union-attr]
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _order(self, line: str) -> str:
        if self._process is None:
            command, pipe = [sys.executable, __file__], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        stdin, stdout = self._process.stdin, self._process.stdout
        print(line, file=stdin, flush=True)
        return stdout.readline().strip()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def kitchen() -> Iterator[Kitchen]:
    made = Kitchen()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a folder ``train``; one class is rarer than the other."""
    samples = Path(sgid_transforms.__file__).parent / "assets" / "samples"
    for name, count in IMAGES.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for path in sorted((samples / name).iterdir())[:count]:
            shutil.copy(path, tmp_path / "train" / name)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.heading)
def test_recipe_is_short(recipe: Cooked) -> None:
    lines = [line for line in recipe.program.splitlines() if line.strip()]
    assert 6 <= len(lines) <= 20
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.heading)
def test_recipe_runs_as_printed(recipe: Cooked, folder: Path, kitchen: Kitchen) -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", recipe.program, re.MULTILINE)
    needed = [*imported, "peft"] if "lora=" in recipe.program else imported
    for library in LIBRARIES:
        if library in needed and importlib.util.find_spec(library) is None:  # importing it here would take too long
            pytest.skip(f"{library} is not installed")
    (folder / "train.py").write_text(recipe.program)
    launchers = []
    for command in map(words, recipe.commands):
        if command[0] == "sgid":
            kitchen.run(folder, *command)
        elif command[0] == "torchrun":
            launchers.append(command[1:])
    printed = torchrun(folder, launchers[0]) if launchers else kitchen.run(folder, "train.py")

    summaries = " ".join(re.findall(r"^SGID: .*$", printed, re.MULTILINE))
    seen, gated, misses, failed = (counted(name, summaries) for name in ("seen", "gated", "misses", "failed"))
    assert seen >= gated > 0
    assert failed == 0
    if "sgid generate" in " ".join(recipe.commands):
        assert misses == 0  # the training finds what was generated
    stored = {path.suffix for path in (folder / "variants").glob("*/*/*")}
    assert stored == {".webp" if "webp" in recipe.program else ".png"}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.commands], ids=lambda recipe: recipe.heading)
def test_commands_have_their_options(recipe: Cooked) -> None:
    for command in map(words, recipe.commands):
        if command[0] == "sgid":
            options = {name for param in COMMANDS[command[1]].params for name in param.opts}
            assert {word for word in command if word.startswith("-")} <= options
        else:
            assert command[0] in ("torchrun", "wait")


def counted(name: str, summaries: str) -> int:
    return sum(map(int, re.findall(rf"(\d+) {name}\b", summaries)))


def torchrun(folder: Path, arguments: list[str]) -> str:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}  # the machine's own name need not resolve
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(folder: str, *argv: str) -> None:
    """In the fork: what `python FILE` or `sgid` does in a folder, with warnings as errors."""
    os.chdir(folder)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ["HF_DATASETS_CACHE"] = os.path.join(folder, "cache")
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    sys.argv = list(argv)
    if argv[0] == "sgid":
        from sgid_transforms.cli import main

        main()
    import torch

    warnings.simplefilter("error")
    for message in IGNORED:
        warnings.filterwarnings("ignore", message)
    torch.manual_seed(0)
    sys.path[0] = folder
    runpy.run_path(argv[0], run_name="__main__")


def serve(orders: IO[str]) -> None:
    """In the process that forks: one line of JSON per run, answered with its exit code."""
    # What they import by name takes most of the time.
    import torchvision.datasets  # noqa: F401
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline  # noqa: F401
    from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor  # noqa: F401

    for order in orders:
        pid = os.fork()
        if pid == 0:
            run(*json.loads(order))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.stdin)
