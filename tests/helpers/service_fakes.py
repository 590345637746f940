"""Handlers for service processes in tests; the module imports nothing heavy, so that a process starts quickly."""

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sgid_transforms.service.protocol import Item


class FakeHandler:
    """Reverses payloads, notes every batch in a file, and misbehaves where an item's name asks for it.

    - ``slow...``: takes until the file ``release`` appears in the folder
    - ``fail...``: raises
    - ``die...``: kills its process
    """

    def __init__(self, folder: str | None, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self, items: Sequence[Item]) -> list[Item]:
        if self.folder is not None:
            with open(Path(self.folder, "batches"), "a") as log:
                log.write(" ".join(item.ident for item in items) + "\n")
        time.sleep(self.seconds)
        for item in items:
            if item.ident.startswith("slow"):
                while not Path(str(self.folder), "release").exists():
                    time.sleep(0.01)
            if item.ident.startswith("fail"):
                raise ValueError(f"cannot do {item.ident}")
            if item.ident.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
        return [Item(item.ident, {"pid": os.getpid()}, bytes(item.payload)[::-1]) for item in items]


def _make(folder: str | None, seconds: float) -> FakeHandler:
    return FakeHandler(folder, seconds)


def _refuse(message: str) -> FakeHandler:
    from sgid_transforms.errors import ModelLoadError

    raise ModelLoadError(message)


def fake_factory(folder: object = None, seconds: float = 0.0) -> "partial[FakeHandler]":
    return partial(_make, None if folder is None else str(folder), seconds)


def refusing_factory(message: str) -> "partial[FakeHandler]":
    return partial(_refuse, message)


def batches(folder: object) -> list[list[str]]:
    path = Path(str(folder), "batches")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
