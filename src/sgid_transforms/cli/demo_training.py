"""The demo's training run: a small residual network, with and without variants, for the same number of steps."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

BATCH: Final = 32


class _Block(nn.Module):
    """A pre-activation residual block (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = self.shortcut(x if isinstance(self.shortcut, nn.Identity) else active)
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active)))) + shortcut
        return out


def small_resnet(classes: int, widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """Eight layers for images of 32 x 32 pixels."""
    blocks = [_Block(a, b, 1 if a == b else 2) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True)]
    head = [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), *blocks, *head)


def train_and_test(
    data: Path, train: Sequence[int], test: Sequence[int], sgid: Any | None, *, steps: int, seed: int = 0
) -> dict[str, float]:
    """Train on some images of an ``ImageFolder``, test on others.

    Args:
        data: the folder.
        train, test: indices of its images.
        sgid: an ``SGIDAugment``, or None to train without.
        steps: optimiser steps of 32 images.
        seed: of weights, order and augmentation.

    Returns:
        ``accuracy`` on the test images, ``loss`` (mean over the last tenth of the steps) and ``seconds``.
    """
    torch.manual_seed(seed)
    usual = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    first = [] if sgid is None else [sgid]  # it must see the image as it is in the file
    folder = ImageFolder(str(data), transform=v2.Compose([*first, *usual, *to_tensor]))
    plain = ImageFolder(str(data), transform=v2.Compose(to_tensor))
    chosen = Subset(folder, train)
    loader = DataLoader(chosen, BATCH, sampler=RandomSampler(chosen, replacement=True, num_samples=steps * BATCH))
    model = small_resnet(len(folder.classes))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    losses = []
    start = time.perf_counter()
    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images * 2 - 1), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    last = losses[-max(1, steps // 10) :]
    accuracy = _accuracy(model, DataLoader(Subset(plain, test), BATCH))
    return {"accuracy": accuracy, "loss": sum(last) / len(last), "seconds": seconds}


def split(data: Path) -> tuple[list[int], list[int]]:
    """Indices of the first and the second half of each class of an ``ImageFolder``."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(ImageFolder(str(data)).targets):
        by_class.setdefault(label, []).append(index)
    halves = list(_halves(by_class.values()))
    return [i for first, _ in halves for i in first], [i for _, second in halves for i in second]


def _halves(groups: Any) -> Iterator[tuple[list[int], list[int]]]:
    for group in groups:
        yield group[: len(group) // 2], group[len(group) // 2 :]


def _accuracy(model: nn.Module, loader: "DataLoader[tuple[Tensor, Tensor]]") -> float:
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in loader:
            right += int((model(images * 2 - 1).argmax(1) == labels).sum())
            total += len(labels)
    return right / total
