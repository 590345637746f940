"""Several devices behind one stream: each has a process of its own, and takes work as it gets on with it."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

from sgid_transforms.building.builder import BuilderSpec
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import DeviceLostError, GenerationError, ServiceError
from sgid_transforms.service.process import GenerationService
from sgid_transforms.service.server import BuilderFactory, Streams

_CALLS = 4  # under way at a device, since an engine holds four batches
_POLL = 0.05  # seconds between two looks for more work
_MAX_BYTES = 256 << 20  # of originals that are under way
_RESTARTS = 3  # of a device's process, before it is left out
_STRIKES = 2  # deaths of processes that a request may be part of, before it is tried alone

_log = logging.getLogger("sgid_transforms")


class _Member:
    """One device, and its process."""

    def __init__(self, name: str, service: GenerationService) -> None:
        self.name, self.service = name, service
        self.calls = self.restarts = 0
        self.usable = True

    def generate(self, part: list[Wanted]) -> list[Outcome]:
        outcomes = self.service.client.generate(part)
        lost = next((outcome for outcome in outcomes if outcome.status is Status.LOST), None)
        if lost is not None:
            raise DeviceLostError(lost.reason)
        return outcomes


class Fleet:
    """Makes variants on several devices, as a `Builder` does on one.

    A process that dies, or that loses its device, is started again, and the others do what it was working on. A device whose
    process cannot be started any more is left out. A request that kills each process that works on it fails alone.

    Args:
        factories: By the devices' names, what a process calls to load its model; see `GenerationService`.
        batch_size: Variants in one call of a process.
        count: Called with increments as keyword arguments, named after the counters.
        variants: Where the variants are stored.

    Raises:
        ModelLoadError: The model cannot be loaded on one of the devices.
        ServiceError: A process cannot be started.
    """

    def __init__(
        self,
        factories: Sequence[tuple[str, BuilderFactory]],
        *,
        batch_size: int = 16,
        count: Callable[..., None] | None = None,
        variants: Any = None,
    ) -> None:
        self.variants = variants
        self._batch_size = batch_size
        self._count = count or (lambda **counts: None)
        self._members = [_Member(name, GenerationService(factory, max_batch=batch_size)) for name, factory in factories]
        try:
            with ThreadPoolExecutor(len(self._members)) as pool:
                list(pool.map(lambda member: member.service.start(), self._members))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes."""
        for member in self._members:
            member.service.stop()

    def count(self, outcome: Outcome) -> None:
        """Count an outcome. `stream` does not count; its caller does."""
        if outcome.counter is not None:
            self._count(**{outcome.counter: 1})

    def stream(self, pull: Callable[[int], Sequence[Wanted]]) -> Iterator[list[tuple[Wanted, Outcome]]]:
        """Pull wanted variants whenever a device has room for them, and yield each group that is done; see `Builder.stream`.

        Raises:
            DeviceLostError: No device is left.
        """
        again: deque[Wanted] = deque()
        strikes: Counter[tuple[str, int]] = Counter()
        under_way: dict[Future[list[Outcome]], tuple[_Member, list[Wanted], int]] = {}
        starting: dict[Future[Any], _Member] = {}
        with ThreadPoolExecutor((_CALLS + 1) * len(self._members)) as pool:
            while True:
                while (member := self._with_room()) is not None:
                    held = sum(one.image.numel() for _, part, _ in under_way.values() for one in part)
                    part, room = self._next(pull, again, strikes) if held <= _MAX_BYTES else [], 1
                    if not part and again and not member.calls:  # alone in its process, or others would fail with it
                        part, room = [again.popleft()], _CALLS
                    if not part:
                        break
                    member.calls += room
                    under_way[pool.submit(member.generate, part)] = member, part, room
                if not under_way and not starting:
                    if any(member.usable for member in self._members):
                        return
                    names = ", ".join(member.name for member in self._members)
                    raise DeviceLostError(f"no device is left of {names}; see the log for each, and start again")
                for future in wait([*under_way, *starting], _POLL, FIRST_COMPLETED).done:
                    if future in starting:
                        self._started(starting.pop(future), future)
                        continue
                    member, part, room = under_way.pop(future)
                    member.calls -= room
                    try:
                        outcomes = future.result()
                    except (ServiceError, GenerationError) as error:
                        if member.usable:
                            member.usable = False
                            reason = str(error).partition(";")[0]
                            _log.warning("the process of %s ended and is started again: %s", member.name, reason)
                            starting[pool.submit(self._restart, member)] = member
                        if room > 1:
                            reason = f"the process that made it ended: {error}"
                            yield [(part[0], Outcome(Status.FAILED, reason, made=True))]
                        else:
                            self._give_back(part, again, strikes)
                    else:
                        yield list(zip(part, outcomes, strict=True))

    def _with_room(self) -> _Member | None:
        member = min(self._members, key=lambda one: (not one.usable, one.calls))
        return member if member.usable and member.calls < _CALLS else None

    def _next(
        self, pull: Callable[[int], Sequence[Wanted]], again: deque[Wanted], strikes: Counter[tuple[str, int]]
    ) -> list[Wanted]:
        """The next variants to make, without those that may have killed processes; these are last in ``again``."""
        part: list[Wanted] = []
        while again and len(part) < self._batch_size and strikes[again[0].name] < _STRIKES:
            part.append(again.popleft())
        return [*part, *pull(self._batch_size - len(part))] if len(part) < self._batch_size else part

    @staticmethod
    def _give_back(part: list[Wanted], again: deque[Wanted], strikes: Counter[tuple[str, int]]) -> None:
        """Put what a process was working on back, to be made elsewhere."""
        for one in part:
            strikes[one.name] += 1
            if strikes[one.name] < _STRIKES:
                again.appendleft(one)
            else:
                again.append(one)

    def _restart(self, member: _Member) -> None:
        member.restarts += 1
        if member.restarts > _RESTARTS:
            raise ServiceError(f"it ended {member.restarts} times")
        member.service.stop(timeout=0.0)  # what is left of it has no other callers
        member.service.start()

    @staticmethod
    def _started(member: _Member, future: "Future[Any]") -> None:
        error = future.exception()
        member.usable = error is None
        if error is not None:
            _log.error("%s is left out: %s", member.name, error)


def fleet_of(spec: BuilderSpec, devices: Sequence[str]) -> Fleet:
    """A process for each of the devices, which does what a specification says; a device may be named more than once."""
    import torch

    # Two processes with as many threads as there are cores are several times slower than one.
    threads = max(torch.get_num_threads() // max(devices.count("cpu"), 1), 1)
    builds = [(device, replace(spec, device=device, count=None).build) for device in devices]
    factories = [(device, partial(_in_threads, threads, build) if device == "cpu" else build) for device, build in builds]
    return Fleet(factories, batch_size=spec.batch_size, count=spec.count, variants=spec.variants)


def _in_threads(threads: int, build: BuilderFactory) -> Streams:
    import torch

    torch.set_num_threads(threads)
    return build()
