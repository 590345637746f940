"""How likely an image is replaced: one number, a number per class, or balanced over the classes."""

import difflib
import numbers
from collections.abc import Collection, Mapping
from typing import Any

P = float | Mapping[str, float] | str

OTHERS = "*"  # the entry of a mapping that applies to all classes it does not name


def check_p(p: Any) -> float | dict[str, float] | str:
    """Check ``p`` and return a float in [0, 1], a dict of class names to such floats, or ``"balanced"``.

    Raises:
        ValueError: ``p`` is something else.
    """
    if p == "balanced" and isinstance(p, str):
        return p
    if isinstance(p, Mapping):
        return {str(name): _check_number(value, f"p[{name!r}]") for name, value in p.items()}
    return _check_number(p, "p")


def unknown_classes(p: Mapping[str, float], labels: Collection[str]) -> list[str]:
    """A sentence about each class that ``p`` names but ``labels`` lacks: a misspelled name has no effect."""
    sentences = []
    for name in p:
        if name not in labels and name != OTHERS:
            near = difflib.get_close_matches(name, labels, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            sentences.append(f"p names the class {name!r}, of which no image was prepared{hint}")
    return sentences


def balanced_p(counts: Mapping[str, int]) -> dict[str, float]:
    """Per-class p with which every original is seen equally often, if classes are drawn equally often.

    ``p = 1 - 0.5 * n / n_max``: 0.5 for the largest class; 0.95 for one with a tenth of its images.
    """
    largest = max(counts.values(), default=0)
    return {name: 1 - 0.5 * count / largest for name, count in counts.items() if largest}


def class_p(p: Mapping[str, float], label: str | None) -> float:
    """The probability for one class."""
    if label is not None and label in p:
        return p[label]
    return p.get(OTHERS, 0.0)


def _check_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} is {value!r}; it must be a number in [0, 1], a mapping of classes to numbers, or 'balanced'")
    return float(value)
