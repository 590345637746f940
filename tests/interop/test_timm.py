"""timm's loader and transform chain."""

from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from augment_fakes import OWN_CAPTIONS, captioned, fake_generator, image_folder, picture, pil_picture
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset


@pytest.fixture
def sgid(tmp_path: Path) -> SGIDAugment:
    sgid = SGIDAugment(
        recipe=OWN_CAPTIONS, captions=tmp_path / "c.sqlite", variants=tmp_path / "v", p=1.0, generator=fake_generator()
    )
    sgid.captions.put_many(captioned(*map(picture, range(12))))
    return sgid


def test_create_loader_sets_the_transform_behind_ours(tmp_path: Path, sgid: SGIDAugment) -> None:
    from timm import data

    dataset = SGIDDataset(ImageFolder(image_folder(tmp_path / "data")), sgid)
    loader = data.create_loader(
        dataset,
        input_size=(3, 24, 24),
        batch_size=4,
        is_training=True,
        use_prefetcher=False,
        auto_augment="rand-m9-mstd0.5",
        re_prob=0.25,
        num_workers=0,
        persistent_workers=False,
    )
    mixup = data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
    for images, labels in loader:
        mixed, soft = mixup(images, labels)
        assert mixed.shape == (4, 3, 24, 24)
        assert soft.shape == (4, 3)
    assert sgid.stats().gated == 12


def test_first_in_create_transform(sgid: SGIDAugment) -> None:
    from timm import data

    chain = data.create_transform(input_size=24, is_training=True, auto_augment="rand-m9-mstd0.5")
    chain.transforms.insert(0, sgid)
    assert chain(pil_picture(0)).shape == (3, 24, 24)
    assert sgid.stats().gated == 1
