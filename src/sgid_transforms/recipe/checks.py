"""Checks of single settings, shared by all parts of a recipe; every message names the setting, its value and the way out."""

import difflib
import math
import numbers
from collections.abc import Iterable

from sgid_transforms.errors import RecipeError


def number(name: str, value: object, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """``value`` as a finite float within the bounds, -0.0 as 0.0. Ints and NumPy numbers pass; bools and strings do not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RecipeError(f"{name} is {value!r}; it must be a number")
    try:
        converted = float(value) + 0.0
    except OverflowError:  # an int of more than 308 digits
        converted = math.inf
    if not minimum <= converted <= maximum or not math.isfinite(converted):
        raise RecipeError(f"{name} {converted!r} is outside {_bounds(minimum, maximum)}")
    return converted


def integer(name: str, value: object, *, minimum: int, maximum: int) -> int:
    """``value`` as an int within the bounds; 5.0 is taken as 5, a bool or a fraction is refused."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RecipeError(f"{name} is {value!r}; it must be a whole number")
    whole = int(value)
    if not minimum <= whole <= maximum:
        raise RecipeError(f"{name} {whole} is outside {minimum} to {maximum}")
    return whole


def pair(name: str, value: object) -> tuple[object, object]:
    """``value`` as a pair; lists (as in TOML) and tuples are equivalent."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise RecipeError(f"{name} is {value!r}; it must be a pair (low, high)")
    return value[0], value[1]


def text(name: str, value: object) -> str:
    """``value`` as a string that UTF-8 can encode: neither files nor tokenizers can hold lone surrogates."""
    if not isinstance(value, str):
        raise RecipeError(f"{name} is {value!r}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"{name} {value!r} holds a lone surrogate (half a character); remove it") from None
    return value


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``; the message offers the nearest spelling."""
    options = tuple(choices)
    if not isinstance(value, str) or value not in options:
        raise RecipeError(f"{name} {value!r} is unknown{did_you_mean(value, options)}; choose one of {', '.join(options)}")
    return value


def known_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse the first of ``names`` that is not ``allowed``; the message offers the nearest spelling that is."""
    options = tuple(allowed)
    for name in names:
        if name not in options:
            raise RecipeError(f"{what} has no field {name!r}{did_you_mean(name, options)}; its fields are {', '.join(options)}")


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a word that is close to one of the options, else an empty string."""
    close = difflib.get_close_matches(str(word), tuple(options), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _bounds(minimum: float, maximum: float) -> str:
    if maximum == math.inf:
        return f"the finite numbers >= {minimum:g}" if minimum > -math.inf else "the finite numbers"
    return f"{minimum:g} to {maximum:g}"
