"""Samples per second of a training loop: what the augmentation costs, with no variants yet, with all of them, and in between.

    python benchmarks/loader.py                                     # the bundled pictures, tiny, a small ResNet
    python benchmarks/loader.py --service 14                        # what the service costs beside the generator alone
    python benchmarks/loader.py --data FOLDER --model resnet50 --size 224 --generator stabilityai/sd-turbo --device cuda \\
        --workers 8 --batch-size 64 --steps 200 --warmup 20

  none         random crop and flip
  randaugment  the same, and RandAugment
  sgid cold    SGIDAugment before the crop, on empty stores: on_miss="generate", each variant is made while the loop waits
  sgid queue   the same on empty stores: on_miss="queue", the loop trains on originals while a service makes variants
  sgid warm    the same after all variants were made: on_miss="original"

Every way trains the same model on images in the same order. Steps are timed after ``--warmup`` others, until the device has
finished. On CUDA ``idle`` is the share of that time in which the device was not busy with a training step, by events. Captions
are made beforehand, as in a real training.

``--service ROUNDS`` compares variants per second of two ways to the same variants: one pass of a `DataLoader` with workers over
an `SGIDDataset` on an empty store, through the service, and the same requests handed to a `Generator` in one call. Models are
loaded and warmed up beforehand; the ways take turns, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from classification.models import build_model
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sgid_transforms import GenerationRequest, GenerationResult, Generator, Recipe, SGIDAugment, SGIDDataset, VariantStore
from sgid_transforms.building.builder import Builder
from sgid_transforms.building.wanted import Wanted
from sgid_transforms.images.keys import to_uint8_chw

WAYS = ("none", "randaugment", "sgid cold", "sgid queue", "sgid warm")
SAMPLES = Path(__file__).parents[1] / "src" / "sgid_transforms" / "assets" / "samples"


def transform_of(size: int, *, randaugment: bool = False) -> Any:
    """PIL image to float tensor ``(3, size, size)``."""
    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if randaugment:
        steps.append(v2.RandAugment())
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def sgid_of(args: argparse.Namespace, folder: Path, on_miss: str) -> SGIDAugment:
    recipe = Recipe.for_model(args.generator, **({"strength": tuple(args.strength)} if args.strength else {}))
    return SGIDAugment(
        recipe=recipe,
        captions=args.captions,
        variants=folder,
        p=args.p,
        variants_per_image=args.k,
        on_miss=on_miss,
        device=args.device,
    )


def loader_of(dataset: Any, args: argparse.Namespace) -> DataLoader[Any]:
    """As many batches as steps, the same images in the same order for all ways."""
    count = (args.warmup + args.steps) * args.batch_size
    sampler = RandomSampler(dataset, replacement=True, num_samples=count, generator=torch.Generator().manual_seed(0))
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=args.device.startswith("cuda"),
        persistent_workers=False,
    )


def train(loader: DataLoader[Any], classes: int, args: argparse.Namespace) -> dict[str, float]:
    """Run the loop; samples per second, and on CUDA the device's idle share."""
    torch.manual_seed(0)
    cuda = args.device.startswith("cuda")
    model = build_model(args.model, classes).to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    events: list[tuple[Any, Any]] = []
    started = time.perf_counter()
    for step, (images, labels) in enumerate(loader):
        if step == args.warmup:
            if cuda:
                torch.cuda.synchronize()
            events.clear()
            started = time.perf_counter()
        images = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(args.device, non_blocking=True)
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        if cuda:
            pair[0].record()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if cuda:
            pair[1].record()
            events.append((pair[0], pair[1]))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    figures = {"samples/s": args.steps * args.batch_size / seconds}
    if cuda:
        busy = sum(start.elapsed_time(stop) for start, stop in events) / 1000
        figures["idle"] = max(0.0, 1 - busy / seconds)
    return figures


