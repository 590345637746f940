"""The service process: it owns the model, and one thread per client talks to the workers."""

import contextlib
import ctypes
import logging
import math
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sgid_transforms.building.wanted import Outcome, Wanted
from sgid_transforms.errors import DeviceLostError
from sgid_transforms.service.protocol import PICTURE_BYTES, Frame, outcome_header, recv_frame, send_frame, wanted_of
from sgid_transforms.service.queue import WantedQueue

HEARTBEAT = 1.0  # seconds between two signs of life to a waiting client
_FRAME_SECONDS = 60.0  # for a client to send the rest of a frame, or to read an answer
_PAUSE = 0.05  # seconds before the next try after there was no descriptor, thread or room for a client
_GRACE = 2.0  # seconds for pixels to arrive while others wait for room, plus their size divided by
_SLOWEST = 32 << 20  # bytes per second
_FAREWELL = 5.0  # seconds in which callers are told that the device is lost, before the service ends
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger("sgid_transforms")


class Streams(Protocol):
    """What makes variants: a `Builder`."""

    def stream(self, pull: Callable[[int], Sequence[Wanted]]) -> Iterator[list[tuple[Wanted, Outcome]]]: ...

    def count(self, outcome: Outcome) -> None: ...


BuilderFactory = Callable[[], Streams]


@dataclass(eq=False)
class _Guest:
    connection: socket.socket
    size: int
    deadline: float  # for its pixels to arrive; applies while others wait


class Room:
    """Limits the pixels that the service holds at a time, so that its memory is bounded whatever clients send.

    Frames share ``limit`` bytes, from before their pixels are read until they are answered, first come, first served. While
    others wait, a client whose pixels do not arrive is dropped.

    Args:
        limit: In bytes; at least the size of the largest frame.
    """

    def __init__(self, limit: int = PICTURE_BYTES) -> None:
        self._limit = limit
        self._guests: list[_Guest] = []
        self._line: list[_Guest] = []  # in order of arrival, so that small frames cannot delay a large one for ever
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, connection: socket.socket, size: int) -> Iterator[None]:
        """Wait for room and take it; the client is told when it may send.

        Raises:
            OSError: The client is gone.
        """
        guest = _Guest(connection, size, 0.0)
        told = time.monotonic()
        with self._changed:
            self._line.append(guest)
            try:
                while self._line[0] is not guest or not self._fits(size):
                    self._drop_stalled()
                    self._changed.wait(_PAUSE)
                    if time.monotonic() > told + HEARTBEAT:
                        send_frame(connection, "alive")
                        told = time.monotonic()
                guest.deadline = time.monotonic() + _GRACE + size / _SLOWEST
                self._guests.append(guest)
            finally:
                self._line.remove(guest)
                self._changed.notify_all()
        try:
            send_frame(connection, "go")
            yield
        finally:
            with self._changed:
                self._guests.remove(guest)
                self._changed.notify_all()

    def arrived(self, connection: socket.socket) -> None:
        """Register that a client's pixels have arrived, so that it is no longer dropped."""
        with self._changed:
            for guest in self._guests:
                if guest.connection is connection:
                    guest.deadline = math.inf

    def _fits(self, size: int) -> bool:
        return sum(guest.size for guest in self._guests) + size <= self._limit

    def _drop_stalled(self) -> None:
        for guest in self._guests:
            if time.monotonic() > guest.deadline:
                with contextlib.suppress(OSError):
                    guest.connection.shutdown(socket.SHUT_RDWR)  # its thread then reads the end of the stream and exits


