"""Builders for service processes in tests; they need no model, so that a process starts quickly."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import DeviceLostError


def wish(key: str, value: int = 0, variant: int = 0, size: int = 4) -> Wanted:
    """A wanted variant of an image of one colour."""
    import torch

    return Wanted(key, variant, torch.full((3, size, size), value, dtype=torch.uint8))


class FakeBuilder:
    """Answers with inverted pixels, notes every batch in a file, and misbehaves where a key asks for it.

    - ``slow...``: takes until the file ``release`` appears in the folder
    - ``fail...``: raises
    - ``die...``: kills its process
    - ``lost...``: loses its device
    """

    def __init__(self, folder: str | None, seconds: float, room: int) -> None:
        self.folder, self.seconds, self.room = folder, seconds, room

    def count(self, outcome: Outcome) -> None:
        pass

    def stream(self, pull: Callable[[int], Sequence[Wanted]]) -> Iterator[list[tuple[Wanted, Outcome]]]:
        while batch := pull(self.room):
            if self.folder is not None:
                with open(Path(self.folder, "batches"), "a") as log:
                    log.write(" ".join(one.key for one in batch) + "\n")
            time.sleep(self.seconds)
            for one in batch:
                if one.key.startswith("slow"):
                    while not Path(str(self.folder), "release").exists():
                        time.sleep(0.01)
                if one.key.startswith("fail"):
                    raise ValueError(f"cannot do {one.key}")
                if one.key.startswith("lost"):
                    raise DeviceLostError("the device stopped working (CUDA error: an illegal memory access was encountered)")
                if one.key.startswith("die"):
                    os.kill(os.getpid(), signal.SIGKILL)
            yield [(one, Outcome(Status.STORED, str(os.getpid()), 255 - one.image)) for one in batch]


def _make(folder: str | None, seconds: float, room: int) -> FakeBuilder:
    return FakeBuilder(folder, seconds, room)


def _refuse(message: str) -> FakeBuilder:
    from sgid_transforms.errors import ModelLoadError

    raise ModelLoadError(message)


def fake_factory(folder: object = None, seconds: float = 0.0, room: int = 16) -> "partial[FakeBuilder]":
    return partial(_make, None if folder is None else str(folder), seconds, room)


def refusing_factory(message: str) -> "partial[FakeBuilder]":
    return partial(_refuse, message)


def batches(folder: object) -> list[list[str]]:
    path = Path(str(folder), "batches")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
