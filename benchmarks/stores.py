"""What the stores cost: image formats, the hit path against its yardsticks, and look-ups in large stores.

    python benchmarks/stores.py formats            the table of formats in docs/stores.md
    python benchmarks/stores.py hits               the hit path against decoding the original, and RandAugment
    python benchmarks/stores.py scale --records N  look-ups among N records against 1,000, for both stores
    python benchmarks/stores.py packs --records N  look-ups in packs of 1,000 and of N, and in loose files
    python benchmarks/stores.py writes             put rates

All times are the lowest of many short rounds on one thread, in which all that is compared takes turns: what a busy machine
adds comes and goes, as the documentation of timeit says.
"""

import argparse
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.variants import IMAGE_FORMATS, Provenance, VariantStore, codec, layout

SIZES = (32, 224, 512)
PROVENANCE = Provenance(
    "a photo of a woman, a portrait of a woman in a uniform in front of a flag",
    seed=2**62,
    strength=0.5,
    guidance_scale=4.0,
    model="stabilityai/sd-turbo",
    versions={"diffusers": "0.42.0", "torch": "2.14.1", "transformers": "5.23.0"},
)


def photo(size: int) -> Image.Image:
    """The one photograph that a plotting library brings along, cropped to a square; resampled, as training images are."""
    import matplotlib

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as picture:
        return picture.convert("RGB").crop((0, 44, 512, 556)).resize((size, size), Image.Resampling.LANCZOS)


def microseconds(functions: dict[str, Callable[[], object]], rounds: int = 60, budget: float = 0.004) -> dict[str, float]:
    """Lowest time of each function over rounds in which all of them take turns."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, int(budget / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: min(values) * 1e6 for name, values in times.items()}


def formats() -> None:
    """Size, fidelity and speed of each format."""
    print("| size | format | bytes | PSNR dB | encode us | decode us | digest us |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        image = v2.functional.pil_to_tensor(photo(size))
        encoded = {name: codec.encode(image, name)[0] for name in IMAGE_FORMATS if name != "auto"}
        decoding = microseconds({name: partial(codec.decode_pil, data) for name, data in encoded.items()})
        encoding = microseconds({name: partial(codec.encode, image, name) for name in encoded}, rounds=5)
        digests = microseconds({name: partial(hashlib.sha256, data) for name, data in encoded.items()})
        for name, data in encoded.items():
            error = (codec.decode(data).astype(float) - image.permute(1, 2, 0).numpy()) ** 2
            psnr = 10 * np.log10(255**2 / error.mean()) if error.any() else float("inf")
            figures = f"{psnr:.1f} | {encoding[name]:.0f} | {decoding[name]:.0f} | {digests[name]:.1f}"
            print(f"| {size} | {name} | {len(data)} | {figures} |")


def hits(folder: Path) -> None:
    """A hit in the default format, against what a training does anyway."""
    print("| size | get_pil us | get_image us | miss us | original JPEG us | RandAugment us |")
    print("| --- | --- | --- | --- | --- | --- |")
    store = VariantStore(folder / "variants", fsync=False)
    augment = v2.RandAugment()
    for size in SIZES:
        picture, key = photo(size), f"{size:032x}"
        picture.save(original := folder / f"{size}.jpg", quality=95)
        store.put("01auto", key, 0, v2.functional.pil_to_tensor(picture), PROVENANCE)

        def decode_original(path: Path = original) -> Image.Image:
            with Image.open(path) as opened:
                return opened.convert("RGB")

        figures = microseconds(
            {
                "get_pil": lambda key=key: store.get_pil("01auto", key, 0),
                "get_image": lambda key=key: store.get_image("01auto", key, 0),
                "miss": lambda key=key: store.get_image("01auto", key, 1),
                "original": decode_original,
                "augment": lambda picture=picture: augment(picture),
            }
        )
        print(f"| {size} | {' | '.join(f'{value:.0f}' for value in figures.values())} |")


def scale(folder: Path, records: int) -> None:
    """Look-ups of random keys, after one warm-up round, among 1,000 and among ``records``."""
    captions = {count: _captions(folder / f"captions-{count}.sqlite", count) for count in (1000, records)}
    _compare("CaptionStore.get", {count: (store.get, _keys(count)) for count, store in captions.items()})
    variants = {count: _variants(folder / f"variants-{count}", count) for count in (1000, records)}
    lookups = {count: (partial(_get, store), _keys(count)) for count, store in variants.items()}
    _compare("VariantStore.get", lookups)
    lookups = {count: (partial(_get_image, store), _keys(count)) for count, store in variants.items()}
    _compare("VariantStore.get_image", lookups)


def packs(folder: Path, records: int) -> None:
    """Look-ups of random keys in packs against loose files, and among many packed ones against few."""
    counts = (1000, records)
    loose = {count: _variants(folder / f"loose-{count}", count) for count in counts}
    packed = {count: _variants(folder / f"packed-{count}", count) for count in counts}
    for count, store in packed.items():
        start = time.perf_counter()
        store.pack()
        files = sum(len(names) for _, _, names in os.walk(store.root))
        print(f"packed {count:,} variants in {time.perf_counter() - start:.1f} s into {files} files", flush=True)
    for name, read in (("contains", _contains), ("get_image", _get_image)):
        _compare(f"packed, {name}", {count: (partial(read, store), _keys(count)) for count, store in packed.items()})
        keys = random.Random(1).sample(_keys(records), 1000)
        ways = {"loose": loose[records], "packed": packed[records]}
        samples = {way: partial(lambda read, keys: [read(key) for key in keys], partial(read, ways[way]), keys) for way in ways}
        figures = {way: value / 1000 for way, value in microseconds(samples, rounds=41, budget=0.001).items()}
        print(f"{name} among {records:,}: {', '.join(f'{way} {value:.1f} us' for way, value in figures.items())}", flush=True)


def _contains(store: VariantStore, key: str) -> object:
    return store.contains("01auto", key, 0) or None


def _get(store: VariantStore, key: str) -> object:
    return store.get("01auto", key, 0)


def _get_image(store: VariantStore, key: str) -> object:
    return store.get_image("01auto", key, 0)


def _compare(name: str, lookups: dict[int, tuple[Callable[[str], object], Sequence[str]]]) -> None:
    samples = {}
    for count, (read, keys) in lookups.items():
        sample = random.Random(0).sample(range(count), 1000)
        chosen = [keys[i] for i in sample]
        assert all(read(key) is not None for key in chosen)
        samples[f"{count:,} records"] = lambda read=read, chosen=chosen: [read(key) for key in chosen]
    figures = {what: value / 1000 for what, value in microseconds(samples, rounds=41, budget=0.001).items()}
    small, large = figures.values()
    print(
        name,
        *(f"{what}: {value:.1f} us" for what, value in figures.items()),
        f"ratio {large / small:.2f}",
        sep="; ",
        flush=True,
    )


def _keys(count: int) -> list[str]:
    return [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(count)]


def _captions(path: Path, count: int) -> CaptionStore:
    store = CaptionStore(path)
    start = time.perf_counter()
    # Sorted, because that builds the same table faster.
    store.put_many(
        CaptionRecord(key, "a photo of a cat that sits on a mat", "cat", 0.25, 0.5, "blip", path=f"train/cat/{key}.png")
        for key in sorted(_keys(count))
    )
    print(f"made {count:,} captions in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
    return store


def _variants(root: Path, count: int) -> VariantStore:
    """Real files of real variants, 8 x 8 pixels, written without the store's care to save time."""
    store = VariantStore(root, fsync=False)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    store.put("01auto", "0" * 32, 0, image, PROVENANCE)
    encoded, provenance = codec.encode(image, "png")[0], PROVENANCE.to_json().encode()
    for shard in range(256):
        os.makedirs(root / "01auto" / f"{shard:02x}", exist_ok=True)
    start = time.perf_counter()
    for key in sorted(_keys(count)):
        name = f"01auto/{key[:2]}/{key}-0"
        descriptor = os.open(f"{root}/{name}.png", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, layout.pack(encoded, provenance, name))
        os.close(descriptor)
    print(f"made {count:,} variants in {time.perf_counter() - start:.1f} s", flush=True)
    return store


