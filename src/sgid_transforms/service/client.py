"""The workers' side of the service: a picklable handle that connects when it is first used."""

import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import ServiceError
from sgid_transforms.files import Waiting
from sgid_transforms.service.protocol import (
    FRAME_BYTES,
    FRAME_ITEMS,
    PICTURE_BYTES,
    Frame,
    outcomes_of,
    recv_frame,
    send_frame,
    wanted_header,
)

_FULL_PAUSE = 0.1  # seconds to wait before asking again after the background queue was full


class _Link:
    """One connection, closed when it is garbage-collected."""

    def __init__(self, address: str, patience: float, timeout: float | None = None) -> None:
        self.pid = os.getpid()
        self.patience = patience  # timeout of each read and write, in seconds
        deadline = time.monotonic() + (patience if timeout is None else min(patience, timeout))
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(patience)
                connection.connect(address)
            except OSError as error:
                connection.close()
                if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                    raise
                time.sleep(_FULL_PAUSE)  # too many clients are waiting to be accepted
            else:
                break
        self.socket = connection

    def check(self) -> None:
        """Check without waiting that the peer is still there.

        Raises:
            EOFError, OSError: The peer is gone.
        """
        self.socket.settimeout(0)
        try:
            if not self.socket.recv(1, socket.MSG_PEEK):
                raise EOFError("the connection was closed")
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(self.patience)

    def wait(self, waiting: Waiting) -> None:
        """Wait until something can be read.

        Raises:
            TimeoutError: There was no sign of life for too long, or the deadline has passed.
        """
        silent_from = time.monotonic() + self.patience
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while not poll.poll(1e3 * max(0.0, min(waiting.check(), silent_from - time.monotonic()))):
            if time.monotonic() >= silent_from:
                raise TimeoutError(f"the generation service gave no sign of life for {self.patience:g} s")

    def answer(self, waiting: Waiting, op: str = "") -> Frame:
        """The next frame that is not just a sign of life.

        Raises:
            ValueError: The service refused, or answered with another operation than ``op``.
            EOFError, OSError: The service is gone, or silent.
        """
        done: object = None
        while True:
            self.wait(waiting)
            frame = recv_frame(self.socket)
            if frame.op == "refused" or (op and frame.op not in (op, "alive")):
                raise ValueError(frame.header.get("message", f"the service answered {frame.op!r:.40}"))
            if frame.op != "alive":
                return frame
            before, done = done, frame.header.get("done")
            if before not in (None, done):
                waiting.progress()

    def __del__(self) -> None:
        # In a forked child this closes the child's copy only; the parent's connection lives on.
        if hasattr(self, "socket"):  # else it never connected
            self.socket.close()


class _Delivery:
    """One frame that nobody waits for: a thread sends it and reads its acknowledgement."""

    def __init__(self, link: _Link, wanted: Sequence[Wanted], recipe: str | None) -> None:
        self.link = link
        self.dropped = 0
        self.error: Exception | None = None
        images = [one.image.clone() for one in wanted]  # the caller may change its own afterwards
        self._thread = threading.Thread(
            target=self._run, args=(images, wanted_header(wanted), recipe), daemon=True, name="sgid-enqueue"
        )
        self._thread.start()

    @property
    def under_way(self) -> bool:
        return self._thread.is_alive()

    def _run(self, images: Sequence[Any], items: Sequence[Any], recipe: str | None) -> None:
        try:
            waiting = Waiting("room for variants in the generation service")
            send_frame(
                self.link.socket, "enqueue", images, ask=lambda: self.link.answer(waiting, "go"), items=items, recipe=recipe
            )
            self.dropped = int(self.link.answer(waiting, "queued").header["dropped"])
        except (OSError, EOFError, ValueError) as error:
            self.error = error


