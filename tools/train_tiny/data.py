"""CIFAR-10 as tensors, with the words each image was collected under.

Two sources give the same columns: the parquet files of a prepared data folder (``pretrain.parquet``, ``fewshot.parquet``,
``test.parquet``) or torchvision's own CIFAR-10 download, whose batches carry the file names that the words come from.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """One split: ``images`` (N, 3, 32, 32) uint8, ``labels`` (N,) int64, ``subnames`` N strings, ``names`` N file names."""

    images: torch.Tensor
    labels: torch.Tensor
    subnames: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.subnames)


def load_split(root: str | Path, split: str) -> Split:
    """Load ``pretrain``, ``fewshot`` or ``test`` from ``root``.

    ``root`` holds either the three parquet files or torchvision's ``cifar-10-batches-py`` folder.
    """
    if split not in ("pretrain", "fewshot", "test"):
        raise ValueError(f"unknown split {split!r}; choose pretrain, fewshot or test")
    root = Path(root)
    if (root / f"{split}.parquet").exists():
        return _from_parquet(root / f"{split}.parquet")
    return _from_torchvision(root, split)


def _from_parquet(path: Path) -> Split:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["image", "label", "subname"])
    rows = table.column("image").to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]), formats=("WEBP", "PNG"))) for row in rows])
    return Split(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(table.column("label").to_pylist()),
        subnames=table.column("subname").to_pylist(),
        names=[row["path"] for row in rows],
    )


def _from_torchvision(root: Path, split: str) -> Split:
    """The same columns from torchvision's download; a tenth of the training images, by hash of the name, is ``fewshot``."""
    import pickle

    from torchvision.datasets import CIFAR10

    # torchvision checks every batch file against its MD5 before it unpickles one: the same bytes are read again here.
    base = CIFAR10(root, train=split != "test", download=True)
    names: list[str] = []
    for filename, _ in base.train_list if split != "test" else base.test_list:
        with open(Path(root) / base.base_folder / filename, "rb") as file:
            entry = pickle.load(file, encoding="latin1")  # noqa: S301
        names += entry["filenames"]
    held_out = np.array([int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 for name in names])
    keep = np.ones(len(names), bool) if split == "test" else (held_out if split == "fewshot" else ~held_out)
    index = np.flatnonzero(keep)
    return Split(
        images=torch.from_numpy(base.data[index]).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor([base.targets[i] for i in index]),
        subnames=[re.sub(r"_s_\d+\.png$", "", names[i]).replace("_", " ") for i in index],
        names=[names[i] for i in index],
    )
