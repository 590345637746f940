"""A data set that augments whole batches at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from sgid_transforms.images.labels import label_field
from sgid_transforms.images.samples import take_apart
from sgid_transforms.transforms.augment import SGIDAugment


class SGIDDataset(Dataset[Any]):
    """A data set whose images pass through `SGIDAugment` and then through ``transform``.

    The result is the same as with both in a ``Compose``, but a ``DataLoader`` worker requests all missing variants of its batch
    at once. The service can then fill its batches: with one request per image, they would hold at most one image per worker.

    Args:
        dataset: A map-style data set. Its items are an image, or a tuple or dict with an image and a label. Its own
            ``transform`` runs first, so it must not be random.
        sgid: The augmentation.
        transform: Applied to the image afterwards: the random crops and flips, ``RandAugment`` ...
        target_transform: Applied to the label: the second element of a tuple, or the label of a dict.

    Examples:
        >>> sgid = SGIDAugment(captions="captions.sqlite", variants="variants", p=0.5)
        >>> report = sgid.prepare(ImageFolder("train"), progress=False)
        >>> train = SGIDDataset(ImageFolder("train"), sgid, transform=v2.Compose([v2.RandAugment(), v2.ToImage()]))
        >>> images, labels = next(iter(DataLoader(train, batch_size=4)))
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        dataset: Any,
        sgid: SGIDAugment,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(sgid, SGIDAugment):
            raise TypeError(f"sgid is a {type(sgid).__name__}; pass the SGIDAugment to apply")
        self.untransformed = dataset
        self.sgid = sgid
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.untransformed)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch; the loader calls it once per batch, in a worker."""
        samples = [take_apart(item) for item in self._read(indices)]
        images = self.sgid.augment([sample.image for sample in samples], [sample.label for sample in samples])
        return [self._finish(sample.rebuild(self._transformed(image))) for sample, image in zip(samples, images, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # `classes`, `targets` and the like; never private names, which copying and unpickling ask for too early.
        if name.startswith("_") or name == "untransformed":
            raise AttributeError(name)
        return getattr(self.untransformed, name)

    def _read(self, indices: Sequence[int]) -> list[Any]:
        many = getattr(self.untransformed, "__getitems__", None)
        return list(many(list(indices))) if many is not None else [self.untransformed[index] for index in indices]

    def _transformed(self, image: Any) -> Any:
        return image if self.transform is None else self.transform(image)

    def _finish(self, sample: Any) -> Any:
        change = self.target_transform
        if change is None:
            return sample
        if isinstance(sample, Mapping):
            field = label_field(sample)
            return sample if field is None else {**sample, field: change(sample[field])}
        if not isinstance(sample, list | tuple) or len(sample) < 2:
            return sample
        items = [sample[0], change(sample[1]), *sample[2:]]
        return getattr(type(sample), "_make", type(sample))(items)  # a named tuple stays one, and a list a list
