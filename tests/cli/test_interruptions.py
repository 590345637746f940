"""Kill `sgid generate` at random moments: whatever was finished stays, nothing of it is made again, nothing is lost."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import interrupted_sgid
import pytest

from image_folders import plain_folder
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.store import VariantStore

IMAGES, VARIANTS = 24, 4
COMMAND = ["generate", "data", "-k", str(VARIANTS)]

# One clean process imports PyTorch, and every command is forked from it: 22 of them start in the time of one.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["sgid_transforms.bulk", "sgid_transforms.cli.app", "interrupted_sgid"])


class Run:
    """One `sgid` process."""

    def __init__(self, folder, command=COMMAND):
        self.events, theirs = context.Pipe()
        self.process = context.Process(target=interrupted_sgid.run, args=(command, folder, theirs))
        self.process.start()
        theirs.close()
        self.seen = []

    def watch(self, count=None):
        """Read that many events, or all until the process ends."""
        while count is None or len(self.seen) < count:
            try:
                self.seen.append(self.events.recv())
                self.events.send("go on")
            except (EOFError, OSError):  # the process has ended
                return False
        return True

    def end(self):
        self.watch()
        self.process.join(60)
        return self.process.exitcode


def content(folder):
    store, recipe = VariantStore(folder / "variants"), Recipe()
    assert store.verify().ok
    images = {(r.key, r.variant): store.get_image(recipe, r.key, r.variant).numpy().tobytes() for r in store.iter(recipe)}
    captions = CaptionStore(folder / "captions.sqlite", readonly=True)
    records = sorted((r.key, r.caption, r.label, r.similarity, r.rank) for r in captions)
    captions.close()
    return images, records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    plain_folder(folder / "data", IMAGES // 2)
    assert Run(folder).end() == 0
    return content(folder)


def made(events):
    return [event for event in events if event.startswith("variant")]


def test_twenty_interruptions_leave_the_store_of_an_uninterrupted_run(tmp_path, uninterrupted):
    plain_folder(tmp_path / "data", IMAGES // 2)
    moments = random.Random(0)
    finished: list[str] = []  # variants of batches whose end was told
    interruptions = 0
    while True:
        run = Run(tmp_path)
        number = moments.choice([signal.SIGINT, signal.SIGKILL])
        if interruptions < 20 and run.watch(moments.randint(1, 6)):
            os.kill(run.process.pid, number)
        code = run.end()
        # Stored for certain is what was told before the last "batch": that one may have been cut short as it was stored.
        again = set(made(run.seen)) & set(finished)
        assert not again, f"made twice: {again}"
        batches = [index for index, event in enumerate(run.seen) if event == "batch"]
        settled = run.seen if code in (0, 130) else run.seen[: batches[-2] + 1] if len(batches) > 1 else []
        finished += made(settled)
        if code == 0:
            break
        assert code in (130, -signal.SIGKILL), (tmp_path / "output.txt").read_text()
        interruptions += 1
    assert interruptions == 20
    assert content(tmp_path) == uninterrupted
    assert len(content(tmp_path)[0]) == IMAGES * VARIANTS


def test_two_shards_side_by_side_give_what_one_run_gives(tmp_path, uninterrupted):
    plain_folder(tmp_path / "data", IMAGES // 2)
    runs = [Run(tmp_path, [*COMMAND, "--shard", f"{number}/2"]) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(Run.end, runs)) == [0, 0], (tmp_path / "output.txt").read_text()
    variants = [made(run.seen) for run in runs]
    assert all(variants)
    assert len(variants[0] + variants[1]) == len({*variants[0], *variants[1]}) == IMAGES * VARIANTS
    assert sum(event == "caption" for run in runs for event in run.seen) == IMAGES / 2  # batches of two: captioned once
    assert content(tmp_path) == uninterrupted


def test_ctrl_c_says_what_it_does_and_how_to_go_on(tmp_path):
    plain_folder(Path(tmp_path, "data"), 6)
    run = Run(tmp_path)
    run.watch(12)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130
    output = (tmp_path / "output.txt").read_text()
    assert "stopping after the current batch" in output
    assert "run the command again" in output
    assert "Traceback" not in output


SLOW = """
import os, signal, sys, time
import sgid_transforms.models.{module} as module
before = module.{name}
def slow(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(600):
        time.sleep(0.05)
    sys.exit("it went on")
module.{name} = slow
from sgid_transforms.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        ("loading", "_from_pretrained", "generate"),
        ("captioner", "resolve_model", "caption"),
        ("clip", "resolve_model", "caption"),
    ],
)
def test_ctrl_c_while_a_model_loads_comes_through_at_once(tmp_path, module, name, command):
    plain_folder(tmp_path / "data", 1)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SLOW.format(module=module, name=name), command, "data", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 29


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(tmp_path, module):
    plain_folder(tmp_path / "data", 1)
    (tmp_path / "first").mkdir()
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('nothing was interrupted')\n"
    (tmp_path / "first" / f"{module}.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, "-c", "from sgid_transforms.cli import main; main()", "generate", "data"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'first'}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may ignore it
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
