"""What is wanted, and what became of it. The module imports nothing heavy, so that a service process starts quickly."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Status(Enum):
    """What became of a wanted variant."""

    STORED = "stored"  # now, or earlier by another process: look it up
    FILTERED = "filtered"  # every attempt was rejected, for good; the store remembers it
    FAILED = "failed"  # an error, which may not happen again
    LOST = "lost"  # as failed: the device stopped working, and with it all else that this process was to make


@dataclass(frozen=True, eq=False)
class Wanted:
    """One variant that is wanted; equal names mean the same variant.

    Args:
        key: Key of the original image.
        variant: Its number.
        image: The original, uint8 ``(3, H, W)``.
        label: Class name in words, for an image whose record has none.
    """

    key: str
    variant: int
    image: "torch.Tensor"
    label: str | None = None

    @property
    def name(self) -> tuple[str, int]:
        """What identifies it within its recipe."""
        return self.key, self.variant


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one wanted variant.

    Args:
        status: Whether it can be looked up.
        reason: Why not, in words.
        image: uint8 ``(3, H, W)``, only where the store could not be written, so that nobody can look it up.
        made: Whether it was made for this request, and is counted with it.
    """

    status: Status
    reason: str = ""
    image: "torch.Tensor | None" = None
    made: bool = False

    @property
    def counter(self) -> str | None:
        """The name of the counter that goes up, if any."""
        return _COUNTERS[self.status] if self.made else None


_COUNTERS = {Status.STORED: "generated", Status.FILTERED: "filtered", Status.FAILED: "failed", Status.LOST: "failed"}
