"""How full the UNet's batches are on each way to a variant, with the bundled model and strengths of a wide range."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torchvision.transforms import v2

from augment_fakes import CLASSES, captioned, pil_picture
from sgid_transforms.building.builder import load_generator
from sgid_transforms.bulk.captioning import scan_folder
from sgid_transforms.bulk.generating import generate_folder
from sgid_transforms.bulk.plan import Models
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset
from sgid_transforms.variants.store import VariantStore

RECIPE = Recipe.for_model("tiny", strength=(0.3, 0.9), caption_from="own")
VARIANTS = 512
LEAST = 0.95


class Pictures:
    """Labelled pictures, each of its own."""

    def __len__(self) -> int:
        return VARIANTS

    def __getitem__(self, index: int) -> Any:
        return pil_picture(index), index % len(CLASSES)


def telling_generator(path: Path, recipe: Recipe, device: str, **options: Any) -> Any:
    """The package's own generator, which writes down what its engine did; it may live in another process."""
    generator: Any = load_generator(recipe, device, **options)
    stream = generator.stream

    def told(pull: Any) -> Any:
        yield from stream(pull)
        done = generator.engine.stats
        path.write_text(json.dumps({"calls": done.unet_calls, "rows": done.unet_rows, "fill": done.fill}))

    generator.stream = told
    return generator


def test_through_the_service_for_two_workers(tmp_path: Path) -> None:
    """Each worker waits for a whole batch; four batches of the model are then under way, as many as it can hold."""
    sgid = SGIDAugment(
        recipe=RECIPE,
        captions=tmp_path / "captions.sqlite",
        variants=tmp_path / "variants",
        p=1.0,
        variants_per_image=1,
        generator=partial(telling_generator, tmp_path / "stats.json"),
    )
    pictures = Pictures()
    sgid.captions.put_many(captioned(*(pictures[n][0] for n in range(VARIANTS))))
    with sgid.serve(device="cpu", batch_size=16):
        loader = DataLoader(SGIDDataset(pictures, sgid, v2.PILToTensor()), batch_size=128, num_workers=2)
        assert sum(len(images) for images, _ in loader) == VARIANTS
    assert sgid.stats().generated == VARIANTS
    done = json.loads((tmp_path / "stats.json").read_text())
    assert done["fill"] >= LEAST, done


def test_through_a_folder_job(tmp_path: Path) -> None:
    for number in range(VARIANTS // 4):
        folder = tmp_path / "data" / CLASSES[number % len(CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        pil_picture(number).save(folder / f"{number}.png")
    captions, variants = CaptionStore(tmp_path / "captions.sqlite"), VariantStore(tmp_path / "variants")
    models = Models("cpu", "tiny", "tiny", generator=partial(telling_generator, tmp_path / "stats.json"))
    report = generate_folder(scan_folder(tmp_path / "data"), RECIPE, captions, variants, count=4, models=models, progress=False)
    assert report.generated == VARIANTS
    done = json.loads((tmp_path / "stats.json").read_text())
    assert done["fill"] >= LEAST, done
