"""The service process: it owns the model, and one thread per client talks to the workers.

The module imports nothing heavy: whatever the handler needs is imported by the factory that makes it.
"""

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from sgid_transforms.service.protocol import Item, recv_frame, send_frame
from sgid_transforms.service.queue import Batcher

Handler = Callable[[Sequence[Item]], Sequence[Item]]
HandlerFactory = Callable[[], Handler]

HEARTBEAT = 1.0  # seconds between two signs of life towards a client that waits

_log = logging.getLogger("sgid_transforms.service")


class Server:
    """Accepts clients on a listening socket and runs the handler over batches of their items.

    Args:
        listener (socket.socket): A listening stream socket.
        batcher (Batcher): Where the items of all clients meet.
    """

    def __init__(self, listener: socket.socket, batcher: Batcher) -> None:
        self._listener = listener
        self._batcher = batcher
        self._loaded = threading.Event()
        self._failure: tuple[str, str] | None = None
        self._started = time.monotonic()
        self._failure_told = threading.Event()

    def run(self, factory: HandlerFactory) -> bool:
        """Load the model in this thread and serve until :meth:`stop`; returns False when it could not be loaded."""
        threading.Thread(target=self._accept, daemon=True, name="sgid-accept").start()
        try:
            handler = factory()
        except Exception as error:
            self._failure = (type(error).__name__, str(error) or repr(error))
            self._loaded.set()
            self._failure_told.wait(10)
            return False
        self._loaded.set()
        while (batch := self._batcher.next_batch()) is not None:
            items = [entry.item for entry in batch]
            self._batcher.complete(batch, _run_handler(handler, items))
        return True

    def stop(self) -> None:
        self._batcher.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True, name="sgid-client").start()

    def _talk(self, connection: socket.socket) -> None:
        is_caller = False
        with connection, contextlib.suppress(OSError, EOFError, ValueError):
            try:
                while True:
                    op, _, items = recv_frame(connection)
                    if op == "generate" and not is_caller:
                        is_caller = True
                        self._batcher.add_caller()
                    self._answer(connection, op, items)
            finally:
                if is_caller:
                    self._batcher.add_caller(-1)

    def _answer(self, connection: socket.socket, op: str, items: list[Item]) -> None:
        if op == "generate":
            request = self._batcher.submit(items)
            try:
                # A client that died is noticed here, too: sending to it raises, and its items go on for the store.
                while not request.wait(HEARTBEAT):
                    send_frame(connection, "alive")
            finally:
                self._batcher.release()
            send_frame(connection, "results", [result for result in request.results if result is not None])
        elif op == "enqueue":
            taken = self._batcher.enqueue(items)
            send_frame(connection, "queued", dropped=len(items) - taken)
        elif op == "hello":
            while not self._loaded.wait(HEARTBEAT):
                send_frame(connection, "alive")
            if self._failure is None:
                send_frame(connection, "ready", pid=os.getpid())
            else:
                send_frame(connection, "failed", kind=self._failure[0], message=self._failure[1])
                self._failure_told.set()
        elif op == "stats":
            seconds = time.monotonic() - self._started
            send_frame(connection, "stats", **asdict(self._batcher.stats), max_batch=self._batcher.max_batch, seconds=seconds)
        elif op == "stop":
            self.stop()
            send_frame(connection, "stopping")
        else:
            raise ValueError(f"unknown operation {op!r}")


def _run_handler(handler: Handler, items: Sequence[Item]) -> Sequence[Item]:
    try:
        results = handler(items)
        if len(results) != len(items):
            raise RuntimeError(f"the handler returned {len(results)} results for {len(items)} items")
    except Exception as error:
        _log.exception("a batch of %d failed", len(items))
        message = f"{type(error).__name__}: {error}"
        return [Item(item.ident, {"error": message}) for item in items]
    return results


def main(listener_fd: int, parent: int) -> int:
    """Entry point of the service process; the settings come through stdin from the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the starter stops us in order
    logging.basicConfig(format="sgid service: %(message)s", level=logging.WARNING)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True, name="sgid-parent").start()
    settings = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by our parent through an anonymous pipe)
    batcher = Batcher(settings["max_batch"], settings["max_wait"], settings["max_queue"])
    server = Server(socket.socket(fileno=listener_fd), batcher)
    loaded = server.run(lambda: pickle.loads(settings["factory"])())  # noqa: S301 (as above)
    # Client threads may be inside a native call; nothing is left to be done that must not be cut.
    sys.stderr.flush()
    os._exit(0 if loaded else 1)


def _exit_with(parent: int) -> None:
    """End this process when the one that started it is gone, however that one ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(2)
