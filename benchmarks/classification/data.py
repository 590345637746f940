"""Images and labels of a classification task, by torchvision name, as an ``ImageFolder``, or from parquet files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

TORCHVISION = ("CIFAR10", "CIFAR100", "Caltech101", "StanfordCars", "Flowers102", "OxfordIIITPet", "DTD")
"""The seven data sets of the SGID paper, by torchvision's names."""

_TOOLS = Path(__file__).parents[2] / "tools" / "train_tiny"
_TEST_SHARE = 5  # of data sets without a test split every fifth image of a class is held out


class Images(Protocol):
    """Images of any sizes, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """A uint8 image ``(3, H, W)``."""


@dataclass(frozen=True)
class Pool:
    """Labelled images.

    Args:
        images: uint8 ``(3, H, W)`` each; a tensor ``(N, 3, H, W)`` where all fit into memory.
        labels: int64 ``(N,)``.
        classes: class names in the order of their numbers.
    """

    images: Images | Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


class Labelled(Dataset[tuple[Tensor, int]]):
    """Some images of a pool as a map-style data set with ``classes``, as ``SGIDAugment.prepare`` reads it."""

    def __init__(self, pool: Pool, indices: Sequence[int]) -> None:
        self.pool, self.indices = pool, list(indices)
        self.classes = list(pool.classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        where = self.indices[index]
        return self.pool.images[where], int(self.pool.labels[where])


class Opened:
    """Images of a torchvision data set, decoded when they are asked for."""

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.indices = list(range(len(dataset))) if indices is None else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return F.pil_to_tensor(self.dataset[self.indices[index]][0].convert("RGB"))


@dataclass(frozen=True)
class Task:
    """What is learned from, and what is measured on."""

    name: str
    train: Pool
    test: Pool


def load_task(source: str, root: str = "data", *, download: bool = False) -> Task:
    """A task by torchvision name (below ``root``), from a folder with ``fewshot.parquet`` and ``test.parquet``, or from one
    with an ``ImageFolder`` in ``train`` and in ``test`` or ``val``.

    Raises:
        ValueError: it is none of them.
    """
    if source in TORCHVISION:
        return _from_torchvision(source, root, download)
    folder = Path(source)
    if (folder / "fewshot.parquet").exists():
        return _from_parquet(folder)
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        train, test = (datasets.ImageFolder(str(part)) for part in (folder / "train", held_out))
        if train.classes != test.classes:
            raise ValueError(f"{folder / 'train'} and {held_out} have different classes; give both the same folders")
        names = [name.replace("_", " ") for name in train.classes]
        return Task(folder.name, _pool(train, train.targets, names), _pool(test, test.targets, names))
    raise ValueError(
        f"data {source!r} is none of {', '.join(TORCHVISION)}, and no folder with fewshot.parquet and test.parquet, "
        "or with train and test folders of class folders"
    )


def choose(labels: Tensor, n: int | None, seed: int) -> list[int]:
    """Indices of ``n`` images of each class, drawn by ``seed``; those of a smaller ``n`` are among those of a larger one.

    Args:
        labels: int64 ``(N,)``.
        n: images of each class; ``None``: all.
        seed: of the draw.

    Raises:
        ValueError: a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        if n is not None and len(members) < n:
            raise ValueError(f"class {label} has {len(members)} images; {n} were asked for")
        chosen += members[:n].tolist()
    return chosen


def _from_parquet(folder: Path) -> Task:
    if str(_TOOLS) not in sys.path:
        sys.path.insert(0, str(_TOOLS))
    from data import CLASSES, load_split

    train, test = (load_split(folder, split) for split in ("fewshot", "test"))
    return Task(folder.name, Pool(train.images, train.labels, CLASSES), Pool(test.images, test.labels, CLASSES))


def _from_torchvision(name: str, root: str, download: bool) -> Task:
    make: Callable[..., Any] = getattr(datasets, name)
    if name in ("CIFAR10", "CIFAR100"):
        pools = []
        for train in (True, False):
            found = make(root, train=train, download=download)
            images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
            pools.append(Pool(images, torch.tensor(found.targets), _words(found.classes)))
        return Task(name, *pools)
    if name == "Caltech101":  # has no splits
        found = make(root, download=download)
        labels = torch.tensor(found.y)
        rank = torch.zeros_like(labels)
        for label in labels.unique():
            rank[labels == label] = torch.arange(int((labels == label).sum()))
        parts = [(rank % _TEST_SHARE != 0).nonzero(), (rank % _TEST_SHARE == 0).nonzero()]
        pools = [
            Pool(Opened(found, part.flatten().tolist()), labels[part.flatten()], _words(found.categories)) for part in parts
        ]
        return Task(name, *pools)
    first = "trainval" if name == "OxfordIIITPet" else "train"
    train, test = (make(root, split=split, download=download) for split in (first, "test"))
    names = getattr(train, "classes", None)
    if name == "Flowers102" and names is None:
        raise ValueError("this torchvision does not know the names of Flowers102's classes; use a newer one")
    return Task(name, *(_pool(part, _targets(part), names) for part in (train, test)))


def _targets(dataset: Any) -> list[int]:
    for name in ("targets", "_labels", "_samples"):
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(one[1] if isinstance(one, tuple) else one) for one in found]
    raise ValueError(f"{type(dataset).__name__} does not tell its labels without its images")


def _pool(dataset: Any, labels: Sequence[int], names: Sequence[str]) -> Pool:
    return Pool(Opened(dataset), torch.tensor(labels), _words(names))


def _words(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)
