"""Looking past exactly those transforms that training looks past."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment_fakes import CLASSES, image_folder, pil_picture
from sgid_transforms.images.datasets import RawImages
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset


@pytest.fixture
def sgid(tmp_path: Path) -> SGIDAugment:
    return SGIDAugment(captions=tmp_path / "captions.sqlite", variants=tmp_path / "variants")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", size=64)


@pytest.mark.parametrize(
    "wrap",
    [lambda data: data, lambda data: Subset(data, [3, 4]), lambda data: ConcatDataset([data, data])],
    ids=["plain", "subset", "concat"],
)
def test_what_comes_before_sgid_in_an_sgid_dataset_is_applied(sgid: SGIDAugment, folder: Path, wrap: Any) -> None:
    """Its own Resize was stripped by prepare(), so that no caption was ever found in training."""
    data = SGIDDataset(wrap(ImageFolder(folder, transform=v2.Resize(32))), sgid)
    assert RawImages(data, SGIDAugment)[0].image.size == (32, 32)


class Unguarded:
    """A data set that calls its transform without asking whether there is one."""

    classes = CLASSES

    def __init__(self) -> None:
        self.transform: Any = lambda image: image.resize((8, 8))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.transform(pil_picture(index)), index


def test_a_data_set_that_calls_its_transform_unasked_can_be_read() -> None:
    assert RawImages(Unguarded(), SGIDAugment)[0].image.size == (32, 32)


def test_a_users_package_called_datasets_is_not_hugging_faces() -> None:
    birds = type("Birds", (Unguarded,), {"__module__": "datasets.birds"})
    assert RawImages(birds(), SGIDAugment)[1].label == 1


class Preset:
    """As `ClassificationPresetTrain` of torchvision's reference scripts: its `transforms` is a Compose."""

    def __init__(self, *members: Any) -> None:
        self.transforms = v2.Compose(list(members))

    def __call__(self, image: Any) -> Any:
        return self.transforms(image)


def test_a_preset_that_holds_a_compose_is_looked_into(sgid: SGIDAugment, folder: Path) -> None:
    with_it = ImageFolder(folder, transform=Preset(v2.Resize(16), sgid, v2.RandomCrop(8)))
    assert RawImages(with_it, SGIDAugment)[0].image.size == (16, 16)
    without = ImageFolder(folder, transform=Preset(v2.RandomCrop(8)))
    assert RawImages(without, SGIDAugment)[0].image.size == (64, 64)


@pytest.mark.parametrize("others", [("quality",), ("quality", "size"), ()])
def test_of_several_class_columns_that_of_the_label_gives_the_names(others: tuple[str, ...]) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {name: datasets.ClassLabel(names=["bad", "good"]) for name in others}
    features = datasets.Features({"image": datasets.Image(), **kinds, "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(np.full((8, 8, 3), n, np.uint8)) for n in range(4)]
    columns = {"image": pictures, "label": [0, 0, 1, 1], **{name: [0, 1, 1, 0] for name in others}}
    images = RawImages(datasets.Dataset.from_dict(columns, features=features), SGIDAugment)
    assert [images[n].classes[images[n].label] for n in range(4)] == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"coarse_label": ["animal", "thing"], "fine_label": ["cat", "dog"]}, "fine_label"),  # CIFAR-100
        ({"superclass": ["bad", "good"], "labels": ["cat", "dog"]}, "labels"),
        ({"split": ["train", "test"], "target": ["cat", "dog"], "weather": ["sun", "rain"]}, "target"),
    ],
)
def test_columns_under_other_usual_names(columns: dict[str, list[str]], named: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.ClassLabel(names=names) for name, names in columns.items()}
    rows = {name: [0, 0, 1, 1] if name == named else [0, 1, 1, 0] for name in columns}
    pictures = [Image.fromarray(np.full((8, 8, 3), n, np.uint8)) for n in range(4)]
    data = datasets.Dataset.from_dict(
        {"image": pictures, **rows}, features=datasets.Features({"image": datasets.Image(), **features})
    )
    images = RawImages(data, SGIDAugment)
    assert [images[n].classes[images[n].label] for n in range(4)] == ["cat", "cat", "dog", "dog"]


def test_the_identity_of_a_data_set_is_its_content(folder: Path, tmp_path: Path) -> None:
    data, other = ImageFolder(folder), ImageFolder(image_folder(tmp_path / "other", size=32))

    def identity(dataset: Any) -> str:
        return RawImages(dataset, SGIDAugment).identity(SGIDAugment.key_of.__get__(_Keys()))

    assert identity(data) == identity(ImageFolder(folder))
    assert len({identity(one) for one in (data, other, Subset(data, [0, 1]), Subset(data, [2, 3]), Unguarded())}) == 5


class _Keys:
    _key = None
