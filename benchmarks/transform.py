"""A hit of SGIDAugment beside RandAugment, on the same PIL image, in one run.

    python benchmarks/transform.py                                  # 32 and 224 pixels, a photograph and noise
    python benchmarks/transform.py --sizes 224 --rounds 100 --format png

Every image is replaced (p=1) by one of four variants that are in the store already: its key is computed, the variant's file
read, its digest checked, its image decoded. RandAugment is torchvision's (v2), with its defaults. Blocks of calls take turns,
and a row gives the median over the blocks, so that whatever else the machine does meets both. One thread, as in a worker of
a DataLoader.
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from sgid_transforms import CaptionRecord, CaptionStore, Recipe, SGIDAugment, VariantStore, image_key
from sgid_transforms.building.address import Address
from sgid_transforms.variants import Provenance

VARIANTS = 4
PROVENANCE = Provenance("a photo of a woman, a portrait of a woman in a uniform in front of a flag", seed=1, model="tiny")


@dataclass(frozen=True)
class Row:
    """Medians over the rounds.

    Args:
        picture: what the image and its variants show: "photo", or "noise", the worst case of a JPEG decoder.
        size: pixels of a side.
        hit_us: microseconds of a hit.
        randaugment_us: microseconds of RandAugment.
        ratio: of the two, within a round.
        pickle_bytes: size of the pickled transform.
    """

    picture: str
    size: int
    hit_us: float
    randaugment_us: float
    ratio: float
    pickle_bytes: int


def photo(size: int) -> Image.Image:
    """The one photograph that a plotting library brings along, cropped to a square and resampled, as training images are."""
    import matplotlib

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as picture:
        return picture.convert("RGB").crop((0, 44, 512, 556)).resize((size, size), Image.Resampling.LANCZOS)


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))


PICTURES: dict[str, Callable[[int], Image.Image]] = {"photo": photo, "noise": noise}


def compare(folder: Path, picture: str, size: int, image_format: str = "auto", rounds: int = 40, calls: int = 100) -> Row:
    """One row: ``rounds`` blocks of ``calls`` calls for each of the two."""
    image = PICTURES[picture](size)
    recipe = replace(Recipe.for_model("tiny"), image_format=image_format)
    store, captions = VariantStore(folder / "variants", fsync=False), CaptionStore(folder / "captions.sqlite")
    record = CaptionRecord(
        image_key(image), "a caption of some words", label="frog", rank=0.5, scorer="tiny", context="some words"
    )
    captions.put(record)
    address = Address(recipe, captions)
    for variant in range(VARIANTS):
        store.put(recipe, address.key(record, variant), variant, v2.functional.pil_to_tensor(image), PROVENANCE)
    sgid = SGIDAugment(
        recipe=recipe,
        captions=captions,
        variants=store,
        p=1.0,
        variants_per_image=VARIANTS,
        on_miss="original",
    )
    ways: tuple[Callable[[Image.Image], object], ...] = (sgid, v2.RandAugment())
    blocks: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for way, times in zip(ways, blocks, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                way(image)
            if number:  # the first one warms up
                times.append((time.perf_counter() - start) / calls * 1e6)
    stats = sgid.stats()
    if stats.hits != stats.seen:
        raise RuntimeError(f"only {stats.hits} of {stats.seen} calls were hits")
    ratio = statistics.median(hit / other for hit, other in zip(*blocks, strict=True))
    return Row(picture, size, *map(statistics.median, blocks), ratio, len(pickle.dumps(sgid)))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--format", default="auto", help="of the variants: auto, png, jpeg, webp, webp-lossless")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100, help="in a round")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not options.json:
        print("| picture | size | hit us | RandAugment us | ratio | pickle bytes |\n| --- | --- | --- | --- | --- | --- |")
    rows = []
    for picture in options.pictures:
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                row = compare(Path(folder), picture, size, options.format, options.rounds, options.calls)
            rows.append(row)
            figures = f"{row.hit_us:.0f} | {row.randaugment_us:.0f} | {row.ratio:.2f} | {row.pickle_bytes}"
            print(json.dumps(asdict(row)) if options.json else f"| {picture} | {size} | {figures} |", flush=True)
    return rows


if __name__ == "__main__":
    main()
