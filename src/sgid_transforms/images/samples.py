"""Take a data set's samples apart: the image, its label, and a function that puts another image in its place."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from sgid_transforms.images.forms import is_image
from sgid_transforms.images.labels import find_labels


class Sample(NamedTuple):
    """An item of a data set, taken apart."""

    image: Any
    label: Any
    rebuild: Callable[[Any], Any]  # image -> the sample with that image


def take_apart(sample: Any) -> Sample:
    """Find image and label of an item: a bare image, a tuple or list with one in it, or a dict with one in it.

    Raises:
        TypeError: There is no image in it.
    """
    if is_image(sample):
        return Sample(sample, None, lambda image: image)
    if isinstance(sample, Mapping):
        for name, value in sample.items():
            if is_image(value):
                return Sample(value, find_labels(sample, 1)[0], partial(_put_into_dict, sample, name))
    if isinstance(sample, list | tuple):
        for position, value in enumerate(sample):
            if is_image(value):
                return Sample(value, find_labels(sample, 1)[0], partial(_put_into_sequence, sample, position))
    raise TypeError(f"an item of the data set is a {_shape(sample)}; it must be, or hold, a PIL image or an image tensor")


def _put_into_dict(sample: Mapping[Any, Any], name: Any, image: Any) -> Any:
    return {**sample, name: image}


def _put_into_sequence(sample: Any, position: int, image: Any) -> Any:
    kind = type(sample)
    make = getattr(kind, "_make", kind)  # a named tuple takes its fields one by one
    return make([*sample[:position], image, *sample[position + 1 :]])


def _shape(sample: Any) -> str:
    inside = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, list | tuple) else ()
    names = ", ".join(type(value).__name__ for value in inside)
    return f"{type(sample).__name__} of ({names})" if names else type(sample).__name__
