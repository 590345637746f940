"""The workers' side of the service: a picklable handle that connects when it is first used."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from sgid_transforms.errors import ServiceError
from sgid_transforms.service.protocol import Item, recv_frame, send_frame

_FULL_PAUSE = 0.1  # seconds without asking after the background queue was found full


class _Link:
    """One connection, closed when its owner forgets it."""

    def __init__(self, address: str, patience: float) -> None:
        self.pid = os.getpid()
        self.patience = patience
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(patience)
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise

    def check(self) -> None:
        """Notice that the peer is gone, without waiting.

        Raises:
            EOFError, OSError: It is.
        """
        self.socket.settimeout(0)
        try:
            if not self.socket.recv(1, socket.MSG_PEEK):
                raise EOFError("the connection was closed")
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(self.patience)

    def __del__(self) -> None:
        # In a forked child this closes the child's copy only; the parent's connection lives on.
        self.socket.close()


class _Delivery:
    """One frame that nobody waits for, on its way: a thread sends it and reads its acknowledgement."""

    def __init__(self, link: _Link, items: Sequence[Item]) -> None:
        self.link = link
        self.dropped = 0
        self.error: Exception | None = None
        copies = [Item(item.ident, item.meta, bytes(item.payload)) for item in items]  # the caller may go on to change its own
        self._thread = threading.Thread(target=self._run, args=(copies,), daemon=True, name="sgid-enqueue")
        self._thread.start()

    @property
    def under_way(self) -> bool:
        return self._thread.is_alive()

    def _run(self, items: Sequence[Item]) -> None:
        try:
            send_frame(self.link.socket, "enqueue", items)
            _, header, _ = recv_frame(self.link.socket)
            self.dropped = int(header["dropped"])
        except (OSError, EOFError, ValueError) as error:
            self.error = error


class ServiceClient:
    """A handle on a running service; pickles to a few bytes and works in any process and thread of this machine.

    Every (process, thread) opens a connection of its own at its first request, also after a fork.

    Args:
        address (str): Path of the service's socket.
        patience (float): Seconds without any sign of life after which the service counts as dead. A service that
            works on a long batch sends one every second; one that was killed is noticed at once.
    """

    def __init__(self, address: str, patience: float = 60.0) -> None:
        self.address = address
        self.patience = patience
        self._local = threading.local()
        self._delivery: _Delivery | None = None
        self._delivery_lock, self._delivery_pid = threading.Lock(), os.getpid()
        self._full_until = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def wait_until_ready(self) -> int:
        """Wait until the model is loaded; returns the process id of the service.

        Raises:
            ServiceError: The service is gone, or the model could not be loaded; ``__notes__`` then hold the kind of error.
        """
        op, header, _ = self._ask("hello")
        if op == "failed":
            error = ServiceError(header["message"])
            error.add_note(header["kind"])
            raise error
        return int(header["pid"])

    def generate(self, items: Sequence[Item]) -> list[Item]:
        """Send items and wait for their results, in order.

        Raises:
            ServiceError: The service is not there, or died while it worked.
        """
        return self._ask("generate", items)[2]

    def enqueue(self, items: Sequence[Item]) -> int:
        """Ask for items without waiting for them; returns how many are known to be dropped since the last call.

        A thread sends them, as a socket takes no more than some hundred kilobytes before the service reads. One frame per
        process is under way at most, which bounds what a slow service can pile up; what comes meanwhile is dropped.

        Raises:
            ServiceError: The service is not there.
        """
        if self._delivery_pid != os.getpid():  # after a fork: the connection is the parent's, and so was who holds the lock
            self._delivery = None
            self._delivery_lock, self._delivery_pid = threading.Lock(), os.getpid()
        if not self._delivery_lock.acquire(blocking=False):  # another thread is just asking
            return len(items)
        try:
            last = self._delivery
            if last is not None and last.under_way:
                return len(items)
            self._delivery = None
            dropped = 0
            if last is not None:
                if last.error is not None:
                    raise last.error
                dropped = last.dropped
                if dropped:
                    self._full_until = time.monotonic() + _FULL_PAUSE
                    last.dropped = 0
            if self.full:
                self._delivery = last
                return dropped + len(items)
            link = last.link if last is not None else _Link(self.address, self.patience)
            link.check()
            self._delivery = _Delivery(link, items)
            return dropped
        except (OSError, EOFError, ValueError) as error:
            raise self._lost(error) from error
        finally:
            self._delivery_lock.release()

    @property
    def full(self) -> bool:
        """The background queue was full a moment ago; asking again would be in vain."""
        return time.monotonic() < self._full_until

    def stats(self) -> dict[str, Any]:
        """``batches``, ``images``, ``merged``, ``dropped``, ``max_batch`` and ``seconds`` since the start."""
        return self._ask("stats")[1]

    def stop(self) -> None:
        """Tell the service to end after the batch it works on."""
        self._ask("stop")

    def close(self) -> None:
        """Close this thread's connection; the next request opens a new one."""
        self._local.__dict__.pop("link", None)
        if self._delivery is not None and not self._delivery.under_way:
            self._delivery = None

    def _link(self) -> _Link:
        link: _Link | None = getattr(self._local, "link", None)
        if link is None or link.pid != os.getpid():
            self._local.link = link = _Link(self.address, self.patience)
        return link

    def _ask(self, op: str, items: Sequence[Item] = ()) -> tuple[str, dict[str, Any], list[Item]]:
        try:
            link = self._link()
            send_frame(link.socket, op, items)
            while True:
                answer = recv_frame(link.socket)
                if answer[0] != "alive":
                    return answer
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> ServiceError:
        if isinstance(error, TimeoutError):
            return ServiceError(f"the generation service gave no sign of life for {self.patience:g} s; restart it")
        return ServiceError(
            f"the generation service at {self.address} is gone ({type(error).__name__}: {error}); "
            "start it again with `sgid.serve(...)`, or pass on_error='original' to train on without it"
        )
