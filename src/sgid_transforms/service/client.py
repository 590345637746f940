"""The workers' side of the service: a picklable handle that connects when it is first used."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from sgid_transforms.errors import ServiceError
from sgid_transforms.service.wire import Item, recv_frame, send_frame

_FULL_PAUSE = 0.1  # seconds without asking after the background queue was found full


class _Link:
    """One connection, closed when its owner forgets it."""

    def __init__(self, address: str, patience: float) -> None:
        self.pid = os.getpid()
        self.unanswered = 0  # items of an enqueue frame whose acknowledgement was not read yet
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(patience)
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise

    def __del__(self) -> None:
        # In a forked child this closes the child's copy only; the parent's connection lives on.
        self.socket.close()


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

        The acknowledgement is read at the next call: one frame per client is under way at most, which bounds what a
        slow service can pile up, and this call never blocks on the service's work.

        Raises:
            ServiceError: The service is not there.
        """
        try:
            link = self._link()
            dropped, answered = self._read_acknowledgement(link)
            if not answered or time.monotonic() < self._full_until:
                return dropped + len(items)
            send_frame(link.socket, "enqueue", items)
            link.unanswered = len(items)
            return dropped
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise self._lost(error) from error

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

    def _link(self) -> _Link:
        link: _Link | None = getattr(self._local, "link", None)
        if link is None or link.pid != os.getpid():
            self._local.link = link = _Link(self.address, self.patience)
        return link

    def _read_acknowledgement(self, link: _Link) -> tuple[int, bool]:
        """(items dropped, whether the service has answered everything that it was sent)."""
        if not link.unanswered:
            return 0, True
        link.socket.settimeout(0)
        try:
            if not link.socket.recv(1, socket.MSG_PEEK):
                raise EOFError("the connection was closed")
        except BlockingIOError:
            return 0, False
        finally:
            link.socket.settimeout(self.patience)
        _, header, _ = recv_frame(link.socket)
        link.unanswered = 0
        if header["dropped"]:
            self._full_until = time.monotonic() + _FULL_PAUSE
        return int(header["dropped"]), True

    def _ask(self, op: str, items: Sequence[Item] = ()) -> tuple[str, dict[str, Any], list[Item]]:
        try:
            link = self._link()
            if link.unanswered:
                recv_frame(link.socket)
                link.unanswered = 0
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
