"""Find the label of an image in a sample, and its name. All parts of the package read labels through this module."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sgid_transforms.recipe.prompts import clean_label

FIELDS = ("label", "labels", "target", "targets", "class", "fine_label", "y")
"""Keys under which a label is looked for in a dict, in this order."""

ClassNames = Mapping[Any, Any] | Sequence[Any]
"""Names of the class numbers, in order or as a mapping, or a mapping from coded names to words."""


def check_class_names(names: Any) -> None:
    """Refuse class names of a wrong type.

    Raises:
        TypeError: It is neither a mapping nor a sequence of names; a path or a set, for instance.
    """
    if names is None:
        return
    values = names.values() if isinstance(names, Mapping) else names
    fits = isinstance(names, Mapping) or (hasattr(names, "__len__") and hasattr(names, "__getitem__"))
    if isinstance(names, str | bytes) or not fits or not all(isinstance(one, str | list | tuple) for one in values):
        raise TypeError(f"class_names is {names!r:.80}; pass a list with a name for each class number, or a mapping to words")


def find_labels(sample: Any, count: int) -> list[Any]:
    """The label of each of the ``count`` images of a sample, None where there is none.

    Looks at the second element of a tuple or list, and under the usual names in a dict. A single label applies to all images of
    the sample. A list, a 1-D tensor of classes or a 2-D tensor of class probabilities (as MixUp makes them; the likeliest class
    is used) holds one label per image.
    """
    label = _locate(sample)
    if isinstance(label, torch.Tensor) and label.ndim == 2 and len(label) == count:
        label = label.argmax(1)
    if isinstance(label, torch.Tensor) or hasattr(label, "tolist"):
        label = label.tolist()
    if isinstance(label, list | tuple):
        return list(label) if len(label) == count else [None] * count
    return [label] * count


def label_field(sample: Mapping[Any, Any]) -> Any | None:
    """The key under which a dict holds its label, or None."""
    return next((name for name in FIELDS if name in sample and _is_label(sample[name])), None)


def label_name(label: Any, class_names: ClassNames | None, classes: Sequence[Any] | None = None) -> str | None:
    """The name of a label in words, or None for a number without a name; negative numbers mean "no label".

    Args:
        label: A class name, or a class number of any integer type, also in an array of one element.
        class_names: The user's names: a sequence or a mapping by class number, or words for coded names.
        classes: The data set's own names, used where the user gives none for a number. If a name is a tuple of synonyms, as in
            torchvision's ImageNet, the first one is used.
    """
    words = class_names if isinstance(class_names, Mapping) else None
    if isinstance(label, str):
        return clean_label(label, words)
    if hasattr(label, "shape"):  # NumPy's and torch's numbers, and arrays of one
        label = label.item() if math.prod(label.shape) == 1 else None
    if isinstance(label, bool) or not isinstance(label, numbers.Integral) or int(label) < 0:
        return None
    number = int(label)
    if words is not None:
        for known in (number, str(number)):
            if known in words:
                return clean_label(_first(words[known]))
    elif class_names is not None:
        return clean_label(_first(class_names[number])) if number < len(class_names) else None
    if classes is not None and number < len(classes):
        return clean_label(_first(classes[number]), words)
    return None


def _first(name: Any) -> str:
    return str(name[0] if isinstance(name, list | tuple) and name else name)


def _locate(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        field = label_field(sample)
        return None if field is None else sample[field]
    if isinstance(sample, list | tuple) and len(sample) > 1:
        return sample[1] if _is_label(sample[1]) else _locate(sample[1]) if isinstance(sample[1], Mapping) else None
    return None


def _is_label(value: Any) -> bool:
    if isinstance(value, str):  # NumPy's strings as well
        return True
    if isinstance(value, torch.Tensor):
        whole = not value.is_floating_point() and value.dtype != torch.bool
        return (whole and value.ndim <= 1) or (value.is_floating_point() and value.ndim == 2)
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_label(one) for one in value)
    if hasattr(value, "dtype") and getattr(value, "ndim", 2) <= 1:  # NumPy's numbers, and arrays of them
        return value.dtype.kind in "iu"
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
