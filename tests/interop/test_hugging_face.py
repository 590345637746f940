"""A Hugging Face data set: preparing it, and ``with_transform``."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from augment_fakes import CLASSES, FakeCaptioner, FakeScorer, fake_generator, picture, pil_picture
from sgid_transforms.images.keys import image_key
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset


def test_prepare_with_transform_and_loader(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features(
        {"img": datasets.Image(), "id": datasets.Value("int64"), "label": datasets.ClassLabel(names=CLASSES)}
    )
    columns = {"img": [pil_picture(n) for n in range(6)], "id": list(range(6)), "label": [n % 3 for n in range(6)]}
    data = datasets.Dataset.from_dict(columns, features=kinds)
    sgid = SGIDAugment(
        captions=tmp_path / "c.sqlite",
        variants=tmp_path / "v",
        p=1.0,
        variants_per_image=1,
        generator=fake_generator(tmp_path / "log"),
        captioner=FakeCaptioner(),
        scorer=FakeScorer(),
    )
    to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def transform(batch: dict) -> dict:
        batch = sgid(batch)  # a dict of lists, as it comes
        return batch | {"img": [to_float(image) for image in batch["img"]]}

    augmented = data.with_transform(transform)
    assert sgid.prepare(augmented, progress=False).captioned == 6  # looks past the transform
    assert [sgid.captions.get(image_key(picture(n))).label for n in range(6)] == CLASSES * 2

    batches = list(DataLoader(augmented, batch_size=3))
    assert [batch["id"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert (tmp_path / "log").read_text().split()[1::3] == ["3", "3"]  # one request a batch
    assert not torch.equal(batches[0]["img"][0], to_float(picture(0)))

    ours = DataLoader(SGIDDataset(data, sgid, to_float), batch_size=3)
    for batch, same in zip(ours, batches, strict=True):
        assert torch.equal(batch["img"], same["img"])
    assert sgid.stats().hits == 6