def measure(ways: Sequence[str], args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each way."""
    plain = ImageFolder(args.data)
    args.captions = folder / "captions.sqlite"
    if any(way.startswith("sgid") for way in ways):
        sgid_of(args, folder / "none", "original").prepare(plain, progress=False)
    for way in ways:
        if not way.startswith("sgid"):
            dataset = ImageFolder(args.data, transform_of(args.size, randaugment=way == "randaugment"))
            yield {"way": way, **train(loader_of(dataset, args), len(plain.classes), args)}
            continue
        on_miss = {"sgid cold": "generate", "sgid queue": "queue", "sgid warm": "original"}[way]
        store = folder / way.replace(" ", "-")
        sgid = sgid_of(args, store, on_miss)
        if way == "sgid warm":
            fill(plain, args, store)
        with ExitStack() as stack:
            if on_miss != "original":
                stack.enter_context(sgid.serve(max_batch=args.generator_batch))
            loader = loader_of(SGIDDataset(plain, sgid, transform_of(args.size)), args)
            figures = train(loader, len(plain.classes), args)
        stats = sgid.stats()
        replaced = stats.hits
        if on_miss == "generate":  # all that were gated, but for those that have no variant
            replaced = stats.gated - stats.filtered - stats.failed - stats.unavailable
        yield {"way": way, **figures, "replaced": replaced / stats.seen, "generated": stats.generated}


def fill(dataset: Any, args: argparse.Namespace, store: Path) -> None:
    """Make all variants of all images, as ``sgid generate`` does."""
    from sgid_transforms.bulk import Models, generate_folder, scan_folder
    from sgid_transforms.captions import CaptionStore
    from sgid_transforms.variants import VariantStore

    recipe = sgid_of(args, store, "original").recipe
    report = generate_folder(
        scan_folder(args.data), recipe, CaptionStore(args.captions), VariantStore(store), count=args.k,
        models=Models(device=args.device, batch_size=args.generator_batch),
    )  # fmt: skip
    if report.failed:
        raise SystemExit(f"{len(report.failed)} variants could not be made: {report.failed[0]}")


class Recorder:
    """Stands in for a generator: notes what it is asked for, and makes nothing."""

    def __init__(self, generator: Any) -> None:
        self.tokenizer, self.max_tokens = generator.tokenizer, generator.max_tokens
        self.requests: list[GenerationRequest] = []

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        self.requests += requests
        return [GenerationResult(None, "not made", failed=True) for _ in requests]


def service_efficiency(rounds: int, args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Variants per second through the service and by a direct call, and their ratio, for each round."""
    plain = ImageFolder(args.data)
    args.captions, args.p, args.k = folder / "captions.sqlite", 1.0, 1
    base = sgid_of(args, folder / "none", "original")
    base.prepare(plain, progress=False)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    rows = []
    for number in range(rounds + 1):  # the first one warms both ways up
        recipe = base.recipe.replace(seed=number)
        store = folder / f"round-{number}"
        sgid = SGIDAugment(
            recipe=recipe, captions=args.captions, variants=store, p=1.0, variants_per_image=1, device=args.device
        )
        # As new as the service's own: a generator keeps the prompts that it has encoded.
        generator = Generator.from_recipe(recipe, args.device, batch_size=args.generator_batch)
        recorder = Recorder(generator)
        wanted = [Wanted(sgid.key_of(image), 0, to_uint8_chw(image)) for image, _ in plain]
        others = [replace(one, variant=1) for one in wanted[:64]]  # they warm both models up
        recording = Builder(recipe, recorder, VariantStore(folder / "recorded"), base.captions)
        recording(wanted)
        requests, recorder.requests = recorder.requests, []
        recording(others)
        loader = DataLoader(SGIDDataset(plain, sgid, to_tensor), batch_size=args.batch_size, num_workers=args.workers)

        def served(sgid: SGIDAugment = sgid, loader: DataLoader[Any] = loader, others: Any = others) -> float:
            with sgid.serve(max_batch=args.batch_size, batch_size=args.generator_batch) as service:
                service.client.generate(others)
                start = time.perf_counter()
                for _ in loader:
                    pass
                return time.perf_counter() - start

        def direct(generator: Generator = generator, warm_up: Any = recorder.requests, requests: Any = requests) -> float:
            generator(warm_up)
            start = time.perf_counter()
            generator(requests)
            return time.perf_counter() - start

        seconds = {way: way() for way in ((served, direct) if number % 2 else (direct, served))}
        if number:
            assert sgid.stats().generated == len(requests), sgid.stats()
            rows.append({"service": len(requests) / seconds[served], "direct": len(requests) / seconds[direct]})
            rows[-1]["ratio"] = rows[-1]["service"] / rows[-1]["direct"]
            print("  ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; what a way does not have is left empty."""
    first = rows[0]["samples/s"]
    lines = [
        f"| way | samples/s | of {rows[0]['way']} | device idle | images replaced | variants made meanwhile |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        idle = f"{row['idle']:.0%}" if "idle" in row else ""
        replaced = f"{row['replaced']:.0%}" if "replaced" in row else ""
        rate = row["samples/s"]
        lines.append(f"| {row['way']} | {rate:.1f} | {rate / first:.0%} | {idle} | {replaced} | {row.get('generated', '')} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=SAMPLES, help="folder of class folders; default: the bundled pictures")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--model", default="small-resnet", help="small-resnet, a torchvision name, or timm/NAME")
    add("--size", type=int, default=32, help="side of the model's input, in pixels")
    add("--batch-size", type=int, default=64)
    add("--steps", type=int, default=30)
    add("--warmup", type=int, default=3, help="steps before those that count")
    add("--workers", type=int, default=2)
    add("--amp", action="store_true", help="train in bfloat16 by autocast")
    add("--generator", default="tiny", help="tiny, or a diffusers checkpoint")
    add("--generator-batch", type=int, default=16)
    add("--strength", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: the model's preset")
    add("--p", type=float, default=0.5, help="probability that an image is replaced")
    add("--k", type=int, default=4, help="variants per image")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=0, help="torch threads of the training; 0: torch's own choice")
    add("--service", type=int, default=0, metavar="ROUNDS", help="compare the service with the generator alone instead")
    add("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        if args.service:
            rows = list(service_efficiency(args.service, args, Path(name)))
            ratios = sorted(row["ratio"] for row in rows)
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"through the service: {statistics.median(ratios):.2f} of the generator alone ({spread}, {len(rows)} rounds)")
            return
        for row in measure(args.ways, args, Path(name)):
            rows.append(row)
            print(f"{row['way']}: {row['samples/s']:.1f} samples/s", flush=True)
    print(f"\n{table(rows)}")
    if args.json is not None:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
