"""Several processes behind one stream: work is shared out, survives the death of a process, and ends where nothing is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from service_fakes import batches, fake_factory, refusing_factory, wish
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import DeviceLostError, ModelLoadError
from sgid_transforms.service.fleet import Fleet
from sgid_transforms.service.process import GenerationService


@contextmanager
def fleet(folder: Path, count: int = 2, seconds: float = 0.0) -> Iterator[Fleet]:
    made = Fleet([(f"cuda:{n}", fake_factory(folder, seconds)) for n in range(count)], batch_size=4)
    try:
        yield made
    finally:
        made.stop()


def pull_from(wanted: Sequence[Wanted]) -> Callable[[int], list[Wanted]]:
    waiting = list(wanted)

    def pull(room: int) -> list[Wanted]:
        taken, waiting[:] = waiting[:room], waiting[room:]
        return taken

    return pull


def run(one: Fleet, wanted: Sequence[Wanted]) -> dict[str, Outcome]:
    got = [pair for group in one.stream(pull_from(wanted)) for pair in group]
    assert len(got) == len(wanted)  # each is answered once
    return {one.key: outcome for one, outcome in got}


def processes(one: Fleet) -> list[int]:
    return [member.service.pid or 0 for member in one._members]


def test_all_devices_work(tmp_path: Path) -> None:
    with fleet(tmp_path, seconds=0.02) as two:
        outcomes = run(two, [wish(f"{n:08x}", n % 256) for n in range(64)])
        makers = {outcome.reason for outcome in outcomes.values()}
        assert makers == set(map(str, processes(two)))
        assert all(outcome.status is Status.STORED for outcome in outcomes.values())
        image = outcomes[f"{3:08x}"].image
        assert image is not None
        assert int(image[0, 0, 0]) == 255 - 3
    assert max(map(len, batches(tmp_path))) <= 16


def test_what_a_killed_process_was_working_on_is_made_by_others(tmp_path: Path) -> None:
    with fleet(tmp_path, seconds=0.05) as two:
        first = processes(two)
        killer = threading.Timer(0.2, os.kill, (first[0], signal.SIGKILL))
        killer.start()
        outcomes = run(two, [wish(f"{n:08x}") for n in range(200)])
        killer.join()
        assert all(outcome.status is Status.STORED for outcome in outcomes.values())
        assert processes(two)[0] != first[0]  # started again
        assert processes(two)[1] == first[1]
        assert {outcome.reason for outcome in run(two, [wish(f"{n:08x}") for n in range(64)]).values()} == set(
            map(str, processes(two))
        )


def test_a_lost_device_is_started_again_and_what_lost_it_fails_alone(tmp_path: Path) -> None:
    with fleet(tmp_path) as two:
        outcomes = run(
            two, [wish(f"{n:08x}") for n in range(10)] + [wish("lost0001")] + [wish(f"{n:08x}", 1, 1) for n in range(5)]
        )
        assert outcomes.pop("lost0001").status is Status.FAILED
        assert all(outcome.status is Status.STORED for outcome in outcomes.values())


def test_a_request_that_kills_every_process_fails_alone(tmp_path: Path) -> None:
    with fleet(tmp_path) as two:
        outcomes = run(two, [wish(f"{n:08x}") for n in range(30)] + [wish("die00001")])
        bad = outcomes.pop("die00001")
        assert (bad.status, bad.made) == (Status.FAILED, True)
        assert bad.reason.startswith("the process that made it ended: the generation service at ")
        assert all(outcome.status is Status.STORED for outcome in outcomes.values())


def test_without_any_device_left_the_stream_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(service: GenerationService) -> GenerationService:
        raise ModelLoadError("there is no such device any more")

    with fleet(tmp_path) as two:
        monkeypatch.setattr(GenerationService, "start", broken)
        with pytest.raises(DeviceLostError, match=r"^no device is left of cuda:0, cuda:1; see the log for each"):
            run(two, [wish(f"die{n:05x}") for n in range(20)])
        with pytest.raises(DeviceLostError, match="no device is left"):
            run(two, [wish("00000001")])


def test_a_device_that_cannot_be_started_again_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(tmp_path) as two:
        pid = processes(two)[1]
        monkeypatch.setattr("sgid_transforms.service.fleet._RESTARTS", 0)
        os.kill(processes(two)[0], signal.SIGKILL)
        outcomes = run(two, [wish(f"{n:08x}") for n in range(100)])
        assert {outcome.reason for outcome in outcomes.values()} == {str(pid)}


def test_a_model_that_cannot_be_loaded_on_one_device_ends_all(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such model"):
        Fleet([("cuda:0", fake_factory(tmp_path)), ("cuda:1", refusing_factory("no such model"))])


def test_outcomes_are_counted_by_their_kind() -> None:
    counts: list[dict[str, int]] = []
    two = Fleet.__new__(Fleet)
    two._count = lambda **more: counts.append(more)
    for outcome in (Outcome(Status.STORED, made=True), Outcome(Status.LOST, made=True), Outcome(Status.STORED)):
        two.count(outcome)
    assert counts == [{"generated": 1}, {"failed": 1}]
