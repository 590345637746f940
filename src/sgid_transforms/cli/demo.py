"""``sgid demo``: the whole pipeline on the bundled samples, from captions to a trained classifier."""

import json
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sgid_transforms.cli.generate import stoppable
from sgid_transforms.cli.output import INTERRUPTED, duration, say

if TYPE_CHECKING:
    from sgid_transforms.images.folders import Scan

SAMPLES: Final = Path(__file__).resolve().parent.parent / "assets" / "samples"
_SHOWN: Final = 12  # rows of the contact sheet
_SEEDS: Final = 3  # per training
_BATCH: Final = 32


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("sgid-demo"),
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=1, metavar="K", help="Variants per image.")] = 4,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of each training run.")] = 150,
) -> int:
    """Try everything on bundled pictures, without a download.

    On 200 CIFAR-10 images, it makes captions, variants, a contact sheet, an HTML report, and short trainings with and
    without variants, in a few minutes on a CPU. It skips what is done already.
    """
    start = time.perf_counter()
    say("loading PyTorch ...")
    from sgid_transforms.building.address import Address
    from sgid_transforms.bulk import generate_folder, scan_folder
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.images.reading import load_image
    from sgid_transforms.models.clip import CLIPScorer
    from sgid_transforms.recipe.recipe import Recipe
    from sgid_transforms.report import contact_sheet
    from sgid_transforms.report.html import ReportError, check_extra, write_report
    from sgid_transforms.transforms.augment import SGIDAugment
    from sgid_transforms.variants.store import VariantStore

    try:
        check_extra()
        lacking = ""
    except ReportError as error:
        lacking = str(error)
    out.mkdir(parents=True, exist_ok=True)
    recipe, variants = Recipe.for_model("tiny"), VariantStore(out / "variants")
    scan = scan_folder(SAMPLES)
    train, test = split(scan)
    images = [image for image in scan.images if str(image.file.path) in train]
    with closing(CaptionStore(out / "captions.sqlite")) as captions:
        say(f"1/4  captions and {count} variants of {len(images)} training images")
        with stoppable() as stop:
            done = generate_folder(
                replace(scan, images=tuple(images)), recipe, captions, variants, count=count, progress=True, stop=stop
            )
        if done.stopped:
            say("stopped; run the command again to resume")
            return INTERRUPTED
        say(f"     {done.captions.captioned} captions and {done.generated} variants made, {done.present} variants were there")

        say("2/4  contact sheet")
        shown = images[:: max(1, len(images) // _SHOWN)][:_SHOWN]
        known = captions.get_many([image.key for image in shown])
        records, address = [known[image.key] for image in shown], Address(recipe, captions)
        contact_sheet(
            [
                [
                    load_image(image.file.path),
                    *(address.find(variants, record, address.key(record, n) or "", n, pil=True) for n in range(count)),
                ]
                for image, record in zip(shown, records, strict=True)
            ],
            row_titles=[f"{record.label}: {record.caption}" for record in records],
            column_titles=["original", *(f"variant {number}" for number in range(count))],
        ).save(out / "contact-sheet.png")

        say(f"3/4  report{f': left out; {lacking}' if lacking else ''}")
        if not lacking:
            title = "Demo: variants of CIFAR-10 images"
            write_report(out / "report.html", captions, variants, recipe, scorer=CLIPScorer("tiny"), title=title)

        say(f"4/4  training a small network without and with variants: {len(train)} images, {_SEEDS} seeds, {steps} steps each")
        sgid = SGIDAugment(
            recipe=recipe, captions=captions, variants=variants, p=0.5, variants_per_image=count, on_miss="original"
        )
        settings = {"recipe": recipe.fingerprint, "variants_per_image": count, "steps": steps, "seeds": _SEEDS}
        results = _trainings(out / "training.json", settings, train, test, sgid, steps)

    say()
    say(f"accuracy on {len(test)} held-out images, mean of the seeds:")
    for name in ("without", "with"):
        each = ", ".join(f"{100 * one:.0f}" for one in results[name]["accuracy"])
        say(f"  {name + ' variants':<17}{100 * sum(results[name]['accuracy']) / _SEEDS:.1f} %  ({each})")
    say(f"This shows the mechanics and is not a benchmark: on {len(test)} test images, some points are chance.")
    say("The repository's benchmarks/accuracy.py compares variants with classic augmentation.")
    say()
    shown_last = "contact-sheet.png" if lacking else "report.html"
    for name in dict.fromkeys(("captions.sqlite", "variants", "contact-sheet.png", shown_last, "training.json")):
        say(f"{Path(name).stem.replace('-', ' '):<14} {out / name}")
    say(f"\ndone in {duration(time.perf_counter() - start)}; open {out / shown_last}")
    say("next: sgid generate YOUR_FOLDER --dry-run")
    return 0


def split(scan: "Scan") -> tuple[frozenset[str], frozenset[str]]:
    """Paths of the first and of the second half of each class."""
    folders = [[str(image.file.path) for image in scan.images if image.file.folder == name] for name in scan.classes]
    train = frozenset(path for paths in folders for path in paths[: len(paths) // 2])
    return train, frozenset(path for paths in folders for path in paths) - train


def _trainings(
    path: Path, settings: dict[str, Any], train: Collection[str], test: Collection[str], sgid: Any, steps: int
) -> dict[str, Any]:
    """Both trainings, or the stored results of an earlier call with the same settings."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
        if known["settings"] == settings:
            say("     already done; see training.json")
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    results: dict[str, Any] = {"settings": settings}
    for name, first in (("without", []), ("with", [sgid])):
        runs = [train_and_test(train, test, first, steps=steps, seed=seed) for seed in range(_SEEDS)]
        results[name] = {measure: [run[measure] for run in runs] for measure in ("accuracy", "loss", "seconds")}
        say(f"     {name} variants: {duration(sum(results[name]['seconds']))}")
    say(f"     {sgid.epoch_summary()}")
    path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def train_and_test(
    train: Collection[str], test: Collection[str], first: list[Any], *, steps: int, seed: int = 0
) -> dict[str, float]:
    """Train a small network on some of the sample images and test it on others.

    Args:
        train: Paths of the images to train on.
        test: Paths of the images to test on.
        first: Transforms that run before the usual ones, on the training image as it is in the file.
        steps: Optimiser steps.
        seed: Seed of weights, order and augmentation.

    Returns:
        ``accuracy`` on the test images, ``loss`` (mean over the last tenth of the steps) and ``seconds``.
    """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    usual = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    data = ImageFolder(str(SAMPLES), v2.Compose([*first, *usual, *to_tensor]), is_valid_file=train.__contains__)
    loader = DataLoader(data, _BATCH, sampler=RandomSampler(data, replacement=True, num_samples=steps * _BATCH))
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.classes)))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    losses = []
    start = time.perf_counter()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    last = losses[-max(1, steps // 10) :]
    model.eval()
    held_out = ImageFolder(str(SAMPLES), v2.Compose(to_tensor), is_valid_file=test.__contains__)
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(held_out, _BATCH))
    return {"accuracy": right / len(held_out), "loss": sum(last) / len(last), "seconds": seconds}
