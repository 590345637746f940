"""Dynamic batching: work of many callers is merged, ordered and cut into batches."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sgid_transforms.service.protocol import Item


class PendingRequest:
    """The items of one caller, filled in as the batches that contain them finish."""

    def __init__(self, size: int) -> None:
        self.results: list[Item | None] = [None] * size
        self._missing = size
        self._done = threading.Event()
        if size == 0:
            self._done.set()

    def wait(self, timeout: float | None = None) -> bool:
        """True once every item has its result."""
        return self._done.wait(timeout)

    def _fill(self, position: int, result: Item) -> None:
        self.results[position] = result
        self._missing -= 1
        if self._missing == 0:
            self._done.set()


@dataclass(slots=True)
class _Entry:
    item: Item
    arrived: float
    waiters: list[tuple[PendingRequest, int]] = field(default_factory=list)


@dataclass
class BatchStats:
    """What a :class:`Batcher` has done so far."""

    batches: int = 0
    images: int = 0
    merged: int = 0
    dropped: int = 0


class Batcher:
    """Thread-safe queue between many callers and the one thread that owns the model.

    Args:
        max_batch (int): Largest batch.
        max_wait (float): Seconds that the oldest item waits for company. A batch starts earlier when it is full, or
            when every known caller is waiting, so that no further item can come.
        max_queue (int): Bound of the background queue (:meth:`enqueue`); what exceeds it is dropped and counted.
            Callers that wait (:meth:`submit`) bound themselves: each has one request in flight.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int) -> None:
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.stats = BatchStats()
        self._urgent: dict[str, _Entry] = {}  # dicts keep the order of arrival
        self._background: dict[str, _Entry] = {}
        self._running: dict[str, _Entry] = {}
        self._callers = 0
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    def add_caller(self, count: int = 1) -> None:
        """Tell that a caller came (1) or left (-1)."""
        with self._changed:
            self._callers += count
            self._changed.notify()

    def submit(self, items: Sequence[Item]) -> PendingRequest:
        """Ask for items and wait for them: an item that is already on its way is not started twice."""
        request = PendingRequest(len(items))
        with self._changed:
            for position, item in enumerate(items):
                entry = self._running.get(item.ident) or self._urgent.get(item.ident)
                if entry is None:
                    entry = self._background.pop(item.ident, None)
                    self.stats.merged += entry is not None
                    entry = entry or _Entry(item, time.monotonic())
                    self._urgent[item.ident] = entry
                else:
                    self.stats.merged += 1
                entry.waiters.append((request, position))
            self._waiting += 1
            self._changed.notify()
        return request

    def release(self) -> None:
        """Tell that the caller of :meth:`submit` does not wait any more (it was served, or it is gone)."""
        with self._changed:
            self._waiting -= 1

    def enqueue(self, items: Sequence[Item]) -> int:
        """Ask for items that nobody waits for; returns how many were taken (or were on their way already)."""
        taken = 0
        with self._changed:
            for item in items:
                if item.ident in self._running or item.ident in self._urgent or item.ident in self._background:
                    self.stats.merged += 1
                elif len(self._background) < self.max_queue:
                    self._background[item.ident] = _Entry(item, time.monotonic())
                else:
                    self.stats.dropped += 1
                    continue
                taken += 1
            self._changed.notify()
        return taken

    def next_batch(self) -> list[_Entry] | None:
        """Wait for work and return up to ``max_batch`` entries, those that somebody waits for first; None once closed."""
        with self._changed:
            while not self._closed:
                pending = len(self._urgent) + len(self._background)
                if pending:
                    oldest = min(next(iter(queue.values())).arrived for queue in (self._urgent, self._background) if queue)
                    left = oldest + self.max_wait - time.monotonic()
                    everybody_waits = bool(self._urgent) and self._waiting >= self._callers
                    if pending >= self.max_batch or left <= 0 or everybody_waits:
                        return self._take()
                    self._changed.wait(left)
                else:
                    self._changed.wait()
        return None

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        for queue in (self._urgent, self._background):
            for ident in list(queue)[: self.max_batch - len(batch)]:
                self._running[ident] = entry = queue.pop(ident)
                batch.append(entry)
        self.stats.batches += 1
        self.stats.images += len(batch)
        return batch

    def complete(self, batch: Sequence[_Entry], results: Sequence[Item]) -> None:
        """Hand every result to all who asked for it."""
        with self._changed:
            for entry, result in zip(batch, results, strict=True):
                del self._running[entry.item.ident]
                for request, position in entry.waiters:
                    request._fill(position, result)

    def close(self) -> None:
        """Make :meth:`next_batch` return None."""
        with self._changed:
            self._closed = True
            self._changed.notify()
