"""Means of few runs and how far they can be trusted: Student's t, from integer degrees of freedom, without SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean of ``n`` values; the 95 % interval is ``mean - margin`` to ``mean + margin``, infinite for a single value."""

    mean: float
    margin: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin


def t_cdf(t: float, freedom: int) -> float:
    """Probability that a Student variable of ``freedom`` degrees is below ``t``.

    Finite series for integer degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom; at least 1 is needed")
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return (1 + inside) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The ``t`` with ``t_cdf(t, freedom) == probability``, for a probability in [0.5, 1)."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability {probability} is outside [0.5, 1)")
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Mean and half-width of its interval by Student's t.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean of no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Mean(mean, t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n), n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95) -> Mean | None:
    """Mean of ``first - second`` over the seeds that both have, or ``None`` where they share none."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    return mean_interval([first[seed] - second[seed] for seed in seeds], confidence)