class Server:
    """Accepts clients on a listening socket and lets the builder pull what they want.

    Args:
        listener: A listening stream socket.
        queue: The queue of all clients' requests.
        recipe: Fingerprint of the recipe whose variants are made here; requests for another one are refused.
    """

    def __init__(self, listener: socket.socket, queue: WantedQueue, recipe: str | None = None) -> None:
        self._listener = listener
        self._queue = queue
        self._recipe = recipe
        self._loaded = threading.Event()
        self._failure: tuple[str, str] | None = None
        self._started = time.monotonic()
        self._failure_told = threading.Event()
        self._room = Room()

    def run(self, factory: BuilderFactory) -> bool:
        """Load the model in this thread and serve until `stop`; returns False when it could not be loaded, or the device is
        lost."""
        threading.Thread(target=self._accept, daemon=True, name="sgid-accept").start()
        try:
            builder = factory()
        except Exception as error:
            self._failure = (type(error).__name__, str(error) or repr(error))
            self._loaded.set()
            self._failure_told.wait(10)
            return False
        self._loaded.set()
        while self._queue.wait():
            try:
                for group in builder.stream(self._queue.pull):
                    for outcome in [outcome for one, outcome in group if not self._queue.complete(one, outcome)]:
                        builder.count(outcome)
                    del group  # else their pixels stay in memory until the next group
            except DeviceLostError as error:
                _log.error("%s", error)
                for outcome in self._queue.refuse(str(error)):
                    builder.count(outcome)
                time.sleep(_FAREWELL)  # every caller is told why before the process ends
                return False
            except Exception as error:
                _log.error("variants in progress failed\n%s", traceback.format_exc())
                for outcome in self._queue.fail(f"{type(error).__name__}: {error}"):
                    builder.count(outcome)
        return True

    def stop(self) -> None:
        """Stop after the work in progress."""
        self._queue.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True, name="sgid-client").start()
            except (OSError, RuntimeError) as error:  # too many open files or threads: clients that end make room
                if self._listener.fileno() < 0:
                    return
                _log.warning("a client had to wait: %s", error)
                time.sleep(_PAUSE)

    def _talk(self, connection: socket.socket) -> None:
        is_caller = False
        with connection, contextlib.suppress(OSError, EOFError):
            try:
                while True:
                    connection.settimeout(None)
                    connection.recv(1, socket.MSG_PEEK)  # a client may be quiet for as long as it likes, but not within a frame
                    connection.settimeout(_FRAME_SECONDS)
                    with contextlib.ExitStack() as held:
                        frame = recv_frame(connection, lambda size: held.enter_context(self._room.taken(connection, size)))
                        self._room.arrived(connection)
                        if frame.op == "generate" and not is_caller:
                            is_caller = True
                            self._queue.add_caller()
                        self._answer(connection, frame)
                        del frame  # frees its pixels before its room
            except (ValueError, KeyError, TypeError) as error:
                send_frame(connection, "refused", message=str(error))
            finally:
                if is_caller:
                    self._queue.add_caller(-1)

    def _answer(self, connection: socket.socket, frame: Frame) -> None:
        if frame.op in ("generate", "enqueue"):
            recipe = frame.header.get("recipe")
            if None not in (recipe, self._recipe) and recipe != self._recipe:
                raise ValueError(f"this service makes variants of recipe {self._recipe}, not of {recipe}; start one of its own")
        if frame.op == "generate":
            wanted = wanted_of(frame)
            futures = self._queue.submit(wanted)
            try:
                # A dead client is noticed here, too: sending to it raises. Its variants are still made for the store.
                while wait(futures, HEARTBEAT).not_done:
                    send_frame(connection, "alive", done=self._queue.stats.done)
            except OSError:
                wait(futures)  # until then its pixels are held, and need their room
                raise
            finally:
                self._queue.release()
            outcomes = [future.result() for future in futures]
            images = [outcome.image for outcome in outcomes if outcome.image is not None]
            items = outcome_header(wanted, outcomes)
            send_frame(connection, "outcomes", images, number=frame.header.get("number"), items=items)
        elif frame.op == "enqueue":
            wanted = wanted_of(frame)
            send_frame(connection, "queued", dropped=len(wanted) - self._queue.enqueue(wanted))
        elif frame.op == "hello":
            while not self._loaded.wait(HEARTBEAT):
                send_frame(connection, "alive")
            if self._failure is None:
                send_frame(connection, "ready", pid=os.getpid())
            else:
                send_frame(connection, "failed", kind=self._failure[0], message=self._failure[1])
                self._failure_told.set()
        elif frame.op == "stats":
            seconds = time.monotonic() - self._started
            send_frame(connection, "stats", **asdict(self._queue.stats), max_batch=self._queue.max_batch, seconds=seconds)
        else:
            raise ValueError(f"unknown operation {frame.op!r}")


def main(listener_fd: int, parent: int) -> int:
    """Entry point of the service process; the settings come through stdin from the process that started it.

    Anything that comes through that pipe afterwards, or its end, means stop.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops us in order
    logging.basicConfig(format="sgid service: %(message)s", level=logging.WARNING)
    _die_with_parent(parent)
    settings = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by our parent through an anonymous pipe)
    os.nice(settings["niceness"])
    queue = WantedQueue(settings["max_batch"], settings["max_wait"], settings["max_queue"])
    server = Server(socket.socket(fileno=listener_fd), queue, settings.get("recipe"))
    threading.Thread(target=_obey, args=(server, parent), daemon=True, name="sgid-parent").start()
    loaded = server.run(lambda: pickle.loads(settings["factory"])())  # noqa: S301 (as above)
    # Client threads may be inside a native call; nothing is left that must be finished.
    sys.stderr.flush()
    os._exit(0 if loaded else 1)


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, even if it is stopped or in a long native call."""
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(2)


def _obey(server: Server, parent: int) -> None:
    """Stop when the parent says so, and exit when the parent ends, however it ends."""
    stdin = [sys.stdin.fileno()]
    while os.getppid() == parent:
        if select.select(stdin, [], [], 1.0)[0]:
            server.stop()
            stdin = []
    os._exit(2)
