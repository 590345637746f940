"""`sgid generate` on several devices: the same store as on one, whatever happens to their processes."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from image_folders import plain_folder
from job_fakes import FakeCaptioner, FakeGenerator, FakeScorer
from sgid_transforms.bulk import Models, estimate_folder, generate_folder, scan_folder
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.service import fleet
from sgid_transforms.variants.store import VariantStore

RECIPE = Recipe.for_model("tiny")
TWO = ("cpu", "cpu")


def noise(recipe: Recipe, device: str, **options: Any) -> FakeGenerator:
    return FakeGenerator()


def deadly(folder: Path, seed: int, recipe: Recipe, device: str, **options: Any) -> FakeGenerator:
    """Kills its process once, in the middle of a batch, in the first two processes that get that far."""
    left = random.Random(f"{seed} {device} {len(list(folder.iterdir()))}").randrange(1, 20)

    def tell(event: str) -> None:
        nonlocal left
        left -= event.startswith("variant")
        if not left and len(list(folder.iterdir())) < 2:
            (folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return FakeGenerator(tell)


def make(root: Path, name: str, **models: Any) -> tuple[Any, VariantStore]:
    data = root / "data"
    if not data.exists():
        plain_folder(data, 12)
    store = VariantStore(root / name)
    settings = {"captioner": FakeCaptioner(), "scorer": FakeScorer(), "generator": noise, "batch_size": 4} | models
    with_captions = CaptionStore(root / "captions.sqlite")
    report = generate_folder(scan_folder(data), RECIPE, with_captions, store, count=3, models=Models("cpu", **settings))
    with_captions.close()
    return report, store


def contents(store: VariantStore) -> dict[str, bytes]:
    return {str(ref.path.relative_to(store.root)): ref.path.read_bytes() for ref in store.iter(RECIPE)}


def test_two_devices_make_the_store_of_one(tmp_path: Path) -> None:
    _, one = make(tmp_path, "one")
    report, two = make(tmp_path, "two", devices=TWO)
    assert (report.generated, report.failed) == (72, ())
    assert contents(two) == contents(one)
    again, _ = make(tmp_path, "two", devices=TWO)
    assert (again.generated, again.present) == (0, 72)


@pytest.mark.parametrize("seed", range(1))
def test_processes_that_are_killed_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    _, one = make(tmp_path, "one")
    killed = tmp_path / "killed"
    killed.mkdir()
    report, two = make(tmp_path, "two", devices=TWO, generator=partial(deadly, killed, seed))
    assert list(killed.iterdir())
    assert (report.generated, report.failed) == (72, ())
    assert contents(two) == contents(one)


def test_no_process_is_left_after_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fleet.Fleet] = []
    own = fleet.Fleet.stop
    monkeypatch.setattr(fleet.Fleet, "stop", lambda one: made.append(one) or own(one))
    make(tmp_path, "two", devices=TWO)
    (one,) = made
    for member in one._members:
        assert member.service.pid is None
        assert not member.service.alive


def test_an_estimate_measures_all_devices(tmp_path: Path) -> None:
    plain_folder(tmp_path / "data", 3)
    models = Models("cpu", FakeCaptioner(), FakeScorer(), noise, devices=TWO)
    scan, texts = scan_folder(tmp_path / "data"), CaptionStore(tmp_path / "captions.sqlite")
    estimate = estimate_folder(scan, RECIPE, texts, VariantStore(tmp_path / "none"), count=2, models=models)
    assert (estimate.missing, estimate.sampled) == (12, 12)
    assert estimate.seconds > 0
