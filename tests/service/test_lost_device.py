"""A device that stops working ends the service, and every caller learns why, at once."""

import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from service_fakes import fake_factory, wish
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import DeviceLostError, ServiceError
from sgid_transforms.service import GenerationService, ServiceClient, server
from sgid_transforms.service.queue import WantedQueue

REASON = "the device stopped working (CUDA error: an illegal memory access was encountered)"


class Losing:
    """Answers ``good`` batches, and then loses its device; notes when."""

    def __init__(self, good: int) -> None:
        self.good, self.lost_at, self.answered = good, 0.0, set[tuple[str, int]]()

    def count(self, outcome: Outcome) -> None:
        pass

    def stream(self, pull: Callable[[int], Sequence[Wanted]]) -> Iterator[list[tuple[Wanted, Outcome]]]:
        while batch := pull(4):
            if not self.good:
                self.lost_at = time.monotonic()
                raise DeviceLostError(REASON)
            self.good -= 1
            self.answered |= {one.name for one in batch}
            yield [(one, Outcome(Status.STORED, "", 255 - one.image)) for one in batch]


@pytest.mark.parametrize("seed", range(100))
def test_every_waiting_caller_is_told_within_a_second(seed, monkeypatch):
    monkeypatch.setattr(server, "_FAREWELL", 0.5)
    chance = random.Random(seed)
    builder = Losing(chance.randrange(12))
    got: list[tuple[float, str]] = []
    wrong: list[Outcome] = []

    def work(client: ServiceClient, number: int) -> None:
        try:
            ask(client, number)
        finally:
            client.close()

    def ask(client: ServiceClient, number: int) -> None:
        for turn in range(1000):
            wanted = [wish(f"w{number}", turn, turn * 4 + n) for n in range(chance.randint(1, 4))]
            try:
                outcomes = client.generate(wanted)
            except ServiceError as error:
                got.append((time.monotonic(), str(error)))
                return
            for one, outcome in zip(wanted, outcomes, strict=True):
                if outcome.status is Status.STORED and one.name not in builder.answered:
                    wrong.append(outcome)
            failed = [outcome.reason for outcome in outcomes if outcome.status is Status.LOST]
            if failed:
                got.append((time.monotonic(), failed[0]))
                return

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        address = str(Path(folder, "socket"))
        listener.bind(address)
        listener.listen()
        serving = server.Server(listener, WantedQueue(4, 0.0, 16))
        results: list[bool] = []
        threads = [threading.Thread(target=lambda: results.append(serving.run(lambda: builder)))]
        threads += [threading.Thread(target=work, args=(ServiceClient(address), number)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        listener.shutdown(socket.SHUT_RDWR)  # ends the thread that accepts clients
    assert results == [False]
    assert [reason for _, reason in got] == [REASON] * 3
    assert all(when - builder.lost_at < 1 for when, _ in got)
    assert not wrong


def test_the_process_ends_and_later_callers_are_told_to_start_it_again():
    service = GenerationService(fake_factory(), max_wait=0.0).start()
    try:
        [outcome] = service.client.generate([wish("lost")])
        assert (outcome.status, outcome.reason) == (Status.LOST, REASON)
        [outcome] = service.client.generate([wish("other")])  # told the same while it says farewell
        assert (outcome.status, outcome.reason) == (Status.LOST, REASON)
        process = service._process
        assert process.wait(30) == 1
        assert not service.alive
        with pytest.raises(ServiceError, match=r"is gone .* start it again"):
            service.client.generate([wish("third")])
    finally:
        service.stop()