class ServiceClient:
    """A handle on a running service; pickles to a few bytes and works in any process and thread of this machine.

    Every thread of every process opens its own connection at its first request, also after a fork. An answer is used only if it
    matches its request, and a connection is closed if a request on it was interrupted.

    Args:
        address: Path of the service's socket.
        patience: Seconds without any sign of life after which the service counts as dead. A service that works on a long batch
            sends one every second; a killed service is noticed at once.
        recipe: Fingerprint of the recipe whose variants are wanted; a service for another recipe refuses.
        timeout: Maximum seconds that a call of `generate` waits, even while the service shows signs of life.
    """

    def __init__(self, address: str, patience: float = 60.0, recipe: str | None = None, timeout: float | None = None) -> None:
        self.address = address
        self.patience = patience
        self.recipe = recipe
        self.timeout = timeout
        self._local = threading.local()
        self._numbers = itertools.count()
        self._delivery: _Delivery | None = None
        self._delivery_lock, self._delivery_pid = threading.Lock(), os.getpid()
        self._full_until = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("address", "patience", "recipe", "timeout")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def wait_until_ready(self, timeout: float | None = None) -> int:
        """Wait until the model is loaded; returns the process id of the service.

        Raises:
            ServiceError: The service is gone, was not ready in ``timeout`` seconds, or the model could not be loaded;
                ``__notes__`` then hold the kind of error.
        """
        frame = self._ask(Waiting("the generation service to load its model", timeout), "hello")
        if frame.op == "failed":
            error = ServiceError(frame.header["message"])
            error.add_note(frame.header["kind"])
            raise error
        return int(frame.header["pid"])

    def generate(self, wanted: Sequence[Wanted]) -> list[Outcome]:
        """Ask for variants and wait for their outcomes, in order.

        Raises:
            ServiceError: The service is not running, died, took too long, or answered a different request.
        """
        outcomes: dict[int, Outcome] = {}
        fitting = {}
        for position, one in enumerate(wanted):
            if reason := too_large(one):
                outcomes[position] = Outcome(Status.FAILED, reason, made=True)
            else:
                fitting[position] = one
        waiting = Waiting(f"{len(fitting)} variants from the generation service at {self.address}", self.timeout)
        made: list[Outcome] = []
        for part in _frames(list(fitting.values())):
            number = next(self._numbers)
            images = [one.image for one in part]
            frame = self._ask(waiting, "generate", images, items=wanted_header(part), number=number, recipe=self.recipe)
            try:
                if frame.op != "outcomes" or frame.header.get("number") != number:
                    raise ValueError("the service answered a different request")
                made += outcomes_of(frame, part)
            except (ValueError, KeyError) as error:
                self.close()
                raise self._lost(error) from error
        outcomes |= zip(fitting, made, strict=True)
        return [outcomes[position] for position in range(len(wanted))]

    def enqueue(self, wanted: Sequence[Wanted]) -> int:
        """Request variants without waiting for them; returns how many are known to have been dropped since the last call.

        A thread sends them, since a socket buffers only some hundred kilobytes until the service reads. Each process sends at
        most one frame at a time, so that requests cannot pile up at a slow service; those made meanwhile are dropped.

        Raises:
            ServiceError: The service is not running.
        """
        if self._delivery_pid != os.getpid():  # after a fork: connection and lock belong to the parent
            self._delivery = None
            self._delivery_lock, self._delivery_pid = threading.Lock(), os.getpid()
        if not self._delivery_lock.acquire(blocking=False):  # another thread is sending
            return len(wanted)
        try:
            last = self._delivery
            if last is not None and last.under_way:
                return len(wanted)
            self._delivery = None
            dropped = 0
            if last is not None:
                if last.error is not None:
                    raise last.error
                dropped = last.dropped
                if dropped:
                    self._full_until = time.monotonic() + _FULL_PAUSE
                    last.dropped = 0
            if time.monotonic() < self._full_until:
                self._delivery = last
                return dropped + len(wanted)
            link = last.link if last is not None else _Link(self.address, self.patience)
            link.check()
            first, *rest = _frames(wanted)
            self._delivery = _Delivery(link, first, self.recipe)
            return dropped + sum(map(len, rest))
        except (OSError, EOFError, ValueError) as error:
            raise self._lost(error) from error
        finally:
            self._delivery_lock.release()

    @property
    def full(self) -> bool:
        """Whether `enqueue` would drop all now: the queue was full a moment ago, or the last frame is still on its way."""
        last = self._delivery if self._delivery_pid == os.getpid() else None
        return time.monotonic() < self._full_until or (last is not None and last.under_way)

    def stats(self, timeout: float | None = None) -> dict[str, Any]:
        """``batches``, ``images``, ``done``, ``merged``, ``dropped``, ``max_batch`` and ``seconds`` since the start."""
        return self._ask(Waiting("the counts of the generation service", timeout), "stats").header

    def close(self) -> None:
        """Close this thread's connection; the next request opens a new one."""
        self._local.__dict__.pop("link", None)
        if self._delivery is not None and not self._delivery.under_way:
            self._delivery = None

    def _link(self, timeout: float | None) -> _Link:
        link: _Link | None = getattr(self._local, "link", None)
        if link is None or link.pid != os.getpid():
            self._local.link = link = _Link(self.address, self.patience, timeout)
        return link

    def _ask(self, waiting: Waiting, op: str, images: Sequence[Any] = (), /, **header: Any) -> Frame:
        try:
            link = self._link(waiting.timeout)
            link.socket.settimeout(self.patience if waiting.timeout is None else min(self.patience, waiting.timeout))
            send_frame(link.socket, op, images, ask=lambda: link.answer(waiting, "go"), **header)
            return link.answer(waiting)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise self._lost(error) from error
        except BaseException:  # interrupted: the next request must not receive the answer to this one
            self.close()
            raise

    def _lost(self, error: BaseException) -> ServiceError:
        if isinstance(error, TimeoutError):
            reason = "the generation service does not read" if error.args == ("timed out",) else str(error)
            return ServiceError(f"{reason}; restart the service at {self.address}, or give it more time")
        if isinstance(error, ValueError):
            return ServiceError(f"the generation service at {self.address} cannot be used: {error}")
        return ServiceError(
            f"the generation service at {self.address} is gone ({type(error).__name__}: {error}); "
            "start it again with `sgid.serve(...)`, or pass on_error='original' to continue training without it"
        )


def too_large(one: Wanted) -> str | None:
    """Why the service cannot take this picture, or None."""
    height, width = one.image.shape[1:]
    if 3 * height * width <= PICTURE_BYTES:
        return None
    return (
        f"a picture of {width} x {height} pixels is too large for the generation service, which takes {PICTURE_BYTES // 3:,}; "
        "scale it down before SGIDAugment, or make its variants beforehand with `sgid generate`"
    )


def _frames(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Split requests into parts whose pixels fit into one frame; yields at least one part, which may be empty."""
    part: list[Wanted] = []
    size = 0
    for one in wanted:
        if part and (size + one.image.numel() > FRAME_BYTES or len(part) == FRAME_ITEMS):
            yield part
            part, size = [], 0
        part.append(one)
        size += one.image.numel()
    yield part
