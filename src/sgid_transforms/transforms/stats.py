"""What the transform did, summed over all processes."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Stats:
    """Counts since the transform was made; ``after - before`` gives those of an epoch.

    Args:
        seen: images that came by.
        gated: those that the gate chose for replacement.
        hits: gated ones whose variant was in the store.
        misses: gated ones whose variant was not.
        generated: variants that were made and stored.
        filtered: variants that the filters rejected for good; their images stay as they are.
        failed: variants that could not be made because of an error.
        unavailable: gated images whose variant is known to have been filtered earlier.
        missing: gated images without a caption or label, left as they are (``missing="original"``).
        queued: variants asked for without waiting (``on_miss="queue"``).
        dropped: variants not asked for because the queue was full.
        fallbacks: images left as they are because the service or the model failed (``on_error="original"``).
        waits: calls that waited for the model.
        waited_us: microseconds that they waited, together.
    """

    seen: int = 0
    gated: int = 0
    hits: int = 0
    misses: int = 0
    generated: int = 0
    filtered: int = 0
    failed: int = 0
    unavailable: int = 0
    missing: int = 0
    queued: int = 0
    dropped: int = 0
    fallbacks: int = 0
    waits: int = 0
    waited_us: int = 0

    @property
    def mean_wait(self) -> float:
        """Seconds that a call which had to wait waited, on average."""
        return self.waited_us / self.waits / 1e6 if self.waits else 0.0

    def summary(self) -> str:
        """One line; the rarer counts are named only where they are not 0."""
        shown = ["seen", "gated", "hits", "misses", "generated", "filtered", "failed"]
        rare = ["unavailable", "missing", "queued", "dropped", "fallbacks"]
        parts = [f"{getattr(self, name)} {name}" for name in [*shown, *(name for name in rare if getattr(self, name))]]
        return f"SGID: {', '.join(parts)}, mean wait {1000 * self.mean_wait:.1f} ms"

    def __sub__(self, other: Self) -> "Stats":
        return Stats(**{field.name: getattr(self, field.name) - getattr(other, field.name) for field in fields(self)})


STAT_NAMES = tuple(field.name for field in fields(Stats))
