"""Reading a data set's images as ``SGIDAugment`` sees them: before the transforms that follow it."""

import bisect
import contextlib
import copy
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import v2

from sgid_transforms.images.labels import label_field
from sgid_transforms.images.samples import take_apart


class RawSample(NamedTuple):
    """One image of a data set, with its label, the names of the classes, and its file, where they are known."""

    image: Any
    label: Any
    classes: Sequence[Any] | None
    path: str | None


class _Place(NamedTuple):
    """Where an item is actually stored.

    Args:
        dataset: The data set that holds it.
        position: Its index in there.
        as_it_is: Whether the data set's own transforms run before ours, as in an ``SGIDDataset``, and so must be kept.
    """

    dataset: Any
    position: int
    as_it_is: bool


class RawImages:
    """A map-style data set without its transforms, except for those before ``stop`` in a ``Compose``.

    Looks through ``Subset``, ``ConcatDataset`` and ``SGIDDataset``, however nested. Handles data sets that keep their transform
    in ``transform`` or ``transforms``, as torchvision's do, and Hugging Face data sets. The data set itself is not changed.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
        stop: The class of the transform whose input is wanted.

    Raises:
        TypeError: The data set is not map-style.
    """

    def __init__(self, dataset: Any, stop: type) -> None:
        if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(f"{type(dataset).__name__} is not a map-style data set: it needs __len__ and __getitem__")
        self._dataset, self._stop = dataset, stop
        self._bare: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        leaf, position, as_it_is = _locate(self._dataset, index)
        if id(leaf) not in self._bare:
            self._bare[id(leaf)] = leaf if as_it_is else _without_transforms(leaf, self._stop)
        item = self._bare[id(leaf)][position]
        sample = take_apart(item)
        return RawSample(sample.image, sample.label, _classes(leaf, item), _path(leaf, position))

    def identity(self, key: Callable[[Any], str]) -> str:
        """A digest of the data set's contents: the positions of its items, their files if known, and some keys."""
        places = [_locate(self._dataset, index) for index in range(len(self))]
        leaves = {id(place.dataset): place.dataset for place in places}
        files = [getattr(leaf, "samples", None) for leaf in leaves.values()]
        keys = []
        for index in range(0, len(self), max(1, len(self) // 16)):
            with contextlib.suppress(Exception):
                keys.append(key(self[index].image))
        parts = repr(([place.position for place in places], files, keys))
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


def _locate(dataset: Any, index: int, as_it_is: bool = False) -> _Place:
    """Find the data set that actually holds an item."""
    if isinstance(dataset, Subset):
        return _locate(dataset.dataset, dataset.indices[index], as_it_is)
    if isinstance(dataset, ConcatDataset):
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[number - 1] if number else 0
        return _locate(dataset.datasets[number], index - before, as_it_is)
    inner = dataset.__dict__.get("untransformed") if hasattr(dataset, "__dict__") else None
    return _Place(dataset, index, as_it_is) if inner is None else _locate(inner, index, True)


def _without_transforms(dataset: Any, stop: type) -> Any:
    kinds: Any = getattr(sys.modules.get("datasets"), "Dataset", ())  # if it was never imported, this is none of its data sets
    if isinstance(dataset, kinds):
        plain: Any = dataset
        return plain.with_format(None)
    joint, single = getattr(dataset, "transforms", None), getattr(dataset, "transform", None)
    if joint is None and single is None:
        return dataset
    bare = copy.copy(dataset)
    before = _before(single, stop)
    if single is not None:  # not None: a data set may call it without checking
        bare.transform = before or _identity
    if getattr(dataset, "target_transform", None) is not None:
        bare.target_transform = _identity  # class names refer to the untransformed labels
    if joint is not None:
        chain = before if isinstance(joint, StandardTransform) else _before(joint, stop)
        bare.transforms = StandardTransform(chain, None) if isinstance(joint, StandardTransform) else chain or _same
    return bare


def _identity(value: Any) -> Any:
    return value


def _same(*values: Any) -> Any:
    return values if len(values) > 1 else values[0]


def _before(transform: Any, stop: type) -> Any:
    """The transforms before ``stop`` in a (nested) ``Compose``; None if there are none, or ``stop`` is not in it."""
    chain = _chain_before(transform, stop)
    return v2.Compose(chain) if chain else None


def _chain_before(transform: Any, stop: type, around: tuple[int, ...] = ()) -> list[Any] | None:
    if isinstance(transform, stop):
        return []
    members = list(transform) if isinstance(transform, nn.Sequential) else getattr(transform, "transforms", None)
    if members is None or id(transform) in around:
        return None
    around = (*around, id(transform))
    if not isinstance(members, list | tuple):  # a preset that holds a Compose, as in torchvision's training scripts
        return _chain_before(members, stop, around)
    chain: list[Any] = []
    for member in members:
        inside = _chain_before(member, stop, around)
        if inside is not None:
            return chain + inside
        chain.append(member)
    return None


def _classes(dataset: Any, item: Any) -> Sequence[Any] | None:
    """The class names: those of the column that holds the label, else those of the data set."""
    features = getattr(dataset, "features", None)
    if isinstance(item, dict) and features:  # Hugging Face
        column = features.get(label_field(item))
        names: Sequence[str] | None = getattr(getattr(column, "feature", column), "names", None)  # a list of classes, too
        return names
    for name in ("classes", "categories"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple) and found and all(isinstance(one, str | tuple | list) for one in found):
            return found
    return None


def _path(dataset: Any, index: int) -> str | None:
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and index < len(samples) and isinstance(samples[index], tuple):
        first = samples[index][0]
        return first if isinstance(first, str) else None
    return None
