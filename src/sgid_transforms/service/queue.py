"""The queue in front of the model: wanted variants of many callers, deduplicated and in order."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.service.protocol import PICTURE_BYTES

_MAX_BACKGROUND = PICTURE_BYTES  # for images that nobody waits for, including those in progress


class _Waiting(NamedTuple):
    wanted: Wanted
    outcome: "Future[Outcome]"
    arrived: float


def _not_made(outcome: "Future[Outcome]") -> "Future[Outcome]":
    follower: Future[Outcome] = Future()
    outcome.add_done_callback(lambda done: follower.set_result(replace(done.result(), made=False)))
    return follower


@dataclass
class QueueStats:
    """Counts since the start: ``batches`` is how often the model took variants, ``images`` how many it took."""

    batches: int = 0
    images: int = 0
    done: int = 0
    merged: int = 0
    dropped: int = 0


class WantedQueue:
    """Thread-safe queue between many callers and the one thread that owns the model, which pulls from it.

    Args:
        max_batch: An idle model waits for this many variants before it starts, but no longer than ``max_wait``. A working model
            pulls as many as it has room for.
        max_wait: Seconds that an idle model lets the oldest variant wait for others. It starts earlier when a batch is full, or
            when every known caller is waiting, so that no more can come.
        max_queue: Maximum number of variants that nobody waits for (`enqueue`). What exceeds this number, or 72 MiB, is dropped
            and counted. Callers that wait (`submit`) need no limit: each has one request in flight.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int) -> None:
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.stats = QueueStats()
        self._urgent: dict[tuple[str, int], _Waiting] = {}  # dicts keep the order of arrival
        self._background: dict[tuple[str, int], _Waiting] = {}
        self._running: dict[tuple[str, int], _Waiting] = {}
        self._claimed: set[tuple[str, int]] = set()  # variants that a caller waits for, who also counts them
        self._callers = 0
        self._blocked = 0
        self._closed = False
        self._refusal: str | None = None
        self._changed = threading.Condition()

    def add_caller(self, count: int = 1) -> None:
        """Register that a caller came (1) or left (-1)."""
        with self._changed:
            self._callers += count
            self._changed.notify()

    def submit(self, wanted: Sequence[Wanted]) -> "list[Future[Outcome]]":
        """Request variants and get futures of their outcomes; a variant that is already under way is not made twice.

        Only the first caller learns that a variant was ``made``, so that it is counted once.
        """
        futures = []
        with self._changed:
            for one in wanted:
                known = self._running.get(one.name) or self._urgent.get(one.name)
                if known is None:
                    known = self._background.pop(one.name, None)
                    self.stats.merged += known is not None
                    known = known or _Waiting(one, Future(), time.monotonic())
                    if self._refusal is not None:
                        futures.append(known.outcome)
                        known.outcome.set_result(Outcome(Status.LOST, self._refusal))
                        continue
                    self._urgent[one.name] = known
                else:
                    self.stats.merged += 1
                futures.append(_not_made(known.outcome) if one.name in self._claimed else known.outcome)
                self._claimed.add(one.name)
            self._blocked += 1
            self._changed.notify()
        return futures

    def release(self) -> None:
        """Register that the caller of `submit` no longer waits (it was served, or it is gone)."""
        with self._changed:
            self._blocked -= 1

    def enqueue(self, wanted: Sequence[Wanted]) -> int:
        """Request variants that nobody waits for; returns how many were taken (or were already under way)."""
        taken = 0
        with self._changed:
            kept = (*self._background.values(), *self._running.values())
            size = sum(waiting.wanted.image.numel() for waiting in kept)
            for one in wanted:
                if one.name in self._running or one.name in self._urgent or one.name in self._background:
                    self.stats.merged += 1
                elif len(self._background) < self.max_queue and size + one.image.numel() <= _MAX_BACKGROUND:
                    # A copy, since the image is a view into its whole frame.
                    self._background[one.name] = _Waiting(replace(one, image=one.image.clone()), Future(), time.monotonic())
                    size += one.image.numel()
                else:
                    self.stats.dropped += 1
                    continue
                taken += 1
            self._changed.notify()
        return taken

    def wait(self) -> bool:
        """Block until an idle model should start; returns False once closed."""
        with self._changed:
            while not self._closed:
                pending = len(self._urgent) + len(self._background)
                if pending:
                    oldest = min(next(iter(queue.values())).arrived for queue in (self._urgent, self._background) if queue)
                    left = oldest + self.max_wait - time.monotonic()
                    everybody_waits = bool(self._urgent) and self._blocked >= self._callers
                    if pending >= self.max_batch or left <= 0 or everybody_waits:
                        return True
                    self._changed.wait(left)
                else:
                    self._changed.wait()
        return False

    def pull(self, room: int) -> list[Wanted]:
        """Take up to ``room`` variants, first those that somebody waits for; none once closed."""
        taken: list[Wanted] = []
        with self._changed:
            if self._closed:
                return taken
            for queue in (self._urgent, self._background):
                for name in list(queue)[: room - len(taken)]:
                    self._running[name] = waiting = queue.pop(name)
                    taken.append(waiting.wanted)
            self.stats.batches += bool(taken)
            self.stats.images += len(taken)
        return taken

    def complete(self, wanted: Wanted, outcome: Outcome) -> bool:
        """Hand an outcome to all callers that asked for it; returns whether any did."""
        with self._changed:
            waiting = self._running.pop(wanted.name)
            claimed = wanted.name in self._claimed
            self._claimed.discard(wanted.name)
            self.stats.done += 1
        waiting.outcome.set_result(outcome)
        return claimed

    def fail(self, reason: str, status: Status = Status.FAILED) -> list[Outcome]:
        """Fail everything that is in progress; returns the outcomes that nobody waits for."""
        with self._changed:
            running = [waiting.wanted for waiting in self._running.values()]
        outcome = Outcome(status, reason, made=True)
        return [outcome for wanted in running if not self.complete(wanted, outcome)]

    def refuse(self, reason: str) -> list[Outcome]:
        """Close, and fail everything, also what is requested from now on; returns the outcomes that nobody waits for."""
        self.close()
        with self._changed:
            self._refusal = reason
            for queue in (self._urgent, self._background):
                self._running |= queue
                queue.clear()
        return self.fail(reason, Status.LOST)

    def close(self) -> None:
        """Make `wait` return False and `pull` nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()