def writes(folder: Path) -> None:
    """Variants and captions per second of one process."""
    for fsync in (True, False):
        store = VariantStore(folder / f"variants-{fsync}", fsync=fsync)
        for size in (32, 512):
            image = v2.functional.pil_to_tensor(photo(size))
            start = time.perf_counter()
            for i in range(200):
                store.put("01auto", f"{i:032x}", size, image, PROVENANCE)
            rate = 200 / (time.perf_counter() - start)
            print(f"VariantStore.put, {size} x {size}, fsync={fsync}: {rate:.0f} a second", flush=True)
    captions = CaptionStore(folder / "captions.sqlite")
    for batch in (1, 64, 10_000):
        rounds = max(1, 200 // batch)
        keys = iter(_keys(1_000_000 if batch > 64 else 20_000))
        start = time.perf_counter()
        for _ in range(rounds):
            captions.put_many(CaptionRecord(next(keys) + str(batch), "a cat on a mat", "cat", 0.25) for _ in range(batch))
        rate = rounds * batch / (time.perf_counter() - start)
        print(f"CaptionStore.put_many, {batch} in a batch: {rate:.0f} a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["formats", "hits", "scale", "packs", "writes"])
    parser.add_argument("--records", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "formats":
            formats()
        elif options.what == "hits":
            hits(Path(folder))
        elif options.what == "scale":
            scale(Path(folder), options.records)
        elif options.what == "packs":
            packs(Path(folder), options.records)
        else:
            writes(Path(folder))


if __name__ == "__main__":
    main()
