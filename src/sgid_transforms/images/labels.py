"""Finding the label that belongs to an image in a sample, and its name."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sgid_transforms.recipe.prompts import clean_label

_KEYS = ("label", "labels", "target", "targets", "class", "fine_label", "y")


def find_labels(sample: Any, count: int) -> list[Any]:
    """The label of each of the ``count`` images of a sample, None where there is none.

    Looks at the second element of a tuple or list, and under the usual names in a dict. One label counts for all images
    of the sample; a list, a 1-D tensor of classes or a 2-D tensor of class probabilities (as MixUp makes them; the
    likeliest class counts) has one for each.
    """
    label = _locate(sample)
    if isinstance(label, torch.Tensor) and label.ndim == 2 and len(label) == count:
        label = label.argmax(1)
    if isinstance(label, torch.Tensor):
        label = label.tolist()
    if isinstance(label, list | tuple):
        return list(label) if len(label) == count else [None] * count
    return [label] * count


def label_name(label: Any, class_names: Sequence[str] | Mapping[str, str] | None) -> str | None:
    """The name of a label in words: a class number is looked up in a sequence of names, a string is cleaned.

    Returns None for a number without a name.
    """
    mapping = class_names if isinstance(class_names, Mapping) else None
    if isinstance(label, str):
        return clean_label(label, mapping)
    if not isinstance(label, numbers.Integral) or class_names is None:
        return None
    number = int(label)
    if isinstance(class_names, Mapping):
        return class_names.get(str(number))
    return clean_label(class_names[number]) if 0 <= number < len(class_names) else None


def _locate(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return next((sample[key] for key in _KEYS if key in sample and _is_label(sample[key])), None)
    if isinstance(sample, list | tuple) and len(sample) > 1:
        return sample[1] if _is_label(sample[1]) else _locate(sample[1]) if isinstance(sample[1], Mapping) else None
    return None


def _is_label(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        whole = not value.is_floating_point() and value.dtype != torch.bool
        return (whole and value.ndim <= 1) or (value.is_floating_point() and value.ndim == 2)
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_label(one) for one in value)
    return isinstance(value, numbers.Integral | str) and not isinstance(value, bool)
