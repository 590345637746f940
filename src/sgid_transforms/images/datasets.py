"""Reading a data set's images as ``SGIDAugment`` sees them: before the transforms that follow it."""

import bisect
import contextlib
import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import v2

from sgid_transforms.images.samples import take_apart


class RawSample(NamedTuple):
    """One image of a data set, with its label, the names of the classes, and its file, where they are known."""

    image: Any
    label: Any
    classes: Sequence[str] | None
    path: str | None


class RawImages:
    """A map-style data set without its transforms, or with those only that stand before ``stop`` in a ``Compose``.

    Looks through ``Subset``, ``ConcatDataset`` and their nesting, torchvision's data sets and whatever else keeps its
    transform in ``transform`` or ``transforms``, and Hugging Face data sets. The data set itself is not changed.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
        stop (type): The class of the transform whose input is wanted.

    Raises:
        TypeError: It has neither length nor items.
    """

    def __init__(self, dataset: Any, stop: type) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(f"{type(dataset).__name__} is not a map-style data set: it needs __len__ and __getitem__")
        self._dataset, self._stop = dataset, stop
        self._bare: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        leaf, position = _locate(self._dataset, index)
        if id(leaf) not in self._bare:
            self._bare[id(leaf)] = _without_transforms(leaf, self._stop)
        item = self._bare[id(leaf)][position]
        sample = take_apart(item)
        return RawSample(sample.image, sample.label, _classes(leaf, item, sample.label), _path(leaf, position))

    def identity(self, key: Callable[[Any], str]) -> str:
        """A digest of what the data set holds: the places of its items, their files where they are known, and some keys."""
        places = [_locate(self._dataset, index) for index in range(len(self))]
        leaves = {id(leaf): leaf for leaf, _ in places}
        files = [getattr(leaf, "samples", None) for leaf in leaves.values()]
        keys = []
        for index in range(0, len(self), max(1, len(self) // 16)):
            with contextlib.suppress(OSError, ValueError, TypeError, SyntaxError):
                keys.append(key(self[index].image))
        return _digest([position for _, position in places], files, keys)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _locate(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that really holds an item, and the item's index in there."""
    if isinstance(dataset, Subset):
        return _locate(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[number - 1] if number else 0
        return _locate(dataset.datasets[number], index - before)
    inner = getattr(dataset, "untransformed", None)  # SGIDDataset: its data set's own transforms come before ours
    return (dataset, index) if inner is None else (inner, index)


def _without_transforms(dataset: Any, stop: type) -> Any:
    if type(dataset).__module__.startswith("datasets."):
        return dataset.with_format(None)
    joint, single = getattr(dataset, "transforms", None), getattr(dataset, "transform", None)
    if joint is None and single is None:
        return dataset
    bare = copy.copy(dataset)
    before = _before(single, stop)
    if hasattr(dataset, "transform"):
        bare.transform = before
    if hasattr(dataset, "target_transform"):
        bare.target_transform = None  # class names belong to the labels as the data set has them
    if hasattr(dataset, "transforms"):
        if joint is None or isinstance(joint, StandardTransform):
            bare.transforms = StandardTransform(before, None) if before is not None else None
        else:
            bare.transforms = _before(joint, stop)
    return bare


def _before(transform: Any, stop: type) -> Any:
    """What stands before ``stop`` in a (nested) ``Compose``; None: nothing, or ``stop`` is not in there."""
    chain = _chain_before(transform, stop)
    return v2.Compose(chain) if chain else None


def _chain_before(transform: Any, stop: type) -> list[Any] | None:
    if isinstance(transform, stop):
        return []
    chain: list[Any] = []
    for member in getattr(transform, "transforms", None) or ():
        inside = _chain_before(member, stop)
        if inside is not None:
            return chain + inside
        chain.append(member)
    return None


def _classes(dataset: Any, item: Any, label: Any) -> Sequence[str] | None:
    for column, feature in (getattr(dataset, "features", None) or {}).items():  # Hugging Face
        if hasattr(feature, "names") and isinstance(item, dict) and item[column] == label:
            names: Sequence[str] = feature.names
            return names
    for name in ("classes", "categories"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple) and found and all(isinstance(one, str) for one in found):
            return found
    return None


def _path(dataset: Any, index: int) -> str | None:
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and index < len(samples) and isinstance(samples[index], tuple):
        first = samples[index][0]
        return first if isinstance(first, str) else None
    return None
