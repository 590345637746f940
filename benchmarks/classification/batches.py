"""Training batches: each depends on (seed, step) alone, so that a run can be resumed, and loader workers change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sgid_transforms import SGIDAugment

from .data import Pool
from .methods import Method, batch_policy, erase, image_policy

PADDING = 4  # pixels by which small images are padded before they are cropped


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``step`` is the batch of that step.

    Images are replaced by variants (``sgid``), then flipped and cropped, then pass torchvision's policy, are normalised, and
    erased or mixed. Small images of one size are padded by reflection and cropped; others are cropped and resized. Which
    images a batch holds and how they are cropped is the same for all methods.

    Args:
        pool: the images.
        indices: those to train on.
        method: how to augment.
        sgid: the transform that knows the variants; ``None``: there are none.
        batch_size: images in a batch.
        steps: number of batches.
        size: side of the square that the model sees, in pixels.
        seed: of all random choices.
        mean, std: of each channel, of pixels in [0, 1].
    """

    def __init__(
        self,
        pool: Pool,
        indices: Sequence[int],
        method: Method,
        sgid: SGIDAugment | None,
        *,
        batch_size: int,
        steps: int,
        size: int,
        seed: int,
        mean: Tensor,
        std: Tensor,
    ) -> None:
        self.pool, self.method, self.sgid = pool, method, sgid
        self.batch_size, self.steps, self.size, self.seed = batch_size, steps, size, seed
        self.mean, self.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
        self.small = is_small(pool, size)
        self.policy = image_policy(method.classic, small=self.small)
        self.mix = batch_policy(method.classic, len(pool.classes))
        self.resized_crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * batch_size // len(indices))
        order = torch.cat([torch.randperm(len(indices), generator=generator) for _ in range(epochs)])
        self.order = torch.tensor(indices)[order[: steps * batch_size]].view(steps, batch_size)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised float images ``(B, 3, size, size)``, and labels ``(B,)`` or, mixed, ``(B, classes)``."""
        if not 0 <= step < self.steps:
            raise IndexError(step)
        chosen = self.order[step].tolist()
        labels = self.pool.labels[chosen]
        with torch.random.fork_rng(devices=[]):
            images = [self.pool.images[index] for index in chosen]
            self._seed(step, 0)
            if self.sgid is not None:
                images = self.sgid.augment(images, labels.tolist())
            self._seed(step, 1)
            batch = self._crop(images)
            self._seed(step, 2)
            if self.policy is not None:
                batch = torch.stack([self.policy(image) for image in batch])
            pixels = normalise(batch, self.mean, self.std)
            if self.method.classic == "randomerasing":
                pixels = erase(pixels)
            if self.mix is not None:
                pixels, labels = self.mix(pixels, labels)
        return pixels, labels

    def _seed(self, step: int, stage: int) -> None:
        """A random state of each stage: whether one draws numbers does not change what the next one does."""
        torch.manual_seed(((self.seed * 3 + stage) * 1_000_003 + step) % 2**63)

    def _crop(self, images: Sequence[Tensor]) -> Tensor:
        if not self.small:
            return torch.stack([self.resized_crop(image) for image in images])
        # Each image at an offset of its own: as RandomCrop(size, PADDING, padding_mode="reflect") and a flip on each.
        batch = F.pad(torch.stack(list(images)), [PADDING], padding_mode="reflect")
        count = len(batch)
        top, left = torch.randint(0, 2 * PADDING + 1, (2, count))
        rows = (top[:, None] + torch.arange(self.size))[:, None, :, None]
        columns = left[:, None] + torch.arange(self.size)
        columns = torch.where((torch.rand(count) < 0.5)[:, None], columns.flip(1), columns)[:, None, None, :]
        return batch[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def is_small(pool: Pool, size: int) -> bool:
    """Whether all images are as large as the model's input, and in memory."""
    return isinstance(pool.images, Tensor) and tuple(pool.images.shape[-2:]) == (size, size)


def evaluation_images(pool: Pool, indices: Sequence[int], size: int) -> Tensor:
    """uint8 ``(B, 3, size, size)``: as they are, or resized to 256/224 of ``size`` and cropped in the middle."""
    images = [pool.images[index] for index in indices]
    if is_small(pool, size):
        return torch.stack(images)
    whole = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])
    return torch.stack([whole(image) for image in images])


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float images from uint8 ``(B, 3, H, W)``, in channels-last memory."""
    pixels = (images.float() / 255 - mean) / std
    return pixels.contiguous(memory_format=torch.channels_last)


def channel_statistics(pool: Pool, indices: Sequence[int], size: int, at_most: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(3,)`` of the channels of (some of) the images, of pixels in [0, 1]."""
    step = max(len(indices) // at_most, 1)
    pixels = evaluation_images(pool, list(indices)[::step], size).float() / 255
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
